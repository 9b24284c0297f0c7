"""`.grad` of the caller's tensors is an input of a program: steps of optimizers, clipping, averages of weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import thunder

HALF = torch.finfo(torch.float64).eps ** 0.5  # half of float64's digits: of those that eager's kernels round otherwise
OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], float]] = {  # and by how much they may differ
    "SGD": (lambda p, **k: torch.optim.SGD(p, 0.1, **k), 0),
    "Nesterov": (lambda p, **k: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01, **k), 0),
    "Adam": (lambda p, **k: torch.optim.Adam(p, 1e-2, **k), 0),
    "AMSGrad": (lambda p, **k: torch.optim.Adam(p, 1e-2, amsgrad=True, weight_decay=0.1, **k), 0),
    "AdamW": (lambda p, **k: torch.optim.AdamW(p, 1e-2, **k), 0),
    "RMSprop": (lambda p, **k: torch.optim.RMSprop(p, 1e-2, momentum=0.5, centered=True, **k), HALF),
    "Adagrad": (lambda p, **k: torch.optim.Adagrad(p, 1e-2, **k), 0),
    "Adadelta": (lambda p, **k: torch.optim.Adadelta(p, 1.0, **k), HALF),
    "Adamax": (lambda p, **k: torch.optim.Adamax(p, 1e-2, **k), 0),
    "NAdam": (lambda p, **k: torch.optim.NAdam(p, 1e-2, **k), HALF),
    "Rprop": (lambda p, **k: torch.optim.Rprop(p, 1e-2, **k), 0),
}


class Idle(thunder.extend.OperatorExecutor):
    """Takes nothing, but is there: what counts its steps is compiled where somebody may fuse."""


EXECUTORS = [Idle("idle"), *thunder.get_always_executors()]


def train(
    make: Callable, compiled: bool, steps: int, between: Callable[..., Any] | None, dtype: torch.dtype
) -> tuple[Any, ...]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).to(dtype)
    optimizer = make(model.parameters())
    step = thunder.jit(optimizer.step, executors=EXECUTORS) if compiled else optimizer.step
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * steps)
    for i in range(steps):
        optimizer.zero_grad()
        model(torch.randn(3, 4, dtype=dtype)).square().sum().backward()
        if between is not None:
            between(i, model, optimizer)
        step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the schedule does not see that the step was taken
            schedule.step()
    state = [s for p in model.parameters() for s in optimizer.state[p].values() if isinstance(s, torch.Tensor)]
    return [p.detach() for p in model.parameters()] + state, step, model


def same(make: Callable, steps: int = 8, within: float = 0, between: Callable[..., Any] | None = None) -> Any:
    dtype = torch.float64 if within else torch.float32
    expected, _, _ = train(make, False, steps, between, dtype)
    got, step, model = train(make, True, steps, between, dtype)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=within)
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())
    assert thunder.compile_stats(step).fallbacks == 0
    return step


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_captured_twice_whatever_the_schedule(name):
    make, within = OPTIMIZERS[name]
    assert thunder.cache_misses(same(make, 24, within)) == 2  # without state, and with it


@pytest.mark.parametrize("name", ["SGD", "Nesterov", "Adam", "AdamW", "RMSprop", "Adagrad", "NAdam"])
def test_lists_of_tensors(name):
    make, within = OPTIMIZERS[name]
    assert thunder.cache_misses(same(lambda p: make(p, foreach=True), 8, within)) == 2


def test_what_changes_between_steps_is_seen():
    def between(i, model, optimizer):
        group = optimizer.param_groups[0]
        if i == 3:
            group["betas"] = (0.8, 0.99)
        if i == 4:
            model[0].bias.grad = None
        if i == 5:
            group["weight_decay"] = 0.1
        if i == 6:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        if i == 7:
            group["params"].pop()
        if i == 8:
            optimizer.add_param_group({"params": [model[2].bias], "lr": 0.5})
        if i == 9:
            for p in model.parameters():
                p.grad = p.grad.t().contiguous().t()
        if i == 10:
            optimizer.state.clear()

    same(OPTIMIZERS["AdamW"][0], 12, between=between)


def test_clipping():
    params = [nn.Parameter(torch.randn(3, 3)) for _ in range(3)]
    compiled = thunder.jit(lambda: nn.utils.clip_grad_norm_(params, 1.0))
    for i in range(4):
        for p in params:
            p.grad = torch.randn(3, 3) * (i + 1)
        other = copy.deepcopy(params)
        for p, q in zip(params, other, strict=True):
            q.grad = p.grad.clone()
        assert torch.equal(compiled(), nn.utils.clip_grad_norm_(other, 1.0))
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(params, other, strict=True))
    assert thunder.cache_misses(compiled) == 1 and thunder.compile_stats(compiled).fallbacks == 0


def test_a_hand_written_step_and_an_average():
    def step(params, averages, lr, decay):
        with torch.no_grad():
            for p, a in zip(params, averages, strict=True):
                if p.grad is not None:
                    p.sub_(p.grad, alpha=lr)
                    p.grad.zero_()
                a.lerp_(p, 1 - decay)
        return params[0].grad

    compiled = thunder.jit(step)
    params = [nn.Parameter(torch.randn(3)) for _ in range(3)]
    averages = [nn.Parameter(p.detach().clone()) for p in params]
    others = copy.deepcopy((params, averages))
    for i in range(6):
        for p, q in zip(params[:2], others[0][:2], strict=True):
            p.grad = torch.randn(3)
            q.grad = p.grad.clone()
        lr, decay = 0.1 / (i + 1), 0.9
        grad = compiled(params, averages, lr, decay)
        assert grad is params[0].grad and torch.equal(step(*others, lr, decay), grad)
        for p, q in zip(params + averages, others[0] + others[1], strict=True):
            assert torch.equal(p, q) and p.requires_grad and p.is_leaf
    assert thunder.cache_misses(compiled) == 2 and thunder.compile_stats(compiled).fallbacks == 0


def test_a_gradient_appears_and_goes():
    x = torch.ones(3, requires_grad=True)
    compiled = thunder.jit(lambda x: torch.zeros(3) if x.grad is None else x.grad * 2)
    for grad in (None, torch.ones(3), None, torch.full((3,), 2.0), torch.ones(3, dtype=torch.float32)):
        x.grad = grad
        assert torch.equal(compiled(x), torch.zeros(3) if grad is None else grad * 2)
    assert thunder.cache_misses(compiled) == 2


def test_gradients_that_lie_elsewhere_too():
    x = nn.Parameter(torch.ones(3))
    kept: dict[str, Any] = {}

    def f(x, other):
        x.grad.add_(1)
        return x.grad * 10 + other + kept.get("grad", 0)

    compiled = thunder.jit(f, fallback="eager")
    for case in range(6):
        results = []
        for g in (f, compiled):
            x.grad = torch.ones(3)
            other = x.grad if case in (1, 3) else torch.ones(3)
            kept["grad"] = x.grad if case in (2, 3) else torch.zeros(3)
            if case == 4:
                x.grad = other.expand(3)
            if case == 5:
                x.grad = kept["grad"]
            results.append((g(x, other).tolist(), x.grad.tolist(), other.tolist(), kept["grad"].tolist()))
        assert results[0] == results[1], case


def test_gradients_and_new_ones_in_one_program():
    weight = nn.Parameter(torch.ones(3))

    def f(x):
        return (weight * x).sum() + (0 if weight.grad is None else weight.grad.sum())

    compiled = thunder.jit(f)
    other = nn.Parameter(torch.ones(3))
    for _ in range(4):
        x = torch.randn(3)
        expected = (other * x).sum() + (0 if other.grad is None else other.grad.sum())
        expected.backward()
        loss = compiled(x)
        loss.backward()
        assert torch.equal(loss, expected) and torch.equal(weight.grad, other.grad)


def test_a_distribution_whose_parameters_change():
    normal = torch.distributions.Normal(torch.zeros(2), torch.ones(2))
    compiled, x = thunder.jit(lambda x: normal.log_prob(x)), torch.randn(2)
    for loc in (0.0, 1.0, 2.0):
        normal.loc = torch.full((2,), loc)
        assert torch.equal(compiled(x), normal.log_prob(x))


def test_a_refused_step_leaves_the_state_as_it_was():
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adafactor([weight])
    step = optimizer.step

    def f():
        step()
        print(end="")

    for _ in range(2):
        weight.grad = torch.ones(3)
        thunder.jit(f, fallback="eager")()
    assert all(type(s) is torch.Tensor for s in optimizer.state[weight].values() if torch.is_tensor(s))
    assert optimizer.state[weight]["step"] == 2


def test_a_step_that_counts_is_left_to_eager_where_nobody_fuses():
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight])
    step = thunder.jit(optimizer.step, fallback="dynamo")
    with pytest.warns(thunder.ThunderWarning, match="number of an optimizer's step.*torchcompile"):
        for _ in range(3):
            weight.grad = torch.ones(3)
            step()
    other = nn.Parameter(torch.ones(3))
    eager = torch.optim.AdamW([other])
    for _ in range(3):
        other.grad = torch.ones(3)
        eager.step()
    assert torch.equal(weight, other)


def test_a_schedule_made_before_the_step_is_compiled():
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    step = thunder.jit(optimizer.step)  # holds its optimizer by a weak reference
    for _ in range(8):
        weight.grad = torch.ones(3)
        step()
        schedule.step()
    assert thunder.cache_misses(step) == 2 and thunder.compile_stats(step).fallbacks == 0


def test_a_schedule_of_momentum_too():
    weight, other = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizers = [torch.optim.SGD([p], lr=0.1, momentum=0.9) for p in (weight, other)]
    schedules = [torch.optim.lr_scheduler.OneCycleLR(o, 0.3, total_steps=30) for o in optimizers]
    steps = thunder.jit(optimizers[0].step), optimizers[1].step
    for i in range(25):
        for p, step, schedule in zip((weight, other), steps, schedules, strict=True):
            p.grad = torch.full((3,), float(i))
            step()
            schedule.step()
        assert torch.equal(weight, other)
    assert thunder.cache_misses(steps[0]) <= 3 and thunder.compile_stats(steps[0]).fallbacks == 0


def test_hundreds_of_parameters_and_two_learning_rates():
    params = [nn.Parameter(torch.randn(3)) for _ in range(300)]
    groups = [{"params": params[:100], "lr": 0.1}, {"params": params[100:], "lr": 0.2}]
    optimizer = torch.optim.SGD(groups)
    step = thunder.jit(optimizer.step)
    for i in range(6):
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad = torch.randn(3)
        for group in groups:
            group["lr"] *= 0.9
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (i + 1) * (1 if len(group["params"]) == 100 else 3)
        step()
        for k, (p, b) in enumerate(zip(params, before, strict=True)):
            assert torch.equal(p.detach(), b.add(p.grad, alpha=-0.1 / (i + 1) * (1 if k < 100 else 3)))
    assert thunder.cache_misses(step) == 2
