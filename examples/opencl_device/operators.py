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
_VIEWS = (
    *("view", "reshape", "flatten", "transpose", "t", "T", "mT", "permute", "expand", "expand_as", "unsqueeze"),
    *("squeeze", "narrow", "select", "unflatten", "contiguous", "detach", "getitem", "chunk", "swapaxes", "unbind"),
    "torch.Tensor.split",
)
VIEWS = frozenset(map(operator_key, _VIEWS))


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
    args = [stand_in if hasattr(a, "stride") else a for a in symbol.args]
    given = symbol.sym(*args, **symbol.kwargs)
    results = given if isinstance(given, (tuple, list)) else (given,)
    for proxy, r in zip(symbol.flat_proxy_outs, results, strict=True):
        if r.untyped_storage()._cdata == base.untyped_storage()._cdata:
            value = Value(source.storage, tuple(r.shape), r.stride(), r.storage_offset(), source.dtype)
            p.bind(proxy, value)
        else:
            copy(p, source, p.new(proxy))


def check_view(args: tuple, kwargs: dict[str, Any], is_tensor: Any) -> None:
    """Raises Decline for indices that are tensors and for other types of the same bytes."""
    require(is_tensor(args[0]), "no tensor")
    for a in (*args[1:], *kwargs.values()):
        require(not isinstance(a, torch.dtype), "another dtype")
        require(not is_tensor(a), "an index that is a tensor")
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
def cat(p: Program, out: Any, tensors: Any, dim: int = 0) -> None:
    """Each tensor is copied to its part of the result."""
    require(all(t.ndim == tensors[0].ndim and t.dtype == tensors[0].dtype for t in tensors), "dtypes or ranks differ")
    if not p:
        return
    whole, start = p.new(out), 0
    dim %= len(whole.shape)
    for t in tensors:
        part = p.value(t)
        offset = whole.offset + start * whole.strides[dim]
        copy(p, part, dataclasses.replace(whole, shape=part.shape, offset=offset))
        start += part.shape[dim]


# ---- products ----

_ROWS = 4  # of the result that one work item computes


