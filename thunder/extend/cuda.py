"""CUDA C kernels of one's own: compiled by NVRTC at the first call, launched from C."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from thunder import _C
from thunder._errors import KernelCompileError
from thunder.extend.signature import Parameter, find_signature, parse_signature
from thunder.extend.toolkit import find_headers, find_nvrtc

Extent = int | Sequence[int]
"""One to three sizes."""

MAX_THREADS = 1024


def compile_cuda(
    source: str, name: str, *, arch: int, options: Sequence[str] = (), cache: bool = True
) -> tuple[bytes, str]:
    """Compiles one kernel; needs NVRTC and no GPU.

    Args:
        source: CUDA C.
        name: of a ``__global__`` function, or an instantiation such as ``"scale<float>"``.
        arch: compute capability as 10 * major + minor, 90 for Hopper.
        options: of NVRTC.
        cache: look for the result on disk, and keep it there.

    Returns:
        The cubin (PTX where NVRTC is older than the GPU), and the kernel's name in it.

    Raises:
        KernelCompileError: the source is at fault.
        RuntimeError: there is no NVRTC.
    """
    image, text, _ = _C.cuda_compile(find_nvrtc(), source, name, tuple(options), arch, find_headers(), cache)
    if image is None:
        error = re.search(r"^kernel\.cu\((\d+)\): (?:catastrophic )?error", text, re.MULTILINE)
        raise KernelCompileError(name, text, int(error[1]) if error else 0, source)
    return image, text


def _check_block(block: Extent) -> tuple[int, ...]:
    sizes = (block,) if isinstance(block, int) else tuple(block)
    threads = 1
    for size in sizes:
        threads *= size
    if not 1 <= len(sizes) <= 3 or min(sizes) < 1 or threads > MAX_THREADS:
        raise ValueError(f"block={block!r}: one to three positive sizes with a product of at most {MAX_THREADS}")
    return sizes


def _parameters(source: str, name: str, signature: str | None) -> tuple[Parameter, ...]:
    if signature is None:
        return parse_signature(find_signature(source, name))
    given = parse_signature(signature)
    try:
        declared = len(parse_signature(find_signature(source, name)))
    except ValueError:  # made by a macro, or of types that the user's signature describes otherwise
        return given
    if declared != len(given):
        raise ValueError(f"the signature of {name!r} has {len(given)} parameters, the source declares {declared}")
    return given


def cuda_kernel(
    source: str,
    name: str,
    signature: str | None = None,
    grid: Extent | Callable[..., Extent] | None = None,
    block: Extent = 256,
    shared: int = 0,
    options: Sequence[str] = (),
) -> _C.CudaKernel:
    """A callable that launches a kernel written in CUDA C.

    It is compiled at the first call, for the device of that call's tensors, and the machine code is kept on disk
    (``THUNDER_CACHE_DIR``, default ``~/.cache/thunder``). A call takes one argument per parameter, by position or by
    name: tensors (or None, a null pointer) for pointers, numbers for the rest. It enqueues the kernel on the current
    stream of the tensors' device, and returns None without waiting.

    Tensors must be on one CUDA device and have the declared element type; ``void*``, ``char*`` and pointers to other
    types take any dtype. Nothing is asked of their layout: pass strides where the kernel needs them. Neither autograd
    nor the tensors' version counters learn of what the kernel writes.

    Args:
        source: CUDA C. The fixed-width integer types need no header.
        name: of the ``__global__`` function; also an instantiation of a template, ``"scale<float>"``.
        signature: the parameter list, ``"const float* x, float* out, int64_t n"``; None: read from the source.
            At most 64 parameters; by value only integers, float, double and bool.
        grid: blocks, one to three sizes, or a function of the call's arguments that gives them. An empty grid launches
            nothing. At most 2**31 - 1 in the first dimension, 65535 in the others.
        block: threads of a block, one to three sizes, 1024 in all.
        shared: bytes of dynamic shared memory; above 48 KiB the device is asked for them.
        options: of NVRTC, such as ``"--use_fast_math"``.

    Raises:
        ValueError: the signature or the block is not valid, or the source has no such kernel.
        TypeError: there is no grid.

    A call raises ``KernelCompileError`` when the source does not compile, TypeError, ValueError or OverflowError for an
    argument that does not fit its parameter, and RuntimeError for what the driver reports.
    """
    if grid is None:
        raise TypeError("cuda_kernel needs a grid: sizes, or a function of the call's arguments")
    if not 0 <= shared < 2**31:
        raise ValueError(f"shared={shared}: a number of bytes below 2**31")
    parameters = _parameters(source, name, signature)
    sizes, options = _check_block(block), tuple(options)
    images: dict[int, tuple[bytes, str]] = {}

    def build(device: int, key: Any) -> tuple:
        arch = _C.cuda_arch(device)
        if arch not in images:
            images[arch] = compile_cuda(source, name, arch=arch, options=options)
        return (*images[arch], sizes, shared, (1 << len(parameters)) - 1, ())

    kernel = _C.CudaKernel(name, tuple((p.name, p.declared, p.type, 0) for p in parameters), grid, build)
    kernel.__doc__ = f"The CUDA kernel {name}({', '.join(f'{p.declared} {p.name}' for p in parameters)})."
    return kernel
