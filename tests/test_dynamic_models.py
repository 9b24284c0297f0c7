"""Models of the zoo on batches and sequences of several sizes: each call beside eager's."""

from __future__ import annotations

import copy
import importlib
import warnings

import pytest
import torch

import tests.models as zoo
import thunder
from tests.harness.compare import as_exact_as_eager, as_float64, clone, differences

SIZES = [(2, 12), (3, 12), (4, 12), (2, 14), (2, 10), (5, 9), (1, 12), (3, 16)]
QUICK = ("llama", "bert", "vit", "clip", "litgpt_pythia")
MODULES = [zoo, *(importlib.import_module(f"tests.models.{name}") for name in zoo._SECTIONS)]


def resize(monkeypatch, batch, length):
    for module in MODULES:
        for name, value in (("BATCH", batch), ("LENGTH", length)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)


@pytest.mark.filterwarnings("ignore::thunder.ThunderWarning")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in zoo.zoo()]
)
def test_model_on_several_sizes(name, monkeypatch):
    resize(monkeypatch, *SIZES[0])
    model, inputs = zoo.zoo()[name].build()
    reference = copy.deepcopy(model)
    compiled = thunder.jit(model)
    met = 0
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for seed, (batch, length) in enumerate(SIZES):
            resize(monkeypatch, batch, length)
            given = inputs(seed)
            want = reference(**clone(given))
            got = compiled(**clone(given))
            met += 1
            if differences(want, got):
                exact = as_float64(reference)(**as_float64(clone(given)))
                assert as_exact_as_eager(want, got, exact), f"batch {batch}, length {length}"
    assert met == len(SIZES)
    if name in QUICK:
        assert thunder.cache_misses(compiled) <= 4
