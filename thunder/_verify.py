"""Is what an executor computes right? Its results on the live inputs are compared with torch's.

The bound follows from the dtype: what two right kernels that round in another order may differ by, measured against the
largest number of a result. Where that decides nothing, the region runs once more in float64, and who is nearer to that
is right.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from thunder import _C

# Relative to the largest magnitude of the result: a few hundred roundings, and sums of many thousands in low precision.
_BOUND = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def copies(tensors: list[Any]) -> list[Any]:
    """Copies that are laid out as the tensors are; in memory of their own."""
    return [_copy(t) if isinstance(t, Tensor) else t for t in tensors]


def _copy(t: Tensor) -> Tensor:
    t = t.detach()
    if t.is_sparse or t.layout != torch.strided or t.is_quantized:
        return t.clone()
    if t._is_zerotensor() or t.is_conj() or t.is_neg():
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t)
    span = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    memory = t.as_strided((span,), (1,), t.storage_offset()).clone()  # elements that share memory still do
    return memory.as_strided(t.shape, t.stride(), 0)


def judge(
    region: Any, before: list[Any], after: list[Any], expected: list[Any], results: list[Any] | None, error: Any
) -> bool:
    """Whether a region passes; says why not in one warning and hands it to torch.

    Args:
        region: the ``thunder._C.Region`` whose first run this is.
        before, after: its inputs, and the copies of them that the executor was given.
        expected, results: what torch and the executor computed; ``results`` is None where it raised ``error``.
    """
    with torch.no_grad():
        found = f"it raised {type(error).__name__}: {error}" if error is not None else ""
        shown = len(expected) - region.saved  # what an operator saves for its backward nobody else has
        found = (
            found
            or _writes(before, after)
            or _differs(region, before, expected[:shown], results and results[:shown])
            or _other_memory(before, after, expected[:shown], results and results[:shown])
        )
        if not found and region.differentiated:
            found = _gradient_differs(region, before)
    if not found:
        return True
    claims = region.claims()
    if region.operator is not None and claims is not None:  # the backward is made for it: the program is made anew
        claims.ban(region, found)
        raise _C.StaleProgram
    region.refuse(found)
    if claims is not None:
        claims.refused(region, found)
    return False


def body_of(trace: Any) -> Any:
    """A region as a Python function of its inputs, of any dtype and under any mode: its text is a program."""
    return function_of(trace, str(trace))


_NARROW = (
    (re.compile(r"\btorch\.(float32|bfloat16|float16|float|half)\b"), "torch.float64"),
    (re.compile(r"\btorch\.Tensor\.(float|bfloat16|half)\b"), "torch.Tensor.double"),
)


def _exact_body_of(trace: Any) -> Any:
    """The same for inputs in float64, whatever dtypes it says: casts on the way round nothing."""
    text = str(trace)
    for pattern, wide in _NARROW:
        text = pattern.sub(wide, text)
    return function_of(trace, text)


def function_of(trace: Any, text: str) -> Any:
    """A region whose text is ``text``."""
    names = trace.namespace()
    exec(text, names)
    return names["region"]


def _gradient_differs(region: Any, inputs: list[Any]) -> str:
    """The derivative that an operator brings along, against the one that torch has of what it stands for."""
    theirs = _gradients(region.origin_trace, inputs)
    ours = _gradients(region.trace, inputs)
    exact: list[Tensor | None] | None = None
    for i, (e, r) in enumerate(zip(theirs, ours, strict=True)):
        found = ""
        if e is not None and r is not None:
            found = _other_form(e, r) if e.shape != r.shape or e.dtype != r.dtype else _other_numbers(e, r)
        elif e is not None or r is not None:
            found = _other_numbers(torch.zeros_like(e if r is None else r), r if e is None else e)
        if found.startswith("is off") and e is not None and r is not None:
            exact = _gradients_in_float64(region.origin_trace, inputs) if exact is None else exact
            found = "" if exact and nearer(exact[i], e, r) else found
        if found:
            return f"its gradient for input {i} {found}"
    return ""


def _gradients_in_float64(trace: Any, inputs: list[Any]) -> list[Tensor | None]:
    """Empty: it cannot be run so, or there is no memory for it."""
    try:
        return _gradients(trace, [_wide(t) for t in inputs], _exact_body_of)
    except Exception:
        return []


def _wide(t: Any) -> Any:
    return t.double() if isinstance(t, Tensor) and t.is_floating_point() else t


def _gradients(trace: Any, inputs: list[Any], make: Any = body_of) -> list[Tensor | None]:
    body = make(trace)
    leaves = copies(inputs)
    wanted = [t for t in leaves if isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())]
    with torch.enable_grad(), _own_attention():
        for t in wanted:
            t.requires_grad_()
        outputs = [o for o in body(*leaves) if isinstance(o, Tensor) and o.requires_grad]
        given = [_uneven(o) for o in outputs]
        if not outputs or not wanted:
            return [None] * len(wanted)
        return list(torch.autograd.grad(outputs, wanted, given, allow_unused=True))


def _own_attention() -> Any:
    """Attention without ATen's use of cuDNN.

    Its backward keeps plans by the layout of query, key and value, and not of the gradient that comes in. Ours is laid
    out as no other: the reference could be wrong, and what the program itself computes after it.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def _uneven(out: Tensor) -> Tensor:
    """A gradient whose sums do not cancel: positive, and different from place to place."""
    places = torch.arange(out.numel(), device=out.device)
    return ((places % 1021) / 1021 + 0.25).to(out.dtype).reshape(out.shape)


