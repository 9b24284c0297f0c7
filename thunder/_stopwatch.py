"""Time that a unit takes on its device, of a few of its runs: so that knowing it costs the others nothing."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

RUNS = 16  # that are timed, after the first one, which may load and tune kernels


class Stopwatch:
    """Between two events of the stream on a GPU; else time of the processor, of all threads of the process.

    Attributes:
        device: where the unit runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seen = 0
        self._pairs: list[tuple[Any, Any]] = []

    def start(self) -> Any:
        """What ``stop`` wants; None: this run is not timed."""
        self._seen += 1
        if self._seen == 1:
            return None
        if self.device.type != "cuda":
            return time.process_time_ns()
        return None if torch.cuda.is_current_stream_capturing() else self._event()

    def stop(self, started: Any) -> bool:
        """Whether that was enough."""
        if started is not None:
            self._pairs.append((started, self._event() if self.device.type == "cuda" else time.process_time_ns()))
        return self._seen > RUNS

    def milliseconds(self) -> float | None:
        """The median; waits for the GPU. None: no run was timed."""
        times = [self._between(*pair) for pair in list(self._pairs)]
        return statistics.median(times) if times else None

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _between(self, start: Any, end: Any) -> float:
        if self.device.type != "cuda":
            return (end - start) / 1e6
        end.synchronize()
        return start.elapsed_time(end)


def stopwatch_for(region: Any) -> Stopwatch:
    """For a unit: on the GPU that its results are on, if any are."""
    devices = [p.device for p in region.trace.output]
    return Stopwatch(next((d for d in devices if d is not None and d.type == "cuda"), torch.device("cpu")))
