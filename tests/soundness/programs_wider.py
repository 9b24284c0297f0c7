"""Programs of the kinds that libraries and training scripts are made of: optimizers, hooks, parametrizations, lazy
modules, torch.func, checkpoints, state dictionaries, properties and descriptors, tensors of unusual layouts."""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import enum
import functools
import threading
import types
import typing
import warnings

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils import checkpoint

from tests.soundness.harness import Seen, program
from tests.soundness.world import X, backward


def state(**values):
    return types.SimpleNamespace(**values)


def linear(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(4, 4)


# ---- training loops ----


def add_optimizer(name: str, make) -> None:
    def calls():
        model = nn.Sequential(linear(), nn.Tanh(), linear(1))
        optimizer = make(model.parameters())
        out = yield model, X()
        for i in range(4):
            yield Seen(error=backward(out), model=model.state_dict())
            optimizer.step()
            optimizer.zero_grad(set_to_none=i % 2 == 0)
            out = yield (X(float(i)),)
        yield Seen(state=list(model.state_dict().values()))

    calls.__name__ = f"training_with_{name}"
    program("training")(calls)


for _name, _make in {
    "descent_and_momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "adam_for_each": lambda p: torch.optim.AdamW(p, 0.1, foreach=True),
    "adam_one_by_one": lambda p: torch.optim.Adam(p, 0.1, foreach=False, amsgrad=True),
    "adam_fused": lambda p: torch.optim.Adam(p, 0.1, fused=True),
    "root_mean_square": lambda p: torch.optim.RMSprop(p, 0.01, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1),
}.items():
    add_optimizer(_name, _make)


@program("training")
def optimizer_step_inside():
    w = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([w], 0.1)

    def step(x):
        loss = (w * x).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    for i in range(3):
        yield (step, X(i)) if i == 0 else (X(i),)
        yield Seen(w=w)


@program("training")
def learning_rate_schedule_and_frozen_layers():
    model = nn.Sequential(linear(), linear(1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    out = yield model, X()
    for i in range(4):
        yield Seen(error=backward(out), model=list(model.parameters()))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        model[0].requires_grad_(i % 2 == 1)
        out = yield (X(float(i)),)


@program("training")
def gradients_are_accumulated_and_clipped():
    model = linear()
    out = yield model, X()
    for i in range(4):
        yield Seen(error=backward(out), grads=[p.grad for p in model.parameters()])
        if i % 2:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            yield Seen(grads=[p.grad for p in model.parameters()])
            model.zero_grad()
        out = yield (X(float(i)),)


@program("training")
def average_of_weights():
    model = linear()
    average = torch.optim.swa_utils.AveragedModel(model)
    out = yield average, X()
    for i in range(3):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.5)
        average.update_parameters(model)
        yield Seen(average=average.state_dict())
        out = yield (X(float(i)),)
    yield Seen(error=backward(out), grads=[p.grad for p in average.parameters()])


@program("training")
def loss_with_a_scale_that_grows():
    world = state(scale=2.0)
    model = linear()

    def loss(x):
        return model(x).square().mean() * world.scale

    for i in range(4):
        out = yield (loss, X()) if i == 0 else (X(i),)
        yield Seen(error=backward(out), grads=[p.grad for p in model.parameters()])
        world.scale *= 2


@program("training")
def several_losses_of_one_graph():
    model = linear()

    def f(x):
        y = model(x)
        return y.sum(), y.square().sum()

    a, b = yield f, X()
    a.backward(retain_graph=True)
    b.backward()
    yield Seen(grads=[p.grad for p in model.parameters()])
    a, b = yield (X(1.0),)
    yield Seen(grads=torch.autograd.grad(b, list(model.parameters()), retain_graph=True))
    yield Seen(grads=torch.autograd.grad(a + b, list(model.parameters())))


# ---- what modules are wrapped in ----


@program("module state")
def spectral_norm_in_training_and_evaluation():
    model = parametrizations.spectral_norm(linear())
    out = yield model, X()
    for i in range(4):
        yield Seen(error=backward(out), state=model.state_dict())
        if i == 1:
            model.eval()
        if i == 2:
            model.train()
        out = yield (X(i),)


@program("module state")
def old_spectral_norm():
    model = nn.utils.spectral_norm(linear())
    out = yield model, X()
    for i in range(3):
        yield Seen(error=backward(out), state=model.state_dict())
        out = yield (X(i),)
    model.eval()
    yield (X(2.0),)
    yield Seen(state=model.state_dict())


@program("module state")
def old_weight_norm_and_its_removal():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.utils.weight_norm(linear())
    out = yield model, X()
    yield Seen(error=backward(out), g=model.weight_g)
    with torch.no_grad():
        model.weight_g.mul_(2)
    yield (X(),)
    nn.utils.remove_weight_norm(model)
    yield (X(1.0),)
    with torch.no_grad():
        model.weight.add_(1)
    yield (X(1.0),)


@program("module state")
def orthogonal_parametrization():
    model = parametrizations.orthogonal(linear())
    out = yield model, X()
    yield Seen(error=backward(out), grads=[p.grad for p in model.parameters()])
    with torch.no_grad():
        model.weight = torch.eye(4)
    yield (X(),)


@program("module state")
def parametrization_with_state_that_changes():
    class Scaled(nn.Module):
        scale = 2.0

        def forward(self, w):
            return w * self.scale

    model = linear()
    parametrize.register_parametrization(model, "weight", Scaled())
    yield model, X()
    model.parametrizations.weight[0].scale = 3.0
    yield (X(),)
    with parametrize.cached():
        yield (X(),)
    parametrize.register_parametrization(model, "weight", Scaled())
    yield (X(),)
    parametrize.remove_parametrizations(model, "weight")
    yield (X(),)


@program("module state")
def lazy_linear_is_initialized_by_the_first_call():
    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyLinear(3), nn.ReLU(), nn.LazyLinear(2))
    out = yield model, X()
    yield Seen(error=backward(out), shapes=[tuple(p.shape) for p in model.parameters()], kind=type(model[0]).__name__)
    yield (X(1.0),)
    yield Seen(state=model.state_dict())


@program("module state")
def lazy_batch_norm():
    model = nn.LazyBatchNorm1d()
    yield model, torch.arange(8.0).view(2, 4)
    yield Seen(state=model.state_dict())
    yield (torch.arange(8.0).view(2, 4),)
    model.eval()
    yield (torch.arange(8.0).view(2, 4),)
    yield Seen(state=model.state_dict())


@program("module state")
def dtype_of_a_module_is_changed():
    model = nn.Sequential(linear(), nn.BatchNorm1d(4))
    x = torch.arange(8.0).view(2, 4)
    yield model, x
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        model.to(dtype)
        out = yield (x.to(dtype),)
        yield Seen(error=backward(out), state=model.state_dict())
    model.half()
    yield (x,)


@program("module state")
def state_dictionary_is_loaded_in_three_ways():
    model, other = linear(), linear(1)
    yield model, X()
    model.load_state_dict(other.state_dict())
    yield (X(),)
    model.load_state_dict(linear(2).state_dict(), assign=True)
    yield (X(),)
    model._parameters.update(linear(3)._parameters)
    yield (X(),)
    nn.utils.vector_to_parameters(torch.arange(20.0), model.parameters())
    yield (X(),)


@program("module state")
def parameters_are_swapped():
    a, b = linear(), linear(1)
    out = yield a, X()
    torch.utils.swap_tensors(a.weight, b.weight)
    out = yield (X(),)
    yield Seen(error=backward(out), a=a.weight.grad, b=b.weight.grad)
    a.weight.data, b.weight.data = b.weight.data, a.weight.data
    yield (X(),)


@program("module state")
def modules_are_replaced_by_name():
    model = nn.Sequential(collections.OrderedDict(a=linear(), b=nn.ReLU()))
    yield model, X()
    model.set_submodule("b", nn.Tanh())
    yield (X(),)
    model.add_module("c", linear(1))
    yield (X(),)
    model.register_module("a", nn.Identity())
    yield (X(),)
    del model.c
    yield (X(),)
    del model.a
    yield (X(),)


@program("module state")
def buffer_becomes_a_parameter():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("w", torch.ones(4))

        def forward(self, x):
            return x * self.w

    model = Model()
    yield model, X()
    del model.w
    model.w = nn.Parameter(torch.full((4,), 2.0))
    out = yield (X(),)
    yield Seen(error=backward(out), w=model.w)
    del model.w
    model.w = 3.0
    yield (X(),)
    model.register_parameter("v", None)
    model.__dict__["w"] = 4.0
    yield (X(),)


@program("module state")
def train_and_evaluation_of_parts():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4, momentum=None)
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            return self.drop(self.norm(x))

    model, x = Model(), torch.arange(8.0).view(2, 4)
    yield model, x
    for change in (
        lambda: model.norm.eval(),
        lambda: setattr(model.norm, "track_running_stats", False),
        lambda: setattr(model.drop, "p", 0.0),
        lambda: model.eval(),
        lambda: setattr(model.norm, "running_mean", None),
        lambda: setattr(model.norm, "eps", 1.0),
    ):
        change()
        yield (x,)
        yield Seen(state=dict(model.state_dict()), mean=model.norm.running_mean)


