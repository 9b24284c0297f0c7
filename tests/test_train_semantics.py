"""Training gives eager's outputs, gradients and side effects: what needs grad, is returned, is written."""

from __future__ import annotations

import copy

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
    weighted_sum,
    x,
)

pytestmark = pytest.mark.filterwarnings("ignore::thunder.ThunderWarning")


# ---- which tensors need grad ----


def test_function_of_one_leaf():
    check_training(lambda a: (a * a).sin(), leaf())


def test_some_inputs_without_grad():
    check_training(lambda a, b, c: (a * b + c).tanh(), leaf(), x(), leaf(3))


def test_inputs_in_containers():
    check_training(lambda box: box["a"][0] * box["b"], {"a": [leaf(), 3], "b": x()})


def test_same_leaf_passed_twice():
    a = leaf()
    check_training(lambda p, q: p * q.sin(), a, a)


def test_leaf_and_a_view_of_it_passed_together():
    check_training(lambda p, q: p[1:] * q.sin(), leaf(), prepare=lambda a: (a, a[1:]))


def test_non_leaf_input():
    check_training(lambda a: a.exp(), leaf(), prepare=lambda a: (a * 2,))


def test_gradients_accumulate_over_calls():
    pair = TrainingPair(nn.Linear(3, 2))
    for _ in range(3):
        pair.step(x())
    pair.assert_compiled()


def test_gradients_accumulate_into_the_same_tensor():
    pair = TrainingPair(nn.Linear(3, 2))
    pair.step(x())
    grads = [p.grad for p in pair.model.parameters()]
    pair.step(x() + 1)
    assert all(p.grad is g for p, g in zip(pair.model.parameters(), grads, strict=True))
    pair.assert_compiled()


def test_zeroed_and_dropped_gradients():
    pair = TrainingPair(nn.Linear(3, 2))
    pair.step(x())
    pair.both(lambda m: m.zero_grad(set_to_none=False))
    pair.step(x() + 1)
    pair.both(lambda m: m.zero_grad(set_to_none=True))
    pair.step(x() + 2)
    pair.assert_compiled()


def test_frozen_parameters_get_no_gradient():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    net[0].requires_grad_(False)
    pair = TrainingPair(net)
    pair.step(x())
    pair.step(x() + 1)
    assert pair.model[0].weight.grad is None
    assert pair.model[2].weight.grad is not None
    pair.assert_compiled()


def test_frozen_in_the_middle_still_passes_gradients_through():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    net[2].requires_grad_(False)
    check_training(net, leaf())


def test_only_a_bias_is_trained():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).requires_grad_(False)
    net[0].bias.requires_grad_(True)
    check_training(net, x())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.embed(ids).tanh())


def test_tied_parameters_add_their_gradients():
    pair = TrainingPair(Tied())
    pair.step(torch.tensor([[1, 2, 2], [6, 0, 1]]))
    pair.step(torch.tensor([[3, 3, 3], [5, 0, 1]]))
    assert pair.model.head.weight is pair.model.embed.weight
    pair.assert_compiled()


def test_module_used_twice_in_one_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, a):
            return self.layer(self.layer(a).relu())

    check_training(Twice(), x())


def test_unused_parameter_keeps_none():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, a):
            return self.used(a)

    pair = TrainingPair(Net())
    pair.step(x())
    pair.step(x() + 1)
    assert pair.model.unused.weight.grad is None
    pair.assert_compiled()


def test_parameters_and_input_need_grad():
    check_training(nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2)), leaf())


def test_closure_tensor_gets_its_gradient():
    weights = [leaf(3, 3), leaf(3, 3)]
    eager, compiled = (lambda a: (a @ weights[0]).sin()), thunder.jit(lambda a: (a @ weights[1]).sin())
    for call in range(2):
        for fn in (eager, compiled):
            weighted_sum(fn(x() + call)).backward()
    assert_gradients_same([weights[0].grad], [weights[1].grad])
    assert_compiled(compiled)


