"""Programs of tensors that are shared, written, drawn and cast, and of objects in C that hold state of their own."""

from __future__ import annotations

import collections
import datetime
import io
import os
import pathlib
import queue
import secrets
import sys
import tempfile
import threading
import types
import uuid

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tests.soundness.harness import Seen, program
from tests.soundness.world import X, backward

# ---- generators of random numbers besides torch's own ----


def drawing(f, calls=6, seed=1):
    """Calls of ``f(x, generator)``, and where they leave the generator."""
    g = torch.Generator().manual_seed(seed)
    yield f, torch.ones(2), g
    for _ in range(calls):
        yield Seen(state=g.get_state())
        yield torch.ones(2), g
    yield Seen(state=g.get_state())


@program("random")
def layers_dropped_by_a_generator_of_its_own():
    def f(x, g):
        for i in range(3):
            if torch.rand((), generator=g) < 0.5:
                x = x * (i + 2)
        return x + torch.rand(2, generator=g)

    yield from drawing(f, 9)


@program("random")
def generators_in_a_closure_and_as_an_argument():
    mine = torch.Generator().manual_seed(3)

    def f(x, g):
        if torch.rand((), generator=mine) < torch.rand((), generator=g):
            return x + torch.randperm(4, generator=mine)[:2], torch.rand(2)
        return x, torch.bernoulli(torch.full((2,), 0.5), generator=g)

    yield from drawing(f, 9)


@program("random")
def size_drawn_by_a_generator():
    yield from drawing(lambda x, g: x.repeat(int(torch.randint(1, 4, (), generator=g))) + torch.rand((), generator=g))


@program("random")
def generator_seeded_inside():
    def f(x, g):
        g.manual_seed(5)
        return x + torch.rand(2, generator=g)

    yield from drawing(f)


@program("random")
def generator_put_back_inside():
    def f(x, g):
        before = g.get_state()
        y = x + torch.rand(2, generator=g)
        g.set_state(before)
        return y

    yield from drawing(f)


@program("random")
def generator_made_inside():
    yield from drawing(lambda x, g: x + torch.rand(2, generator=torch.Generator()))


@program("random")
def copy_of_a_generator():
    yield from drawing(lambda x, g: x + torch.rand(2, generator=g.clone_state()))


@program("random")
def seed_that_is_asked_for():
    g = torch.Generator().manual_seed(2)
    yield lambda x: (x * g.initial_seed(), x * torch.initial_seed()), torch.ones(2)
    g.manual_seed(3)
    torch.manual_seed(4)
    yield torch.ones(2)


@program("random")
def seed_that_nobody_knows():
    kept: list = []

    def f(x):
        torch.seed()
        kept.append(torch.rand(2).tolist())
        return x + 1

    yield f, torch.zeros(2)
    yield torch.zeros(2)
    yield torch.zeros(2)
    torch.manual_seed(0)
    yield Seen(calls=len(kept), differ=kept[0] != kept[1] != kept[2])


@program("random")
def state_of_the_generator_returned():
    yield lambda x: (x + torch.rand(2), torch.get_rng_state()), torch.ones(2)
    yield torch.ones(2)
    yield torch.ones(2)


@program("random")
def draws_before_a_kernel_with_unforeseen_strides():
    def f(x):
        return torch.rand(2), torch.normal(x, x + 1), torch.normal(0.0, x + 1)

    yield f, torch.rand(4, 6)
    yield (torch.rand(4, 6).t(),)
    yield (torch.rand(5, 6).t(),)
    yield Seen(after=torch.rand(2))


@program("random")
def writes_before_a_kernel_with_unforeseen_strides():
    def f(x, seen):
        seen.add_(1)
        x.mul_(2)
        y = torch.normal(0.0, x + 1)
        seen.mul_(2)
        return y + seen

    seen = torch.zeros(())
    for i, n in enumerate((6, 6, 5)):
        x = torch.rand(n, 4).t()
        yield (f, x, seen) if i == 0 else (x, seen)
        yield Seen(x=x, seen=seen)


# ---- tensors that appear past all observers ----


@program("constants")
def legacy_constructor_written():
    yield lambda x: torch.Tensor([1.0, 2.0, 3.0, 4.0]).add_(x), X()
    yield X()
    yield X()


