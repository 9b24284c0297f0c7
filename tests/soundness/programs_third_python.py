"""Globals, closures, containers, classes and methods that change between calls."""

from __future__ import annotations

import abc
import collections
import contextlib
import copy
import dataclasses
import enum
import functools
import types
from collections import OrderedDict, defaultdict, deque, namedtuple

import torch
from torch import nn

from tests.soundness.harness import Seen, program

GLOBALS = "third: globals and closures"
CONTAINERS = "third: containers"
CLASSES = "third: classes"

X = torch.linspace(-2, 2, 12).reshape(3, 4)
SCALE = 2.0
MODE = "relu"
TABLE = {"relu": torch.relu, "tanh": torch.tanh}
STEP = 0
LAST = None
WEIGHT = torch.eye(4)


@contextlib.contextmanager
def restored(*names):
    old = {n: globals()[n] for n in names}
    copies = {n: copy.copy(v) if isinstance(v, dict | list) else v for n, v in old.items()}
    try:
        yield
    finally:
        globals().update(copies)


@program(GLOBALS)
def a_global_number_rebound():
    global SCALE
    with restored("SCALE"):
        yield lambda v: v * SCALE, X
        SCALE = 3.0
        yield X
        SCALE = 3
        yield X.long()
        SCALE = torch.tensor(4.0)
        yield X
        SCALE = True
        yield X


@program(GLOBALS)
def a_global_table_of_functions():
    global MODE
    with restored("MODE", "TABLE"):

        def f(v):
            return TABLE[MODE](v) + len(TABLE)

        yield f, X
        MODE = "tanh"
        yield X
        TABLE["tanh"] = torch.sigmoid
        yield X
        TABLE["more"] = None
        yield X
        del TABLE["tanh"]
        yield X


@program(GLOBALS)
def a_global_step_incremented_inside():
    global STEP
    with restored("STEP"):
        STEP = 0

        def f(v):
            global STEP
            STEP += 1
            return v * STEP

        yield f, X
        yield X
        yield Seen(step=STEP)
        STEP = 10
        yield X
        yield Seen(step=STEP)


@program(GLOBALS)
def a_global_that_keeps_the_last_result():
    global LAST
    with restored("LAST"):
        LAST = None

        def f(v):
            global LAST
            out = v.cos() if LAST is None else v + LAST
            LAST = out
            return out

        yield f, X
        yield X
        LAST.zero_()
        yield X
        yield Seen(last=LAST)
        LAST = None
        yield X


@program(GLOBALS)
def a_global_weight_written_in_place_and_rebound():
    global WEIGHT
    with restored("WEIGHT"):
        WEIGHT = torch.eye(4)
        yield lambda v: v @ WEIGHT, X
        WEIGHT[0, 1] = 5
        yield X
        WEIGHT = torch.eye(4).requires_grad_()
        out = yield X
        out.sum().backward()
        yield Seen(w=WEIGHT)
        WEIGHT = torch.ones(4, 2)
        yield X


@program(GLOBALS)
def a_closure_counter_with_nonlocal():
    count = 0
    total = torch.zeros(3, 4)

    def f(v):
        nonlocal count, total
        count += 1
        total = total + v
        return total / count

    yield f, X
    yield X + 1
    yield Seen(count=count, total=total)
    count = 0
    total = torch.zeros(3, 4)
    yield X


@program(GLOBALS)
def closures_made_in_a_loop_share_the_last_value():
    fs = []
    for k in range(3):
        fs.append(lambda v: v * k)

    def f(v):
        return [g(v) for g in fs]

    yield f, X
    k = 7
    yield X
    fs.append(lambda v, k=k: v - k)
    k = 1
    yield X
    fs.clear()
    yield X


@program(GLOBALS)
def defaults_of_a_helper_changed():
    def helper(v, scale=2.0, *, shift=1.0):
        return v * scale + shift

    def f(v):
        return helper(v)

    yield f, X
    helper.__defaults__ = (5.0,)
    yield X
    helper.__kwdefaults__ = {"shift": -1.0}
    yield X
    helper.__code__ = (lambda v, scale=2.0, *, shift=1.0: v - scale - shift).__code__
    yield X


@program(GLOBALS)
def a_mutable_default_argument_as_memory():
    def f(v, seen=[]):  # noqa: B006
        seen.append(v.sum())
        return torch.stack(seen)

    yield f, X
    yield X + 1
    yield X + 2
    f.__defaults__[0].clear()
    yield X


