"""Hooks that compiled code registers on tensors it computes, and backward hooks of the modules inside it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import thunder
from tests.jit_checks import nothing_leaks  # noqa: F401
from tests.train_checks import (
    TrainingPair,
    assert_compiled,
    check_training,
    compare_runs,
    leaf,
    weighted_sum,
)

pytestmark = pytest.mark.filterwarnings("ignore::thunder.ThunderWarning", "ignore:Full backward hook is firing")


def test_hook_sees_what_reaches_the_tensor_through_all_its_uses():
    seen = []

    def f(a):
        b = a.sin()
        early = b * 2
        b.register_hook(lambda g: seen.append(g.clone()))
        return early + b.exp(), b

    def run(fn, call):
        a = leaf()
        seen.clear()
        weighted_sum(fn(a)).backward()
        return a.grad, list(seen)

    compare_runs(f, run)


def test_hooks_run_in_the_order_in_which_they_were_registered():
    def f(a):
        b = a.sin()
        b.register_hook(lambda g: g * 2)
        b.register_hook(lambda g: g + 1)
        return b.exp()

    check_training(f, leaf())


def test_hook_is_of_one_tensor_not_of_an_equal_one():
    def f(a):
        b, c = a.sin(), a.sin()
        c.register_hook(lambda g: g * 10)
        return b * a + c.exp()

    check_training(f, leaf())


def test_hook_on_a_view():
    def f(a):
        b = a.sin()
        b[1:].register_hook(lambda g: g * 10)
        c = b[2:]
        c.register_hook(lambda g: g * 100)
        return b.exp() + c.sum()

    check_training(f, leaf())


def test_hook_on_a_view_of_the_same_shape():
    def f(a):
        b = a.sin()
        c = b.view(b.shape)
        c.register_hook(lambda g: g * 100)
        return b.exp() + c

    check_training(f, leaf())


def test_hook_belongs_to_the_version_of_the_tensor_it_was_registered_on():
    def f(a):
        b = a.sin()
        b.register_hook(lambda g: g * 10)
        b.mul_(3)
        b.register_hook(lambda g: g + 1)
        return b.exp() * 2

    check_training(f, leaf())


def test_hook_after_an_in_place_activation():
    def f(a):
        b = (a * 2).relu_()
        b.register_hook(lambda g: g * 10)
        return b.exp()

    check_training(f, leaf())


def test_hook_that_changes_its_gradient_in_place():
    def f(a):
        b = a.sin()
        b.register_hook(lambda g: g.mul_(5))
        return b * a

    check_training(f, leaf())


def test_hook_on_an_integer_or_constant_raises_as_in_eager():
    def f(a):
        (a > 0).register_hook(lambda g: g)

    for fn in (f, thunder.jit(f)):
        with pytest.raises(RuntimeError, match="cannot register a hook on a tensor that doesn't require gradient"):
            fn(leaf())


def test_removed_hook_does_not_run():
    def f(a):
        b = a.sin()
        handle = b.register_hook(lambda g: g * 10)
        b.register_hook(lambda g: g + 1)
        handle.remove()
        with b.register_hook(lambda g: g * 100):
            pass
        return b.exp()

    check_training(f, leaf())


def test_handle_that_leaves_the_call_cannot_remove():
    def f(a):
        b = a.sin()
        return b.exp(), b.register_hook(lambda g: g * 10)

    _, handle = thunder.jit(f)(leaf())
    with pytest.raises(RuntimeError, match="cannot be removed after the call"):
        handle.remove()


def test_hook_does_not_run_when_no_gradient_reaches_it():
    def f(a):
        b, c = a.sin(), a.cos()
        b.register_hook(lambda g: g + 1)
        return b * 2, c * 3

    def run(fn, call):
        a = leaf()
        fn(a)[1].sum().backward()
        return a.grad

    assert_compiled(compare_runs(f, run))


def test_hook_that_closes_over_values_of_the_call():
    def f(a, scale):
        b, mask = a.sin(), a > 0
        b.register_hook(lambda g: g * mask)
        c = a.cos()
        c.register_hook(lambda g, scale=scale: g * scale)
        return b * c

    check_training(f, leaf(), 3.0, allow_refusal=True)


def test_hook_that_fills_a_list_made_by_the_call():
    def f(a):
        seen = []
        b = a.sin()
        b.register_hook(lambda g: seen.append(g) or None)
        return b * a, lambda: seen

    def run(fn, call):
        a = leaf()
        out, get = fn(a)
        out.sum().backward()
        return a.grad, get()

    compare_runs(f, run)


def test_hook_in_a_loop_has_the_last_value_of_its_variable():
    def f(a):
        for i in range(3):
            b = a.sin() * i
            b.register_hook(lambda g: g * (i + 1))
            a = a + b
        return a

    check_training(f, leaf())


def test_hook_reads_state_when_it_runs():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)
            self.scale = 2.0

        def forward(self, a):
            b = self.layer(a)
            b.register_hook(lambda g: g * self.scale)
            return b.exp()

    torch.manual_seed(0)
    pair = TrainingPair(Net())
    pair.step(leaf())
    pair.both(lambda m: setattr(m, "scale", 5.0))
    pair.step(leaf())
    pair.assert_compiled(misses=None)


def test_hook_under_create_graph():
    def f(a):
        b = a.sin()
        b.register_hook(lambda g: g * g)
        return b * a

    def run(fn, call):
        a = leaf()
        (g,) = torch.autograd.grad(fn(a).sum(), a, create_graph=True)
        return g.detach(), torch.autograd.grad(g.square().sum(), a)

    assert_compiled(compare_runs(f, run))


def test_hook_that_returns_another_shape_raises_as_in_eager():
    def f(a):
        b = a.sin()
        b.register_hook(lambda g: g.sum())
        return b * a

    for fn in (f, thunder.jit(f)):
        with pytest.raises(RuntimeError, match="has changed the size of value"):
            fn(leaf()).sum().backward()


def test_hook_with_a_transposed_result():
    def f(a):
        b = a.sin()
        b.register_hook(lambda g: g.t().contiguous().t() * 2)
        return (b * a).view(-1)

    check_training(f, leaf())


@pytest.mark.parametrize("outside", [False, True])
def test_retained_gradient_accumulates(outside):
    def f(a):
        b = a.sin()
        b.retain_grad()
        b.register_hook(lambda g: g * 2)
        return b, (b * a).sum()

    def run(fn, call):
        a = leaf()
        b, loss = fn(a)
        total = loss + (b.exp().sum() if outside else 0)
        total.backward(retain_graph=True)
        first = b.grad.clone()
        loss.backward()
        return first, b.grad, a.grad, b.retains_grad

    assert_compiled(compare_runs(f, run))


def test_retained_gradient_of_a_tensor_that_is_changed_later():
    def f(a):
        b = a.sin()
        b.retain_grad()
        b.mul_(2)
        return b, (b * a).sum()

    def run(fn, call):
        a = leaf()
        b, loss = fn(a)
        loss.backward()
        return a.grad, b.grad

    compare_runs(f, run)


def test_retain_grad_of_what_is_not_returned():
    def f(a):
        b = a.sin()
        b.retain_grad()
        return b * a

    check_training(f, leaf())


# ---- modules ----


class Inner(nn.Module):
    def forward(self, a, b, other=None):
        return a * b, (a + 1, 3), other


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(3, 3)
        self.inner = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
        self.last = nn.Linear(4, 2)

    def forward(self, a):
        return self.last(self.inner(self.first(a).exp()) + self.inner(a))


def test_backward_hooks_of_a_module_that_is_called_twice():
    pair = TrainingPair(Outer())
    seen = []

    def install(module):
        log = []
        seen.append(log)
        module.inner.register_full_backward_hook(lambda m, gi, go: log.append((gi[0].norm(), go[0].norm())))
        module.inner[0].register_full_backward_pre_hook(lambda m, go: (go[0] * 2,))

    pair.both(install)
    pair.step(leaf())
    pair.step(leaf(2, 3))
    pair.step(leaf(2, 3))
    torch.testing.assert_close(*seen)
    assert len(seen[1]) == 6
    pair.assert_compiled(misses=2)


def test_backward_hook_gets_none_and_zeros_as_in_eager():
    seen = []

    class Two(nn.Module):
        def forward(self, a, b, c):
            return a * b, c * 1, a.sum()

    def net():
        module = Two()
        module.register_full_backward_hook(lambda m, gi, go: seen.append((gi, go)))
        return module

    def run(fn, call):
        seen.clear()
        a, c = leaf(), leaf()
        fn(a, torch.ones(4, 3), c)[0].sum().backward()
        return a.grad, c.grad, list(seen)

    class Wrap(nn.Module):
        def __init__(self):
            super().__init__()
            self.two = net()

        def forward(self, a, b, c):
            x, *_ = self.two(a * 2, b, c * 3)
            return x * 2, a

    compare_runs(Wrap(), run)


def test_backward_hook_of_a_module_whose_inputs_need_no_gradient():
    pair = TrainingPair(Outer())
    counts = []

    def install(module):
        log = []
        counts.append(log)
        module.first.register_full_backward_hook(lambda m, gi, go: log.append(go[0].sum()))

    pair.both(install)
    pair.step(leaf().detach())
    pair.step(leaf().detach())
    torch.testing.assert_close(*counts)
    pair.assert_compiled()


def test_backward_hooks_under_create_graph():
    eager = Outer()
    eager.inner.register_full_backward_hook(lambda m, gi, go: (gi[0] * 3 * gi[0],))

    def run(fn, call):
        a = leaf()
        (g,) = torch.autograd.grad(fn(a).square().sum(), a, create_graph=True)
        return g.detach(), torch.autograd.grad(g.square().sum(), a)

    assert_compiled(compare_runs(eager, run))


def test_backward_hook_added_between_calls():
    pair = TrainingPair(Outer())
    pair.step(leaf())
    pair.both(lambda m: m.inner.register_full_backward_hook(lambda m, gi, go: (gi[0] * 3,)))
    pair.step(leaf())
    pair.step(leaf())
    pair.assert_compiled(misses=2)


def test_backward_hooks_under_no_grad():
    eager = Outer()
    eager.inner.register_full_backward_hook(lambda m, gi, go: (gi[0] * 3,))
    compiled = thunder.jit(copy.deepcopy(eager))
    with torch.no_grad():
        torch.testing.assert_close(compiled(leaf()), eager(leaf()))
    assert_compiled(compiled)