@program("constants")
def legacy_constructor_returned():
    kept = yield lambda x: (x, torch.LongTensor([1, 2])), X()
    kept[1].add_(1)
    kept = yield X()
    kept[1].add_(1)
    yield X()


@program("constants")
def legacy_constructor_read():
    yield lambda x, s: x * torch.Tensor([1.0, 2.0, 3.0, s]), X(), 2.0
    for s in (3.0, 4.0, 5.0):
        yield X(), s


@program("constants")
def array_made_inside_and_written():
    def f(x):
        y = torch.from_numpy(np.zeros(4, dtype=np.float32))
        y += x
        return y

    yield f, X()
    yield X()
    yield X()


@program("constants")
def array_from_outside_written_through_a_tensor():
    a = np.zeros(4, dtype=np.float32)
    yield lambda x, a: torch.as_tensor(a).add_(x) + x, X(), a
    yield Seen(a=a.tolist())
    yield X(), a
    yield Seen(a=a.tolist())


@program("constants")
def array_returned_as_a_tensor():
    a = np.arange(4.0)
    shared = yield lambda x: (x, torch.as_tensor(a), torch.from_numpy(a)[::2]), X()
    shared[1][0] = 7
    shared[2][1] = 9
    yield Seen(a=a.tolist())
    yield X()


@program("constants")
def strided_array_as_an_argument():
    def f(a):
        t = torch.as_tensor(a)
        return t, t.stride(), t + 1

    yield f, np.arange(8.0)[::2]
    yield (np.arange(4.0),)
    yield (np.arange(8.0).reshape(2, 4).T,)


# ---- autocast ----


def product(forward_by, backward_by):
    class Product(torch.autograd.Function):
        @staticmethod
        @forward_by
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x @ w

        @staticmethod
        @backward_by
        def backward(ctx, grad):
            x, w = ctx.saved_tensors
            return grad @ w.t(), x.t() @ grad

    return Product


def under_autocast(function):
    x, w = torch.randn(2, 3, requires_grad=True), torch.randn(3, 2, requires_grad=True)

    def f(x, w, on):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            return function.apply(x, w)

    for i, on in enumerate((True, False, True)):
        out = yield (f, x, w, on) if i == 0 else (x, w, on)
        yield Seen(error=backward(out), x=x, w=w)


@program("autocast")
def autograd_function_with_custom_fwd():
    yield from under_autocast(product(torch.amp.custom_fwd(device_type="cpu"), torch.amp.custom_bwd(device_type="cpu")))


@program("autocast")
def autograd_function_with_cast_inputs():
    cast = torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    yield from under_autocast(product(cast, torch.amp.custom_bwd(device_type="cpu")))


@program("autocast")
def autograd_function_that_switches_autocast_off():
    yield from under_autocast(product(torch.autocast("cpu", enabled=False), lambda f: f))


@program("autocast")
def autograd_function_whose_backward_multiplies():
    class Gate(torch.autograd.Function):
        @staticmethod
        @torch.amp.custom_fwd(device_type="cpu")
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x.sum(1, keepdim=True) * w.sum(0)

        @staticmethod
        @torch.amp.custom_bwd(device_type="cpu")
        def backward(ctx, grad):
            x, w = ctx.saved_tensors
            return grad @ w.t(), x.t() @ grad

    yield from under_autocast(Gate)


@program("autocast")
def training_with_a_function_under_autocast_around():
    function = product(torch.amp.custom_fwd(device_type="cpu"), torch.amp.custom_bwd(device_type="cpu"))
    w = nn.Parameter(torch.randn(3, 3))
    optimizer = torch.optim.SGD([w], 0.1)

    def f(x):
        return F.gelu(function.apply(torch.tanh(x @ w), w))

    for i in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            out = yield (f, torch.randn(4, 3)) if i == 0 else torch.randn(4, 3)
        optimizer.zero_grad()
        error = backward(out)
        optimizer.step()
        yield Seen(error=error, w=w)


# ---- state that objects in C hold, and what the system knows ----


