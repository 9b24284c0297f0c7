"""Programs that the generator or the mutation tester found to be wrong, reduced."""

from __future__ import annotations

import collections
import queue
import types

import torch
from torch import nn

from tests.soundness.harness import Seen, program
from tests.soundness.world import Config, X, backward, make_classes


def state(**values):
    return types.SimpleNamespace(**values)


# ---- errors: what happened before them has happened ----


@program("exceptions")
def state_written_before_an_exception():
    world = state(count=0)

    def f(x):
        world.count += 1
        x.add_(1)
        raise ValueError("no")

    x = X()
    yield f, x
    yield Seen(x=x, world=world)
    yield x
    yield Seen(x=x, world=world)


@program("exceptions")
def state_written_before_a_kernel_fails():
    world = state(count=0)

    def f(x, i):
        world.count += 1
        x.add_(1)
        return x[i]

    x = X()
    yield f, x, torch.tensor([0, 1])
    yield x, torch.tensor([0, 9])
    yield Seen(x=x, world=world)


@program("exceptions")
def write_to_a_leaf_that_requires_grad():
    world = state(count=0)

    def f(x):
        world.count += 1
        x.mul_(2)

    yield f, X(grad=True)
    yield Seen(world=world)


@program("exceptions")
def write_to_a_tensor_that_overlaps_itself():
    world = state(count=0)

    def f(x):
        world.count += 1
        x.mul_(2)

    yield f, X()
    yield torch.ones(1).expand(4)
    yield Seen(world=world)


@program("exceptions")
def write_that_reads_a_part_of_what_it_writes():
    def f(x, y):
        y.zero_()
        x[[0, 2]] = x[:2]

    x, y = X(), X()
    yield f, x, y
    yield Seen(x=x, y=y)


@program("exceptions")
def refused_write_that_the_program_catches():
    def f(x):
        try:
            x.mul_(2)
        except RuntimeError:
            return x - 1
        return x + 1

    yield f, X()
    yield X(grad=True)
    yield X()


@program("exceptions")
def integers_written_to_a_mask():
    def f(x):
        x.mul_(3)

    yield f, X()
    yield X() > 0


@program("exceptions")
def subtraction_of_true():
    yield lambda x, s: x - s, X(), 1
    yield X(), True


@program("exceptions")
def write_to_one_of_several_views():
    def f(x):
        part = (x * 2).chunk(2)[0]
        part.mul_(2)
        return part

    yield f, X()
    yield X(grad=True)


@program("exceptions")
def result_written_to_something_that_requires_grad():
    def f(x, y):
        torch.add(x, x, out=y)

    yield f, X(), X()
    yield X(), X(grad=True)


# ---- writes that were lost or not put back ----


@program("writes")
def write_through_a_view_under_inference_mode():
    store = torch.zeros(4)

    def f(x):
        store[1:3] = 7
        t = x * 2
        t[0] = 5
        return t

    with torch.inference_mode():
        yield f, X()
    yield Seen(store=store)


@program("containers")
def order_of_an_ordered_dictionary():
    order = collections.OrderedDict(a=1.0, b=2.0)

    def f(x):
        order.move_to_end("a")
        order["c"] = order["a"]
        return x * next(iter(order.values()))

    yield f, X()
    yield Seen(order=order)
    yield X()
    yield Seen(order=order)


@program("containers")
def key_added_to_an_ordered_dictionary():
    order = collections.OrderedDict(b=1.0)

    def f(x):
        order["a"] = 3.0
        return x + 1

    yield f, X()
    yield Seen(order=order)
    yield X()
    yield Seen(order=order)


@program("containers")
def key_that_comes_back_at_the_end():
    table = {"a": 1.0, "b": 2.0}

    def f(x):
        table["a"] = table.pop("a")
        return x * next(iter(table.values()))

    yield f, X()
    yield Seen(table=table)
    yield X()
    yield Seen(table=table)


@program("containers")
def attributes_in_another_dictionary():
    config = Config()

    def f(x):
        config.flag = not config.flag
        return x * config.scale

    yield f, X()
    config.__dict__ = dict(vars(config), scale=5.0)
    yield X()
    yield Seen(config=config)


