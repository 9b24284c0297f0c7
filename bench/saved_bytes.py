"""Measures what one forward keeps for its backward, in a fresh process; prints one line of JSON.

    python bench/saved_bytes.py eager|thunder|compile MODEL [--remat auto|off|max] [--small]

saved: bytes of the distinct storages that go through torch's saved-tensor hooks, parameters and inputs left out.
reported: what `thunder.compile_stats` says (thunder only). resident: by how much the process grew between the start of
the forward and its end, results alive, freed memory given back: the judge of the other two. step: seconds of one
forward and backward (minimum of 5).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from bench.train_programs import MEMORY_MODELS, language_model_step


def saved_bytes(forward: Callable[[], Any], without: list[torch.Tensor]) -> int:
    """Bytes of the distinct storages that `forward()` saves, other than those of the tensors in `without`.

    Storages that the results of `forward` hold are counted: eager and compiled alike must keep them.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in without}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    total = sum(storage.nbytes() for storage in saved.values())
    del result
    return total


def resident() -> int:
    """Bytes of memory that the process holds, without what the allocator keeps back. 0 where that is unknown."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError):
        return 0


def reported(compiled: Any) -> int | None:
    """What the newest program of a compiled callable says it saves, in bytes; None when it does not say."""
    import thunder

    entries = thunder.compile_stats(compiled).entries
    return entries[0].get("saved_bytes") if entries else None


def measure(engine: str, model_name: str, remat: str | None, small: bool) -> dict[str, float | int | None]:
    """The figures of one engine."""
    model, tokens = MEMORY_MODELS[model_name](small)
    call: Callable[..., Any] = model
    if engine == "thunder":
        import thunder

        call = thunder.jit(model, **({"remat": remat} if remat else {}))
    elif engine == "compile":
        call = torch.compile(model)
    _, step = language_model_step(model, tokens)
    for _ in range(2):
        step(call)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        step(call)
        times.append(time.perf_counter() - start)
    constants = [tokens, *model.parameters(), *model.buffers()]
    before = resident()
    result = call(tokens)
    grown = resident() - before
    del result
    return {
        "step": min(times),
        "saved": saved_bytes(lambda: call(tokens), constants),
        "resident": grown,
        "reported": reported(call) if engine == "thunder" else None,
        "fallbacks": _fallbacks(call) if engine == "thunder" else 0,
    }


def _fallbacks(compiled: Any) -> int:
    import thunder

    return thunder.compile_stats(compiled).fallbacks


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("engine", choices=["eager", "thunder", "compile"])
    parser.add_argument("model", choices=list(MEMORY_MODELS))
    parser.add_argument("--remat", choices=["auto", "off", "max"])
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    print(json.dumps(measure(options.engine, options.model, options.remat, options.small)))


if __name__ == "__main__":
    main()