def watched(make, use, change):
    """Calls that use an object, which changes in between."""
    held = make()
    yield lambda x: use(x, held), torch.ones(2)
    for i in range(1, 4):
        change(held, i)
        yield torch.ones(2)


@program("objects")
def attribute_of_a_thread_local():
    def make():
        local = threading.local()
        local.scale = 1.0
        return local

    yield from watched(make, lambda x, o: x * o.scale, lambda o, i: setattr(o, "scale", 1.0 + i))


@program("objects")
def lock_that_is_held_or_not():
    change = [lambda o: o.acquire(), lambda o: o.release()]
    yield from watched(threading.Lock, lambda x, o: x * (2.0 if o.locked() else 1.0), lambda o, i: change[1 - i % 2](o))


@program("objects")
def event_that_is_set_or_not():
    yield from watched(
        threading.Event, lambda x, o: x * (2.0 if o.is_set() else 1.0), lambda o, i: o.set() if i % 2 else o.clear()
    )


@program("objects")
def lock_around_an_operation():
    def use(x, o):
        with o:
            return x * 2

    yield from watched(threading.Lock, use, lambda o, i: None)


@program("objects")
def numbers_from_a_queue():
    def make():
        numbers = queue.SimpleQueue()
        for i in range(9):
            numbers.put(float(i))
        return numbers

    yield from watched(make, lambda x, o: x * o.get(), lambda o, i: None)


@program("objects")
def text_read_from_a_buffer():
    yield from watched(lambda: io.StringIO("12345678"), lambda x, o: x * int(o.read(1)), lambda o, i: None)


@program("objects")
def text_written_to_a_buffer():
    said = io.StringIO()
    yield lambda x: (x + 1, said.write("x"))[0], torch.ones(2)
    yield torch.ones(2)
    yield Seen(said=said.getvalue())


@program("objects")
def text_written_to_standard_output():
    yield lambda x: (x + 1, sys.stdout.write("called\n"))[0], torch.ones(2)
    yield torch.ones(2)


@program("objects")
def tensor_saved_to_a_buffer():
    buffer = io.BytesIO()

    def f(x):
        torch.save(x, buffer)
        return x + 1

    yield f, torch.ones(2)
    length = len(buffer.getvalue())
    yield torch.ones(2)
    yield Seen(twice=len(buffer.getvalue()) == 2 * length)


@program("objects")
def variable_held_as_an_object():
    yield from watched(
        lambda: types.CellType(1.0),
        lambda x, o: x * o.cell_contents,
        lambda o, i: setattr(o, "cell_contents", 1.0 + i),
    )


@program("objects")
def containers_that_python_implements_in_c():
    def make():
        return types.SimpleNamespace(
            deque=collections.deque([1.0, 2.0], maxlen=2),
            ordered=collections.OrderedDict(a=1.0, b=2.0),
            chain=collections.ChainMap({}, {"a": 1.0}),
            counter=collections.Counter("ab"),
            bytes=bytearray(b"ab"),
            array=np.ones(2),
        )

    def use(x, o):
        first = next(iter(o.ordered.values()))
        return x * o.deque[0] + first * o.chain["a"] - o.counter["a"] * o.bytes[0] + float(o.array[0])

    def change(o, i):
        o.deque.append(float(i))
        o.ordered.move_to_end("a" if i % 2 else "b")
        o.chain["a"] = 2.0 * i
        o.counter.update("aab")
        o.bytes[0] = i
        o.array[0] = i

    yield from watched(make, use, change)


@program("system")
def time_of_day_by_datetime():
    yield lambda x: x * (datetime.datetime.now().year > 2000) * (datetime.date.today().year > 2000), torch.ones(2)
    yield torch.ones(2)


def kept_from_calls(make):
    """Calls that keep what ``make`` gives, which is never the same."""
    kept: list = []

    def f(x):
        kept.append(str(make()))
        return x + 1

    yield f, torch.ones(2)
    yield torch.ones(2)
    yield Seen(calls=len(kept), differ=kept[0] != kept[-1])


@program("system")
def identifiers_drawn_at_random():
    yield from kept_from_calls(uuid.uuid4)


@program("system")
def identifiers_by_the_clock():
    yield from kept_from_calls(uuid.uuid1)