@program("writes")
def write_through_data_of_an_intermediate():
    def f(x):
        t = x * 2
        t.data.add_(1)
        return t

    x = X(grad=True)
    out = yield f, x
    yield Seen(error=backward(out), x=x)


@program("writes")
def write_through_data_of_a_parameter():
    w = nn.Parameter(torch.ones(4))

    def f(x, inside):
        with torch.set_grad_enabled(inside):
            w.data.add_(x)
        return x * w

    yield f, X(), True
    yield X(), False
    yield Seen(w=w)


@program("writes")
def elements_that_require_grad_written_to_an_input():
    def f(x, y):
        y[[0, 2]] = x[:2]
        return y * 1

    x, y = X(grad=True), X()
    out = yield f, x, y
    yield Seen(error=backward(out), x=x, y=y)


@program("writes")
def views_of_one_tensor_that_lie_otherwise():
    def f(x, y):
        x.mul_(2)
        return y + 1

    base = torch.arange(8.0)
    yield f, base[:4], base[4:]
    yield Seen(base=base)
    yield base[:4], base[2:6]
    yield Seen(base=base)
    yield base[:4], base[4:]
    yield Seen(base=base)


@program("writes")
def gradient_of_what_was_made_before_its_memory_was_written():
    w = nn.Parameter(torch.tensor([0.5, -0.5, 1.0, 0.0]))

    def f(x):
        view = x.T
        view.add_(x)
        return view, torch.copysign((x * 1.5 + w) * 2, torch.tensor(2.0))

    out = yield f, X()
    yield Seen(error=backward(out), w=w)


@program("writes")
def memory_of_one_tensor_set_to_that_of_another():
    def f(x, y):
        for _ in range(2):
            x.clamp_(max=1)
            x.set_(y * 2)
        return x + 1

    x = X()
    yield f, x, X(0.5)
    yield Seen(x=x)


# ---- autograd's state ----


@program("grad modes")
def detached_in_place():
    def f(x):
        x.detach_()
        return x * 2

    yield f, X()
    x = X(grad=True)
    yield x
    yield Seen(x=x)
    yield X()[:]


@program("grad modes")
def made_to_require_grad_after_a_write():
    def f(x):
        x.add_(1)
        x.requires_grad_()
        return x * 2

    x = X()
    yield f, x
    yield Seen(x=x)


@program("grad modes")
def shape_of_another_that_requires_grad():
    yield lambda x, y: (x.view_as(y), x.double().type_as(y)), X(), X()
    yield X(), X(grad=True)


@program("grad modes")
def parts_without_gradients_of_what_requires_it():
    def f(x):
        with torch.no_grad():
            a = torch.dropout(x, 0.0, True)
        return a, torch.ones(2)

    yield f, X()
    yield X(grad=True)


@program("grad modes")
def overwritten_by_what_requires_no_grad():
    store = X(grad=True) * 1

    def f(x):
        store.copy_(x)
        return torch.relu(store)

    yield f, X()
    yield X()


@program("grad modes")
def backward_inside_with_its_error_caught():
    def f(x):
        try:
            (x * 2).sum().backward()
        except Exception:
            return x - 1
        return x + 1

    x = X(grad=True)
    yield f, x
    yield Seen(x=x)


@program("grad modes")
def input_that_the_result_does_not_depend_on():
    w = nn.Parameter(torch.ones(4))
    y = X(grad=True).exp()

    def f(x, y):
        return w * x

    for _ in range(2):
        out = yield (f, X(), y) if w.grad is None else (X(), y)
        yield Seen(error=backward(out), w=w)


# ---- identity ----


@program("metadata")
def parameter_replaced_by_one_that_is_there_already():
    model = make_classes()["Net"]()

    yield (lambda x: x * sum(p.sum() for p in model.parameters())), X()
    model.inner.bias = model.w
    yield X()


