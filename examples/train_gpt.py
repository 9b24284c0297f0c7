"""Trains litgpt's GPT on the source of Python's standard library, in eager and compiled, and compares them.

    python examples/train_gpt.py                            10.8 M parameters, 200 steps, both engines
    python examples/train_gpt.py --autocast                 in bfloat16 where that is safe
    python examples/train_gpt.py --checkpoint out/gpt       ... interrupted?
    python examples/train_gpt.py --checkpoint out/gpt --resume

Tokens are bytes. Prints both loss curves, which must agree within 1e-4 over the first 200 steps in float32, and the
ratios of tokens per second and of peak memory.
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from examples.side_by_side import Task, add_options, main
from tests.harness.third_party import import_litgpt

VOCABULARY = 256
TEXT_BYTES = 8 << 20


def standard_library() -> torch.Tensor:
    """The source of Python's standard library as bytes, uint8, in a fixed order.

    Raises:
        RuntimeError: this installation ships no source (a zipped or stripped one).
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    text = bytearray()
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if "site-packages" not in parts and "test" not in parts and "tests" not in parts:
            text += path.read_bytes()
        if len(text) >= TEXT_BYTES:
            break
    if len(text) < 1 << 16:
        raise RuntimeError(f"the Python installation at {root} ships no source to train on")
    return torch.frombuffer(text, dtype=torch.uint8)


def build(options: argparse.Namespace) -> Task:
    """The model and its data."""
    text = standard_library()
    training, held_out = text[: -len(text) // 20], text[-len(text) // 20 :]
    litgpt = import_litgpt()
    config = litgpt.Config.from_name(
        "pythia-14m",
        n_layer=options.layers,
        n_embd=options.width,
        n_head=options.heads,
        block_size=options.length,
        padded_vocab_size=VOCABULARY,
        intermediate_size=4 * options.width,
    )
    torch.manual_seed(options.seed)
    model = litgpt.GPT(config)
    for module in model.modules():  # litgpt leaves initialisation to its trainers; GPT-2's is this
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, std=0.02)

    def batch(source: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(source) - options.length - 1, (options.batch,), generator=generator)
        rows = torch.stack([source[s : s + options.length + 1] for s in starts]).long()
        return rows[:, :-1], rows[:, 1:]

    def cross_entropy(module: Callable[..., Any], tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(module(tokens).flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def evaluate(module: Callable[..., Any]) -> dict[str, float]:
        losses = [cross_entropy(module, *batch(held_out, seed)) for seed in range(4)]
        return {"held-out loss": float(torch.stack(losses).mean())}

    def loss(module: Callable[..., Any], step: int) -> torch.Tensor:
        return cross_entropy(module, *batch(training, options.seed * 1_000_003 + step))

    return Task(model.train(), loss, options.batch * options.length, evaluate)


def arguments() -> argparse.ArgumentParser:
    """The options of this example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6, help="transformer blocks (%(default)s)")
    parser.add_argument("--width", type=int, default=384, help="of the residual stream (%(default)s)")
    parser.add_argument("--heads", type=int, default=6, help="attention heads (%(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence (%(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step (%(default)s)")
    add_options(parser, steps=200, lr=1e-3)
    return parser


if __name__ == "__main__":
    sys.exit(main(arguments(), build, None))
