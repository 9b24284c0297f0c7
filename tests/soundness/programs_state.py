"""Module state, globals and closures, containers, classes and methods."""

from __future__ import annotations

import collections
import dataclasses
import functools
import types

import torch
from torch import nn

from tests.soundness.harness import program

GAIN = 2.0
TABLE = {"a": 1.0}
OFFSET = torch.tensor(1.0)


def X() -> torch.Tensor:
    return torch.arange(4.0) - 1.5


def read_gain(x):
    return x * GAIN


def read_deeper(x):
    return read_gain(x) + 1


class Base(nn.Module):
    factor = 3.0

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.scaled(x) * self.weight

    def scaled(self, x):
        return x * self.factor


def fresh(base=Base):
    """A class of its own, so that patching it leaves no trace."""
    return types.new_class("Fresh", (base,))


def set_global(name, value):
    globals()[name] = value


# ---- globals ----


@program("globals")
def global_number_read_by_a_helper():
    set_global("GAIN", 2.0)
    yield read_gain, X()
    set_global("GAIN", 3.0)
    yield X()
    set_global("GAIN", 2.0)
    yield X()


@program("globals")
def global_number_read_two_calls_down():
    set_global("GAIN", 2.0)
    yield read_deeper, X()
    set_global("GAIN", 5.0)
    yield X()


@program("globals")
def global_read_by_a_forward():
    class Net(nn.Module):
        def forward(self, x):
            return x * GAIN

    set_global("GAIN", 2.0)
    yield Net(), X()
    set_global("GAIN", 7.0)
    yield X()


@program("globals")
def global_read_by_a_helper_of_a_forward():
    class Net(nn.Module):
        def forward(self, x):
            return read_deeper(x)

    set_global("GAIN", 2.0)
    yield Net(), X()
    set_global("GAIN", 7.0)
    yield X()


@program("globals")
def global_read_by_a_submodule():
    class Inner(nn.Module):
        def forward(self, x):
            return x + GAIN

    set_global("GAIN", 2.0)
    yield nn.Sequential(nn.Identity(), Inner()), X()
    set_global("GAIN", -1.0)
    yield X()


@program("globals")
def global_dictionary_entry():
    TABLE["a"] = 1.0
    yield lambda x: x * TABLE["a"], X()
    TABLE["a"] = 4.0
    yield X()


@program("globals")
def global_dictionary_entry_read_by_a_forward():
    class Net(nn.Module):
        def forward(self, x):
            return x * TABLE.get("a", 0.0) + len(TABLE)

    TABLE["a"] = 1.0
    yield Net(), X()
    TABLE["b"] = 4.0
    yield X()
    del TABLE["b"]
    yield X()


@program("globals")
def global_tensor_replaced():
    set_global("OFFSET", torch.tensor(1.0))
    yield lambda x: x + OFFSET, X()
    set_global("OFFSET", torch.tensor(2.0))
    yield X()
    OFFSET.fill_(9.0)
    yield X()


@program("globals")
def helper_function_replaced():
    original = read_gain
    set_global("GAIN", 2.0)
    yield lambda x: read_gain(x), X()
    set_global("read_gain", lambda x: x - 1)
    yield X()
    set_global("read_gain", original)
    yield X()


@program("globals")
def attribute_of_a_module_object():
    config = types.ModuleType("config")
    config.value = 2.0
    yield lambda x: x * config.value, X()
    config.value = 3.0
    yield X()


# ---- closures ----


@program("closures")
def nonlocal_number():
    n = 1.0

    def f(x):
        return x * n

    yield f, X()
    n = 2.0
    yield X()


@program("closures")
def number_two_closures_deep():
    n = 1.0

    def inner(x):
        return x * n

    def outer(x):
        return inner(x) + 1

    yield outer, X()
    n = 4.0
    yield X()


@program("closures")
def default_argument_is_mutated():
    def f(x, table={"k": 1.0}):  # noqa: B006
        return x * table["k"]

    yield f, X()
    f.__defaults__[0]["k"] = 2.0
    yield X()