@program("metadata")
def one_place_of_a_tied_parameter_replaced():
    model = make_classes()["Net"]()
    model.inner.bias = model.w
    yield (lambda x: x * model.w + model.inner.bias), X()
    model.w = nn.Parameter(torch.full((4,), 3.0))
    yield X()


@program("globals")
def argument_that_is_also_state():
    world = state(last=torch.ones(4))

    yield (lambda x: x + 1 if world.last is x else x - 1), X()
    x = world.last = X()
    yield x
    yield X()


@program("metadata")
def version_base_and_place_of_an_argument():
    yield lambda x: (x._version, x._base is None, x.is_leaf, x + 1), X()
    x = X()
    x.add_(1)
    yield x
    yield X()[:]
    yield X(grad=True)
    yield X(grad=True) * 2


@program("metadata")
def inference_tensor_outside_of_inference_mode():
    def f(x):
        try:
            x.add_(1)
        except RuntimeError:
            return x - 1
        return x + 1

    yield f, X()
    with torch.inference_mode():
        x = X()
    yield x


@program("grad modes")
def infinite_derivative_of_a_result_that_is_not_used():
    x = torch.zeros(4, requires_grad=True)
    out = yield lambda x: (x * 2, x.log()), x
    yield Seen(error=backward(out[0]), x=x)


@program("grad modes")
def written_by_index_and_then_used():
    w = nn.Parameter(torch.ones(4))

    def f(x, y):
        x[[0, 2]] = y[:2]
        return x * w

    out = yield f, X(), X(0.5)
    yield Seen(error=backward(out), w=w)


@program("grad modes")
def detached_view_that_takes_what_requires_grad():
    w = nn.Parameter(torch.ones(4))

    def f(y):
        t = y.detach()
        t.copy_(w)
        return t, y * 1

    out = yield f, X()
    yield Seen(error=backward(out), w=w)


@program("grad modes")
def strided_input_that_takes_what_requires_grad():
    w = nn.Parameter(torch.ones(4))

    def f(y):
        y += w
        return y, y * 2

    out = yield f, X()
    yield Seen(error=backward(out), w=w)
    out = yield (torch.arange(8.0)[::2],)
    yield Seen(error=backward(out), w=w)


@program("grad modes")
def without_gradients_under_autocast():
    def f(x):
        with torch.no_grad():
            doubled = -x
        return doubled, x

    x = X(grad=True)
    out = yield f, x
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = yield (x,)
        yield Seen(error=backward(out), x=x)


@program("exceptions")
def kernel_that_fails_on_what_was_filled():
    def f(x):
        x.fill_(2)
        return x.softmax(-1)

    x = X()
    yield f, x
    x = torch.arange(4)
    yield (x,)
    yield Seen(x=x)


@program("exceptions")
def state_written_before_a_kernel_fails_after_a_draw():
    world = state(count=0)

    def f(x, i):
        world.count += 1
        x.add_(1)
        noise = torch.rand(4)
        return (x + noise)[i]

    x = X()
    yield f, x, torch.tensor([0, 1])
    yield x, torch.tensor([0, 9])
    yield Seen(x=x, world=world, next=torch.rand(2))
    yield x, torch.tensor([2, 3])
    yield Seen(x=x, world=world, next=torch.rand(2))


@program("exceptions")
def slice_of_a_tensor_without_dimensions():
    def f(x):
        total = x.sum()
        try:
            return total[:]
        except IndexError:
            return total - 1

    yield f, X()
    yield (X(1.0),)


# ---- sizes for which `contiguous` gives the tensor itself ----


@program("identity")
def contiguous_part_that_becomes_the_whole():
    def f(x, k):
        y = x[:, :k]
        return y.contiguous() is y

    with torch.no_grad():
        yield f, torch.ones(4, 6), 2
        for k in (3, 4, 6, 5, 7, 6):
            yield torch.ones(4, 6), k


@program("identity")
def contiguous_after_a_transposition_that_does_nothing():
    def f(x, d):
        y = x.transpose(0, d)
        return y.contiguous() is y, y.contiguous() + 1

    with torch.no_grad():
        yield f, torch.ones(2, 3, 4), 1
        for d in (2, 0, 1, 0):
            yield torch.ones(2, 3, 4), d


