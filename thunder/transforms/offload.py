"""Saved tensors wait for the backward pass in the memory of the CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch

from thunder import _C
from thunder.transforms._base import Transform, opaque_call


def _to_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """A copy laid out alike, in pinned memory where there is CUDA. The stream's order makes a wait unnecessary."""
    pinned = torch.cuda.is_available()
    home = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu", pin_memory=pinned)
    return home.copy_(tensor, non_blocking=pinned)


def _from_cpu(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.to(device, non_blocking=True)


class OffloadSaved(Transform):
    """Move what the forward pass saves to the CPU, and back before the backward pass uses it.

    Inputs of the program (parameters, arguments) stay where they are: somebody else keeps them anyway. So do tensors
    with gaps or repetitions in memory (slices, expanded ones): moving them would not save what they take.

    Args:
        min_bytes: smaller tensors stay.
        to_cpu: from a tensor to its copy on the CPU with the same shape, strides and dtype.
        from_cpu: from that copy and a device to a tensor there, laid out alike.
        devices: types of the devices whose tensors are moved.
    """

    def __init__(
        self,
        *,
        min_bytes: int = 1 << 16,
        to_cpu: Callable[[torch.Tensor], torch.Tensor] = _to_cpu,
        from_cpu: Callable[[torch.Tensor, torch.device], torch.Tensor] = _from_cpu,
        devices: tuple[str, ...] = ("cuda",),
    ) -> None:
        self.min_bytes, self.devices = min_bytes, devices
        self.to_cpu, self.from_cpu = to_cpu, from_cpu

    def __repr__(self) -> str:
        return f"OffloadSaved(min_bytes={self.min_bytes}, devices={self.devices})"

    def _moves(self, proxy: _C.TensorProxy) -> bool:
        large = proxy.numel() * proxy.dtype.itemsize >= max(self.min_bytes, 1)
        return large and proxy.device.type in self.devices and _is_dense(proxy)

    def transform_trace_post_optimization(self, trace: _C.Trace, *, kind: str) -> _C.Trace:
        """Forward: save the copies. Backward: take the copies and bring them back first."""
        if kind == "forward":
            self._moved = [p not in trace.inputs and self._moves(p) for p in trace.saved]
            first = len(trace.output) - len(trace.saved)
            for i, moved in enumerate(self._moved):
                trace = trace.map_output(first + i, self._leave) if moved else trace
        if kind == "backward":
            for proxy, moved in zip(trace.saved, self._moved, strict=True):
                trace = self._bring_back(trace, proxy) if moved else trace
        return trace

    def _leave(self, tensor: torch.Tensor) -> torch.Tensor:
        return opaque_call(self.to_cpu, tensor, like=_on_cpu(tensor))

    def _bring_back(self, trace: _C.Trace, proxy: _C.TensorProxy) -> _C.Trace:
        home = _on_cpu(proxy)

        def back(tensor: torch.Tensor) -> torch.Tensor:
            return opaque_call(self.from_cpu, tensor, proxy.device, like=proxy)

        return trace.map_input(proxy, back, home)


def _is_dense(proxy: _C.TensorProxy) -> bool:
    """Do its elements fill one stretch of memory, each place once?"""
    reached = 1
    for stride, size in sorted(zip(proxy.stride(), proxy.shape, strict=True)):
        if size > 1 and stride != reached:
            return False
        reached *= size
    return True


def _on_cpu(tensor: torch.Tensor | _C.TensorProxy) -> torch.Tensor:
    """A tensor with that layout on the CPU; its memory is never touched."""
    with torch._C.DisableTorchFunction():
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
