"""Numbers that change from step to step where gradients are computed, such as a temperature."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import thunder
from tests.jit_checks import assert_captured_at_most, nothing_leaks  # noqa: F401


class Annealed(nn.Module):
    """What a schedule changes: a temperature, the weight of a term, and a counter that nothing reads."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8, dtype=torch.float64)
        self.temperature, self.weight, self.step = 1.0, 0.0, 0

    def forward(self, x):
        z = self.layer(x) / self.temperature
        p = (z + 0.5 * self.weight).softmax(-1)
        return (p * p.log()).sum() + self.weight * z.square().mean() - (1 - self.weight) * z.mean() ** 2


def anneal(module, i):
    module.temperature, module.weight, module.step = 0.95**i, i / 20, i


def test_training_under_a_schedule_of_numbers_is_captured_twice():
    ours = Annealed()
    theirs, compiled = copy.deepcopy(ours), thunder.jit(ours)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (ours, theirs)]
    for i in range(22):
        x = torch.randn(4, 8, dtype=torch.float64)
        for module, call, optimizer in zip((ours, theirs), (compiled, theirs), optimizers, strict=True):
            anneal(module, i)
            optimizer.zero_grad()
            loss = call(x)
            loss.backward()
            optimizer.step()
            module.seen = loss.detach(), module.layer.weight.grad
        torch.testing.assert_close(ours.seen, theirs.seen)
        del ours.seen, theirs.seen
    assert thunder.cache_misses(compiled) == 2


def scaled(x, w, s):
    y = x * s
    z = (x * w).tanh() * s + y
    return y, z, (z * s).square()


def operands():
    return [torch.linspace(0.1, 0.5, 3, dtype=torch.float64).requires_grad_() for _ in range(2)]


def all_of_them(results, x, w):
    return torch.autograd.grad(sum(r.sum() for r in results), (x, w))


def one_of_them(results, x, w):
    return torch.autograd.grad(results[0].sum(), (x, w), allow_unused=True)


def twice(results, x, w):
    (g,) = torch.autograd.grad(results[2].sum(), x, create_graph=True)
    return torch.autograd.grad(g.square().sum(), (x, w))


def batched(results, x, w):
    return torch.autograd.grad(results[1], x, torch.eye(3, dtype=x.dtype), is_grads_batched=True)


@pytest.mark.parametrize("way", [all_of_them, one_of_them, twice, batched])
def test_backward_has_the_number_of_its_forward(way):
    (x, w), compiled = operands(), thunder.jit(scaled)
    numbers = (0.1, 0.2, 0.3, 0.0, 1.0, -1.0, *([] if way is batched else [float("inf")]))
    pending = [(compiled(x, w, s), scaled(x, w, s)) for s in numbers]
    for ours, theirs in reversed(pending):
        torch.testing.assert_close(way(ours, x, w), way(theirs, x, w), equal_nan=True)
    assert thunder.cache_misses(compiled) == 2


FOLLOWED = {
    "mul": lambda x, w, s: (x + 0).mul_(s) * s,
    "add": lambda x, w, s: torch.add(x, w, alpha=s).sub(w, alpha=s * 2) + s,
    "reversed": lambda x, w, s: s / (w * w + 1) + (s - x),
    "power beside it": lambda x, w, s: (x * s) ** 2,
    "clamp": lambda x, w, s: x.clamp(min=s) * w.clamp(max=s),
    "where": lambda x, w, s: torch.where(x > s, x, w) + (x * w).masked_fill(x < s, s),
    "leaky_relu": lambda x, w, s: F.leaky_relu(x - w * 2, s) * s,
    "noise": lambda x, w, s: x + s * torch.ones_like(x),
}
CONSTANT = {
    "lerp": lambda x, w, s: torch.lerp(x, w, s),
    "power": lambda x, w, s: x**s * w,
    "softplus": lambda x, w, s: F.softplus(x, beta=1 + s),
    "looked at": lambda x, w, s: x * s if s < 0.25 else w * s,
}


@pytest.mark.parametrize("name", [*FOLLOWED, *CONSTANT])
def test_operations(name):
    program = {**FOLLOWED, **CONSTANT}[name]
    (x, w), compiled = operands(), thunder.jit(program, recompile_limit=100)
    for s in (0.1, 0.2, 0.3, 0.15, 0.4, 2.0, 0.0, 1.0, -1.0):
        ours, theirs = (torch.autograd.grad(f(x, w, s).sum(), (x, w), allow_unused=True) for f in (compiled, program))
        torch.testing.assert_close(ours, theirs)
    assert (thunder.cache_misses(compiled) == 2) == (name in FOLLOWED)


class Interpreter(thunder.extend.FusionExecutor):
    """Runs regions on torch and keeps what it was given."""

    def __init__(self):
        super().__init__("interpreter")
        self.support_all()
        self.regions = []

    def fuse(self, region):
        self.regions.append(region.trace)
        names = region.trace.namespace()
        exec(str(region.trace), names)
        return names["region"]


