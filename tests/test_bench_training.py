"""The benchmark's training rows measure what they say: a program that ran in eager reaches no target."""

from __future__ import annotations

import argparse

import pytest
import torch

import thunder
from bench import saved_bytes, training
from bench.row import Row
from bench.train_programs import MEMORY_MODELS, TRAIN_PROGRAMS

pytestmark = pytest.mark.filterwarnings("ignore")


def test_saved_bytes_counts_each_storage_once_and_no_parameter():
    a = torch.randn(64, 64, requires_grad=True)
    w = torch.randn(64, 64, requires_grad=True)
    one = 64 * 64 * 4
    assert saved_bytes.saved_bytes(lambda: (a @ w).sum(), [a, w]) == 0
    assert saved_bytes.saved_bytes(lambda: (a @ w).exp().sum(), [a, w]) == one  # the output of exp
    assert saved_bytes.saved_bytes(lambda: (lambda b: (b * b.t()).sum())(a * 2), [a]) == one  # a * 2 and its transpose
    assert saved_bytes.saved_bytes(lambda: (a * w).sum(), []) == 2 * one


@pytest.mark.parametrize("name", MEMORY_MODELS)
@pytest.mark.parametrize("engine", ["eager", "thunder"])
def test_memory_models_are_measured(name, engine):
    figures = saved_bytes.measure(engine, name, None, small=True)
    assert figures["saved"] > 0
    assert figures["step"] > 0


@pytest.mark.parametrize("program", TRAIN_PROGRAMS, ids=lambda p: p.name)
def test_training_programs_run_and_leave_no_gradient(program):
    torch.manual_seed(0)
    module, step = program.make()
    step(module)
    step(thunder.jit(module))
    assert all(p.grad is None for p in module.parameters())


def test_a_wrong_gradient_stops_the_benchmark(monkeypatch):
    class Lying:
        def __init__(self, module):
            self.module = module

        def __call__(self, *args):
            out = self.module(*args)
            return 2 * out - out.detach()

    monkeypatch.setattr(training.thunder, "jit", Lying)
    options = argparse.Namespace(compile=False, seconds=0.01)
    with pytest.raises(AssertionError, match="a gradient is wrong"):
        training.per_step(TRAIN_PROGRAMS[1], options)


def test_what_ran_in_eager_misses_its_target():
    assert Row("", 0.1, 1.0, "x eager", "", fell_back=True).missed
    assert not Row("", 0.1, 1.0, "x eager", "").missed
    assert Row("", 1.1, 1.0, "x eager", "").missed