@program("system")
def secrets_drawn():
    yield from kept_from_calls(lambda: secrets.token_hex(8))


@program("system")
def time_of_a_call():
    yield from kept_from_calls(lambda: datetime.datetime.now(datetime.UTC))


@program("system")
def files_that_come_and_go():
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "scale"

        def f(x):
            return x * float(path.read_text()) if path.exists() else x * len(os.listdir(folder))

        yield f, torch.ones(2)
        path.write_text("3")
        yield torch.ones(2)
        path.write_text("4")
        yield torch.ones(2)
        path.unlink()
        yield torch.ones(2)


@program("system")
def settings_of_the_interpreter():
    before, threads, arguments = sys.getrecursionlimit(), torch.get_num_threads(), len(sys.argv)
    yield lambda x: x * sys.getrecursionlimit() + torch.get_num_threads() - len(sys.argv), torch.ones(2)
    sys.setrecursionlimit(before + 1)
    yield torch.ones(2)
    torch.set_num_threads(threads + 1)
    yield torch.ones(2)
    sys.argv.append("more")
    yield torch.ones(2)
    sys.setrecursionlimit(before)
    torch.set_num_threads(threads)
    del sys.argv[arguments:]


# ---- numerics ----


@program("numerics")
def signs_of_zeros():
    def f(x, s):
        signs = [x.relu(), torch.maximum(x, x.flip(0)), x + s, x * s, -x, x - 0.0, x.abs().neg(), x * -1, x.round()]
        return [torch.copysign(torch.ones(()), y) for y in signs], 1 / x.relu()

    x = torch.tensor([0.0, -0.0, 1.5, -2.5, -0.0, 0.0, float("inf")])
    yield f, x, 0.0
    for s in (-0.0, 1.0, -0.0):
        yield x, s


@program("numerics")
def integers_that_overflow():
    def f(x, n):
        return x + n, x * n, -x, abs(x), x << 3, x // -2, x % -3, torch.fmod(x, 3), ~x, x.to(torch.uint8), x / 3

    values = torch.tensor([-128, 127, -1, 0, 5])
    yield f, values.to(torch.int8), 1
    for dtype in (torch.int8, torch.int16, torch.uint8, torch.int64):
        for n in (100, 127):
            yield values.to(dtype), n


class Scaled(float):
    def __mul__(self, other):
        return other * (float(self) * 10)

    def __rmul__(self, other):
        return other * (float(self) * 100)


@program("numerics")
def numbers_of_other_classes():
    yield lambda x, s: (x * s, s * x, isinstance(s, float)), X(), 2.0
    for s in (Scaled(2.0), Scaled(3.0), True, 2, np.float32(2), np.float64(3), np.int64(2), 2 + 1j, 3.0):
        yield X(), s


@program("numerics")
def gradients_at_the_edges():
    def f(x, s):
        return x.clamp(0, 1) + x.relu() + x.abs() + torch.where(x > 0, x.log(), x) + x.pow(s) + F.hardtanh(x) + x * s

    for i, s in enumerate((0.0, 1.0, 2.0, -1.0)):
        x = torch.tensor([0.0, -0.0, 1.0, float("inf"), -1.0, float("nan")], requires_grad=True)
        out = yield (f, x, s) if i == 0 else (x, s)
        yield Seen(error=backward(out), x=x)


# ---- sharing, strides, writes ----


@program("aliasing")
def views_of_one_base_as_arguments():
    base = torch.arange(6.0)

    def f(a, b):
        a.mul_(2)
        return b + a.sum()

    pairs = [(base[:3], base[3:]), (base[:4], base[2:]), (base[::2], base[1::2]), (base, base[2:4]), (base, base)]
    for i, pair in enumerate(pairs):
        yield (f, *pair) if i == 0 else pair
        yield Seen(base=base)


@program("aliasing")
def results_that_are_one_object():
    def f(x, y):
        z = x + y
        return z, z, x, [x, y], {"z": z}, x.contiguous(), x.float(), x[:], x.view_as(x)

    x = torch.ones(3)
    yield f, x, x
    yield x, torch.ones(3)
    out = yield x, torch.ones(3)
    out[0].add_(1)
    out[7].add_(1)
    yield Seen(out=out, x=x)