def _writes(before: list[Any], after: list[Any]) -> str:
    for i, (b, a) in enumerate(zip(before, after, strict=True)):
        if isinstance(b, Tensor) and not _same_bits(b, a):
            return f"it wrote to its input {i}, which is not its to change"
    return ""


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if torch.equal(a, b):
        return True
    if a.dtype.is_floating_point or a.dtype.is_complex:
        return torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) and torch.equal(a.isnan(), b.isnan())
    return torch.equal(a, b)


def _differs(region: Any, inputs: list[Any], expected: list[Any], results: list[Any]) -> str:
    for i, (e, r) in enumerate(zip(expected, results, strict=True)):
        if not isinstance(e, Tensor):
            continue
        which = f"result {i}" if len(expected) > 1 else "its result"
        found = _other_form(e, r) or _other_numbers(e, r)
        if found and found.startswith("is off") and _nearer(region, inputs, i, e, r):
            found = ""
        if found:
            return f"{which} {found}"
    return ""


def _other_form(e: Tensor, r: Any) -> str:
    if not isinstance(r, Tensor):
        return f"is a {type(r).__name__} and no tensor"
    for what in ("shape", "dtype", "device"):
        if getattr(e, what) != getattr(r, what):
            return f"has {what} {_plain(getattr(r, what))} where torch gives {_plain(getattr(e, what))}"
    strides = [(s, t) for n, s, t in zip(e.shape, e.stride(), r.stride(), strict=True) if n > 1]
    if e.numel() and any(s != t for s, t in strides):
        return f"has strides {r.stride()} where torch gives {e.stride()}"
    return ""


def _other_memory(before: list[Any], after: list[Any], expected: list[Any], results: list[Any]) -> str:
    """What is a view of an input in torch, is one; nothing else shares memory with an input or another result."""
    for i, (e, r) in enumerate(zip(expected, results, strict=True)):
        which = f"result {i}" if len(expected) > 1 else "its result"
        theirs, ours = _sharing(e, before), _sharing(r, after)
        if ours and not theirs:
            return f"{which} is in the memory of its input {ours[0]} where torch's has its own"
        if theirs and not ours:
            return f"{which} has memory of its own where torch's is a view of its input {theirs[0]}"
        alone = [j for j in _sharing(r, results[:i]) if _overlap(r, results[j]) and not _share(e, expected[j])]
        if alone:
            return f"{which} is in the memory of result {alone[0]} where torch's are apart"
    return ""


def _sharing(t: Any, others: list[Any]) -> list[int]:
    return [i for i, other in enumerate(others) if _share(t, other)]


def _share(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or not a.numel() or not b.numel():
        return False
    return torch._C._is_alias_of(a, b)


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Of two tensors in one storage: parts of it that are apart may lie between each other."""
    if a.layout != torch.strided or b.layout != torch.strided or a.element_size() != b.element_size():
        return True
    used = torch.zeros(a.untyped_storage().nbytes() // a.element_size(), dtype=torch.bool, device=a.device)
    used.as_strided(a.shape, a.stride(), a.storage_offset()).fill_(True)
    return bool(used.as_strided(b.shape, b.stride(), b.storage_offset()).any())


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, torch.Size) else value


def _other_numbers(e: Tensor, r: Tensor) -> str:
    if not e.numel():
        return ""
    if not (e.dtype.is_floating_point or e.dtype.is_complex):
        return "" if torch.equal(e, r) else "differs from torch's"
    if e.dtype in (torch.float32, torch.float64) and _clearly_near(e, r):
        return ""
    wide = torch.complex128 if e.dtype.is_complex else torch.float64
    a, b = e.to(wide), r.to(wide)
    if not torch.equal(a.isnan(), b.isnan()):
        return "has NaN where torch gives numbers" if b.isnan().any() else "has numbers where torch gives NaN"
    a, b = a.nan_to_num(), b.nan_to_num()
    infinite = a.abs() > 1e300
    if not torch.equal(infinite, b.abs() > 1e300) or not torch.equal(a[infinite], b[infinite]):
        return "has infinities where torch has none, or none where torch has some"
    a, b = a.masked_fill(infinite, 0), b.masked_fill(infinite, 0)
    off = (a - b).abs().max().item()
    size = a.abs().max().item()
    bound = _bound(e.dtype) * max(size, 1e-30 if size else 1.0)
    return "" if off <= bound else f"is off by {off:.3g} where the largest number is {size:.3g}"


def _clearly_near(e: Tensor, r: Tensor) -> bool:
    """Within half of what they may differ by, all of them finite: what is usual costs a few passes over memory."""
    low, high = (m.item() for m in torch.aminmax(e))
    size = max(-low, high)
    return 0 < size < 1e30 and (e - r).abs_().max().item() <= _bound(e.dtype) * size / 2  # NaN compares false


def _bound(dtype: torch.dtype) -> float:
    real = dtype.to_real() if dtype.is_complex else dtype
    return _BOUND.get(real, 0.25)  # eight bits and fewer


def _nearer(region: Any, inputs: list[Any], i: int, e: Tensor, r: Tensor) -> bool:
    """Does float64 say that the executor is about as near to the truth as torch?"""
    if e.dtype == torch.float64 or e.dtype.is_complex:
        return False
    try:
        truth = _exact_body_of(region.origin_trace or region.trace)(*map(_wide, inputs))[i]
    except Exception:  # it cannot be run so: nothing decides
        return False
    return nearer(truth, e, r)


def nearer(truth: Any, e: Tensor, r: Tensor) -> bool:
    """Whether ``r`` is about as near to ``truth``, a run in float64, as torch's ``e``."""
    if not isinstance(truth, Tensor) or truth.dtype != torch.float64:
        return False
    ours, theirs = (r.double() - truth).abs().max().item(), (e.double() - truth).abs().max().item()
    return ours <= 4 * theirs
