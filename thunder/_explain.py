"""``thunder.explain``: what a compiled callable has done so far."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

from thunder._stopwatch import stopwatch_for
from thunder.examine.inspect import compiled_claims


@dataclasses.dataclass
class Unit:
    """One unit that an executor claimed.

    Attributes:
        name: as in the trace.
        kind: ``"inference"``, ``"forward"`` or ``"backward"``.
        executor: who claimed it.
        state: ``"building"``, ``"new"``, ``"trusted"`` or ``"refused"``.
        reason: why it was refused, or None.
        operations: how many it has.
        runs, reference_runs: how often it ran, and how often torch ran it.
        milliseconds: mean time of a run by its executor, as the host sees it; None before the first.
        result_bytes: of its results.
        device: where it runs.
        device_milliseconds: median time that one of its first runs kept a GPU busy, from the first kernel's start to
            the last one's end; on the processor the time of all threads of the process. None before the second run.
    """

    name: str
    kind: str
    executor: str
    state: str
    reason: str | None
    operations: int
    runs: int
    reference_runs: int
    milliseconds: float | None
    result_bytes: int
    device: str
    device_milliseconds: float | None


@dataclasses.dataclass
class Explanation:
    """What ``thunder.explain`` tells; ``str()`` is a report.

    Attributes:
        calls, captures, fallbacks: calls, how many had to capture, how many ran the original.
        programs: one dict for each compiled program, newest first, as in ``thunder.compile_stats``.
        units: the claimed units of all programs.
        declines: (executor, operation, reason) -> how often.
    """

    calls: int
    captures: int
    fallbacks: int
    programs: list[dict[str, Any]]
    units: list[Unit]
    declines: dict[tuple[str, str, str], int]

    def __str__(self) -> str:
        lines = [f"{self.calls} calls, {self.captures} captures, {self.fallbacks} ran the original"]
        for i, p in enumerate(self.programs):
            lines.append(
                f"program {i}: {p['operations']} operations, {p['instructions']} instructions, {p['hits']} hits; "
                f"capture {p['capture_ms']:.2f} ms, passes {p['passes_ms']:.2f} ms, lowering {p['lower_ms']:.2f} ms"
                + (f"; {p['saved_bytes']} bytes saved for backward" if p["saved_bytes"] else "")
            )
        if self.units:
            by_state = collections.Counter((u.executor, u.state) for u in self.units)
            lines.append(", ".join(f"{e}: {n} units {s}" for (e, s), n in by_state.items()))
        for u in self.units:
            spent = "" if u.milliseconds is None else f", {u.milliseconds:.3f} ms a run"
            if u.device_milliseconds is not None:
                spent += f" ({u.device_milliseconds:.3f} ms on {u.device})"
            lines.append(
                f"  {u.name} ({u.kind}): {u.operations} operations, {u.state}, {u.runs} runs{spent}, "
                f"{u.result_bytes} bytes of results" + (f"; {u.reason}" if u.reason else "")
            )
        for (executor, name, reason), count in self.declines.items():
            lines.append(f"  {executor} declined {name} {count}x: {reason}")
        return "\n".join(lines)


def explain(fn: Any) -> Explanation:
    """Captures, programs, who runs what, and what was declined why.

    Args:
        fn: what ``thunder.jit`` returned.

    Raises:
        TypeError: it is something else.
    """
    import thunder

    stats = thunder.compile_stats(fn)
    claims = compiled_claims(fn)
    units = [_unit(*entry) for entry in claims.units] if claims is not None else []
    declines = dict(claims.declines) if claims is not None else {}
    return Explanation(stats.calls, stats.cache_misses, stats.fallbacks, stats.entries, units, declines)


def _unit(name: str, region: Any, kind: str) -> Unit:
    own = region.runs - region.reference_runs  # trusted runs
    size = sum(p.numel() * p.dtype.itemsize for p in region.trace.output)
    return Unit(
        name,
        kind,
        region.executor.name,
        region.state,
        region.reason,
        len(region.trace.operations()),
        region.runs,
        region.reference_runs,
        region.nanoseconds / own / 1e6 if own > 0 else None,
        size,
        str(region.timed.device if region.timed else stopwatch_for(region).device),
        region.timed.milliseconds() if region.timed else None,
    )
