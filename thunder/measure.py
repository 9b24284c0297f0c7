"""Side-by-side timing: candidates take turns, so that whatever slows the machine slows them all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Time of one call in seconds, over the repeats: the minimum and the quartiles."""

    minimum: float
    lower: float
    median: float
    upper: float

    def __str__(self) -> str:
        return f"{_unit(self.minimum)} (quartiles {_unit(self.lower)}..{_unit(self.upper)})"


def interleaved(
    candidates: Mapping[str, Callable[[], object]], *, repeats: int = 30, seconds: float = 3.0, warmup: int = 3
) -> dict[str, Timing]:
    """Times all candidates in turns.

    Args:
        candidates: functions without arguments, by name.
        repeats: turns; at least 3 are taken even when `seconds` is over.
        seconds: about how long everything may take together, after the warm-up.
        warmup: calls of each before the first measured one.

    Returns:
        The timing of one call for each name.
    """
    inner: dict[str, int] = {}
    budget = seconds / (repeats * len(candidates))
    for name, call in candidates.items():
        for _ in range(warmup):
            call()
        start = time.perf_counter()
        call()
        once = time.perf_counter() - start
        inner[name] = max(1, min(10_000, int(budget / max(once, 1e-7))))
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    deadline = time.perf_counter() + 2 * seconds
    for turn in range(repeats):
        if turn >= 3 and time.perf_counter() > deadline:
            break
        for name, call in candidates.items():
            times = range(inner[name])
            start = time.perf_counter()
            for _ in times:
                call()
            samples[name].append((time.perf_counter() - start) / inner[name])
    return {name: _timing(values) for name, values in samples.items()}


def _timing(values: list[float]) -> Timing:
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(min(values), lower, median, upper)


def _unit(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.2f} us"
    return f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"
