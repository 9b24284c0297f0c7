"""Triton functions that tests compile; needs Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scaled(x, out, n, alpha, m: tl.int64, BLOCK: tl.constexpr, EVEN: tl.constexpr = True):
    """out = x * alpha + m for n elements."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < n) * alpha + m, mask=at < n)


@triton.jit
def broken(x):
    tl.store(x, undefined_name)  # noqa: F821


@triton.jit
def by_descriptor(x, out, rows, columns, BLOCK: tl.constexpr):
    """out = x + 1, through tensor descriptors made on the device, which live in scratch memory."""
    source = tl.make_tensor_descriptor(x, shape=[rows, columns], strides=[columns, 1], block_shape=[BLOCK, BLOCK])
    target = tl.make_tensor_descriptor(out, shape=[rows, columns], strides=[columns, 1], block_shape=[BLOCK, BLOCK])
    row = tl.program_id(0) * BLOCK
    column = tl.program_id(1) * BLOCK
    target.store([row, column], source.load([row, column]) + 1)
