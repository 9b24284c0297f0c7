"""Conditions that all of our Triton kernels share."""

from __future__ import annotations

import functools
import importlib.util

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

Answer = tuple[bool, str]
"""Whether a kernel can serve, and why not."""

YES: Answer = (True, "")


@functools.cache
def has_triton() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def tensor_supported(name: str, tensor: torch.Tensor) -> Answer:
    """Whether a tensor of floats is what the kernels read: on CUDA, of a dtype they know, rows dense."""
    if not has_triton():
        return False, "Triton is not installed"
    if tensor.device.type != "cuda":
        return False, f"{name} is on {tensor.device}, not on a CUDA device"
    if tensor.dtype not in FLOATS:
        return False, f"{name} is {tensor.dtype}; float32, bfloat16 and float16 are supported"
    if tensor.ndim and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        return False, f"the last dimension of {name} is not contiguous"
    return YES


@functools.cache
def multiprocessors(device: int) -> int:
    """How many blocks a device runs side by side at least."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def power_of_two(n: int) -> int:
    """The least one that is not below `n`, which is positive."""
    return 1 << (n - 1).bit_length()


def warps_of_row(block: int) -> int:
    """Warps of a program that holds `block` elements of a row, 16 a thread."""
    return max(1, min(16, block // 512))