def test_requires_grad_changed_between_calls():
    pair = TrainingPair(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    pair.step(x())
    pair.both(lambda m: m[0].requires_grad_(False))
    pair.step(x() + 1)
    pair.both(lambda m: m[2].weight.requires_grad_(False))
    pair.step(x() + 2)
    pair.both(lambda m: m.requires_grad_(True))
    pair.step(x() + 3)
    pair.assert_compiled(misses=None)  # one program may serve all, when torch asks it for fewer gradients


def test_input_that_begins_to_require_grad():
    f = lambda a, b: a * b.cos()  # noqa: E731
    compiled = thunder.jit(f)
    for needs in (False, True, False, True):
        eager, ours = x(), x()
        eager.requires_grad_(needs), ours.requires_grad_(needs)
        expected, got = f(eager, x()), compiled(ours, x())
        assert_same(expected, got)
        if needs:
            weighted_sum(expected).backward(), weighted_sum(got).backward()
            assert_gradients_same([eager.grad], [ours.grad])
    assert_compiled(compiled, misses=2)


def test_everything_frozen_needs_no_gradients_and_compiles():
    pair = TrainingPair(nn.Linear(3, 2).requires_grad_(False))
    pair.step(x())
    pair.step(x() + 1)
    pair.assert_compiled()


def test_parameter_replaced_between_calls():
    pair = TrainingPair(nn.Linear(3, 2))
    pair.step(x())

    def replace(module):
        module.weight = nn.Parameter(module.weight.detach() * 2)

    pair.both(replace)
    pair.step(x() + 1)
    pair.step(x() + 2)
    pair.assert_compiled(misses=None)


def test_parameter_data_replaced_between_calls():
    pair = TrainingPair(nn.Linear(3, 2))
    pair.step(x())

    def replace(module):
        module.weight.data = module.weight.data.clone() + 1

    pair.both(replace)
    pair.step(x() + 1)
    pair.assert_compiled()


# ---- what is returned ----


def test_outputs_that_do_not_require_grad():
    check_training(lambda a, b: (a * b, b * 2, a.detach() + 1, (a > 0).float()), leaf(), x())


def test_integer_and_bool_outputs():
    check_training(lambda a: (a.sin(), a.argmax(1), a > 0, a.topk(2)), leaf())


def test_no_output_requires_grad():
    check_training(lambda a: (a.argmax(), a > 0), leaf())


def test_output_is_an_input():
    check_training(lambda a, b: (a, a * b, b), leaf(), x())


def test_output_is_a_leaf_itself_by_identity():
    compiled = thunder.jit(lambda a, b: (a, a * b))
    for _ in range(2):
        a = leaf()
        assert compiled(a, x())[0] is a
    assert_compiled(compiled)


def test_output_is_a_parameter():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(x())

        def forward(self, a):
            return self.weight, a * self.weight

    net = Net()
    compiled = thunder.jit(net)
    assert compiled(x())[0] is net.weight
    assert compiled(x())[0] is net.weight
    check_training(net, x())


def test_output_is_a_view_of_an_input():
    check_training(lambda a: (a[1:], a.t(), a.sin()), leaf())


def test_output_is_a_view_of_a_non_leaf_input():
    check_training(lambda a: (a.view(-1), a.exp()), leaf(), prepare=lambda a: (a * 3,))


def test_output_view_of_an_input_shares_its_memory():
    compiled = thunder.jit(lambda a: (a[1:], a * 2))
    for _ in range(2):
        a = leaf()
        assert compiled(a)[0].data_ptr() == a[1:].data_ptr()
    assert_compiled(compiled)


def test_outputs_are_views_of_each_other():
    def f(a):
        b = a.exp()
        return b, b[0], b.t()

    check_training(f, leaf())


def test_outputs_of_a_multi_view_operation():
    check_training(lambda a: (*a.exp().chunk(2), *a.unbind(1)), leaf())


def test_writing_to_an_output_that_is_a_view_of_another_reaches_eagers_gradients():
    def run(fn, call):
        a = leaf()
        base, view = fn(a)
        with torch.no_grad():
            view.fill_(float(call))
        return base, torch.autograd.grad(weighted_sum(base), a)

    compiled = compare_runs(lambda a: (lambda b: (b, b[0]))(a * 2), run)
    assert_compiled(compiled)


def test_writing_to_an_output_in_place_under_grad():
    def run(fn, call):
        a = leaf()
        out = fn(a)
        out.mul_(2 + call)
        return out, torch.autograd.grad(weighted_sum(out), a)

    assert_compiled(compare_runs(lambda a: a * 3, run))


def test_same_output_twice():
    compiled = check_training(lambda a: (lambda b: [b, {"again": b}])(a.sin()), leaf())
    first, again = compiled(leaf())
    assert first is again["again"]


def test_nothing_is_returned():
    check_training(lambda a: None, leaf())


def test_outputs_in_containers_keep_structure():
    check_training(lambda a: {"x": (a * 2, [a.sum(), 1, "text", None])}, leaf())


def test_detached_alias_of_an_output():
    check_training(lambda a: (lambda b: (b, b.detach()))(a * 2), leaf())


def test_detached_output_shares_memory_as_in_eager():
    compiled = thunder.jit(lambda a: (lambda b: (b, b.detach()))(a * 2))
    for _ in range(2):
        b, detached = compiled(leaf())
        assert b.data_ptr() == detached.data_ptr()
        assert not detached.requires_grad
    assert_compiled(compiled)


def test_loss_computed_inside():
    check_training(lambda a, w, t: F.mse_loss(a @ w, t), x(), leaf(3, 2), x(4, 2))


def test_backward_uses_one_of_two_outputs():
    def run(fn, call):
        a, b = leaf(), leaf()
        outs = fn(a, b)
        outs[call].sum().backward()
        return outs, [g if g is not None else 0 for g in (a.grad, b.grad)]

    assert_compiled(compare_runs(lambda a, b: (a.sin(), (a * b).cos()), run))


# ---- what is written ----


def test_input_without_grad_is_mutated():
    check_training(lambda a, b: (b.add_(1), a * b)[1], leaf(), x())


def test_input_without_grad_receives_a_value_with_grad():
    def run(fn, call):
        a, b = leaf(), x()
        out = fn(a, b)
        return out, b, b.requires_grad, torch.autograd.grad(weighted_sum([out, b]), a)

    assert_compiled(compare_runs(lambda a, b: b.mul_(a) * 2, run))


def test_non_leaf_input_is_mutated():
    def run(fn, call):
        a = leaf()
        b = a * 2
        out = fn(b)
        return out, b, torch.autograd.grad(weighted_sum([out, b]), a)

    assert_compiled(compare_runs(lambda b: b.mul_(3).sin(), run))


def test_view_of_a_non_leaf_is_mutated():
    def run(fn, call):
        a = leaf()
        b = a * 2
        out = fn(b[1:])
        return out, b, torch.autograd.grad(weighted_sum([out, b]), a)

    assert_compiled(compare_runs(lambda b: b.mul_(3).sin(), run))


def test_leaf_is_mutated_under_no_grad():
    def f(a):
        with torch.no_grad():
            a.mul_(0.5)
        return a.sin()

    check_training(f, leaf())


def test_leaf_mutated_in_place_raises_as_eager_does():
    f = lambda a: a.mul_(2).sin()  # noqa: E731
    compiled = thunder.jit(f)
    for _ in range(2):
        assert_same_error(lambda: f(leaf()), lambda: compiled(leaf()), "leaf Variable that requires grad")


def test_version_counter_moves_as_in_eager():
    f = lambda a, b: (b.add_(1), a * 2)[1]  # noqa: E731
    compiled = thunder.jit(f)
    for _ in range(2):
        eager, ours = x(), x()
        f(leaf(), eager), compiled(leaf(), ours)
        assert (eager._version > 0) == (ours._version > 0)
    assert_compiled(compiled)


def test_in_place_on_intermediates():
    def f(a):
        b = a * 2
        b.add_(1)
        b[1:].mul_(3)
        b[:, 0] = a[:, 1]
        return b.relu_()

    check_training(f, leaf())


def test_batch_norm_in_training_updates_its_buffers():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))
    pair = TrainingPair(net.train())
    for call in range(3):
        pair.step(x() + call)
    assert int(pair.model[1].num_batches_tracked) == 3
    pair.assert_compiled()


