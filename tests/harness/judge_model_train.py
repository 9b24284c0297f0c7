"""Trains one model of the zoo for two steps in eager and in `thunder.jit` and says which of five things happened."""

from __future__ import annotations

import contextlib
import copy
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

import thunder
from tests.harness.compare import as_exact_as_eager, as_float64, clone, differences, gradients_differ
from tests.harness.judge_model import CLEAR, OTHER, RIGHT, WRONG, Verdict
from tests.harness.judge_op_grad import FELL_BACK, random_like, tensors_in
from tests.models import Entry


def judge_training(entry: Entry) -> Verdict:
    """Builds `entry` in train mode and compares two training steps; never raises for a model's sake.

    The loss is the sum of all floating outputs times fixed random weights. Compared are outputs, parameters, buffers
    and the accumulated gradients of the parameters, under equal seeds.
    """
    verdict = Verdict(entry.name, entry.architecture, entry.kind, OTHER)
    try:
        _judge(entry, verdict)
    except thunder.CaptureError as error:
        verdict.outcome, verdict.reason = CLEAR, str(error)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        verdict.outcome = OTHER
        verdict.reason = f"{type(error).__name__}: {error} ({last.filename.rsplit('/', 1)[-1]}:{last.lineno})"
    return verdict


def _step(module: Callable[..., Any], arguments: dict[str, Any], seed: int) -> tuple[Any, float]:
    """Forward and backward; returns the outputs and the milliseconds."""
    torch.manual_seed(seed)
    start = time.perf_counter()
    outputs = module(**arguments)
    generator = torch.Generator().manual_seed(seed)
    parts = [t for t in tensors_in(outputs) if t.requires_grad]
    loss = sum((t.float() * random_like(t, generator).float()).sum() for t in parts)
    if isinstance(loss, torch.Tensor):
        loss.backward()
    return outputs, 1e3 * (time.perf_counter() - start)


def _judge(entry: Entry, verdict: Verdict) -> None:
    model, inputs = entry.build()
    model.train()
    reference = copy.deepcopy(model)
    exact = copy.deepcopy(model).double()
    compiled = thunder.jit(model)
    _step(copy.deepcopy(model), clone(inputs(0)), 0)  # warm-up: the libraries' own lazy imports and caches
    for call, seed in enumerate((0, 1)):
        eager_inputs, our_inputs = inputs(seed), inputs(seed)
        expected, verdict.eager_ms = _step(reference, eager_inputs, seed)
        got, elapsed = _step(compiled, our_inputs, seed)
        if call == 0:
            verdict.first_ms = elapsed
        else:
            verdict.later_ms = elapsed
        found = _differences(reference, model, (expected, eager_inputs), (got, our_inputs))
        if found and all("values differ" in line for line in found):
            with contextlib.suppress(RuntimeError):  # some operations have no float64 kernel: then eager stands
                true, _ = _step(exact, as_float64(inputs(seed)), seed)
                if _exact(reference, expected, model, got, exact, true):
                    found = []
        if found:
            verdict.outcome, verdict.reason = WRONG, f"call {call + 1}: {found[0]} ({len(found)} differences)"
            return
    fallbacks = thunder.compile_stats(compiled).fallbacks
    verdict.outcome, verdict.reason = (FELL_BACK, f"{fallbacks} of 2 calls ran in eager") if fallbacks else (RIGHT, "")


def _differences(
    eager: torch.nn.Module, ours: torch.nn.Module, expected: tuple[Any, Any], got: tuple[Any, Any]
) -> list[str]:
    found = differences(expected[0], got[0])
    found += [f"input {line}" for line in differences(expected[1], got[1])]
    found += [f"buffer {line}" for line in differences(dict(eager.named_buffers()), dict(ours.named_buffers()))]
    found += [
        f"parameter {line}" for line in differences(dict(eager.named_parameters()), dict(ours.named_parameters()))
    ]
    names = [name for name, _ in eager.named_parameters()]
    gradients = [[p.grad for p in module.parameters()] for module in (eager, ours)]
    return found + [f"gradient of {line}" for line in gradients_differ(*gradients, names)]


def _exact(
    eager: torch.nn.Module, expected: Any, ours: torch.nn.Module, got: Any, exact: torch.nn.Module, true: Any
) -> bool:
    """Whether float64 says that ours is about as near as eager, in outputs and gradients.

    Gradients are judged by their norms: one element of many may well be further away than eager's worst.
    """
    if not as_exact_as_eager(expected, got, true):
        return False
    for name, parameter in eager.named_parameters():
        mine, truth = ours.get_parameter(name).grad, exact.get_parameter(name).grad
        if (parameter.grad is None) != (mine is None):
            return False
        if parameter.grad is None or truth is None:
            continue
        eager_error = float((parameter.grad.double() - truth).norm())
        if not float((mine.double() - truth).norm()) <= 2 * eager_error + 1e-6 * float(truth.norm()) + 1e-7:
            return False
    return True
