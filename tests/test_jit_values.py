"""What may go into a compiled callable and come out of it: values, containers, and their identity."""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import thunder
from tests.jit_checks import (  # noqa: F401
    assert_call_same,
    assert_same,
    assert_served,
    check,
    no_grad,
    nothing_leaks,
)


def t(*shape: int) -> torch.Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape) / 7 - 1


class Point(NamedTuple):
    x: torch.Tensor
    y: Any


OldPoint = collections.namedtuple("OldPoint", ["a", "b"])


@dataclasses.dataclass
class Data:
    value: torch.Tensor
    scale: float = 2.0
    more: Any = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    value: torch.Tensor
    name: str = "n"


@dataclasses.dataclass
class Slotted:
    __slots__ = ("scale", "value")
    value: Any
    scale: float


class Color(enum.Enum):
    RED = 1
    BLUE = 2


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Bag:
    """A plain object that carries tensors."""

    def __init__(self, value: Any, scale: float) -> None:
        self.value, self.scale = value, scale


# ---- ways to pass arguments ----


def test_positional_arguments():
    check(lambda a, b: a - 2 * b, t(3), t(3) + 1)


def test_keyword_arguments_in_any_order():
    def f(a, b, *, c):
        return a - b * c

    compiled = thunder.jit(f)
    x, y, z = t(3), t(3) + 1, t(3) + 2
    assert_call_same(compiled, f, a=x, b=y, c=z)
    assert_call_same(compiled, f, c=z, b=y, a=x)
    assert_call_same(compiled, f, x, c=z, b=y)


def test_defaults_are_used_and_overridden():
    def f(a, b=3.0, *, c=None, d=t(3)):
        return a * b + d if c is None else a * b - c

    compiled = thunder.jit(f)
    assert_call_same(compiled, f, t(3))
    assert_call_same(compiled, f, t(3), 4.0)
    assert_call_same(compiled, f, t(3), c=2)
    assert_call_same(compiled, f, t(3), d=t(3) + 5)


def test_star_args_and_kwargs():
    def f(first, *rest, flag=False, **named):
        total = first
        for item in rest:
            total = total + item
        for key in sorted(named):
            total = total * named[key]
        return total if flag else -total

    compiled = thunder.jit(f)
    assert_call_same(compiled, f, t(3))
    assert_call_same(compiled, f, t(3), t(3), 2.5, flag=True)
    assert_call_same(compiled, f, t(3), z=t(3), y=2)
    assert_call_same(compiled, f, t(3), z=t(3), x=2)


def test_no_arguments_at_all():
    check(lambda: torch.ones(3) * 2)


# ---- containers in and out ----

NESTED = {
    "tuple": lambda: (t(2), (t(3), 1)),
    "list": lambda: [t(2), [t(3), 1.5], []],
    "dict": lambda: {"b": t(2), "a": {"c": t(3)}, 3: t(1), (1, 2): t(4)},
    "ordered dict": lambda: collections.OrderedDict([("z", t(2)), ("a", t(3))]),
    "default dict": lambda: collections.defaultdict(list, {"x": t(2), "y": [t(3)]}),
    "named tuple": lambda: Point(t(2), {"k": t(3)}),
    "old named tuple": lambda: OldPoint(t(2), OldPoint(t(3), 4)),
    "dataclass": lambda: Data(t(2), 3.0, [t(3)]),
    "frozen dataclass": lambda: Frozen(t(2)),
    "object": lambda: Bag(t(2), 4.0),
    "mixed": lambda: [Point(t(2), [Data(t(3))]), {"a": (None, True, "s", 2)}],
    "empty": lambda: [(), [], {}, None],
}