# ---- inference tensors and gradients ----


def add_inference(name, compute):
    def calls():
        w = nn.Parameter(torch.tensor([1.0, 2.0]))
        world = state(count=0)

        def f(x):
            world.count += 1
            return compute(x, w)

        out = yield f, torch.tensor([1.0, 2.0])
        yield Seen(error=backward(out), w=w, world=world)
        for _ in range(2):
            with torch.inference_mode():
                x = torch.tensor([3.0, -2.0])
            out = yield (x,)
            yield Seen(error=backward(out), w=w, world=world)
        out = yield torch.tensor([1.0, -2.0])
        yield Seen(error=backward(out), w=w, world=world)

    calls.__name__ = f"inference_tensor_with_gradients_{name}"
    program("modes")(calls)


for _name, _compute in {
    "that_eager_does_not_save": lambda x, w: (x * 1.5) * w,
    "that_eager_saves": lambda x, w: x * w,
    "that_is_not_needed": lambda x, w: x + w,
    "in_part": lambda x, w: torch.cat([x, x]) * w.repeat(2),
    "by_a_view": lambda x, w: (x[:1] * 2) * w,
}.items():
    add_inference(_name, _compute)


# ---- views of what requires grad ----


@program("views")
def view_of_a_leaf_that_is_written_to():
    w = nn.Parameter(torch.ones(4))

    def write(out):
        try:
            out.add_(1)
        except RuntimeError:
            return "refused"
        return "written"

    out = yield lambda w: w.view(2, 2), w
    yield Seen(told=write(out), w=w)
    out = yield w
    yield Seen(told=write(out), w=w)
    yield Seen(error=backward(out), w=w)


@program("gradients")
def gradients_that_are_views_of_one_another():
    a, b, w = (nn.Parameter(torch.full((4,), n)) for n in (1.0, 2.0, 3.0))

    def f(x):
        return torch.stack([a, w * -1.0 + b]).sum(0) * x

    for i in range(3):
        out = yield (f, torch.ones(4)) if i == 0 else (torch.ones(4),)
        yield Seen(error=backward(out), a=a, b=b, w=w)


@program("gradients")
def infinite_numbers_in_both_branches():
    def f(x, c):
        t = x * c + 1
        return torch.where(t > 0, t * c, x * c)

    for i, c in enumerate((2.0, float("inf"), -3.0)):
        x = X(grad=True)
        out = yield (f, x, c) if i == 0 else (x, c)
        yield Seen(error=backward(out), x=x)


@program("views")
def one_of_several_views_after_a_write_to_their_base():
    w = nn.Parameter(torch.ones(4))

    def f(x):
        base = x * w
        part = base.chunk(1)[0]
        base[0] += 1
        return part, base

    out = yield f, X()
    yield Seen(needs=out[0].shape, base=out[1])
    yield X(1.0)


@program("views")
def view_made_without_gradients_after_a_write_to_its_base():
    w = nn.Parameter(torch.ones(4))

    def f(x):
        base = x * w
        with torch.no_grad():
            part = base[1:]
        base.add_(1)
        try:
            return part * 2
        except RuntimeError:
            return base

    yield f, X()
    yield (X(1.0),)


@program("writes")
def write_through_data_leaves_the_version():
    def f(x):
        x.data.add_(1)
        return x[:2]

    x, w = X(), nn.Parameter(torch.ones(4))
    for i in range(3):
        loss = (x * w).sum()  # keeps x as it is
        with torch.no_grad():
            out = yield (f, x) if i == 0 else (x,)
        yield Seen(error=backward(loss), x=x, w=w, version=x._version, out=out)
    x = X(grad=True)
    with torch.no_grad():
        out = yield x
    yield Seen(error=backward((out, x)), x=x, version=x._version)


@program("writes")
def write_through_data_of_a_buffer_while_training():
    class Smoothed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))
            self.register_buffer("mean", torch.zeros(4))

        def forward(self, x):
            self.mean.data.mul_(0.9).add_(x.detach(), alpha=0.1)
            return x * self.weight - self.mean

    model = Smoothed()
    out = yield model, X()
    for i in range(3):
        yield Seen(error=backward(out), model=model, version=model.mean._version)
        out = yield (X(i),)


