"""Functions that operators stand for in tests/test_executors.py: importable, as those of a library."""

from __future__ import annotations

from torch import Tensor

SCALE = 3.0
ran: list[str] = []


def scaled(x: Tensor, power: int = 1, *, shift: float = 0.0) -> Tensor:
    """Reads a global, notes that it ran."""
    return x**power * SCALE + shift


def closed(factor: float):
    """A function with a variable of its own."""

    def times(x: Tensor) -> Tensor:
        return x * factor

    return times


thrice = closed(3.0)
thrice.__qualname__ = "thrice"
thrice.__name__ = "thrice"
