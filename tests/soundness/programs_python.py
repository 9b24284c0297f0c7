"""Ways in which Python programs hold state that a compiler may not look at, changed between two calls."""

from __future__ import annotations

import abc
import array
import collections
import contextlib
import contextvars
import copy
import dataclasses
import enum
import functools
import itertools
import operator
import os
import string
import sys
import types
import weakref

import numpy as np
import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import prune

from tests.soundness.harness import Seen, program
from tests.soundness.world import X, backward


class Small(nn.Module):
    def __init__(self, scale=2.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0, 0.5, 3.0]))
        self.scale = scale

    def forward(self, x):
        return x * self.weight * self.scale


class Marked(torch.Tensor):
    pass


def small():
    """A class of its own, so that patching it leaves no trace."""
    return types.new_class("Own", (Small,))


# ---- attributes that are computed ----


@program("python: attributes")
def module_getattr_reads_a_table():
    class Lazy(Small):
        def __getattr__(self, name):
            table = self.__dict__.get("table", {})
            return table[name] if name in table else super().__getattr__(name)

        def forward(self, x):
            return super().forward(x) + self.shift

    model = Lazy()
    model.__dict__["table"] = {"shift": 1.0}
    yield model, X()
    model.table["shift"] = 5.0
    yield (X(),)
    model.table = {"shift": -1.0}
    yield (X(),)


@program("python: attributes")
def getattribute_counts_reads():
    class Counting:
        def __init__(self):
            self.reads = 0

        def __getattribute__(self, name):
            if name == "rate":
                object.__setattr__(self, "reads", object.__getattribute__(self, "reads") + 1)
                return float(object.__getattribute__(self, "reads"))
            return object.__getattribute__(self, name)

    o = Counting()
    yield lambda x: x * o.rate, X()
    yield (X(),)
    yield (X(),)
    yield Seen(reads=o.reads)


@program("python: attributes")
def data_descriptor_holds_the_value_elsewhere():
    store = {"a": 2.0}

    class Field:
        def __get__(self, o, owner=None):
            return store["a"]

        def __set__(self, o, value):
            store["a"] = value

    class Owner:
        a = Field()

    o = Owner()
    yield lambda x: x * o.a, X()
    o.a = 3.0
    yield (X(),)
    store["a"] = 4.0
    yield (X(),)


@program("python: attributes")
def cached_property_is_dropped():
    class Owner:
        base = 2.0

        @functools.cached_property
        def doubled(self):
            return self.base * 2

    o = Owner()
    yield lambda x: x * o.doubled, X()
    o.base = 10.0
    yield (X(),)
    del o.doubled
    yield (X(),)


@program("python: attributes")
def property_with_a_setter_on_a_module():
    class Tempered(Small):
        @property
        def heat(self):
            return self._heat

        @heat.setter
        def heat(self, value):
            self._heat = value * 2

        def forward(self, x):
            return super().forward(x) / self.heat

    model = Tempered()
    model.heat = 1.0
    yield model, X()
    model.heat = 3.0
    yield (X(),)


@program("python: attributes")
def slots_in_a_base_class_and_a_dictionary_below():
    class Base:
        __slots__ = ("gain",)

    class Derived(Base):
        pass

    o = Derived()
    o.gain, o.other = 2.0, 1.0
    yield lambda x: x * o.gain + o.other, X()
    o.gain = 3.0
    yield (X(),)
    o.other = 7.0
    yield (X(),)
    del o.gain
    yield (X(),)


@program("python: attributes")
def attribute_of_a_function():
    def f(x):
        return x * f.factor

    f.factor = 2.0
    yield f, X()
    f.factor = 3.0
    yield (X(),)
    del f.factor
    yield (X(),)


@program("python: attributes")
def metaclass_attribute():
    class Meta(type):
        rate = 2.0

    class Owner(metaclass=Meta):
        pass

    yield lambda x: x * Owner.rate, X()
    Meta.rate = 3.0
    yield (X(),)
    Owner.rate = 5.0
    yield (X(),)


@program("python: attributes")
def abstract_class_registers_another():
    class Shape(abc.ABC):  # noqa: B024
        pass

    class Square:
        pass

    s = Square()
    yield lambda x: x * 2 if isinstance(s, Shape) else x * 3, X()
    Shape.register(Square)
    yield (X(),)