@program("writes")
def part_of_a_strided_leaf_written_without_gradients():
    x = torch.zeros(8)[::2].requires_grad_()

    def f(x):
        x.copy_(x + 1)
        x[:2].neg_()
        return x

    for i in range(3):
        with torch.inference_mode() if i == 1 else torch.no_grad():
            yield (f, x) if i == 0 else (x,)
        yield Seen(x=x)


@program("random")
def numbers_drawn_by_an_operation_that_raises():
    def f(x):
        try:
            return nn.functional.dropout(x, 0.5, True)
        except RuntimeError:
            return torch.zeros(4)

    yield f, X()
    yield (torch.arange(4),)  # draws, then cannot divide
    yield (X(),)


def add_severed(name: str, compute) -> None:
    def calls():
        w = nn.Parameter(torch.full((4,), 2.0))

        def f(x):
            return compute(x, w)

        for i in range(3):
            x = X(float(i))
            out = yield (f, x) if i == 0 else (x,)
            yield Seen(error=backward(out), w=w, x=x)

    calls.__name__ = f"memory_that_takes_what_requires_grad_{name}"
    program("gradients")(calls)


for _name, _compute in {
    "through_detach": lambda x, w: (t := x.sin(), t.detach().mul_(w), t * 3)[2],
    "through_data": lambda x, w: (t := x.sin(), t.data.mul_(w), t * 3)[2],
    "through_detach_of_an_input": lambda x, w: (d := x.detach(), d.mul_(w), d[:2].neg_(), x + 1)[3],
    "through_a_view_of_what_was_detached": lambda x, w: (t := x.sin(), t.detach()[1:].mul_(w[1:]), t * 3)[2],
    "and_is_used_by_both_names": lambda x, w: (t := x.sin(), d := t.detach(), d.mul_(w), t * 3 + d)[3],
}.items():
    add_severed(_name, _compute)


# ---- tensors of the surroundings that the program has changed ----


@program("metadata")
def shape_of_a_global_tensor_that_is_changed_in_place():
    world = state(t=torch.zeros(4))

    def f(x):
        world.t.unsqueeze_(0)
        return x.expand(3, 4) * world.t.shape[0] + world.t.dim(), len(world.t), world.t.stride()

    for i in range(3):
        yield (f, X()) if i == 0 else (X(i),)
        yield Seen(t=world.t)


@program("metadata")
def size_of_a_global_tensor_that_is_resized():
    world = state(t=torch.zeros(4))

    def f(x):
        world.t.resize_(2)
        return x * world.t.shape[0] * world.t.numel()

    yield f, X()
    yield (X(),)
    world.t = torch.zeros(4)
    yield (X(),)


@program("grad modes")
def global_tensor_that_takes_what_requires_grad_is_asked():
    world = state(t=torch.zeros(4))

    def f(x):
        world.t.copy_(x)
        if world.t.requires_grad:
            return x, world.t.is_leaf, world.t.grad_fn is None
        return x * 2

    for x in (X(), X(grad=True), X(grad=True)[:]):
        world.t = torch.zeros(4)
        out = yield (f, x) if not x.requires_grad else (x,)
        yield Seen(error=backward(out), x=x, t=world.t)


# ---- lazy conjugation and negation ----


def add_lazy(name: str, compute) -> None:
    def calls():
        for i in range(4):
            z = torch.complex(X(), X(i)).requires_grad_(i % 2 == 1)
            out = yield (compute, z) if i == 0 else (z,)
            yield Seen(error=backward(out.abs()), z=z, conjugated=out.is_conj(), negated=out.is_neg())

    calls.__name__ = f"negated_view_{name}"
    program("views")(calls)