@program(GLOBALS)
def attributes_of_a_function():
    def f(v):
        f.calls += 1
        return v * f.scale

    f.calls, f.scale = 0, 2.0
    yield f, X
    f.scale = -1.0
    yield X
    yield Seen(calls=f.calls)
    f.scale = X
    yield X
    yield Seen(calls=f.calls)


@program(GLOBALS)
def a_function_of_a_module_object_replaced():
    lib = types.ModuleType("lib")
    lib.act = torch.relu
    lib.eps = 0.5

    def f(v):
        return lib.act(v) + getattr(lib, "eps", 0.0) + (1 if hasattr(lib, "extra") else 0)

    yield f, X
    lib.act = torch.tanh
    yield X
    lib.extra = None
    yield X
    del lib.eps
    yield X


@program(GLOBALS)
def a_torch_function_patched():
    old = torch.nn.functional.relu

    def f(v):
        return torch.nn.functional.relu(v)

    try:
        yield f, X
        torch.nn.functional.relu = lambda v: v * 100
        yield X
    finally:
        torch.nn.functional.relu = old
    yield X


@program(GLOBALS)
def a_torch_function_patched_with_a_closure():
    old, k = torch.nn.functional.relu, 2.0
    torch.nn.functional.relu = lambda v: v * k
    try:
        yield lambda v: torch.nn.functional.relu(v), X
        k = 3.0
        yield X
    finally:
        torch.nn.functional.relu = old
    yield X


@program(GLOBALS)
def an_optional_setting_of_a_module_object():
    config = types.ModuleType("config")
    yield lambda v: v * getattr(config, "scale", 1.0) + hasattr(config, "shift"), X
    config.scale = 2.0
    yield X
    config.shift = None
    yield X
    config.scale = 3.0
    yield X


@program(GLOBALS)
def a_bound_method_of_a_list_in_a_closure():
    kept = []
    keep = kept.append

    def f(v):
        keep(v.sum())
        return v * len(kept)

    yield f, X
    yield X + 1
    yield Seen(kept=kept)
    kept.clear()
    yield X
    yield Seen(kept=kept)


# Containers.


@program(CONTAINERS)
def a_dict_argument_with_its_keys_in_another_order():
    def f(d):
        out = 0
        for i, v in enumerate(d.values()):
            out = out * 2 + v * (i + 1)
        return out, list(d), next(iter(d))

    yield f, {"a": X, "b": X + 1}
    yield {"b": X + 1, "a": X}
    yield {"a": X, "b": X + 1, "c": X}
    yield {"a": X}
    yield {}


@program(CONTAINERS)
def a_list_argument_that_is_appended_to():
    def f(items, v):
        items.append(v * 2)
        items[0] = items[0] + 1
        return sum(items)

    items = [X]
    yield f, items, X
    yield Seen(items=items)
    yield items, X
    yield Seen(items=items)
    items.clear()
    yield items, X
    yield Seen(items=items)
    yield [1.0], X


@program(CONTAINERS)
def the_same_tensor_twice_in_a_list():
    def f(items):
        items[0].add_(1)
        return items[0] + items[1], items[0] is items[1]

    a, b = X.clone(), X.clone()
    yield f, [a, b]
    yield [a, a]
    yield Seen(a=a, b=b)
    yield [a, a.view(3, 4)]
    yield Seen(a=a, b=b)
    yield [a, b]


@program(CONTAINERS)
def a_deque_with_maxlen_as_history():
    history = deque(maxlen=2)

    def f(v):
        history.append(v.mean())
        return torch.stack(list(history)), len(history)

    yield f, X
    yield X + 1
    yield X + 2
    yield Seen(h=history)
    history.clear()
    yield X


@program(CONTAINERS)
def a_defaultdict_of_lists():
    groups = defaultdict(list)

    def f(name, v):
        groups[name].append(v)
        return torch.cat(groups[name]), sorted(groups)

    yield f, "a", X
    yield "a", X
    yield "b", X
    yield Seen(g=groups)
    groups.pop("a")
    yield "a", X


@program(CONTAINERS)
def a_set_of_names_that_chooses():
    frozen = {"a"}

    def f(d):
        return {k: v.detach() if k in frozen else v * 2 for k, v in d.items()}

    w = X.clone().requires_grad_()
    yield f, {"a": w, "b": w}
    frozen.add("b")
    yield {"a": w, "b": w}
    frozen.discard("a")
    out = yield {"a": w, "b": w}
    out["a"].sum().backward()
    yield Seen(w=w)
    frozen |= {"c"}
    yield {"c": w}