@program("python: attributes")
def bases_of_a_class_are_changed():
    class A:
        rate = 2.0

    class B:
        rate = 3.0

    class C(A):
        pass

    o = C()
    yield lambda x: x * o.rate, X()
    C.__bases__ = (B,)
    yield (X(),)


# ---- enums, dataclasses, configurations ----


@program("python: configurations")
def enum_member_chooses():
    class Mode(enum.Enum):
        UP = 1
        DOWN = 2

    config = types.SimpleNamespace(mode=Mode.UP)
    yield lambda x: x + 1 if config.mode is Mode.UP else x - 1, X()
    config.mode = Mode.DOWN
    yield (X(),)


@program("python: configurations")
def enum_value_as_an_argument():
    class Scale(enum.IntEnum):
        ONE = 1
        TWO = 2

    yield lambda x, s: x * s, X(), Scale.ONE
    yield X(), Scale.TWO
    yield X(), 1
    yield X(), True


@program("python: configurations")
def flags_are_combined():
    class Flags(enum.Flag):
        RELU = enum.auto()
        SHIFT = enum.auto()

    o = types.SimpleNamespace(flags=Flags.RELU)

    def f(x):
        if Flags.RELU in o.flags:
            x = x.relu()
        return x + 1 if Flags.SHIFT in o.flags else x

    yield f, X()
    o.flags |= Flags.SHIFT
    yield (X(),)
    o.flags = Flags(0)
    yield (X(),)


@program("python: configurations")
def frozen_dataclass_is_replaced():
    @dataclasses.dataclass(frozen=True)
    class Deep:
        rate: float = 2.0
        sizes: tuple = (1, 2)

    @dataclasses.dataclass
    class Outer:
        deep: Deep = dataclasses.field(default_factory=Deep)

    config = Outer()
    yield lambda x: x * config.deep.rate + sum(config.deep.sizes), X()
    config.deep = dataclasses.replace(config.deep, rate=4.0)
    yield (X(),)
    object.__setattr__(config.deep, "sizes", (5, 6))
    yield (X(),)


@program("python: configurations")
def dataclass_default_is_a_class_attribute():
    @dataclasses.dataclass
    class Rates:
        rate: float = 2.0

    r = Rates()
    del r.rate
    yield lambda x: x * r.rate, X()
    Rates.rate = 3.0
    yield (X(),)


@program("python: configurations")
def dataclass_as_an_argument():
    @dataclasses.dataclass
    class Options:
        scale: float = 1.0
        names: list = dataclasses.field(default_factory=list)

    o = Options()
    yield lambda x, options: x * options.scale + len(options.names), X(), o
    o.scale = 2.0
    yield X(), o
    o.names.append("a")
    yield X(), o
    yield X(), copy.deepcopy(o)


@program("python: configurations")
def chain_of_dictionaries():
    low, high = {"rate": 2.0, "shift": 1.0}, {}
    config = collections.ChainMap(high, low)
    yield lambda x: x * config["rate"] + config["shift"], X()
    high["rate"] = 5.0
    yield (X(),)
    low["shift"] = -1.0
    yield (X(),)


@program("python: configurations")
def read_only_view_of_a_dictionary():
    table = {"rate": 2.0}
    view = types.MappingProxyType(table)
    yield lambda x: x * view["rate"], X()
    table["rate"] = 3.0
    yield (X(),)


@program("python: configurations")
def counter_and_its_missing_keys():
    seen = collections.Counter(a=1)
    yield lambda x: x * seen["a"] + seen["b"], X()
    seen["b"] += 4
    yield (X(),)
    seen.update("aab")
    yield (X(),)


@program("python: configurations")
def dictionary_that_makes_missing_values():
    class Defaults(dict):
        value = 2.0

        def __missing__(self, key):
            return self.value

    d = Defaults()
    yield lambda x: x * d["rate"], X()
    Defaults.value = 3.0
    yield (X(),)
    d["rate"] = 7.0
    yield (X(),)


@program("python: configurations")
def keys_of_a_dictionary_by_a_view():
    table = {"a": 1.0, "b": 2.0}
    values = table.values()
    yield lambda x: x * sum(values), X()
    table["c"] = 5.0
    yield (X(),)


@program("python: configurations")
def list_subclass_with_state():
    class Weights(list):
        offset = 0.0

    w = Weights([1.0, 2.0])
    yield lambda x: x * sum(w) + w.offset, X()
    w.offset = 3.0
    yield (X(),)
    w[0] = 9.0
    yield (X(),)