@program("aliasing")
def strides_that_change_from_call_to_call():
    def f(x):
        return x.contiguous(), x.reshape(-1), x.clone(), x.sum(0), torch.empty_like(x).fill_(1).stride(), x.flatten()

    kinds = [torch.ones(3, 4), torch.ones(1, 4).expand(3, 4), torch.ones(4, 3).t(), torch.ones(6, 4)[::2]]
    for i, x in enumerate(kinds + kinds[::-1]):
        yield (f, x) if i == 0 else (x,)


@program("aliasing")
def memory_exchanged_between_calls():
    x = torch.ones(3)
    yield lambda x: x * 2 + 1, x
    x.set_(torch.arange(5.0))
    yield x
    x.data = torch.arange(4, dtype=torch.float64)
    yield x
    x.resize_(2)
    yield x


@program("aliasing")
def parameters_swapped_under_a_module():
    m, w = nn.Linear(2, 2), nn.Parameter(torch.zeros(2, 2))
    yield m, torch.ones(1, 2)
    torch.utils.swap_tensors(m.weight, w)
    out = yield torch.ones(1, 2)
    yield Seen(error=backward(out), m=dict(m.named_parameters()), w=w)


@program("aliasing")
def write_through_a_dtype_view():
    def f(x):
        i = x.view(torch.int32)
        i.bitwise_and_(0x7FFFFFFF)
        return x * 1, i, x.view(torch.uint8)

    for i in range(3):
        x = X()
        yield (f, x) if i == 0 else x
        yield Seen(x=x)