def test_batch_norm_between_train_and_eval():
    pair = TrainingPair(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)))
    for training in (True, False, True, False):
        pair.both(lambda m, training=training: m.train(training))
        pair.step(x() + training)
    pair.assert_compiled(misses=2)


def test_buffer_written_by_forward():
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(x(3))
            self.register_buffer("mean", torch.zeros(3))

        def forward(self, a):
            with torch.no_grad():
                self.mean.lerp_(a.mean(0), 0.5)
            return (a - self.mean) * self.weight

    check_training(Mean(), leaf())


def test_second_derivative_after_a_buffer_was_written():
    """Of what the write returned there is only the buffer, as it is now."""

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(3))

        def forward(self, a):
            with torch.no_grad():
                self.mean.lerp_(a.mean(0), 0.5)
            return (a - self.mean).sin()

    compiled = thunder.jit(Mean())
    a = leaf()
    with pytest.raises(RuntimeError, match="create_graph=True needs an input of the compiled call as it was"):
        torch.autograd.grad(compiled(a).sum(), a, create_graph=True)


def test_buffer_assigned_by_forward():
    class Count(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(x(3))
            self.register_buffer("seen", torch.zeros(3))

        def forward(self, a):
            self.seen = self.seen + a.detach().sum(0)
            return a * self.weight + self.seen

    check_training(Count(), leaf())


def test_attribute_that_keeps_a_tensor_with_grad():
    class Keep(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(x(3))
            self.last = None

        def forward(self, a):
            self.last = (a * self.weight).tanh()
            return self.last.sum()

    def run(module, call):
        module.zero_grad()
        out = module(x() + call)
        (out + weighted_sum(module.last)).backward()
        return out, module.last, module.weight.grad

    eager = Keep()
    model = copy.deepcopy(eager)
    compiled = thunder.jit(model)
    for call in range(3):
        expected = run(eager, call)
        got = run(compiled, call)
        assert_gradients_same([t.detach() for t in expected], [t.detach() for t in got])
        assert got[1].requires_grad
    assert_compiled(compiled, misses=None)


def test_spectral_norm_parametrization():
    torch.manual_seed(0)
    net = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4))
    check_training(net.train(), x(), misses=None)


