"""Compares what eager returned with what a compiled callable returned: structure, dtype, shape, values."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

# Relative and absolute tolerance for "the same computation in another order". Integers and booleans must be equal.
TOLERANCE: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-7, 1e-9),
    torch.float32: (1.3e-5, 1e-5),
    torch.float16: (2e-3, 1e-3),
    torch.bfloat16: (1.6e-2, 1e-2),
    torch.complex128: (1e-7, 1e-9),
    torch.complex64: (1.3e-5, 1e-5),
}


def clone(value: Any) -> Any:
    """A deep copy: each tensor is cloned once, and keeps its strides, requires_grad and views of a shared storage."""
    try:
        return copy.deepcopy(value)
    except NotImplementedError:  # sparse layouts have no storage to copy
        return _clone_parts(value)


def _clone_parts(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {k: _clone_parts(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_clone_parts(v) for v in value)
    return copy.deepcopy(value)


def differences(eager: Any, ours: Any, *, strides: bool = False) -> list[str]:
    """Every place where `ours` is not what eager returned, as readable lines; empty when all is equal.

    Walks tuples, lists, mappings, dataclasses and objects with a `__dict__` (cache objects) alike.

    Args:
        eager: the expected value.
        ours: the value to judge.
        strides: also compare the strides of tensors.
    """
    found: list[str] = []
    _walk(eager, ours, "output", strides, found, set())
    return found


def _walk(a: Any, b: Any, where: str, strides: bool, found: list[str], seen: set[int]) -> None:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        _tensors(a, b, where, strides, found)
        return
    if type(a) is not type(b):
        found.append(f"{where}: {type(a).__name__} in eager, {type(b).__name__} here")
        return
    if a is None or isinstance(a, bool | int | str | bytes | torch.dtype | torch.device):
        if a != b:
            found.append(f"{where}: {a!r} in eager, {b!r} here")
        return
    if isinstance(a, float | complex):
        same = a == b or (a != a and b != b) or math.isclose(abs(a - b), 0.0, abs_tol=1e-6 + 1e-5 * abs(a))
        if not same:
            found.append(f"{where}: {a!r} in eager, {b!r} here")
        return
    if id(a) in seen:
        return
    seen.add(id(a))
    children_a, children_b = children(a), children(b)
    if children_a is None or children_b is None:
        return
    if list(children_a) != list(children_b):
        found.append(f"{where}: parts {list(children_a)} in eager, {list(children_b)} here")
        return
    for key, part in children_a.items():
        _walk(part, children_b[key], f"{where}{key}", strides, found, seen)


def children(value: Any) -> dict[str, Any] | None:
    """The parts of a container by their access path, or None when there is nothing to look into."""
    if isinstance(value, Mapping):
        return {f"[{k!r}]": v for k, v in value.items()}
    if isinstance(value, list | tuple):
        return {f"[{i}]": v for i, v in enumerate(value)}
    if isinstance(value, set | frozenset):
        return {f"{{{item!r}}}": None for item in sorted(value, key=repr)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f".{field.name}": getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, type) or callable(value) or not hasattr(value, "__dict__"):
        return None
    return {f".{k}": v for k, v in vars(value).items()}


def _tensors(a: Any, b: Any, where: str, strides: bool, found: list[str]) -> None:
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        found.append(f"{where}: {type(a).__name__} in eager, {type(b).__name__} here")
        return
    checks = ["type", "dtype", "shape", "device", "layout", "requires_grad"]
    if strides and a.layout == torch.strided:
        checks.append("stride")
    for what in checks:
        left, right = _property(a, what), _property(b, what)
        if left != right:
            found.append(f"{where}: {what} {left} in eager, {right} here")
            return
    message = values_differ(a, b)
    if message:
        found.append(f"{where}: {message}")


def _property(tensor: torch.Tensor, what: str) -> Any:
    if what == "type":
        return type(tensor)
    if what == "shape":
        return tuple(tensor.shape)
    value = getattr(tensor, what)
    return value() if what == "stride" else value


def values_differ(a: torch.Tensor, b: torch.Tensor) -> str | None:
    """A line that says by how much two tensors of equal dtype and shape differ, or None when they agree."""
    a, b = a.detach(), b.detach()
    if a.layout != torch.strided:
        a, b = a.to_dense(), b.to_dense()
    a, b = a.resolve_conj().resolve_neg(), b.resolve_conj().resolve_neg()
    if a.numel() == 0:
        return None
    if a.dtype == torch.complex32:  # has no comparison of its own; widening is exact
        a, b = a.to(torch.complex64), b.to(torch.complex64)
    if a.dtype not in TOLERANCE:
        if a.dtype.itemsize == 1 and a.dtype.is_floating_point:
            a, b = a.view(torch.uint8), b.view(torch.uint8)
        if torch.equal(a, b):
            return None
        return f"{int((a != b).sum())} of {a.numel()} values differ"
    relative, absolute = TOLERANCE[a.dtype]
    close = torch.isclose(a, b, rtol=relative, atol=absolute, equal_nan=True)
    if bool(close.all()):
        return None
    gap = (a - b).abs().nan_to_num(math.inf)
    return f"{int((~close).sum())} of {a.numel()} values differ, by up to {float(gap.max()):.3g}"


def gradient_tolerance(dtype: torch.dtype) -> float:
    """What rounding in another order may cost a gradient, relative to the terms that it is the sum of.

    Each of the n terms of a sum contributes at most half a unit in the last place; kernels for float16 and bfloat16 add
    in float32 and round at the end of each operation, so that few operations count and not many terms.
    """
    return torch.finfo(dtype).eps * (8 if dtype in (torch.float16, torch.bfloat16) else 512)


def gradients_differ(
    eager: Sequence[torch.Tensor | None], ours: Sequence[torch.Tensor | None], names: Sequence[str] | None = None
) -> list[str]:
    """Every gradient that is not eager's, as readable lines; empty when all are equal within rounding.

    A gradient that is None in eager must be None here: an optimizer skips the one and applies weight decay to the
    other. Strides are not compared.
    """
    if len(eager) != len(ours):
        return [f"{len(eager)} gradients in eager, {len(ours)} here"]
    found = []
    largest = max((_largest(t) for t in eager if isinstance(t, torch.Tensor)), default=0.0)
    for i, (a, b) in enumerate(zip(eager, ours, strict=True)):
        where = names[i] if names else f"[{i}]"
        lines = [line for line in differences(a, b) if "values differ" not in line]
        if not lines and isinstance(a, torch.Tensor):
            lines = _beyond_rounding(a.detach(), b.detach(), largest)
        found += [f"{where}{line.removeprefix('output')}" for line in lines]
    return found


def _largest(tensor: torch.Tensor) -> float:
    tensor = tensor.detach()
    tensor = (tensor.to_dense() if tensor.layout != torch.strided else tensor).abs()
    finite = tensor[tensor.isfinite()]
    return float(finite.max()) if finite.numel() else 0.0


def _beyond_rounding(a: torch.Tensor, b: torch.Tensor, largest: float) -> list[str]:
    """`largest`: of all gradients of the step. The terms of a sum that cancels to nearly nothing (a bias before a
    normalisation) do not show in the sum: they are taken to be a sixteenth of the largest, and never below 1/512.
    """
    a, b = (t.to_dense() if t.layout != torch.strided else t for t in (a, b))
    if not (a.is_floating_point() or a.is_complex()):
        line = values_differ(a, b)
        return [f": {line}"] if line else []
    scale = _largest(a)
    bound = gradient_tolerance(a.dtype) * (scale + largest / 16 + 1 / 512)
    wrong = ~torch.isclose(a, b, rtol=0, atol=bound, equal_nan=True)
    if not bool(wrong.any()):
        return []
    gap = float((a - b).abs().nan_to_num(math.inf).max())
    return [f": {int(wrong.sum())} of {a.numel()} values differ, by up to {gap:.3g} (largest {scale:.3g})"]


def as_float64(value: Any) -> Any:
    """A copy of nested inputs with floating tensors in float64 and complex ones in complex128."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            return value.double()
        return value.to(torch.complex128) if value.is_complex() else value.clone()
    if isinstance(value, dict):
        return {k: as_float64(v) for k, v in value.items()}
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(as_float64(v) for v in value)
    return value


def _errors(value: Any, exact: Any, out: list[float]) -> None:
    """Largest distance to the float64 values, one per floating tensor, in a fixed order."""
    if isinstance(value, torch.Tensor) and isinstance(exact, torch.Tensor):
        if value.is_floating_point() and value.shape == exact.shape and value.numel():
            out.append(float((value.detach().double() - exact.detach()).abs().nan_to_num(math.inf).max()))
        return
    left, right = children(value), children(exact)
    if left is not None and right is not None:
        for key, part in left.items():
            if key in right:
                _errors(part, right[key], out)


def as_exact_as_eager(eager: Any, ours: Any, exact: Any) -> bool:
    """Whether `ours` is about as near to the float64 result as eager is: within twice its error per tensor.

    The judge for a doubtful case, when values differ by more than the tolerance; structure must already be equal.
    """
    eager_errors: list[float] = []
    our_errors: list[float] = []
    _errors(eager, exact, eager_errors)
    _errors(ours, exact, our_errors)
    return (
        bool(eager_errors)
        and len(eager_errors) == len(our_errors)
        and all(math.isfinite(o) and o <= 2 * e + 1e-7 for e, o in zip(eager_errors, our_errors, strict=True))
    )