@program("closures")
def defaults_are_replaced():
    def f(x, k=1.0):
        return x * k

    yield f, X()
    f.__defaults__ = (3.0,)
    yield X()


@program("closures")
def keyword_defaults_are_replaced():
    def f(x, *, k=1.0):
        return x * k

    yield f, X()
    f.__kwdefaults__ = {"k": 3.0}
    yield X()


@program("closures")
def code_is_replaced():
    def f(x):
        return x + 1

    def g(x):
        return x + 2

    yield f, X()
    f.__code__ = g.__code__
    yield X()


@program("closures")
def helper_code_is_replaced():
    def helper(x):
        return x + 1

    def other(x):
        return x + 2

    yield lambda x: helper(x), X()
    helper.__code__ = other.__code__
    yield X()


@program("closures")
def partial_of_a_function():
    box = [2.0]
    yield functools.partial(lambda b, x: x * b[0], box), X()
    box[0] = 5.0
    yield X()


@program("closures")
def counter_in_a_closure():
    count = 0

    def f(x):
        nonlocal count
        count += 1
        return x * count

    yield f, X()
    yield X()
    yield X()


# ---- module state ----


@program("modules")
def class_attribute_changes():
    Fresh = fresh()
    yield Fresh(), X()
    Fresh.factor = 5.0
    yield X()


@program("modules")
def base_class_attribute_changes():
    Middle = fresh()
    Fresh = fresh(Middle)
    yield Fresh(), X()
    Middle.factor = 5.0
    yield X()


@program("modules")
def instance_attribute_hides_the_classs():
    model = fresh()()
    yield model, X()
    model.factor = 5.0
    yield X()
    del model.factor
    yield X()


@program("modules")
def method_is_patched_on_the_class():
    Fresh = fresh()
    yield Fresh(), X()
    Fresh.scaled = lambda self, x: x - 1
    yield X()


@program("modules")
def method_is_patched_on_the_instance():
    model = fresh()()
    yield model, X()
    model.scaled = lambda x: x - 1
    yield X()


@program("modules")
def forward_is_patched_on_the_class():
    Fresh = fresh()
    yield Fresh(), X()
    Fresh.forward = lambda self, x: x - 7
    yield X()


@program("modules")
def forward_is_patched_on_a_submodules_class():
    Fresh = fresh()
    yield nn.Sequential(Fresh(), nn.ReLU()), X()
    Fresh.forward = lambda self, x: x + 7
    yield X()


@program("modules")
def forward_is_patched_on_the_instance():
    model = fresh()()
    yield model, X()
    model.forward = lambda x: x - 7
    yield X()


@program("modules")
def property_is_replaced():
    class Net(nn.Module):
        @property
        def gain(self):
            return 2.0

        def forward(self, x):
            return x * self.gain

    yield Net(), X()
    Net.gain = property(lambda self: 3.0)
    yield X()


@program("modules")
def property_reads_a_global():
    class Net(nn.Module):
        @property
        def gain(self):
            return GAIN

        def forward(self, x):
            return x * self.gain

    set_global("GAIN", 2.0)
    yield Net(), X()
    set_global("GAIN", 6.0)
    yield X()


@program("modules")
def class_of_an_instance_is_changed():
    A, B = fresh(), fresh()
    B.factor = 10.0
    model = A()
    yield model, X()
    model.__class__ = B
    yield X()


@program("modules")
def parameter_is_replaced():
    model = fresh()()
    yield model, X()
    model.weight = nn.Parameter(torch.full((4,), 2.0))
    yield X()
    model.weight = nn.Parameter(torch.full((1,), 2.0))
    yield X()


@program("modules")
def parameter_data_is_changed():
    model = fresh()()
    yield model, X()
    with torch.no_grad():
        model.weight.mul_(3)
    yield X()
    model.weight.data = torch.full((4,), 9.0)
    yield X()


