"""A region as the text of an nvFuser definition.

Values of 16 bits are computed with as float32 and rounded where they leave the region, as Inductor does. Sizes are
those of the region. Where a result is laid out otherwise than row by row the definition asks for that; nvFuser may
still choose, so the caller looks.

Each rule takes the writer and a node of the ATen graph and returns the name of a value (or several).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

TYPES = {
    torch.float16: "Half",
    torch.bfloat16: "BFloat16",
    torch.float32: "Float",
    torch.float64: "Double",
    torch.int32: "Int32",
    torch.int64: "Int",
    torch.bool: "Bool",
}
"""nvFuser's names of dtypes."""


class NoRule(Exception):
    """nvFuser, or this translation, lacks an operation."""


@dataclasses.dataclass(frozen=True)
class Definition:
    """What came of a region.

    Attributes:
        text: of a function ``definition(fd, DataType)``.
        strides: of the results.
    """

    text: str
    strides: tuple[tuple[int, ...], ...]


def define(graph: torch.fx.GraphModule) -> Definition:
    """The definition of a graph of ATen operations with fake values.

    Raises:
        NoRule: the graph has something that cannot be expressed.
    """
    writer = _Writer()
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            writer.input(node)
        elif node.op == "call_function":
            writer.call(node)
        elif node.op == "output":
            strides = tuple(writer.output(out) for out in node.args[0])
        else:
            raise NoRule(f"{node.op} {node.target}")
    return Definition("def definition(fd, DataType):\n" + "".join(f"    {x}\n" for x in writer.lines), strides)


