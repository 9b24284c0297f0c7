"""Trains the same task in eager and compiled, each in a process of its own, and compares: the loop of the examples.

An example describes its task (`Task`) and calls `main`. Everything that a step draws, batch and dropout, depends on the
seed and the number of the step alone; so both engines see the same, and a run that is resumed from a checkpoint goes on
as if it had never stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import thunder

ENGINES = ("eager", "thunder")
MIB = 1 << 20
COMPARED_STEPS, TOLERANCE = 200, 1e-4  # losses in float32


@dataclass
class Task:
    """What is trained.

    Attributes:
        model: the module in train mode.
        loss: `loss(module, step)` runs the module, eager or compiled, on the batch of that step; a scalar tensor.
        tokens_per_step: how many tokens a step trains on.
        evaluate: `evaluate(module)` gives figures to print before and after, by name.
    """

    model: torch.nn.Module
    loss: Callable[[Callable[..., Any], int], torch.Tensor]
    tokens_per_step: int
    evaluate: Callable[[Callable[..., Any]], dict[str, float]] = lambda module: {}


def add_options(parser: argparse.ArgumentParser, *, steps: int, lr: float) -> None:
    """The options that every example has."""
    parser.add_argument("--steps", type=int, default=steps, help="training steps (%(default)s)")
    parser.add_argument("--lr", type=float, default=lr, help="AdamW's learning rate (%(default)s)")
    parser.add_argument("--autocast", action="store_true", help="forward and loss in bfloat16 where that is safe")
    parser.add_argument(
        "--engine", choices=["both", *ENGINES], default="both", help="what runs the model (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the batches and dropout (%(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="torch's threads (0: as torch decides)")
    parser.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="keep a checkpoint of each engine there")
    parser.add_argument(
        "--save-every", type=int, default=50, metavar="N", help="steps between checkpoints (%(default)s)"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints where there are some")
    parser.add_argument("--report", type=Path, metavar="FILE", help="also write the figures there, as JSON")


def main(parser: argparse.ArgumentParser, build: Callable[[argparse.Namespace], Task], argv: list[str] | None) -> int:
    """Runs an example.

    Returns:
        The exit status: 1 when the losses of both engines differ, or when a compiled step ran in eager.
    """
    options = parser.parse_args(argv)
    if options.steps < 1:
        parser.error("--steps must be at least 1")
    if options.resume and not options.checkpoint:
        parser.error("--resume needs --checkpoint FOLDER")
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.engine == "both":
        given = sys.argv[1:] if argv is None else argv
        results = {engine: _in_a_process(sys.modules[build.__module__].__file__, given, engine) for engine in ENGINES}
        status = _compare(results, options)
    else:
        results = {options.engine: _train(build(options), options)}
        _describe(options.engine, results[options.engine])
        status = 0
    if options.report:
        options.report.write_text(json.dumps(results), encoding="utf-8")
    return status


# ---- one engine ------------------------------------------------------------------------------------------------------


def peak_bytes() -> int:
    """The most memory that this process ever held, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def current_bytes() -> int:
    """The memory that this process holds now, in bytes; where the system does not say, the most it ever held."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_bytes()


def _train(task: Task, options: argparse.Namespace) -> dict[str, Any]:
    compiled = options.engine == "thunder"
    module = thunder.jit(task.model) if compiled else task.model
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=options.lr)
    path = options.checkpoint / f"{options.engine}.pt" if options.checkpoint else None
    losses = _load(path, task.model, optimizer) if options.resume and path and path.exists() else []
    first = len(losses)
    loaded = current_bytes()
    before = task.evaluate(task.model)
    bar = Bar(options.engine, options.steps)
    seconds: list[float] = []
    for step in range(first, options.steps):
        torch.manual_seed(options.seed * 1_000_003 + step)
        start = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=options.autocast):
            loss = task.loss(module, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
        bar.show(step + 1, f"loss {losses[-1]:.4f}  {task.tokens_per_step / seconds[-1]:.0f} tokens/s")
        if path and ((step + 1) % options.save_every == 0 or step + 1 == options.steps):
            _save(path, task.model, optimizer, losses)
    bar.close()
    peak = peak_bytes()
    steady = statistics.median(seconds[1:] or seconds) if seconds else float("nan")
    return {
        "losses": losses,
        "steps_run": len(seconds),
        "first_seconds": seconds[0] if seconds else float("nan"),
        "tokens_per_second": task.tokens_per_step / steady,
        "loaded_bytes": loaded,
        "peak_bytes": peak,
        "fallbacks": thunder.compile_stats(module).fallbacks if compiled else 0,
        "parameters": sum(p.numel() for p in task.model.parameters()),
        "before": before,
        "after": task.evaluate(task.model),
    }


def _save(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, losses: list[float]) -> None:
    """Writes beside the old checkpoint first, so that an interruption leaves one that is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}
    torch.save(state, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def _load(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["losses"]


class Bar:
    """A progress bar on stderr: one line that is redrawn on a terminal, ten lines elsewhere."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total = name, total
        self.start = time.perf_counter()
        self.first: int | None = None
        self.terminal = sys.stderr.isatty()

    def show(self, done: int, text: str) -> None:
        """Says that `done` of all steps are over."""
        if self.first is None:
            self.first = done - 1
        left = (time.perf_counter() - self.start) / (done - self.first) * (self.total - done)
        filled = 30 * done // self.total
        line = f"{self.name:8}[{'#' * filled}{'.' * (30 - filled)}] {done}/{self.total}  {text}  {left:.0f} s left"
        if self.terminal:
            print(f"\r{line:110}", end="", file=sys.stderr, flush=True)
        elif done % max(self.total // 10, 1) == 0 or done == self.total:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the line."""
        if self.terminal and self.first is not None:
            print(file=sys.stderr)


# ---- both ------------------------------------------------------------------------------------------------------------


def _in_a_process(script: str, argv: list[str], engine: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, script, *argv, "--engine", engine, "--report", str(report)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
        if done.returncode:
            raise SystemExit(f"{engine} failed with exit status {done.returncode}")
        return json.loads(report.read_text(encoding="utf-8"))[engine]


def _describe(engine: str, result: dict[str, Any]) -> None:
    print(f"{result['parameters'] / 1e6:.1f} M parameters, {len(result['losses'])} steps, {engine}")
    print(f"loss {result['losses'][0]:.4f} -> {result['losses'][-1]:.4f}")
    print(f"{result['tokens_per_second']:.0f} tokens/s, first step {result['first_seconds']:.2f} s")
    _print_figures({engine: result})


def _print_figures(results: dict[str, dict[str, Any]]) -> None:
    for name in next(iter(results.values()))["before"]:
        figures = ", ".join(f"{e} {r['before'][name]:.4f} -> {r['after'][name]:.4f}" for e, r in results.items())
        print(f"{name}: {figures}")


def _compare(results: dict[str, dict[str, Any]], options: argparse.Namespace) -> int:
    eager, ours = results["eager"], results["thunder"]
    print(f"{eager['parameters'] / 1e6:.1f} M parameters, {len(eager['losses'])} steps\n")
    pairs = list(zip(eager["losses"], ours["losses"], strict=True))
    print(f"{'step':>6} {'eager':>10} {'thunder':>10} {'difference':>11}")
    for step in sorted({0, len(pairs) - 1, *range(0, len(pairs), max(len(pairs) // 20, 1))}):
        a, b = pairs[step]
        print(f"{step + 1:6} {a:10.5f} {b:10.5f} {abs(a - b):11.1e}")
    largest = max(abs(a - b) for a, b in pairs[:COMPARED_STEPS])
    agrees = options.autocast or largest <= TOLERANCE
    verdict = "bfloat16, not judged" if options.autocast else f"{'within' if agrees else 'ABOVE'} {TOLERANCE:g}"
    print(f"\nlargest difference over the first {min(len(pairs), COMPARED_STEPS)} steps: {largest:.1e} ({verdict})")
    _print_figures(results)
    ratio = ours["tokens_per_second"] / eager["tokens_per_second"]
    print(
        f"tokens/s: eager {eager['tokens_per_second']:.0f}, thunder {ours['tokens_per_second']:.0f} ({ratio:.2f}x); "
        f"first step: eager {eager['first_seconds']:.2f} s, thunder {ours['first_seconds']:.2f} s"
    )
    grown = {e: r["peak_bytes"] - r["loaded_bytes"] for e, r in results.items()}
    print(
        f"peak memory of training beyond the loaded model: eager {grown['eager'] / MIB:.0f} MiB, thunder "
        f"{grown['thunder'] / MIB:.0f} MiB ({grown['thunder'] / max(grown['eager'], 1):.2f}x); whole process: "
        f"{eager['peak_bytes'] / MIB:.0f} MiB, {ours['peak_bytes'] / MIB:.0f} MiB"
    )
    if ours["fallbacks"]:
        print(
            f"NOT COMPILED: {ours['fallbacks']} of {ours['steps_run']} steps ran in eager, so the figures mean nothing"
        )
    return int(not agrees or ours["fallbacks"] > 0)
