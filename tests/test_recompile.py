"""What makes a call be captured again, what does not, and what is said of it."""

from __future__ import annotations

import functools
import math
import operator
import types
import warnings

import pytest
import torch
from torch import nn

import thunder
from tests.jit_checks import assert_captured_at_most, nothing_leaks  # noqa: F401

# ---- names that the code does not mention ----


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.scale, self.step, self.losses, self.log = 1.0, 0, [], {"a": 1}
        self.config = types.SimpleNamespace(used=1.0, unused=2.0)

    def forward(self, x):
        return self.layer(x) * self.scale * self.config.used


X = torch.linspace(0, 1, 6).reshape(2, 3)


def test_a_training_loop_may_write_what_the_program_does_not_read():
    net = Net()
    compiled = thunder.jit(net)
    for step in range(20):
        net.step = step
        net.losses.append(step)
        net.log["a"] = net.log[step] = step
        net.config.unused = net.layer.note = step
        setattr(net, f"new{step}", step)
        torch.testing.assert_close(compiled(X), net(X))
    for step in range(20):
        delattr(net, f"new{step}")
    compiled(X)
    assert thunder.cache_misses(compiled) == 1
    net.scale, net.config.used = 2.0, 3.0
    torch.testing.assert_close(compiled(X), net(X))
    assert thunder.cache_misses(compiled) == 2


get_step = operator.attrgetter("step")
look_up = getattr


class Reads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, net):
        ctx.net = net
        return x * net.step

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.net.step, None


def times(net, x, k):
    return x * k * net.step


READS = {
    "a name that is made": lambda net, x: x * getattr(net, "st" + "ep".lower()),
    "a formatted name": lambda net, x: x * getattr(net, f"{'step'}"),
    "attrgetter": lambda net, x: x * get_step(net),
    "getattr by another name": lambda net, x: x * look_up(net, "step"),
    "vars": lambda net, x: x * vars(net)["step"],
    "__dict__": lambda net, x: x * net.__dict__["step"],
    "a constant name": lambda net, x: x * getattr(net, "step", 1),
    "hasattr": lambda net, x: x * (2 if hasattr(net, "late") else 3) * net.step,
    "vmap": lambda net, x: torch.vmap(lambda row: row * net.step)(x),
    "checkpoint": lambda net, x: torch.utils.checkpoint.checkpoint(lambda y: y * net.step, x, use_reentrant=False),
    "an autograd function": lambda net, x: Reads.apply(x, net),
    "map": lambda net, x: sum(map(functools.partial(times, net, x), [1, 2])),
    "eval": lambda net, x: x * eval("net.step", {"net": net}),
    "format": lambda net, x: x * int(f"{net.step}"),
}


@pytest.mark.parametrize("read", READS)
def test_what_is_read_in_a_roundabout_way_counts(read):
    class Reader(Net):
        def forward(self, x):
            return READS[read](self, self.layer(x))

    net = Reader()
    compiled = thunder.jit(net)
    for step in range(4):
        net.step = step
        torch.testing.assert_close(compiled(X), net(X))
        if step == 2:
            net.late = True
            torch.testing.assert_close(compiled(X), net(X))


def test_training_steps_are_captured_once():
    net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.1), nn.LayerNorm(8), nn.Linear(8, 1))
    compiled, optimizer = thunder.jit(net), torch.optim.AdamW(net.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
    for step in range(50):
        net.step = step
        optimizer.zero_grad()
        compiled(X).square().mean().backward()
        optimizer.step()
        schedule.step()
    assert thunder.cache_misses(compiled) == 1


def tiny_litgpt():
    from tests.harness.third_party import import_litgpt

    litgpt = import_litgpt()
    config = litgpt.Config.from_name(
        "pythia-14m", n_layer=2, n_embd=32, n_head=4, block_size=16, padded_vocab_size=64, intermediate_size=64
    )
    model, tokens = litgpt.GPT(config), torch.randint(0, 64, (2, 16))
    return model, lambda call: nn.functional.cross_entropy(call(tokens).flatten(0, 1), tokens.flatten())


def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=32,
    )  # fmt: skip
    tokens = torch.randint(0, 64, (2, 16))
    return LlamaForCausalLM(config), lambda call: call(tokens, labels=tokens, use_cache=False).loss


