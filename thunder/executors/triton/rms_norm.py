"""Root mean square normalisation over the last dimension, and its derivative.

    forward    one program a row, which it holds in registers: y = x * rstd * weight
    backward   as many programs as run at once, each over its share of the rows: dx, and a partial sum for dweight
               one more kernel adds the partial sums

No atomics: results do not depend on the order of execution.
"""

from __future__ import annotations

import torch

from thunder.executors.triton.support import (
    YES,
    Answer,
    multiprocessors,
    power_of_two,
    tensor_supported,
    warps_of_row,
)

MAX_WIDTH = 16384
"""Of a row, which one program holds in registers."""

WARPS = 16
"""Of the backward on each multiprocessor: enough to keep memory busy; more of them only make more partial sums."""


def rms_norm_supported(
    x: torch.Tensor, normalized_shape: tuple[int, ...], weight: torch.Tensor | None = None, eps: float | None = None
) -> Answer:
    """Whether `rms_norm` can serve a call of ``torch.nn.functional.rms_norm``, and why not."""
    answer = tensor_supported("input", x)
    if not answer[0]:
        return answer
    if len(normalized_shape) != 1 or x.ndim == 0 or x.shape[-1] != normalized_shape[0]:
        return False, f"normalized_shape {tuple(normalized_shape)} is not the last dimension of {tuple(x.shape)}"
    if not 0 < x.shape[-1] <= MAX_WIDTH:
        return False, f"rows of {x.shape[-1]} elements; 1 to {MAX_WIDTH} are supported"
    if not x.is_contiguous():
        return False, "input is not contiguous"
    if weight is None:
        return YES
    answer = tensor_supported("weight", weight)
    if answer[0] and (weight.device != x.device or weight.shape != x.shape[-1:]):
        return False, f"weight is {tuple(weight.shape)} on {weight.device}"
    return answer


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None = None, eps: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x / sqrt(mean(x**2) + eps) * weight`` over the last dimension.

    Args:
        x: (..., width), contiguous.
        weight: (width,), or None.
        eps: None: torch's default, the machine epsilon of x's dtype in which torch computes (float32).

    Returns:
        The result in the promoted dtype of x and weight, and the reciprocal root (rows,) in float32 for the backward.
    """
    from thunder.executors.triton import kernels

    width = x.shape[-1]
    rows = x.numel() // width
    dtype = x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    kernels.rms_norm_forward(power_of_two(width))(x, weight, y, rstd, width, float(eps), rows)
    return y, rstd


def rms_norm_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of `rms_norm` by x and by the weight, None without weight.

    Args:
        grad: of the result, in its shape; made contiguous where it is not.
        x, weight: as in the forward.
        rstd: what the forward returned.
    """
    from thunder.executors.triton import kernels

    width = x.shape[-1]
    rows = x.numel() // width
    grad = grad.contiguous()
    block = power_of_two(width)
    programs = min(rows, multiprocessors(x.device.index) * max(1, WARPS // warps_of_row(block)))
    dx = torch.empty_like(x)
    partial = None if weight is None else torch.empty((programs, width), dtype=torch.float32, device=x.device)
    kernels.rms_norm_backward(block)(grad, x, weight, rstd, dx, partial, width, rows, programs)
    if weight is None:
        return dx, None
    dweight = torch.empty_like(weight)
    kernels.sum_rows()(partial, dweight, programs, width)
    return dx, dweight
