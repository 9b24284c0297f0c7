"""Small programs of globals, closures, containers, classes and arguments, with a twist between calls."""

from __future__ import annotations

import abc
import collections
import dataclasses
import enum
import functools
import itertools
import operator
import types
import typing

import torch
from torch import nn

from tests.soundness.harness import Seen, program
from tests.soundness.programs_fourth_modules import rows
from tests.soundness.world import X, backward

SCALE = 2.0
TABLE = {"a": 1.0}
ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh}


def activation(name):
    """As libraries look functions up."""
    return ACTIVATIONS[name]


# ---- globals and closures ----


@program("fourth: python")
def globals_by_statement():
    global SCALE

    def f(x):
        global SCALE
        SCALE = SCALE + 1
        return x * SCALE

    try:
        for i in range(5):
            yield (f, X()) if not i else X()
            if i == 2:
                SCALE = 10
        yield Seen(scale=SCALE)
    finally:
        SCALE = 2.0


@program("fourth: python")
def activation_registered_later():
    class Mlp(nn.Module):
        def __init__(self, act):
            super().__init__()
            self.layer, self.act = nn.Linear(4, 4), act

        def forward(self, x):
            return activation(self.act)(self.layer(x))

    model = Mlp("relu")
    try:
        yield model, rows()
        model.act = "square"
        yield rows()
        ACTIVATIONS["square"] = torch.square
        yield rows()
        ACTIVATIONS["square"] = lambda x: x.square() * TABLE["a"]
        yield rows()
        TABLE["a"] = 3.0
        yield rows()
    finally:
        ACTIVATIONS.pop("square", None)
        TABLE["a"] = 1.0


@program("fourth: python")
def counters_in_closures():
    def make():
        calls, total = 0, 0.0

        def f(x):
            nonlocal calls, total
            calls += 1
            total += 0.5
            return x + calls * total if calls % 3 else x - total

        return f, lambda: (calls, total)

    f, look = make()
    for i in range(8):
        yield (f, X()) if not i else X()
        yield Seen(look=look())


@program("fourth: python")
def lambdas_of_a_loop():
    layers = [lambda x: x * i for i in range(3)]
    late = [lambda x, i=i: x + i for i in range(3)]

    def f(x):
        for a, b in zip(layers, late, strict=True):
            x = b(a(x))
        return x

    yield f, X()
    layers[1], late[0] = late[2], layers[0]
    yield X()
    late[1].__defaults__ = (7,)
    yield X()
    layers.pop()
    yield X()
    late.pop()
    yield X()


@program("fourth: python")
def partial_whose_keywords_change():
    def scaled(x, factor=1.0, *, shift=0.0, mode="mul"):
        return (x * factor if mode == "mul" else x / factor) + shift

    f = functools.partial(scaled, factor=2.0, shift=1.0)
    yield f, X()
    f.keywords["shift"] = 3.0
    yield X()
    f.keywords["mode"] = "div"
    yield X()
    del f.keywords["factor"]
    yield X()
    yield X(), 4.0


@program("fourth: python")
def chain_of_partials_and_compositions():
    def compose(*fs):
        return functools.reduce(lambda f, g: lambda x: g(f(x)), fs, lambda x: x)

    steps = [torch.sin, functools.partial(torch.mul, other=2.0), operator.neg]

    def f(x):
        return compose(*steps)(x)

    yield f, X()
    steps.append(functools.partial(torch.clamp, min=-1.0))
    yield X()
    steps[1] = functools.partial(torch.mul, other=3.0)
    yield X()
    steps.reverse()
    yield X()


@program("fourth: python")
def default_arguments_that_remember():
    def f(x, seen=[], cache={}):  # noqa: B006
        seen.append(len(seen))
        key = tuple(x.shape)
        if key not in cache:
            cache[key] = torch.arange(x.numel(), dtype=x.dtype).view(x.shape)
        return x + cache[key] + len(seen)

    for x in (X(), X(), rows(), X(), rows(5)):
        yield (f, x) if not f.__defaults__[0] else x
    f.__defaults__[1][(4,)].fill_(100.0)
    yield X()
    yield Seen(d=f.__defaults__)


