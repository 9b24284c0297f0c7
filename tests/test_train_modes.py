"""Training under ambient modes and inside them: grad modes, autocast, scaling, anomalies, threads, offload."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import thunder
from tests.jit_checks import assert_same, nothing_leaks  # noqa: F401
from tests.train_checks import (
    TrainingPair,
    assert_compiled,
    assert_gradients_same,
    assert_same_error,
    check_training,
    compare_runs,
    leaf,
    mlp,
    weighted_sum,
    x,
)

pytestmark = pytest.mark.filterwarnings("ignore::thunder.ThunderWarning")


# ---- grad modes inside ----


def test_no_grad_region_inside():
    def f(a):
        with torch.no_grad():
            scale = (a * 2).sum()
        return a * scale, scale

    check_training(f, leaf())


def test_no_grad_decorator_on_a_helper():
    @torch.no_grad()
    def helper(a):
        return a.abs().max()

    check_training(lambda a: a / helper(a), leaf())


def test_enable_grad_inside_no_grad_inside():
    def f(a):
        with torch.no_grad():
            b = a * 2
            with torch.enable_grad():
                c = a.sin()
            d = c * 3
        return b, c, d

    check_training(f, leaf())


def test_set_grad_enabled_inside():
    def f(a):
        with torch.set_grad_enabled(False):
            b = a.exp()
        return b * a

    check_training(f, leaf())


def test_detach_cuts_the_gradient():
    check_training(lambda a: a.detach() * a + a.data.sum(), leaf())


def test_straight_through_estimator():
    check_training(lambda a: a + (a.round() - a).detach(), leaf())


def test_inference_mode_region_inside():
    def f(a, b):
        with torch.inference_mode():
            c = b * 2
        return a * c.clone().sum().item()

    check_training(f, leaf(), x(), allow_refusal=True)


def test_requires_grad_called_inside():
    def f(a):
        b = a.detach().requires_grad_()
        (g,) = torch.autograd.grad((b * b).sum(), b)
        return a * g

    check_training(f, leaf(), allow_refusal=True)


def test_no_grad_around_with_enable_grad_inside():
    net = mlp()

    def run(fn, call):
        with torch.no_grad():
            out = fn(x() + call)
        return out, out.requires_grad

    def f(a):
        with torch.enable_grad():
            return net(a)

    compare_runs(f, run)


def test_is_grad_enabled_decides_what_runs():
    f = lambda a: a * 2 if torch.is_grad_enabled() else a * 3  # noqa: E731
    compiled = thunder.jit(f)
    for _ in range(2):
        assert_same(f(leaf()), compiled(leaf()))
        with torch.no_grad():
            assert_same(f(leaf()), compiled(leaf()))
    assert_compiled(compiled, misses=2)


def test_requires_grad_decides_what_runs():
    f = lambda a: a * 2 if a.requires_grad else a * 3  # noqa: E731
    compiled = thunder.jit(f)
    for _ in range(2):
        assert_same(f(leaf()), compiled(leaf()))
        assert_same(f(x()), compiled(x()))
    assert_compiled(compiled, misses=2)


def test_backward_under_no_grad_and_under_inference_mode_off():
    pair = TrainingPair(mlp())

    def run(module):
        loss = module(x()).square().sum()
        with torch.no_grad():
            loss.backward()

    pair.each(run)
    pair.each(run)
    pair.assert_compiled()


def test_call_in_inference_mode_then_training():
    pair = TrainingPair(mlp())
    for call in range(2):
        with torch.inference_mode():
            assert_same(pair.eager(x()), pair.compiled(x()))
        pair.step(x() + call)
    pair.assert_compiled(misses=2)


# ---- autocast and scaling ----


@pytest.mark.parametrize("cache_enabled", [True, False])
def test_autocast_bf16_around_the_call(cache_enabled):
    pair = TrainingPair(mlp())

    def run(module):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache_enabled):
            loss = F.mse_loss(module(x()).float(), x(4, 2))
        loss.backward()
        return loss

    pair.each(run)
    pair.each(run)
    assert pair.model[0].weight.grad.dtype == torch.float32
    pair.assert_compiled()


def test_autocast_bf16_inside():
    net = mlp()

    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, a):
            with torch.autocast("cpu", torch.bfloat16):
                return self.net(a)

    check_training(Inside(), leaf())


def test_autocast_and_plain_calls_take_turns():
    pair = TrainingPair(mlp())
    for _ in range(2):
        pair.step(x())
        pair.each(lambda module: _autocast_step(module))
    pair.assert_compiled(misses=2)


def _autocast_step(module):
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x())
    out.float().sum().backward()
    return out


def test_autocast_weight_used_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, a):
            return self.layer(self.layer(a).relu())

    pair = TrainingPair(Twice())
    pair.each(_autocast_step)
    pair.each(_autocast_step)
    pair.assert_compiled()


def test_grad_scaler():
    pair = TrainingPair(mlp())

    def run(module):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1)
        losses = []
        for step in range(3):
            optimizer.zero_grad()
            loss = module(x() + step).square().mean()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(module.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss)
        return losses, scaler.get_scale()

    pair.each(run)
    pair.assert_compiled()


def test_grad_scaler_skips_a_step_that_overflowed():
    pair = TrainingPair(mlp())

    def run(module):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        scaler.scale(module(x()).sum() * float("inf")).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return scaler.get_scale()

    assert pair.each(run) == (1.0, 1.0)
    pair.assert_compiled()


# ---- anomaly mode ----


def test_anomaly_mode_gives_the_same_gradients():
    pair = TrainingPair(mlp())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.detect_anomaly():
            pair.step(x())
            pair.step(x() + 1)
    pair.step(x())
    pair.assert_compiled(misses=None)


def test_anomaly_mode_finds_the_nan_that_eager_finds():
    f = lambda a: (a.sqrt() * 0).sum()  # noqa: E731
    compiled = thunder.jit(f)
    compiled(leaf())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.detect_anomaly(check_nan=True):
            assert_same_error(
                lambda: f(torch.zeros(3, requires_grad=True)).backward(),
                lambda: compiled(torch.zeros(3, requires_grad=True)).backward(),
                "nan",
            )


# ---- threads ----


def in_a_thread(call):
    failures = []

    def target():
        try:
            call()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    if failures:
        raise failures[0]


def test_backward_from_another_thread():
    pair = TrainingPair(mlp())

    def run(module):
        loss = module(x()).square().sum()
        in_a_thread(loss.backward)

    pair.each(run)
    pair.each(run)
    pair.assert_compiled()


def test_forward_and_backward_in_another_thread():
    pair = TrainingPair(mlp())
    pair.each(lambda module: in_a_thread(lambda: module(x()).square().sum().backward()))
    pair.step(x())
    pair.assert_compiled()


def test_many_threads_train_on_their_own_inputs():
    f = lambda a, w: (a @ w).tanh().sum()  # noqa: E731
    compiled = thunder.jit(f)
    compiled(x(), leaf(3, 2)).backward()
    failures = []

    def work(seed):
        try:
            for step in range(20):
                eager, ours = leaf(3, 2), leaf(3, 2)
                f(x() + seed + step / 10, eager).backward()
                compiled(x() + seed + step / 10, ours).backward()
                assert_gradients_same([eager.grad], [ours.grad])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures, failures[0]
    assert_compiled(compiled)


def test_multithreading_of_the_engine_switched_off():
    pair = TrainingPair(mlp())
    with torch.autograd.set_multithreading_enabled(False):
        pair.step(x())
        pair.step(x() + 1)
    pair.assert_compiled(misses=None)


# ---- saved tensors: hooks and offload ----


def test_saved_tensors_hooks_see_what_is_saved():
    packed, unpacked = [], []

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor.clone()

    def unpack(tensor):
        unpacked.append(tensor.shape)
        return tensor

    pair = TrainingPair(mlp())

    def run(module):
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            loss = module(x()).square().sum()
        loss.backward()

    for _ in range(2):
        pair.each(run)
    compiled_only = len(packed)
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        loss = pair.compiled(x())
    assert len(packed) > compiled_only, "the compiled call saved nothing through the hooks"
    seen = len(unpacked)
    loss.sum().backward()
    assert len(unpacked) > seen
    pair.assert_compiled(misses=None)


def test_saved_tensors_that_the_hook_changes_change_the_gradient_as_in_eager():
    f = lambda a: (a * a).sum()  # noqa: E731

    def run(fn, call):
        a = leaf()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 2, lambda t: t):
            loss = fn(a)
        loss.backward()
        return a.grad

    assert_compiled(compare_runs(f, run))


def test_saved_tensor_hooks_are_no_part_of_a_derived_rule():
    def run(fn, call):
        a = leaf(3, call + 2)  # rules are kept by shape: this one is new
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 2, lambda t: t):
            out = fn(a)
        out.sum().backward()
        return a.grad

    compare_runs(lambda a: F.softplus(a, 2.0), run)


def test_save_on_cpu():
    pair = TrainingPair(mlp())

    def run(module):
        with torch.autograd.graph.save_on_cpu():
            loss = module(x()).square().sum()
        loss.backward()

    pair.each(run)
    pair.each(run)
    pair.assert_compiled(misses=None)


def test_saved_tensors_hooks_inside():
    def f(a):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t + 0, lambda t: t):
            return a.exp() * a

    check_training(f, leaf(), allow_refusal=True)


def test_disabled_saved_tensors_hooks():
    pair = TrainingPair(mlp())
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        pair.step(x())
        pair.step(x() + 1)
    pair.assert_compiled(misses=None)


def test_tensor_changed_after_the_forward_raises_as_in_eager():
    f = lambda a, b: (a * b).sum()  # noqa: E731
    compiled = thunder.jit(f)

    def attempt(fn):
        a, b = leaf(), x()
        loss = fn(a, b)
        b.add_(1)
        loss.backward()

    for _ in range(2):
        assert_same_error(lambda: attempt(f), lambda: attempt(compiled), "modified by an inplace operation")
    assert_compiled(compiled)


def test_parameter_changed_between_forward_and_backward_raises_as_in_eager():
    pair = TrainingPair(nn.Linear(3, 2))

    def attempt(module):
        loss = module(leaf()).sum()
        with torch.no_grad():
            module.weight.add_(1)
        loss.backward()

    for _ in range(2):
        assert_same_error(
            lambda: attempt(pair.eager), lambda: attempt(pair.compiled), "modified by an inplace operation"
        )
    pair.assert_compiled()


def test_output_saved_for_backward_and_changed_raises_as_in_eager():
    f = lambda a: a.exp()  # noqa: E731
    compiled = thunder.jit(f)

    def attempt(fn):
        out = fn(leaf())
        out.add_(1)
        out.sum().backward()

    for _ in range(2):
        assert_same_error(lambda: attempt(f), lambda: attempt(compiled), "modified by an inplace operation")
    assert_compiled(compiled)


def test_tensor_that_the_backward_does_not_need_may_change():
    def run(fn, call):
        a, b = leaf(), x()
        out = fn(a, b)
        b.add_(1)
        return out, torch.autograd.grad(weighted_sum(out), a)

    assert_compiled(compare_runs(lambda a, b: a + b, run))


# ---- tensors that the function makes to require grad ----


def test_intermediate_is_made_to_require_grad():
    def f(a, w):
        h = a[:, None]
        h.requires_grad = True
        assert h.requires_grad and h.is_leaf and (h * 2).requires_grad and not (h * 2).is_leaf
        return (h * w).sum(1)

    check_training(f, x(), leaf())


def test_detached_copy_is_made_to_require_grad():
    def f(a):
        b = a.sin().detach().requires_grad_()
        return a * b

    check_training(f, leaf())


@pytest.mark.parametrize("what", ["it", "depends", "view", "written", "grad", "hook"])
def test_leaf_made_inside_that_can_be_seen_is_as_in_eager(what):
    def f(a, w):
        b = (a * 2).detach().requires_grad_()
        if what == "it":
            return b, w * 2
        if what == "depends":
            return b.sin(), w * 2
        if what == "view":
            return b[1:], w * 2
        if what == "written":
            with torch.no_grad():
                b.mul_(2)
        if what == "hook":
            b.register_hook(lambda g: g * 2)
        if what == "grad":
            (b * b).sum().backward()
            return b.grad * w
        return b * w

    check_training(f, x(), leaf(), allow_refusal=True)


def test_leaf_made_inside_is_not_written_to():
    def f(a, w):
        b = (a * 2).detach().requires_grad_()
        b.mul_(3)
        return b * w

    assert_same_error(lambda: f(x(), leaf()), lambda: thunder.jit(f)(x(), leaf()), "leaf Variable that requires grad")


VIEWS = {
    "chunk": lambda b: b.chunk(2)[0],
    "unbind": lambda b: b.unbind(0)[1],
    "split": lambda b: b.split(2)[1][:1],
    "view without gradients": lambda b: torch.no_grad()(lambda: b.view_as(b))(),
    "view of a transpose without gradients": lambda b: torch.no_grad()(lambda: b.t())()[:1],
}


@pytest.mark.parametrize("where", ["argument", "captured", "made inside"])
@pytest.mark.parametrize("view", VIEWS)
def test_view_that_nobody_may_write_to_with_gradients(view, where):
    """Though what it is a view of requires none until then, and nothing of it is returned."""
    captured = x()

    def f(a, w):
        t = VIEWS[view](captured if where == "captured" else a if where == "argument" else a * 2)
        t.mul_(w.sum())
        return a * 1

    assert_same_error(lambda: f(x(), leaf()), lambda: thunder.jit(f)(x(), leaf()), "is being modified inplace")


def test_detached_without_gradients_may_be_written_to():
    def f(a, w):
        with torch.no_grad():
            t = a.detach()
        t.mul_(2.0)
        return t * w

    check_training(f, x(), leaf())


MADE_ANEW = {
    "new_empty, in parts": lambda a, w: _filled(a.new_empty(4, 3), w),
    "zeros_like, in parts": lambda a, w: _filled(torch.zeros_like(a), w),
    "made without gradients": lambda a, w: _filled(torch.no_grad()(lambda: w * 2)(), w),
}


def _filled(k, w):
    k[:2].copy_(w[:2])
    k[2:].copy_(w[2:] * 2)
    k.add_(w)
    return k.sin()


@pytest.mark.parametrize("made", MADE_ANEW)
def test_a_tensor_made_without_gradients_is_written_to_with_them(made):
    """It is no view: nothing is detached, and torch has nothing against it."""
    pair = check_training(MADE_ANEW[made], x(), leaf())
    assert_compiled(pair)