@program("module state")
def embedding_that_renorms_its_rows():
    torch.manual_seed(0)
    model = nn.Embedding(4, 3, max_norm=1.0, padding_idx=0)
    out = yield model, torch.tensor([0, 1])
    yield Seen(error=backward(out), w=model.weight)
    with torch.no_grad():
        model.weight.mul_(3)
    out = yield (torch.tensor([1, 2]),)
    yield Seen(error=backward(out), w=model.weight)
    model.max_norm = None
    out = yield (torch.tensor([1, 3]),)
    yield Seen(error=backward(out), w=model.weight)


@program("module state")
def recurrent_cell_with_state_in_the_module():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.cell, self.state = nn.GRUCell(4, 4), None

        def forward(self, x):
            self.state = self.cell(x[None], self.state)
            return self.state[0]

    model = Model()
    out = yield model, X()
    for i in range(3):
        out = yield (X(i),)
    yield Seen(error=backward(out), state=model.state)
    model.state = model.state.detach()
    out = yield (X(),)
    yield Seen(error=backward(out), state=model.state)


# ---- hooks ----


@program("hooks")
def hooks_of_every_kind_in_order():
    model = nn.Sequential(linear(), nn.Tanh())
    said = []
    yield model, X()
    handles = [
        model[0].register_forward_pre_hook(lambda m, a: said.append("pre")),
        model[0].register_forward_hook(lambda m, a, out: said.append("hook")),
        model[1].register_forward_hook(lambda m, a, k, out: out * len(k) + 1, with_kwargs=True),
        model[0].register_forward_pre_hook(lambda m, a: said.append("first"), prepend=True),
    ]
    yield (X(),)
    yield Seen(said=said)
    handles[1].remove()
    yield (X(),)
    yield Seen(said=said)
    for handle in handles:
        handle.remove()
    yield (X(),)
    yield Seen(said=said)