def scale_up(value: Any) -> Any:
    """The same structure with each tensor doubled."""
    if isinstance(value, torch.Tensor):
        return value * 2
    if isinstance(value, tuple):
        items = [scale_up(v) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [scale_up(v) for v in value]
    if isinstance(value, collections.defaultdict):
        return collections.defaultdict(value.default_factory, {k: scale_up(v) for k, v in value.items()})
    if isinstance(value, dict):
        return type(value)((k, scale_up(v)) for k, v in value.items())
    if dataclasses.is_dataclass(value):
        return dataclasses.replace(
            value, **{f.name: scale_up(getattr(value, f.name)) for f in dataclasses.fields(value)}
        )
    if isinstance(value, Bag):
        return Bag(scale_up(value.value), value.scale)
    return value


@pytest.mark.parametrize("kind", NESTED)
def test_container_goes_in_and_comes_out(kind):
    check(scale_up, NESTED[kind]())


@pytest.mark.parametrize("kind", NESTED)
def test_container_passes_through_unread(kind):
    check(lambda box, x: (x + 1, box), NESTED[kind](), t(2))


def test_dict_order_of_result_is_eagers():
    out = check(lambda x: {"z": x, "a": x + 1, "m": x + 2}, t(2))(t(2))
    assert list(out) == ["z", "a", "m"]


def test_ordered_dict_keeps_the_order_that_it_was_given():
    f = lambda d: [d[k] * n for n, k in enumerate(d)]  # noqa: E731
    compiled = thunder.jit(f)
    for key in ("a", "b", "c"):
        d = collections.OrderedDict(a=t(2), b=t(2) + 1, c=t(2) + 2)
        d.move_to_end(key)
        assert_call_same(compiled, f, d)


class Name(str):
    pass


class Items(list):
    pass


def test_subclasses_of_builtin_types_count_with_their_contents():
    f = lambda x, v: (x + 1, f"{v!r}")  # noqa: E731
    compiled = thunder.jit(f)
    for value in (Name("a"), Name("b"), Items([1]), Items([2]), Items([1, 2])):
        assert_call_same(compiled, f, t(2), value)
    check(lambda box: Items(v * 2 for v in box), Items([t(2), t(3)]))


def test_partial_as_argument():
    f = lambda x, g: g(x)  # noqa: E731
    compiled = thunder.jit(f)
    for n in (2, 3, 2):
        assert_same(t(2) ** n, compiled(t(2), functools.partial(torch.pow, exponent=n)))


def test_default_dict_keeps_its_factory():
    def f(x):
        d = collections.defaultdict(list)
        d["a"].append(x + 1)
        return d

    out = check(f, t(2))(t(2))
    assert type(out) is collections.defaultdict
    assert out.default_factory is list
    assert out["new"] == []


def test_default_dict_argument_keeps_its_factory_inside():
    def f(d, x):
        e = collections.defaultdict(d.default_factory)
        e["a"].append(x * 2)
        return e

    check(f, collections.defaultdict(list), t(2))


def test_another_key_order_is_another_program():
    f = lambda d: list(d.values())[0] * 2  # noqa: E731, RUF015
    compiled = thunder.jit(f)
    assert_call_same(compiled, f, {"a": t(2), "b": t(3)})
    assert_call_same(compiled, f, {"b": t(3), "a": t(2)})


def test_model_output_in_and_out():
    outputs = pytest.importorskip("transformers.modeling_outputs")

    def f(out):
        hidden = out.last_hidden_state * 2
        return outputs.BaseModelOutput(last_hidden_state=hidden, hidden_states=(hidden, hidden + 1))

    compiled = check(f, outputs.BaseModelOutput(last_hidden_state=t(2, 3)))
    out = compiled(outputs.BaseModelOutput(last_hidden_state=t(2, 3)))
    assert type(out) is outputs.BaseModelOutput
    assert list(out.keys()) == ["last_hidden_state", "hidden_states"]
    assert out[0] is out.last_hidden_state is out["last_hidden_state"]
    assert out.attentions is None


def test_structseq_results_of_torch():
    check(lambda x: torch.max(x, dim=1), t(3, 4))
    check(lambda x: torch.sort(x, descending=True), t(3, 4))


def test_long_argument_lists():
    check(lambda *xs: sum(xs), *[t(2) + i for i in range(40)])
    check(lambda xs: torch.cat(xs), [t(2) + i for i in range(100)])


def test_deep_nesting_is_refused_clearly_and_other_calls_work():
    def f(x):
        while isinstance(x, list):
            x = x[0]
        return x + 1

    compiled = thunder.jit(f)
    deep: Any = t(2)
    for _ in range(40):
        deep = [deep]
    with pytest.raises(ValueError, match="nested more than"):
        compiled(deep)
    assert_call_same(compiled, f, [[t(2)]])


def test_container_that_contains_itself():
    def f(box):
        assert box["self"] is box
        out = {"x": box["x"] * 2}
        out["self"] = out
        return out

    compiled = thunder.jit(f)
    for step in range(3):
        box: dict = {"x": t(2) + step}
        box["self"] = box
        out = compiled(box)
        assert torch.equal(out["x"], (t(2) + step) * 2)
        assert out["self"] is out


def test_same_list_twice_in_the_arguments():
    f = lambda a, b: (a[0] + b[0], a is b)  # noqa: E731
    compiled = thunder.jit(f)
    box = [t(2)]
    for a, b in ((box, box), (box, [t(2)]), (box, box)):
        assert_same(f(a, b), compiled(a, b))


# ---- plain values ----

PLAIN = {
    "int": 3,
    "bool": True,
    "float": 0.5,
    "inf": math.inf,
    "complex": 2 + 1j,
    "none": None,
    "string": "text",
    "bytes": b"raw",
    "big int": 2**70,
    "range": range(2, 9, 3),
    "slice": slice(1, None, 2),
    "ellipsis": ...,
    "dtype": torch.float64,
    "device": torch.device("cpu"),
    "memory format": torch.channels_last,
    "layout": torch.strided,
    "size": torch.Size([2, 3]),
    "enum": Color.RED,
    "int enum": Level.HIGH,
    "set": {1, 2, "a"},
    "frozenset": frozenset({1, 2}),
    "type": int,
    "function": math.sqrt,
    "numpy float": np.float32(1.5),
    "numpy int": np.int64(7),
    "numpy bool": np.bool_(True),
    "deque": collections.deque([1, 2, 3]),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_value_goes_in_and_comes_out(kind):
    value = PLAIN[kind]
    out = check(lambda x, v: (x + 1, v, type(v).__name__), t(2), value)(t(2), value)
    assert type(out[1]) is type(value)
    assert out[1] == value


@pytest.mark.parametrize("kind", ["int", "bool", "float", "complex", "numpy float", "numpy int", "int enum"])
def test_number_is_used_in_arithmetic(kind):
    check(lambda x, v: x * v, t(2), PLAIN[kind])


CHANGES = {
    "int": (1, 2),
    "int to bool": (1, True),
    "int to float": (1, 1.0),
    "int to int enum": (1, Level.LOW),
    "float": (0.5, 0.25),
    "zero to minus zero": (0.0, -0.0),
    "number to nan": (1.0, math.nan),
    "complex": (1j, 2j),
    "string": ("a", "b"),
    "none to number": (None, 1),
    "big int": (2**70, 2**70 + 1),
    "dtype": (torch.float32, torch.float64),
    "size": (torch.Size([2]), torch.Size([3])),
    "size to tuple": (torch.Size([2]), (2,)),
    "slice": (slice(1, 2), slice(1, 3)),
    "enum": (Color.RED, Color.BLUE),
    "set": ({1}, {2}),
    "tuple to list": ((1, 2), [1, 2]),
    "longer list": ([1, 2], [1, 2, 3]),
    "range": (range(3), range(4)),
    "numpy scalar": (np.float32(1.5), np.float32(2.5)),
    "numpy kind": (np.float32(1.5), np.float64(1.5)),
    "function": (math.sin, math.cos),
    "dataclass field": (Data(t(2), 1.0), Data(t(2), 2.0)),
    "dict key": ({"a": 1}, {"b": 1}),
    "deque": (collections.deque([1]), collections.deque([2])),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_changed_value_is_another_program_and_the_first_is_kept(kind):
    def f(x, v):
        return x + 1, f"{v.scale}" if isinstance(v, Data) else repr(v)

    first, second = CHANGES[kind]
    compiled = thunder.jit(f)
    for value in (first, second, first, second):
        assert_same(f(t(2), value), compiled(t(2), value))
    stats = thunder.compile_stats(compiled)
    assert stats.cache_misses == 2


@pytest.mark.parametrize(("a", "b"), [(0.0, -0.0), (1.0, math.nan), (math.inf, -math.inf)])
def test_special_floats_keep_their_meaning(a, b):
    f = lambda x, v: (x * v, math.copysign(1.0, v))  # noqa: E731
    compiled = thunder.jit(f)
    for value in (a, b, a, b):
        expected, ours = f(t(3), value), compiled(t(3), value)
        assert expected[1] == ours[1]
        assert torch.equal(torch.signbit(expected[0]), torch.signbit(ours[0]))
        assert_same(expected, ours)
    assert_served(compiled, misses=2, hits=2)


def test_nan_argument_hits_the_cache():
    f = lambda x, v: x + v  # noqa: E731
    compiled = thunder.jit(f)
    for _ in range(3):
        assert_same(f(t(2), float("nan")), compiled(t(2), float("nan")))
    assert_served(compiled, misses=1, hits=2)


def test_many_changing_numbers_stay_right():
    f = lambda x, n: x * n  # noqa: E731
    compiled = thunder.jit(f)
    for n in [*range(100), *range(100)]:
        assert torch.equal(compiled(t(3), n), f(t(3), n))


def test_numpy_array_argument_is_refused_or_right_when_its_contents_change():
    def f(x, a):
        return x + torch.from_numpy(a)

    compiled = thunder.jit(f)
    a = np.array([1.0, 2.0], dtype=np.float32)
    for step in range(3):
        a[0] = step
        try:
            ours = compiled(t(2), a)
        except thunder.CaptureError as error:
            assert "numpy" in str(error)
            return
        assert_same(f(t(2), a), ours)


def test_numpy_array_in_closure_is_refused_or_right_when_its_contents_change():
    a = np.array([1.0, 2.0], dtype=np.float32)

    def f(x):
        return x + torch.from_numpy(a)

    compiled = thunder.jit(f)
    for step in range(3):
        a[0] = step
        try:
            ours = compiled(t(2))
        except thunder.CaptureError as error:
            assert "numpy" in str(error)
            return
        assert_same(f(t(2)), ours)


def test_slotted_dataclass_with_a_tensor_is_refused_or_right():
    f = lambda box: box.value * box.scale  # noqa: E731
    compiled = thunder.jit(f)
    for step in (1.0, 2.0):
        box = Slotted(t(2) + step, step)
        try:
            ours = compiled(box)
        except thunder.CaptureError as error:
            assert "Slotted" in str(error)
            return
        assert_same(f(box), ours)


def test_mutable_sequence_that_changes_in_place_is_another_program():
    f = lambda x, v: x * v[0]  # noqa: E731
    compiled = thunder.jit(f)
    for value in ([1.0], collections.deque([1.0]), bytearray(b"abc"), np.array([1.0, 2.0]), {0: 1.0}):
        assert_same(f(t(2), value), compiled(t(2), value))
        value[0] = 2
        assert_same(f(t(2), value), compiled(t(2), value))


def test_numpy_array_in_and_out():
    f = lambda x, a: (x + torch.as_tensor(a), a * 2, a)  # noqa: E731
    compiled = thunder.jit(f)
    for step in range(3):
        a = np.arange(2, dtype=np.float32) + step
        out = compiled(t(2), a)
        assert torch.equal(out[0], f(t(2), a)[0])
        assert np.array_equal(out[1], a * 2)
        assert out[2] is a


def test_numpy_array_made_inside_is_fresh_at_each_call():
    compiled = thunder.jit(lambda x: (x + 1, np.zeros(2)))
    compiled(t(2))[1][0] = 5
    assert compiled(t(2))[1][0] == 0


def test_mutable_object_whose_attribute_changes_is_another_program():
    f = lambda x, bag: x * bag.scale  # noqa: E731
    compiled = thunder.jit(f)
    bag = Bag("label", 2.0)
    assert_same(f(t(2), bag), compiled(t(2), bag))
    bag.scale = 3.0
    assert_same(f(t(2), bag), compiled(t(2), bag))
    assert_same(f(t(2), Bag("label", 3.0)), compiled(t(2), Bag("label", 3.0)))


# ---- tensors: kinds ----

TENSORS = {
    "zero dim": lambda: torch.tensor(2.5),
    "empty": lambda: torch.empty(0, 3),
    "transposed": lambda: t(3, 4).t(),
    "strided view": lambda: t(4, 6)[::2, 1::2],
    "offset view": lambda: t(10)[3:],
    "expanded": lambda: t(1, 3).expand(4, 3),
    "channels last": lambda: t(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "complex": lambda: torch.complex(t(3), t(3) + 1),
    "int64": lambda: torch.arange(5),
    "int8": lambda: torch.arange(5, dtype=torch.int8),
    "uint8": lambda: torch.arange(5, dtype=torch.uint8),
    "bool": lambda: torch.tensor([True, False, True]),
    "float16": lambda: t(3).half(),
    "bfloat16": lambda: t(3).bfloat16(),
    "float64": lambda: t(3).double(),
    "six dims": lambda: t(1, 2, 1, 3, 1, 2),
    "size one": lambda: t(1),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensor_of_each_kind(kind):
    check(lambda x: (x + x, x.clone(), x.reshape(-1), x * 2), TENSORS[kind]())


@pytest.mark.parametrize("kind", TENSORS)
def test_tensor_of_each_kind_returned_itself(kind):
    compiled = thunder.jit(lambda x: (x, x + 1))
    for _ in range(2):
        x = TENSORS[kind]()
        assert compiled(x)[0] is x


def test_every_kind_of_tensor_gets_its_own_program_and_all_stay_right():
    f = lambda x: (x + x, x.shape, x.stride(), x.dtype)  # noqa: E731
    compiled = thunder.jit(f)
    for _ in range(2):
        for make in TENSORS.values():
            assert_call_same(compiled, f, make())


def test_changed_shape_dtype_and_stride_recompile():
    f = lambda x: x.reshape(-1) * x.shape[0]  # noqa: E731
    compiled = thunder.jit(f)
    variants = [t(2, 3), t(3, 2), t(2, 3).double(), t(3, 2).t(), t(6), t(2, 3, 1)]
    for _ in range(2):
        for x in variants:
            assert_call_same(compiled, f, x)
    assert_served(compiled, misses=len(variants), hits=len(variants))


def test_changed_storage_offset_is_right():
    f = lambda x: (x + 1, x[1:])  # noqa: E731
    compiled = thunder.jit(f)
    for start in range(4):
        assert_call_same(compiled, f, t(10)[start : start + 3])


def refused_or_right(f, inputs, word):
    compiled = thunder.jit(f)
    for x in inputs:
        try:
            ours = compiled(x)
        except thunder.CaptureError as error:
            assert word in str(error)
            assert "What to do" in str(error)
            continue
        assert_same(f(x), ours)


def test_storage_offset_is_refused_or_right():
    refused_or_right(lambda x: x.storage_offset() + x, [t(10)[i : i + 3] for i in range(3)], "storage_offset")


def test_as_strided_of_an_input_with_another_offset():
    f = lambda x: x.as_strided((2,), (1,)) * 2  # noqa: E731
    compiled = thunder.jit(f)
    for start in range(3):
        assert_call_same(compiled, f, t(10)[start : start + 3])


# ---- identity ----


def test_same_tensor_twice_in_the_arguments():
    f = lambda a, b: (a + b, a is b)  # noqa: E731
    compiled = thunder.jit(f)
    x, y = t(3), t(3) * 2
    for a, b in ((x, x), (x, y), (y, y), (y, x)):
        assert_same(f(a, b), compiled(a, b))


def test_same_tensor_in_two_containers():
    f = lambda box, x: box["a"][0] + x  # noqa: E731
    compiled = thunder.jit(f)
    x = t(3)
    assert_same(f({"a": [x]}, x), compiled({"a": [x]}, x))
    assert_same(f({"a": [t(3)]}, x), compiled({"a": [t(3)]}, x))


def test_same_object_returned_twice_is_one_object():
    def f(x):
        y = x + 1
        return y, {"again": y}, [y]

    a, b, c = check(f, t(3))(t(3))
    assert a is b["again"] is c[0]


def test_same_list_returned_twice_is_one_object():
    def f(x):
        box = [x + 1]
        return box, box

    compiled = thunder.jit(f)
    for _ in range(2):
        a, b = compiled(t(3))
        assert a is b


def test_input_returned_is_the_callers_object():
    compiled = thunder.jit(lambda x, y: (x, {"y": y}, x + y))
    for _ in range(2):
        x, y = t(3), t(3)
        out = compiled(x, y)
        assert out[0] is x
        assert out[1]["y"] is y


@pytest.mark.parametrize("op", ["contiguous", "to_same", "float", "expand_same_type"])
def test_operation_that_returns_its_input_returns_the_callers_object(op):
    ops = {
        "contiguous": lambda x: x.contiguous(),
        "to_same": lambda x: x.to(torch.float32),
        "float": lambda x: x.float(),
        "expand_same_type": lambda x: x.type_as(x),
    }
    compiled = thunder.jit(ops[op])
    for _ in range(2):
        x = t(3)
        assert ops[op](x) is x
        assert compiled(x) is x


def test_input_container_returned_is_the_callers_object():
    compiled = thunder.jit(lambda box: (box, box["x"] + 1))
    for _ in range(2):
        box = {"x": t(3)}
        assert compiled(box)[0] is box


def test_parameter_returned_is_the_modules_object():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(t(3))
            self.register_buffer("table", t(2))

        def forward(self, x):
            return self.weight, self.table, x + self.weight

    net = Net()
    compiled = thunder.jit(net)
    for _ in range(2):
        out = compiled(t(3))
        assert out[0] is net.weight
        assert out[1] is net.table


def test_view_of_input_shares_its_storage():
    f = lambda x: (x[1:], x.t(), x.view(-1), x.unsqueeze(0), x[0])  # noqa: E731
    compiled = thunder.jit(f)
    for _ in range(2):
        x = t(3, 3)
        outs = compiled(x)
        assert_same(f(x), outs)
        for out, eager in zip(outs, f(x), strict=True):
            assert out.data_ptr() == eager.data_ptr()
            assert out.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        outs[0].fill_(5.0)
        assert bool((x[1:] == 5).all())


def test_views_of_one_intermediate_share_storage_in_the_result():
    def f(x):
        y = x * 2
        return y, y[1:], y.t()

    compiled = thunder.jit(f)
    for _ in range(2):
        a, b, c = compiled(t(3, 3))
        assert_same(f(t(3, 3)), (a, b, c))
        assert a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() == c.untyped_storage().data_ptr()


def test_results_of_two_calls_do_not_share_storage():
    compiled = thunder.jit(lambda x: (x * 2, torch.zeros(3), torch.tensor([1.0, 2.0]), torch.arange(3)))
    first, second = compiled(t(3)), compiled(t(3))
    for a, b in zip(first, second, strict=True):
        assert a is not b
        assert a.data_ptr() != b.data_ptr()
        a.fill_(9)
    assert_same((t(3) * 2, torch.zeros(3), torch.tensor([1.0, 2.0]), torch.arange(3)), second)
    assert_same((t(3) * 2, torch.zeros(3), torch.tensor([1.0, 2.0]), torch.arange(3)), compiled(t(3)))


def test_mutable_result_containers_are_fresh_at_each_call():
    compiled = thunder.jit(lambda x: {"list": [1, 2], "set": {1}, "dict": {}, "x": x + 1})
    first = compiled(t(2))
    first["list"].append(3)
    first["set"].add(2)
    first["dict"]["k"] = 1
    second = compiled(t(2))
    assert (second["list"], second["set"], second["dict"]) == ([1, 2], {1}, {})


def test_mutable_result_object_without_tensors_is_fresh_at_each_call():
    compiled = thunder.jit(lambda x: (x + 1, Bag(None, 1.0)))
    first = compiled(t(2))[1]
    first.scale = 5.0
    second = compiled(t(2))[1]
    assert second is not first
    assert second.scale == 1.0


def test_tied_weights_stay_one_tensor():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Linear(3, 3, bias=False)
            self.b = torch.nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x)), self.a.weight is self.b.weight

    net = Tied()
    compiled = thunder.jit(net)
    assert_same(net(t(2, 3)), compiled(t(2, 3)))
    net.a.weight.mul_(2)
    assert_same(net(t(2, 3)), compiled(t(2, 3)))
    net.b.weight = torch.nn.Parameter(t(3, 3))
    assert_same(net(t(2, 3)), compiled(t(2, 3)))


def test_result_that_is_no_tensor():
    for value in (None, 3, "s", (1, 2), torch.float32, torch.Size([1])):
        check(lambda x, v=value: v, t(2))


def test_shape_queries_are_plain_numbers():
    out = check(lambda x: (x.shape, x.size(0), x.numel(), x.dim(), x.stride(), len(x)), t(3, 4))(t(3, 4))
    assert type(out[0]) is torch.Size
    assert [type(v) for v in out[1:4]] == [int, int, int]


def test_nn_parameter_as_argument_keeps_its_type():
    f = lambda p: (p, p * 2, isinstance(p, torch.nn.Parameter))  # noqa: E731
    compiled = thunder.jit(f)
    p = torch.nn.Parameter(t(3), requires_grad=False)
    for _ in range(2):
        out = compiled(p)
        assert out[0] is p
        assert_same(f(p), out)


def test_module_as_argument():
    f = lambda m, x: m(x) * 2  # noqa: E731
    compiled = thunder.jit(f)
    net = torch.nn.Linear(3, 2)
    for _ in range(2):
        assert_same(f(net, t(4, 3)), compiled(net, t(4, 3)))
    other = torch.nn.Linear(3, 2)
    assert_same(f(other, t(4, 3)), compiled(other, t(4, 3)))


def test_module_as_argument_whose_parameter_is_replaced():
    f = lambda m, x: m(x) * 2  # noqa: E731
    compiled = thunder.jit(f)
    net = torch.nn.Linear(3, 2)
    assert_same(f(net, t(4, 3)), compiled(net, t(4, 3)))
    net.weight = torch.nn.Parameter(t(2, 3))
    assert_same(f(net, t(4, 3)), compiled(net, t(4, 3)))
