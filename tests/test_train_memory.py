"""A training step leaves nothing behind: no reference cycles, no growth, graphs freed as soon as eager frees them."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

import thunder
from tests.jit_checks import nothing_leaks  # noqa: F401
from tests.test_memory import CALL_SIZE, MIB, growth, linux
from tests.train_checks import assert_compiled

pytestmark = pytest.mark.filterwarnings("ignore::thunder.ThunderWarning")

STEPS = 1000
# A (64, 64) float32 tensor is 16 KiB: one leaked per step would be 16 MiB over all steps.
TOLERANCE = 4 * MIB


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(CALL_SIZE, CALL_SIZE), nn.ReLU(), nn.Dropout(0.1), nn.Linear(CALL_SIZE, CALL_SIZE))


def batch() -> torch.Tensor:
    return torch.randn(CALL_SIZE, CALL_SIZE)


def tensors_that_only_the_collector_frees(step) -> list[str]:
    """What kinds of objects holding a tensor `step()` leaves in reference cycles."""
    for _ in range(5):  # what the tests before left: finalizers make new garbage
        if not gc.collect():
            break
    kept = gc.get_debug()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        step()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        return [type(found).__name__ for found in gc.garbage if isinstance(found, torch.Tensor)]
    finally:
        gc.set_debug(kept)
        gc.garbage.clear()
        if was_enabled:
            gc.enable()


def test_the_search_for_cycles_finds_one():
    def step():
        ring = [torch.ones(3)]
        ring.append(ring)

    assert tensors_that_only_the_collector_frees(step) == ["Tensor"]


def test_training_step_leaves_no_reference_cycle():
    compiled = thunder.jit(model())

    def step():
        compiled(batch()).sum().backward()

    step()
    for _ in range(2):
        assert tensors_that_only_the_collector_frees(step) == []
    assert_compiled(compiled)


def test_first_training_step_leaves_no_reference_cycle():
    """The capture included, and the compiled callable dropped."""

    def step():
        compiled = thunder.jit(model())
        compiled(batch()).sum().backward()
        assert_compiled(compiled)

    step()
    assert tensors_that_only_the_collector_frees(step) == []


def test_forward_without_backward_leaves_no_reference_cycle():
    compiled = thunder.jit(model())

    def step():
        compiled(batch())

    step()
    assert tensors_that_only_the_collector_frees(step) == []
    assert_compiled(compiled)


def test_outputs_that_are_saved_leave_no_reference_cycle():
    compiled = thunder.jit(lambda a: (a.exp(), a.softmax(-1), a))

    def step():
        outs = compiled(batch().requires_grad_())
        sum(out.sum() for out in outs).backward()

    step()
    assert tensors_that_only_the_collector_frees(step) == []
    assert_compiled(compiled)


def test_second_derivatives_leave_no_reference_cycle():
    compiled = thunder.jit(lambda a: (a**3).sum())

    def step():
        a = batch().requires_grad_()
        (g,) = torch.autograd.grad(compiled(a), a, create_graph=True)
        torch.autograd.grad(g.sum(), a)

    step()
    assert tensors_that_only_the_collector_frees(step) == []
    assert_compiled(compiled)


def test_failed_backward_leaves_no_reference_cycle():
    compiled = thunder.jit(lambda a: a.exp())

    def step():
        out = compiled(batch().requires_grad_())
        out.add_(1)
        try:
            out.sum().backward()
        except RuntimeError:
            return
        raise AssertionError("the backward of a changed output should raise")

    step()
    assert tensors_that_only_the_collector_frees(step) == []
    assert_compiled(compiled)


def test_input_is_freed_with_the_graph():
    compiled = thunder.jit(lambda a: (a * a).sin())
    for _ in range(2):
        a = batch().requires_grad_()
        seen = weakref.ref(a)
        out = compiled(a)
        del a
        assert seen() is not None  # the graph needs it for the gradient
        del out
        assert seen() is None
    assert_compiled(compiled)


def test_backward_frees_what_was_saved_though_the_loss_lives():
    """After backward() without retain_graph nothing but the leaves' gradients is held."""
    freed = []

    class Watched:
        def __init__(self, tensor):
            self.tensor = tensor

    def pack(tensor):
        held = Watched(tensor)
        weakref.finalize(held, freed.append, 1)
        return held

    compiled = thunder.jit(model())
    for _ in range(2):
        freed.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
            loss = compiled(batch()).sum()
        assert not freed
        loss.backward()
        assert freed
        assert loss.isfinite()
    assert_compiled(compiled, misses=None)