@program("writes")
def ring_buffer():
    class Ring(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("rows", torch.zeros(4, 2))
            self.at = 0

        def forward(self, x):
            n = x.shape[0]
            self.rows[self.at : self.at + n] = x
            self.at = (self.at + n) % 4
            return self.rows.mean(0) @ x.t()

    ring = Ring()
    for i in range(6):
        x = torch.full((2, 2), float(i))
        yield (ring, x) if i == 0 else x
        yield Seen(rows=ring.rows, at=ring.at)


@program("writes")
def parts_written_in_training():
    w = torch.tensor([1.0, -2.0, 0.5, 3.0], requires_grad=True)

    def f(x):
        y = x * w
        y[..., 1:] = (y[..., 1:] * 2).cumsum(-1)
        y[..., 0].mul_(3)
        return y

    for i in range(3):
        out = yield (f, torch.ones(2, 4) * (i + 1)) if i == 0 else torch.ones(2, 4) * (i + 1)
        yield Seen(error=backward(out.square()), w=w)
        with torch.no_grad():
            w.sub_(w.grad, alpha=0.01)


@program("writes")
def results_written_to_given_tensors():
    def f(x, y, out):
        torch.add(x, y, out=out)
        result = torch.mul(out, 2, out=out)
        return result, result is out, torch.cumsum(x, 0, out=torch.empty(0))

    outs = [torch.empty(2, 2), torch.empty(2, 2).t(), torch.empty(2, 2, dtype=torch.float64), torch.empty(4, 2)[::2]]
    for i, out in enumerate(outs):
        args = torch.ones(2, 2), torch.ones(2, 2), out
        yield (f, *args) if i == 0 else args
        yield Seen(out=out)


@program("writes")
def optimizer_written_by_hand():
    class Momentum:
        def __init__(self):
            self.buffers, self.steps, self.rate = {}, 0, 0.1

        def step(self, parameters, gradients):
            self.steps += 1
            for i, (p, g) in enumerate(zip(parameters, gradients, strict=True)):
                m = self.buffers.setdefault(i, torch.zeros_like(p))
                m.mul_(0.9).add_(g, alpha=0.1)
                p.sub_(self.rate * m / (1 - 0.9**self.steps))

    optimizer, parameters = Momentum(), [torch.ones(2), torch.zeros(3)]
    for i in range(5):
        optimizer.rate = 0.01 if i > 2 else 0.1
        args = parameters, [torch.full((2,), float(i)), torch.ones(3)]
        yield (optimizer.step, *args) if i == 0 else args
        yield Seen(parameters=parameters, buffers=optimizer.buffers, steps=optimizer.steps)


# ---- values that steer ----


@program("values")
def experts_chosen_by_scores():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(4, 3)
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            weights, chosen = self.gate(x).softmax(-1).topk(2, -1)
            out = torch.zeros_like(x)
            for i, expert in enumerate(self.experts):
                rows, places = torch.where(chosen == i)
                if rows.numel():
                    out.index_add_(0, rows, expert(x[rows]) * weights[rows, places, None])
            return out

    m = Experts()
    optimizer = torch.optim.SGD(m.parameters(), 0.1)
    for i in range(3):
        out = yield (m, torch.randn(3, 4)) if i == 0 else torch.randn(3, 4)
        optimizer.zero_grad()
        error = backward(out.square())
        optimizer.step()
        yield Seen(error=error, m=dict(m.named_parameters()))


@program("values")
def search_over_beams():
    scores = torch.tensor([[0.1, 2.0, 0.3], [1.5, 0.2, 1.4], [0.3, 0.9, 0.8]])

    def f(start):
        beams = [([start], 0.0)]
        for _ in range(3):
            longer = []
            for tokens, score in beams:
                values, indices = scores[tokens[-1]].log_softmax(-1).topk(2)
                for value, index in zip(values.tolist(), indices.tolist(), strict=True):
                    longer.append(([*tokens, index], score + value))
            beams = sorted(longer, key=lambda beam: -beam[1])[:2]
        return torch.tensor(beams[0][0])

    yield f, 0
    yield 1
    scores.neg_()
    yield 0


@program("values")
def state_that_steers_and_is_written():
    total = torch.zeros(())

    def f(x):
        total.add_(x.sum())
        if total.item() > 5:
            total.zero_()
            return x * 2
        return x

    yield f, torch.ones(2)
    for _ in range(6):
        yield torch.ones(2)
        yield Seen(total=total)


# ---- training ----


@program("training")
def penalty_on_gradients_by_create_graph():
    m = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(m.parameters(), 0.1)
    for i in range(3):
        x = torch.randn(3, 2, requires_grad=True)
        out = yield (m, x) if i == 0 else x
        (g,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        optimizer.zero_grad()
        error = backward((g.norm(dim=1) - 1).square().mean() + out.mean())
        optimizer.step()
        yield Seen(error=error, m=dict(m.named_parameters()))


@program("training")
def gradients_accumulated_and_layers_frozen():
    m = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Dropout(0.3), nn.Linear(3, 1))
    optimizer = torch.optim.Adam(m.parameters(), 0.05)
    for i in range(6):
        m[0].requires_grad_(i % 3 != 1)
        m.train(i % 4 != 3)
        out = yield (m, torch.randn(2, 3)) if i == 0 else torch.randn(2, 3)
        error = backward(out / 2)
        if i % 2:
            optimizer.step()
            optimizer.zero_grad(set_to_none=i == 3)
        yield Seen(error=error, m=dict(m.named_parameters()))


@program("training")
def weight_and_spectral_norm():
    m = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2))
    )
    optimizer = torch.optim.SGD(m.parameters(), 0.2)
    for i in range(4):
        m.train(i < 3)
        out = yield (m, torch.ones(2, 3)) if i == 0 else torch.ones(2, 3)
        optimizer.zero_grad()
        error = backward(out)
        optimizer.step()
        yield Seen(error=error, state=m.state_dict())
    nn.utils.parametrize.remove_parametrizations(m[0], "weight")
    yield torch.ones(2, 3)


@program("training")
def straight_through_and_reversed_gradients():
    class Round(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.round()

        @staticmethod
        def backward(ctx, grad):
            return grad.clamp(-1, 1)

    class Reversed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.weight = weight
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            return -ctx.weight * grad, None

    w = torch.tensor([0.3, -1.2, 2.0], requires_grad=True)

    def f(x, weight):
        return Round.apply(x * w) + Reversed.apply(w, weight).sin()

    for i in range(4):
        x = torch.tensor([1.0, 2.0, -3.0]) * i
        out = yield (f, x, 0.1 * i) if i == 0 else (x, 0.1 * i)
        yield Seen(error=backward(out.square()), w=w)
        with torch.no_grad():
            w.sub_(w.grad, alpha=0.01)
