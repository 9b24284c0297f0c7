"""Random operations in training: the mask of the forward is the mask of the backward, each call draws anew."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import thunder
from tests.jit_checks import assert_same, nothing_leaks  # noqa: F401
from tests.train_checks import TrainingPair, assert_compiled, check_training, compare_runs, weighted_sum

pytestmark = pytest.mark.filterwarnings("ignore::thunder.ThunderWarning")


def leaf(*shape: int) -> torch.Tensor:
    shape = shape or (4, 3)
    return torch.linspace(1, 2, torch.Size(shape).numel()).reshape(shape).requires_grad_()


def drop(a):
    return F.dropout(a, 0.5)


def test_mask_of_the_backward_is_the_mask_of_the_forward():
    compiled = thunder.jit(drop)
    for _ in range(4):
        a = leaf(64)
        out = compiled(a)
        out.sum().backward()
        assert torch.equal(a.grad, (out != 0).float() * 2)
    assert_compiled(compiled)


def test_mask_agrees_where_the_forward_is_cheap_to_recompute():
    """Pointwise chains around dropout are what rematerialisation recomputes; the draw must not be repeated."""

    def f(a):
        return F.dropout(a.exp(), 0.5).sin() * F.dropout(a.cos(), 0.5)

    check_training(f, leaf(16, 16), calls=4)


def test_each_call_draws_anew():
    compiled = thunder.jit(drop)
    a = leaf(64)
    masks = {tuple((compiled(a) != 0).tolist()) for _ in range(6)}
    assert len(masks) == 6
    assert_compiled(compiled)


def test_manual_seed_gives_eagers_numbers_bit_for_bit():
    compiled = thunder.jit(
        lambda a: (drop(a), torch.rand_like(a) * a, a + torch.randn(4, 3), a * torch.bernoulli(a / 2))
    )
    f = lambda a: (drop(a), torch.rand_like(a) * a, a + torch.randn(4, 3), a * torch.bernoulli(a / 2))  # noqa: E731
    for seed in range(3):
        torch.manual_seed(seed)
        expected = f(leaf())
        after = torch.get_rng_state()
        torch.manual_seed(seed)
        got = compiled(leaf())
        assert torch.equal(after, torch.get_rng_state())
        for e, g in zip(expected, got, strict=True):
            assert torch.equal(e, g)
    assert_compiled(compiled)


def test_one_seed_before_many_steps_follows_eager():
    pair = TrainingPair(nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1)))

    def run(module):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        losses = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = module(leaf().detach()).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss)
        return losses

    pair.each(run)
    pair.assert_compiled()


def test_backward_draws_nothing():
    compiled = thunder.jit(drop)
    for _ in range(2):
        out = compiled(leaf())
        before = torch.get_rng_state()
        out.sum().backward()
        assert torch.equal(before, torch.get_rng_state())
    assert_compiled(compiled)


def test_draws_between_forward_and_backward_change_nothing():
    def run(fn, call):
        a = leaf(32)
        out = fn(a)
        torch.rand(100)
        torch.manual_seed(99)
        out.sum().backward()
        return out, a.grad

    assert_compiled(compare_runs(drop, run))


def test_two_forwards_before_their_backwards_keep_their_masks():
    compiled = thunder.jit(drop)
    for _ in range(2):
        a, b = leaf(64), leaf(64)
        first, second = compiled(a), compiled(b)
        first.sum().backward()
        second.sum().backward()
        assert torch.equal(a.grad, (first != 0).float() * 2)
        assert torch.equal(b.grad, (second != 0).float() * 2)
    assert_compiled(compiled)


def test_fork_rng_around_the_call():
    def run(fn, call):
        a = leaf()
        with torch.random.fork_rng():
            torch.manual_seed(7)
            out = fn(a)
        out.sum().backward()
        return out, a.grad, torch.rand(3)

    assert_compiled(compare_runs(drop, run))


def test_fork_rng_inside():
    def f(a):
        with torch.random.fork_rng():
            b = drop(a)
        return b + torch.rand_like(a)

    check_training(f, leaf(), allow_refusal=True)


def test_generator_as_argument():
    def run(fn, call):
        generator = torch.Generator().manual_seed(call)
        a = leaf()
        out = fn(a, generator)
        out.sum().backward()
        return out, a.grad, torch.rand(2, generator=generator)

    f = lambda a, g: a * torch.rand(4, 3, generator=g) + torch.randn(3, generator=g)  # noqa: E731
    assert_compiled(compare_runs(f, run), misses=None)


def test_dropout_in_eval_and_train_take_turns():
    pair = TrainingPair(nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5)))
    for training in (True, False, True, False):
        pair.both(lambda m, training=training: m.train(training))
        pair.step(leaf().detach(), seed=training)
    pair.assert_compiled(misses=2)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_dropout_at_its_ends(p):
    check_training(lambda a: F.dropout(a, p), leaf())


@pytest.mark.parametrize(
    "name", ["alpha_dropout", "feature_alpha_dropout", "dropout1d", "dropout2d", "dropout3d", "rrelu", "gumbel_softmax"]
)
def test_other_random_functions(name):
    shape = {"dropout1d": (2, 3, 4), "dropout2d": (2, 3, 4, 4), "dropout3d": (2, 3, 2, 2, 2)}.get(name, (4, 6))
    options = {} if name == "gumbel_softmax" else {"training": True}
    check_training(lambda a: getattr(F, name)(a, **options), leaf(*shape))


def test_dropout_in_place():
    check_training(lambda a: F.dropout(a * 2, 0.5, inplace=True), leaf())


def test_attention_with_dropout():
    check_training(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.25),
        leaf(2, 2, 5, 4), leaf(2, 2, 5, 4), leaf(2, 2, 5, 4),
    )  # fmt: skip


def test_random_values_that_scale_gradients():
    check_training(lambda a: a * torch.empty_like(a).uniform_(0.5, 2).log_normal_(), leaf())


def test_reparameterized_sampling_of_a_distribution():
    def f(mean, scale):
        return torch.distributions.Normal(mean, scale, validate_args=False).rsample()

    check_training(f, leaf(), leaf())


def test_seed_set_inside():
    def f(a):
        torch.manual_seed(3)
        return drop(a)

    compiled = thunder.jit(f, fallback="eager")
    torch.manual_seed(0)
    assert_same(f(leaf()), compiled(leaf()))
    assert_same(f(leaf()), compiled(leaf()))


def test_copies_of_one_module_draw_their_own_masks():
    net = nn.Dropout(0.5)
    first, second = thunder.jit(net), thunder.jit(copy.deepcopy(net))
    a = leaf(64)
    assert not torch.equal(first(a), second(a))
    weighted_sum(first(a)).backward()
    assert_compiled(first)
