"""Runs one differentiable entry of torch's `op_db` forward and backward through eager and `thunder.jit`."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.testing._internal.common_utils import set_rng_seed
from torch.testing._internal.opinfo.core import OpInfo, SampleInput
from torch.utils._pytree import tree_map

import thunder
from tests.harness.compare import children, clone, differences, gradients_differ
from tests.harness.judge_op import CLEAR, OTHER, RIGHT, SAMPLES, SKIPPED, UNDEFINED_VALUES, WRONG, Verdict, full_name

FELL_BACK = "fell back"  # right, and not by compiled code
SEVERITY = (SKIPPED, RIGHT, FELL_BACK, CLEAR, OTHER, WRONG)


class GradVerdict(Verdict):
    """What became of one entry: the worst that happened over its samples."""

    severity = SEVERITY


def why_eager(caught: list[warnings.WarningMessage]) -> str:
    """The reason of the first fallback among recorded warnings."""
    texts = [str(w.message) for w in caught if issubclass(w.category, thunder.ThunderWarning)]
    return texts[0].partition("gradients are needed: ")[2] or texts[0] if texts else "no warning says why"


def differentiable(op: OpInfo) -> bool:
    """Whether the entry has gradients in float64."""
    return op.supports_autograd and torch.float64 in op.supported_backward_dtypes("cpu")


def judge_gradients(op: OpInfo) -> GradVerdict:
    """Compares outputs and gradients of the first samples in float64; never raises for an operator's sake."""
    verdict = GradVerdict(full_name(op))
    for index, (sample, fresh) in enumerate(_pairs(op)):
        outcome, reason = _judge_sample(op, sample, fresh)
        verdict.samples += outcome != SKIPPED
        verdict.worse(outcome, f"sample {index}: {reason}" if reason else "")
    return verdict


def _pairs(op: OpInfo) -> Iterator[tuple[SampleInput, SampleInput]]:
    try:
        return zip(_samples(op, 0), _samples(op, 1), strict=False)
    except Exception:  # a sample generator needs a library that is missing here
        return iter(())


def _samples(op: OpInfo, seed: int) -> list[SampleInput]:
    set_rng_seed(seed)
    samples = op.sample_inputs("cpu", torch.float64, requires_grad=True, set_seed=False)
    return list(itertools.islice(samples, SAMPLES))


def _leaves(value: Any) -> Any:
    """The arguments with each tensor that is the result of an operation cut from it."""

    def cut(part: Any) -> Any:
        if isinstance(part, torch.Tensor) and not part.is_leaf:
            return part.detach().requires_grad_()
        return part

    return tree_map(cut, value)


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Every tensor in containers and result objects, in a fixed order."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for part in (children(value) or {}).values() for tensor in tensors_in(part)]


def random_like(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Normal noise in the tensor's shape and dtype."""
    return torch.randn(tensor.shape, dtype=tensor.dtype, generator=generator)


class _Step:
    """One forward and backward: outputs, the gradients of the arguments, the arguments afterwards."""

    def __init__(self, function: Callable[..., Any], arguments: Any, process: Callable[[Any], Any], seed: int) -> None:
        self.arguments = arguments
        torch.manual_seed(seed)
        self.outputs = function(*arguments)
        generator = torch.Generator().manual_seed(seed)
        # Some entries say which function of the output has a gradient that is defined (eigenvectors up to a phase).
        chosen = [t for t in tensors_in(process(self.outputs)) if t.requires_grad]
        leaves = [t for t in tensors_in(arguments) if t.requires_grad]
        self.differentiable = bool(chosen and leaves)
        self.gradients: tuple[torch.Tensor | None, ...] = ()
        if self.differentiable:
            weights = [random_like(t, generator) for t in chosen]
            self.gradients = torch.autograd.grad(chosen, leaves, weights, allow_unused=True)


def _judge_sample(op: OpInfo, sample: SampleInput, fresh: SampleInput) -> tuple[str, str]:
    """The outcome over a capturing step and a step with fresh values and other incoming gradients."""
    function = op.op

    def program(first: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return function(first, *args, **kwargs)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return _judge_steps(op, program, (sample, fresh), caught)


def _judge_steps(
    op: OpInfo,
    program: Callable[..., Any],
    samples: tuple[SampleInput, SampleInput],
    caught: list[warnings.WarningMessage],
) -> tuple[str, str]:
    compiled = thunder.jit(program, fallback="error")
    tried = False
    for seed, each in enumerate(samples):
        arguments = _leaves((each.input, each.args, each.kwargs))
        eager_arguments, our_arguments = clone(arguments), clone(arguments)
        try:
            eager = _Step(program, eager_arguments, each.output_process_fn_grad, seed)
        except Exception:
            continue
        if not eager.differentiable:
            continue
        tried = True
        try:
            ours = _Step(compiled, our_arguments, each.output_process_fn_grad, seed)
        except thunder.CaptureError as error:
            return CLEAR, str(error)
        except Exception as error:
            return OTHER, f"{type(error).__name__}: {error}"
        found = differences(eager.outputs, ours.outputs, strides=True)
        if op.name in UNDEFINED_VALUES:
            found = [line for line in found if "values differ" not in line]
        found += [f"gradient {line}" for line in gradients_differ(eager.gradients, ours.gradients)]
        found += [f"arguments {line}" for line in differences(eager_arguments, our_arguments)]
        if found:
            return WRONG, f"{'fresh values: ' if seed else ''}{found[0]}"
    if not tried:
        return SKIPPED, ""
    return (FELL_BACK, why_eager(caught)) if thunder.compile_stats(compiled).fallbacks else (RIGHT, "")