@program(CONTAINERS)
def an_ordered_dict_moved_to_the_end():
    od = OrderedDict(a=X, b=X + 1, c=X + 2)

    def f(v):
        first, *_ = od.values()
        return first * v, list(od)

    yield f, X
    od.move_to_end("a")
    yield X
    od["b"] = X * 0
    yield X
    od.popitem(last=False)
    yield X


@program(CONTAINERS)
def a_named_tuple_in_and_out():
    Pair = namedtuple("Pair", "x scale")

    def f(p):
        return p._replace(x=p.x * p.scale), type(p).__name__, p.index(p.scale) if isinstance(p.x, int) else -1

    yield f, Pair(X, 2.0)
    yield (Pair(X, 3),)
    yield (Pair(X, X),)
    yield (Pair(X, None),)
    yield ((X, 1),)


@program(CONTAINERS)
def a_dataclass_argument_that_is_changed():
    @dataclasses.dataclass
    class Batch:
        x: torch.Tensor
        mask: torch.Tensor | None = None
        scale: float = 1.0
        log: list = dataclasses.field(default_factory=list)

    def f(b):
        out = b.x * b.scale
        if b.mask is not None:
            out = out.masked_fill(b.mask, 0)
        b.log.append(out.shape[0])
        b.x = out
        return dataclasses.replace(b, scale=b.scale + 1)

    b = Batch(X)
    yield f, b
    yield Seen(b=b)
    b.mask = X > 0
    b.scale = 2.0
    yield b
    yield Seen(b=b)
    b.mask = None
    yield b
    yield Seen(b=b)
    yield Batch(X, X < 0, 3)


@program(CONTAINERS)
def a_frozen_dataclass_as_key():
    @dataclasses.dataclass(frozen=True)
    class Key:
        name: str
        n: int

    table = {Key("a", 1): 2.0, Key("a", 2): 3.0}

    def f(k, v):
        return v * table.get(k, -1.0)

    yield f, Key("a", 1), X
    yield Key("a", 2), X
    yield Key("b", 1), X
    table[Key("b", 1)] = 10.0
    yield Key("b", 1), X


@program(CONTAINERS)
def nested_containers_of_arguments():
    def f(batch):
        (a, b), rest = batch["pair"], batch["rest"]
        total = a + b
        for item in rest:
            total = total + (item["v"] if isinstance(item, dict) else sum(item) if isinstance(item, list) else item)
        return {"out": [total, (total * 2,)], "n": len(rest)}

    yield f, {"pair": (X, X), "rest": [{"v": X}, [X, 1.0], 3]}
    yield {"pair": (X, X + 1), "rest": [[X, 2.0], {"v": X}, 3]}
    yield {"pair": [X, 1], "rest": ()}
    yield {"pair": (X, X), "rest": [{"v": 2}, [1, 1.0], True]}


@program(CONTAINERS)
def lists_sorted_and_reversed_in_place():
    names = ["b", "a", "c"]
    weights = {"a": 1.0, "b": 2.0, "c": 3.0}

    def f(v):
        names.sort(key=weights.__getitem__, reverse=v.shape[0] > 3)
        out = v
        for n in names:
            out = out * 0.5 + weights[n]
        return out

    yield f, X
    yield Seen(n=names)
    yield torch.cat([X, X])
    yield Seen(n=names)
    weights["a"] = 10.0
    yield X
    yield Seen(n=names)
    names.insert(0, "a")
    yield X


@program(CONTAINERS)
def slices_assigned_and_deleted():
    stack = [X, X + 1, X + 2, X + 3]

    def f(v):
        stack[1:3] = [v]
        del stack[0]
        return torch.stack(stack).sum(0), len(stack)

    yield f, X
    yield Seen(s=stack)
    yield X
    yield Seen(s=stack)
    stack[:] = [X] * 3
    yield X
    yield Seen(s=stack)
    stack.clear()
    yield X


@program(CONTAINERS)
def a_counter_and_a_chain_map():
    counts = collections.Counter()
    settings = collections.ChainMap({}, {"scale": 2.0})

    def f(name, v):
        counts[name] += 1
        return v * settings["scale"] + counts.most_common(1)[0][1]

    yield f, "a", X
    settings["scale"] = 5.0
    yield "b", X
    del settings["scale"]
    yield "b", X
    counts.subtract({"b": 5})
    yield "a", X
    yield Seen(c=dict(counts))


@program(CONTAINERS)
def dict_methods_that_write():
    cache = {}

    def f(k, v):
        out = cache.setdefault(k, v * 2)
        cache.update(last=v)
        return out + cache["last"], cache.pop("gone", None)

    yield f, "a", X
    yield "a", X + 1
    cache["gone"] = X
    yield "b", X + 2
    yield Seen(c=cache)
    cache.clear()
    yield "a", X