@program("python: configurations")
def tuple_holds_a_list():
    held = ([1.0, 2.0], {"k": 3.0})
    yield lambda x: x * held[0][0] + held[1]["k"], X()
    held[0][0] = 4.0
    yield (X(),)
    held[1]["k"] = -1.0
    yield (X(),)


@program("python: configurations")
def array_of_the_standard_library():
    numbers = array.array("d", [1.0, 2.0])
    yield lambda x: x * numbers[0], X()
    numbers[0] = 5.0
    yield (X(),)


@program("python: configurations")
def memory_view_of_bytes():
    data = bytearray(b"\x01\x02")
    view = memoryview(data)
    yield lambda x: x * view[0], X()
    data[0] = 7
    yield (X(),)


@program("python: configurations")
def numpy_view_of_an_array_written_through_the_base():
    base = np.arange(8.0)
    part = base[::2]
    yield lambda x: x * torch.tensor(part, dtype=torch.float32), X()
    base[2] = 50.0
    yield (X(),)


@program("python: configurations")
def numpy_scalar_argument():
    yield lambda x, s: x * float(s), X(), np.float64(2.0)
    yield X(), np.float64(3.0)
    yield X(), np.float32(3.0)


@program("python: configurations")
def numpy_array_as_an_argument():
    a = np.ones(4, dtype=np.float32)
    yield lambda x, n: x + torch.from_numpy(n), X(), a
    a[1] = 9.0
    yield X(), a
    yield X(), np.zeros(4, dtype=np.float32)


# ---- functions ----


@program("python: functions")
def least_recently_used_cache_is_cleared():
    world = types.SimpleNamespace(rate=2.0)

    @functools.cache
    def rate():
        return world.rate

    yield lambda x: x * rate(), X()
    world.rate = 3.0
    yield (X(),)
    rate.cache_clear()
    yield (X(),)


@program("python: functions")
def cache_of_an_inner_function_by_argument():
    calls = []

    @functools.lru_cache(maxsize=2)
    def table(n):
        calls.append(n)
        return float(n + len(calls))

    yield lambda x, n: x * table(n), X(), 1
    yield X(), 2
    yield X(), 1
    yield Seen(calls=calls)


@program("python: functions")
def partial_with_a_mutable_keyword():
    options = {"scale": 2.0}

    def f(x, options):
        return x * options["scale"]

    yield functools.partial(f, options=options), X()
    options["scale"] = 3.0
    yield (X(),)


@program("python: functions")
def partial_method_of_a_class():
    class Owner:
        def scaled(self, x, by):
            return x * by

        twice = functools.partialmethod(scaled, by=2.0)

    o = Owner()
    yield lambda x: o.twice(x), X()
    Owner.twice = functools.partialmethod(Owner.scaled, by=5.0)
    yield (X(),)


@program("python: functions")
def single_dispatch_gets_another_implementation():
    @functools.singledispatch
    def scale(n):
        return 1.0

    yield lambda x, n: x * scale(n), X(), 3
    scale.register(int, lambda n: float(n))
    yield X(), 3


@program("python: functions")
def decorator_keeps_a_counter():
    def counted(f):
        @functools.wraps(f)
        def wrapper(*args):
            wrapper.calls += 1
            return f(*args) * wrapper.calls

        wrapper.calls = 0
        return wrapper

    @counted
    def f(x):
        return x + 1

    yield f, X()
    yield (X(),)
    yield (X(),)
    yield Seen(calls=f.calls)


@program("python: functions")
def wrapped_function_is_replaced():
    def inner(x):
        return x + 1

    @functools.wraps(inner)
    def outer(x):
        return outer.__wrapped__(x) * 2

    yield outer, X()
    outer.__wrapped__ = lambda x: x - 1
    yield (X(),)


@program("python: functions")
def operator_getters():
    getter = operator.attrgetter("inner.rate")
    o = types.SimpleNamespace(inner=types.SimpleNamespace(rate=2.0))
    yield lambda x: x * getter(o), X()
    o.inner.rate = 3.0
    yield (X(),)
    o.inner = types.SimpleNamespace(rate=4.0)
    yield (X(),)


@program("python: functions")
def cell_shared_by_two_functions():
    def make():
        rate = 2.0

        def f(x):
            return x * rate

        def put(value):
            nonlocal rate
            rate = value

        return f, put

    f, put = make()
    yield f, X()
    put(3.0)
    yield (X(),)
    put(torch.tensor(4.0))
    yield (X(),)


