"""`python bench/gpu.py`: host cost of compiled calls on a CUDA device, beside eager, in one run.

Small models, so that the time is the host's; larger ones show that nothing is lost. Prints the ratio to eager with the
quartiles of both.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import thunder
from tests.models import zoo
from thunder.measure import interleaved

NAMES = ("llama", "gpt2", "bert", "t5", "vit", "convnext", "clip", "whisper")


def _timed(function, arguments):
    def call() -> None:
        function(**arguments)
        torch.cuda.synchronize()

    return call


def _deep() -> tuple[torch.nn.Module, dict]:
    layers = [m for _ in range(20) for m in (torch.nn.Linear(64, 64), torch.nn.ReLU())]
    return torch.nn.Sequential(*layers), {"input": torch.randn(8, 64)}


def main() -> int:
    """Prints one row per program; 1 when there is no device."""
    if not torch.cuda.is_available():
        print("no CUDA device")
        return 1
    programs = {"20 x (Linear(64) + ReLU)": _deep()}
    for name in NAMES:
        model, inputs = zoo()[name].build()
        programs[name] = (model, inputs(0))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    with torch.no_grad():
        for name, (model, arguments) in programs.items():
            model = model.cuda().eval()
            arguments = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
            compiled = thunder.jit(model)
            compiled(**arguments)
            times = interleaved(
                {"eager": _timed(model, arguments), "thunder": _timed(compiled, arguments)}, seconds=2.0
            )
            ratio = times["thunder"].minimum / times["eager"].minimum
            entry = thunder.compile_stats(compiled).entries[0]
            print(
                f"{name:28} {ratio:6.3f} x eager   eager {times['eager']}; thunder {times['thunder']}; "
                f"capture {entry['capture_ms']:.1f} ms, {entry['instructions']} instructions"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
