"""The judges of training tell right from wrong: a compiler that lies about gradients or state is found out."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

import thunder
from tests import train_checks


def floating(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def honest(function):
    return function


def wrong_gradient(function):
    """Right values; the gradient is off by a little."""

    def nudge(value):
        return value + 1e-3 * (value - value.detach()) if floating(value) and value.requires_grad else value

    return lambda *args, **kwargs: tree_map(nudge, function(*args, **kwargs))


def no_gradient(function):
    """Right values that require grad; what comes back is zero."""

    def cut(value):
        if not (floating(value) and value.requires_grad):
            return value
        return value.detach() + 0 * value

    return lambda *args, **kwargs: tree_map(cut, function(*args, **kwargs))


def forgets_requires_grad(function):
    return lambda *args, **kwargs: tree_map(
        lambda v: v.detach() if isinstance(v, torch.Tensor) else v, function(*args, **kwargs)
    )


def doubles_accumulation(function):
    """Each output is right; each gradient arrives twice."""

    def twice(value):
        return 2 * value - value.detach() if floating(value) and value.requires_grad else value

    return lambda *args, **kwargs: tree_map(twice, function(*args, **kwargs))


def burnt_in(function):
    first = []

    def call(*args, **kwargs):
        first.append(function(*args, **kwargs))
        return tree_map(lambda v: v.detach().clone().requires_grad_(v.requires_grad), first[0])

    return call


def draws_too_much(function):
    def call(*args, **kwargs):
        result = function(*args, **kwargs)
        torch.rand(1)
        return result

    return call


LIARS = [wrong_gradient, no_gradient, forgets_requires_grad, doubles_accumulation, burnt_in, draws_too_much]


@pytest.fixture
def compiler(monkeypatch, request):
    """Puts the parameter in the place of thunder.jit, with counters that look like one capture and no fallback."""
    compile_with, stats = request.param
    monkeypatch.setattr(thunder, "jit", lambda function, **options: compile_with(function))
    monkeypatch.setattr(thunder, "compile_stats", lambda function: types.SimpleNamespace(**stats))
    return compile_with


COMPILED = {"fallbacks": 0, "cache_misses": 1, "calls": 2}


def function_of_one_leaf():
    train_checks.check_training(lambda a: (a * a).sin(), torch.linspace(0.1, 1, 6).requires_grad_())


def module():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    train_checks.check_training(net, torch.linspace(-1, 1, 12).reshape(4, 3))


@pytest.mark.parametrize("program", [function_of_one_leaf, module])
@pytest.mark.parametrize("compiler", [(honest, COMPILED)], indirect=True)
def test_an_honest_compiler_passes(compiler, program):
    program()


@pytest.mark.parametrize("program", [function_of_one_leaf, module])
@pytest.mark.parametrize(
    "compiler", [(liar, COMPILED) for liar in LIARS], indirect=True, ids=[f.__name__ for f in LIARS]
)
def test_a_liar_is_found_out(compiler, program):
    with pytest.raises(AssertionError):
        program()


@pytest.mark.parametrize(
    "compiler", [(honest, {**COMPILED, "fallbacks": 1}), (honest, {**COMPILED, "cache_misses": 2})], indirect=True
)
def test_a_fallback_and_a_second_capture_are_found_out(compiler):
    with pytest.raises(AssertionError, match=r"fell back|captured"):
        function_of_one_leaf()


@pytest.mark.parametrize("compiler", [(honest, COMPILED)], indirect=True)
def test_a_change_of_state_is_found_out(compiler):
    pair = train_checks.TrainingPair(nn.BatchNorm1d(3))
    pair.model.running_mean.add_(1)
    with pytest.raises(AssertionError):
        pair.step(torch.randn(4, 3))


@pytest.mark.parametrize("compiler", [(wrong_gradient, COMPILED)], indirect=True)
def test_compare_runs_finds_a_wrong_gradient(compiler):
    def run(fn, call):
        a = torch.ones(3, requires_grad=True)
        return torch.autograd.grad(fn(a).sum(), a)

    with pytest.raises(AssertionError):
        train_checks.compare_runs(lambda a: a.exp(), run)


def test_none_is_not_zero():
    assert train_checks.gradients_differ([None], [torch.zeros(2)])
    assert train_checks.gradients_differ([torch.zeros(2)], [None])
    assert not train_checks.gradients_differ([None], [None])


@pytest.mark.parametrize(("error", "found"), [(1e-6, 0), (1e-4, 1), (1e-2, 1)])
def test_gradients_are_compared_relative_to_their_largest_component(error, found):
    exact = torch.tensor([1000.0, 0.0])
    assert len(train_checks.gradients_differ([exact], [exact + 1000 * error * torch.tensor([0.0, 1.0])])) == found
