"""Where a call needs gradients, where it does not, and how both share one callable (more: test_train_*.py)."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import thunder
from tests.jit_checks import Pair, assert_same, assert_served, nothing_leaks  # noqa: F401


def x(*shape: int) -> torch.Tensor:
    return torch.linspace(-1, 1, torch.Size(shape or (4, 3)).numel()).reshape(shape or (4, 3))


def test_module_in_training_gives_eagers_results_and_gradients_without_a_warning():
    p = Pair(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1)).train())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            eager, ours = p.eager(x() + step), p.compiled(x() + step)
            assert_same(eager, ours)
            eager.sum().backward()
            ours.sum().backward()
            for a, b in zip(p.eager.parameters(), p.model.parameters(), strict=True):
                assert_same(a.grad, b.grad)
    assert_served(p.compiled, misses=1, hits=2)
    assert_same(dict(p.eager.state_dict()), dict(p.model.state_dict()))


def test_training_loop_follows_eager():
    torch.manual_seed(0)
    p = Pair(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)))
    target = x().sum(1, keepdim=True)
    losses = []
    for module in (p.eager, p.compiled):
        optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", thunder.ThunderWarning)
            for _ in range(10):
                optimizer.zero_grad()
                loss = (module(x()) - target).square().mean()
                loss.backward()
                optimizer.step()
        losses.append(float(loss))
    assert losses[0] == pytest.approx(losses[1])
    assert losses[1] < float((target).square().mean())


def test_function_of_an_input_that_requires_grad():
    f = lambda a, b: (a * b).sin().sum()  # noqa: E731
    compiled = thunder.jit(f)
    a, b = x().requires_grad_(), x().requires_grad_()
    out, expected = compiled(a, x()), f(b, x())
    out.backward()
    expected.backward()
    compiled(a, x())
    assert_same(b.grad, a.grad)
    assert_served(compiled, misses=1, hits=1)


def test_input_in_a_container_that_requires_grad():
    f = lambda box: box["a"][0] * 2  # noqa: E731
    compiled = thunder.jit(f)
    a = x().requires_grad_()
    assert compiled({"a": [a]}).requires_grad
    assert not compiled({"a": [x()]}).requires_grad
    assert_served(compiled, misses=2, hits=0)


def test_closure_tensor_that_requires_grad():
    w = x().requires_grad_()
    f = lambda a: a * w  # noqa: E731
    compiled = thunder.jit(f)
    out = compiled(x())
    assert out.requires_grad
    out.sum().backward()
    assert_same(x(), w.grad)
    with torch.no_grad():
        assert_same(f(x()), compiled(x()))


def test_closure_tensor_that_begins_to_require_grad_later():
    w = x()
    f = lambda a: a * w  # noqa: E731
    compiled = thunder.jit(f)
    assert_same(f(x()), compiled(x()))
    w.requires_grad_()
    out = compiled(x())
    out.sum().backward()
    assert_same(x(), w.grad)


def test_grad_mode_on_and_nothing_requiring_grad_compiles():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU()).requires_grad_(False)
    compiled = thunder.jit(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            assert_same(net(x()), compiled(x()))
    assert_served(compiled, misses=1, hits=2)


def test_grad_mode_and_no_grad_are_different_programs():
    f = lambda a: (a * 2, torch.is_grad_enabled())  # noqa: E731
    compiled = thunder.jit(f)
    for _ in range(2):
        assert compiled(x())[1] is True
        with torch.no_grad():
            assert compiled(x())[1] is False
    assert_served(compiled, misses=2, hits=2)


def test_calls_with_and_without_gradients_share_one_callable():
    p = Pair(nn.Linear(3, 2))
    for _ in range(2):
        assert p.compiled(x()).requires_grad
        with torch.no_grad():
            assert not p.same(x()).requires_grad
    assert_served(p.compiled, misses=2, hits=2)


def test_parameter_that_is_frozen_or_thawed_changes_the_way():
    p = Pair(nn.Linear(3, 2).requires_grad_(False))
    p.same(x())
    p.compiled.weight.requires_grad_(True)
    assert p.compiled(x()).requires_grad
    p.compiled.weight.requires_grad_(False)
    p.same(x())
    assert not p.compiled(x()).requires_grad


def test_result_under_no_grad_does_not_require_grad():
    compiled = thunder.jit(nn.Linear(3, 2))
    with torch.no_grad():
        assert not compiled(x()).requires_grad
        assert not compiled(x()).requires_grad
    with torch.inference_mode():
        assert not compiled(x()).requires_grad


def test_parameter_returned_under_no_grad_still_requires_grad():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(x())

        def forward(self, a):
            return self.weight, a * self.weight

    net = Net()
    compiled = thunder.jit(net)
    with torch.no_grad():
        for _ in range(2):
            weight, out = compiled(x())
            assert weight is net.weight
            assert weight.requires_grad
            assert not out.requires_grad


def test_gradients_enabled_inside_the_function_reach_eagers_result():
    def f(a):
        with torch.enable_grad():
            b = a.detach().requires_grad_()
            loss = (b * b).sum()
            return torch.autograd.grad(loss, b)[0]

    compiled = thunder.jit(f)
    with torch.no_grad():
        for _ in range(2):
            try:
                ours = compiled(x())
            except thunder.CaptureError as error:
                assert "What to do" in str(error)
                continue
            assert_same(f(x()), ours)


def test_enable_grad_inside_with_a_parameter_runs_eager_or_right():
    net = nn.Linear(3, 2)

    def f(a):
        with torch.enable_grad():
            return net(a)

    compiled = thunder.jit(f)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", thunder.ThunderWarning)
        for _ in range(2):
            out, expected = compiled(x()), f(x())
            assert_same(expected, out)
            assert out.requires_grad == expected.requires_grad


def test_backward_inside_is_refused_or_right():
    net = nn.Linear(3, 2)

    def f(a):
        with torch.enable_grad():
            net(a).sum().backward()
        return net.weight.grad * 1

    compiled = thunder.jit(f)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", thunder.ThunderWarning)
        net.weight.grad = None
        expected = f(x())
        net.weight.grad = None
        try:
            ours = compiled(x())
        except thunder.CaptureError as error:
            assert "What to do" in str(error)
            assert net.weight.grad is None
            return
        assert_same(expected, ours)


def test_what_cannot_be_differentiated_runs_eager_with_one_warning():
    def f(a):
        b = a.sin()
        b.register_hook(lambda g: g * 3)
        return b * a

    compiled = thunder.jit(f)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            a, b = x().requires_grad_(), x().requires_grad_()
            compiled(a).sum().backward()
            f(b).sum().backward()
            assert_same(b.grad, a.grad)
    ours = [w for w in caught if issubclass(w.category, thunder.ThunderWarning)]
    assert len(ours) == (1 if thunder.compile_stats(compiled).fallbacks else 0)
