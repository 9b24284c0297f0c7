"""`make bench`: what a call, a training step, a first call, a guard and an import cost, beside eager and torch.compile.

    python bench/run.py [--no-compile] [--full] [--seconds S] [-k TEXT]

Everything in a row is measured in one run; per-call candidates take turns. Times are minima, with the quartiles behind
them; what counts is the ratio. Writes out/bench.json. The exit status is 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import thunder
from bench import training
from bench.decode import decoding
from bench.programs import GUARDED, PROGRAMS, Program, chain
from bench.row import Row, fresh_process
from tests.harness.report import environment, write_json
from thunder._api import _compiled
from thunder.measure import interleaved


def per_call(program: Program, options: argparse.Namespace) -> list[Row]:
    """Steady-state cost of one call."""
    function, arguments = program.make()
    compiled = thunder.jit(function)
    candidates: dict[str, Callable[[], Any]] = {
        "eager": lambda: function(*arguments),
        "thunder": lambda: compiled(*arguments),
    }
    if options.compile:
        torch.compiler.reset()
        reference = torch.compile(function)
        candidates["torch.compile"] = lambda: reference(*arguments)
    if not torch.allclose(function(*arguments), compiled(*arguments), rtol=1e-4, atol=1e-5):
        raise AssertionError(f"{program.name}: the compiled result is wrong; a time would mean nothing")
    timings = interleaved(candidates, seconds=options.seconds)
    ours, eager = timings["thunder"].minimum, timings["eager"].minimum
    detail = "; ".join(f"{name} {timing}" for name, timing in timings.items())
    rows = [Row(program.name, ours / eager, program.over_eager, "x eager", detail)]
    if options.compile:
        other = timings["torch.compile"].minimum
        rows.append(
            Row("", ours / other, program.over_compile, "x torch.compile", f"it is at {other / eager:.2f}x eager")
        )
    return rows


def first_call(layers: int, against_compile: bool) -> list[Row]:
    """The first call of litgpt's GPT, the median of fresh processes; torch.compile with an empty cache."""
    runs = [fresh_process("bench/first_call.py", "thunder", str(layers)) for _ in range(9)]
    runs.sort(key=lambda run: run["cold"] / run["eager"])
    ours = runs[len(runs) // 2]
    low, high = (runs[i]["cold"] / runs[i]["eager"] for i in (2, -3))
    over_eager = 2.5 if layers == 24 else None
    name = f"first call, litgpt GPT, {layers} layers"
    detail = f"{1e3 * ours['cold']:.1f} ms, again {1e3 * ours['again']:.1f} ms, eager {1e3 * ours['eager']:.2f} ms"
    detail += f", quartiles {low:.2f} {high:.2f}"
    rows = [Row(name, ours["cold"] / ours["eager"], over_eager, "x eager", detail)]
    if against_compile:
        other = fresh_process("bench/first_call.py", "compile", str(layers))
        rows.append(
            Row("", ours["cold"] / other["cold"], 0.03, "x torch.compile", f"its cold call {other['cold']:.1f} s")
        )
    return rows


def capture_cost() -> Row:
    """Microseconds of capture per recorded operation, all with own rules, the user's loop included.

    Uses the tracing times of compile_stats where it has them; otherwise the whole first call, passes and plan included.
    """
    length = 400
    best, what = float("inf"), "whole first call"
    for _ in range(10):
        compiled = thunder.jit(chain(length))
        x = torch.randn(4, 4)
        start = time.perf_counter()
        compiled(x)
        elapsed = time.perf_counter() - start
        stats = thunder.compile_stats(compiled)
        begin, end = (getattr(stats, f"last_trace_tracing_{which}", -1) for which in ("start", "stop"))
        if end > begin >= 0:
            elapsed, what = (end - begin) * 1e-9, "tracing alone"
        best = min(best, elapsed)
    return Row("capture per operation, own rules", best / length * 1e6, 10.0, "us", f"{length} operations, {what}")


def guards(name: str, target: float, program: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]) -> Row:
    """What a call takes up to the choice of its program, the median over calls; beside one torch.add of the same run.

    The calls run in full, so that what is looked at lies in the caches as it does in use.
    """
    function, arguments, options = program
    compiled, x = thunder.jit(function), torch.randn(2, 2)
    counter = _compiled(compiled)
    counter._timed = True
    looked, added = [], []
    for call in range(550):
        before = counter._guard_ns
        compiled(*arguments, **options)
        if call >= 50:
            looked.append(counter._guard_ns - before)
        start = time.perf_counter_ns()
        for _ in range(20):
            torch.add(x, x)
        added.append((time.perf_counter_ns() - start) / 20)
    cost, unit = statistics.median(looked), statistics.median(added)
    low, _, high = statistics.quantiles(looked, n=4)
    detail = (
        f"quartiles {low / 1e3:.1f} {high / 1e3:.1f}; {cost / unit:.2f} times one torch.add, {unit / 1e3:.2f} us here"
    )
    fell_back = thunder.cache_hits(compiled) < 500
    return Row(f"guards of {name}, per call", cost / 1e3, target, "us", detail, fell_back)


def import_cost() -> Row:
    """Seconds of `import thunder` after `import torch`, the least of 7 processes."""
    times = [fresh_process("-c", IMPORT)["seconds"] for _ in range(7)]
    return Row("import thunder beyond import torch", min(times), 0.15, "s", f"largest of 7: {max(times):.3f} s")


IMPORT = """
import json, time, torch
start = time.perf_counter()
import thunder
print(json.dumps({"seconds": time.perf_counter() - start}))
"""


def main() -> int:
    """Measures the chosen rows; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--full", action="store_true", help="torch.compile's cold call with 12 and 24 layers, too")
    parser.add_argument("--seconds", type=float, default=3.0, help="about how long to time each program")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    parser.add_argument("-k", metavar="TEXT", default="", help="only rows whose name contains TEXT")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)

    jobs: list[tuple[str, Callable[[], Row | list[Row]]]] = [
        *((p.name, lambda p=p: per_call(p, options)) for p in PROGRAMS),
        *(
            (
                f"first call, litgpt GPT, {n} layers",
                lambda n=n: first_call(n, options.compile and (options.full or n == 4)),
            )
            for n in (4, 12, 24)
        ),
        *training.jobs(options),
        ("decoding, a new length", decoding),
        ("capture per operation, own rules", capture_cost),
        *((f"guards of {row[0]}, per call", lambda row=row: guards(row[0], row[1], row[2]())) for row in GUARDED),
        ("import thunder beyond import torch", import_cost),
    ]
    rows: list[Row] = []
    print(environment(), f"{options.threads} thread(s)", sep=", ")
    with torch.no_grad():
        for name, job in jobs:
            if options.k not in name:
                continue
            made = job()
            for row in made if isinstance(made, list) else [made]:
                rows.append(row)
                print(row, flush=True)
    missed = sum(row.missed for row in rows)
    print(f"\n{missed} of {sum(row.target is not None for row in rows)} targets missed")
    print(write_json("bench", {"environment": environment(), "rows": [asdict(row) for row in rows]}))
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