@pytest.mark.parametrize("grad", [True, False])
def test_regions_are_not_built_for_each_number(grad):
    executor = Interpreter()
    ours = Annealed()
    theirs, compiled = copy.deepcopy(ours), thunder.jit(ours, executors=[executor], recompile_limit=100)
    with torch.set_grad_enabled(grad):
        for i in range(2, 20):
            x = torch.randn(4, 8, dtype=torch.float64)
            anneal(ours, i)
            anneal(theirs, i)
            for _ in range(2):
                a, b = compiled(x), theirs(x)
                torch.testing.assert_close(a, b)
            if grad:
                torch.testing.assert_close(
                    *(torch.autograd.grad(y, m.layer.weight) for y, m in ((a, ours), (b, theirs)))
                )
            if i == 4:
                built = len(executor.regions)
    assert built and len(executor.regions) == built
    assert thunder.cache_misses(compiled) <= 3
    assert "one of its numbers changes from call to call" in str(thunder.explain(compiled))


FIRST = """
import torch, thunder
model = torch.nn.Linear(3, 3)
compiled = thunder.jit(lambda x: torch.vmap(lambda row: model(row) * 2)(x), fallback="error")
x = torch.ones(2, 3)
torch.testing.assert_close(compiled(x), model(x) * 2)
import torch.distributed.tensor
"""


def test_modules_that_torch_imports_within_a_capture():
    done = subprocess.run([sys.executable, "-c", FIRST], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


# ---- ints that the code counts in ----


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.dropout = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.3)
        self.steps, self.seen = 0, {"rows": 0, "twice": 0}

    def forward(self, x):
        self.steps += 1
        self.seen["rows"] += len(x)
        self.seen["twice"] = self.steps * 2
        return self.dropout(self.norm(self.layer(x)))


class CountsToFour(Counts):
    def forward(self, x):
        if self.steps % 4 == 3:
            x = x * 2
        return super().forward(x)


def state(module):
    return (
        module.steps,
        module.seen,
        module.norm.running_mean,
        module.norm.num_batches_tracked,
        module.layer.weight.grad,
    )


@pytest.mark.parametrize(("cls", "most"), [(Counts, 2), (CountsToFour, 8)])
def test_a_training_step_that_counts(cls, most):
    torch.manual_seed(0)
    ours = cls().double()
    theirs, compiled = copy.deepcopy(ours), thunder.jit(ours, recompile_limit=100)
    for i in range(24):
        x, losses = torch.randn(3, 4, dtype=torch.float64), []
        for module, call in ((ours, compiled), (theirs, theirs)):
            torch.manual_seed(i)
            module.zero_grad()
            losses.append(call(x).square().sum())
            losses[-1].backward()
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(state(ours), state(theirs))
    assert_captured_at_most(compiled, most)


def test_a_step_that_counts_and_fails():
    ours = Counts().double()
    theirs, compiled = copy.deepcopy(ours), thunder.jit(ours)
    for i in range(12):
        x = torch.randn(1 if i == 7 else 3, 4, dtype=torch.float64)  # batch norm wants more than one value per channel
        for _, call in ((ours, compiled), (theirs, theirs)):
            torch.manual_seed(i)
            if i == 7:
                with pytest.raises(ValueError, match="more than 1 value"):
                    call(x)
            else:
                call(x).sum().backward()
        torch.testing.assert_close(state(ours), state(theirs))


def test_a_counter_that_outgrows_64_bits():
    ours = Counts().double()
    theirs, compiled = copy.deepcopy(ours), thunder.jit(ours)
    for i in range(8):
        for module, call in ((ours, compiled), (theirs, theirs)):
            if i == 4:
                module.steps = 2**62 - 1
            torch.manual_seed(i)
            call(torch.ones(3, 4, dtype=torch.float64)).sum().backward()
        torch.testing.assert_close(state(ours), state(theirs))


def test_comparisons_are_conditions():
    def f(x, s):
        if s > 0.5 and s * 2 != 3.0:
            return x * s
        return x - s if s else x

    compiled, x = thunder.jit(f, recompile_limit=100), torch.linspace(-1, 1, 4)
    values = [s / 10 for s in range(-20, 20)]
    for s in (*values, *reversed(values), 0.0, -0.0, float("inf"), float("-inf")):
        assert torch.equal(compiled(x, s), f(x, s)), s
    assert torch.isnan(compiled(x, float("nan"))).all()
    assert thunder.cache_misses(compiled) <= 10


def test_comparisons_of_two_numbers():
    def f(x, s, t):
        return torch.addcmul(x, x, x, value=s - t) if s > t else x * t

    compiled, x = thunder.jit(f, recompile_limit=100), torch.linspace(-1, 1, 4)
    for i in range(40):
        s, t = 0.1 + i % 7 / 7, 0.15 + i % 5 / 5
        assert torch.equal(compiled(x, s, t), f(x, s, t)), (s, t)
    assert thunder.cache_misses(compiled) <= 10


def test_more_comparisons_than_are_kept_fix_a_number():
    def f(x, s):
        return x * sum(s > i / 100 for i in range(100)) + s

    compiled, x = thunder.jit(f, recompile_limit=100), torch.ones(2)
    for s in (0.1, 0.2, 0.3, 0.95, 0.2, 2.0):
        assert torch.equal(compiled(x, s), f(x, s))