@program("hooks")
def hook_that_is_always_called():
    class Model(nn.Module):
        def forward(self, x):
            if x.shape[0] > 4:
                raise ValueError("too long")
            return x + 1

    model, said = Model(), []
    model.register_forward_hook(lambda m, a, out: said.append(out is None), always_call=True)
    yield model, X()
    yield (torch.ones(5),)
    yield Seen(said=said)
    yield (X(),)
    yield Seen(said=said)


@program("hooks")
def hook_on_a_parameter_and_after_its_gradient():
    model, said = linear(), []
    out = yield model, X()
    yield Seen(error=backward(out), g=model.weight.grad)
    model.weight.register_hook(lambda g: g * 2)
    handle = model.bias.register_post_accumulate_grad_hook(lambda p: said.append(tuple(p.grad.shape)))
    out = yield (X(),)
    yield Seen(error=backward(out), g=model.weight.grad, b=model.bias.grad, said=said)
    handle.remove()
    out = yield (X(),)
    yield Seen(error=backward(out), g=model.weight.grad, b=model.bias.grad, said=said)


@program("hooks")
def backward_hooks_between_calls():
    model = nn.Sequential(linear(), nn.Tanh())
    said = []
    out = yield model, X(grad=True)
    yield Seen(error=backward(out))
    handle = model[1].register_full_backward_hook(lambda m, i, o: (i[0] * 2,))
    pre = model[0].register_full_backward_pre_hook(lambda m, o: said.append(len(o)))
    x = X(grad=True)
    out = yield (x,)
    yield Seen(error=backward(out), x=x, said=said)
    handle.remove()
    pre.remove()
    x = X(grad=True)
    out = yield (x,)
    yield Seen(error=backward(out), x=x, said=said)


@program("hooks")
def state_dictionary_hooks():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.extra = nn.Parameter(torch.ones(4)), 2.0

        def get_extra_state(self):
            return {"extra": self.extra}

        def set_extra_state(self, value):
            self.extra = value["extra"]

        def forward(self, x):
            return x * self.w * self.extra

    model, other = Model(), Model()
    other.extra = 5.0
    yield model, X()
    model.load_state_dict(other.state_dict())
    yield (X(),)
    model.register_load_state_dict_post_hook(lambda m, keys: setattr(m, "extra", m.extra + 1))
    model.load_state_dict(other.state_dict())
    yield (X(),)


# ---- torch.func ----


@program("transforms")
def gradient_by_torch_func_of_what_reads_state():
    world = state(scale=2.0)

    def loss(w, x):
        return (w * x * world.scale).square().sum()

    f = torch.func.grad(loss)
    yield lambda w, x: f(w, x), torch.ones(4), X()
    world.scale = 3.0
    yield torch.ones(4), X()
    yield torch.ones(4, requires_grad=True), X()


@program("transforms")
def value_and_gradient_with_auxiliary_results():
    def loss(params, x):
        y = x * params["w"] + params["b"]
        return y.square().sum(), y

    f = torch.func.grad_and_value(loss, has_aux=True)
    params = {"w": torch.ones(4), "b": torch.zeros(4)}
    yield f, params, X()
    params["b"] = torch.ones(4)
    yield params, X(1.0)
    params["w"].mul_(2)
    yield params, X(1.0)


@program("transforms")
def vmap_over_two_dimensions_and_sizes():
    f = torch.func.vmap(lambda a, b: a @ b + a.sum(), in_dims=(0, 1), out_dims=1)
    yield f, torch.arange(6.0).view(2, 3), torch.arange(6.0).view(3, 2)
    yield torch.arange(9.0).view(3, 3), torch.ones(3, 3)
    yield torch.arange(6.0).view(2, 3), torch.ones(3, 3)


@program("transforms")
def jacobians_forward_and_backward():
    def f(x):
        return torch.stack([x.sin().sum(), (x * x).sum()])

    def both(x):
        return torch.func.jacrev(f)(x), torch.func.jacfwd(f)(x), torch.func.hessian(lambda x: f(x).sum())(x)

    yield both, X()
    yield (X(1.0),)
    yield (torch.ones(3),)


@program("transforms")
def products_with_jacobians():
    def f(x, v):
        out, tangent = torch.func.jvp(lambda x: x.sin() * x, (x,), (v,))
        same, pull = torch.func.vjp(lambda x: x.sin() * x, x)
        return out, tangent, same, pull(v)[0]

    yield f, X(), torch.ones(4)
    yield X(1.0), X()


