"""The device code, and how each kernel is launched. Imports Triton.

A factory such as `rms_norm_forward` gives the launcher for one set of compile-time constants, always the same one.
Offsets of rows are 64 bits wide; within a row 32 bits are enough.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl

from thunder._C import CudaKernel
from thunder.executors.triton.support import power_of_two, warps_of_row
from thunder.extend.triton import triton_kernel

# ---- cross entropy ----


@triton.jit
def _cross_entropy_forward(
    logits, labels, losses, logsumexps, stride, classes, ignore, rows, BLOCK: tl.constexpr
):  # one program a row; `rows` is for the grid
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    logits += row * stride
    largest = float("-inf")
    total = 0.0
    for start in range(0, classes, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(logits + at, mask=at < classes, other=float("-inf")).to(tl.float32)
        before = largest
        largest = tl.maximum(largest, tl.max(x))
        base = tl.where(largest == float("-inf"), 0.0, largest)  # a row of -inf so far
        total = total * tl.exp(before - base) + tl.sum(tl.exp(x - base))
    logsumexp = tl.log(total) + largest
    tl.store(logsumexps + row, logsumexp)
    known = (label >= 0) & (label < classes)
    picked = tl.load(logits + label, mask=known, other=float("nan")).to(tl.float32)
    tl.store(losses + row, tl.where(label == ignore, 0.0, logsumexp - picked))


@triton.jit
def _cross_entropy_total(losses, labels, loss, totals, rows, ignore, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, rows, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < rows
        total += tl.load(losses + at, mask=inside, other=0.0)
        count += (inside & (tl.load(labels + at, mask=inside, other=0) != ignore)).to(tl.float32)
    counted = tl.sum(count)
    result = tl.sum(total)
    if MEAN:
        result = result / counted
    tl.store(loss, result.to(loss.dtype.element_ty))
    tl.store(totals, result)
    tl.store(totals + 1, counted)


@triton.jit
def _cross_entropy_backward(
    grads, logits, labels, logsumexps, count, result, grad_stride, stride, classes, ignore, rows,
    MEAN: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < classes
    label = tl.load(labels + row)
    grad = tl.load(grads + row * grad_stride).to(tl.float32)
    if MEAN:
        grad = grad / tl.load(count)
    x = tl.load(logits + row * stride + at, mask=inside).to(tl.float32)
    slope = tl.exp(x - tl.load(logsumexps + row)) - (at == label).to(tl.float32)
    slope = tl.where(label == ignore, 0.0, slope * grad)
    tl.store(result + row * classes + at, slope.to(result.dtype.element_ty), mask=inside)


@functools.cache
def cross_entropy_forward(classes: int) -> CudaKernel:
    """Takes (logits, labels, losses, logsumexps, stride, classes, ignore, rows)."""
    block = min(power_of_two(classes), 16384)
    return triton_kernel(
        _cross_entropy_forward, lambda meta: meta["rows"], num_warps=min(8, warps_of_row(block)), BLOCK=block
    )


@functools.cache
def cross_entropy_total(mean: bool) -> CudaKernel:
    """Takes (losses, labels, loss, totals, rows, ignore)."""
    return triton_kernel(_cross_entropy_total, 1, num_warps=8, MEAN=mean, BLOCK=2048)


@functools.cache
def cross_entropy_backward(classes: int, mean: bool) -> CudaKernel:
    """Takes (grads, logits, labels, logsumexps, count, result, grad_stride, stride, classes, ignore, rows)."""
    block = min(power_of_two(classes), 4096)
    blocks = -(-classes // block)
    return triton_kernel(
        _cross_entropy_backward,
        lambda meta: (meta["rows"], blocks),
        num_warps=8 if block > 1024 else 4,
        MEAN=mean,
        BLOCK=block,
    )


# ---- rms_norm ----


@triton.jit
def _rms_norm_forward(xs, weights, ys, rstds, width, eps, rows, BLOCK: tl.constexpr):  # one program a row
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    x = tl.load(xs + row * width + at, mask=inside, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x) / width + eps)
    tl.store(rstds + row, rstd)
    y = x * rstd
    if weights is not None:
        y = y * tl.load(weights + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(ys + row * width + at, y.to(ys.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm_backward(grads, xs, weights, rstds, dxs, partials, width, rows, programs, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    if weights is not None:
        weight = tl.load(weights + at, mask=inside, other=0.0).to(tl.float32)
        partial = tl.zeros((BLOCK,), tl.float32)
    for row in range(program, rows, programs):
        place = row.to(tl.int64) * width + at
        x = tl.load(xs + place, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grads + place, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstds + row)
        normal = x * rstd
        if weights is not None:
            partial += grad * normal
            grad = grad * weight
        dx = rstd * (grad - normal * (tl.sum(grad * normal) / width))
        tl.store(dxs + place, dx.to(dxs.dtype.element_ty), mask=inside)
    if weights is not None:
        tl.store(partials + program * width + at, partial, mask=inside)


@triton.jit
def _sum_rows(xs, sums, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        total += tl.load(xs + row[:, None] * width + column[None, :], mask=inside, other=0.0)
    tl.store(sums + column, tl.sum(total, 0).to(sums.dtype.element_ty), mask=column < width)


@functools.cache
def rms_norm_forward(block: int) -> CudaKernel:
    """Takes (xs, weights, ys, rstds, width, eps, rows)."""
    return triton_kernel(_rms_norm_forward, lambda meta: meta["rows"], num_warps=warps_of_row(block), BLOCK=block)


@functools.cache
def rms_norm_backward(block: int) -> CudaKernel:
    """Takes (grads, xs, weights, rstds, dxs, partials, width, rows, programs)."""
    return triton_kernel(_rms_norm_backward, lambda meta: meta["programs"], num_warps=warps_of_row(block), BLOCK=block)


@functools.cache
def sum_rows() -> CudaKernel:
    """Takes (xs, sums, rows, width)."""
    columns = 16
    return triton_kernel(_sum_rows, lambda meta: -(-meta["width"] // columns), ROWS=64, COLUMNS=columns)