@program("python: functions")
def mutable_default_is_shared():
    def f(x, seen=[]):  # noqa: B006
        seen.append(len(seen))
        return x * len(seen)

    yield f, X()
    yield (X(),)
    f.__defaults__[0].clear()
    yield (X(),)


@program("python: functions")
def method_bound_before_it_is_patched():
    own = small()
    model = own()
    forward = model.forward
    yield lambda x: forward(x), X()
    own.forward = lambda self, x: x - 1
    yield (X(),)
    model.scale = 7.0
    yield (X(),)


@program("python: functions")
def globals_by_name():
    namespace = {"torch": torch, "RATE": 2.0}
    exec("def f(x):\n    return x * globals()['RATE']", namespace)
    yield namespace["f"], X()
    namespace["RATE"] = 3.0
    yield (X(),)


@program("python: functions")
def builtin_is_shadowed():
    namespace = {"torch": torch}
    exec("def f(x):\n    return x * len('abc')", namespace)
    yield namespace["f"], X()
    namespace["len"] = lambda s: 10
    yield (X(),)
    del namespace["len"]
    yield (X(),)


@program("python: functions")
def sorting_by_a_key_that_changes():
    rank = {"a": 0, "b": 1}
    parts = {"a": 1.0, "b": 10.0}

    def f(x):
        for name in sorted(parts, key=rank.__getitem__):
            x = (x + parts[name]) * 2
        return x

    yield f, X()
    rank["a"] = 5
    yield (X(),)


@program("python: functions")
def generator_with_state_between_calls():
    def numbers():
        n = 1.0
        while True:
            n += (yield n) or 1.0

    source = numbers()
    next(source)
    yield lambda x: x * source.send(2.0), X()
    yield (X(),)
    yield (X(),)


@program("python: functions")
def counter_of_itertools():
    count = itertools.count(1)
    yield lambda x: x * next(count), X()
    yield (X(),)


@program("python: functions")
def class_with_call_is_replaced():
    class Twice:
        def __call__(self, x):
            return x * 2

    class Thrice:
        def __call__(self, x):
            return x * 3

    o = Twice()
    yield lambda x: o(x), X()
    o.__class__ = Thrice
    yield (X(),)


@program("python: functions")
def context_manager_with_state():
    class Scaled:
        level = 0

        def __enter__(self):
            Scaled.level += 1
            return self

        def __exit__(self, *error):
            Scaled.level -= 1

    def f(x):
        with Scaled(), Scaled():
            return x * Scaled.level

    yield f, X()
    Scaled.level = 5
    yield (X(),)
    yield Seen(level=Scaled.level)


@program("python: functions")
def context_variable():
    rate = contextvars.ContextVar("rate", default=2.0)
    yield lambda x: x * rate.get(), X()
    token = rate.set(3.0)
    yield (X(),)
    rate.reset(token)
    yield (X(),)


@program("python: functions")
def exit_stack_runs_callbacks():
    log = []

    def f(x):
        with contextlib.ExitStack() as stack:
            stack.callback(log.append, len(log))
            return x + len(log)

    yield f, X()
    yield (X(),)
    yield Seen(log=log)


@program("python: functions")
def weak_reference_dies():
    class Owner:
        rate = 2.0

    world = types.SimpleNamespace(owner=Owner())
    held = weakref.ref(world.owner)
    yield lambda x: x * (held().rate if held() is not None else -1.0), X()
    world.owner.rate = 3.0
    yield (X(),)
    world.owner = None
    yield (X(),)


@program("python: functions")
def weak_dictionary():
    class Key:
        pass

    key, table = Key(), weakref.WeakKeyDictionary()
    table[key] = 2.0
    yield lambda x: x * sum(table.values()), X()
    table[key] = 3.0
    yield (X(),)
    del key
    yield (X(),)


@program("python: functions")
def environment_by_get():
    os.environ["THUNDER_SOUNDNESS"] = "2"
    yield lambda x: x * float(os.environ.get("THUNDER_SOUNDNESS", "1")), X()
    os.environ["THUNDER_SOUNDNESS"] = "3"
    yield (X(),)
    del os.environ["THUNDER_SOUNDNESS"]
    yield (X(),)


@program("python: functions")
def environment_asked_for_a_name():
    os.environ.pop("THUNDER_SOUNDNESS", None)
    yield lambda x: x * 2 if "THUNDER_SOUNDNESS" in os.environ else x * 3, X()
    os.environ["THUNDER_SOUNDNESS"] = "1"
    yield (X(),)
    del os.environ["THUNDER_SOUNDNESS"]


