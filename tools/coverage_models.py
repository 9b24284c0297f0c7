"""`make coverage-models`: every model of the zoo, eager against thunder.jit, on two different inputs.

    python tools/coverage_models.py [--train] [--quick] [-k TEXT] [--no-write]

With --train: two training steps of each, with the gradients of all parameters and the buffers. Prints a row per
configuration, writes out/coverage_models.json (coverage_models_train.json) and the section of docs/coverage.md. The
exit status is 1 when a configuration gives a wrong result or an unclear error, or when fewer than 95% (93%) are right.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import logging
import os
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from tests.harness.isolated import isolated
from tests.harness.judge_model import CLEAR, OTHER, RIGHT, WRONG, Verdict, judge
from tests.harness.judge_model_train import judge_training
from tests.harness.judge_op_grad import FELL_BACK
from tests.harness.report import environment, one_line, write_json, write_section
from tests.models import QUICK, Entry, zoo

REQUIRED, REQUIRED_IN_TRAINING = 0.95, 0.93


def lost(entry: Entry, reason: str) -> Verdict:
    """The verdict on a configuration that took its process down."""
    return Verdict(entry.name, entry.architecture, entry.kind, OTHER, reason)


def section(verdicts: list[Verdict], train: bool) -> list[str]:
    """The models section of docs/coverage.md, or the one of training."""
    count = collections.Counter(v.outcome for v in verdicts)
    architectures = len({v.architecture for v in verdicts})
    if train:
        how = "in two training steps on different inputs, gradients and buffers included, without a fallback"
        timed = "eager step ms | first step ms | later ms"
    else:
        how = "on two different inputs, the second from the cache"
        timed = "eager ms | first call ms | later ms"
    lines = [
        f"Measured with {environment()}; `make coverage-models` repeats it.",
        "",
        f"**{count[RIGHT]} of {len(verdicts)} configurations ({count[RIGHT] / len(verdicts):.1%}) of {architectures} "
        f"architectures are right** {how}; {count[WRONG]} wrong, {count[CLEAR]} refused with a clear error, "
        f"{count[OTHER]} other errors{f', {count[FELL_BACK]} ran in eager' if train else ''}.",
        "",
        f"| configuration | kind | outcome | {timed} |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    for v in verdicts:
        outcome = v.outcome if v.outcome == RIGHT else f"**{v.outcome}**: {one_line(v.reason)}"
        lines.append(f"| {v.name} | {v.kind} | {outcome} | {v.eager_ms:.2f} | {v.first_ms:.1f} | {v.later_ms:.2f} |")
    return lines


def main() -> int:
    """Judges the chosen configurations; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", action="store_true", help="training steps with gradients instead of inference")
    parser.add_argument("--quick", action="store_true", help="the subset that the tests run")
    parser.add_argument("-k", metavar="TEXT", default="", help="only configurations whose name contains TEXT")
    parser.add_argument("--no-write", action="store_true", help="leave docs/coverage.md and out/ alone")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)

    chosen = [e for e in zoo().values() if options.k in e.name and (not options.quick or e.name in QUICK)]
    if not chosen:
        parser.error(f"no configuration is called like {options.k!r}")
    verdicts: list[Verdict] = []
    print(f"{'configuration':26} {'outcome':12} {'eager ms':>9} {'first ms':>9} {'later ms':>9}")
    for v in isolated(chosen, judge_training if options.train else judge, lost):
        verdicts.append(v)
        timing = f"{v.eager_ms:9.2f} {v.first_ms:9.1f} {v.later_ms:9.2f}"
        print(f"{v.name:26} {v.outcome:12} {timing}  {one_line(v.reason)}", flush=True)

    count = collections.Counter(v.outcome for v in verdicts)
    share = count[RIGHT] / len(verdicts)
    print(
        f"\n{share:.1%} right: "
        + ", ".join(f"{count[o]} {o}" for o in (RIGHT, WRONG, CLEAR, OTHER, FELL_BACK) if count[o])
    )
    if not options.no_write and not options.quick and not options.k:
        write_section("models-train" if options.train else "models", section(verdicts, options.train))
        name = "coverage_models_train" if options.train else "coverage_models"
        print(write_json(name, [dataclasses.asdict(v) for v in verdicts]))
    required = REQUIRED_IN_TRAINING if options.train else REQUIRED
    return int(share < required or count[WRONG] + count[OTHER] > 0)


if __name__ == "__main__":
    sys.exit(main())
