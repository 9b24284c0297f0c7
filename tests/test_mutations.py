"""Each attribute of twelve models changed and put back, one at a time: a compiled model does as the model does.

The quick tier takes some changes of each model, always the same ones; ``pytest -m slow tests/test_mutations.py`` all.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

import thunder
from tests.harness.compare import differences
from tests.harness.mutations import Mutation, mutations
from tests.models import zoo

MODELS = (
    "llama", "gpt2", "mixtral", "mamba", "bert", "t5", "vit", "convnext", "clip", "whisper", "litgpt_pythia",
    "timm_resnet18",
)  # fmt: skip
SAMPLE = 5
# transformers makes its masks and its products of experts another way when it is told that it is compiled, as
# torch.compile and a capture tell it; with these changed, its two ways differ in eager too.
TWO_WAYS = (".is_causal = ", ".is_decoder = ", ".scaling = -0.0", ".scale = -0.0", ".experts.gate_up_proj.double()",
            ".experts.down_proj.double()")  # fmt: skip


def outcome(call: Any, inputs: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    try:
        return call(**copy.deepcopy(inputs))
    except Exception as error:
        return f"{type(error).__name__}"


def check_mutations(model: nn.Module, compiled: Any, inputs: dict[str, Any], changes: Sequence[Mutation]) -> list[str]:
    """Every change after which, or after whose undoing, the compiled model does not do as the model does."""
    found: list[str] = []

    def compare(what: str) -> bool:
        lines = differences(outcome(model, inputs), outcome(compiled, inputs))
        found.extend(f"{what}: {line}" for line in lines[:1])
        return not lines

    assert compare("as it came")
    for change in changes:
        try:
            undo = change.apply()
        except Exception:  # what cannot be written is no change
            continue
        try:
            compare(change.name)
        finally:
            undo()
        compare(f"{change.name}, put back")
    return found


def run(name: str, sample: int | None) -> list[str]:
    model, make_inputs = zoo()[name].build()
    changes = [c for c in mutations(model) if not any(part in c.name for part in TWO_WAYS)]
    if sample is not None:
        changes = random.Random(name).sample(changes, min(sample, len(changes)))
    compiled = thunder.jit(model, fallback="eager")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = check_mutations(model, compiled, make_inputs(0), changes)
    stats = thunder.compile_stats(compiled)
    assert stats.cache_hits > len(changes) / 4, stats
    return found


@pytest.mark.parametrize("name", MODELS)
def test_model_with_some_attributes_changed(name):
    assert not run(name, SAMPLE)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_model_with_every_attribute_changed(name):
    assert not run(name, None)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.scale, self.config = nn.Linear(4, 4), 2.0, {"shift": [1.0, 2.0]}

    def forward(self, x):
        return self.linear(x) * self.scale + sum(self.config["shift"])


def test_mutations_reach_every_kind_of_attribute():
    names = " ".join(change.name for change in mutations(Scaled()))
    for part in ("linear.weight.requires_grad", "model.scale = 3.25", "shift.1 =", "shift.append", "forward hook",
                 "model.training = False", "linear.in_features = 5", "linear.bias replaced"):  # fmt: skip
        assert part in names


def test_mutations_are_undone():
    model = Scaled()
    before = copy.deepcopy(model)
    for change in mutations(model):
        change.apply()()
    assert not differences(vars(before), vars(model))
    assert torch.equal(before.linear.weight, model.linear.weight)


def test_mutations_find_a_compiler_that_does_not_look_again():
    model = Scaled()
    compiled = thunder.jit(model, cache="same input", fallback="eager")
    with torch.no_grad():
        found = check_mutations(model, compiled, {"x": torch.ones(2, 4)}, list(mutations(model)))
    assert any("model.scale" in line for line in found)
    assert any("forward hook" in line for line in found)