def test_weight_norm_parametrization():
    check_training(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), x())


# ---- whole steps ----


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW"])
def test_training_loop_follows_eager(optimizer):
    pair = TrainingPair(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)))

    def run(module):
        chosen = getattr(torch.optim, optimizer)(module.parameters(), lr=0.05)
        losses = []
        for call in range(10):
            chosen.zero_grad()
            loss = F.mse_loss(module(x() + call / 10), x().sum(1, keepdim=True))
            loss.backward()
            chosen.step()
            losses.append(loss)
        return losses

    pair.each(run)
    pair.assert_compiled()


def test_optimizer_step_inside_a_closure():
    pair = TrainingPair(nn.Linear(3, 1))

    def run(module):
        optimizer = torch.optim.LBFGS(module.parameters(), max_iter=5)

        def closure():
            optimizer.zero_grad()
            loss = module(x()).square().mean()
            loss.backward()
            return loss

        return [optimizer.step(closure) for _ in range(2)]

    pair.each(run)
    pair.assert_compiled()


def test_gradient_clipping_and_accumulation_over_micro_batches():
    pair = TrainingPair(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)))

    def run(module):
        norms = []
        for step in range(2):
            module.zero_grad()
            for micro in range(3):
                (module(x() + step + micro).square().mean() / 3).backward()
            norms.append(nn.utils.clip_grad_norm_(module.parameters(), 0.1))
        return norms

    pair.each(run)
    pair.assert_compiled()


def test_two_compiled_modules_in_a_row():
    first, second = nn.Linear(3, 4), nn.Linear(4, 2)
    twins = copy.deepcopy(first), copy.deepcopy(second)
    compiled = [thunder.jit(twin) for twin in twins]
    for call in range(2):
        weighted_sum(second(first(x() + call).relu())).backward()
        weighted_sum(compiled[1](compiled[0](x() + call).relu())).backward()
    for eager, twin in zip((first, second), twins, strict=True):
        assert_gradients_same([p.grad for p in eager.parameters()], [p.grad for p in twin.parameters()])
    for each in compiled:
        assert_compiled(each)


def test_compiled_inside_an_eager_model():
    pair = TrainingPair(nn.Sequential(nn.Linear(3, 4), nn.ReLU()))
    head = nn.Linear(4, 2)
    pair.each(lambda module: weighted_sum(head(module(x()))).backward())
    pair.each(lambda module: weighted_sum(head(module(x() + 1))).backward())
    pair.assert_compiled()


def test_two_forwards_before_the_backwards():
    pair = TrainingPair(nn.Sequential(nn.Linear(3, 4), nn.Tanh()))

    def run(module):
        first, second = module(x()), module(x() + 1)
        weighted_sum(first).backward()
        weighted_sum(second).backward()
        return first, second

    pair.each(run)
    pair.assert_compiled()


