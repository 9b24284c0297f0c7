"""Training with code of the user in the graph: hooks, autograd.Function, activation checkpointing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import thunder
from tests.jit_checks import nothing_leaks  # noqa: F401
from tests.train_checks import (
    Cube,
    TrainingPair,
    assert_compiled,
    assert_same_error,
    check_training,
    compare_runs,
    leaf,
    mlp,
    weighted_sum,
    x,
)

pytestmark = pytest.mark.filterwarnings("ignore::thunder.ThunderWarning")


# ---- hooks outside ----


def test_hook_on_an_input_leaf():
    def run(fn, call):
        a, seen = leaf(), []
        a.register_hook(lambda g: (seen.append(g.clone()), g * 2)[1])
        weighted_sum(fn(a)).backward()
        return a.grad, seen

    assert_compiled(compare_runs(lambda a: (a * a).sin(), run))


def test_hook_on_a_non_leaf_input():
    def run(fn, call):
        a, seen = leaf(), []
        b = a * 2
        b.register_hook(seen.append)
        weighted_sum(fn(b)).backward()
        return a.grad, seen

    assert_compiled(compare_runs(lambda b: b.exp(), run))


def test_hook_on_an_output():
    def run(fn, call):
        a, seen = leaf(), []
        out = fn(a)
        out.register_hook(lambda g: (seen.append(g.clone()), g + 1)[1])
        weighted_sum(out).backward()
        return a.grad, seen

    assert_compiled(compare_runs(lambda a: (a * a).sin(), run))


def test_retain_grad_on_inputs_and_outputs():
    def run(fn, call):
        a = leaf()
        b = a * 2
        b.retain_grad()
        out = fn(b)
        out.retain_grad()
        weighted_sum(out).backward()
        return a.grad, b.grad, out.grad

    assert_compiled(compare_runs(lambda b: b.exp() * b, run))


def test_parameter_hook_changes_the_gradient():
    pair = TrainingPair(mlp())
    pair.both(lambda m: m[0].weight.register_hook(lambda g: g * 10))
    pair.step(x())
    pair.step(x() + 1)
    pair.assert_compiled()


def test_parameter_hook_added_and_removed_between_calls():
    pair = TrainingPair(mlp())
    pair.step(x())
    handles = []
    pair.both(lambda m: handles.append(m[0].weight.register_hook(lambda g: g * 10)))
    pair.step(x() + 1)
    for handle in handles:
        handle.remove()
    pair.step(x() + 2)
    pair.assert_compiled(misses=None)


def test_post_accumulate_grad_hook_sees_each_gradient_once():
    pair = TrainingPair(mlp())
    orders = []

    def install(module):
        order = []
        orders.append(order)
        for name, parameter in module.named_parameters():
            parameter.register_post_accumulate_grad_hook(
                lambda p, name=name: order.append((name, float(p.grad.norm())))
            )

    pair.both(install)
    pair.step(x())
    pair.step(x() + 1)
    eager, ours = (sorted(order) for order in orders)
    assert [name for name, _ in eager] == [name for name, _ in ours]
    assert [norm for _, norm in eager] == pytest.approx([norm for _, norm in ours], rel=1e-4)
    pair.assert_compiled()


def test_optimizer_in_the_backward():
    pair = TrainingPair(mlp())

    def install(module):
        def step(parameter):
            with torch.no_grad():
                parameter.sub_(parameter.grad, alpha=0.1)
            parameter.grad = None

        for parameter in module.parameters():
            parameter.register_post_accumulate_grad_hook(step)

    pair.both(install)
    for call in range(3):
        pair.step(x() + call)
    pair.assert_compiled()


def test_hook_that_raises_reaches_the_user():
    pair = TrainingPair(mlp())

    def install(module):
        def hook(grad):
            raise KeyError("from the hook")

        module[0].weight.register_hook(hook)

    pair.both(install)
    assert_same_error(
        lambda: pair.eager(x()).sum().backward(), lambda: pair.compiled(x()).sum().backward(), "from the hook"
    )
    pair.assert_compiled()


def test_multi_grad_hook():
    def run(fn, call):
        a, b, seen = leaf(), leaf(), []
        torch.autograd.graph.register_multi_grad_hook((a, b), lambda grads: seen.extend(grads))
        weighted_sum(fn(a, b)).backward()
        return seen, a.grad, b.grad

    assert_compiled(compare_runs(lambda a, b: a * b.sin(), run))


# ---- hooks inside ----


def test_hook_on_an_intermediate_inside():
    def f(a):
        b = a.sin()
        b.register_hook(lambda g: g * 3)
        return b * a

    check_training(f, leaf())


def test_retain_grad_on_an_intermediate_that_is_returned():
    def f(a):
        b = a.sin()
        b.retain_grad()
        return b, (b * a).sum()

    def run(fn, call):
        a = leaf()
        b, loss = fn(a)
        loss.backward()
        return a.grad, b.grad

    assert_compiled(compare_runs(f, run))


def test_module_backward_hooks():
    pair = TrainingPair(mlp())
    pair.both(lambda m: m[1].register_full_backward_hook(lambda mod, gi, go: (gi[0] * 2,)))
    pair.step(x())
    pair.step(x() + 1)
    pair.assert_compiled()


def test_module_backward_pre_hooks():
    pair = TrainingPair(mlp())
    pair.both(lambda m: m.register_full_backward_pre_hook(lambda mod, go: (go[0] + 1,)))
    pair.step(x())
    pair.step(x() + 1)
    pair.assert_compiled()


def test_module_forward_hooks():
    pair = TrainingPair(mlp())
    pair.both(lambda m: m[0].register_forward_hook(lambda mod, args, out: out * 2))
    pair.both(lambda m: m[2].register_forward_pre_hook(lambda mod, args: (args[0] + 1,)))
    pair.step(x())
    pair.step(x() + 1)
    pair.assert_compiled()


# ---- autograd.Function ----


class CubeNewStyle(torch.autograd.Function):
    @staticmethod
    def forward(a):
        return a**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        (a,) = ctx.saved_tensors
        return grad * 3 * a**2


class WrongOnPurpose(torch.autograd.Function):
    """The gradient is the user's own, not the derivative."""

    @staticmethod
    def forward(ctx, a):
        return a.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 100