# Classes.


@program(CLASSES)
def a_property_with_a_setter():
    class Layer:
        def __init__(self):
            self._scale = 2.0
            self.sets = 0

        @property
        def scale(self):
            return self._scale * 2

        @scale.setter
        def scale(self, value):
            self.sets += 1
            self._scale = value

        def __call__(self, v):
            self.scale = self._scale + 1
            return v * self.scale

    layer = Layer()
    yield layer, X
    yield X
    layer._scale = 0.0
    yield X
    yield Seen(layer=layer)
    Layer.scale = property(lambda self: 7.0, lambda self, v: None)
    yield X
    yield Seen(layer=layer)


@program(CLASSES)
def a_descriptor_that_counts_reads():
    class Counted:
        def __init__(self, value):
            self.value, self.reads = value, 0

        def __get__(self, obj, owner=None):
            self.reads += 1
            return self.value + self.reads

    descriptor = Counted(1.0)

    class Layer:
        scale = descriptor

        def __call__(self, v):
            return v * self.scale

    layer = Layer()
    yield layer, X
    yield X
    yield Seen(reads=descriptor.reads)
    descriptor.value = 10.0
    yield X
    layer.__dict__["scale"] = -1.0
    yield X
    yield Seen(reads=descriptor.reads)


@program(CLASSES)
def getattr_forwarding_to_a_config():
    class Config:
        def __init__(self, values):
            self.__dict__["values"] = values

        def __getattr__(self, name):
            try:
                return self.values[name]
            except KeyError:
                raise AttributeError(name) from None

    values = {"scale": 2.0}
    config = Config(values)

    def f(v):
        return v * config.scale + getattr(config, "shift", 0.0)

    yield f, X
    values["scale"] = 3.0
    yield X
    values["shift"] = 1.0
    yield X
    config.__dict__["scale"] = -1.0
    yield X
    del values["shift"]
    yield X


@program(CLASSES)
def a_method_overridden_then_a_base_changed():
    class Base:
        def act(self, v):
            return v.relu()

        def __call__(self, v):
            return self.act(v) + 1

    class Child(Base):
        def act(self, v):
            return super().act(v) * 2

    child = Child()
    yield child, X
    Base.act = lambda self, v: v.tanh()
    yield X
    child.act = lambda v: v
    yield X
    del child.act
    del Child.act
    yield X


@program(CLASSES)
def the_class_of_an_object_changed():
    class A:
        k = 1.0

        def go(self, v):
            return v * self.k

    class B(A):
        k = 2.0

        def go(self, v):
            return v + self.k

    obj = A()

    def f(v):
        return obj.go(v)

    yield f, X
    obj.__class__ = B
    yield X
    B.k = 5.0
    yield X
    A.k = 7.0
    del B.k
    yield X
    B.__bases__ = (type("C", (A,), {"k": 9.0}),)
    yield X


@program(CLASSES)
def partials_with_their_keywords_changed():
    def helper(v, scale, shift=0.0):
        return v * scale + shift

    args = {"scale": 2.0}
    p = functools.partial(helper, **args)

    def f(v):
        return p(v)

    yield f, X
    p.keywords["scale"] = 3.0
    yield X
    p = functools.partial(helper, scale=1.0, shift=X)
    yield X
    yield X


@program(CLASSES)
def a_cached_property_deleted():
    class Layer:
        def __init__(self, n):
            self.n = n
            self.made = 0

        @functools.cached_property
        def table(self):
            self.made += 1
            return torch.arange(float(self.n))

        def __call__(self, v):
            return v + self.table

    layer = Layer(4)
    yield layer, X
    yield X
    layer.n = 1
    yield X
    del layer.table
    yield X
    yield Seen(layer=layer)
    layer.table = torch.ones(4)
    yield X


@program(CLASSES)
def an_lru_cache_of_masks():
    made = []

    @functools.lru_cache(maxsize=2)
    def mask(n):
        made.append(n)
        return torch.ones(n, n).tril()

    def f(v):
        return mask(v.shape[-1]) @ v.mT

    yield f, X
    yield X
    mask(4).zero_()
    yield X
    yield Seen(made=made)
    mask.cache_clear()
    yield X
    yield Seen(made=made)
    yield X.reshape(4, 3)
    yield Seen(made=made)