@program("modules")
def requires_grad_is_switched():
    model = fresh()()
    yield model, X()
    model.weight.requires_grad_(False)
    yield X()
    model.weight.requires_grad_(True)
    yield X()


@program("modules")
def submodule_is_replaced():
    model = nn.Sequential(nn.ReLU(), nn.Identity())
    yield model, X()
    model[1] = nn.Tanh()
    yield X()
    model.append(nn.Sigmoid())
    yield X()


@program("modules")
def train_and_eval():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))
    x = torch.arange(12.0).reshape(3, 4)
    yield model, x
    model.eval()
    yield x
    model.train()
    yield x * 2


@program("modules")
def forward_hook_is_added_later():
    model = nn.Sequential(nn.ReLU())
    yield model, X()
    handle = model[0].register_forward_hook(lambda m, a, o: o + 10)
    yield X()
    handle.remove()
    yield X()


@program("modules")
def forward_pre_hook_is_added_to_the_root():
    model = nn.Sequential(nn.ReLU())
    yield model, X()
    model.register_forward_pre_hook(lambda m, a: (a[0] * 2,))
    yield X()


@program("modules")
def global_hook_is_added():
    model = nn.Sequential(nn.ReLU())
    yield model, X()
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, o: o + 1)
    try:
        yield X()
    finally:
        handle.remove()
    yield X()


@program("modules")
def buffer_counts_calls():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("n", torch.zeros(()))

        def forward(self, x):
            self.n += 1
            return x * self.n

    yield Net(), X()
    yield X()
    yield X()


@program("modules")
def attribute_counts_calls():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.n = 0

        def forward(self, x):
            self.n += 1
            return x * self.n

    yield Net(), X()
    yield X()
    yield X()


@program("modules")
def config_object_nested_in_a_module():
    @dataclasses.dataclass
    class Inner:
        scale: float = 2.0

    @dataclasses.dataclass
    class Config:
        inner: Inner

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = Config(Inner())

        def forward(self, x):
            return x * self.config.inner.scale

    model = Net()
    yield model, X()
    model.config.inner.scale = 3.0
    yield X()
    model.config.inner = Inner(4.0)
    yield X()


@program("modules")
def object_with_slots():
    class Slotted:
        __slots__ = ("scale",)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.box = Slotted()
            self.box.scale = 2.0

        def forward(self, x):
            return x * self.box.scale

    model = Net()
    yield model, X()
    model.box.scale = 3.0
    yield X()


@program("modules")
def static_and_class_methods():
    class Net(nn.Module):
        @staticmethod
        def up(x):
            return x + 1

        @classmethod
        def twice(cls, x):
            return cls.up(cls.up(x))

        def forward(self, x):
            return self.twice(x)

    yield Net(), X()
    Net.up = staticmethod(lambda x: x + 5)
    yield X()


@program("modules")
def getattr_that_computes():
    class Net(nn.Module):
        level = 2.0

        def __getattr__(self, name):
            if name == "gain":
                return type(self).level
            return super().__getattr__(name)

        def forward(self, x):
            return x * self.gain

    yield Net(), X()
    Net.level = 3.0
    yield X()


@program("modules")
def load_state_dict_between_calls():
    model = nn.Linear(4, 4)
    yield model, X()
    model.load_state_dict({k: torch.ones_like(v) for k, v in model.state_dict().items()})
    yield X()


# ---- plain objects ----


@program("classes")
def attribute_of_a_plain_object():
    box = types.SimpleNamespace(scale=2.0)
    yield lambda x: x * box.scale, X()
    box.scale = 3.0
    yield X()


@program("classes")
def class_attribute_of_a_plain_object():
    class Box:
        scale = 2.0

    box = Box()
    yield lambda x: x * box.scale, X()
    Box.scale = 3.0
    yield X()


@program("classes")
def class_that_counts():
    class Scope:
        entered = 0

        def __enter__(self):
            Scope.entered += 1
            return Scope.entered

        def __exit__(self, *error):
            return False

    def f(x):
        with Scope() as k:
            return x * k

    yield f, X()
    yield X()
    Scope.entered = 10
    yield X()


