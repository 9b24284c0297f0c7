"""Operations that are kernels or views of their own: products, sums, softmax, losses.

An emitter is called like the operator, after the program and the results' proxies; it raises ``Decline`` for what it
does not know. The checker of an operator is its emitter on tensors without data, with a program that keeps nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from thunder.extend.executor import operator_key

from .pointwise import Decline, Number
from .program import Program, Value, count, unravel

EMITTERS: dict[str, Any] = {}
VIEWS = {
    *("view", "reshape", "flatten", "transpose", "t", "T", "mT", "permute", "expand", "unsqueeze"),
    *("squeeze", "narrow", "select", "unflatten", "contiguous", "detach", "getitem", "unbind"),
    *("chunk", "Tensor.split"),
}


def emitter(*keys: str) -> Any:
    """Register the emitter of operators."""

    def register(fn: Any) -> Any:
        EMITTERS.update((operator_key(key), fn) for key in keys)
        return fn

    return register


def require(truth: Any, reason: str) -> None:
    """Decline unless."""
    if not truth:
        raise Decline(reason)


def _f32(*tensors: Any) -> None:
    require(all(t is None or t.dtype == torch.float32 for t in tensors), "a dtype other than float32")


# ---- views ----


def emit_view(p: Program, symbol: Any) -> None:
    """What torch says of a tensor without data: the same memory with other strides, or a copy."""
    source = p.value(symbol.flat_proxy_args[0])
    base = torch.empty(max(p.storages[source.storage].count, 1), device="meta", dtype=source.dtype)
    stand_in = base.as_strided(source.shape, source.strides, source.offset)
    given = symbol.sym(*(stand_in if hasattr(a, "stride") else a for a in symbol.args), **symbol.kwargs)
    for proxy, r in zip(symbol.flat_proxy_outs, (given,) if hasattr(given, "stride") else given, strict=True):
        if r.shape != proxy.shape:
            raise ValueError(f"{symbol.name} gives {tuple(r.shape)} where the trace says {tuple(proxy.shape)}")
        if r.untyped_storage()._cdata == base.untyped_storage()._cdata:
            p.values[proxy.name] = Value(source.storage, tuple(r.shape), r.stride(), r.storage_offset(), source.dtype)
        else:
            copy(p, source, p.new(proxy))


def check_view(key: str, args: tuple, kwargs: dict[str, Any], is_tensor: Any) -> None:
    """Declines indices that are tensors or lists, and other types of the same bytes."""
    require(is_tensor(args[0]) and not (key == "getitem" and isinstance(args[1], list)), "an index that is a list")
    for a in (*args[1:], *kwargs.values()):
        require(not isinstance(a, torch.dtype), "another dtype")
        for item in a if isinstance(a, (list, tuple)) else (a,):
            require(not is_tensor(item), "an index that is a tensor")
            require(not isinstance(item, (list, bool)), "an index that is a list or a boolean")
            step = item.step if isinstance(item, slice) else 1
            require(step is None or step > 0, "a step that is not positive")


def copy(p: Program, source: Value, target: Value) -> None:
    """Element after element, the last dimension fastest on both sides."""
    reads = source.at("x", [f"c{d}" for d in range(len(source.shape))])
    writes = target.at("y", [f"d{d}" for d in range(len(target.shape))])
    body = unravel("i", source.shape) + unravel("i", target.shape, "d") + f"  {writes} = {reads};\n"
    p.kernel(count(source.shape), body, x=source, y=target)


@emitter("cat")
def _cat(p: Program, out: Any, tensors: Any, dim: int = 0) -> None:
    require(all(t.ndim == tensors[0].ndim and t.dtype == tensors[0].dtype for t in tensors), "dtypes or ranks differ")
    if not p:
        return
    whole, start = p.new(out), 0
    dim %= len(whole.shape)
    for part in map(p.value, tensors):
        offset = whole.offset + start * whole.strides[dim]
        copy(p, part, dataclasses.replace(whole, shape=part.shape, offset=offset))
        start += part.shape[dim]


# ---- products ----

_ROWS = 4  # of the result that one work item computes


def product(p: Program, a: Value, b: Value, out: Value, *, bias: Value | None, alpha: Any = 1, beta: Any = 1) -> None:
    """out[..., m, n] = beta * bias + alpha * sum over k of a[..., m, k] * b[..., k, n]."""
    *batch, m, n = out.shape
    k, blocks, rows = a.shape[-1], -(-m // _ROWS), range(_ROWS)
    a, b = a.broadcast([*batch, m, k]), b.broadcast([*batch, k, n])
    *c, row, column = [f"c{d}" for d in range(len(batch) + 2)]
    lines = [unravel("i", [*batch, blocks, n])]
    for r in rows:
        lines.append(f"  const int r{r} = min({row} * {_ROWS} + {r}, {m - 1});\n  float s{r} = 0;\n")
    lines.append(f"  for (int k = 0; k < {k}; k++) {{\n    const float w = {b.at('b', [*c, 'k', column])};\n")
    lines += [f"    s{r} += {a.at('a', [*c, f'r{r}', 'k'])} * w;\n" for r in rows] + ["  }\n"]
    for r in rows:
        at = [*c, f"r{r}", column]
        more = "" if bias is None else f" + {Number(beta)} * {bias.broadcast(out.shape).at('z', at)}"
        lines.append(f"  if ({row} * {_ROWS} + {r} < {m}) {out.at('y', at)} = {Number(alpha)} * s{r}{more};\n")
    named = {"a": a, "b": b, "y": out} | ({} if bias is None else {"z": bias})
    p.kernel(count(batch) * blocks * n, "".join(lines), **named)


@emitter("mm", "bmm", "matmul")
def _matmul(p: Program, out: Any, x: Any, y: Any) -> None:
    _f32(x, y)
    require(x.ndim > 1 and y.ndim > 1, "a vector")
    if p:
        product(p, p.value(x), p.value(y), p.new(out), bias=None)


@emitter("addmm", "baddbmm")
def _addmm(p: Program, out: Any, z: Any, x: Any, y: Any, *, beta: Any = 1, alpha: Any = 1) -> None:
    _f32(z, x, y)
    if p:  # beta = 0 leaves z out, whatever it is
        product(p, p.value(x), p.value(y), p.new(out), bias=p.value(z) if beta else None, alpha=alpha, beta=beta)


@emitter("linear")
def _linear(p: Program, out: Any, x: Any, w: Any, bias: Any = None) -> None:
    _f32(x, w, bias)
    require(w.ndim == 2 and x.ndim > 1, "a vector")
    if p:
        v = p.value(w)
        turned = dataclasses.replace(v, shape=v.shape[::-1], strides=v.strides[::-1])
        product(p, p.value(x), turned, p.new(out), bias=None if bias is None else p.value(bias))


# ---- along dimensions ----


def _sum(mean: bool) -> Any:
    """One work item for each result; it carries along what rounding lost."""

    def emit(p: Program, out: Any, x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> None:
        _f32(x)
        require(dtype in (None, torch.float32), "a dtype other than float32")
        if not p:
            return
        v, y = p.value(x), p.new(out)
        given = dim if isinstance(dim, (list, tuple)) else [] if dim is None else [dim]
        dims = {d % x.ndim for d in given if x.ndim} or {*range(x.ndim)}
        kept = [d for d in range(x.ndim) if d not in dims]
        names = {d: f"c{i}" for i, d in enumerate(kept)}
        lines = [unravel("i", [v.shape[d] for d in kept]), "  float s = 0, lost = 0;\n"]
        lines += [f"  for (int e{d} = 0; e{d} < {v.shape[d]}; e{d}++)\n" for d in dims]
        element = v.at("x", [names.get(d, f"e{d}") for d in range(x.ndim)])
        lines.append(f"  {{ const float e = {element} - lost, t = s + e;\n")
        lines.append("    lost = isfinite(t) ? (t - s) - e : 0; s = t; }\n")
        target = y.at("y", [names.get(d, "0") for d in range(x.ndim) if keepdim or d in names])
        lines.append(f"  {target} = s{f' / {Number(count([v.shape[d] for d in dims]))}' if mean else ''};\n")
        p.kernel(count(y.shape), "".join(lines), x=v, y=y)

    return emit


EMITTERS |= {"sum": _sum(False), "mean": _sum(True)}


def rows(p: Program, dim: int, body: str, **values: Value) -> None:
    """One work item for each row along ``dim``; in ``body`` ``@x`` is element ``k`` of ``x``."""
    shape = next(iter(values.values())).shape
    n, rest = (shape[dim], [s for d, s in enumerate(shape) if d != dim % len(shape)]) if shape else (1, [])
    names = iter([f"c{d}" for d in range(len(rest))])
    indices = ["k" if d == dim % len(shape) else next(names) for d in range(len(shape))]
    for name, v in values.items():
        body = body.replace(f"@{name}", v.at(name, indices))
    p.kernel(count(rest), unravel("i", rest) + body.replace("$each", f"for (int k = 0; k < {n}; k++)"), **values)


_TOP = "  float top = -INFINITY, s = 0;\n  $each top = fmax(top, @x);\n  $each s += exp(@x - top);\n"
_FORWARD = {
    "softmax": _TOP + "  $each @y = exp(@x - top) / s;\n",
    "log_softmax": _TOP + "  $each @y = @x - top - log(s);\n",
}
_BACKWARD = {
    "softmax": "  float s = 0;\n  $each s += @g * @y;\n  $each @r = @y * (@g - s);\n",
    "log_softmax": "  float s = 0;\n  $each s += @g;\n  $each @r = @g - exp(@y) * s;\n",
}


def _softmax(kind: str) -> tuple[Any, Any]:
    def forward(p: Program, out: Any, x: Any, dim: Any = None, *more: Any, _stacklevel: int = 3, dtype: Any = None):
        _f32(x)
        require(all(m in (None, 3, torch.float32) for m in (*more, dtype)) and dim is not None, "a dtype, or no dim")
        if p:
            rows(p, dim, _FORWARD[kind], x=p.value(x), y=p.new(out))

    def backward(p: Program, out: Any, g: Any, y: Any, dim: int, input_dtype: Any) -> None:
        _f32(g, y)
        require(input_dtype == torch.float32, "a dtype other than float32")
        if p:
            rows(p, dim, _BACKWARD[kind], g=p.value(g), y=p.value(y), r=p.new(out))

    return forward, backward


for _kind in _FORWARD:
    _forward, _backward = _softmax(_kind)
    emitter(f"torch.{_kind}", f"torch.nn.functional.{_kind}")(_forward)
    emitter(f"torch.ops.aten._{_kind}_backward_data.default")(_backward)


# ---- losses ----


def _check_nll(x: Any, target: Any, weight: Any, reduction: Any) -> None:
    _f32(x)
    require(x.ndim == 2 and target.ndim == 1, "other than one class number for each row of a matrix")
    require(target.dtype == torch.int64 and weight is None, "class weights or a target that is not int64")
    require(reduction in (1, 2, "mean", "sum"), "a loss that is not reduced")


def nll(p: Program, x: Value, target: Value, loss: Value, total: Value, *, mean: bool, ignore: int) -> None:
    """One work item walks over the rows: the loss and the number of those that count."""
    body = f"""  float s = 0, rows = 0;
  for (int k = 0; k < {x.shape[0]}; k++) {{
    const long c = {target.at("t", ["k"])};
    if (c == {ignore}) continue;
    if (c < 0 || c >= {x.shape[1]}) {{ flag[0] = 1; continue; }}
    rows++, s -= {x.at("x", ["k", "c"])};
  }}
  y[0] = {"s / rows" if mean else "s"};
  w[0] = rows;