@program("fourth: python")
def function_replaced_in_its_module():
    module = types.ModuleType("helpers")
    exec(
        "import torch\nK = 2\ndef helper(x):\n    return x * K\ndef outer(x):\n    return helper(x) + 1",
        module.__dict__,
    )
    yield lambda x: module.outer(x), X()
    module.K = 3
    yield X()
    module.helper = lambda x: x - 1
    yield X()
    module.outer = torch.abs
    yield X()
    del module.helper
    yield X()


@program("fourth: python")
def code_of_a_function_exchanged():
    def helper(x):
        return x + 1

    def other(x):
        return x * 5

    yield lambda x: helper(x) * 2, X()
    helper.__code__ = other.__code__
    yield X()
    helper.__wrapped__ = other
    yield X()


@program("fourth: python")
def decorated_with_counting_wrapper():
    def counted(fn):
        @functools.wraps(fn)
        def inner(*args, **kwargs):
            inner.calls += 1
            return fn(*args, **kwargs)

        inner.calls = 0
        return inner

    @counted
    def block(x, scale=1.0):
        return x * scale

    def f(x):
        return block(x) + block(x, scale=block.calls)

    for i in range(5):
        yield (f, X()) if not i else X()
        yield Seen(calls=block.calls)
    block.calls = 100
    yield X()
    block.__wrapped__ = None
    yield X()


# ---- containers ----


@program("fourth: python")
def batch_dictionaries_of_many_orders():
    def f(batch):
        out = torch.zeros(4)
        for i, (key, value) in enumerate(batch.items()):
            out = out + value * (i + 1) if key != "skip" else out
        return out, list(batch)

    a, b = X(), X(1.0)
    yield f, {"a": a, "b": b}
    yield {"b": b, "a": a}
    yield {"a": a, "skip": b}
    yield {"a": a, "b": b, "c": a}
    yield collections.OrderedDict(b=b, a=a)
    yield {1: a, "b": b}
    yield {}


@program("fourth: python")
def missing_keys_made_by_defaultdict():
    state = collections.defaultdict(lambda: torch.zeros(4))
    counts = collections.Counter()

    def f(x, name):
        state[name] = state[name] * 0.5 + x
        counts[name] += 1
        return state[name] / counts[name]

    yield f, X(), "a"
    yield X(1.0), "b"
    yield X(2.0), "a"
    yield X(3.0), "a"
    yield Seen(state=state, counts=counts)
    state.default_factory = lambda: torch.ones(4)
    yield X(), "c"
    state.clear()
    yield X(), "a"
    yield Seen(state=state, counts=counts)


@program("fourth: python")
def window_of_a_deque():
    history = collections.deque(maxlen=3)

    def f(x):
        history.append(x.mean())
        return x - torch.stack(list(history)).mean()

    for i in range(5):
        yield (f, X()) if not i else X(float(i))
    history.rotate(1)
    history.appendleft(torch.tensor(9.0))
    yield X()
    yield Seen(history=history)


@program("fourth: python")
def sets_of_frozen_names():
    frozen = {"0.weight"}
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))

    def f(x):
        weights = {n: p.detach() if n in frozen else p for n, p in model.named_parameters()}
        return torch.func.functional_call(model, weights, (x,))

    for add in ("0.weight", "1.bias", "0.bias"):
        frozen.add(add)
        model.zero_grad()
        out = yield (f, rows()) if add == "0.weight" else rows()
        backward(out)
        yield Seen(model=model)
    frozen.clear()
    out = yield rows()
    backward(out)
    yield Seen(model=model)


@dataclasses.dataclass
class Output:
    """What models return."""

    logits: torch.Tensor
    loss: torch.Tensor | None = None
    hidden: tuple | None = None

    def __post_init__(self):
        self.size = self.logits.shape[0]

    def __getitem__(self, i):
        return [v for v in (self.logits, self.loss, self.hidden) if v is not None][i]