def test_output_fed_back_into_the_same_compiled_module():
    pair = TrainingPair(nn.Sequential(nn.Linear(3, 3), nn.Tanh()))
    pair.each(lambda module: weighted_sum(module(module(module(x())))).backward())
    pair.assert_compiled(misses=None)  # the first input needs no grad, the later ones do


def test_other_shapes():
    pair = TrainingPair(nn.Linear(3, 2))
    for rows in (2, 5, 2, 5):
        pair.step(x(rows, 3))
    pair.assert_compiled(misses=2)


def test_training_and_no_grad_calls_take_turns():
    pair = TrainingPair(nn.Sequential(nn.Linear(3, 4), nn.ReLU()))
    for call in range(3):
        pair.step(x() + call)
        with torch.no_grad():
            pair.same(x() + call)
    pair.assert_compiled(misses=2)


GAIN = 2.0


class Amplified(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 3

    @staticmethod
    def backward(ctx, grad):
        return amplify(grad)


def amplify(grad):
    return grad * GAIN


def test_state_that_a_backward_function_reads_must_not_change_after_the_forward(monkeypatch):
    compiled = thunder.jit(lambda x: Amplified.apply(x))

    def gradient(**changes):
        x = torch.ones(2, requires_grad=True)
        out = compiled(x).sum()
        for name, value in changes.items():
            monkeypatch.setitem(globals(), name, value)
        out.backward()
        return x.grad[0].item()

    assert gradient() == gradient() == 2.0
    monkeypatch.setitem(globals(), "GAIN", 5.0)
    assert gradient() == gradient() == 5.0
    with pytest.raises(RuntimeError, match="GAIN changed"):
        gradient(GAIN=7.0)
    assert gradient() == 7.0
    with pytest.raises(RuntimeError, match="amplify"):
        gradient(amplify=lambda grad: grad)
    assert gradient() == 1.0


@pytest.mark.parametrize("n", range(1, 13))
def test_zeros_for_gradients_that_do_not_come_in(n):
    """Programs of many lengths: making the zeros moves what describes the program at some of them."""
    weights = [leaf(4) for _ in range(n)]

    def f(a):
        return a * sum(w.sum() for w in weights), sum((a + w) * w for w in weights)

    outcomes = []
    for run in (f, thunder.jit(f)):
        for w in weights:
            w.grad = None
        run(x(4))[0].sum().backward()
        outcomes.append([w.grad for w in weights])
    assert all(torch.equal(ours, eager) for ours, eager in zip(*outcomes, strict=True))


REPLACED = {
    "copy_": lambda t, w: t.copy_(w),
    "copy_ of what requires none": lambda t, w: t.copy_(w.detach()),
    "[:] =": lambda t, w: t.__setitem__(slice(None), w),
    "a view of all": lambda t, w: t[0:4].copy_(w),
    "in two steps": lambda t, w: t.fill_(1).copy_(w),
}


@pytest.mark.parametrize("how", REPLACED)
def test_gradient_of_what_is_overwritten_is_zeros_and_not_none(how):
    def f(a, w):
        t = a * 2
        REPLACED[how](t, w)
        return t * w

    outcomes = []
    for run in (f, thunder.jit(f)):
        a, w = leaf(4), leaf(4)
        run(a, w).sum().backward()
        outcomes.append((a.grad, w.grad))
    (a_eager, w_eager), (a_ours, w_ours) = outcomes
    assert a_eager is not None
    assert torch.equal(a_ours, a_eager)
    assert torch.equal(w_ours, w_eager)


def test_what_gives_a_shape_has_no_gradient():
    def f(a, w):
        t = a.view_as(w * 2)
        t.masked_fill_(t > 0, 2.0)
        return a, t.reshape_as(w), a[:1].expand_as(w), a.type_as(w), w * 2

    for ours, eager in zip(thunder.jit(f)(x(4), leaf(4)), f(x(4), leaf(4)), strict=True):
        assert ours.requires_grad == eager.requires_grad
        assert torch.equal(ours, eager)


@pytest.mark.parametrize("change", [torch.Tensor.double, torch.Tensor.t, lambda t: t.new_empty(0)])
def test_backward_refuses_a_weight_whose_data_became_another_kind(change):
    weight = torch.ones(2, 3, requires_grad=True)
    out = thunder.jit(lambda a: a @ weight)(leaf(4, 2))
    weight.data = change(weight.data)
    with pytest.raises(RuntimeError, match="was assigned to"):
        out.sum().backward()
