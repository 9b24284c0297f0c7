"""Times the first call of a compiled litgpt GPT in a fresh process; prints one line of JSON.

    python bench/first_call.py thunder|compile LAYERS [--train]

eager: seconds of one warm eager forward (minimum of 20). cold: the first call in this process. again: the first call of
a further, fresh module in the same process (minimum of 5; thunder only). With --train a call is a training step:
forward, loss, backward.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from bench.programs import gpt
from bench.train_programs import tiny_gpt


def _once(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _program(layers: int, train: bool) -> tuple[torch.nn.Module, Callable[[Callable[..., Any]], Any]]:
    """A fresh module, and what one call of it is."""
    if train:
        return tiny_gpt(layers)
    model, arguments = gpt(layers)
    return model, lambda call: call(*arguments)


def main(engine: str, layers: int, train: bool) -> None:
    """Measures and prints."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if engine == "thunder":
        import thunder

        compiler = thunder.jit
    else:
        compiler = torch.compile
    model, step = _program(layers, train)
    with torch.set_grad_enabled(train):
        step(model)
        result = {"eager": min(_once(lambda: step(model)) for _ in range(20))}
        compiled = compiler(model)
        result["cold"] = _once(lambda: step(compiled))
        if engine == "thunder":
            again = []
            for _ in range(5):
                module, own_step = _program(layers, train)
                fresh = compiler(module)
                again.append(_once(lambda: own_step(fresh)))
            result["again"] = min(again)
            result["fallbacks"] = thunder.compile_stats(compiled).fallbacks
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), "--train" in sys.argv[3:])
