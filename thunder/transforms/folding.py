"""Constant folding of what depends on frozen tensors alone: dequantised weights."""

from __future__ import annotations

from typing import Any

import torch

from thunder import _C
from thunder.transforms._base import Transform


class ConstantFolding(Transform):
    """Compute once, at compile time, what follows from parameters and buffers that require no grad.

    A weight kept as int8 with a scale is dequantised in each forward pass; folded, it is one constant of the program.
    The user's word is needed that these tensors keep their values: a write to one is not seen by compiled programs.

    Args:
        max_bytes: an operation whose results are larger stays.
        only: dotted names of the parameters and buffers to rely on; ``None``: all that require no grad.
    """

    def __init__(self, *, max_bytes: int = 1 << 30, only: list[str] | None = None) -> None:
        self.max_bytes = max_bytes
        self.only = only

    def __repr__(self) -> str:
        return f"ConstantFolding(max_bytes={self.max_bytes}, only={self.only!r})"

    def transform_trace(self, trace: _C.Trace, **info: Any) -> _C.Trace:
        """Replace each operation on known tensors by its value."""
        known = {
            proxy: info["tensors"][proxy].detach()
            for proxy, name in info["names"].items()
            if not proxy.requires_grad and (self.only is None or name in self.only)
        }
        made = set()  # what folding made: those are replaced, inputs are not
        for symbol in trace.bound_symbols:
            if symbol.effects or not symbol.flat_proxy_args or any(p not in known for p in symbol.flat_proxy_args):
                continue
            outs = symbol.flat_proxy_outs
            if sum(out.numel() * out.dtype.itemsize for out in outs) > self.max_bytes:
                continue
            value = _evaluate(symbol, known)
            known.update(zip(outs, torch.utils._pytree.tree_leaves(value), strict=True))
            made.add(symbol)
        return _fold(trace, made, known)


def _evaluate(symbol: _C.BoundSymbol, known: dict[_C.TensorProxy, torch.Tensor]) -> Any:
    def real(leaf: Any) -> Any:
        return known[leaf] if isinstance(leaf, _C.TensorProxy) else leaf

    args, kwargs = torch.utils._pytree.tree_map(real, (symbol.args, symbol.kwargs))
    with torch.no_grad():
        return symbol.sym(*args, **kwargs)


def _fold(trace: _C.Trace, made: set[_C.BoundSymbol], known: dict[_C.TensorProxy, torch.Tensor]) -> _C.Trace:
    """Only what something else still uses needs to be there; the rest falls to dead code removal."""
    symbols = trace.bound_symbols
    used = {p for symbol in symbols if symbol not in made for p in symbol.flat_proxy_args}
    for symbol in symbols:
        outs = symbol.flat_proxy_outs
        if symbol in made and all(out in used for out in outs):
            values = tuple(known[out] for out in outs)
            trace = trace.replace(symbol, lambda *a, **k: values if isinstance(symbol.output, tuple) else values[0])
    return trace
