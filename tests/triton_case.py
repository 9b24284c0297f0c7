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