def _inner(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _meta(node: Node) -> torch.Tensor:
    return node.meta["val"]


class _Writer:
    """Lines, and the name and dtype of every node's value."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.names: dict[Node, Any] = {}
        self.dtypes: dict[str, torch.dtype] = {}  # of names, as nvFuser has them
        self.ranks: dict[str, int] = {}
        self._scalars: dict[tuple[Any, str], str] = {}
        self._count = 0

    # -- lines --

    def new(self, expression: str, dtype: torch.dtype, rank: int) -> str:
        """A value of its own line."""
        name = f"t{self._count}"
        self._count += 1
        self.lines.append(f"{name} = {expression}")
        self.dtypes[name], self.ranks[name] = dtype, rank
        return name

    def op(self, name: str, *args: Any, dtype: torch.dtype, rank: int) -> str:
        """A call of ``fd.ops``; arguments are names or text."""
        return self.new(f"fd.ops.{name}({', '.join(map(str, args))})", dtype, rank)

    def number(self, value: Any, dtype: torch.dtype) -> str:
        """A constant."""
        kind = "Bool" if dtype == torch.bool else "Double" if dtype.is_floating_point else "Int"
        value = bool(value) if kind == "Bool" else float(value) if kind == "Double" else int(value)
        key = (repr(value), kind)
        if key not in self._scalars:
            text = f'float("{value}")' if isinstance(value, float) and not math.isfinite(value) else repr(value)
            name = self._scalars[key] = f"c{len(self._scalars)}"
            self.lines.append(f"{name} = fd.define_scalar({text}, dtype=DataType.{kind})")
            self.dtypes[name], self.ranks[name] = dtype, 0
        return self._scalars[key]

    def cast(self, name: str, dtype: torch.dtype) -> str:
        """The value in another dtype."""
        if self.dtypes[name] == dtype:
            return name
        return self.op("cast", name, f"dtype=DataType.{_type(dtype)}", dtype=dtype, rank=self.ranks[name])

    # -- the graph --

    def input(self, node: Node) -> None:
        """A tensor of the region."""
        fake = _meta(node)
        if not isinstance(fake, torch.Tensor):
            raise NoRule("an input that is no tensor")
        name = self.new(
            f"fd.define_tensor(sizes={list(fake.shape)}, strides={list(fake.stride())}, "
            f"dtype=DataType.{_type(fake.dtype)}, static_sizes=True, is_cpu=False)",
            fake.dtype,
            fake.ndim,
        )
        self.names[node] = self.cast(name, _inner(fake.dtype))

    def call(self, node: Node) -> None:
        """An operation."""
        rule = RULES.get(str(node.target))
        if rule is None:
            raise NoRule(f"nvFuser has no {node.target}")
        self.names[node] = rule(self, node)

    def output(self, node: Node) -> tuple[int, ...]:
        """A result; its strides."""
        fake = _meta(node)
        name = self.names[node]
        if self.ranks[name] != fake.ndim or name in self._scalars.values():
            raise NoRule("a result that is a constant")
        name = self.cast(name, fake.dtype)
        if not fake.is_contiguous():
            slowest = sorted(range(fake.ndim), key=lambda d: (-fake.stride(d), d))
            order = [fake.ndim - 1 - slowest.index(d) for d in range(fake.ndim)]  # 0: the fastest
            name = self.op("stride_order", name, f"stride_order={order}", dtype=fake.dtype, rank=fake.ndim)
        self.lines.append(f"fd.add_output({name})")
        return fake.stride()

    def value(self, argument: Any, dtype: torch.dtype, rank: int = 0) -> str:
        """An argument in a dtype, with leading dimensions of one up to a rank."""
        if not isinstance(argument, Node):
            return self.number(argument, dtype)
        name = self.cast(self.names[argument], dtype)
        missing = rank - self.ranks[name]
        if missing <= 0 or self.ranks[name] == 0:
            return name
        flags = [True] * missing + [False] * self.ranks[name]
        return self.op("broadcast", name, f"is_broadcast_dim={flags}", dtype=dtype, rank=rank)


def _type(dtype: torch.dtype) -> str:
    if dtype not in TYPES:
        raise NoRule(f"nvFuser computes no {dtype}")
    return TYPES[dtype]


# ---- rules ----

Rule = Callable[[_Writer, Node], Any]
RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


def _argument(node: Node, i: int, name: str, default: Any = None) -> Any:
    return node.args[i] if len(node.args) > i else node.kwargs.get(name, default)


def _pointwise(name: str, count: int = 1) -> Rule:
    """All operands in the dtype of the result."""

    def rule(w: _Writer, node: Node) -> str:
        fake = _meta(node)
        dtype = _inner(fake.dtype)
        return w.op(name, *(w.value(a, dtype, fake.ndim) for a in node.args[:count]), dtype=dtype, rank=fake.ndim)

    return rule


def _comparison(name: str) -> Rule:
    """Operands in the dtype that they promote to."""

    def rule(w: _Writer, node: Node) -> str:
        fake = _meta(node)
        operands = [_meta(a) if isinstance(a, Node) else a for a in node.args[:2]]
        dtype = _inner(torch.result_type(*operands))
        args = (w.value(a, dtype, fake.ndim) for a in node.args[:2])
        return w.op(name, *args, dtype=torch.bool, rank=fake.ndim)

    return rule


for _name in [
    "abs",
    "neg",
    "exp",
    "expm1",
    "log",
    "log1p",
    "sqrt",
    "rsqrt",
    "sin",
    "cos",
    "tan",
    "tanh",
    "erf",
    "sigmoid",
    "reciprocal",
    "relu",
    "floor",
    "ceil",
    "round",
    "sign",
    "trunc",
    "sinh",
    "cosh",
    "asin",
    "acos",
    "atan",
]:
    RULES[f"aten.{_name}.default"] = _pointwise(_name)
for _name in ("mul", "div", "maximum", "minimum", "atan2", "fmod", "remainder"):
    for _overload in ("Tensor", "default", "Scalar"):
        RULES[f"aten.{_name}.{_overload}"] = _pointwise(_name, 2)
for _name in ("bitwise_and", "bitwise_or", "bitwise_xor"):
    RULES[f"aten.{_name}.Tensor"] = _pointwise(_name, 2)
for _name in ("logical_and", "logical_or"):
    RULES[f"aten.{_name}.default"] = _pointwise(_name, 2)
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    for _overload in ("Tensor", "Scalar"):
        RULES[f"aten.{_name}.{_overload}"] = _comparison(_name)
RULES["aten.logical_not.default"] = RULES["aten.bitwise_not.default"] = _pointwise("logical_not")


@_rule("aten.pow.Tensor_Scalar", "aten.pow.Tensor_Tensor")
def _pow(w: _Writer, node: Node) -> str:
    fake = _meta(node)
    dtype = _inner(fake.dtype)
    base = w.value(node.args[0], dtype, fake.ndim)
    if node.args[1] == 2:
        return w.op("mul", base, base, dtype=dtype, rank=fake.ndim)
    return w.op("pow", base, w.value(node.args[1], dtype, fake.ndim), dtype=dtype, rank=fake.ndim)


def _sum_of(name: str) -> Rule:
    def rule(w: _Writer, node: Node) -> str:
        fake = _meta(node)
        dtype, rank = _inner(fake.dtype), fake.ndim
        right = w.value(node.args[1], dtype, rank)
        alpha = node.kwargs.get("alpha", 1)
        if alpha != 1:
            right = w.op("mul", right, w.number(alpha, dtype), dtype=dtype, rank=rank)
        return w.op(name, w.value(node.args[0], dtype, rank), right, dtype=dtype, rank=rank)

    return rule


for _name in ("add", "sub"):
    for _overload in ("Tensor", "Scalar"):
        RULES[f"aten.{_name}.{_overload}"] = _sum_of(_name)


@_rule("prims.fma.default")
def _fma(w: _Writer, node: Node) -> str:
    fake = _meta(node)
    dtype, rank = _inner(fake.dtype), fake.ndim
    a, b, c = (w.value(x, dtype, rank) for x in node.args)
    return w.op("add", w.op("mul", a, b, dtype=dtype, rank=rank), c, dtype=dtype, rank=rank)


@_rule("aten.where.self")
def _where(w: _Writer, node: Node) -> str:
    fake = _meta(node)
    dtype, rank = _inner(fake.dtype), fake.ndim
    condition = w.value(node.args[0], torch.bool, rank)
    return w.op("where", condition, *(w.value(x, dtype, rank) for x in node.args[1:3]), dtype=dtype, rank=rank)


@_rule("aten.clamp.default", "aten.clamp_min.default", "aten.clamp_max.default")
def _clamp(w: _Writer, node: Node) -> str:
    fake = _meta(node)
    dtype, rank = _inner(fake.dtype), fake.ndim
    low, high = _argument(node, 1, "min"), _argument(node, 2, "max")
    if "clamp_max" in str(node.target):
        low, high = None, low
    name = w.value(node.args[0], dtype, rank)
    for bound, op in ((low, "maximum"), (high, "minimum")):
        if bound is not None:
            name = w.op(op, name, w.value(bound, dtype, rank), dtype=dtype, rank=rank)
    return name


@_rule("prims.convert_element_type.default", "aten._to_copy.default")
def _convert(w: _Writer, node: Node) -> str:
    if set(node.kwargs) - {"dtype", "memory_format"} or _meta(node).device != _meta(node.args[0]).device:
        raise NoRule("a copy to another device")
    return w.cast(w.names[node.args[0]], _inner(_meta(node).dtype))


@_rule("aten.clone.default", "aten.alias.default", "aten.detach.default", "prims.device_put.default")
def _same(w: _Writer, node: Node) -> str:
    return w.names[node.args[0]]


# -- constants --


@_rule("aten.full.default", "aten.full_like.default", "aten.scalar_tensor.default")
def _full(w: _Writer, node: Node) -> str:
    fake = _meta(node)
    value = node.args[0] if "scalar_tensor" in str(node.target) else node.args[1]
    if isinstance(value, Node):
        raise NoRule("a full() of a tensor")
    number = w.number(value, _inner(fake.dtype))
    if fake.ndim == 0:
        return number
    dtype = _inner(fake.dtype)
    return w.op(
        "full", f"shape={list(fake.shape)}", f"fill_value={number}", f"dtype=DataType.{_type(dtype)}", dtype=dtype,
        rank=fake.ndim,
    )  # fmt: skip


@_rule("prims.iota.default")
def _iota(w: _Writer, node: Node) -> str:
    start, step = (w.number(node.kwargs.get(k, d), torch.int64) for k, d in (("start", 0), ("step", 1)))
    length = w.number(node.args[0], torch.int64)
    name = w.op("iota", length, start, step, "DataType.Int", dtype=torch.int64, rank=1)
    return w.cast(name, _meta(node).dtype)


# -- reductions --


def _dims(dims: Any, rank: int) -> list[int]:
    if dims is None or dims == []:
        return list(range(rank))
    return sorted(d % rank for d in ([dims] if isinstance(dims, int) else dims))


def _reduction(name: str) -> Rule:
    def rule(w: _Writer, node: Node) -> str:
        fake, source = _meta(node), _meta(node.args[0])
        dtype = _inner(fake.dtype)
        if source.ndim == 0:
            return w.value(node.args[0], dtype)
        dims = _dims(_argument(node, 1, "dim"), source.ndim)
        keep = bool(_argument(node, 2, "keepdim", False))
        x = w.value(node.args[0], dtype)
        total = w.op(name.replace("mean", "sum"), x, dims, keep, "DataType.Null", dtype=dtype, rank=fake.ndim)
        if name != "mean":
            return total
        count = math.prod(source.shape[d] for d in dims)
        return w.op("div", total, w.number(count, dtype), dtype=dtype, rank=fake.ndim)

    return rule


for _names, _name in (
    (("aten.sum.dim_IntList", "aten.sum.default"), "sum"),
    (("aten.mean.dim", "aten.mean.default"), "mean"),
    (("aten.amax.default",), "max"),
    (("aten.amin.default",), "min"),
    (("aten.prod.dim_int", "aten.prod.default"), "prod"),
):
    RULES.update(dict.fromkeys(_names, _reduction(_name)))


@_rule("aten.var_mean.correction", "aten.var.correction")
def _var_mean(w: _Writer, node: Node) -> Any:
    source = _meta(node.args[0])
    both = "var_mean" in str(node.target)
    fake = _meta(node)[0] if both else _meta(node)
    dims = _dims(_argument(node, 1, "dim"), source.ndim)
    correction = node.kwargs.get("correction")
    correction = 1 if correction is None else int(correction)
    keep = bool(node.kwargs.get("keepdim", False))
    dtype = _inner(fake.dtype)
    x = w.value(node.args[0], dtype)
    if not both:
        return w.op("var", x, dims, correction, keep, dtype=dtype, rank=fake.ndim)
    var, mean = f"t{w._count}", f"t{w._count + 1}"
    w._count += 2
    w.lines.append(f"{var}, {mean} = fd.ops.var_mean({x}, {dims}, {correction}, {keep})")
    for name in (var, mean):
        w.dtypes[name], w.ranks[name] = dtype, fake.ndim
    return var, mean


@_rule("<built-in function getitem>")
def _getitem(w: _Writer, node: Node) -> str:
    return w.names[node.args[0]][node.args[1]]


# -- shapes --


@_rule("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default")
def _view(w: _Writer, node: Node) -> str:
    fake, source = _meta(node), _meta(node.args[0])
    name = w.names[node.args[0]]
    if fake.shape == source.shape:
        return name
    return w.op("reshape", name, f"new_shape={list(fake.shape)}", dtype=w.dtypes[name], rank=fake.ndim)


@_rule("aten.unsqueeze.default")
def _unsqueeze(w: _Writer, node: Node) -> str:
    fake = _meta(node)
    name = w.names[node.args[0]]
    flags = [d == node.args[1] % fake.ndim for d in range(fake.ndim)]
    return w.op("broadcast", name, f"is_broadcast_dim={flags}", dtype=w.dtypes[name], rank=fake.ndim)


@_rule("aten.squeeze.dim", "aten.squeeze.dims", "aten.squeeze.default")
def _squeeze(w: _Writer, node: Node) -> str:
    fake, source = _meta(node), _meta(node.args[0])
    dims = _dims(_argument(node, 1, "dim"), source.ndim)
    dims = [d for d in dims if source.shape[d] == 1]
    name = w.names[node.args[0]]
    return w.op("squeeze", name, dims, dtype=w.dtypes[name], rank=fake.ndim) if dims else name


@_rule("aten.expand.default")
def _expand(w: _Writer, node: Node) -> str:
    fake = _meta(node)
    name = w.names[node.args[0]]
    name = w.value(node.args[0], w.dtypes[name], fake.ndim)
    return w.op("expand", name, f"shape={list(fake.shape)}", dtype=w.dtypes[name], rank=fake.ndim)


@_rule("aten.permute.default", "aten.transpose.int", "aten.t.default")
def _permute(w: _Writer, node: Node) -> str:
    rank = _meta(node).ndim
    order = list(range(rank))
    if "permute" in str(node.target):
        order = [d % rank for d in node.args[1]]
    elif rank > 1:
        a, b = node.args[1:] if len(node.args) > 1 else (0, 1)
        order[a], order[b] = order[b], order[a]
    name = w.names[node.args[0]]
    return w.op("permute", name, f"dims={order}", dtype=w.dtypes[name], rank=rank)


@_rule("aten.slice.Tensor")
def _slice(w: _Writer, node: Node) -> str:
    fake, source = _meta(node), _meta(node.args[0])
    dim = _argument(node, 1, "dim", 0) % source.ndim
    start, step = _argument(node, 2, "start", 0) or 0, _argument(node, 4, "step", 1)
    if step != 1:
        raise NoRule("a slice with a step")
    start = min(max(start + source.shape[dim] if start < 0 else start, 0), source.shape[dim])
    name = w.names[node.args[0]]
    if fake.shape == source.shape:
        return name
    starts = [start if d == dim else 0 for d in range(source.ndim)]
    ends = [starts[d] + fake.shape[d] for d in range(source.ndim)]
    return w.op("slice", name, f"start_indices={starts}", f"end_indices={ends}", dtype=w.dtypes[name], rank=source.ndim)


@_rule("aten.split_with_sizes.default")
def _split(w: _Writer, node: Node) -> tuple[str, ...]:
    source = _meta(node.args[0])
    dim = _argument(node, 2, "dim", 0) % source.ndim
    name, at, parts = w.names[node.args[0]], 0, []
    for size in node.args[1]:
        starts = [at if d == dim else 0 for d in range(source.ndim)]
        ends = [at + size if d == dim else source.shape[d] for d in range(source.ndim)]
        at += size
        parts.append(
            w.op(
                "slice", name, f"start_indices={starts}", f"end_indices={ends}", dtype=w.dtypes[name], rank=source.ndim
            )
        )
    return tuple(parts)


@_rule("aten.cat.default")
def _cat(w: _Writer, node: Node) -> str:
    fake = _meta(node)
    dtype = _inner(fake.dtype)
    parts = [w.value(x, dtype) for x in node.args[0] if _meta(x).numel()]
    dim = _argument(node, 1, "dim", 0) % fake.ndim
    return w.op("cat", f"[{', '.join(parts)}]", dim, dtype=dtype, rank=fake.ndim)


# -- by index --


@_rule("aten.gather.default")
def _gather(w: _Writer, node: Node) -> str:
    x, dim, index = node.args[:3]
    name = w.names[x]
    rank = _meta(node).ndim
    return w.op("gather", name, w.names[index], dim % rank, dtype=w.dtypes[name], rank=rank)


@_rule("aten.scatter.value")
def _scatter(w: _Writer, node: Node) -> str:
    """One place of each row: where its number is the index."""
    x, dim, index, value = node.args
    fake, places = _meta(node), _meta(index)
    dim %= fake.ndim
    if places.shape[dim] != 1 or any(places.shape[d] != fake.shape[d] for d in range(fake.ndim) if d != dim):
        raise NoRule("a scatter to more than one place of a row")
    dtype = _inner(fake.dtype)
    one, zero = w.number(1, torch.int64), w.number(0, torch.int64)
    length = w.number(fake.shape[dim], torch.int64)
    numbers = w.op("iota", length, zero, one, "DataType.Int", dtype=torch.int64, rank=1)
    flags = [d != dim for d in range(fake.ndim)]
    numbers = w.op("broadcast", numbers, f"is_broadcast_dim={flags}", dtype=torch.int64, rank=fake.ndim)
    hit = w.op("eq", numbers, w.value(index, torch.int64), dtype=torch.bool, rank=fake.ndim)
    return w.op("where", hit, w.number(value, dtype), w.value(x, dtype), dtype=dtype, rank=fake.ndim)
