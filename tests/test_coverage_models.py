"""One model of each kind gives eager's outputs and trains like eager, on two inputs."""

from __future__ import annotations

import pytest

from tests.harness.judge_model import RIGHT, judge
from tests.harness.judge_model_train import judge_training
from tests.models import QUICK, zoo


@pytest.fixture(autouse=True)
def one_thread():
    """The machine is shared, and the models are tiny."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", QUICK)
def test_model_equals_eager(name):
    verdict = judge(zoo()[name])
    assert verdict.outcome == RIGHT, verdict.reason


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", QUICK)
def test_model_trains_like_eager(name):
    verdict = judge_training(zoo()[name])
    assert verdict.outcome == RIGHT, verdict.reason


def test_the_zoo_is_as_broad_as_promised():
    entries = zoo().values()
    assert len(entries) >= 64
    assert len({e.architecture for e in entries}) >= 45
    kinds = {"text", "vision", "audio", "encoder-decoder", "mixture of experts", "state space", "multimodal"}
    assert {e.kind for e in entries} == kinds
    assert sum(e.name.startswith("litgpt_") for e in entries) == 6
    assert sum(e.name.startswith("timm_") for e in entries) >= 6