class ScaleWithState(torch.autograd.Function):
    """Arguments that are no tensors, and state on ctx."""

    @staticmethod
    def forward(ctx, a, factor, mode="up", *rest):
        ctx.factor, ctx.mode = factor, mode
        ctx.shape = a.shape
        return a * factor

    @staticmethod
    def backward(ctx, grad):
        assert grad.shape == ctx.shape
        return (grad * (ctx.factor if ctx.mode == "up" else -ctx.factor), None, None)


class TwoOutputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a * b, a + b

    @staticmethod
    def backward(ctx, product, total):
        a, b = ctx.saved_tensors
        return product * b + total, product * a + total if ctx.needs_input_grad[1] else None


class Sorted(torch.autograd.Function):
    """One output is not differentiable."""

    @staticmethod
    def forward(ctx, a):
        values, indices = a.sort(-1)
        ctx.mark_non_differentiable(indices)
        ctx.save_for_backward(indices)
        ctx.last = a.shape[-1]
        return values, indices

    @staticmethod
    def backward(ctx, grad, _):
        (indices,) = ctx.saved_tensors
        return torch.zeros_like(grad).scatter(-1, indices, grad)


class DoubleInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a):
        ctx.mark_dirty(a)
        return a.mul_(2)

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class NoMaterialize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a):
        ctx.set_materialize_grads(False)
        return a * 2, a * 3

    @staticmethod
    def backward(ctx, first, second):
        assert second is None
        return first * 2


class ReadsValues(torch.autograd.Function):
    """The backward branches on what it gets."""

    @staticmethod
    def forward(ctx, a):
        ctx.save_for_backward(a)
        return a.clone()

    @staticmethod
    def backward(ctx, grad):
        (a,) = ctx.saved_tensors
        return grad * (2 if a.sum().item() > 0 else 3)


@pytest.mark.parametrize("function", [Cube, CubeNewStyle, WrongOnPurpose], ids=lambda f: f.__name__)
def test_autograd_function(function):
    check_training(lambda a: function.apply(a.sin()) * 2, leaf())


