"""GPU kernels of our own, written in Triton: cross entropy and rms_norm, with their derivatives.

The functions take and return torch tensors and accumulate in float32. For each there is a check that says whether it
can serve, and if not, why. Importing this package needs neither Triton nor a GPU.
"""

from thunder.executors.triton.cross_entropy import (
    cross_entropy,
    cross_entropy_backward,
    cross_entropy_supported,
)
from thunder.executors.triton.rms_norm import rms_norm, rms_norm_backward, rms_norm_supported

__all__ = [
    "cross_entropy",
    "cross_entropy_backward",
    "cross_entropy_supported",
    "rms_norm",
    "rms_norm_backward",
    "rms_norm_supported",
]
