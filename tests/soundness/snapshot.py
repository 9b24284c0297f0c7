"""Copies of results and of state, as they are now, and where two such copies differ."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from tests.harness.compare import TOLERANCE


@dataclasses.dataclass
class Leaf:
    """A tensor as it was."""

    kind: type
    dtype: torch.dtype
    shape: tuple[int, ...]
    requires_grad: bool
    values: torch.Tensor
    grad: Any


def snapshot(value: Any, depth: int = 0, held: dict[int, int] | None = None) -> Any:
    """``value`` with its tensors copied, objects and containers opened; what was met before is a number."""
    held = {} if held is None else held
    if isinstance(value, torch.Tensor):
        if id(value) in held:
            return ("again", held[id(value)])
        held[id(value)] = len(held)
        plain = value.detach()
        values = (plain.to_dense() if plain.layout != torch.strided else plain).clone()
        grad = snapshot(value.grad, depth + 1, held) if is_leaf(value) else None
        return Leaf(type(value), value.dtype, tuple(value.shape), requires_grad(value), values, grad)
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return value
    if id(value) in held or depth > 12:
        return ("again", held.get(id(value)))
    held[id(value)] = len(held)
    name = type(value).__name__
    if isinstance(value, dict):
        # The keys of hooks count up over the whole process.
        keys = [k if isinstance(k, str) else "hook" if callable(v) else repr(k) for k, v in value.items()]
        return (name, *[(k, snapshot(v, depth + 1, held)) for k, v in zip(keys, value.values(), strict=True)])
    if isinstance(value, set | frozenset):
        return (name, *sorted(map(repr, value)))
    if isinstance(value, list | tuple) or name == "deque":
        return (name, *[snapshot(v, depth + 1, held) for v in value])
    if callable(value) and not isinstance(value, torch.nn.Module):
        return getattr(value, "__name__", name)
    slots = [s for c in type(value).__mro__ for s in getattr(c, "__slots__", ())]
    parts = {s: getattr(value, s) for s in slots if hasattr(value, s)} | getattr(value, "__dict__", {})
    return (name, *[(k, snapshot(v, depth + 1, held)) for k, v in parts.items()])


def holds(shot: Any, dtype: torch.dtype) -> bool:
    """Whether a tensor of that dtype is part of what was copied."""
    if isinstance(shot, Leaf):
        return shot.dtype == dtype or holds(shot.grad, dtype)
    return isinstance(shot, tuple) and any(holds(part, dtype) for part in shot)


def difference(theirs: Any, ours: Any, where: str = "", single: bool = False) -> str:
    """The first place where ``ours`` is not ``theirs``; "" when there is none.

    single: float32 took part in the computation, so what is wider is as exact as that.
    """
    if isinstance(theirs, Leaf) and isinstance(ours, Leaf):
        for field in ("kind", "dtype", "shape", "requires_grad"):
            a, b = getattr(theirs, field), getattr(ours, field)
            if a != b:
                return f"{where}: {field} {b} where eager has {a}"
        wider = single and theirs.dtype == torch.float64
        rtol, atol = TOLERANCE.get(torch.float32 if wider else theirs.dtype, (0.0, 0.0))
        if not torch.allclose(wide(ours.values), wide(theirs.values), rtol=rtol, atol=atol, equal_nan=True):
            return f"{where}: {ours.values} where eager has {theirs.values}"
        return difference(theirs.grad, ours.grad, f"{where}.grad", single)
    if isinstance(theirs, tuple) and isinstance(ours, tuple):
        if len(theirs) != len(ours):
            return f"{where}: {ours} where eager has {theirs}"
        named = len(theirs) == 2 and isinstance(theirs[0], str)
        for i, (a, b) in enumerate(zip(theirs, ours, strict=True)):
            found = difference(a, b, f"{where}.{theirs[0]}" if named and i else where, single)
            if found:
                return found
        return ""
    if type(theirs) is not type(ours):
        return f"{where}: {ours!r} where eager has {theirs!r}"
    if isinstance(theirs, float):
        same = math.isclose(theirs, ours, rel_tol=1e-5, abs_tol=1e-6) or (theirs != theirs and ours != ours)
        same = same and math.copysign(1, theirs) == math.copysign(1, ours)
    else:
        same = theirs == ours
    return "" if same else f"{where}: {ours!r} where eager has {theirs!r}"


def is_leaf(t: torch.Tensor) -> bool:
    """As the tensor says; no, where torch does not say."""
    try:
        return t.is_leaf
    except RuntimeError:  # a view whose base was written to since, in another mode
        return False


def requires_grad(t: torch.Tensor) -> bool:
    """As the tensor says, but for a view made under no_grad: it says what its base says, and has no gradient."""
    try:
        return t.requires_grad and not (t._is_view() and t.grad_fn is None)
    except RuntimeError:  # likewise
        return False


def wide(t: torch.Tensor) -> torch.Tensor:
    """In double precision."""
    return t.to(torch.complex128) if t.is_complex() else t.double()