def test_autograd_function_with_state_and_arguments_that_are_no_tensors():
    check_training(lambda a: ScaleWithState.apply(a, 3.0, "down") + ScaleWithState.apply(a, 2, "up"), leaf())


def test_autograd_function_with_two_outputs():
    check_training(lambda a, b: TwoOutputs.apply(a, b), leaf(), leaf())


def test_autograd_function_of_which_one_input_needs_grad():
    check_training(lambda a, b: TwoOutputs.apply(a, b)[0], leaf(), x())


def test_autograd_function_with_a_non_differentiable_output():
    check_training(lambda a: Sorted.apply(a * -1), leaf())


def test_autograd_function_that_marks_its_input_dirty():
    check_training(lambda a: DoubleInPlace.apply(a * 3).sin(), leaf())


def test_autograd_function_without_materialized_gradients():
    check_training(lambda a: NoMaterialize.apply(a)[0], leaf())


def test_autograd_function_whose_backward_reads_values():
    def run(fn, call):
        a = (x() + (1 if call % 2 else -1)).requires_grad_()
        fn(a).sum().backward()
        return a.grad

    compare_runs(lambda a: ReadsValues.apply(a.sin()), run, calls=4)


def test_autograd_function_in_a_module():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, a):
            return Cube.apply(self.layer(a))

    check_training(Net(), x())


def test_autograd_function_under_no_grad_runs_forward_only():
    compiled = thunder.jit(lambda a: WrongOnPurpose.apply(a))
    with torch.no_grad():
        assert not compiled(leaf()).requires_grad
        assert not compiled(leaf()).requires_grad
    assert_compiled(compiled)


def test_compiled_callable_inside_an_autograd_function():
    inner = thunder.jit(lambda a: a.sin() * 2)

    class Outer(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a):
            ctx.save_for_backward(a)
            return inner(a)

        @staticmethod
        def backward(ctx, grad):
            (a,) = ctx.saved_tensors
            with torch.enable_grad():
                b = a.detach().requires_grad_()
                (g,) = torch.autograd.grad(inner(b), b, grad)
            return g

    for _ in range(2):
        a, b = leaf(), leaf()
        Outer.apply(a).sum().backward()
        (b.sin() * 2).sum().backward()
        torch.testing.assert_close(a.grad, b.grad)
    assert_compiled(inner, misses=None)


# ---- checkpointing ----


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool, p: float = 0.0):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(p), nn.Linear(8, 3))
        self.second = nn.Linear(3, 2)
        self.use_reentrant = use_reentrant

    def forward(self, a):
        return self.second(checkpoint(self.first, a, use_reentrant=self.use_reentrant).relu())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant):
    check_training(Checkpointed(use_reentrant), leaf())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_with_dropout_repeats_the_mask(use_reentrant):
    check_training(Checkpointed(use_reentrant, p=0.5).train(), leaf())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_of_several_segments(use_reentrant):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.parts = nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(3, 3), nn.Tanh())])

        def forward(self, a):
            return checkpoint_sequential(self.parts, 2, a, use_reentrant=use_reentrant)

    check_training(Net(), leaf())


def test_compiled_module_inside_a_checkpoint():
    for use_reentrant in (False, True):
        eager = mlp()
        twin = copy.deepcopy(eager)
        compiled = thunder.jit(twin)
        for module in (eager, compiled):
            a = leaf()
            checkpoint(module, a, use_reentrant=use_reentrant).square().sum().backward()
        for p, q in zip(eager.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
        assert_compiled(compiled, misses=None)


@pytest.mark.parametrize("ask", ["retain_grad", "register_hook"])
def test_gradient_of_a_result_that_others_are_computed_from_is_refused_outside(ask):
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    compiled = thunder.jit(lambda x: (lambda h: (h, second(h.relu()), second(h.detach())))(first(x)))
    for result, raises in ((1, True), (0, False), (2, False)):
        results = compiled(torch.randn(2, 3))
        if ask == "retain_grad":
            results[0].retain_grad()
        else:
            results[0].register_hook(lambda grad: grad)
        if raises:
            with pytest.raises(RuntimeError, match="result 1 of the same call is computed from it"):
                results[result].sum().backward()
        else:
            results[result].sum().backward()
