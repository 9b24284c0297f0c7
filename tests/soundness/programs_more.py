"""Small programs of things that Python and torch let one do between calls, or inside of one."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import enum
import functools
import itertools
import types
import weakref

import torch
from torch import nn
from torch.nn import functional as F

from tests.soundness.harness import Seen, program
from tests.soundness.world import X, backward


def state(**values):
    return types.SimpleNamespace(**values)


# ---- data classes, properties, descriptors ----


@program("dataclasses")
def field_of_a_frozen_dataclass_that_is_replaced():
    @dataclasses.dataclass(frozen=True)
    class Options:
        scale: float = 2.0
        parts: tuple = (1, 2)

    world = state(options=Options())

    def f(x):
        o = world.options
        return x * o.scale + sum(o.parts)

    yield f, X()
    world.options = dataclasses.replace(world.options, scale=3.0)
    yield X()
    world.options = dataclasses.replace(world.options, parts=(5,))
    yield X()


@program("dataclasses")
def dataclass_made_inside_and_compared():
    @dataclasses.dataclass
    class Point:
        a: float
        b: float = dataclasses.field(default_factory=lambda: 1.0)

    want = Point(1.0, 2.0)

    def f(x):
        p = Point(1.0)
        p.b += 1
        return x * 2 if p == want else x - 1

    yield f, X()
    want.b = 3.0
    yield X()
    want.b = 2.0
    yield X()


@program("dataclasses")
def order_and_replace_inside():
    @dataclasses.dataclass(order=True)
    class Level:
        n: int
        t: object = dataclasses.field(default=None, compare=False)

    levels = [Level(2), Level(1), Level(3)]

    def f(x):
        top = max(levels)
        low = dataclasses.replace(min(levels), t=x)
        return low.t * top.n + low.n, dataclasses.asdict(top)["n"]

    yield f, X()
    levels[1].n = 7
    yield X()
    levels.append(Level(-2))
    yield X()


@program("descriptors")
def property_whose_getter_is_replaced_on_the_class():
    class Model(nn.Module):
        base = 2.0

        @property
        def scale(self):
            return self.base * 2

        def forward(self, x):
            return x * self.scale

    m = Model()
    yield m, X()
    Model.scale = property(lambda self: self.base * 5)
    yield X()
    Model.base = 1.0
    yield X()
    del Model.scale
    m.scale = 7.0
    yield X()


@program("descriptors")
def data_descriptor_that_counts():
    class Counted:
        def __set_name__(self, owner, name):
            self.name = "_" + name

        def __get__(self, obj, owner=None):
            if obj is None:
                return self
            obj.reads += 1
            return getattr(obj, self.name)

        def __set__(self, obj, value):
            obj.writes += 1
            setattr(obj, self.name, value)

    class Thing:
        value = Counted()

        def __init__(self):
            self.reads = self.writes = 0
            self.value = 2.0

    thing = Thing()

    def f(x):
        thing.value = thing.value + 1
        return x * thing.value

    yield f, X()
    yield Seen(thing=thing)
    thing.value = 10.0
    yield X()
    yield Seen(thing=thing)
    yield X()
    yield Seen(thing=thing)


@program("descriptors")
def cached_property_filled_by_the_program():
    class Thing:
        def __init__(self):
            self.n = 2.0

        @functools.cached_property
        def square(self):
            return self.n * self.n

    thing = Thing()

    def f(x):
        return x * thing.square

    yield f, X()
    thing.n = 3.0
    yield X()
    del thing.square
    yield X()
    yield Seen(thing=thing)


@program("descriptors")
def getattr_of_a_module():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = {"gain": 2.0}

        def __getattr__(self, name):
            table = self.__dict__.get("table", {})
            return table[name] if name in table else super().__getattr__(name)

        def forward(self, x):
            return x * self.gain

    m = Model()
    yield m, X()
    m.table["gain"] = 3.0
    yield X()
    m.gain = 4.0
    yield X()
    del m.gain
    del m.table["gain"]
    yield X()


@program("descriptors")
def setattr_of_a_module_that_keeps_a_log():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.__dict__["log"] = []
            self.step = 0

        def __setattr__(self, name, value):
            self.__dict__["log"].append(name)
            super().__setattr__(name, value)

        def forward(self, x):
            self.step += 1
            return x + len(self.log)

    m = Model()
    yield m, X()
    yield Seen(log=m.log, step=m.step)
    yield X()
    yield Seen(log=m.log, step=m.step)


# ---- generators, context managers ----


@program("generators")
def generator_that_lives_between_calls():
    numbers = itertools.count(1)

    def f(x):
        return x * next(numbers)

    yield f, X()
    yield X()
    next(numbers)
    yield X()
    yield Seen(n=next(numbers))


@program("generators")
def generator_that_is_closed_early():
    world = state(closed=0)

    def parts(x):
        try:
            yield x + 1
            yield x + 2
        finally:
            world.closed += 1

    def f(x):
        g = parts(x)
        y = next(g)
        g.close()
        return y * world.closed

    yield f, X()
    yield X()
    yield Seen(world=world)


@program("generators")
def value_sent_to_a_generator():
    def mixing(gain):
        while True:
            got = yield
            gain.append(got)

    gains = []

    def f(x, n):
        g = mixing(gains)
        next(g)
        g.send(n)
        g.send(n + 1)
        return x * sum(gains)

    yield f, X(), 1
    yield X(), 1
    yield X(), 5
    yield Seen(gains=gains)


@program("context managers")
def context_manager_that_swallows_an_error():
    world = state(seen=0, fail=False)

    class Quiet:
        def __enter__(self):
            world.seen += 1
            return self

        def __exit__(self, kind, error, trace):
            return kind is ValueError

    def f(x):
        y = x + 1
        with Quiet():
            y = y * 2
            if world.fail:
                raise ValueError("no")
            y = y + 10
        return y

    yield f, X()
    world.fail = True
    yield X()
    world.fail = False
    yield X()
    yield Seen(world=world)


@program("context managers")
def exit_stack_with_callbacks():
    order = []

    def f(x):
        with contextlib.ExitStack() as stack:
            stack.callback(order.append, len(order))
            stack.callback(order.append, "second")
            x = x * (1 + len(order))
        return x

    yield f, X()
    yield Seen(order=order)
    yield X()
    yield Seen(order=order)


@program("context managers")
def temporary_attribute_put_back_after_an_error():
    world = state(gain=1.0)

    @contextlib.contextmanager
    def louder(by):
        before, world.gain = world.gain, world.gain * by
        try:
            yield
        finally:
            world.gain = before

    def f(x, fail):
        with louder(3.0):
            y = x * world.gain
            if fail:
                raise RuntimeError("inside")
        return y + world.gain

    yield f, X(), False
    yield X(), True
    yield Seen(world=world)
    world.gain = 2.0
    yield X(), False
    yield Seen(world=world)


# ---- closures, defaults, partial ----


@program("closures")
def closure_made_in_a_loop_and_bound_again():
    rates = [1.0, 2.0]

    def make():
        fs = [lambda t, r=r: t * r for r in rates]

        def f(x):
            for g in fs:
                x = g(x)
            return x

        def change(i, g):
            fs[i] = g

        return f, change

    f, change = make()
    yield f, X()
    rates[0] = 9.0
    yield X()
    change(1, lambda t: t - 5)
    yield X()


@program("closures")
def cell_emptied_and_filled():
    def make():
        gain = 2.0

        def f(x):
            return x * gain

        def drop():
            nonlocal gain
            del gain

        def fill(to):
            nonlocal gain
            gain = to

        return f, drop, fill

    f, drop, fill = make()
    yield f, X()
    drop()
    yield X()
    fill(3.0)
    yield X()


@program("defaults")
def mutable_default_argument():
    def f(x, seen=[]):  # noqa: B006
        seen.append(len(seen))
        return x * sum(seen), len(seen)

    yield f, X()
    yield X()
    yield X()
    yield Seen(seen=f.__defaults__[0])


@program("defaults")
def defaults_replaced():
    def g(x, gain=2.0, *, shift=1.0):
        return x * gain + shift

    def f(x):
        return g(x)

    yield f, X()
    g.__defaults__ = (3.0,)
    yield X()
    g.__kwdefaults__ = {"shift": -1.0}
    yield X()
    g.__kwdefaults__["shift"] = 5.0
    yield X()


@program("partials")
def keywords_of_a_partial_changed():
    def g(x, gain=1.0, other=0.0):
        return x * gain + other

    part = functools.partial(g, gain=2.0)

    def f(x):
        return part(x)

    yield f, X()
    part.keywords["gain"] = 3.0
    yield X()
    part.keywords["other"] = 1.0
    yield X()


@program("partials")
def partial_method_replaced_on_the_class():
    class Model(nn.Module):
        gain = 2.0

        def scaled(self, x, by):
            return x * by * self.gain

        twice = functools.partialmethod(scaled, by=2.0)

        def forward(self, x):
            return self.twice(x)

    m = Model()
    yield m, X()
    m.gain = 3.0
    yield X()
    Model.twice = functools.partialmethod(Model.scaled, by=5.0)
    yield X()


@program("code")
def code_of_a_function_replaced():
    def g(x):
        return x + 1

    def h(x):
        return x * 7

    def f(x):
        return g(x)

    yield f, X()
    g.__code__ = h.__code__
    yield X()
    f.__code__ = (lambda x: g(x) - 3).__code__
    yield X()


# ---- weak references, enumerations, classes ----


@program("weak references")
def weak_dictionary_that_loses_a_key():
    class Key:
        pass

    keys = [Key(), Key()]
    table = weakref.WeakKeyDictionary({k: float(i + 2) for i, k in enumerate(keys)})

    def f(x):
        return x * len(table) + sum(table.values())

    yield f, X()
    keys.pop()
    yield X()
    table[keys[0]] = 9.0
    yield X()


@program("enumerations")
def flag_combination():
    class Mode(enum.Flag):
        A = enum.auto()
        B = enum.auto()
        C = A | B

    world = state(mode=Mode.A)

    def f(x):
        if Mode.A in world.mode:
            x = x + 1
        if world.mode is Mode.C:
            x = x * 2
        return x * (2 if world.mode & Mode.B else 3)

    yield f, X()
    world.mode |= Mode.B
    yield X()
    world.mode = Mode.B
    yield X()


@program("enumerations")
def member_as_a_key_and_an_argument():
    class Kind(enum.StrEnum):
        MEAN = "mean"
        SUM = "sum"

    table = {Kind.MEAN: torch.mean, Kind.SUM: torch.sum}

    def f(x, kind):
        return table[kind](x), kind.value

    yield f, X(), Kind.MEAN
    yield X(), Kind.SUM
    table[Kind.MEAN] = torch.amax
    yield X(), Kind.MEAN
    yield X(), "sum"


@program("classes")
def attribute_shadowed_in_a_subclass_later():
    class Base(nn.Module):
        gain = 2.0

        def forward(self, x):
            return x * self.gain + super().__getattribute__("shift")

        shift = 1.0

    class Middle(Base):
        pass

    class Leaf(Middle):
        pass

    m = Leaf()
    yield m, X()
    Middle.gain = 3.0
    yield X()
    Leaf.shift = -1.0
    yield X()
    del Middle.gain
    yield X()


@program("classes")
def bases_of_a_class_changed():
    class A:
        def gain(self):
            return 2.0

    class B:
        def gain(self):
            return 5.0

    class Thing(A):
        pass

    thing = Thing()

    def f(x):
        return x * thing.gain()

    yield f, X()
    Thing.__bases__ = (B,)
    yield X()
    thing.gain = lambda: 7.0
    yield X()


@program("classes")
def class_of_an_object_changed():
    class Quiet(nn.Module):
        def forward(self, x):
            return x * 0.5

    class Loud(nn.Module):
        def forward(self, x):
            return x * 5

    m = nn.Sequential(Quiet(), Quiet())
    yield m, X()
    m[1].__class__ = Loud
    yield X()
    m[0] = Loud()
    yield X()


@program("classes")
def metaclass_with_call_and_attributes():
    class Meta(type):
        level = 2.0

        def __call__(cls, *args):
            made = super().__call__(*args)
            made.level = cls.level
            return made

    class Thing(metaclass=Meta):
        def __init__(self, t):
            self.t = t

    def f(x):
        thing = Thing(x + 1)
        return thing.t * thing.level

    yield f, X()
    Meta.level = 3.0
    yield X()


@program("classes")
def operators_of_a_class_changed():
    class Gain:
        def __init__(self, n):
            self.n = n

        def __rmul__(self, t):
            return t * self.n

        def __bool__(self):
            return self.n > 0

    gain = Gain(2.0)

    def f(x):
        return gain.__rmul__(x) if gain else x - 1

    yield f, X()
    gain.n = -1.0
    yield X()
    Gain.__bool__ = lambda self: True
    yield X()


# ---- hooks, modules ----


@program("hooks")
def hook_added_and_removed_between_calls():
    m = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    calls = []
    handles = []

    def hook(module, args, out):
        calls.append(type(module).__name__)
        return out * 2

    yield m, X()
    handles.append(m[0].register_forward_hook(hook))
    yield X()
    yield Seen(calls=calls)
    handles.append(m[1].register_forward_pre_hook(lambda module, args: (args[0] + 1,)))
    yield X()
    handles.pop().remove()
    yield X()
    handles.pop().remove()
    yield X()
    yield Seen(calls=calls)


@program("hooks")
def global_module_hook():
    m = nn.Linear(4, 4)
    seen = []
    yield m, X()
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(1) or out + 1)
    yield X()
    handle.remove()
    yield X()
    yield Seen(seen=seen)


@program("hooks")
def hook_that_counts_in_a_module():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Tanh()
            self.n = 0
            self.inner.register_forward_hook(self.note)

        def note(self, module, args, out):
            self.n += 1
            return out + self.n

        def forward(self, x):
            return self.inner(self.inner(x))

    m = Counter()
    yield m, X()
    yield X()
    yield Seen(n=m.n)


@program("modules")
def child_replaced_by_another_of_the_same_kind():
    m = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh())
    yield m, X(grad=True)
    m[0] = nn.Linear(4, 4, bias=False)
    out = yield X(grad=True)
    yield Seen(error=backward(out), m=m)
    m[0].weight = nn.Parameter(torch.eye(4))
    out = yield X()
    yield Seen(error=backward(out), m=m)
    m[1] = nn.Identity()
    yield X()


@program("modules")
def weight_tied_and_untied():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.ones(4))
            self.b = nn.Parameter(torch.ones(4) * 2)

        def forward(self, x):
            return x * self.a + self.b

    m = Model()
    out = yield m, X()
    yield Seen(error=backward(out), m=m)
    m.b = m.a
    out = yield X()
    yield Seen(error=backward(out), m=m)
    m.b = nn.Parameter(torch.zeros(4))
    out = yield X()
    yield Seen(error=backward(out), m=m)


@program("modules")
def parametrization_added_and_removed():
    m = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        m.weight.copy_(torch.arange(16.0).view(4, 4) / 16)

    class Symmetric(nn.Module):
        def forward(self, w):
            return w.triu() + w.triu(1).T

    yield m, X()
    nn.utils.parametrize.register_parametrization(m, "weight", Symmetric())
    yield X()
    with nn.utils.parametrize.cached():
        yield X()
    nn.utils.parametrize.remove_parametrizations(m, "weight")
    yield X()


@program("modules")
def copy_of_a_module_inside():
    m = nn.Linear(4, 4)

    def f(x):
        c = copy.deepcopy(m)
        return c(x) + (0 if c.weight is m.weight else 1)

    yield f, X()
    with torch.no_grad():
        m.weight.mul_(2)
    yield X()
    m.bias = None
    yield X()


# ---- torch: modes, patches, views ----


@program("patches")
def torch_function_patched():
    def f(x):
        return torch.relu(x) + F.gelu(x) + x.clamp(min=0)

    relu, clamp = torch.relu, torch.Tensor.clamp
    try:
        yield f, X()
        torch.relu = lambda t: t * 10
        yield X()
        torch.relu = relu
        yield X()
        torch.Tensor.clamp = lambda t, min: t + min
        yield X()
    finally:
        torch.relu, torch.Tensor.clamp = relu, clamp


@program("patches")
def builtin_patched_in_a_module():
    import builtins

    def f(x):
        return x * len([1, 2, 3]) + max(1, 2)

    before = builtins.max
    try:
        yield f, X()
        builtins.max = lambda *a: 100
        yield X()
    finally:
        builtins.max = before
    yield X()


@program("modes")
def autocast_around_and_inside():
    w = torch.ones(4, 4)

    def f(x, inside):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            y = x @ w
        return y, x @ w

    yield f, X(), True
    yield X(), False
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yield X(), False
        yield X(), True
    with torch.autocast("cpu", dtype=torch.float16):
        yield X(), False
    yield X(), True


@program("modes")
def grad_mode_that_a_helper_changes():
    world = state(train=True)

    def f(x):
        with torch.set_grad_enabled(world.train):
            y = x * 2
        z = y + 1
        return y.requires_grad, z.requires_grad, z

    out = yield f, X(grad=True)
    yield Seen(error=backward(out))
    world.train = False
    out = yield X(grad=True)
    yield Seen(error=backward(out))
    with torch.no_grad():
        world.train = True
        yield X(grad=True)


@program("modes")
def default_dtype_and_device_changed():
    def f(x):
        return torch.ones(4) * x, torch.tensor(1.5), torch.arange(3.0).dtype == torch.float64

    try:
        yield f, X()
        torch.set_default_dtype(torch.float64)
        yield X()
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        yield (torch.ones(4, device="cpu"),)
    yield X()


@program("modes")
def deterministic_algorithms_and_threads():
    def f(x):
        return x.cumsum(0) * (2 if torch.are_deterministic_algorithms_enabled() else 3)

    try:
        yield f, X()
        torch.use_deterministic_algorithms(True)
        yield X()
    finally:
        torch.use_deterministic_algorithms(False)
    yield X()


@program("views")
def writes_through_two_views_of_one_argument():
    def f(x):
        a, b = x[:3], x[1:]
        a.add_(1)
        b.mul_(2)
        a[0] = b[-1]
        return a + b

    x = X()
    yield f, x
    yield Seen(x=x)
    base = torch.arange(8.0)
    yield (base[::2],)
    yield Seen(base=base)
    yield (base[4:].flip(0),)
    yield Seen(base=base)


@program("views")
def arguments_that_share_memory():
    def f(x, y):
        x.add_(1)
        z = y * 2
        y.sub_(3)
        return z, x + y

    base = torch.arange(8.0)
    yield f, base[:4].clone(), base[4:].clone()
    yield base[:4], base[2:6]
    yield Seen(base=base)
    yield base[:4], base[:4]
    yield Seen(base=base)
    yield base[4:], base[:4]
    yield Seen(base=base)


@program("views")
def diagonal_and_transposed_writes():
    def f(m):
        m.diagonal().fill_(7)
        m.t()[0].neg_()
        m.view(-1)[::3].add_(1)
        return m.sum(0), m.unfold(0, 2, 1).sum()

    m = torch.arange(9.0).view(3, 3)
    yield f, m
    yield Seen(m=m)
    yield m
    yield Seen(m=m)


@program("errors")
def state_written_before_a_value_error_in_the_middle():
    world = state(step=0, log=[])

    def f(x, limit):
        world.step += 1
        world.log.append(x * world.step)
        y = x + world.step
        if world.step > limit:
            world.log.clear()
            raise ValueError(f"step {world.step}")
        world.log.append(y)
        return y

    yield f, X(), 2
    yield X(), 2
    yield X(), 2
    yield Seen(world=world)
    yield X(), 9
    yield Seen(world=world)


@program("errors")
def chained_exceptions_and_finally():
    world = state(ended=0, cause="")

    def f(x, n):
        try:
            try:
                y = x / [1, 2, 4][n]
            except IndexError as error:
                raise KeyError("outer") from error
            finally:
                world.ended += 1
        except KeyError as error:
            world.cause = type(error.__cause__).__name__
            y = x * 0
        return y + world.ended

    yield f, X(), 1
    yield X(), 5
    yield Seen(world=world)
    yield X(), 2
    yield Seen(world=world)


@program("containers")
def order_of_a_dictionary_decides():
    table = {"a": 1.0, "b": 2.0, "c": 3.0}

    def f(x):
        for i, (name, value) in enumerate(table.items()):
            x = x * value + i if name != "b" else x - value
        return x

    yield f, X()
    table["a"] = table.pop("a")
    yield X()
    table.update({"d": 4.0})
    yield X()
    for name in ("c", "b"):
        table[name] = table.pop(name)
    yield X()


@program("containers")
def dictionary_merged_and_popped():
    base = {"gain": 2.0}

    def f(x, **options):
        merged = base | options
        gain = merged.pop("gain")
        base["last"] = gain
        return x * gain + len(merged)

    yield f, X()
    yield X()
    yield Seen(base=base)
    base["gain"] = 4.0
    base["more"] = 1
    yield X()
    yield Seen(base=base)


@program("containers")
def named_tuples_and_slices_as_state():
    world = state(window=slice(0, 2), shape=torch.Size([2, 2]))

    def f(x):
        part = x[world.window]
        return part.sum(), x.view(world.shape)

    yield f, X()
    world.window = slice(1, None)
    yield X()
    world.shape = torch.Size([4, 1])
    yield X()


@program("random")
def generators_of_torch_in_state():
    world = state(g=torch.Generator().manual_seed(3), p=0.5)

    def f(x):
        noise = torch.rand(4, generator=world.g)
        return F.dropout(x, world.p) + noise

    yield f, X()
    yield X()
    world.p = 0.25
    yield X()
    world.g.manual_seed(3)
    yield X()
    world.g = torch.Generator().manual_seed(4)
    yield X()
    yield Seen(next=torch.rand(2), mine=torch.rand(2, generator=world.g))


@program("transforms")
def torch_func_inside():
    world = state(power=2)

    def loss(t):
        return (t**world.power).sum()

    def f(x):
        return torch.func.grad(loss)(x), torch.func.vmap(lambda r: r * 2 + world.power)(x.view(2, 2))

    yield f, X()
    world.power = 3
    yield X()
    yield X(grad=True)


@program("transforms")
def functional_call_with_other_parameters():
    m = nn.Linear(4, 4)

    def f(x, gain):
        named = {name: p * gain for name, p in m.named_parameters()}
        return torch.func.functional_call(m, named, (x,))

    out = yield f, X(), 2
    yield Seen(error=backward(out), m=m)
    out = yield X(), 3
    yield Seen(error=backward(out), m=m)
    m.weight.requires_grad_(False)
    out = yield X(), 3
    yield Seen(error=backward(out), m=m)


@program("nested")
def compiled_inside_compiled():
    import thunder

    world = state(gain=2.0)
    inner = thunder.jit(lambda t: t * world.gain)

    def f(x):
        return inner(x) + inner(x + 1)

    yield f, X()
    world.gain = 3.0
    yield X()
    out = yield X(grad=True)
    yield Seen(error=backward(out))


@program("nested")
def tensor_attributes_as_state():
    w = torch.ones(4)
    w.gain = 2.0
    w.note = {"n": 1}

    def f(x):
        w.note["n"] += 1
        return x * w.gain + w.note["n"]

    yield f, X()
    yield Seen(note=w.note)
    w.gain = 3.0
    yield X()
    yield Seen(note=w.note)


@program("nested")
def iterator_over_parameters_that_change():
    m = nn.ParameterList([nn.Parameter(torch.ones(4) * i) for i in range(3)])

    def f(x):
        return sum(p.sum() for p in m) + x * len(m), [n for n, _ in m.named_parameters()]

    out = yield f, X()
    yield Seen(error=backward(out), m=list(m))
    m.append(nn.Parameter(torch.ones(4)))
    out = yield X()
    yield Seen(error=backward(out), m=list(m))
    m[0] = nn.Parameter(torch.zeros(4))
    m[1].requires_grad_(False)
    out = yield X()
    yield Seen(error=backward(out), m=list(m))


@program("nested")
def numbers_of_numpy_as_state():
    import numpy as np

    world = state(gain=np.float64(2.0), order=np.array([2, 0, 1, 3]), n=np.int64(2))

    def f(x):
        return x[torch.from_numpy(world.order)] * float(world.gain) + int(world.n)

    yield f, X()
    world.order[0], world.order[1] = 0, 2
    yield X()
    world.gain = np.float64(3.0)
    yield X()
    world.n = np.int64(7)
    yield X()


@program("nested")
def custom_function_with_state():
    world = state(gain=2.0)

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, gain):
            ctx.gain = gain
            ctx.save_for_backward(x)
            return x * gain

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return g * ctx.gain + x * 0, None

    def f(x):
        return Scaled.apply(x, world.gain) + 1

    out = yield f, X(grad=True)
    yield Seen(error=backward(out), out=out)
    world.gain = 3.0
    x = X(grad=True)
    out = yield (x,)
    yield Seen(error=backward(out), x=x)
    yield X()


# ---- tensors of the surroundings that no operation uses ----

ASKED = {
    "requires_grad": (lambda t: t.requires_grad, lambda t: t.requires_grad_()),
    "grad_fn": (lambda t: t.grad_fn is None, lambda t: t.mul_(torch.ones(4, requires_grad=True))),
    "shape": (lambda t: t.shape[0] == 4, lambda t: setattr(t, "data", torch.ones(6))),
    "length": (lambda t: len(t) == 4, lambda t: t.resize_(6)),
    "dtype": (lambda t: t.dtype == torch.float32, lambda t: setattr(t, "data", torch.ones(4, dtype=torch.float64))),
    "stride": (lambda t: t.is_contiguous(), lambda t: setattr(t, "data", torch.ones(8)[::2])),
    "dimensions": (lambda t: t.ndim == 1, lambda t: t.unsqueeze_(0)),
}


def add_asked(name, ask, change):
    def calls():
        t = torch.ones(4)

        def f(x):
            return x * 2 if ask(t) else x - 5

        yield f, X()
        change(t)
        yield X()
        yield X()

    calls.__name__ = f"tensor_that_is_asked_for_its_{name}"
    program("tensors")(calls)


for _name, _parts in ASKED.items():
    add_asked(_name, *_parts)