def tiny_bert():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
        max_position_embeddings=32,
    )  # fmt: skip
    tokens, labels = torch.randint(0, 64, (2, 16)), torch.tensor([0, 1])
    return BertForSequenceClassification(config), lambda call: call(tokens, labels=labels).loss


@pytest.mark.parametrize("schedule", [None, "OneCycleLR"])
@pytest.mark.parametrize("make", [tiny_litgpt, tiny_llama, tiny_bert])
def test_fifty_training_steps_of_a_language_model_are_captured_once(make, schedule):
    torch.manual_seed(0)
    model, loss_of = make()
    model.train()
    compiled = thunder.jit(model, fallback="error")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=50) if schedule else None
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        loss = loss_of(compiled)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if rates:
            rates.step()
        losses.append(loss.item())
    stats = thunder.compile_stats(compiled)
    assert (stats.calls, stats.cache_misses, stats.fallbacks) == (50, 1, 0)
    assert losses[-1] < losses[0]


# ---- numbers that change at every call ----


def sgd(params, grads, lr):
    for p, g in zip(params, grads, strict=True):
        p.add_(g, alpha=-lr)


def decayed(params, grads, lr):
    for p, g in zip(params, grads, strict=True):
        p.mul_(1 - lr * 0.01).sub_(lr * g / (1 - 0.9**lr) + abs(lr))


def foreach(params, grads, lr):
    torch._foreach_add_(params, grads, alpha=-lr)


def returned(params, grads, lr):
    return [p - lr * g for p, g in zip(params, grads, strict=True)]


def by_keyword(params, grads, lr):
    return torch.add(params[0], grads[0], alpha=lr), torch.lerp(params[1], grads[1], weight=lr)


def steered(params, grads, lr):
    return [p - (lr if lr > 0.05 else 0.05) * g for p, g in zip(params, grads, strict=True)]


def rooted(params, grads, lr):
    return [p - math.sqrt(lr) * g for p, g in zip(params, grads, strict=True)]


def floored(params, grads, lr):
    return [p - math.floor(lr * 40) * g for p, g in zip(params, grads, strict=True)]


def kept(params, grads, lr):
    return params[0] * lr, lr * 2


def printed(params, grads, lr):
    return params[0] * len(str(lr))


def tensor_of(params, grads, lr):
    return params[0] * torch.tensor(lr)


def arguments():
    return [torch.ones(3), torch.ones(4)], [torch.full((3,), 2.0), torch.linspace(0, 1, 4)]


@pytest.mark.filterwarnings("ignore::thunder.ThunderWarning")
@pytest.mark.parametrize(
    ("program", "most"),
    [(sgd, 2), (decayed, 2), (foreach, 2), (returned, 2), (by_keyword, 2)]
    + [(f, 40) for f in (steered, rooted, floored, kept, printed, tensor_of)],
    ids=lambda v: v.__name__ if callable(v) else "",
)
def test_a_learning_rate(program, most):
    compiled = thunder.jit(program)
    with torch.no_grad():
        for step in range(40):
            lr = 0.1 * 0.93**step
            ours, eager = arguments(), arguments()
            torch.testing.assert_close(compiled(*ours, lr), program(*eager, lr), rtol=0, atol=0)
            torch.testing.assert_close(ours, eager, rtol=0, atol=0)
        for lr in (0.0, -0.0, float("inf"), float("nan"), 1e-300):
            if program not in (rooted, floored):
                ours, eager = arguments(), arguments()
                torch.testing.assert_close(compiled(*ours, lr), program(*eager, lr), rtol=0, atol=0, equal_nan=True)
    assert thunder.cache_misses(compiled) <= most + (5 if most > 2 else 0)