class Block(nn.Module):
    """A model with an output of its own, and optional arguments."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.config = types.SimpleNamespace(output_hidden=False, scale=1.0)

    def forward(self, x=None, labels=None, output_hidden=None, **kwargs):
        output_hidden = self.config.output_hidden if output_hidden is None else output_hidden
        hidden = ()
        for layer in self.layers:
            x = layer(x).tanh() * self.config.scale
            if output_hidden:
                hidden += (x,)
        if kwargs.get("double"):
            x = x * 2
        loss = None if labels is None else nn.functional.mse_loss(x, labels)
        return Output(x, loss, hidden or None)


@program("fourth: python")
def outputs_in_a_dataclass():
    model = Block()
    out = yield model, rows()
    yield rows(), torch.zeros(3, 4)
    model.config.output_hidden = True
    out = yield rows(), torch.zeros(3, 4)
    out.loss.backward()
    yield Seen(model=model, first=out[0], last=out[-1])
    model.config.scale = 0.5
    yield rows(), None, False


@program("fourth: python")
def keyword_arguments_of_many_kinds():
    model = Block()

    def f(x, kw):
        return model(x=x, **kw)

    yield f, rows(), {}
    yield rows(), {"labels": torch.ones(3, 4)}
    yield rows(), {"double": True, "output_hidden": True}
    yield rows(), {"double": 0, "unused": "anything"}
    yield rows(), {"double": "yes", "other": torch.ones(2)}
    yield rows(), {"bad name": 1}
    yield rows(), {"x": rows()}


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A configuration that is replaced as a whole."""

    width: int = 4
    rates: tuple = (0.5, 0.25)
    kind: str = "a"