@program(CLASSES)
def single_dispatch_with_a_later_registration():
    @functools.singledispatch
    def scale(v):
        return 0

    @scale.register
    def _(v: torch.Tensor):
        return v * 2

    @scale.register
    def _(v: list):
        return [scale(i) for i in v]

    yield scale, X
    yield [X, 3]
    scale.register(int, lambda v: v + 100)
    yield [X, 3]
    scale.register(torch.Tensor, lambda v: v - 1)
    yield X
    yield ((X,),)


@program(CLASSES)
def enums_that_choose():
    class Act(enum.Enum):
        RELU = "relu"
        TANH = "tanh"

        def __call__(self, v):
            return getattr(torch, self.value)(v)

    class Flag(enum.Flag):
        NONE = 0
        A = 1
        B = 2

    def f(act, flag, v):
        out = act(v)
        if flag & Flag.A:
            out = out + 1
        if Flag.B in flag:
            out = out * 2
        return out, act is Act.RELU, act.name

    yield f, Act.RELU, Flag.A, X
    yield Act.TANH, Flag.A, X
    yield Act.RELU, Flag.A | Flag.B, X
    yield Act("relu"), Flag.NONE, X


@program(CLASSES)
def an_abstract_class_with_registered_kinds():
    class Shape(abc.ABC):
        @abc.abstractmethod
        def area(self): ...

    class Square(Shape):
        def __init__(self, side):
            self.side = side

        def area(self):
            return self.side**2

    class Duck:
        def area(self):
            return torch.tensor(3.0)

    def f(s, v):
        return v * s.area() if isinstance(s, Shape) else v

    yield f, Square(2), X
    yield Square(X), X
    yield Duck(), X
    Shape.register(Duck)
    yield Duck(), X


@program(CLASSES)
def operators_of_a_class():
    class Vec:
        __slots__ = ("t", "unit")

        def __init__(self, t, unit=1.0):
            self.t, self.unit = t, unit

        def __add__(self, o):
            return Vec(self.t + o.t * (o.unit / self.unit), self.unit)

        def __rmul__(self, k):
            return Vec(self.t * k, self.unit)

        def __getitem__(self, i):
            return self.t[i]

        def __len__(self):
            return len(self.t)

        def __bool__(self):
            return self.unit > 0

        def __iadd__(self, o):
            self.t = self.t + o.t
            return self

        def __eq__(self, o):
            return self.unit == o.unit

        __hash__ = None

    def f(a, b):
        c = 2 * a + b
        a += b
        return c, c[0], len(a), bool(b), a == b

    a, b = Vec(X), Vec(X, 2.0)
    yield f, a, b
    yield Seen(a=a)
    yield a, b
    b.unit = -1.0
    yield a, b
    yield Seen(a=a)
    yield a, a
    yield Seen(a=a)


@program(CLASSES)
def class_attributes_as_shared_counters():
    class Block(nn.Module):
        calls = 0
        registry: dict = {}

        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, v):
            Block.calls += 1
            self.registry[self.name] = Block.calls
            return v * Block.calls

    model = nn.Sequential(Block("a"), Block("b"))
    yield model, X
    yield X
    yield Seen(c=Block.calls, r=Block.registry)
    model[0].calls = 100
    Block.calls = 0
    yield X
    yield Seen(c=Block.calls, r=Block.registry)


@program(CLASSES)
def class_methods_and_static_methods_replaced():
    class Ops:
        factor = 2.0

        @classmethod
        def scaled(cls, v):
            return v * cls.factor

        @staticmethod
        def shifted(v):
            return v + 1

    class More(Ops):
        factor = 3.0

    def f(v):
        return More.scaled(v), Ops.scaled(v), More.shifted(v)

    yield f, X
    More.factor = 4.0
    yield X
    Ops.shifted = staticmethod(lambda v: v - 1)
    yield X
    Ops.scaled = classmethod(lambda cls, v: v * cls.factor * 10)
    yield X


@program(CLASSES)
def a_context_manager_class_with_state():
    class Scope:
        depth = 0

        def __init__(self, log):
            self.log = log

        def __enter__(self):
            Scope.depth += 1
            return self

        def __exit__(self, kind, error, tb):
            Scope.depth -= 1
            self.log.append(kind.__name__ if kind else None)
            return kind is ValueError

    log = []

    def f(v, fail):
        out = v
        with Scope(log) as s, Scope(s.log):
            out = out * Scope.depth
            if fail:
                raise ValueError("stop")
            out = out + 1
        return out

    yield f, X, False
    yield X, True
    yield Seen(log=log, d=Scope.depth)
    Scope.depth = 3
    yield X, False
    yield Seen(log=log, d=Scope.depth)
