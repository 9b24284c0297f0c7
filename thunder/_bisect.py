"""``thunder.bisect``: which claim of an executor makes the results differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from thunder.examine.inspect import _compare, _Run, compiled_claims


@dataclasses.dataclass
class Guilty:
    """What a bisection found.

    Attributes:
        unit: the name of the unit in the trace, such as ``torchcompile_3``; None: nothing differs.
        executor: who claimed it.
        trace: the operations of the unit, a ``thunder.Trace``.
        differences: what differs from the torch executor with it, in words.
        tried: how many programs were compiled.
    """

    unit: str | None
    executor: str | None
    trace: Any
    differences: list[str]
    tried: int

    def __str__(self) -> str:
        if self.unit is None:
            return f"nothing differs from the torch executor ({self.tried} programs tried)"
        found = "\n    ".join(self.differences)
        return f"{self.unit} of executor {self.executor!r} ({self.tried} programs tried):\n    {found}\n{self.trace}"


def bisect(fn: Any, *args: Any, executors: Sequence[Any], **kwargs: Any) -> Guilty:
    """Find the first claim with which the results or gradients differ from those of the torch executor.

    Claims are taken in the order of the program, more and more of them (``thunder.jit(fuel=n)``), without verification.

    Args:
        fn: an ``nn.Module`` or another callable; it is copied.
        args, kwargs: those of a call.
        executors: as for ``thunder.jit``.

    Returns:
        a ``Guilty``; print it.

    Raises:
        whatever the call raises with the torch executor alone.
    """
    import thunder

    seed = torch.initial_seed()
    tried = 0

    def run(**options: Any) -> tuple[_Run, Any]:
        nonlocal tried
        tried += 1
        one = _Run(fn, args, kwargs, seed)
        one.fn = thunder.jit(one.fn, fallback="error", **options)
        with torch.random.fork_rng():
            one.run()
        return one, one.fn

    plain, _ = run(executors=[])
    if plain.error is not None:
        raise plain.error

    def differences(fuel: int | None) -> tuple[list[str], Any]:
        one, compiled = run(executors=executors, verify="off", tier="block", fuel=fuel)
        if one.error is not None:
            return [f"it raises {type(one.error).__name__}: {one.error}"], compiled
        wrong = [c for c in _compare(one, plain, None) if not c.right]
        return [f"{c.name} differs by {c.difference}" for c in wrong], compiled

    found, compiled = differences(None)
    if not found:
        return Guilty(None, None, None, [], tried)
    low, high = 0, len(_units(compiled))
    while high - low > 1:
        middle = (low + high) // 2
        wrong, _ = differences(middle)
        low, high = (low, middle) if wrong else (middle, high)
    found, compiled = differences(high)
    name, region, _ = _units(compiled)[high - 1]
    return Guilty(name, region.executor.name, region.trace, found, tried)


def _units(compiled: Any) -> list[tuple[str, Any, str]]:
    claims = compiled_claims(compiled)
    return claims.units if claims is not None else []
