"""Times the first call of a compiled litgpt GPT in a fresh process; prints one line of JSON.

    python bench/first_call.py thunder|compile LAYERS

eager: seconds of one warm eager forward (minimum of 20). cold: the first call in this process. again: the first call of
a further, fresh module in the same process (minimum of 5; thunder only).
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from bench.programs import gpt


def _once(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main(engine: str, layers: int) -> None:
    """Measures and prints."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if engine == "thunder":
        import thunder

        compiler = thunder.jit
    else:
        compiler = torch.compile
    model, arguments = gpt(layers)
    with torch.no_grad():
        model(*arguments)
        result = {"eager": min(_once(lambda: model(*arguments)) for _ in range(20))}
        compiled = compiler(model)
        result["cold"] = _once(lambda: compiled(*arguments))
        if engine == "thunder":
            again = []
            for _ in range(5):
                fresh = compiler(gpt(layers)[0])
                again.append(_once(lambda: fresh(*arguments)))
            result["again"] = min(again)
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