@program("classes")
def class_used_as_a_namespace():
    class Names:
        scale = 2.0

    yield lambda x: x * Names.scale, X()
    Names.scale = 3.0
    yield X()


@program("classes")
def method_of_a_plain_object_is_patched():
    class Box:
        def scale(self, x):
            return x * 2

    box = Box()
    yield lambda x: box.scale(x), X()
    Box.scale = lambda self, x: x * 3
    yield X()


@program("classes")
def callable_object_with_state():
    class Scale:
        def __init__(self):
            self.by = 2.0

        def __call__(self, x):
            return x * self.by

    scale = Scale()
    yield scale, X()
    scale.by = 3.0
    yield X()


@program("classes")
def operator_method_of_a_class_is_patched():
    class Wrap:
        def __init__(self, v):
            self.v = v

        def __mul__(self, x):
            return x * self.v

    w = Wrap(2.0)
    yield lambda x: w * x, X()
    Wrap.__mul__ = lambda self, x: x * self.v * 10
    yield X()


@program("classes")
def named_tuple_argument():
    Pair = collections.namedtuple("Pair", "a b")
    yield lambda p: p.a * p.b, Pair(X(), 2.0)
    yield Pair(X(), 3.0)


# ---- containers ----


@program("containers")
def list_element():
    values = [1.0, 2.0]
    yield lambda x: x * values[1], X()
    values[1] = 3.0
    yield X()


@program("containers")
def list_length():
    values = [1.0, 2.0]
    yield lambda x: x * sum(values), X()
    values.append(3.0)
    yield X()
    values.pop()
    yield X()


@program("containers")
def nested_list_element():
    values = [[1.0], [2.0, [5.0]]]
    yield lambda x: x * values[1][1][0], X()
    values[1][1][0] = 3.0
    yield X()


@program("containers")
def set_membership():
    names = {"a"}
    yield lambda x: x + 1 if "b" in names else x - 1, X()
    names.add("b")
    yield X()


@program("containers")
def dictionary_order():
    table = {"a": 1.0, "b": 2.0}
    yield lambda x: x * next(iter(table.values())), X()
    table["a"] = table.pop("a")
    yield X()


@program("containers")
def ordered_dictionary_is_moved_to_end():
    table = collections.OrderedDict(a=1.0, b=2.0)
    yield lambda x: x * next(iter(table.values())), X()
    table.move_to_end("a")
    yield X()


@program("containers")
def deque_element():
    values = collections.deque([1.0, 2.0])
    yield lambda x: x * values[0], X()
    values.appendleft(4.0)
    yield X()


@program("containers")
def default_dict_grows():
    table = collections.defaultdict(float, a=1.0)
    yield lambda x: x * table["a"] + len(table), X()
    table["b"] = 2.0
    yield X()


@program("containers")
def list_of_tensors():
    tensors = [torch.ones(4), torch.full((4,), 2.0)]
    yield lambda x: x * tensors[0] + tensors[1], X()
    tensors[0] = torch.full((4,), 3.0)
    yield X()
    tensors.reverse()
    yield X()


@program("containers")
def appended_by_the_function():
    seen = []

    def f(x):
        seen.append(len(seen))
        return x * len(seen)

    yield f, X()
    yield X()
    yield X()


@program("containers")
def dictionary_argument_is_written():
    def f(table):
        table["out"] = table["x"] * 2
        return table["out"]

    table = {"x": X()}
    yield f, table
    yield {"x": X() + 1}


@program("containers")
def numpy_array_contents():
    import numpy as np

    array = np.array([1.0, 2.0])
    yield lambda x: x * float(array[0]), X()
    array[0] = 5.0
    yield X()


@program("containers")
def bytearray_contents():
    data = bytearray(b"\x01")
    yield lambda x: x * data[0], X()
    data[0] = 3
    yield X()