@program("python: functions")
def template_of_a_string():
    o = types.SimpleNamespace(name="a")
    table = {"weight_a": 2.0, "weight_b": 3.0}
    yield lambda x: x * table[string.Template("weight_$n").substitute(n=o.name)], X()
    o.name = "b"
    yield (X(),)


@program("python: functions")
def recursion_limit_and_modules():
    sys.modules["thunder_soundness_plugin"] = types.SimpleNamespace(rate=2.0)

    def f(x):
        return x * sys.modules["thunder_soundness_plugin"].rate

    yield f, X()
    sys.modules["thunder_soundness_plugin"] = types.SimpleNamespace(rate=3.0)
    yield (X(),)
    del sys.modules["thunder_soundness_plugin"]


@program("python: functions")
def import_inside():
    sys.modules["thunder_soundness_plugin"] = types.ModuleType("thunder_soundness_plugin")
    sys.modules["thunder_soundness_plugin"].rate = 2.0

    def f(x):
        import thunder_soundness_plugin as plugin

        return x * plugin.rate

    yield f, X()
    sys.modules["thunder_soundness_plugin"].rate = 3.0
    yield (X(),)
    del sys.modules["thunder_soundness_plugin"]


# ---- modules ----


@program("python: modules")
def hook_with_keywords_is_added_later():
    model = small()()
    yield model, X()
    handle = model.register_forward_hook(lambda m, args, kwargs, out: out + len(kwargs) + 1, with_kwargs=True)
    yield (X(),)
    handle.remove()
    yield (X(),)


@program("python: modules")
def pre_hook_changes_the_input():
    model = small()()
    inner = nn.Sequential(model, nn.ReLU())
    yield inner, X()
    handle = model.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    yield (X(),)
    model.register_forward_pre_hook(lambda m, args, kwargs: ((args[0] + 1,), kwargs), with_kwargs=True, prepend=True)
    yield (X(),)
    handle.remove()
    yield (X(),)


@program("python: modules")
def hook_reads_state():
    model, world = small()(), types.SimpleNamespace(shift=1.0)
    model.register_forward_hook(lambda m, args, out: out + world.shift)
    yield model, X()
    world.shift = 4.0
    yield (X(),)


@program("python: modules")
def global_pre_hook_is_added():
    model = small()()
    yield model, X()
    handle = torch_module.register_module_forward_pre_hook(lambda m, args: (args[0] - 1,))
    try:
        yield (X(),)
    finally:
        handle.remove()
    yield (X(),)


@program("python: modules")
def backward_hook_is_added_later():
    model = small()()
    x = X(grad=True)
    out = yield model, x
    yield Seen(error=backward(out), x=x, model=model)
    model.register_full_backward_hook(lambda m, gin, gout: (gin[0] * 3,))
    out = yield (x,)
    yield Seen(error=backward(out), x=x, model=model)


@program("python: modules")
def tensor_hook_is_added_to_a_parameter():
    model = small()()
    x = X()
    out = yield model, x
    yield Seen(error=backward(out), model=model)
    handle = model.weight.register_hook(lambda g: g * 10)
    out = yield (x,)
    yield Seen(error=backward(out), model=model)
    handle.remove()
    out = yield (x,)
    yield Seen(error=backward(out), model=model)


@program("python: modules")
def state_dict_inside():
    model = small()()

    def f(x):
        return x * sum(v.sum() for v in model.state_dict().values())

    yield f, X()
    model.register_state_dict_post_hook(lambda m, state, prefix, meta: state.clear())
    yield (X(),)


@program("python: modules")
def module_list_is_reordered():
    layers = nn.ModuleList([Small(2.0), Small(3.0), nn.Tanh()])

    def f(x):
        for layer in layers:
            x = layer(x)
        return x

    yield f, X()
    layers.insert(0, nn.Tanh())
    yield (X(),)
    layers.append(layers.pop(0))
    yield (X(),)
    del layers[-1]
    yield (X(),)


@program("python: modules")
def module_dictionary_gets_a_key():
    parts = nn.ModuleDict({"a": Small(2.0)})
    yield lambda x: sum(part(x) for part in parts.values()), X()
    parts["b"] = Small(5.0)
    yield (X(),)
    parts["a"] = nn.Identity()
    yield (X(),)