@program("transforms")
def forward_mode_around_the_call():
    def f(x):
        return x.sin() * 2

    call = yield f, X()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(X(), torch.ones(4))
        out = yield (dual,)
        yield Seen(tangent=torch.autograd.forward_ad.unpack_dual(out).tangent)
    call = yield (X(1.0),)
    yield Seen(call=call)


@program("transforms")
def functional_call_in_a_loop_of_training():
    model = linear()

    def f(params, x):
        return torch.func.functional_call(model, params, (x,)).sum()

    params = {k: v.detach().clone().requires_grad_() for k, v in model.named_parameters()}
    for i in range(3):
        out = yield (f, params, X(i)) if i == 0 else (params, X(i))
        grads = torch.autograd.grad(out, list(params.values()))
        params = {k: (v - 0.1 * g).detach().requires_grad_() for (k, v), g in zip(params.items(), grads, strict=True)}
        yield Seen(params=params, grads=grads)


@program("transforms")
def stack_of_modules():
    models = [linear(i) for i in range(3)]
    params, buffers = torch.func.stack_module_state(models)
    base = copy.deepcopy(models[0])

    def one(p, b, x):
        return torch.func.functional_call(base, (p, b), (x,))

    yield lambda p, b, x: torch.func.vmap(one, in_dims=(0, 0, None))(p, b, x), params, buffers, X()
    params["weight"].data.mul_(2)
    out = yield params, buffers, X()
    yield Seen(error=backward(out), params=params)


# ---- checkpoints ----


@program("checkpoints")
def checkpoint_that_reads_state_and_drops():
    world = state(scale=2.0)
    model = nn.Sequential(linear(), nn.Dropout(0.5))

    def f(x, reentrant):
        return checkpoint.checkpoint(lambda x: model(x) * world.scale, x, use_reentrant=reentrant)

    for i in range(4):
        x = X(i, grad=True)
        out = yield (f, x, False) if i == 0 else (x, i % 2 == 1)
        yield Seen(error=backward(out), x=x, w=model[0].weight)
        world.scale += 1


@program("checkpoints")
def checkpoint_of_a_sequence():
    model = nn.Sequential(linear(), nn.Tanh(), linear(1), nn.Tanh())

    def f(x):
        return checkpoint.checkpoint_sequential(model, 2, x, use_reentrant=False)

    for i in range(3):
        x = X(i, grad=True)
        out = yield (f, x) if i == 0 else (x,)
        yield Seen(error=backward(out), x=x)
        model[1] = nn.ReLU()


# ---- python ----


@program("classes")
def slots_descriptors_and_class_getitem():
    class Positive:
        def __set_name__(self, owner, name):
            self.name = "_" + name

        def __get__(self, obj, owner=None):
            return self if obj is None else getattr(obj, self.name)

        def __set__(self, obj, value):
            setattr(obj, self.name, abs(value))

    class Thing:
        gain = Positive()
        names: typing.ClassVar = {"a": 1.0}

        def __class_getitem__(cls, key):
            return cls.names[key]

    thing = Thing()
    thing.gain = -2.0
    yield lambda x: x * thing.gain + Thing["a"], X()
    thing.gain = -3.0
    yield (X(),)
    Thing.names["a"] = 5.0
    yield (X(),)
    Positive.__get__ = lambda self, obj, owner=None: 7.0
    yield (X(),)


@program("classes")
def getattr_hook_that_delegates():
    class Wrapper:
        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.__dict__["inner"], name)

    wrapper = Wrapper(state(scale=2.0))
    yield lambda x: x * wrapper.scale, X()
    wrapper.inner.scale = 3.0
    yield (X(),)
    wrapper.inner = state(scale=4.0)
    yield (X(),)
    wrapper.scale = 5.0
    yield (X(),)


@program("classes")
def inheritance_and_super():
    class Base:
        def scale(self):
            return 2.0

    class Middle(Base):
        def scale(self):
            return super().scale() + 1

    class Leaf(Middle):
        def scale(self):
            return super().scale() * 2

    leaf = Leaf()
    yield lambda x: x * leaf.scale(), X()
    Base.scale = lambda self: 5.0
    yield (X(),)
    del Middle.scale
    yield (X(),)


@program("classes")
def operators_that_a_class_defines():
    class Vector:
        def __init__(self, data, bias=0.0):
            self.data, self.bias = data, bias

        def __add__(self, other):
            return Vector(self.data + getattr(other, "data", other) + self.bias, self.bias)

        def __radd__(self, other):
            return self + other

        def __matmul__(self, other):
            return (self.data * other.data).sum()

        def __getitem__(self, i):
            return self.data[i]

        def __len__(self):
            return len(self.data)

        def __iter__(self):
            return iter(self.data)

        def __contains__(self, value):
            return value == self.bias

        def __bool__(self):
            return self.bias > 0

    world = state(v=Vector(torch.ones(4)))

    def f(x):
        v = 1 + world.v + Vector(x)
        return v @ v, v[1:], len(v), sum(iter(v)), 2.0 in v, bool(v)

    yield f, X()
    world.v.bias = 2.0
    yield (X(),)
    Vector.__len__ = lambda self: 9
    yield (X(),)
    world.v.data = torch.zeros(4)
    yield (X(),)


