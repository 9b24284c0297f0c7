"""Operators that check data in the middle: captured, with the check made at each call."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import thunder
from tests.train_checks import assert_compiled, assert_same_error, check_training

pytestmark = pytest.mark.filterwarnings("ignore::thunder.ThunderWarning")


def leaf(*shape: int) -> torch.Tensor:
    return torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape).sin().requires_grad_()


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("shape", [(4, 3), (4,), (4, 1)])
def test_gaussian_nll_loss(shape, full):
    var = torch.linspace(0, 2, torch.Size(shape).numel()).reshape(shape).requires_grad_()  # 0 is clamped
    check_training(lambda a, b, v: F.gaussian_nll_loss(a, b, v.abs(), full=full), leaf(4, 3), leaf(4, 3), var)


def test_gaussian_nll_loss_checks_each_call():
    def f(a, v):
        return F.gaussian_nll_loss(a, a, v)

    compiled = thunder.jit(f)
    a, good, bad = torch.zeros(4, 3), torch.ones(4, 3), -torch.ones(4, 3)
    torch.testing.assert_close(compiled(a, good), f(a, good))
    assert_same_error(lambda: f(a, bad), lambda: compiled(a, bad), "var has negative entry/entries")
    torch.testing.assert_close(compiled(a, good), f(a, good))
    assert_compiled(compiled)


def test_check_under_create_graph():
    v = torch.ones(4, 3)
    results = []
    for fn in (F.gaussian_nll_loss, thunder.jit(lambda a, b, v: F.gaussian_nll_loss(a, b, v))):
        a = leaf(4, 3)
        (g,) = torch.autograd.grad(fn(a, torch.zeros(4, 3), v), a, create_graph=True)
        results.append(torch.autograd.grad(g.square().sum(), a))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("r", [0, 1, 2, 3, 6])
@pytest.mark.parametrize("again", [False, True])
def test_combinations(r, again):
    check_training(lambda a: torch.combinations(a, r, again) * 2, leaf(5))


WEIGHTS = {
    "none": {},
    "frequency": {"fweights": torch.tensor([1, 2, 0, 4, 1])},
    "reliability": {"aweights": torch.tensor([0.5, 1, 0, 2, 1])},
    "both": {"fweights": torch.tensor([1, 2, 0, 4, 1]), "aweights": torch.tensor([0.5, 1, 0, 2, 1])},
}


@pytest.mark.parametrize("correction", [0, 1, 2])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_cov(weights, correction):
    check_training(lambda a: torch.cov(a, correction=correction, **WEIGHTS[weights]), leaf(3, 5))


def test_corrcoef():
    check_training(lambda a: torch.corrcoef(a) + a.corrcoef(), leaf(3, 5))


def test_cov_checks_its_weights_at_each_call():
    def f(a, w):
        return torch.cov(a, aweights=w)

    compiled = thunder.jit(f)
    a, good = leaf(3, 5).detach(), torch.ones(5)
    torch.testing.assert_close(compiled(a, good), f(a, good))
    assert_same_error(lambda: f(a, -good), lambda: compiled(a, -good), "aweights cannot be negative")
    assert_same_error(lambda: f(a, 0 * good), lambda: compiled(a, 0 * good), "weights sum to zero")
    with pytest.warns(UserWarning, match="degrees of freedom"):
        compiled(a, torch.tensor([1.0, 0, 0, 0, 0]))
    assert_compiled(compiled)
