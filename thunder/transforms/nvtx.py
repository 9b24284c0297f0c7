"""Names for a profiler: an NVTX range around each operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from thunder import _C
from thunder.transforms._base import Transform, opaque_call


class NvtxRanges(Transform):
    """Put a range around each operation that runs, named after it and the user's line: ``torch.matmul model.py:12``.

    Args:
        push: called with the name before the operation; ``None``: ``torch.cuda.nvtx.range_push``.
        pop: called after it; ``None``: ``torch.cuda.nvtx.range_pop``.
        only: which operations get one, asked with each ``BoundSymbol``; ``None``: all.
    """

    def __init__(
        self,
        push: Callable[[str], Any] | None = None,
        pop: Callable[[], Any] | None = None,
        only: Callable[[_C.BoundSymbol], bool] | None = None,
    ) -> None:
        self.push = push or torch.cuda.nvtx.range_push
        self.pop = pop or torch.cuda.nvtx.range_pop
        self.only = only

    def transform_trace_post_optimization(self, trace: _C.Trace, *, kind: str) -> _C.Trace:
        """Two calls for each operation."""
        for symbol in trace.bound_symbols:
            if self.only is not None and not self.only(symbol):
                continue
            name = f"{symbol.name} {symbol.file}:{symbol.line}" if symbol.file else symbol.name
            trace = trace.insert_before(symbol, opaque_call, self.push, name)
            trace = trace.insert_after(symbol, opaque_call, self.pop)
        return trace