def product(p: Program, a: Value, b: Value, out: Value, *, bias: Value | None, alpha: Any = 1, beta: Any = 1) -> None:
    """out[..., m, n] = beta * bias + alpha * sum over k of a[..., m, k] * b[..., k, n]."""
    *batch, m, n = out.shape
    k = a.shape[-1]
    blocks = -(-m // _ROWS)
    a, b = a.broadcast([*batch, m, k]), b.broadcast([*batch, k, n])
    c = [f"c{d}" for d in range(len(batch))]
    rows = range(_ROWS)
    lines = [unravel("i", [*batch, blocks, n])]
    row, column = f"c{len(batch)}", f"c{len(batch) + 1}"
    for r in rows:
        lines.append(f"  const int r{r} = min({row} * {_ROWS} + {r}, {m - 1});\n  float s{r} = 0;\n")
    lines.append(f"  for (int k = 0; k < {k}; k++) {{\n    const float w = {b.at('b', [*c, 'k', column])};\n")
    lines += [f"    s{r} += {a.at('a', [*c, f'r{r}', 'k'])} * w;\n" for r in rows] + ["  }\n"]
    for r in rows:
        more = "" if bias is None else f" + {Number(beta)} * {bias.broadcast(out.shape).at('z', [*c, f'r{r}', column])}"
        guard = f"  if ({row} * {_ROWS} + {r} < {m}) "
        lines.append(f"{guard}{out.at('y', [*c, f'r{r}', column])} = {Number(alpha)} * s{r}{more};\n")
    named = {"a": a, "b": b, "y": out} | ({} if bias is None else {"z": bias})
    p.kernel(count(batch) * blocks * n, "".join(lines), **named)


def _swapped(v: Value) -> Value:
    return dataclasses.replace(
        v, shape=(*v.shape[:-2], v.shape[-1], v.shape[-2]), strides=(*v.strides[:-2], v.strides[-1], v.strides[-2])
    )


def _inserted(v: Value, at: int) -> Value:
    """With a dimension of one element more, counted from the end."""
    i = len(v.shape) + 1 + at
    return dataclasses.replace(v, shape=(*v.shape[:i], 1, *v.shape[i:]), strides=(*v.strides[:i], 0, *v.strides[i:]))


@emitter("mm", "bmm", "matmul")
def matmul(p: Program, out: Any, x: Any, y: Any) -> None:
    """Vectors are matrices with one row or column."""
    _f32(x, y)
    if not p:
        return
    a, b, c = p.value(x), p.value(y), p.new(out)
    if x.ndim == 1:
        a, c = _inserted(a, -2), _inserted(c, -1 if y.ndim == 1 else -2)
    if y.ndim == 1:
        b, c = _inserted(b, -1), _inserted(c, -1)
    product(p, a, b, c, bias=None)


@emitter("addmm", "baddbmm")
def addmm(p: Program, out: Any, z: Any, x: Any, y: Any, *, beta: Any = 1, alpha: Any = 1) -> None:
    """With a summand, which beta = 0 leaves out whatever it is."""
    _f32(z, x, y)
    if p:
        product(p, p.value(x), p.value(y), p.new(out), bias=p.value(z) if beta else None, alpha=alpha, beta=beta)


@emitter("linear")
def linear(p: Program, out: Any, x: Any, w: Any, bias: Any = None) -> None:
    """The weight is read along its rows."""
    _f32(x, w, bias)
    require(w.ndim == 2 and x.ndim > 0, "a weight that is no matrix")
    if not p:
        return
    a, c = p.value(x), p.new(out)
    if x.ndim == 1:
        a, c = _inserted(a, -2), _inserted(c, -2)
    product(p, a, _swapped(p.value(w)), c, bias=None if bias is None else p.value(bias))


# ---- reductions ----


def _dims(dim: Any, ndim: int) -> list[int]:
    if dim is None or dim == () or dim == []:
        return list(range(ndim))
    return sorted(
        {d % ndim if ndim else 0 for d in (dim if isinstance(dim, (list, tuple)) else [dim])} & {*range(ndim)}
    )


def reduce(p: Program, x: Value, out: Value, dims: list[int], kind: str) -> None:
    """One work item for each result; sums carry what rounding lost along."""
    kept = [d for d in range(len(x.shape)) if d not in dims]
    names = {d: f"c{i}" for i, d in enumerate(kept)} | {d: f"e{d}" for d in dims}
    lines = [unravel("i", [x.shape[d] for d in kept])]
    lines.append("  float s = 0, lost = 0;\n" if kind in ("sum", "mean") else "  float s = NAN; int first = 1;\n")
    lines += [f"  for (int e{d} = 0; e{d} < {x.shape[d]}; e{d}++)\n" for d in dims]
    element = x.at("x", [names[d] for d in range(len(x.shape))])
    if kind in ("sum", "mean"):
        lines.append(f"  {{ const float e = {element}, y = e - lost, t = s + y;\n")
        lines.append("    lost = isfinite(t) ? (t - s) - y : 0; s = t; }\n")
    else:
        better = f"e {'>' if kind == 'amax' else '<'} s"
        lines.append(
            f"  {{ const float e = {element}; if (first || isnan(e) || {better}) s = isnan(s) && !first ? s : e;"
        )
        lines.append(" first = 0; }\n")
    whole = count([x.shape[d] for d in dims])
    lines.append(f"  y[i] = {'s / ' + str(Number(whole)) if kind == 'mean' else 's'};\n")
    p.kernel(count([x.shape[d] for d in kept]), "".join(lines), x=x, y=out)


def _reduction(kind: str) -> Any:
    def emit(p: Program, out: Any, x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> None:
        _f32(x)
        require(dtype in (None, torch.float32), "a dtype other than float32")
        if p:
            require(out.dtype == torch.float32, "a dtype other than float32")
            reduce(p, p.value(x), p.new(out), _dims(dim, x.ndim), kind)

    return emit


for _kind in ("sum", "mean", "amax", "amin"):
    emitter(_kind)(_reduction(_kind))


# ---- along one dimension ----


def along(p: Program, values: dict[str, Value], dim: int, body: str) -> None:
    """One work item for each row along ``dim``; in ``body`` ``@x`` is element ``k`` of ``x``, ``$n`` their number."""
    shape = next(iter(values.values())).shape
    n, rest = (shape[dim], [s for d, s in enumerate(shape) if d != dim]) if shape else (1, [])
    names = iter([f"c{d}" for d in range(len(rest))])
    indices = ["k" if d == dim else next(names) for d in range(len(shape))]
    for name, v in values.items():
        body = body.replace(f"@{name}", v.at(name, indices))
    body = body.replace("$each", f"for (int k = 0; k < {n}; k++)").replace("$n", str(n))
    p.kernel(count(rest), unravel("i", rest) + body, **values)


_SOFTMAX = """  float top = -INFINITY, s = 0;
  $each top = fmax(top, @x);
  $each s += exp(@x - top);
  $each @y = RESULT;
"""
_SOFTMAXES = {
    "softmax": _SOFTMAX.replace("RESULT", "exp(@x - top) / s"),
    "log_softmax": _SOFTMAX.replace("RESULT", "@x - top - log(s)"),
    "_softmax_backward_data": "  float s = 0;\n  $each s += @g * @y;\n  $each @r = @y * (@g - s);\n",
    "_log_softmax_backward_data": "  float s = 0;\n  $each s += @g;\n  $each @r = @g - exp(@y) * s;\n",
}


def _softmax(kind: str) -> Any:
    def emit(p: Program, out: Any, x: Any, dim: Any = None, _stacklevel: Any = 3, dtype: Any = None) -> None:
        _f32(x)
        if isinstance(_stacklevel, torch.dtype):
            dtype = _stacklevel
        require(dtype in (None, torch.float32) and dim is not None, "another dtype, or no dimension")
        if p:
            along(p, {"x": p.value(x), "y": p.new(out)}, dim % max(x.ndim, 1), _SOFTMAXES[kind])

    return emit


def _softmax_backward(kind: str) -> Any:
    def emit(p: Program, out: Any, g: Any, y: Any, dim: int, input_dtype: Any) -> None:
        _f32(g, y)
        require(input_dtype == torch.float32, "a dtype other than float32")
        if p:
            along(p, {"g": p.value(g), "y": p.value(y), "r": p.new(out)}, dim % max(y.ndim, 1), _SOFTMAXES[kind])

    return emit


for _kind in ("softmax", "log_softmax"):
    emitter(f"torch.{_kind}", f"torch.nn.functional.{_kind}")(_softmax(_kind))
    emitter(f"torch.ops.aten._{_kind}_backward_data.default")(_softmax_backward(f"_{_kind}_backward_data"))


# ---- losses ----


def _check_nll(x: Any, target: Any, weight: Any, reduction: Any) -> None:
    _f32(x)
    require(x.ndim == 2 and target.ndim == 1, "other than one class number for each row of a matrix")
    require(target.dtype == torch.int64 and weight is None, "class weights or a target that is not int64")
    require(reduction in (1, 2, "mean", "sum"), "a loss that is not reduced")


def nll(p: Program, x: Value, target: Value, loss: Value, total: Value, *, mean: bool, ignore: int) -> None:
    """One work item walks over the rows: the loss and the number of those that count."""
    n, classes = x.shape
    lines = [f"  float s = 0; int rows = 0;\n  for (int k = 0; k < {n}; k++) {{\n"]
    lines.append(f"    const long c = {target.at('t', ['k'])};\n    if (c == {ignore}) continue;\n")
    lines.append(f"    if (c < 0 || c >= {classes}) {{ flag[0] = 1; continue; }}\n")
    lines.append(f"    rows++; s -= {x.at('x', ['k', 'c'])};\n  }}\n")
    lines.append(f"  {loss.at('y', [])} = {'s / rows' if mean else 's'};\n  {total.at('w', [])} = rows;\n")
    p.kernel(1, "".join(lines), x=x, t=target, y=loss, w=total, flag=p.index_flag())


@emitter("torch.ops.aten.nll_loss_forward.default")
def nll_forward(p: Program, out: Any, x: Any, target: Any, weight: Any, reduction: int, ignore_index: int) -> None:
    """The loss and its number of rows."""
    _check_nll(x, target, weight, reduction)
    if p:
        loss, total = (p.new(o) for o in out)
        nll(p, p.value(x), p.value(target), loss, total, mean=reduction == 1, ignore=ignore_index)


@emitter("torch.ops.aten.nll_loss_backward.default")
def nll_backward(
    p: Program, out: Any, g: Any, x: Any, target: Any, weight: Any, reduction: int, ignore_index: int, total: Any
) -> None:
    """Minus the gradient where the class is the target."""
    _check_nll(x, target, weight, reduction)
    if not p:
        return
    v = {"g": p.value(g), "t": p.value(target), "w": p.value(total), "y": p.new(out)}
    share = f" / {v['w'].at('w', [])}" if reduction == 1 else ""
    body = unravel("i", v["y"].shape) + f"  const long c = {v['t'].at('t', ['c0'])};\n"
    body += f"  {v['y'].at('y', ['c0', 'c1'])} = c == c1 && c != {ignore_index} ? -{v['g'].at('g', [])}{share} : 0;\n"
    p.kernel(count(v["y"].shape), body, **v)


@emitter("cross_entropy")
def cross_entropy(
    p: Program, out: Any, x: Any, target: Any, weight: Any = None, size_average: Any = None, ignore_index: int = -100,
    reduce: Any = None, reduction: str = "mean", label_smoothing: float = 0.0,
) -> None:  # fmt: skip
    """A softmax in logarithms, then the loss."""
    _check_nll(x, target, weight, reduction)
    require(size_average is None and reduce is None and not label_smoothing, "smoothed labels or old options")
    if not p:
        return
    source = p.value(x)
    logs, total = p.temporary(source.shape), p.temporary(())
    along(p, {"x": source, "y": logs}, 1, _SOFTMAXES["log_softmax"])
    nll(p, logs, p.value(target), p.new(out), total, mean=reduction == "mean", ignore=ignore_index)
