"""The training rows of `make bench`: steps, the first step, and what is kept for the backward."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch

import thunder
from bench.row import Row, fresh_process
from bench.train_programs import MEMORY_MODELS, TRAIN_PROGRAMS, TrainProgram, language_model_step
from thunder.measure import interleaved

MIB = 1 << 20
# What a forward may keep, over eager: with rematerialisation off, and as chosen by it; and the time it may cost.
SAVED_OFF, SAVED_AUTO, REMAT_TIME = 1.0, 0.7, 1.03
FIRST_EAGER_STEPS, FIRST_SECONDS = 3, 0.1


def _gradients(module: torch.nn.Module, step: Callable[[Any], Any], call: Any) -> list[torch.Tensor]:
    """The gradients of one step, caught before the step drops them."""
    caught: dict[torch.Tensor, torch.Tensor] = {}

    def catch(parameter: torch.Tensor) -> None:
        caught[parameter] = parameter.grad.clone()

    handles = [parameter.register_post_accumulate_grad_hook(catch) for parameter in module.parameters()]
    step(call)
    for handle in handles:
        handle.remove()
    return [caught[parameter] for parameter in module.parameters() if parameter in caught]


def per_step(program: TrainProgram, options: argparse.Namespace) -> list[Row]:
    """Steady-state cost of one step."""
    torch.manual_seed(0)
    module, step = program.make()
    compiled = thunder.jit(module)
    for expected, got in zip(_gradients(module, step, module), _gradients(module, step, compiled), strict=True):
        if not torch.allclose(expected, got, rtol=1e-3, atol=1e-5):
            raise AssertionError(f"{program.name}: a gradient is wrong; a time would mean nothing")
    candidates: dict[str, Callable[[], Any]] = {"eager": lambda: step(module), "thunder": lambda: step(compiled)}
    if options.compile:
        torch.compiler.reset()
        reference = torch.compile(module)
        candidates["torch.compile"] = lambda: step(reference)
    timings = interleaved(candidates, seconds=options.seconds)
    ours, eager = timings["thunder"].minimum, timings["eager"].minimum
    detail = "; ".join(f"{name} {timing}" for name, timing in timings.items())
    fell_back = thunder.compile_stats(compiled).fallbacks > 0
    rows = [Row(program.name, ours / eager, program.over_eager, "x eager", detail, fell_back)]
    if options.compile:
        other = timings["torch.compile"].minimum
        rows.append(
            Row("", ours / other, program.over_compile, "x torch.compile", f"it is at {other / eager:.2f}x eager")
        )
    return rows


def first_step(layers: int) -> Row:
    """The first training step of litgpt's GPT in a fresh process, over what is allowed."""
    ours = fresh_process("bench/first_call.py", "thunder", str(layers), "--train")
    allowed = FIRST_EAGER_STEPS * ours["eager"] + FIRST_SECONDS
    detail = (
        f"{1e3 * ours['cold']:.1f} ms ({ours['cold'] / ours['eager']:.1f}x eager), again {1e3 * ours['again']:.1f} ms, "
        f"eager step {1e3 * ours['eager']:.2f} ms"
    )
    name = f"first training step, litgpt GPT, {layers} layers"
    return Row(name, ours["cold"] / allowed, 1.0, "x allowed", detail, ours["fallbacks"] > 0)


@functools.cache
def _remat_exists() -> bool:
    try:
        thunder.jit(torch.nn.Identity(), remat="off")
    except TypeError:
        return False
    return True


def saved(model: str, options: argparse.Namespace) -> list[Row]:
    """Bytes that one forward keeps for its backward, over eager's, each in a process of its own."""

    def measured(engine: str, *arguments: str) -> dict[str, Any]:
        return fresh_process("bench/saved_bytes.py", engine, model, *arguments)

    eager = measured("eager")
    other = measured("compile") if options.compile else None
    rows = []
    for remat, target in (("off", SAVED_OFF), ("auto", SAVED_AUTO)) if _remat_exists() else ((None, SAVED_OFF),):
        ours = measured("thunder", *(("--remat", remat) if remat else ()))
        said = ours["reported"]
        count = max(ours["saved"], said or 0)
        detail = (
            f"{count / MIB:.1f} MiB ({'as reported' if said is not None else 'as saved through hooks'}), "
            f"eager {eager['saved'] / MIB:.1f} MiB"
        )
        if other:
            detail += f"; torch.compile {other['saved'] / MIB:.1f} MiB ({other['saved'] / eager['saved']:.2f}x)"
        name = f"saved for backward, {model}" + (f", remat {remat}" if remat else "")
        rows.append(Row(name, count / eager["saved"], target, "x eager", detail, ours["fallbacks"] > 0))
        if eager["resident"]:
            grown = f"the process grew by {ours['resident'] / MIB:.1f} MiB, in eager by {eager['resident'] / MIB:.1f}"
            rows.append(Row("", ours["resident"] / eager["resident"], target * 1.05, "x eager's growth", grown))
    return rows


def remat_time(model: str, options: argparse.Namespace) -> list[Row]:
    """What rematerialisation costs in time, taking turns with the same step without it."""
    if not _remat_exists():
        return []
    module, tokens = MEMORY_MODELS[model]()
    _, step = language_model_step(module, tokens)
    compiled = {remat: thunder.jit(module, remat=remat) for remat in ("off", "auto")}
    timings = interleaved(
        {"eager": lambda: step(module), **{r: lambda c=c: step(c) for r, c in compiled.items()}},
        seconds=10 * options.seconds,
        repeats=12,
        warmup=2,
    )
    ratio = timings["auto"].minimum / timings["off"].minimum
    detail = "; ".join(f"{name} {timing}" for name, timing in timings.items())
    return [Row(f"time of remat auto, {model}", ratio, REMAT_TIME, "x remat off", detail)]


def jobs(options: argparse.Namespace) -> list[tuple[str, Callable[[], Row | list[Row]]]]:
    """The rows by name, not measured yet."""

    def with_grad(job: Callable[[], Row | list[Row]]) -> Callable[[], Row | list[Row]]:
        return torch.enable_grad()(job)

    return [
        *((p.name, with_grad(lambda p=p: per_step(p, options))) for p in TRAIN_PROGRAMS),
        *((f"first training step, litgpt GPT, {n} layers", lambda n=n: first_step(n)) for n in (4, 24)),
        *((f"saved for backward, {name}", lambda name=name: saved(name, options)) for name in MEMORY_MODELS),
        *((f"time of remat auto, {n}", with_grad(lambda n=n: remat_time(n, options))) for n in MEMORY_MODELS),
    ]