@program("dataclasses")
def dataclass_with_slots_and_post_init():
    @dataclasses.dataclass(slots=True)
    class Options:
        scale: float = 2.0
        shift: float = dataclasses.field(init=False)

        def __post_init__(self):
            self.shift = self.scale + 1

    world = state(options=Options())

    def f(x):
        made = Options(world.options.scale * 2)
        return x * world.options.scale + made.shift, made

    yield f, X()
    world.options.scale = 3.0
    yield (X(),)
    world.options = Options(5.0)
    yield (X(),)


@program("enumerations")
def mode_with_methods_and_members_patched():
    class Mode(enum.Enum):
        UP = 1.0
        DOWN = -1.0

        def apply(self, x):
            return x * self.value

    class Flags(enum.Flag):
        A = enum.auto()
        B = enum.auto()

    world = state(mode=Mode.UP, flags=Flags.A)

    def f(x):
        y = world.mode.apply(x)
        return y + 1 if Flags.B in world.flags else y, world.mode

    yield f, X()
    world.mode = Mode.DOWN
    yield (X(),)
    world.flags |= Flags.B
    yield (X(),)
    Mode.apply = lambda self, x: x - self.value
    yield (X(),)


@program("containers")
def named_tuples_in_and_out():
    class Point(typing.NamedTuple):
        a: torch.Tensor
        b: float = 2.0

        def scaled(self):
            return self.a * self.b

    def f(p):
        return p.scaled(), p._replace(a=p.a + 1), Point(*p)

    yield f, Point(X())
    yield Point(X(), 3.0)
    yield Point(X(1.0), 3)
    Point.scaled = lambda self: self.a - self.b
    yield Point(X())


@program("containers")
def user_dictionaries_and_mappings():
    class Defaults(dict):
        def __missing__(self, key):
            return 10.0

    class Table(collections.UserDict):
        pass

    d, t, chain = Defaults(a=2.0), Table(a=3.0), collections.ChainMap({}, {"a": 4.0})

    def f(x):
        return x * d["a"] + d["b"] + t["a"] * chain["a"]

    yield f, X()
    d["b"] = 1.0
    yield (X(),)
    t["a"] = 5.0
    yield (X(),)
    chain["a"] = 6.0
    yield (X(),)
    del chain["a"]
    yield (X(),)
    t.data = {"a": 7.0}
    yield (X(),)


@program("containers")
def nested_lists_are_rotated_and_sliced():
    world = state(grid=[[1.0, 2.0], [3.0, 4.0]])

    def f(x):
        world.grid[0], world.grid[1] = world.grid[1], world.grid[0]
        world.grid[0][0:1] = [x.shape[0] * 1.0]
        return x * world.grid[1][1] + sum(map(sum, world.grid))

    for i in range(4):
        yield (f, X()) if i == 0 else (X(),)
        yield Seen(grid=world.grid)
        if i == 1:
            world.grid.append([0.5])
        if i == 2:
            world.grid[0] = world.grid[1]


@program("containers")
def tensors_as_dictionary_keys_and_in_sets():
    a, b = torch.ones(4), torch.zeros(4)
    world = state(table={a: 2.0, b: 3.0}, chosen={a})

    def f(x):
        return x * world.table[a] + (1 if b in world.chosen else 2)

    yield f, X()
    world.table[a] = 5.0
    yield (X(),)
    world.chosen.add(b)
    yield (X(),)


@program("control flow")
def match_on_classes_and_mappings():
    @dataclasses.dataclass
    class Command:
        name: str
        value: float

    def f(x, command):
        match command:
            case {"op": "scale", "by": float(by)}:
                return x * by
            case [first, *rest] if rest:
                return x + first + len(rest)
            case Command(name="shift", value=v) if v > 1:
                return x + v
            case Command(value=v) | (v, _):
                return x - v
            case str():
                return x
            case _:
                return None

    yield f, X(), {"op": "scale", "by": 2.0}
    for command in ({"op": "scale", "by": 3.0}, {"op": "scale", "by": 3}, [1.0, 2.0], [1.0, 2.0, 3.0], (1.0,)):
        yield X(), command
    for command in (Command("shift", 2.0), Command("shift", 0.5), "text", None):
        yield X(), command


@program("control flow")
def generators_that_delegate():
    world = state(n=2)

    def inner(x):
        for i in range(world.n):
            got = yield x * i
            if got is not None:
                x = x + got
        return x

    def outer(x):
        last = yield from inner(x)
        yield last * 10

    def f(x):
        g = outer(x)
        first = next(g)
        second = g.send(5.0)
        return first, second, list(g)

    yield f, X()
    world.n = 3
    yield (X(),)
    world.n = 1
    yield (X(),)


