"""`make bench`: what a call, a training step, a first call, a guard and an import cost, beside eager and torch.compile.

    python bench/run.py [--no-compile] [--full] [--seconds S] [-k TEXT]

Everything in a row is measured in one run; per-call candidates take turns. Times are minima, with the quartiles behind
them; what counts is the ratio. Writes out/bench.json. The exit status is 1 when a target is missed.
"""

from __future__ import annotations

import argparse
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
from bench.programs import PROGRAMS, ManyParameters, Program, chain
from bench.row import Row, fresh_process
from tests.harness.report import environment, write_json
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
        if begin > 0 and end > begin:
            elapsed, what = (end - begin) * 1e-9, "tracing alone"
        best = min(best, elapsed)
    return Row("capture per operation, own rules", best / length * 1e6, 10.0, "us", f"{length} operations, {what}")


def guards(options: argparse.Namespace) -> Row:
    """What 300 parameters cost in guards: the same 300 additions over 300 and over 1 distinct parameters."""
    x = torch.randn(2)
    many, one = (thunder.jit(ManyParameters(300, distinct)) for distinct in (300, 1))
    timings = interleaved({"300": lambda: many(x), "1": lambda: one(x)}, seconds=options.seconds, repeats=60)
    cost = timings["300"].minimum - timings["1"].minimum
    detail = f"300 parameters {timings['300']}; 1 parameter {timings['1']}"
    return Row("guards of 300 parameters, per call", cost * 1e6, 10.0, "us", detail)


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
        ("guards of 300 parameters, per call", lambda: guards(options)),
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
