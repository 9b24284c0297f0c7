"""``triton``: our Triton kernels in place of torch's cross entropy and rms_norm, each with its derivative.

Each operator hands its backward what it has computed anyway: the logsumexp of the rows and how many of them count, or
the reciprocal roots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from thunder.executors.triton import cross_entropy as run_cross_entropy
from thunder.executors.triton import cross_entropy_backward as run_cross_entropy_backward
from thunder.executors.triton import cross_entropy_supported, rms_norm_supported
from thunder.executors.triton import rms_norm as run_rms_norm
from thunder.executors.triton import rms_norm_backward as run_rms_norm_backward
from thunder.executors.triton.support import Answer
from thunder.extend.executor import OperatorExecutor
from thunder.extend.registry import register_executor

triton_executor = OperatorExecutor("triton")

# ---- cross entropy ----


def _cross_entropy_checker(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Answer:
    if size_average is not None or reduce is not None:
        return False, "size_average and reduce are not supported: write reduction="
    return cross_entropy_supported(input, target, weight, ignore_index, reduction, label_smoothing)


def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    loss, logsumexp, count = run_cross_entropy(input, target, ignore_index, reduction)
    return loss, logsumexp, count.clone()  # count lies within another tensor


def _cross_entropy_meta(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = input.shape[:1]
    floats = input.new_empty(rows, dtype=torch.float32)
    return input.new_empty(rows if reduction == "none" else ()), floats, input.new_empty((), dtype=torch.float32)


def _cross_entropy_backward(
    grad: Tensor, input: Tensor, target: Tensor, logsumexp: Tensor, count: Tensor, ignore_index: int, reduction: str
) -> Tensor:
    return run_cross_entropy_backward(grad, input, target, logsumexp, count, ignore_index, reduction)


cross_entropy_backward = triton_executor.register_operator(
    "cross_entropy_backward",
    fn=_cross_entropy_backward,
    meta=lambda grad, input, *rest: input.new_empty(input.shape),
)


def _cross_entropy_rule(ctx, grad, *_):
    input, target, _, _, ignore_index, _, reduction, _ = ctx.inputs
    _, logsumexp, count = ctx.outputs
    return cross_entropy_backward(grad, input, target, logsumexp, count, ignore_index, reduction), None


triton_executor.register_implementation(
    torch.nn.functional.cross_entropy,
    triton_executor.register_operator(
        "cross_entropy", fn=_cross_entropy, meta=_cross_entropy_meta, backward=_cross_entropy_rule, saves=2
    ),
    checker=_cross_entropy_checker,
)

# ---- rms_norm ----


def _rms_norm(
    input: Tensor, normalized_shape: list[int], weight: Tensor | None = None, eps: float | None = None
) -> tuple[Tensor, Tensor]:
    return run_rms_norm(input, weight, eps)


def _rms_norm_meta(
    input: Tensor, normalized_shape: list[int], weight: Tensor | None = None, eps: float | None = None
) -> tuple[Tensor, Tensor]:
    dtype = input.dtype if weight is None else torch.promote_types(input.dtype, weight.dtype)
    rows = input.numel() // input.shape[-1]
    return input.new_empty(input.shape, dtype=dtype), input.new_empty((rows,), dtype=torch.float32)


def _rms_norm_backward(grad: Tensor, input: Tensor, weight: Tensor | None, rstd: Tensor) -> tuple[Tensor, Tensor]:
    dx, dweight = run_rms_norm_backward(grad, input, weight, rstd)
    return dx, input.new_empty(0) if dweight is None else dweight


rms_norm_backward = triton_executor.register_operator(
    "rms_norm_backward",
    fn=_rms_norm_backward,
    meta=lambda grad, input, weight, rstd: (
        input.new_empty(input.shape),
        input.new_empty(0) if weight is None else weight.new_empty(weight.shape),
    ),
)


def _rms_norm_rule(ctx, grad, *_):
    input, _, weight, _ = ctx.inputs
    dx, dweight = rms_norm_backward(grad, input, weight, ctx.outputs[1])
    return dx if weight is None else (dx, dweight)


_rms_norm_operator = triton_executor.register_operator(
    "rms_norm", fn=_rms_norm, meta=_rms_norm_meta, backward=_rms_norm_rule, saves=1
)
for _name in (torch.nn.functional.rms_norm, torch.ops.aten.rms_norm.default):  # the second: under autocast
    triton_executor.register_implementation(_name, _rms_norm_operator, checker=rms_norm_supported)

register_executor(triton_executor)
