"""Fine-tunes MiniLM to find functions of Python's standard library, in eager and compiled, and compares them.

    python examples/finetune_minilm.py                              60 steps, both engines
    python examples/finetune_minilm.py --checkpoint out/minilm      ... and later with --resume

The model is the one of `python -m thunder demo`, with its real weights. A pair is the first line of a docstring and
the name of what it describes; in each batch a line must find its own name among all names. Prints both loss curves,
which must agree within 1e-4, how many held-out lines find their name before and after, and the ratios of tokens per
second and of peak memory.
"""

from __future__ import annotations

import argparse
import ast
import functools
import re
import sys
import sysconfig
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from examples.side_by_side import Task, add_options, main
from thunder.demo import embed, load

TEMPERATURE = 0.05


@functools.cache
def pairs() -> list[tuple[str, str]]:
    """(first line of the docstring, name in words) of functions and classes of the standard library, in a fixed order.

    Raises:
        RuntimeError: this installation ships no source (a zipped or stripped one).
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, str] = {}
    for path in sorted([*root.glob("*.py"), *root.glob("[a-z]*/[a-z]*.py")]):
        if {"site-packages", "test", "tests", "lib2to3", "idlelib"} & set(path.parts):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            line = (ast.get_docstring(node) or "").partition("\n")[0].strip()
            words = re.sub(r"([a-z])([A-Z])", r"\1 \2", node.name).replace("_", " ").lower()
            if len(line.split()) >= 5:
                found.setdefault(line, f"{path.stem} {words}")
    if len(found) < 500:
        raise RuntimeError(f"the Python installation at {root} ships too few docstrings to train on")
    shuffled = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    items = list(found.items())
    return [items[i] for i in shuffled]


def build(options: argparse.Namespace) -> Task:
    """The model and its data."""
    held_out = pairs()[: options.held_out]
    training = pairs()[options.held_out :][: options.pairs]
    tokenizer, model = load()
    if options.layers:
        model.encoder.layer = model.encoder.layer[: options.layers]

    def tensors(texts: list[str]) -> dict[str, torch.Tensor]:
        # One length for all, so that one compiled program serves every batch.
        return dict(
            tokenizer(texts, padding="max_length", truncation=True, max_length=options.length, return_tensors="pt")
        )

    def loss(module: Callable[..., Any], step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
        chosen = [training[i] for i in torch.randint(len(training), (options.batch,), generator=generator).tolist()]
        lines, names = zip(*chosen, strict=True)
        vectors = embed(module, tensors([*lines, *names]))
        scores = vectors[: options.batch] @ vectors[options.batch :].T
        return torch.nn.functional.cross_entropy(scores / TEMPERATURE, torch.arange(options.batch))

    @torch.no_grad()
    def evaluate(module: Any) -> dict[str, float]:
        module.eval()
        # In batches as small as those of training, so that the peak of memory is the one of training.
        lines, names = (
            torch.cat([embed(module, tensors(list(texts[i : i + 16]))) for i in range(0, options.held_out, 16)])
            for texts in zip(*held_out, strict=True)
        )
        module.train()
        found = (lines @ names.T).argmax(1) == torch.arange(options.held_out)
        return {"held-out lines that find their name": float(found.float().mean())}

    return Task(model.train(), loss, 2 * options.batch * options.length, evaluate)


def arguments() -> argparse.ArgumentParser:
    """The options of this example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=32, help="tokens of a text (%(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="pairs of a step (%(default)s)")
    parser.add_argument("--pairs", type=int, default=2000, help="how many pairs to train on (%(default)s)")
    parser.add_argument("--held-out", type=int, default=128, help="how many pairs to judge by (%(default)s)")
    parser.add_argument("--layers", type=int, default=0, help="keep only so many layers of the model (0: all)")
    add_options(parser, steps=60, lr=3e-5)
    return parser


if __name__ == "__main__":
    sys.exit(main(arguments(), build, None))
