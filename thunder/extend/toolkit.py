"""Where the parts of a CUDA toolkit lie: NVRTC and its headers, cuDNN."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import torch


def _roots() -> Iterator[Path]:
    """Folders that may hold a toolkit, nearest to torch first."""
    spec = importlib.util.find_spec("nvidia")
    for package in spec.submodule_search_locations or () if spec else ():
        yield from sorted((p for p in Path(package).iterdir() if p.is_dir()), reverse=True)
    yield Path(torch.__path__[0])
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            yield Path(os.environ[name])
    yield Path("/usr/local/cuda")


def find_nvrtc() -> str:
    """Path of NVRTC: ``THUNDER_NVRTC``, or the library found near torch, of torch's CUDA version when there is one.

    Raises:
        RuntimeError: there is none; the message says where it was looked for.
    """
    if os.environ.get("THUNDER_NVRTC"):
        return os.environ["THUNDER_NVRTC"]
    roots = list(_roots())
    found = [
        path
        for root in roots
        for folder in ("lib", "lib64")
        for path in sorted((root / folder).glob("libnvrtc*.so*"))
        if "builtins" not in path.name and ".alt." not in path.name
    ]
    major = (torch.version.cuda or "").split(".")[0]
    same = [path for path in found if major and f".so.{major}" in path.name]
    if same or found:
        return str((same or found)[0])
    if major:  # perhaps the loader knows it
        return f"libnvrtc.so.{major}"
    raise RuntimeError(
        "CUDA C needs NVRTC, and no libnvrtc.so is in "
        + ", ".join(map(str, roots))
        + ": install nvidia-cuda-nvrtc, or name the library in THUNDER_NVRTC"
    )


def find_cudnn() -> str | None:
    """Path of cuDNN: ``THUNDER_CUDNN``, or the library found near torch, or what the loader may know; None: no CUDA."""
    if os.environ.get("THUNDER_CUDNN"):
        return os.environ["THUNDER_CUDNN"]
    for root in _roots():
        for folder in ("lib", "lib64"):
            found = sorted((root / folder).glob("libcudnn.so.9*"))
            if found:
                return str(found[0])
    return "libcudnn.so.9" if torch.version.cuda else None


def find_headers() -> str | None:
    """The folder with cuda_fp16.h and the like, or None."""
    folders = [root / "include" for root in _roots()]
    return next((str(folder) for folder in folders if (folder / "cuda_fp16.h").is_file()), None)
