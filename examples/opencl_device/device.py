"""The device: a context, a queue that works in order, memory, and the parameters that it still has from last time.

One lock for each device: its queue and the arguments of its kernels belong to one run at a time.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

INSTALL = (
    "this executor needs an OpenCL device. Python's side: `pip install pyopencl`; a driver, where there is no GPU's: "
    "`apt-get install pocl-opencl-icd` (PoCL, which runs OpenCL on the processor)"
)


class NoDevice(RuntimeError):
    """There is no OpenCL here; the message says what to install."""


class Device:
    """One OpenCL device; raises NoDevice where pyopencl or a platform is missing.

    Args:
        device: a ``pyopencl.Device``; None: the first one of the first platform.
        trust_versions: a ``torch.nn.Parameter`` is not sent again while it is the same object with the same data
            pointer and version counter, which every operation that writes moves on. Writes through ``p.data`` or
            numpy do not, so its bytes are compared with those that were sent, too, unless this is set.

    Attributes:
        sent, received, reused: bytes to the device, from it, and of parameters that were there already.
    """

    def __init__(self, device: Any = None, *, trust_versions: bool = False) -> None:
        try:
            import pyopencl as cl
            from pyopencl import tools
        except ImportError as error:
            raise NoDevice(f"{INSTALL} ({error})") from error
        self.cl = cl
        self.device = device or _first_device(cl)
        self.context = cl.Context([self.device])
        self.queue = cl.CommandQueue(self.context)
        self.pool = tools.MemoryPool(tools.ImmediateAllocator(self.queue))
        self.lock = threading.Lock()
        self.trust_versions = trust_versions
        self.sent = self.received = self.reused = 0
        self._kept: Any = WeakIdKeyDictionary()

    def build(self, source: str) -> Any:
        """Compile a program for this device."""
        return self.cl.Program(self.context, source).build()

    def allocate(self, size: int, *, zero: bool = False) -> Any:
        """Memory; it may be in use by kernels queued earlier, which the order of the queue makes harmless."""
        buffer = self.pool.allocate(max(size, 8))
        if zero:
            self.cl.enqueue_fill_buffer(self.queue, buffer, b"\0", 0, max(size, 8))
        return buffer

    def send(self, t: Tensor) -> Any:
        """A buffer with everything between the first and the last element of a tensor, laid out as on the host."""
        keeps = isinstance(t, torch.nn.Parameter) and not t.is_inference()  # those have no version
        state = (t.data_ptr(), t._version, t.shape, t.stride()) if keeps else None
        d = t.detach()
        host = d.as_strided((extent(d.shape, d.stride()),), (1,), d.storage_offset()).numpy()  # without a copy
        kept = self._kept.get(t) if keeps else None
        if kept is not None and kept[0] == state and (kept[2] is None or kept[2].tobytes() == host.tobytes()):
            self.reused += host.nbytes
            return kept[1]
        buffer = self.allocate(host.nbytes)
        if host.nbytes:
            self.cl.enqueue_copy(self.queue, buffer, host, is_blocking=True)  # its owner may write to it afterwards
        self.sent += host.nbytes
        if keeps:
            self._kept[t] = (state, buffer, None if self.trust_versions else host.copy())
        return buffer

    def receive(self, buffer: Any, count: int, dtype: torch.dtype) -> Tensor:
        """The first elements of a buffer, as a tensor of one dimension."""
        t = torch.empty(count, dtype=dtype)
        if count:
            self.cl.enqueue_copy(self.queue, t.numpy(), buffer, is_blocking=True)
        self.received += t.numel() * t.itemsize
        return t


def extent(shape: Any, strides: Any) -> int:
    """How many elements lie between the first and the last one, both counted."""
    return 0 if 0 in tuple(shape) else 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))


def _first_device(cl: Any) -> Any:
    try:
        return next(d for p in cl.get_platforms() for d in p.get_devices())
    except (cl.Error, StopIteration) as error:
        raise NoDevice(f"{INSTALL} ({error or 'no platform has a device'})") from error
