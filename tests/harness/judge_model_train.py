"""Trains one model of the zoo for two steps in eager and in `thunder.jit` and says which of five things happened."""

from __future__ import annotations

import contextlib
import copy
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import thunder
from tests.harness.compare import as_float64, clone, differences, gradients_differ
from tests.harness.judge_model import CLEAR, OTHER, RIGHT, WRONG, Verdict, on_device
from tests.harness.judge_op_grad import FELL_BACK, random_like, tensors_in, why_eager
from tests.models import Entry


def judge_training(entry: Entry, device: str = "cpu") -> Verdict:
    """Builds `entry` in train mode and compares two training steps; never raises for a model's sake.

    The loss is the sum of all floating outputs times fixed random weights. Compared are outputs, parameters, buffers
    and the accumulated gradients of the parameters, under equal seeds.
    """
    verdict = Verdict(entry.name, entry.architecture, entry.kind, OTHER)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", thunder.ThunderWarning)
            _judge(entry, verdict, device)
        if verdict.outcome == FELL_BACK:
            verdict.reason = f"{verdict.reason}: {why_eager(caught)}"
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
    loss = sum(
        (t.double() * random_like(t.detach().float().cpu(), generator).double().to(t.device)).sum() for t in parts
    )
    if isinstance(loss, torch.Tensor):
        loss.backward()
    return outputs, 1e3 * (time.perf_counter() - start)


def _judge(entry: Entry, verdict: Verdict, device: str) -> None:
    model, make_inputs = entry.build()
    model = model.to(device).train()

    def inputs(seed: int) -> dict[str, Any]:
        return on_device(device, make_inputs(seed))

    reference = copy.deepcopy(model)
    initial = copy.deepcopy(model)
    compiled = thunder.jit(model, fallback="error")
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
                exact, true = _in_float64(initial, inputs, call + 1)
                sides = [_everything(reference, expected), _everything(model, got), _everything(exact, true)]
                if _as_exact_as_eager(*sides):
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


class _Float32Draws(TorchDispatchMode):
    """Random numbers of float64 tensors are drawn in float32, so that dropout has the same masks in both."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _DRAWS and args[0].dtype == torch.float64:
            return args[0].copy_(func(torch.empty_like(args[0], dtype=torch.float32), *args[1:], **(kwargs or {})))
        return func(*args, **(kwargs or {}))


_DRAWS = (torch.ops.aten.bernoulli_.float, torch.ops.aten.uniform_.default, torch.ops.aten.normal_.default)


def _in_float64(
    initial: torch.nn.Module, inputs: Callable[[int], dict[str, Any]], calls: int
) -> tuple[torch.nn.Module, Any]:
    """The model after that many steps in float64, with the draws of float32, and its last outputs."""
    exact = copy.deepcopy(initial).double()
    outputs = None
    for seed in range(calls):
        with _Float32Draws():
            outputs, _ = _step(exact, as_float64(inputs(seed)), seed)
    return exact, outputs


def _everything(model: torch.nn.Module, outputs: Any) -> list[torch.Tensor | None]:
    """Outputs, buffers and gradients, in a fixed order."""
    return [*tensors_in(outputs), *model.buffers(), *(p.grad for p in model.parameters())]


def _as_exact_as_eager(
    eager: list[torch.Tensor | None], ours: list[torch.Tensor | None], exact: list[torch.Tensor | None]
) -> bool:
    """Whether each tensor is about as near to float64 as eager's, judged by norms.

    Where eager itself is rounding and little else (a gradient that cancels to zero), ours may be further off.
    """
    for parts in zip(eager, ours, exact, strict=True):
        if any(part is None for part in parts):
            if any(part is not None for part in parts):
                return False
            continue
        right, mine, true = (part.detach().double() for part in parts)
        eager_error, our_error, size = (float(t.norm()) for t in (right - true, mine - true, true))
        factor = 10 if eager_error > 0.01 * size else 3
        if not our_error <= factor * eager_error + 1e-6 * size + 1e-9:
            return False
    return True