def test_a_backward_leaves_no_tensor_that_nobody_holds():
    """What a run made to hand a kernel its saved values goes when the run ends."""

    def program(a):
        return nn.functional.batch_norm((a * 2).sin(), None, None, training=True).square().mean()

    compiled = thunder.jit(program)

    def step():
        compiled(batch().requires_grad_()).backward()

    def tensors():
        gc.collect()
        return sum(isinstance(found, torch.Tensor) for found in gc.get_objects())

    for _ in range(3):
        step()
    before = tensors()
    for _ in range(20):
        step()
    assert tensors() == before
    assert_compiled(compiled)


def peak_of(step) -> int:
    """The most bytes that `step()` has allocated at a time, more than before."""
    with torch.autograd.profiler.profile(profile_memory=True, use_kineto=True) as profile:
        step()
    now = peak = 0
    for event in profile.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize("remat", ["off", "auto"])
def test_what_was_saved_is_freed_as_the_backward_uses_it(remat):
    """Gradients take the place of saved values, so that a backward needs no more than the forward has left."""
    torch.manual_seed(0)
    eager = nn.Sequential(*(m for _ in range(8) for m in (nn.Linear(256, 256), nn.LayerNorm(256), nn.GELU())))
    compiled = thunder.jit(eager, remat=remat)
    x = torch.randn(256, 256)

    def step(model):
        for p in eager.parameters():
            p.grad = None
        model(x).square().mean().backward()

    for _ in range(2):
        step(eager)
        step(compiled)
    assert_compiled(compiled, misses=None)
    eager_peak = peak_of(lambda: step(eager))
    assert eager_peak > 4 * MIB
    assert peak_of(lambda: step(compiled)) < 0.8 * eager_peak  # 0.89 when all of it lives until the end


def test_compiled_callable_goes_while_its_graph_lives():
    a = batch().requires_grad_()
    compiled = thunder.jit(lambda a: (a * a).sin().sum())
    compiled(a)
    out = compiled(a)
    assert_compiled(compiled)
    del compiled
    gc.collect()
    out.backward()
    torch.testing.assert_close(a.grad, (a.detach() * a.detach()).cos() * 2 * a.detach())


def test_module_is_freed_after_training():
    net = model()
    seen = weakref.ref(net[0].weight)
    compiled = thunder.jit(net)
    for _ in range(2):
        compiled(batch()).sum().backward()
    assert_compiled(compiled)
    del compiled, net
    gc.collect()
    assert seen() is None


@linux
def test_a_thousand_training_steps_leave_memory_flat():
    net = model()
    compiled = thunder.jit(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)

    def step():
        optimizer.zero_grad()
        compiled(batch()).square().mean().backward()
        optimizer.step()

    assert growth(step, STEPS) < TOLERANCE
    assert_compiled(compiled)


@linux
def test_a_thousand_forwards_without_backward_leave_memory_flat():
    compiled = thunder.jit(model())
    assert growth(lambda: compiled(batch()), STEPS) < TOLERANCE
    assert_compiled(compiled)


@linux
def test_a_thousand_second_derivatives_leave_memory_flat():
    compiled = thunder.jit(lambda a: (a**3).sum())

    def step():
        a = batch().requires_grad_()
        (g,) = torch.autograd.grad(compiled(a), a, create_graph=True)
        g.sum().backward()

    assert growth(step, STEPS // 2) < TOLERANCE
    assert_compiled(compiled)


@linux
def test_compiling_and_freeing_in_training_leaves_memory_flat():
    def step():
        compiled = thunder.jit(model())
        compiled(batch()).sum().backward()
        assert_compiled(compiled)

    assert growth(step, 200) < TOLERANCE


@linux
def test_a_leak_of_one_tensor_in_each_step_would_be_seen():
    kept = []
    assert growth(lambda: kept.append(batch()), STEPS) > 2 * TOLERANCE