@program("control flow")
def finally_changes_what_is_returned():
    world = state(log=[])

    def f(x, fail):
        try:
            world.log.append("try")
            if fail:
                raise KeyError("k")
            return x
        except KeyError as e:
            world.log.append(str(e))
            return x * 2
        finally:
            world.log.append("finally")
            if len(world.log) > 6:
                return x * 3  # noqa: B012

    for fail in (False, True, False, True, True):
        yield (f, X(), fail) if not world.log else (X(), fail)
        yield Seen(log=world.log)


@program("exceptions")
def exception_group_and_notes():
    def f(x, kind):
        try:
            if kind == 1:
                raise ExceptionGroup("several", [ValueError("a"), TypeError("b")])
            if kind == 2:
                error = ValueError("c")
                error.add_note("note")
                raise error
        except* ValueError as group:
            x = x + len(group.exceptions)
        return x * 2

    yield f, X(), 0
    yield X(), 1
    yield X(), 2
    yield X(), 0


@program("exceptions")
def error_inside_a_context_manager_that_restores():
    world = state(mode=1.0)

    @contextlib.contextmanager
    def mode(value):
        before, world.mode = world.mode, value
        try:
            yield
        finally:
            world.mode = before

    def f(x, n):
        with mode(5.0):
            y = x * world.mode
            if n > 2:
                raise IndexError(n)
        return y + world.mode

    yield f, X(), 1
    yield X(), 3
    yield Seen(world=world)
    world.mode = 2.0
    yield X(), 1
    yield Seen(world=world)


@program("closures")
def recursive_closure_and_late_binding():
    depth = 2

    def power(x, n):
        return x if n == 0 else power(x, n - 1) * 2 + late

    def f(x):
        return power(x, depth)

    late = 1.0
    yield f, X()
    late = 2.0
    yield (X(),)
    depth = 3
    yield (X(),)

    def power(x, n):  # noqa: F811
        return x - n

    yield (X(),)


@program("caches")
def cached_method_and_cached_property():
    class Table:
        def __init__(self):
            self.rate = 2.0

        @functools.cached_property
        def weights(self):
            return torch.arange(4.0) * self.rate

        @functools.cache  # noqa: B019
        def scaled(self, n):
            return self.weights * n

    table = Table()
    table.scaled(2)
    yield lambda x: x * table.scaled(2) + table.weights, X()
    table.rate = 3.0
    yield (X(),)
    del table.weights
    table.weights  # noqa: B018
    Table.scaled.cache_clear()
    table.scaled(2)
    yield (X(),)
    table.weights.mul_(2)
    yield (X(),)


@program("caches")
def rotary_cache_that_grows():
    class Rotary(nn.Module):
        def __init__(self):
            super().__init__()
            self.length, self.table = 0, None

        def forward(self, x):
            if x.shape[0] > self.length:
                self.length = x.shape[0]
                self.table = torch.arange(float(self.length)).cos()
            return x * self.table[: x.shape[0]]

    model = Rotary()
    for i, n in enumerate((2, 3, 3, 2, 5, 4)):
        yield (model, torch.ones(n)) if i == 0 else (torch.ones(n),)
        yield Seen(length=model.length, table=model.table)
    model.table = model.table * 2
    yield (torch.ones(4),)


# ---- random numbers, modes ----


@program("random")
def generators_in_arguments_and_state():
    g = torch.Generator().manual_seed(3)
    yield lambda x, g: x + torch.rand(4, generator=g), X(), g
    yield X(), g
    g.manual_seed(3)
    yield X(), g
    yield X(), torch.Generator().manual_seed(5)
    yield X(), None
    yield Seen(state=g.get_state(), outer=torch.get_rng_state())


@program("random")
def draws_in_a_branch_and_after_an_error():
    def f(x, n):
        if n > 1:
            x = x + torch.rand(4)
        if n == 3:
            raise ValueError
        return torch.nn.functional.dropout(x, 0.5) * torch.randint(5, (4,)) + torch.randperm(4)

    for i, n in enumerate((1, 2, 3, 1, 3, 2)):
        yield (f, X(), n) if i == 0 else (X(), n)
        yield Seen(state=torch.get_rng_state())


@program("random")
def draws_with_the_normal_family():
    def f(x):
        y = torch.empty(4).normal_(1, 2) + torch.empty(4).exponential_() + torch.empty(4).uniform_(-1, 1)
        z = torch.normal(x, 1.0) + torch.bernoulli(x.sigmoid()) + torch.poisson(x.abs()) + torch.randn_like(x)
        return y, z, torch.multinomial(x.softmax(0), 2), torch.distributions.Normal(x, 1.0).rsample()

    for i in range(3):
        yield (f, X()) if i == 0 else (X(i),)
        yield Seen(state=torch.get_rng_state())
    torch.manual_seed(1)
    yield (X(),)


@program("random")
def rrelu_and_alpha_dropout_in_training():
    model = nn.Sequential(nn.RReLU(), nn.AlphaDropout(0.3), nn.FeatureAlphaDropout(0.2))
    x = torch.arange(8.0).view(2, 4) - 3
    yield model, x
    yield (x,)
    yield Seen(state=torch.get_rng_state())
    model.eval()
    yield (x,)
    model[0].lower = 0.3
    yield (x,)
    yield Seen(state=torch.get_rng_state())