@program("python: modules")
def parameter_list_is_extended():
    weights = nn.ParameterList([torch.ones(4)])
    yield lambda x: sum(x * w for w in weights), X()
    weights.append(torch.full((4,), 3.0))
    yield (X(),)
    weights[0] = nn.Parameter(torch.zeros(4))
    yield (X(),)


@program("python: modules")
def parametrization_is_registered():
    class Doubled(nn.Module):
        def forward(self, w):
            return w * 2

    layer = nn.Linear(4, 4)
    nn.init.eye_(layer.weight)
    yield layer, X()
    nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())
    yield (X(),)
    nn.utils.parametrize.remove_parametrizations(layer, "weight")
    yield (X(),)


@program("python: modules")
def weight_norm_is_applied():
    layer = nn.Linear(4, 4)
    nn.init.eye_(layer.weight)
    yield layer, X()
    nn.utils.parametrizations.weight_norm(layer)
    yield (X(),)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(2)
    yield (X(),)


@program("python: modules")
def pruning_masks_are_applied():
    layer = nn.Linear(4, 2)
    nn.init.ones_(layer.weight)
    yield layer, X()
    prune.custom_from_mask(layer, "weight", torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 1]]))
    yield (X(),)
    layer.weight_mask.zero_()
    yield (X(),)


@program("python: modules")
def buffers_are_not_persistent_and_replaced():
    model = small()()
    model.register_buffer("shift", torch.ones(4), persistent=False)
    type(model).forward = lambda self, x: x * self.weight + self.shift
    yield model, X()
    model.shift = torch.full((4,), 5.0)
    yield (X(),)
    model.shift.mul_(2)
    yield (X(),)
    model.shift = None
    yield (X(),)


@program("python: modules")
def submodule_counts_its_calls():
    class Counting(Small):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros((), dtype=torch.long))

        def forward(self, x):
            self.calls += 1
            return super().forward(x) + self.calls

    model = nn.Sequential(Counting(), nn.ReLU())
    yield model, X()
    yield (X(),)
    model[0].calls.zero_()
    yield (X(),)
    yield Seen(model=model)


@program("python: modules")
def training_flag_of_a_part_is_set_by_hand():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Identity())
    x = torch.stack([X(), X(0.0), X(2.0)])
    yield model, x
    model[0].training = False
    yield (x,)
    yield Seen(model=model)
    model[0].momentum = 0.9
    model.train()
    yield (x,)
    yield Seen(model=model)


@program("python: modules")
def two_models_swap_their_parameters():
    a, b = Small(2.0), Small(3.0)
    with torch.no_grad():
        b.weight.mul_(10)
    yield lambda x: a(x) - b(x), X()
    a.weight, b.weight = b.weight, a.weight
    yield (X(),)
    a.weight = b.weight
    yield (X(),)


@program("python: modules")
def parameters_become_tied_and_are_written():
    a, b = Small(2.0), Small(3.0)

    def f(x):
        with torch.no_grad():
            a.weight.add_(1)
        return a(x) + b(x)

    yield f, X()
    b.weight = a.weight
    yield (X(),)
    yield Seen(a=a, b=b)


@program("python: modules")
def forward_takes_other_arguments():
    class Flexible(Small):
        def forward(self, x, *extra, scale=1.0, **named):
            return x * scale + sum(extra) + sum(named.values())

    yield Flexible(), X()
    yield X(), 1.0
    yield X(), 1.0, 2.0
    yield X(), torch.ones(4)


# ---- values ----


@program("python: values")
def minus_zero_in_a_container():
    o = types.SimpleNamespace(rates=[0.0])
    yield lambda x: torch.copysign(x.abs() + 1, torch.tensor(o.rates[0])), X()
    o.rates[0] = -0.0
    yield (X(),)


@program("python: values")
def nan_replaced_by_another_nan():
    o = types.SimpleNamespace(limit=float("nan"))
    yield lambda x: x.clamp(max=1.0) if o.limit != o.limit else x.clamp(max=o.limit), X()
    o.limit = 0.0
    yield (X(),)
    o.limit = float("nan")
    yield (X(),)


@program("python: values")
def complex_with_minus_zero():
    yield lambda x, c: x * c.real + c.imag, X(), complex(1.0, 0.0)
    yield X(), complex(2.0, 0.0)
    yield X(), complex(2.0, -0.0)


@program("python: values")
def big_and_bool_integers():
    yield lambda x, n: x * n, X(), 1
    yield X(), True
    yield X(), 2**40
    yield X(), -1