"""
    p.kernel(1, body, x=x, t=target, y=loss, w=total, flag=p.index_flag())


@emitter("torch.ops.aten.nll_loss_forward.default")
def _nll_forward(p: Program, out: Any, x: Any, target: Any, weight: Any, reduction: int, ignore_index: int) -> None:
    _check_nll(x, target, weight, reduction)
    if p:
        nll(p, p.value(x), p.value(target), *map(p.new, out), mean=reduction == 1, ignore=ignore_index)


@emitter("torch.ops.aten.nll_loss_backward.default")
def _nll_backward(
    p: Program, out: Any, g: Any, x: Any, target: Any, weight: Any, reduction: int, ignore_index: int, total: Any
) -> None:
    _check_nll(x, target, weight, reduction)
    if not p:
        return
    v = {"g": p.value(g), "t": p.value(target), "w": p.value(total), "y": p.new(out)}
    body = unravel("i", v["y"].shape) + f"  const long c = {v['t'].at('t', ['c0'])};\n"
    share = f"-{v['g'].at('g', [])}" + (f" / {v['w'].at('w', [])}" if reduction == 1 else "")
    body += f"  {v['y'].at('y', ['c0', 'c1'])} = c == c1 && c != {ignore_index} ? {share} : 0;\n"
    p.kernel(count(v["y"].shape), body, **v)
