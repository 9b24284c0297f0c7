"""Training with every kind of tensor and gradient: dtypes, shapes, layouts, gradients that are expanded or None."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import thunder
from tests.jit_checks import nothing_leaks  # noqa: F401
from tests.train_checks import (
    assert_compiled,
    assert_gradients_same,
    assert_refused_clearly,
    check_training,
    compare_runs,
    leaf,
    weights_like,
    x,
)

pytestmark = pytest.mark.filterwarnings("ignore::thunder.ThunderWarning")


# ---- tensors ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype(dtype):
    check_training(lambda a, w: F.gelu(a @ w).softmax(-1), leaf(dtype=dtype), leaf(3, 5, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex(dtype):
    a = torch.complex(x(dtype=torch.float64), x(dtype=torch.float64) + 1).to(dtype).requires_grad_()
    check_training(lambda z: (z * z.conj() + z.exp(), z.abs(), z.real, z.angle()), a)


def test_real_to_complex_and_back():
    check_training(lambda a: torch.view_as_real(torch.complex(a, a.sin()) * 2j), leaf())


def test_fft():
    check_training(lambda a: torch.fft.irfft(torch.fft.rfft(a) * 2, n=3), leaf())


def test_mixed_dtypes():
    check_training(lambda a, b, i: a * b + i, leaf(dtype=torch.float64), leaf(3, dtype=torch.float32), torch.arange(3))


def test_casts_pass_the_gradient_back_in_the_dtype_of_the_input():
    check_training(lambda a: a.double().sin().to(torch.bfloat16).float() * a, leaf())


def test_zero_dim_tensors():
    check_training(lambda a, b: a * b.exp() + b.sum(), torch.tensor(0.5, requires_grad=True), leaf())


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_empty_tensors(shape):
    check_training(lambda a: (a.sin() * 2, a.sum()), torch.empty(shape).requires_grad_())


def test_empty_batch_through_a_linear_layer():
    check_training(nn.Linear(3, 2), torch.empty(0, 3).requires_grad_())


def test_broadcasting_sums_the_gradient_back():
    check_training(lambda a, b, c: a * b + c, leaf(4, 1, 3), leaf(5, 1), leaf(1))


def test_transposed_and_strided_leaves():
    a = x(3, 4).t().requires_grad_()
    b = x(4, 6)[:, ::2].detach().requires_grad_()
    check_training(lambda p, q: (p * q).sin() @ p.t(), a, b)


def test_expanded_non_leaf():
    check_training(lambda b: b.exp(), leaf(1, 3), prepare=lambda a: (a.expand(4, 3),))


def test_channels_last():
    a = x(2, 3, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    conv = nn.Conv2d(3, 4, 3, padding=1).to(memory_format=torch.channels_last)
    check_training(nn.Sequential(conv, nn.ReLU(), nn.MaxPool2d(2)), a)


def test_expand_inside_and_contiguous():
    check_training(lambda a: a.expand(5, 4, 3).contiguous() * a[0], leaf())


def test_parameter_subclass_and_buffer_as_leaves():
    check_training(lambda a, b: a * b, nn.Parameter(x()), leaf())


# ---- gradients that come in ----


def incoming(make):
    def run(fn, call):
        a, w = leaf(), leaf(3, 3)
        out = fn(a, w)
        return torch.autograd.grad(out, (a, w), make(out, call))

    return run


F_OF_TWO = lambda a, w: (a @ w).tanh() * a  # noqa: E731


@pytest.mark.parametrize(
    "make",
    [
        lambda out, call: torch.tensor(1.0 + call).expand_as(out),
        lambda out, call: x(1, 3).add(call).expand_as(out),
        lambda out, call: x(3, 4).add(call).t(),
        lambda out, call: x(4, 6)[:, ::2] + call,
        lambda out, call: x(4, 6).add(call)[:, ::2],
        lambda out, call: torch.zeros_like(out),
        lambda out, call: torch.full_like(out, float("nan")),
        lambda out, call: torch.full_like(out, float("inf")),
        lambda out, call: x(4, 3).conj(),
    ],
    ids=["zero_strides", "expanded_rows", "transposed", "dense", "strided", "zeros", "nan", "inf", "conj"],
)
def test_incoming_gradient(make):
    assert_compiled(compare_runs(F_OF_TWO, incoming(make)))


def test_layouts_of_incoming_gradients_may_change_between_calls():
    compiled = thunder.jit(F_OF_TWO)
    makers = [
        lambda out: torch.ones_like(out),
        lambda out: torch.ones(()).expand_as(out),
        lambda out: x(3, 4).t(),
        lambda out: x(4, 6)[:, ::2],
    ]
    for make in makers * 2:
        a, w, b, v = leaf(), leaf(3, 3), leaf(), leaf(3, 3)
        out, expected = compiled(a, w), F_OF_TWO(b, v)
        assert_gradients_same(
            torch.autograd.grad(expected, (b, v), make(expected)), torch.autograd.grad(out, (a, w), make(out))
        )
    assert_compiled(compiled)


def test_incoming_gradient_is_not_written_to():
    compiled = thunder.jit(lambda a: (a + 1, a * 1))
    for _ in range(2):
        gradient = x()
        a = leaf()
        out = compiled(a)[0]
        out.backward(gradient)
        a.grad.mul_(100)
        assert torch.equal(gradient, x())
        b = leaf()
        compiled(b)[0].backward(gradient)
        b.grad.add_(1)
        assert torch.equal(gradient, x())
    assert_compiled(compiled)


def test_gradients_of_two_inputs_do_not_share_memory():
    compiled = thunder.jit(lambda a, b: a + b)
    for _ in range(2):
        a, b = leaf(), leaf()
        compiled(a, b).sum().backward()
        a.grad.mul_(5)
        assert torch.equal(b.grad, torch.ones(4, 3))
    assert_compiled(compiled)


def test_gradients_do_not_change_with_later_calls():
    compiled = thunder.jit(lambda a: (a * a).exp())
    kept = []
    for call in range(3):
        a = (x() + call).requires_grad_()
        (g,) = torch.autograd.grad(compiled(a).sum(), a)
        kept.append((g, g.clone()))
    assert all(torch.equal(g, copied) for g, copied in kept)
    assert_compiled(compiled)


def test_outputs_do_not_change_with_later_calls():
    compiled = thunder.jit(lambda a: ((a * a).exp(), a.sin()))
    kept = [(out, out.detach().clone()) for call in range(3) for out in compiled((x() + call).requires_grad_())]
    assert all(torch.equal(out.detach(), copied) for out, copied in kept)
    assert_compiled(compiled)


def test_none_for_some_outputs():
    def run(fn, call):
        a, b = leaf(), leaf()
        outs = fn(a, b)
        chosen = outs[call]
        return [g if g is not None else "none" for g in torch.autograd.grad(chosen.sum(), (a, b), allow_unused=True)]

    assert_compiled(compare_runs(lambda a, b: (a * b, b.sin(), (a + b).sum()), run, calls=3))


def test_gradient_that_is_none_in_eager_is_none():
    def run(fn, call):
        a, b, c = leaf(), leaf(), leaf()
        fn(a, b, c)[0].sum().backward()
        return [t.grad is None for t in (a, b, c)]

    assert_compiled(compare_runs(lambda a, b, c: (a * 2, b.detach(), c > 0), run))


def test_undefined_gradients_with_retain_graph_in_both_orders():
    def run(fn, call):
        a = leaf()
        first, second = fn(a)
        if call % 2:
            first, second = second, first
        g = torch.autograd.grad(first.sum(), a, retain_graph=True)
        return g, torch.autograd.grad(second.sum(), a)

    assert_compiled(compare_runs(lambda a: (a.exp(), a.sin()), run, calls=4))


def test_fan_out_of_an_output_in_the_caller():
    def run(fn, call):
        a = leaf()
        out = fn(a)
        loss = sum((out * weights_like(out) * i).sum() for i in range(1, 5))
        loss.backward()
        return loss, a.grad

    assert_compiled(compare_runs(lambda a: a.exp(), run))


# ---- operations whose derivative is delicate ----

PLACES = torch.tensor([1, 1, 0])
EVERYWHERE = torch.zeros(4, 3, dtype=torch.long)

# Rows and elements that are written in place, into memory that is read again.
PLACED = {
    "index_add": lambda z, a: z.index_add_(0, PLACES, a[:3]),
    "index_add_alpha": lambda z, a: z.index_add_(-1, PLACES[:2], a[:, :2], alpha=-3),
    "index_copy": lambda z, a: z.index_copy_(0, torch.tensor([1, 3]), a[:2] * 2),
    "index_fill": lambda z, a: z.index_fill_(1, torch.tensor([1]), 2.0),
    "index_reduce": lambda z, a: z.index_reduce_(0, PLACES, a[:3] * 2, "amax"),
    "scatter_add": lambda z, a: z.scatter_add_(0, EVERYWHERE, a),
    "scatter_reduce": lambda z, a: z.scatter_reduce_(0, EVERYWHERE, a, "prod", include_self=False),
    "index_put": lambda z, a: z.index_put_((torch.tensor([2, 0]),), a[:2]),
    "index_put_added": lambda z, a: z.index_put_([PLACES, PLACES], a[0], accumulate=True),
    "index_put_mask": lambda z, a: z.index_put_((EVERYWHERE == 0,), a[0, 0]),
}


@pytest.mark.parametrize("name", PLACED)
@pytest.mark.parametrize("view", ["itself", "rows", "turned"])
def test_elements_placed_into_what_is_read_again(name, view):
    def f(a):
        z = a * 2 if view != "rows" else torch.cat([a, a])
        before = z * 5
        part = {"itself": z, "rows": z[2:6], "turned": (a * 3).reshape(3, 4).t()}[view]
        PLACED[name](part, a)
        return z * 3, part.sin(), before

    check_training(f, leaf())


DELICATE = {
    "relu_at_zero": lambda a: (a - a.detach()).relu() + (a - a.detach()).abs(),
    "clamp_at_the_bounds": lambda a: a.clamp(-1, 1),
    "max_with_ties": lambda a: torch.stack([a, a]).amax(0),
    "max_by_index": lambda a: a.max(1).values,
    "maximum_of_equals": lambda a: torch.maximum(a, a * 1),
    "norm_at_zero": lambda a: (a - a.detach()).norm(),
    "where": lambda a: torch.where(a > 0, a.log(), a * 2),
    "pow_zero": lambda a: a.abs().pow(0.0) + a.pow(2),
    "prod_with_a_zero": lambda a: (a - a[0, 0].detach()).prod(),
    "cumprod_with_a_zero": lambda a: (a - a[0, 1].detach()).cumprod(1),
    "sort": lambda a: a.sin().sort(-1, descending=True).values,
    "gather_repeated": lambda a: a.gather(1, torch.zeros(4, 5, dtype=torch.long)),
    "index_repeated": lambda a: a[torch.tensor([0, 0, 2])],
    "index_put_accumulate": lambda a: torch.zeros(4, 3).index_put((torch.tensor([1, 1]),), a[:2], accumulate=True),
    "scatter_add": lambda a: torch.zeros(4, 3).scatter_add(0, torch.zeros(4, 3, dtype=torch.long), a),
    "masked_fill": lambda a: a.masked_fill(a > 0, -1.0),
    "softmax": lambda a: a.softmax(0).log(),
    "logsumexp": lambda a: a.logsumexp(1),
    "std": lambda a: a.std(0) + a.var(),
    "layer_norm": lambda a: F.layer_norm(a, (3,), a[0], a[1]),
    "cumsum": lambda a: a.cumsum(1).flip(0),
    "cat_of_itself": lambda a: torch.cat([a, a, a[:1]]),
    "as_strided": lambda a: (a * 1).as_strided((3, 3), (3, 1), 1),
    "unfold": lambda a: a.unfold(0, 2, 1),
    "roll_and_repeat": lambda a: a.roll(1, 0).repeat(2, 2).repeat_interleave(2, 0),
    "einsum": lambda a: torch.einsum("ij,kj->ik", a, a.exp()),
    "cross_entropy": lambda a: F.cross_entropy(a, torch.tensor([0, 2, -100, 1]), label_smoothing=0.1),
    "inverse": lambda a: torch.linalg.inv(a[:3] + 3 * torch.eye(3)),
    "cholesky": lambda a: torch.linalg.cholesky(a[:3] @ a[:3].T + 3 * torch.eye(3)),
    "eigh": lambda a: torch.linalg.eigvalsh(a[:3] + a[:3].T),
    "embedding_bag": lambda a: F.embedding_bag(torch.tensor([[0, 1], [1, 3]]), a, mode="mean"),
    "interpolate": lambda a: F.interpolate(a[None, None], scale_factor=2, mode="bilinear"),
    "grid_sample": lambda a: F.grid_sample(a[None, None], a[None, :, :2][:, :, None].tanh(), align_corners=False),
    "max_pool": lambda a: F.max_pool2d(a[None, None], 2, 1),
    "item_free_loop": lambda a: sum(a[i] * i for i in range(4)),
}


@pytest.mark.parametrize("name", DELICATE)
def test_delicate_derivative(name):
    check_training(DELICATE[name], leaf(dtype=torch.float64) if name == "eigh" else leaf())


# ---- data-dependent programs: eager's result or a clear error ----

DATA_DEPENDENT = {
    "branch": lambda a: a * 2 if a.sum() > 0 else a.sin(),
    "item": lambda a: a * a.sum().item(),
    "boolean_mask": lambda a: a[a > 0].sum() * a,
    "nonzero": lambda a: a[(a > 0).nonzero()[:, 0]].sum(),
}


@pytest.mark.parametrize("name", DATA_DEPENDENT)
def test_data_dependent_program(name):
    def run(fn, call):
        a = (x() + (1 if call % 2 else -0.5)).requires_grad_()
        out = fn(a)
        return out, torch.autograd.grad(out.sum(), a)

    try:
        compare_runs(DATA_DEPENDENT[name], run, calls=4)
    except thunder.CaptureError as error:
        assert_refused_clearly(error)