def test_a_thousand_steps_of_an_optimizer_under_a_schedule():
    compiled = thunder.jit(sgd)
    params, grads = arguments()
    optimizer = torch.optim.SGD(params, lr=0.5)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.995)
    with warnings.catch_warnings():
        warnings.simplefilter("error", thunder.ThunderWarning)
        for _ in range(1000):
            with torch.no_grad():
                compiled(params, grads, schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
    assert thunder.cache_misses(compiled) == 2


def test_two_numbers_and_one_that_comes_to_change_later():
    def program(x, options):
        return x * options["a"] + options["b"] * options["c"]

    compiled = thunder.jit(program)
    for step in range(30):
        options = {"a": 1.0 + step, "b": 0.5 if step < 15 else 0.1 * step, "c": 3.0}
        torch.testing.assert_close(compiled(X, options), program(X, options))
    assert thunder.cache_misses(compiled) <= 4


def test_gradients_keep_the_number_of_their_forward():
    compiled = thunder.jit(lambda x, k: (x * x * k).sum())
    x = X.clone().requires_grad_()
    losses = [compiled(x, k) for k in (1.0, 2.0, 3.0, 4.0)]
    for k, loss in zip((1.0, 2.0, 3.0, 4.0), losses, strict=True):
        (grad,) = torch.autograd.grad(loss, x)
        torch.testing.assert_close(grad, 2 * k * x.detach())


# ---- reports ----

SCALE = 1.0


def test_explain_recompile_names_what_changed():
    global SCALE

    class Report(Net):
        def forward(self, x, k=1):
            return super().forward(x) * k * SCALE * len(self.losses)

    net = Report()
    compiled = thunder.jit(net, recompile_limit=100)
    assert "once" in str(thunder.explain_recompile(compiled))
    causes = []

    def call(*args, **kwargs):
        compiled(*args, **kwargs)
        found = thunder.explain_recompile(compiled).recompiles
        causes.append(found[-1].cause if len(found) > len(causes) - 1 and found else "")

    call(X)
    net.scale = 2.0
    call(X)
    call(torch.ones(5, 3))
    net.config.used = 5.0
    call(X)
    net.losses.append(1)
    call(X)
    SCALE = 3.0
    call(X)
    call(X, 2)
    call(X, k=3)
    net.eval()
    with torch.no_grad():
        call(X)
    net.layer.weight.requires_grad_(False)
    call(X)
    net.layer.register_forward_hook(lambda m, a, o: o * 2)
    call(X)
    expected = [
        "Report.scale went from 1.0 to 2.0",
        "shape of argument 'x' went from (2, 3) to (5, 3)",
        "Report.config.used went from 1.0 to 5.0",
        "Report.losses changed",
        "the global 'SCALE' of tests.test_recompile went from 1.0 to 3.0",
        "number of arguments went from 1 to 2",
        "argument 'k' went from 2 to 3",
        "grad mode went from on to off",
        "Report.layer.weight changed its",
        "Report.layer._forward_hooks",
    ]
    for cause, part in zip(causes[1:], expected, strict=True):
        assert part in cause, f"{part!r} is not in {cause!r}"
    report = thunder.explain_recompile(compiled)
    assert report.name == "Report" and [r.call for r in report.recompiles] == list(range(2, 12))


def test_variables_and_values_are_named():
    def make():
        q = 1

        def program(x):
            return x * q if x.sum() > 0 else x

        def change(v):
            nonlocal q
            q = v

        return program, change

    program, change = make()
    compiled = thunder.jit(program)
    compiled(X), change(5), compiled(X), compiled(-X - 1)
    first, second = thunder.explain_recompile(compiled).recompiles
    assert "the variable 'q' of an enclosing function went from 1 to 5" in first.cause
    assert second.by_value and "False" in second.cause


def test_the_limit_warns_once_and_calls_stay_compiled():
    def program(x, k):
        return x * k

    compiled = thunder.jit(program, recompile_limit=2, dynamic=False)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for k in range(6):
            torch.testing.assert_close(compiled(X, k), X * k)
    (warning,) = seen
    assert "program was captured again 3 times" in str(warning.message)
    assert "argument 'k' went from 2 to 3" in str(warning.message)
    stats = thunder.compile_stats(compiled)
    assert stats.fallbacks == 0 and stats.cache_misses == 6
    with pytest.raises(ValueError, match="recompile_limit"):
        thunder.jit(program, recompile_limit=-1)


# ---- floats that the callable reads of its surroundings ----


class Optimizer:
    """Momentum with what a scheduler changes: an attribute and an entry of a group."""

    def __init__(self, params):
        self.params = list(params)
        self.momenta = [torch.zeros_like(p) for p in self.params]
        self.rate = 0.1
        self.groups = [{"decay": 0.01, "name": "all"}]

    def step(self, grads):
        group = self.groups[0]
        for p, m, g in zip(self.params, self.momenta, grads, strict=True):
            m.mul_(0.9).add_(g)
            p.mul_(1 - self.rate * group["decay"])
            p.add_(m, alpha=-self.rate)


def test_a_thousand_steps_under_a_schedule_compile_twice():
    torch.manual_seed(0)
    start = [torch.randn(3, 2), torch.randn(4)]
    ours, theirs = Optimizer([p.clone() for p in start]), Optimizer([p.clone() for p in start])
    step = thunder.jit(ours.step)
    with torch.no_grad():
        for i in range(1000):
            grads = [torch.randn_like(p) for p in start]
            for optimizer in (ours, theirs):
                optimizer.rate = 0.05 * (1 + math.cos(i / 300))
                optimizer.groups[0]["decay"] = 0.01 / (1 + i)
            step(grads)
            theirs.step(grads)
            torch.testing.assert_close(ours.params, theirs.params)
    assert thunder.cache_misses(step) == 2


RATE = 0.5


def test_floats_of_globals_and_enclosing_functions():
    global RATE
    inner = 2.0

    def program(x):
        return x * RATE + inner

    compiled = thunder.jit(program)
    for i in range(20):
        RATE, inner = 0.5 + i, 2.0 - i
        torch.testing.assert_close(compiled(X), program(X))
    assert thunder.cache_misses(compiled) == 2
    RATE, inner = 3, 2.0
    torch.testing.assert_close(compiled(X), program(X))
    RATE = 0.25
    torch.testing.assert_close(compiled(X), program(X))


@pytest.mark.parametrize("values", [(1.0, 2.0, 3.0, -0.0, 0.0, math.nan, math.inf, 1e-300, 5, 4.0, True, 2.0)])
@pytest.mark.parametrize(
    "use",
    [
        lambda self, x: x * self.scale,
        lambda self, x: x * -self.scale + self.scale**2,
        lambda self, x: x + 1 if self.scale > 2.5 else x * self.scale,
        lambda self, x: x * int(self.scale) if self.scale == self.scale and abs(self.scale) < 1e9 else x,
        lambda self, x: x * (self.scale / 2) + (self.other if self.scale else 1.0),
        lambda self, x: x + len(f"{self.scale}"),
        lambda self, x: torch.full_like(x, self.scale) + self.other,
        lambda self, x: (x * self.scale, self.scale),
    ],
)
def test_a_float_attribute_that_changes(use, values):
    class Scaled(torch.nn.Module):
        scale = 1.0  # an attribute of the class, until an object has one of its own

        def __init__(self):
            super().__init__()
            self.other = 0.5
            self.scale = 1.0

        def forward(self, x):
            return use(self, x)

    module, twin = Scaled(), Scaled()
    compiled = thunder.jit(module)
    for value in (*values, *values[:3]):
        module.scale = twin.scale = value
        torch.testing.assert_close(compiled(X), twin(X), equal_nan=True, rtol=0, atol=0)
        assert type(module.scale) is type(value)


def test_a_float_attribute_that_the_code_writes_itself():
    class Decaying(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = 1.0

        def forward(self, x):
            y = x * self.scale
            self.scale = self.scale * 0.5
            return y

    module, twin = Decaying(), Decaying()
    compiled = thunder.jit(module)
    for i in range(12):
        if i % 5 == 4:
            module.scale = twin.scale = 3.0 + i
        torch.testing.assert_close(compiled(X), twin(X))
        assert module.scale == twin.scale
        assert type(module.scale) is float


def test_a_float_attribute_that_goes_away():
    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = 1.0

        def forward(self, x):
            return x * getattr(self, "scale", 7.0)

    module = Scaled()
    compiled = thunder.jit(module)
    for value in (1.0, 2.0, 3.0):
        module.scale = value
        torch.testing.assert_close(compiled(X), X * value)
    del module.scale
    torch.testing.assert_close(compiled(X), X * 7.0)


def test_floats_of_arguments_and_attributes_change_together():
    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = 1.0

        def forward(self, x, shift):
            return x * self.scale + shift * self.scale

    module = Scaled()
    compiled = thunder.jit(module)
    for i in range(10):
        module.scale = 1.0 + i
        torch.testing.assert_close(compiled(X, 0.5 * i), X * module.scale + 0.5 * i * module.scale)
    assert thunder.cache_misses(compiled) == 2


# ---- numbers that a program with gradients has no use for, though code may read any attribute by name ----


class Roundabout(nn.Module):
    """Reads attributes by names that it makes up."""

    def __init__(self, wanted=("weight",)):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.step = 0
        self.loss = 0.0
        self.wanted = wanted

    def forward(self, x):
        for name in self.wanted:
            value = getattr(self, "".join(name))
            x = x * value if not isinstance(value, int) or value < 4 else x + value
        return x.sum()


def train(module, call, steps):
    losses = []
    for i in range(steps):
        module.step = i
        loss = call(X)
        module.zero_grad()
        loss.backward()
        module.loss = loss.item() + i
        losses.append((loss.item(), module.weight.grad.clone()))
    return losses


@pytest.mark.parametrize("wanted", [("weight",), ("weight", "step"), ("weight", "loss"), ("step", "weight", "loss")])
def test_numbers_beside_a_training_step(wanted):
    module, twin = Roundabout(wanted), Roundabout(wanted)
    compiled = thunder.jit(module, recompile_limit=100)
    torch.testing.assert_close(train(module, compiled, 20), train(twin, twin, 20))
    if wanted == ("weight",):
        assert_captured_at_most(compiled, 3)


def test_an_int_argument_that_a_training_step_has_no_use_for():
    weight = torch.ones(3, requires_grad=True)

    def program(x, step, verbose=0):
        if verbose > 1:
            x = x + step
        return (x * weight).sum()

    compiled = thunder.jit(program)
    for i in range(20):
        (ours,) = torch.autograd.grad(compiled(X, i, verbose=2 * (i % 7 == 6)), weight)
        (theirs,) = torch.autograd.grad(program(X, i, verbose=2 * (i % 7 == 6)), weight)
        torch.testing.assert_close(ours, theirs)
    assert thunder.cache_misses(compiled) <= 6


class Surroundings:
    factor = 1


class ReadsBackwards(torch.autograd.Function):
    """What its backward multiplies with is no argument."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * Surroundings.held.factor


class ReadsBefore(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.factor = Surroundings.held.factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * (ctx.factor * 2)


@pytest.mark.parametrize("function", [ReadsBackwards, ReadsBefore])
@pytest.mark.parametrize(
    "values", [range(1, 7), [0.5, 1.5, 2.5, 3.5], [1, 2.0, 3, 4.5, 6]], ids=["int", "float", "both"]
)
def test_a_number_that_only_a_backward_of_the_users_reads(function, values):
    Surroundings.held = Surroundings()
    compiled = thunder.jit(lambda x: function.apply(x).sum())
    for Surroundings.held.factor in values:
        x = torch.ones(3, requires_grad=True)
        (ours,) = torch.autograd.grad(compiled(x), x)
        (theirs,) = torch.autograd.grad(function.apply(x).sum(), x)
        assert torch.equal(ours, theirs)