for _name, _compute in {
    "times_two": lambda z: z.conj().imag * 2,
    "negated_again": lambda z: z.conj().imag.neg(),
    "in_a_chain": lambda z: (z * 2).conj().imag.add(1).mul(z.abs()),
    "of_a_product": lambda z: (z.conj() * 1j).view(2, 2).mH.imag.reshape(4),
    "itself": lambda z: z.conj().imag,
    "by_torch": lambda z: torch._neg_view(z.real) + 1,
    "of_a_conjugated_part": lambda z: z.conj()[1:].imag.sum(),
}.items():
    add_lazy(_name, _compute)


# ---- gradients that do not come in ----


def add_unused(name: str, compute, use) -> None:
    def calls():
        for i in range(4):
            x = torch.zeros(4, requires_grad=True) if i < 3 else X(2.0, grad=True)
            out = yield (compute, x) if i == 0 else (x,)
            grad = torch.autograd.grad(use(out), x, create_graph=i == 2)[0]
            yield Seen(error=backward(grad) if i == 2 and grad.requires_grad else "", grad=grad.detach(), x=x)

    calls.__name__ = f"infinite_derivative_of_what_is_not_used_{name}"
    program("gradients")(calls)


def _parts(x):
    y = x.sqrt()
    a, b = (x * 3).split(2)
    return a * 2, y + 1, b.sin(), torch.cat([y, x])


for _name, _compute, _use in (
    ("of_two", lambda x: (x * 2, x.log()), lambda out: out[0].sum()),
    ("of_three", lambda x: (x * 2, x.log(), x.sqrt(), x.sin()), lambda out: (out[0] + out[3]).sum()),
    ("beside_a_part", _parts, lambda out: out[0].sum()),
    ("beside_two_parts", _parts, lambda out: (out[0] + out[2]).sum()),
    ("and_a_concatenation", _parts, lambda out: out[0].sum() + out[3][4:].sum() * 0.5),
    ("of_a_norm", lambda x: (x.norm(), x * 2, x.view(2, 2).mT @ x.view(2, 2)), lambda out: out[1].sum() + out[2].sum()),
):
    add_unused(_name, _compute, _use)


@program("grad modes")
def hooks_where_a_gradient_does_not_come_in():
    said = []

    def f(x):
        y = x.log()
        y.register_hook(lambda g: said.append(1))
        return x * 2, y

    for i in range(3):
        x = X(2.0, grad=True)
        out = yield (f, x) if i == 0 else (x,)
        yield Seen(error=backward(out[i % 2]), x=x, said=said)


@program("metadata")
def attribute_that_a_parameter_gets_after_the_capture():
    w = nn.Parameter(torch.ones(4))
    yield lambda x: x * w * getattr(w, "factor", 1.0), X()
    w.factor = 2.0
    yield (X(),)


class _Scaled(nn.Module):
    """Reads an attribute of its parameter, which may have none."""

    def __init__(self, scale=None):
        super().__init__()
        self.w = nn.Parameter(torch.ones(4))
        if scale is not None:
            self.w.scale = scale

    def forward(self, x):
        try:
            return x * self.w * self.w.scale
        except AttributeError:
            return x + self.w


def add_attribute_of_parameter(name: str, scale, *changes) -> None:
    def calls():
        model = _Scaled(scale)
        yield model, X()
        for change in changes:
            change(model)
            yield (X(),)
            yield Seen(attributes=dict(model.w.__dict__))

    calls.__name__ = f"attribute_of_a_parameter_{name}"
    program("metadata")(calls)


def _replaced_by(scale=None):
    def change(model):
        model.w = nn.Parameter(torch.full((4,), 2.0))
        if scale is not None:
            model.w.scale = scale

    return change


for _name, _case in {
    "that_is_caught_given_and_changed": (
        None, lambda m: setattr(m.w, "scale", 3.0), lambda m: setattr(m.w, "scale", 4.0),
        lambda m: delattr(m.w, "scale"),
    ),
    "that_another_takes_the_place_of": (2.0, _replaced_by(5.0), _replaced_by(), _replaced_by(2.0), _replaced_by(2.0)),
    "that_has_none_and_is_replaced": (None, _replaced_by(), lambda m: setattr(m.w, "scale", 3.0), _replaced_by()),
    "that_nobody_reads": (2.0, lambda m: setattr(m.w, "note", "a")),
}.items():  # fmt: skip
    add_attribute_of_parameter(_name, *_case)


