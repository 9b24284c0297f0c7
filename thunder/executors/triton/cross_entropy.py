"""Cross entropy over rows of logits, and its derivative.

    forward    one program a row: logsumexp in one pass over the row, loss = logsumexp - logit of the label
               one more program: sum of the losses, number of rows that count
    backward   one program a row and block: (softmax - one hot) * gradient, with the saved logsumexp

The softmax is never stored. No atomics: results do not depend on the order of execution.
"""

from __future__ import annotations

import torch

from thunder.executors.triton.support import YES, Answer, tensor_supported

REDUCTIONS = ("mean", "sum", "none")


def cross_entropy_supported(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Answer:
    """Whether `cross_entropy` can serve a call of ``torch.nn.functional.cross_entropy``, and why not."""
    answer = tensor_supported("input", logits)
    if not answer[0]:
        return answer
    if logits.ndim != 2 or logits.shape[1] == 0:
        return False, f"input has the shape {tuple(logits.shape)}; (rows, classes) is supported"
    if labels.dtype != torch.int64 or labels.shape != logits.shape[:1]:
        return False, "target is not one int64 class for each row"
    if labels.device != logits.device:
        return False, f"target is on {labels.device}, input on {logits.device}"
    if labels.numel() > 1 and labels.stride(0) != 1:
        return False, "target is not contiguous"
    if weight is not None:
        return False, "weights of classes are not supported"
    if label_smoothing != 0.0:
        return False, "label_smoothing is not supported"
    if reduction not in REDUCTIONS:
        return False, f"reduction {reduction!r} is not one of {', '.join(REDUCTIONS)}"
    return YES


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, ignore_index: int = -100, reduction: str = "mean"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As ``torch.nn.functional.cross_entropy``; a label that is no class makes the loss NaN.

    Args:
        logits: (rows, classes), rows dense.
        labels: (rows,), int64.
        ignore_index: rows with this label count for nothing.
        reduction: "mean", "sum" or "none".

    Returns:
        The loss in the logits' dtype, (rows,) for "none", otherwise a scalar; and for the backward the logsumexp
        (rows,) and the number of rows that count (), both float32.
    """
    from thunder.executors.triton import kernels

    rows, classes = logits.shape
    losses, logsumexp = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    totals = torch.empty(2, dtype=torch.float32, device=logits.device)  # the reduced loss, the rows that count
    kernels.cross_entropy_forward(classes)(
        logits, labels, losses, logsumexp, logits.stride(0), classes, ignore_index, rows
    )
    if reduction == "none":
        return losses.to(logits.dtype), logsumexp, totals[1]
    loss = torch.empty((), dtype=logits.dtype, device=logits.device)
    kernels.cross_entropy_total(reduction == "mean")(losses, labels, loss, totals, rows, ignore_index)
    return loss, logsumexp, totals[1]


def cross_entropy_backward(
    grad: torch.Tensor,
    logits: torch.Tensor,
    labels: torch.Tensor,
    logsumexp: torch.Tensor,
    count: torch.Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    """Gradient of `cross_entropy` by the logits, in their shape and dtype, dense.

    Args:
        grad: of the loss, (rows,) for "none", otherwise a scalar.
        logits, labels, ignore_index, reduction: as in the forward.
        logsumexp, count: what the forward returned.
    """
    from thunder.executors.triton import kernels

    rows, classes = logits.shape
    result = torch.empty((rows, classes), dtype=logits.dtype, device=logits.device)
    kernels.cross_entropy_backward(classes, reduction == "mean")(
        grad,
        logits,
        labels,
        logsumexp,
        count,
        result,
        grad.stride(0) if grad.ndim else 0,
        logits.stride(0),
        classes,
        ignore_index,
        rows,
    )
    return result
