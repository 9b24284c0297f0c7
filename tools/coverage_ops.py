"""`make coverage-ops`: every entry of torch's op_db, eager against thunder.jit, with fresh values on the second call.

    python tools/coverage_ops.py [--grad] [-k TEXT] [--no-write]

float32, and int64 and bool where an entry supports them; the first five samples each. An entry is right when every one
of them is, without a fallback. With --grad: the differentiable entries in float64, forward and backward with random
incoming gradients. Prints each entry that is not right, writes out/coverage_ops.json (coverage_ops_grad.json) and the
section of docs/coverage.md. The exit status is 1 when any entry is wrong or fails unclearly, or when fewer than 96%
are right.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import OpInfo

from tests.harness.isolated import isolated
from tests.harness.judge_op import CLEAR, OTHER, RIGHT, SKIPPED, WRONG, Verdict, full_name, judge
from tests.harness.judge_op_grad import FELL_BACK, GradVerdict, differentiable, judge_gradients
from tests.harness.report import environment, one_line, write_json, write_section

REQUIRED = 0.96


def lost(op: OpInfo, reason: str) -> Verdict:
    """The verdict on an entry that took its process down."""
    return Verdict(full_name(op), OTHER, reason)


def lost_gradients(op: OpInfo, reason: str) -> GradVerdict:
    """The same with gradients."""
    return GradVerdict(full_name(op), OTHER, reason)


def summary(verdicts: list[Verdict]) -> tuple[float, collections.Counter[str], str]:
    """The share of right entries among those that eager accepts, the counts, and a sentence."""
    count = collections.Counter(v.outcome for v in verdicts)
    accepted = len(verdicts) - count[SKIPPED]
    share = count[RIGHT] / accepted if accepted else 0.0
    sentence = (
        f"{count[RIGHT]} of {accepted} entries ({share:.1%}) are right; {count[WRONG]} wrong, {count[CLEAR]} refused "
        f"with a clear error, {count[OTHER]} other errors, {count[FELL_BACK]} ran in eager; "
        f"{count[SKIPPED]} not counted: eager runs none of their samples"
    )
    return share, count, sentence


def section(verdicts: list[Verdict]) -> list[str]:
    """An operator section of docs/coverage.md."""
    _, _, sentence = summary(verdicts)
    samples = sum(v.samples for v in verdicts)
    lines = [
        f"Measured with {environment()}; `make coverage-ops` repeats it.",
        "",
        f"**{sentence}** ({samples} samples).",
        "",
        "| entry | outcome | first reason |",
        "| --- | --- | --- |",
    ]
    rest = [v for v in verdicts if v.outcome not in (RIGHT, SKIPPED)]
    lines += [f"| `{v.name}` | {v.outcome} | {one_line(v.reason)} |" for v in sorted(rest, key=lambda v: v.name)]
    skipped = sorted(v.name for v in verdicts if v.outcome == SKIPPED)
    if skipped:
        lines += ["", "Not counted: " + ", ".join(f"`{name}`" for name in skipped) + "."]
    return lines


def main() -> int:
    """Judges the chosen entries; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grad", action="store_true", help="gradients of the differentiable entries, in float64")
    parser.add_argument("-k", metavar="TEXT", default="", help="only entries whose name contains TEXT")
    parser.add_argument("--no-write", action="store_true", help="leave docs/coverage.md and out/ alone")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)

    chosen = [op for op in op_db if options.k in full_name(op) and (not options.grad or differentiable(op))]
    if not chosen and options.grad and any(options.k in full_name(op) for op in op_db):
        print(f"no entry called like {options.k!r} has gradients")
        return 0
    if not chosen:
        parser.error(f"no entry is called like {options.k!r}")
    start = time.monotonic()
    verdicts: list[Verdict] = []
    judges = (judge_gradients, lost_gradients) if options.grad else (judge, lost)
    for v in isolated(chosen, *judges):
        verdicts.append(v)
        if v.outcome not in (RIGHT, SKIPPED):
            print(f"{v.name:44} {v.outcome:12} {one_line(v.reason, 200)}", flush=True)
        elif len(verdicts) % 100 == 0:
            print(f"... {len(verdicts)} of {len(chosen)} entries, {time.monotonic() - start:.0f} s", flush=True)

    share, count, sentence = summary(verdicts)
    print(f"\n{sentence} ({time.monotonic() - start:.0f} s)")
    if not options.no_write and not options.k:
        write_section("ops-grad" if options.grad else "ops", section(verdicts))
        file = "coverage_ops_grad" if options.grad else "coverage_ops"
        print(write_json(file, [dataclasses.asdict(v) for v in verdicts]))
    return int(share < REQUIRED or count[WRONG] + count[OTHER] > 0)


if __name__ == "__main__":
    sys.exit(main())