@program("fourth: python")
def configuration_replaced_by_a_copy():
    class Net(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config = config

        def forward(self, x):
            c = self.config
            x = x[..., : c.width]
            for rate in c.rates:
                x = x * rate if c.kind == "a" else x / rate
            return x

    net = Net(Frozen())
    yield net, rows()
    net.config = dataclasses.replace(net.config, width=3)
    yield rows()
    net.config = Frozen()
    yield rows()
    net.config = dataclasses.replace(net.config, rates=(0.5,), kind="b")
    yield rows()
    object.__setattr__(net.config, "kind", "a")
    yield rows()


@program("fourth: python")
def named_tuples_replaced_and_returned():
    State = collections.namedtuple("State", "h c step")

    def f(x, state):
        h = state.h * 0.5 + x
        return h.tanh(), state._replace(h=h, c=state.c + 1, step=state.step + 1)

    state = State(torch.zeros(4), torch.zeros(4), 0)
    out = yield f, X(), state
    for i in range(4):
        out = yield X(float(i)), out[1]
        yield Seen(fields=type(out[1])._fields)
    yield X(), out[1]._replace(step=1.5)


@program("fourth: python")
def typed_dictionaries_and_mappings():
    base, over = {"scale": 2.0, "shift": 1.0}, {}
    chain = collections.ChainMap(over, base)
    proxy = types.MappingProxyType(base)

    def f(x):
        return x * chain["scale"] + proxy["shift"] + len(chain)

    yield f, X()
    over["scale"] = 5.0
    yield X()
    base["shift"] = -1.0
    yield X()
    base["more"] = 0
    yield X()
    chain.maps.insert(0, {"scale": 0.0})
    yield X()


@program("fourth: python")
def lists_changed_while_they_are_arguments():
    def f(xs, scales):
        xs[0] = xs[0] * scales[0]
        scales.append(float(len(scales)))
        xs.insert(0, xs[-1] + 1)
        return sum(xs)

    xs, scales = [X(), X(1.0)], [2.0]
    yield f, xs, scales
    yield Seen(xs=xs, scales=scales)
    yield xs, scales
    yield Seen(xs=xs, scales=scales)
    yield [X()], [0.5]
    yield xs[:2], scales
    yield Seen(xs=xs, scales=scales)


@program("fourth: python")
def list_shared_by_two_names():
    a = [1.0, 2.0]
    box = types.SimpleNamespace(left=a, right=a)

    def f(x):
        box.left[0] += 1
        return x * box.right[0] + (box.left is box.right)

    yield f, X()
    yield X()
    box.right = list(a)
    yield X()
    yield X()
    box.right = box.left
    yield X()
    yield Seen(box=box)


@program("fourth: python")
def iterators_as_arguments():
    def f(x, it):
        for value in itertools.islice(it, 2):
            x = x + value
        return x

    it = iter([1.0, 2.0, 3.0, 4.0, 5.0])
    yield f, X(), it
    yield X(), it
    yield X(), it
    yield Seen(rest=list(it))
    count = itertools.count(1)
    yield X(), count
    yield X(), count
    yield X(), (i * 2 for i in range(3))


@program("fourth: python")
def numbers_that_are_equal_but_not_the_same():
    def f(x, s):
        return x * s, (x.long() * s).dtype, type(s).__name__

    for s in (2, 2.0, True, 1, 1.0, -0.0, 0, 0.0, 2 + 0j, 2):
        yield (f, X(), s) if s == 2 and type(s) is int else (X(), s)


@program("fourth: python")
def settings_of_unusual_kinds():
    def f(x, a):
        return x[a] if isinstance(a, slice | tuple | type(...) | list) else x.to(a) if isinstance(a, torch.dtype) else x

    yield f, rows(), slice(0, 2)
    yield rows(), slice(1, None, 2)
    yield rows(), (..., 0)
    yield rows(), (None, slice(None), -1)
    yield rows(), ...
    yield rows(), [0, 2]
    yield rows(), [0, 1]
    yield rows(), torch.float64
    yield rows(), torch.int32
    yield rows(), range(2)
    yield rows(), torch.Size([2])


# ---- classes ----


@program("fourth: python")
def class_attribute_hidden_by_the_instance():
    class Layer:
        scale = 2.0
        mode: typing.ClassVar = "plain"

        def __call__(self, x):
            return x * self.scale if self.mode == "plain" else x - self.scale

    layer = Layer()
    yield lambda x: layer(x), X()
    layer.scale = 3.0
    yield X()
    Layer.scale = 4.0
    yield X()
    del layer.scale
    yield X()
    Layer.mode = "other"
    yield X()
    layer.mode = "plain"
    yield X()
    Layer.__call__ = lambda self, x: x * 100
    yield X()


@program("fourth: python")
def property_that_is_cached_and_dropped():
    class Grid:
        size = 4

        @functools.cached_property
        def points(self):
            return torch.linspace(0, 1, self.size)

        @property
        def span(self):
            return self.size - 1

    grid = Grid()
    yield lambda x: x * grid.points + grid.span, X()
    grid.size = 1
    yield X()
    del grid.points
    yield X()
    grid.points = torch.ones(4)
    yield X()
    Grid.span = property(lambda self: 10)
    yield X()


@program("fourth: python")
def settings_by_getattr():
    class Config:
        def __init__(self, **kw):
            self.__dict__["_data"] = kw

        def __getattr__(self, name):
            try:
                return self._data[name]
            except KeyError:
                raise AttributeError(name) from None

        def __setattr__(self, name, value):
            self._data[name] = value

    config = Config(scale=2.0)

    def f(x):
        return x * config.scale + getattr(config, "shift", 0.0) if hasattr(config, "scale") else x

    yield f, X()
    config.scale = 3.0
    yield X()
    config.shift = 1.0
    yield X()
    config._data.pop("scale")
    yield X()
    config.__dict__["scale"] = 5.0
    yield X()
    Config.shift = 7.0
    yield X()


@program("fourth: python")
def descriptor_that_validates_and_counts():
    class Positive:
        def __set_name__(self, owner, name):
            self.name, self.reads = "_" + name, 0

        def __get__(self, obj, owner=None):
            if obj is None:
                return self
            self.reads += 1
            return getattr(obj, self.name)

        def __set__(self, obj, value):
            setattr(obj, self.name, abs(value))

    class Layer:
        scale = Positive()

        def __init__(self):
            self.scale = -2.0

    layer = Layer()
    yield lambda x: x * layer.scale, X()
    layer.scale = -3.0
    yield X()
    layer._scale = -4.0
    yield X()
    yield Seen(reads=Layer.scale.reads)


@program("fourth: python")
def abstract_base_with_other_subclasses():
    class Loss(abc.ABC):
        weight = 1.0

        @abc.abstractmethod
        def value(self, x): ...

        def __call__(self, x):
            return self.weight * self.value(x)

    class L1(Loss):
        def value(self, x):
            return x.abs().sum()

    class L2(Loss):
        def value(self, x):
            return x.square().sum()

    box = types.SimpleNamespace(loss=L1())
    yield lambda x: box.loss(x), X()
    box.loss.__class__ = L2
    yield X()
    Loss.weight = 3.0
    yield X()
    box.loss = L1()
    yield X()
    L1.value = L2.value
    yield X()
    L1.__call__ = lambda self, x: super(L1, self).__call__(x) + 1
    yield X()


@program("fourth: python")
def mixins_and_super():
    class Base(nn.Module):
        def forward(self, x):
            return x + 1

    class Scale(Base):
        factor = 2.0

        def forward(self, x):
            return super().forward(x) * self.factor

    class Clip(Base):
        def forward(self, x):
            return super().forward(x).clamp(max=2.0)

    class Both(Scale, Clip):
        pass

    model = Both()
    yield model, X()
    Base.forward = lambda self, x: x - 1
    yield X()
    Both.__bases__ = (Clip, Scale)
    yield X()
    Scale.factor = 5.0
    yield X()
    model.__class__ = Clip
    yield X()


@program("fourth: python")
def registry_of_a_metaclass():
    class Registry(type):
        known: typing.ClassVar = {}

        def __new__(mcs, name, bases, ns):
            cls = super().__new__(mcs, name, bases, ns)
            mcs.known[name] = cls
            return cls

        @property
        def rank(cls):
            return len(cls.__mro__)

    class Op(metaclass=Registry):
        def run(self, x):
            return x

    class Double(Op):
        def run(self, x):
            return x * 2

    def f(x):
        for name in sorted(Registry.known):
            x = Registry.known[name]().run(x) + Registry.known[name].rank
        return x

    yield f, X()

    class Negate(Op):
        def run(self, x):
            return -x

    yield X()
    Registry.known.pop("Double")
    yield X()
    Negate.run = Double.run
    yield X()


class Mode(enum.Enum):
    """Ways."""

    UP = "up"
    DOWN = "down"


class Level(enum.IntFlag):
    """Bits."""

    SCALE = 1
    SHIFT = 2


@program("fourth: python")
def enumerations_decide():
    def f(x, mode, level):
        x = x + 1 if mode is Mode.UP else x - 1
        if Level.SCALE in level:
            x = x * 3
        if level & Level.SHIFT:
            x = x + level
        return x

    yield f, X(), Mode.UP, Level.SCALE
    yield X(), Mode.DOWN, Level.SCALE
    yield X(), Mode("up"), Level.SCALE | Level.SHIFT
    yield X(), Mode.UP, Level(0)
    yield X(), "up", Level(2)


@program("fourth: python")
def containers_of_a_users_class():
    class Bank:
        def __init__(self, items):
            self.items = items

        def __len__(self):
            return len(self.items)

        def __getitem__(self, i):
            return self.items[i]

        def __contains__(self, name):
            return name in ("a", "b")[: len(self.items)]

        def __bool__(self):
            return bool(self.items)

    bank = Bank([1.0, torch.ones(4)])

    def f(x):
        if not bank:
            return x
        for item in bank:
            x = x * item
        return x + len(bank) + ("b" in bank)

    yield f, X()
    bank.items.append(3)
    yield X()
    bank.items = [2.0]
    yield X()
    bank.items.clear()
    yield X()
    Bank.__bool__ = lambda self: True
    yield X()


@program("fourth: python")
def slots_emptied_and_filled():
    class Point:
        __slots__ = ("scale", "shift")

    point = Point()
    point.scale = 2.0

    def f(x):
        try:
            return x * point.scale + point.shift
        except AttributeError:
            return x * point.scale

    yield f, X()
    point.shift = 1.0
    yield X()
    point.scale = 4.0
    yield X()
    del point.shift
    yield X()
    del point.scale
    yield X()


@program("fourth: python")
def methods_bound_and_patched():
    class Model:
        def __init__(self, k):
            self.k = k

        def step(self, x):
            return x * self.k

        @classmethod
        def make(cls, x):
            return cls(3.0).step(x)

        @staticmethod
        def shift(x):
            return x + 1

    a, b = Model(2.0), Model(5.0)
    bound = a.step

    def f(x):
        return bound(x) + Model.make(x) + a.shift(x)

    yield f, X()
    bound = b.step
    yield X()
    a.step = types.MethodType(lambda self, x: x, a)
    yield X()
    bound = a.step
    yield X()
    Model.shift = staticmethod(lambda x: x - 1)
    yield X()
    a.shift = torch.neg
    yield X()


@program("fourth: python")
def single_dispatch_extended():
    @functools.singledispatch
    def scale(value, x):
        return x

    @scale.register
    def _(value: int, x):
        return x * value

    def f(x, v):
        return scale(v, x)

    yield f, X(), 2
    yield X(), 2.5
    scale.register(float, lambda v, x: x + v)
    yield X(), 2.5
    yield X(), True
    scale.register(bool, lambda v, x: -x)
    yield X(), True
    yield X(), [1]


@program("fourth: python")
def generators_and_context_managers_of_users():
    class Scope:
        def __init__(self, stack):
            self.stack = stack

        def __enter__(self):
            self.stack.append(len(self.stack) + 1.0)
            return self.stack[-1]

        def __exit__(self, *error):
            self.stack.pop()
            return False

    stack = []

    def pieces(x):
        for part in x.split(2):
            with Scope(stack) as depth:
                yield part * depth * len(stack)

    def f(x):
        with Scope(stack):
            return torch.cat(list(pieces(x)))

    yield f, X()
    stack.append(0.0)
    yield X()
    Scope.__exit__ = lambda self, *error: None
    yield X()
    yield X()
    yield Seen(stack=stack)


@program("fourth: python")
def errors_that_are_caught_or_not():
    class Bad(ValueError):
        pass

    limits = {"max": 10}

    def f(x, n):
        try:
            if n > limits["max"]:
                raise Bad(f"{n} > {limits['max']}")
            return x * n
        except KeyError:
            return x
        finally:
            limits["seen"] = n

    yield f, X(), 2
    yield X(), 20
    yield Seen(limits=limits)
    limits["max"] = 30
    yield X(), 20
    del limits["max"]
    yield X(), 3
    yield Seen(limits=limits)
    limits["max"] = None
    yield X(), 3


@program("fourth: python")
def variadic_arguments():
    def f(*xs, scale=1.0, **named):
        total = sum(xs) * scale
        for name in sorted(named):
            total = total + named[name] * len(name)
        return total, len(xs)

    yield f, X()
    yield X(), X(1.0)
    yield X(), X(1.0), 2.0
    yield X(), 2, X()
    yield ()


@program("fourth: python")
def module_called_with_keywords_from_a_list():
    class Cond(nn.Module):
        def forward(self, x, time=None, *, context=None, guidance=1.0):
            if time is not None:
                x = x + time
            return x if context is None else x * (1 - guidance) + context * guidance

    model = Cond()
    calls = [{}, {"time": 2}, {"time": 3}, {"context": X(1.0)}, {"context": X(1.0), "guidance": 7.5}]

    def f(x, i):
        return model(x, **calls[i])

    for i in range(5):
        yield (f, X(), i) if not i else (X(), i)
    calls[1]["time"] = torch.tensor(2)
    yield X(), 1
    calls[4] |= {"guidance": torch.tensor(3.0), "time": None}
    yield X(), 4


@program("fourth: python")
def strings_built_into_names():
    class Stages(nn.Module):
        def __init__(self):
            super().__init__()
            for i in range(3):
                setattr(self, f"stage{i}", nn.Linear(4, 4))
                self.register_buffer(f"gain_{i}", torch.tensor(float(i + 1)))
            self.n = 3

        def forward(self, x):
            for i in range(self.n):
                x = getattr(self, f"stage{i}")(x) * getattr(self, f"gain_{i}")
            return x

    model = Stages()
    yield model, rows()
    model.n = 2
    yield rows()
    model.stage1 = nn.Identity()
    yield rows()
    model.gain_0 = torch.tensor(10.0)
    yield rows()
    del model.stage0
    yield rows()
    model.stage0 = nn.Tanh()
    yield rows()


# ---- numbers that are looked at by their type ----

HANDLERS = {int: lambda x, n: x * n, float: lambda x, n: x + n, bool: lambda x, n: -x}
NUMBERS = (int, float)


@program("fourth: python")
def handlers_by_the_type_of_a_number():
    def f(x, n):
        return HANDLERS[type(n)](x, n)

    yield f, X(), 2
    for n in (3, 4, 0.5, 0.6, 0.7, True, 5):
        yield X(), n


@program("fourth: python")
def default_handler_for_unknown_types():
    def f(x, n):
        return HANDLERS.get(type(n), lambda x, n: x.abs())(x, n)

    yield f, X(), 0.25
    for n in (0.5, 0.6, 0.7, 2, 3, 4, None):
        yield X(), n


@program("fourth: python")
def numbers_told_from_other_things():
    config = types.SimpleNamespace(scale=0.5)

    def f(x):
        return x * config.scale if type(config.scale) in NUMBERS else x - config.scale

    yield f, X()
    for scale in (0.6, 0.7, 2, 3, 4, torch.tensor(2.0)):
        config.scale = scale
        yield X()


@program("fourth: python")
def types_in_names_and_messages():
    def f(x, n):
        return x * n, f"{type(n).__name__} of {tuple(map(type, [n]))}", str(type(n)), type(n)

    yield f, X(), 2
    for n in (3, 4, 0.5, 0.6, 0.7, 1j):
        yield X(), n


@program("fourth: python")
def numbers_made_by_the_type_of_others():
    def f(x, n, m):
        return x * n, type(n)(m)

    yield f, X(), 2, 3.7
    for n, m in ((3, 1.2), (4, 2.2), (0.5, 3), (0.6, 4), (0.7, 5)):
        out = yield X(), n, m
        yield Seen(plain=type(out[1]) in NUMBERS, text=repr(out[1]))


@program("fourth: python")
def optional_numbers_by_isinstance():
    def f(x, n=None, ranges=()):
        if isinstance(n, int | float | type(None)):
            return x * (1 if n is None else n)
        return x[n] if isinstance(n, type(...) | slice) else x

    yield f, X()
    for n in (2, 3, 0.5, 0.6, ..., None, slice(1, 3)):
        yield X(), n


# ---- the type of what may be a tensor ----


@program("fourth: python")
def type_of_an_argument_that_becomes_a_tensor():
    def f(xs):
        xs = xs[0]
        return xs + 1 if type(xs) is torch.Tensor else xs - 1

    yield f, [X()]
    yield [X(1.0), 2]
    yield [2]
    yield [nn.Parameter(X())]


@program("fourth: python")
def types_of_results_told_apart():
    layers = nn.ModuleList([nn.Linear(4, 4), nn.Tanh()])
    box = types.SimpleNamespace(as_tuple=True)

    def layer(x):
        return (layers[0](x), None) if box.as_tuple else layers[0](x)

    def f(x):
        out = layer(x)
        if type(out) is tuple:
            out = out[0]
        for m in layers:
            if type(m) is nn.Tanh:
                out = m(out)
        kept = [out]
        return out, type(kept).__name__

    yield f, rows()
    box.as_tuple = False
    yield rows()
    layers[1] = nn.ReLU()
    yield rows()
    layers.append(nn.Tanh())
    yield rows()
    box.as_tuple = True
    yield rows()


@program("fourth: python")
def type_of_a_variable_of_two_kinds():
    def f(x, n):
        out = n
        if n > 1:
            out = x
        return (x * 2 if type(out) is torch.Tensor else x * out), type(out).__name__

    yield f, X(), 1
    yield X(), 2
    yield X(), 3
    yield X(), 0


@program("fourth: python")
def type_of_a_caught_exception():
    def f(x, table, name):
        try:
            return x * table[name], "fine"
        except (KeyError, TypeError) as error:
            return x, f"{type(error).__name__}: {error}"

    yield f, X(), {"a": 2.0}, "a"
    yield X(), {"a": 2.0}, "b"
    yield X(), [1.0], "b"
    yield X(), {"a": "text"}, "a"
    yield X(), [1.0], 0
