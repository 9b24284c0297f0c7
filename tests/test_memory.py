"""Calling and compiling for ever leaves the process as large as it was.

The tolerances are far below what a leak of one tensor per call (or per compile) would add, and the tests say so by
planting exactly that leak.
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable

import pytest
import torch

import thunder

MIB = 1 << 20
CALLS, CYCLES = 10_000, 200
# A (64, 64) float32 tensor is 16 KiB: one leaked per call would be 156 MiB over all calls.
CALL_SIZE = 64
# A (256, 1024) float32 weight is 1 MiB: one leaked per cycle would be 200 MiB.
CYCLE_SHAPE = (256, 1024)
TOLERANCE = 24 * MIB

linux = pytest.mark.skipif(
    not (os.path.exists("/proc/self/statm") and hasattr(ctypes.CDLL(None), "malloc_trim")),
    reason="reads /proc/self/statm and needs glibc's malloc_trim",
)


def resident() -> int:
    """Bytes of memory that the process holds, without what the allocator keeps back: that could hide a leak."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth(step: Callable[[], object], times: int) -> int:
    """Bytes by which the process grew over `times` steps, after a tenth as many to settle."""
    for _ in range(max(times // 10, 5)):
        step()
    before = resident()
    for _ in range(times):
        step()
    return resident() - before


def module() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(CALL_SIZE, CALL_SIZE), torch.nn.ReLU()).eval()


def compile_and_free() -> None:
    net = torch.nn.Linear(CYCLE_SHAPE[1], CYCLE_SHAPE[0]).eval()
    thunder.jit(net)(torch.ones(1, CYCLE_SHAPE[1]))


@linux
@torch.no_grad()
def test_ten_thousand_calls_leave_memory_flat():
    compiled = thunder.jit(module())
    x = torch.randn(CALL_SIZE, CALL_SIZE)
    assert growth(lambda: compiled(x), CALLS) < TOLERANCE


@linux
@torch.no_grad()
def test_calls_with_fresh_inputs_leave_memory_flat():
    compiled = thunder.jit(module())
    assert growth(lambda: compiled(torch.randn(CALL_SIZE, CALL_SIZE)), CALLS) < TOLERANCE


@linux
@torch.no_grad()
def test_two_hundred_compile_and_free_cycles_leave_memory_flat():
    assert growth(compile_and_free, CYCLES) < TOLERANCE


@linux
@torch.no_grad()
def test_failing_calls_leave_memory_flat():
    compiled = thunder.jit(module())
    good = torch.randn(CALL_SIZE, CALL_SIZE)
    bad = torch.randn(CALL_SIZE, CALL_SIZE + 1)
    compiled(good)

    def step() -> None:
        with pytest.raises(Exception, match=r"."):
            compiled(bad)

    assert growth(step, CALLS // 20) < TOLERANCE
    assert torch.equal(compiled(good), compiled(good))


@linux
@pytest.mark.parametrize(("shape", "times"), [((CALL_SIZE, CALL_SIZE), CALLS), (CYCLE_SHAPE, CYCLES)])
def test_a_leak_of_one_tensor_would_be_seen(shape, times):
    kept = []
    assert growth(lambda: kept.append(torch.ones(shape)), times) > 4 * TOLERANCE
