"""The judges behind the coverage figures tell right from wrong: a compiler that lies is found out."""

from __future__ import annotations

import types

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_map

import thunder
from tests.harness import judge_model, judge_model_train, judge_op, judge_op_grad
from tests.models import zoo

ADD = next(op for op in op_db if op.name == "add")
MUL = next(op for op in op_db if op.name == "mul")


def honest(function):
    return function


def off_by_a_little(function):
    def nudge(value):
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value + 1e-3 if floating else value

    return lambda *args, **kwargs: tree_map(nudge, function(*args, **kwargs))


def burnt_in(function):
    """Returns the first call's result for ever."""
    first = []

    def call(*args, **kwargs):
        first.append(function(*args, **kwargs))
        return first[0]

    return call


def writes_to_inputs(function):
    def call(*args, **kwargs):
        result = function(*args, **kwargs)
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                value.add_(1)
        return result

    return call


def refuses(function):
    def call(*args, **kwargs):
        raise thunder.CaptureError("cannot")

    return call


def breaks(function):
    def call(*args, **kwargs):
        raise KeyError("oops")

    return call


@pytest.fixture
def compiler(monkeypatch, request):
    """Puts the parameter in the place of thunder.jit, with counters that look like one capture and one hit."""
    monkeypatch.setattr(thunder, "jit", lambda function, **options: request.param(function))
    stats = types.SimpleNamespace(fallbacks=0)
    for name, answer in (("cache_hits", 1), ("cache_misses", 1), ("compile_stats", stats)):
        monkeypatch.setattr(thunder, name, lambda function, answer=answer: answer)
    return request.param


CASES = [
    (honest, "right"),
    (off_by_a_little, "wrong"),
    (burnt_in, "wrong"),
    (writes_to_inputs, "wrong"),
    (refuses, "clear error"),
    (breaks, "other error"),
]


@pytest.mark.parametrize(("compiler", "outcome"), CASES, indirect=["compiler"])
def test_operator_verdict(compiler, outcome):
    assert judge_op.judge(ADD).outcome == outcome


@pytest.mark.parametrize(("compiler", "outcome"), CASES, indirect=["compiler"])
def test_model_verdict(compiler, outcome):
    assert judge_model.judge(zoo()["vit"]).outcome == outcome


def scaled_gradient(function):
    """Right values; the gradients are too large by a little."""

    def scale(value):
        differentiable = isinstance(value, torch.Tensor) and value.requires_grad
        return value + 1e-2 * (value - value.detach()) if differentiable else value

    return lambda *args, **kwargs: tree_map(scale, function(*args, **kwargs))


def detached(function):
    """Right values without gradients, though they say that they have some."""

    def cut(value):
        differentiable = isinstance(value, torch.Tensor) and value.requires_grad
        return value.detach() + 0 * value if differentiable else value

    return lambda *args, **kwargs: tree_map(cut, function(*args, **kwargs))


TRAINING_CASES = [*CASES, (scaled_gradient, "wrong"), (detached, "wrong")]


@pytest.mark.parametrize(("compiler", "outcome"), TRAINING_CASES, indirect=["compiler"])
def test_gradient_verdict(compiler, outcome):
    if compiler is writes_to_inputs:  # torch itself objects to a write to a leaf
        outcome = "other error"
    assert judge_op_grad.judge_gradients(MUL).outcome == outcome


@pytest.mark.parametrize(("compiler", "outcome"), TRAINING_CASES, indirect=["compiler"])
def test_training_verdict(compiler, outcome):
    verdict = judge_model_train.judge_training(zoo()["vit"])
    if compiler in (burnt_in, writes_to_inputs):  # torch itself objects to a freed graph, and to a changed saved tensor
        outcome = "other error"
    assert verdict.outcome == outcome, verdict.reason


@pytest.mark.parametrize("compiler", [honest], indirect=True)
def test_a_fallback_is_not_right(compiler, monkeypatch):
    monkeypatch.setattr(thunder, "compile_stats", lambda function: types.SimpleNamespace(fallbacks=1))
    assert judge_op_grad.judge_gradients(MUL).outcome == "fell back"
    assert judge_model_train.judge_training(zoo()["vit"]).outcome == "fell back"


def test_a_missed_cache_is_not_right(monkeypatch):
    monkeypatch.setattr(thunder, "jit", lambda model, **options: honest(model))
    monkeypatch.setattr(thunder, "cache_hits", lambda f: 0)
    monkeypatch.setattr(thunder, "cache_misses", lambda f: 2)
    monkeypatch.setattr(thunder, "compile_stats", lambda f: types.SimpleNamespace(fallbacks=0, entries=[]))
    assert judge_model.judge(zoo()["vit"]).outcome == "wrong"