@program("modes")
def autocast_nested_and_disabled_inside():
    model = linear()

    def f(x):
        y = model(x)
        with torch.autocast("cpu", enabled=False):
            z = y.float() @ model.weight
            with torch.autocast("cpu", dtype=torch.bfloat16):
                w = model(x)
        return y, z, w, torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    yield f, X()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yield (X(),)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = yield (X(),)
    yield Seen(error=backward(out[:3]), g=model.weight.grad)
    yield (X(),)


@program("modes")
def decorators_for_grad_modes():
    w = nn.Parameter(torch.ones(4))

    @torch.no_grad()
    def plain(x):
        return x * w

    @torch.enable_grad()
    def learned(x):
        return x * w

    @torch.inference_mode(False)
    def neither(x):
        return x * w

    def f(x):
        return plain(x) + 1, learned(x), neither(x)

    out = yield f, X()
    yield Seen(error=backward(out), w=w)
    with torch.no_grad():
        out = yield (X(),)
    yield Seen(error=backward(out), w=w)
    w.requires_grad_(False)
    yield (X(),)


@program("modes")
def default_device_and_dtype_by_context():
    def f(x):
        made = torch.zeros(4), torch.tensor(1.5), torch.arange(3.0)
        return made, [x + t.sum() for t in made], [t.device.type for t in made], torch.get_default_device()

    yield f, X()
    with torch.device("cpu"):
        yield (X(),)
    torch.set_default_dtype(torch.float64)
    try:
        yield (X(),)
    finally:
        torch.set_default_dtype(torch.float32)
    yield (X(),)


