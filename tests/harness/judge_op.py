"""Runs one entry of torch's `op_db` through eager and `thunder.jit` and says which of five things happened."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.testing._internal.common_utils import set_rng_seed
from torch.testing._internal.opinfo.core import OpInfo, SampleInput

import thunder
from tests.harness.compare import clone, differences

RIGHT, CLEAR, OTHER, WRONG, SKIPPED = "right", "clear error", "other error", "wrong", "eager fails"
SEVERITY = (SKIPPED, RIGHT, CLEAR, OTHER, WRONG)
DTYPES = (torch.float32, torch.int64, torch.bool)
SAMPLES = 5  # of each dtype; an entry that knows none of the dtypes above is tried in complex64

# Their result is uninitialised memory: only dtype, shape and strides mean anything.
UNDEFINED_VALUES = {"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"}


@dataclass
class Verdict:
    """What became of one entry: the worst that happened over its dtypes and samples."""

    severity: ClassVar[tuple[str, ...]] = SEVERITY
    name: str
    outcome: str = SKIPPED
    reason: str = ""
    samples: int = 0

    def worse(self, outcome: str, reason: str) -> None:
        """Takes note of one sample's outcome; the first reason of the worst kind stays."""
        if self.severity.index(outcome) > self.severity.index(self.outcome):
            self.outcome, self.reason = outcome, reason


def full_name(op: OpInfo) -> str:
    """`name` or `name.variant`: unique in op_db."""
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name


def judge(op: OpInfo) -> Verdict:
    """Compares the first samples of each supported dtype; never raises for an operator's sake."""
    verdict = Verdict(full_name(op))
    with torch.no_grad():
        for dtype in [d for d in DTYPES if op.supports_dtype(d, "cpu")] or [torch.complex64]:
            # The second list has the same metadata and fresh values: what a call from the cache must cope with.
            for index, (sample, fresh) in enumerate(_pairs(op, dtype)):
                outcome, reason = _judge_sample(op, sample, fresh)
                verdict.samples += outcome != SKIPPED
                verdict.worse(
                    outcome, f"{str(dtype).removeprefix('torch.')} sample {index}: {reason}" if reason else ""
                )
    return verdict


def _pairs(op: OpInfo, dtype: torch.dtype) -> Iterator[tuple[SampleInput, SampleInput]]:
    try:
        return zip(_samples(op, dtype, 0), _samples(op, dtype, 1), strict=False)
    except Exception:  # a sample generator needs a library that is missing here
        return iter(())


def _samples(op: OpInfo, dtype: torch.dtype, seed: int) -> list[SampleInput]:
    """The first samples; `set_seed=False`, because op_db would otherwise seed each sample itself, always alike."""
    set_rng_seed(seed)
    return list(itertools.islice(op.sample_inputs("cpu", dtype, requires_grad=False, set_seed=False), SAMPLES))


def _judge_sample(op: OpInfo, sample: SampleInput, fresh: SampleInput) -> tuple[str, str]:
    """The outcome over a capturing call and a call with fresh values."""
    function = op.op

    def program(first: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return function(first, *args, **kwargs)

    compiled = thunder.jit(program, fallback="error")
    tried = False
    for seed, each in enumerate((sample, fresh)):
        eager_arguments = clone((each.input, each.args, each.kwargs))
        our_arguments = clone((each.input, each.args, each.kwargs))
        try:
            expected = _seeded(program, eager_arguments, seed)
        except Exception:
            continue
        tried = True
        try:
            got = _seeded(compiled, our_arguments, seed)
        except thunder.CaptureError as error:
            return CLEAR, str(error)
        except Exception as error:
            return OTHER, f"{type(error).__name__}: {error}"
        found = differences(expected, got, strides=True)
        if op.name in UNDEFINED_VALUES:
            found = [line for line in found if "values differ" not in line]
        found += [f"arguments {line}" for line in differences(eager_arguments, our_arguments)]
        if found:
            return WRONG, f"{'fresh values: ' if seed else ''}{found[0]}"
    if not tried:
        return SKIPPED, ""
    fallbacks = getattr(thunder.compile_stats(compiled), "fallbacks", 0)
    return (OTHER, "fell back") if fallbacks else (RIGHT, "")


def _seeded(function: Callable[..., Any], arguments: tuple[Any, ...], seed: int) -> Any:
    torch.manual_seed(seed)
    return function(*arguments)