@program("python: values")
def slice_and_range_as_state():
    o = types.SimpleNamespace(part=slice(0, 2), steps=range(2))
    yield lambda x: x[o.part] * sum(o.steps), X()
    o.part = slice(1, 4)
    yield (X(),)
    o.steps = range(5)
    yield (X(),)


@program("python: values")
def dtype_and_device_as_state():
    o = types.SimpleNamespace(dtype=torch.float64, device=torch.device("cpu"))
    yield lambda x: x.to(o.dtype, copy=True) + torch.zeros(4, device=o.device), X()
    o.dtype = torch.int32
    yield (X(),)
    o.device = torch.device("meta")
    yield (X(),)


@program("python: values")
def size_of_an_argument_as_state():
    o = types.SimpleNamespace(size=torch.Size([2, 2]))
    yield lambda x: x.reshape(o.size) * 2, X()
    o.size = torch.Size([4, 1])
    yield (X(),)


@program("python: values")
def tensor_in_a_set():
    t = torch.tensor(2.0)
    held = {t}
    yield lambda x: x * sum(held), X()
    t.fill_(5.0)
    yield (X(),)
    held.add(torch.tensor(1.0))
    yield (X(),)


@program("python: values")
def expanded_and_shifted_inputs():
    base = torch.arange(8.0)
    yield lambda a, b: (a.add_(1), a + b)[1], base[:4].clone(), base[4:].clone()
    yield base[:4], base[2:6]
    yield Seen(base=base)
    yield base[4:], base[4:]
    yield Seen(base=base)
    yield base[::2], base[1::2]
    yield Seen(base=base)


@program("python: values")
def views_of_a_base_that_is_captured():
    base = torch.arange(4.0)

    def f(x):
        x.mul_(2)
        return base + x

    yield f, X()
    yield (base,)
    yield Seen(base=base)
    yield (base.flip(0),)
    yield (base.view(2, 2).view(4),)
    yield Seen(base=base)


@program("python: values")
def conjugated_and_negated_inputs():
    z = torch.complex(X(), X(0.5))
    yield lambda a: (a * 2, a.is_conj(), a.is_neg()), z
    yield (z.conj(),)
    yield (z.conj().imag,)
    yield (z.imag,)


@program("python: values")
def memory_formats_of_an_input():
    x = torch.arange(16.0).reshape(1, 2, 2, 4)
    yield lambda a: (a * 2, a.is_contiguous(), (a + 1).stride()), x
    yield (x.to(memory_format=torch.channels_last),)
    yield (x.transpose(2, 3),)


@program("python: values")
def subclass_of_a_tensor():
    yield lambda a: (a * 2, type(a).__name__), X()
    yield (X().as_subclass(Marked),)
    yield (nn.Parameter(X()),)


# ---- exceptions and effects ----


@program("python: exceptions")
def exception_carries_state():
    log = []

    def f(x, fail):
        log.append("in")
        try:
            if fail:
                raise KeyError("k")
            return x + len(log)
        except KeyError as error:
            log.append(str(error))
            return x - len(log)
        finally:
            log.append("out")

    yield f, X(), False
    yield X(), True
    yield X(), False
    yield Seen(log=log)


@program("python: exceptions")
def custom_exception_with_a_tensor():
    class Stop(Exception):
        pass

    def inner(x):
        raise Stop(x * 2)

    def f(x):
        try:
            inner(x)
        except Stop as stop:
            return stop.args[0] + 1

    yield f, X()
    yield (X(3.0),)


@program("python: exceptions")
def generator_is_closed_early():
    log = []

    def parts(x):
        try:
            yield x
            yield x * 2
        finally:
            log.append("closed")

    def f(x):
        for part in parts(x):
            return part + len(log)

    yield f, X()
    yield (X(),)
    yield Seen(log=log)


@program("python: exceptions")
def else_of_a_loop_and_walrus():
    o = types.SimpleNamespace(limit=3)

    def f(x):
        for i in range(5):
            if (n := i * 2) > o.limit:
                break
            x = x + n
        else:
            return x * 100
        return x

    yield f, X()
    o.limit = 100
    yield (X(),)


@program("python: exceptions")
def match_statement():
    yield matched, X(), {"kind": "scale", "by": 2.0}
    yield X(), {"kind": "scale", "by": 3.0}
    yield X(), ["shift", 1.0]
    yield X(), None