@program("modes")
def anomaly_and_deterministic_modes():
    w = nn.Parameter(torch.ones(4))

    def f(x):
        return (x * w).index_select(0, torch.tensor([0, 0, 1])), torch.is_anomaly_enabled()

    out = yield f, X()
    yield Seen(error=backward(out), w=w)
    with torch.autograd.detect_anomaly(check_nan=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = yield (X(),)
    torch.use_deterministic_algorithms(True)
    try:
        out = yield (X(),)
    finally:
        torch.use_deterministic_algorithms(False)
    yield Seen(error=backward(out), w=w)


# ---- tensors of unusual kinds ----

KINDS = {
    "transposed": lambda i: torch.arange(16.0).view(4, 4).t() + i,
    "with_gaps": lambda i: (torch.arange(64.0) + i).view(8, 8)[::2, ::2],
    "overlapping": lambda i: torch.arange(7.0).as_strided((4, 4), (1, 1)) + i * 0,
    "expanded": lambda i: torch.full((1, 4), float(i)).expand(4, 4),
    "without_elements": lambda i: torch.zeros(0, 4),
    "without_dimensions": lambda i: torch.tensor(1.5 + i),
    "of_size_one": lambda i: torch.full((1, 1), 2.0 + i),
    "channels_last": lambda i: (torch.arange(16.0) + i).view(1, 4, 2, 2).to(memory_format=torch.channels_last),
    "complex": lambda i: torch.complex(torch.arange(16.0).view(4, 4), torch.ones(4, 4) * i),
    "sparse": lambda i: (torch.eye(4) * (i + 1)).to_sparse(),
    "compressed": lambda i: (torch.eye(4) * (i + 1)).to_sparse_csr(),
    "quantized": lambda i: torch.quantize_per_tensor(torch.eye(4) * (i + 1), 0.1, 0, torch.qint8),
    "of_integers": lambda i: torch.arange(16, dtype=torch.int16).view(4, 4) + i,
    "of_truth_values": lambda i: torch.eye(4) > i - 1,
    "negated": lambda i: torch._neg_view(torch.arange(16.0).view(4, 4) + i),
    "of_half_precision": lambda i: (torch.arange(16.0).view(4, 4) + i).half(),
    "of_eight_bits": lambda i: (torch.arange(16.0).view(4, 4) + i).to(torch.float8_e4m3fn),
    "a_parameter": lambda i: nn.Parameter(torch.eye(4) + i),
    "a_buffer": lambda i: nn.Buffer(torch.eye(4) + i),
    "meta": lambda i: torch.empty(4, 4, device="meta"),
}


def plain(t: torch.Tensor):
    return t if t.layout == torch.strided and not t.is_quantized and t.device.type == "cpu" else str(t.shape)


def add_kind(name: str, make) -> None:
    def calls():
        def f(t):
            u = t * 2 if t.dtype != torch.float8_e4m3fn and not t.is_quantized else t
            d = t.dequantize() if t.is_quantized else t
            return plain(u), plain(d), t.shape, t.dtype, t.layout, t.is_contiguous() if t.layout == torch.strided else 0

        def g(t):
            if t.layout == torch.strided and not t.is_quantized and not t.requires_grad:
                t.zero_()
            return plain(t)

        world = state(f=f)
        yield lambda t: world.f(t), make(0)
        yield (make(1),)
        yield (torch.eye(4),)
        yield (make(2),)
        world.f = g
        for i in range(2):
            t = make(i)
            yield (t,)
            yield Seen(t=plain(t))

    calls.__name__ = f"tensor_{name}"
    program("tensors")(calls)


for _name, _make in KINDS.items():
    add_kind(_name, _make)


class Logged(torch.Tensor):
    seen: typing.ClassVar = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(getattr(func, "__name__", "?"))
        return super().__torch_function__(func, types, args, kwargs or {})


@program("tensors")
def subclass_with_a_function_of_its_own():
    def f(x):
        return x + 1, isinstance(x, Logged)

    Logged.seen.clear()
    yield f, X()
    yield (X().as_subclass(Logged),)
    yield Seen(seen=Logged.seen.count("add"))
    yield (X(),)
    yield (X().as_subclass(Logged),)
    yield Seen(seen=Logged.seen.count("add"))


@program("tensors")
def attributes_on_tensors_that_the_program_reads_and_writes():
    def f(x):
        x.count = getattr(x, "count", 0) + 1
        return x * x.count

    x = X()
    for i in range(3):
        yield (f, x) if i == 0 else (x,)
        yield Seen(count=x.count)
    x.count = 10
    yield (x,)
    yield Seen(count=x.count)


@program("tensors")
def attribute_that_some_arguments_have():
    def f(x):
        return x * getattr(x, "factor", 1.0)

    x, y = X(), X()
    x.factor = 2.0
    yield f, x
    yield (y,)
    x.factor = 3.0
    yield (x,)
    y.factor = 4.0
    yield (y,)


@program("tensors")
def attribute_of_a_result():
    def f(x):
        y = x * 2
        y.kept = x.shape[0]
        return y

    for i in range(2):
        out = yield (f, X()) if i == 0 else (X(),)
        yield Seen(kept=getattr(out, "kept", None))


@program("views")
def view_of_an_argument_is_kept_and_written_later():
    world = state(view=None)

    def keep(x):
        world.view = x[1:3]
        return x + 1

    x = X()
    yield keep, x
    world.view.add_(10)
    yield Seen(x=x)
    yield (x,)
    world.view.zero_()
    yield Seen(x=x)


@program("views")
def result_is_written_by_the_caller():
    def f(x):
        return x.view(2, 2), x.clone(), x[:2], x

    for i in range(3):
        x = X()
        out = yield (f, x) if i == 0 else (x,)
        for t in out:
            t.mul_(i + 2)
        yield Seen(x=x, out=out)


@program("views")
def swaps_and_rolls_in_place():
    def f(x, y):
        x[:2], y[:2] = y[2:].clone(), x[2:].clone()
        x[[0, 3]] = x[[3, 0]]
        y[1:] = y[:-1].clone()
        return x @ y

    x, y = X(), X(0.5)
    for i in range(3):
        yield (f, x, y) if i == 0 else (x, y)
        yield Seen(x=x, y=y)
    yield x, x
    yield Seen(x=x)
    base = torch.arange(6.0)
    yield base[:4], base[2:]
    yield Seen(base=base)


@program("views")
def in_place_chains_on_views_with_gradients():
    w = nn.Parameter(torch.full((2, 2), 2.0))

    def f(x):
        t = x.view(2, 2).clone()
        t.t()[0].mul_(w[0])
        t.diagonal().add_(w.diagonal())
        t[:, 1] += w.sum(0)
        t.select(0, 1).copy_(w[1] * x[:2])
        return t

    for i in range(3):
        x = X(i, grad=i > 0)
        out = yield (f, x) if i == 0 else (x,)
        yield Seen(error=backward(out), w=w, x=x)


# ---- composition ----


@program("composition")
def called_from_two_threads():
    world = state(scale=2.0)
    inner = lambda x: x * world.scale  # noqa: E731

    def f(x):
        return inner(x) + 1

    out = yield f, X()
    world.scale = 3.0
    found = []
    thread = threading.Thread(target=lambda: found.append(inner(X())))
    thread.start()
    thread.join()
    out = yield (X(),)
    yield Seen(out=out, found=found)


@program("composition")
def deep_copies_of_arguments_inside():
    def f(x, d):
        e = copy.deepcopy(d)
        e["t"].add_(1)
        return x + e["t"], e, copy.copy(d)

    d = {"t": X(), "n": [1, 2]}
    yield f, X(), d
    yield Seen(d=d)
    d["n"].append(3)
    yield X(), d
    d["t"].mul_(2)
    yield X(), d
    yield Seen(d=d)


@program("impurity")
def warnings_that_the_program_filters():
    said = []

    def f(x):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warnings.warn("careful", stacklevel=1)
        said.append(len(caught))
        return x + len(caught)

    yield f, X()
    yield (X(),)
    yield Seen(said=said)


@program("data")
def sorting_and_searching_by_values():
    def f(x):
        order = sorted(range(len(x)), key=lambda i: float(x[i]))
        best = max(x.tolist())
        return x[order], best, int(x.argmax()), [i for i, v in enumerate(x) if v > 0]

    yield f, X()
    yield (-X(),)
    yield (X(),)
    yield (torch.tensor([1.0, float("nan"), 0.0, 2.0]),)


@program("data")
def early_stop_by_a_norm():
    def f(x):
        n = 0
        while x.norm() > 1 and n < 10:
            x = x / 2
            n += 1
        return x, n

    yield f, X()
    yield (X() * 4,)
    yield (X(),)
    yield (X() * 0,)
