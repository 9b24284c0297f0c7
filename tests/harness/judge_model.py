"""Runs one model of the zoo through eager and `thunder.jit` and says which of four things happened."""

from __future__ import annotations

import contextlib
import copy
import time
import traceback
from dataclasses import dataclass
from typing import Any

import torch

import thunder
from tests.harness.compare import as_exact_as_eager, as_float64, clone, differences
from tests.models import Entry

RIGHT, WRONG, CLEAR, OTHER = "right", "wrong", "clear error", "other error"


@dataclass
class Verdict:
    """What became of one configuration."""

    name: str
    architecture: str
    kind: str
    outcome: str
    reason: str = ""
    eager_ms: float = 0.0  # one eager forward after a warm-up
    first_ms: float = 0.0  # the first call of the compiled module: capture and run
    later_ms: float = 0.0  # a call that hits the cache


def judge(entry: Entry, device: str = "cpu") -> Verdict:
    """Builds `entry` and compares two different inputs in eager and compiled; never raises for a model's sake."""
    verdict = Verdict(entry.name, entry.architecture, entry.kind, OTHER)
    try:
        _judge(entry, verdict, device)
    except thunder.CaptureError as error:
        verdict.outcome, verdict.reason = CLEAR, str(error)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        verdict.outcome = OTHER
        verdict.reason = f"{type(error).__name__}: {error} ({last.filename.rsplit('/', 1)[-1]}:{last.lineno})"
    return verdict


def on_device(device: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


def _judge(entry: Entry, verdict: Verdict, device: str) -> None:
    model, make_inputs = entry.build()
    model = model.to(device)

    def inputs(seed: int) -> dict[str, Any]:
        return on_device(device, make_inputs(seed))

    reference = copy.deepcopy(model)
    exact = copy.deepcopy(model).double()
    compiled = thunder.jit(model, fallback="error")
    with torch.no_grad():
        copy.deepcopy(model)(**clone(inputs(0)))  # warm-up: the libraries' own lazy imports and caches
        for call, seed in enumerate((0, 1)):
            eager_inputs, our_inputs = inputs(seed), inputs(seed)
            torch.manual_seed(seed)
            start = time.perf_counter()
            expected = reference(**eager_inputs)
            verdict.eager_ms = 1e3 * (time.perf_counter() - start)
            torch.manual_seed(seed)
            start = time.perf_counter()
            got = compiled(**our_inputs)
            elapsed = 1e3 * (time.perf_counter() - start)
            if call == 0:
                verdict.first_ms = elapsed
            else:
                verdict.later_ms = elapsed
            found = differences(expected, got)
            if found and all("values differ" in line for line in found):
                with contextlib.suppress(RuntimeError):  # some operations have no float64 kernel: then eager stands
                    if as_exact_as_eager(expected, got, exact(**as_float64(inputs(seed)))):
                        found = []
            found += [f"input {line}" for line in differences(eager_inputs, our_inputs)]
            found += [f"state {line}" for line in differences(_state(reference), _state(model))]
            if found:
                verdict.outcome, verdict.reason = WRONG, f"call {call + 1}: {found[0]} ({len(found)} differences)"
                return
    hits, misses = thunder.cache_hits(compiled), thunder.cache_misses(compiled)
    entries = getattr(thunder.compile_stats(compiled), "entries", ())
    steered = any(e["values"] for e in entries)  # other inputs, other values of tensors that steer: a miss
    if (hits, misses) != (1, 1) and not (steered and hits + misses == 2):
        verdict.outcome = WRONG
        verdict.reason = f"the second call should hit the cache: {hits} hits, {misses} misses"
        return
    fallbacks = getattr(thunder.compile_stats(compiled), "fallbacks", 0)
    if fallbacks:
        verdict.outcome, verdict.reason = OTHER, f"{fallbacks} calls fell back"
        return
    verdict.outcome = RIGHT


def _state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