@program("metadata")
def attribute_that_the_first_call_gives_a_parameter():
    w = nn.Parameter(torch.ones(4))

    def f(x):
        if not hasattr(w, "seen"):
            w.seen = True
            return x * w * 2
        return x * w

    yield f, X()
    yield (X(),)
    del w.seen
    yield (X(),)
    yield (X(),)


@program("writes")
def parameter_written_while_gradients_are_off_beside_an_input():
    w = nn.Parameter(torch.arange(4.0))

    def part(x):
        with torch.no_grad():
            w[:2].mul_(2)
        x.fill_(2)
        return x + 1

    def whole(x):
        with torch.no_grad():
            w[:].zero_()
        x.add_(1)
        return w

    x = X()
    for f in (part, whole):
        yield f, x
        yield (X(),)
        yield Seen(w=w, x=x)


# ---- views of inputs that take new contents, which have gradients of their own ----


def add_returned_view(name: str, compute) -> None:
    def calls():
        w = nn.Parameter(torch.tensor([1.0, 2.0, -1.0, 0.5]))
        x = X()
        for i in range(4):
            out = yield (lambda x: compute(x, w), x) if i == 0 else (x,)
            if i > 1:
                yield Seen(error=backward(out), w=w, x=x)
                x = X(float(i), grad=True) * 1

    calls.__name__ = f"returned_view_of_an_input_that_is_written_to_{name}"
    program("gradients")(calls)


for _name, _compute in {
    "by_itself": lambda x, w: (t := x.expand(1, 4)[0], t.mul_(w), x)[::2],
    "whole": lambda x, w: (t := x[:], t.mul_(w), x)[::2],
    "of_another_shape": lambda x, w: (x.view(2, 2), x.mul_(w), x * 2)[::2],
    "in_part": lambda x, w: (t := x[1:3], t.mul_(w[1:3]), x * 1)[::2],
    "alone": lambda x, w: (t := x[1:3], x.mul_(w), t)[2],
}.items():
    add_returned_view(_name, _compute)


# ---- what is moved from one container to another ----


@program("containers")
def tensor_of_an_argument_is_moved_to_state():
    world = state(table={"t": None})

    def f(x, d):
        world.table["t"] = d["t"]
        d["t"] = x

    d = {"t": X(2.0)}
    for i in range(4):
        yield (f, X(i), d) if i == 0 else (X(i), d)
        yield Seen(table=world.table, d=d)


@program("containers")
def tensors_are_moved_between_attributes():
    world = state(a=X(), b=X(1.0), kept=[X(2.0)])

    def f(x):
        world.kept[0], world.a, world.b = world.b, world.kept[0], x * 2
        return x + 1

    for i in range(4):
        yield (f, X(i)) if i == 0 else (X(i),)
        yield Seen(world=world)


@program("containers")
def tensor_is_looked_for_among_the_members_of_a_set():
    first, second = X(), X(1.0)
    members = {first}

    def f(w):
        return w * 2 if any(w is member for member in members) else w * 3

    yield f, second
    yield (first,)
    yield (second,)
    members.add(second)
    yield (second,)


@program("state")
def queue_that_a_call_empties():
    waiting = queue.Queue()

    def f(x):
        return x * waiting.get()

    for i in range(4):
        waiting.put(float(i + 1))
        yield (f, X()) if i == 0 else (X(),)


@program("state")
def optimizer_whose_step_is_compiled_with_what_a_schedule_changes():
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.5)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    def f(g):
        optimizer.step()
        return weight.detach() + g

    for i in range(4):
        weight.grad = torch.full((3,), float(i))
        yield (f, torch.ones(3)) if i == 0 else (torch.ones(3),)
        yield Seen(weight=weight, momentum=list(optimizer.state[weight].values()))
        optimizer.param_groups[0]["weight_decay"] = i / 10
        schedule.step()