def matched(x, what):
    match what:
        case {"kind": "scale", "by": by}:
            return x * by
        case ["shift", by]:
            return x + by
        case _:
            return x


@program("python: exceptions")
def attribute_deleted_inside():
    o = types.SimpleNamespace(once=2.0)

    def f(x):
        if hasattr(o, "once"):
            rate = o.once
            del o.once
            return x * rate
        return x

    yield f, X()
    yield (X(),)
    o.once = 4.0
    yield (X(),)
    yield (X(),)


@program("python: exceptions")
def list_popped_inside():
    rates = [1.0, 2.0, 3.0]

    def f(x):
        return x * rates.pop() if rates else x

    for call in range(4):
        yield (f, X()) if call == 0 else (X(),)
    yield Seen(rates=rates)


@program("python: exceptions")
def arguments_swapped_inside():
    def f(x, pair):
        pair[0], pair[1] = pair[1], pair[0]
        return x * pair[0] - pair[1]

    pair = [1.0, torch.full((4,), 2.0)]
    yield f, X(), pair
    yield X(), pair
    yield Seen(pair=pair)


@program("python: exceptions")
def dictionary_popped_and_put_back():
    cache = {"a": torch.ones(4)}

    def f(x):
        t = cache.pop("a")
        cache["b" if len(cache) else "a"] = t + x
        return t

    yield f, X()
    yield (X(),)
    cache["z"] = 1
    yield (X(),)
    yield Seen(cache=cache)


@program("python: exceptions")
def memo_by_shape():
    memo = {}

    def mask(n):
        if n not in memo:
            memo[n] = torch.ones(n, n).tril()
        return memo[n]

    def f(x):
        return mask(x.shape[0]) @ x

    yield f, X()
    yield (X()[:2].clone(),)
    memo[4] = torch.zeros(4, 4)
    yield (X(),)
    yield Seen(memo=memo)


@program("python: exceptions")
def memo_by_identity():
    memo = {}

    def f(x):
        key = id(x)
        if key in memo:
            return x * 10
        memo[key] = True
        return x

    x, y = X(), X(1.0)
    yield f, x
    yield (x,)
    yield (y,)
    yield (x,)
    yield Seen(n=len(memo))


@program("python: exceptions")
def object_attribute_is_a_computed_tensor():
    o = types.SimpleNamespace(total=torch.zeros(4))

    def f(x):
        o.total = o.total * 0.5 + x
        return o.total.clone()

    yield f, X()
    yield (X(),)
    o.total = torch.ones(4)
    yield (X(),)
    yield Seen(o=o)


@program("python: exceptions")
def deep_copy_inside():
    o = types.SimpleNamespace(rates=[1.0, 2.0], t=torch.ones(4))

    def f(x):
        mine = copy.deepcopy(o)
        mine.rates.append(3.0)
        mine.t.add_(x)
        return mine.t * len(mine.rates)

    yield f, X()
    o.rates.append(9.0)
    yield (X(),)
    o.t.fill_(7.0)
    yield (X(),)
    yield Seen(o=o)


# ---- what a capture shows the program ----


@program("python: types")
def exact_type_of_a_tensor():
    def f(a):
        return a + 1 if type(a) is torch.Tensor else a - 1

    yield f, X()
    yield (nn.Parameter(X()),)
    yield (X(2.0),)


@program("python: types")
def class_of_a_tensor():
    yield lambda a: a + 1 if a.__class__ == torch.Tensor else a - 1, X()
    yield (nn.Parameter(X()),)


@program("python: types")
def type_of_an_intermediate():
    def f(a):
        b = a * 2
        return b + 1 if type(b) in (torch.Tensor, nn.Parameter) else b - 1

    yield f, X()
    yield (X(1.0),)


@program("python: types")
def class_attribute_by_type_of_self():
    class Owner(Small):
        rate = 2.0

        def forward(self, x):
            return super().forward(x) * type(self).rate + self.__class__.rate

    own = types.new_class("Own", (Owner,))
    yield own(), X()
    own.rate = 3.0
    yield (X(),)


@program("python: functions")
def cached_tensor_by_shape():
    @functools.lru_cache(maxsize=8)
    def mask(n):
        return torch.ones(n, n).tril()

    yield lambda x: mask(x.shape[0]) @ x, X()
    yield (X(1.0),)
    yield (X()[:2].clone(),)
    yield Seen(mask=mask(4), other=mask(2))
    mask(4).zero_()
    yield (X(),)
