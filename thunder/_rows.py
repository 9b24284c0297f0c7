"""Softmax in two halves, for programs whose regions are fused: numbers of each row, and what follows from them."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1 << 24  # elements in float32 at a time


def logsumexp(x: Tensor, dim: int) -> Tensor:
    """The logarithm of the sum of exponentials along a dimension, which stays, in float32 (float64 in that).

    Run by torch it needs little memory; traced, it is the operations in which code generators recognise a softmax.
    """
    if type(x) is Tensor and x.numel() > _CHUNK and x.ndim > 1:
        along = 0 if dim % x.ndim else 1
        rows = max(1, _CHUNK * x.shape[along] // x.numel())
        return torch.cat([_logsumexp(part, dim) for part in x.split(rows, along)], along)
    return _logsumexp(x, dim)


def _logsumexp(x: Tensor, dim: int) -> Tensor:
    wide = _wide(x)
    most = wide.amax(dim, keepdim=True)
    return (wide - most).exp().sum(dim, keepdim=True).log() + most


def log_softmax(x: Tensor, logsumexp: Tensor, dtype: torch.dtype) -> Tensor:
    """``torch.log_softmax`` of ``x``, whose ``logsumexp`` is known."""
    logarithms = _wide(x) - logsumexp
    return logarithms if logarithms.dtype == torch.float64 else logarithms.to(dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
