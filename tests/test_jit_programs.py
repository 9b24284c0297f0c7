"""What may happen inside a compiled function: constants, control flow, modes, random numbers, foreign functions."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import thunder
from tests.jit_checks import (  # noqa: F401
    Pair,
    assert_call_same,
    assert_same,
    assert_served,
    check,
    no_grad,
    nothing_leaks,
)


def x(*shape: int) -> torch.Tensor:
    return torch.linspace(-1, 1, torch.Size(shape or (4, 3)).numel()).reshape(shape or (4, 3))


# ---- constants ----


def test_literal_tensors():
    check(lambda a: a + torch.tensor([1.0, 2.0, 3.0]) * torch.tensor(2), x())
    check(lambda a: a[torch.tensor([0, 2])], x())
    check(lambda a: a * torch.tensor([[True, False, True]]), x())


def test_factories():
    check(
        lambda a: (
            torch.zeros(2, 3),
            torch.ones_like(a),
            torch.full((2,), 3),
            torch.eye(3),
            torch.arange(0, 1, 0.25),
            torch.linspace(0, 1, 5),
            torch.empty(0, 3),
            a.new_zeros(2),
            a.new_full((1,), 2.5),
            a.new_tensor([1, 2]),
        ),
        x(),
    )


def test_tensor_made_from_shapes_of_the_input():
    f = lambda a: a + torch.arange(a.shape[1], dtype=a.dtype, device=a.device) + torch.tensor(a.shape[0])  # noqa: E731
    compiled = check(f, x())
    assert_call_same(compiled, f, x(5, 2))


def test_tensor_made_from_numbers_in_the_arguments():
    f = lambda a, values: a + torch.tensor(values)  # noqa: E731
    compiled = thunder.jit(f)
    for values in ([1.0, 2.0, 3.0], [1.0, 2.0, 4.0], [[1.0], [2.0], [3.0], [4.0]]):
        assert_call_same(compiled, f, x(), values)


def test_values_of_tensors_without_inputs_steer_python():
    def f(a):
        for i in torch.arange(3):
            a = a + int(i)
        if torch.zeros(1).item() == 0 and bool(torch.ones(2).all()):
            a = a * 2
        return a * float(torch.tensor([2.0, 3.0]).sum()), torch.arange(4).tolist()

    check(f, x())


def test_relative_positions_used_as_indices():
    def f(a):
        n = a.shape[0]
        index = torch.arange(n)[:, None] - torch.arange(n)[None, :]
        return a[index.clamp(min=0)], a[index[0, 0].item()]

    check(f, x())


def test_constant_written_after_it_was_made():
    def f(a):
        w = torch.zeros(3)
        w[1] = 5
        w += 1
        return a * w

    check(f, x())


def test_constant_read_after_a_write_that_depends_on_inputs():
    def f(a):
        w = torch.zeros(3)
        w.add_(a[0])
        return a * w[0].item()

    check(f, x())


def test_real_tensor_in_a_closure_is_not_a_constant_of_the_program():
    w = torch.ones(3)
    f = lambda a: a * w.sum()  # noqa: E731
    compiled = thunder.jit(f)
    for step in range(3):
        w.fill_(step)
        assert_same(f(x()), compiled(x()))


def test_mask_made_of_constants():
    def f(a):
        mask = torch.full((4, 4), -math.inf).triu(1)
        return torch.softmax(a @ a.t() + mask, -1)

    check(f, x())


# ---- control flow ----


def test_branches_on_shape_dtype_device_and_type():
    def f(a, b=None):
        if a.dim() == 2 and a.shape[0] > 2:
            a = a[:2]
        if a.dtype == torch.float32 and a.device.type == "cpu" and a.is_floating_point():
            a = a * 2
        if isinstance(a, torch.Tensor) and torch.is_tensor(a) and not isinstance(a, nn.Parameter):
            a = a + 1
        if b is None or not isinstance(b, (int, float)):
            return a
        return a - b

    compiled = thunder.jit(f)
    for args in ((x(),), (x(2, 3),), (x(1, 2, 3),), (x().double(),), (x(), 2), (x(), x())):
        assert_call_same(compiled, f, *args)


def test_loops_comprehensions_and_exceptions():
    def f(a, n):
        parts = [a * i for i in range(n) if i % 2 == 0]
        total = torch.zeros_like(a)
        for part in parts:
            total = total + part
        while total.dim() < 4:
            total = total.unsqueeze(0)
        try:
            a @ torch.zeros(99, 1)
        except RuntimeError:
            total = total + 100
        try:
            {}["missing"]
        except KeyError:
            total = total + 1
        return total

    compiled = check(f, x(), 4)
    assert_call_same(compiled, f, x(), 7)


def test_iteration_unpacking_and_indexing():
    def f(a):
        first, *rest = a
        u, v, w = a.unbind(1)
        c, d = a.chunk(2)
        return first, sum(rest), u * v - w, a[..., None, 1:], a[-1, ::2], c + d, [row for row in a], len(a)  # noqa: C416

    check(f, x())


def test_advanced_indexing_with_inputs():
    f = lambda a, i: (a[i], a[:, i % 3], a.index_select(0, i), a.gather(0, i[:, None]))  # noqa: E731
    check(f, x(), torch.tensor([0, 3, 1]))


def test_generators_and_context_managers():
    class Scope:
        def __enter__(self):
            return 2.0

        def __exit__(self, *exc):
            return False

    def f(a):
        with Scope() as k:
            return sum(a * i * k for i in range(3))

    check(f, x())


def test_string_formatting_of_shapes():
    check(lambda a: (a + 1, f"{tuple(a.shape)} {a.dtype} {a.device}"), x())


def test_is_compiling_is_true_while_capturing_and_false_after():
    compiled = thunder.jit(lambda a: (a * 2, torch.compiler.is_compiling()))
    for _ in range(3):
        assert compiled(x())[1] is True
        assert not torch.compiler.is_compiling()


# ---- random numbers ----

RANDOM = {
    "dropout": lambda a: F.dropout(a, 0.5),
    "rand": lambda a: a + torch.rand(4, 3),
    "randn_like": lambda a: a + torch.randn_like(a),
    "randint": lambda a: a + torch.randint(0, 9, (3,)),
    "randperm": lambda a: a[torch.randperm(4)],
    "normal_": lambda a: torch.empty(3).normal_() + a,
    "uniform_": lambda a: a.clone().uniform_(0, 1),
    "bernoulli": lambda a: torch.bernoulli(a.abs()),
    "multinomial": lambda a: torch.multinomial(a.abs() + 0.1, 2),
    "two draws": lambda a: (torch.rand(3), torch.rand(3), F.dropout(a)),
    "unused draw": lambda a: (torch.rand(3), a + torch.rand(3))[1],
    "gumbel": lambda a: F.gumbel_softmax(a),
    "rrelu": lambda a: F.rrelu(a, training=True),
    "exponential": lambda a: a.clone().exponential_(),
    "attention dropout": lambda a: F.scaled_dot_product_attention(a[None], a[None], a[None], dropout_p=0.5),
}


@pytest.mark.parametrize("kind", RANDOM)
def test_random_operation_draws_eagers_stream(kind):
    f = RANDOM[kind]
    compiled = thunder.jit(f)
    for seed in (0, 1):
        torch.manual_seed(seed)
        for _ in range(2):
            assert_call_same(compiled, f, x())
    assert_served(compiled, misses=1, hits=3)


def test_capture_itself_draws_nothing():
    def f(a):
        return a + torch.rand(3)

    torch.manual_seed(5)
    expected = [f(x()), f(x())]
    torch.manual_seed(5)
    compiled = thunder.jit(f)
    assert_same(expected, [compiled(x()), compiled(x())])


def test_two_equal_draws_stay_two_draws():
    a, b = check(lambda a: (torch.rand(4), torch.rand(4)), x())(x())
    assert not torch.equal(a, b)


def test_generator_argument():
    f = lambda a, g: a + torch.rand(3, generator=g)  # noqa: E731
    compiled = thunder.jit(f)
    for seed in (1, 2, 1):
        g, h = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
        try:
            ours = compiled(x(), h)
        except thunder.CaptureError as error:
            assert "enerator" in str(error)
            continue
        assert_same(f(x(), g), ours)
        assert torch.equal(g.get_state(), h.get_state())


def test_seeding_inside_is_refused_or_right():
    def f(a):
        torch.manual_seed(3)
        return a + torch.rand(3)

    compiled = thunder.jit(f)
    before = torch.get_rng_state()
    for _ in range(2):
        try:
            ours = compiled(x())
        except thunder.CaptureError as error:
            assert "random" in str(error)
            assert torch.equal(torch.get_rng_state(), before)
            continue
        assert_same(f(x()), ours)


# ---- foreign functions ----


def test_vmap_inside():
    check(lambda a: torch.vmap(lambda row: row * row.sum())(a), x())
    check(lambda a, b: torch.vmap(torch.dot)(a, b), x(), x() + 1)
    check(lambda a: torch.vmap(torch.vmap(torch.sin))(a), x())
    check(lambda a, b: torch.vmap(lambda r, w: (r @ w, r.mean()), in_dims=(0, None))(a, b), x(), x(3, 2))


def test_functorch_transforms_without_gradients():
    check(lambda a: torch.func.functionalize(lambda b: b.clone().add_(1))(a), x())
    check(lambda a: torch.func.jvp(torch.sin, (a,), (torch.ones_like(a),)), x())


def test_gradient_taken_inside():
    check(lambda a: torch.func.grad(lambda b: (b * b).sum())(a), x())


def test_functional_call_inside():
    net = nn.Linear(3, 2)
    f = lambda a, w, b: torch.func.functional_call(net, {"weight": w, "bias": b}, (a,))  # noqa: E731
    check(f, x(), x(2, 3), x(2))


def test_scripted_function_inside():
    @torch.jit.script
    def inner(a, n: int):
        for _ in range(n):
            a = torch.relu(a) + 0.5
        return a

    check(lambda a: inner(a, 3) * 2, x())


def test_scripted_module_inside():
    inner = torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.Tanh()))
    check(lambda a: inner(a) * 2, x())


def test_traced_module_inside():
    inner = torch.jit.trace(nn.Linear(3, 3), x())
    check(lambda a: inner(a) * 2, x())


def test_custom_operator_inside():
    with torch.library._scoped_library("thunder_tests", "FRAGMENT") as lib:
        lib.define("twice(Tensor a) -> Tensor")
        lib.impl("twice", lambda a: a * 2, "CompositeExplicitAutograd")

        def fill(a, v):
            a.fill_(v)

        lib.define("stamp(Tensor(a!) a, float v) -> ()")
        lib.impl("stamp", fill, "CompositeExplicitAutograd")
        op = torch.ops.thunder_tests
        check(lambda a: op.twice(a) + 1, x())

        def f(a):
            b = a.clone()
            op.stamp(b, 3.0)
            return b + a

        check(f, x())


def test_custom_operator_by_decorator():
    @torch.library.custom_op("thunder_tests::scaled", mutates_args=())
    def scaled(a: torch.Tensor, by: float) -> torch.Tensor:
        return a * by

    compiled = thunder.jit(lambda a: scaled(a, 3.0) + 1, branch_limit=0)  # not run to find out its result's shape
    with pytest.raises(thunder.CaptureError, match="scaled"):
        compiled(x())

    @scaled.register_fake
    def _(a, by):
        return torch.empty_like(a)

    check(lambda a: scaled(a, 3.0) + 1, x())


def test_custom_autograd_function_inside():
    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, k):
            ctx.save_for_backward(a)
            return a * k, a + 1

        @staticmethod
        def backward(ctx, g, h):
            return g, None

    check(lambda a: sum(Op.apply(a, 3.0)), x())


def test_checkpoint_inside():
    from torch.utils.checkpoint import checkpoint

    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    check(lambda a: checkpoint(net, a, use_reentrant=False) + 1, x())


def test_torch_function_called_through_getattr_and_operator():
    import operator

    check(lambda a: operator.matmul(a, a.T) + getattr(torch, "cos")(a)[:, :1], x())  # noqa: B009


def test_einops_like_string_programs():
    check(lambda a, b: torch.einsum("ij,kj->ik", a, b), x(), x())


def test_complex_program():
    f = lambda a: (torch.fft.ifft(torch.fft.rfft(a) * 2).abs(), torch.view_as_complex(a[:, :2].contiguous()))  # noqa: E731
    check(f, x())


# ---- modes around and inside ----


def test_inference_mode_around():
    f = lambda a: (a * 2, (a + 1).is_inference(), a[1:])  # noqa: E731
    compiled = thunder.jit(f)
    for _ in range(2):
        with torch.inference_mode():
            ours, expected = compiled(x()), f(x())
        assert_same(expected, ours)
        assert expected[0].is_inference() == ours[0].is_inference()
        assert_same(f(x()), compiled(x()))


def test_inference_mode_for_the_whole_function():
    @torch.inference_mode()
    def f(a, b):
        b.add_(1)
        c = a * 2
        return c, c.is_inference(), c[0], (a + b).sum()

    compiled = thunder.jit(f)
    for _ in range(2):
        ours, expected = compiled(x(), x()), f(x(), x())
        assert_same(expected, ours)
        for o, e in zip(ours, expected, strict=True):
            if isinstance(e, torch.Tensor):
                assert o.is_inference() == e.is_inference()
    assert not torch.is_inference_mode_enabled()


def test_inference_mode_for_a_part_is_refused():
    def f(a):
        with torch.inference_mode():
            b = a * 2
        return b, a + 1

    with pytest.raises(thunder.CaptureError, match="inference_mode"):
        thunder.jit(f)(x())


def test_inference_mode_inside():
    def f(a):
        with torch.inference_mode():
            b = a * 2
        return b, b.is_inference()

    compiled = thunder.jit(f)
    for _ in range(2):
        try:
            ours = compiled(x())
        except thunder.CaptureError as error:
            assert "inference" in str(error)
            return
        expected = f(x())
        assert_same(expected, ours)
        assert expected[0].is_inference() == ours[0].is_inference()


def test_grad_mode_switched_inside():
    def f(a):
        with torch.enable_grad():
            b = a * 2
        with torch.no_grad():
            c = b + 1
        return b + c, torch.is_grad_enabled()

    check(f, x())


def test_grad_mode_left_on_by_the_function_is_refused_or_right():
    def f(a):
        torch.set_grad_enabled(True)
        return a * 2

    compiled = thunder.jit(f)
    for _ in range(2):
        try:
            ours = compiled(x())
            after = torch.is_grad_enabled()
        except thunder.CaptureError as error:
            assert "grad mode" in str(error)
            assert not torch.is_grad_enabled()
            continue
        torch.set_grad_enabled(False)
        assert_same(f(x()), ours)
        assert after == torch.is_grad_enabled()
        torch.set_grad_enabled(False)


AUTOCAST = {
    "linear": lambda a: F.linear(a, torch.ones(2, 3), torch.ones(2)),
    "matmul and add": lambda a: a @ a.t() + 1,
    "softmax": lambda a: torch.softmax(a @ a.t(), -1),
    "layer norm": lambda a: F.layer_norm(F.linear(a, torch.ones(3, 3)), (3,)),
    "pointwise": lambda a: a.exp() * 2,
    "attention": lambda a: F.scaled_dot_product_attention(a[None], a[None], a[None]),
    "einsum": lambda a: torch.einsum("ij,kj->ik", a, a),
    "module": nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 3)).requires_grad_(False),
    "promotion": lambda a: (
        torch.cat([a @ a.t(), a]).sum() if a.shape[0] == a.shape[1] else torch.stack([a.bfloat16(), a])
    ),
    "loss": lambda a: F.mse_loss(F.linear(a, torch.ones(3, 3)), a),
}


@pytest.mark.parametrize("kind", AUTOCAST)
def test_autocast_around(kind):
    f = AUTOCAST[kind]
    compiled = thunder.jit(f)
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_call_same(compiled, f, x())
        assert_call_same(compiled, f, x())
    assert_served(compiled, misses=2, hits=2)


@pytest.mark.parametrize("kind", AUTOCAST)
def test_autocast_inside(kind):
    inner = AUTOCAST[kind]

    def f(a):
        before = a * 2
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = inner(before)
            with torch.autocast("cpu", enabled=False):
                plain = before @ before.t()
        return out, plain, before @ before.t()

    check(f, x())


def test_autocast_with_another_dtype_is_another_program():
    f = lambda a: a @ a.t()  # noqa: E731
    compiled = thunder.jit(f)
    for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype=dtype):
            assert_call_same(compiled, f, x())


def test_autocast_state_is_the_callers_after_an_error():
    compiled = thunder.jit(lambda a, b: a @ b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(RuntimeError, match=r"mat1 and mat2|reduction dim"):
            compiled(x(), x())
        assert torch.is_autocast_enabled("cpu")
        compiled(x(), x(3, 2))
        assert torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")


def test_default_dtype_change_is_another_program():
    f = lambda a: a + torch.zeros(3) + torch.tensor(0.5)  # noqa: E731
    compiled = thunder.jit(f)
    try:
        for dtype in (torch.float32, torch.float64, torch.float32):
            torch.set_default_dtype(dtype)
            assert_call_same(compiled, f, x())
    finally:
        torch.set_default_dtype(torch.float32)
    assert_served(compiled, misses=2, hits=1)


def test_default_dtype_changed_inside_is_refused_or_right():
    def f(a):
        torch.set_default_dtype(torch.float64)
        try:
            return a + torch.zeros(3)
        finally:
            torch.set_default_dtype(torch.float32)

    compiled = thunder.jit(f)
    for _ in range(2):
        try:
            ours = compiled(x())
        except thunder.CaptureError as error:
            assert "default dtype" in str(error)
            continue
        assert_same(f(x()), ours)


def test_default_device_context_runs_right():
    f = lambda a: a + torch.zeros(3)  # noqa: E731
    compiled = thunder.jit(f)
    with torch.device("cpu"), pytest.warns(thunder.ThunderWarning, match="mode"):
        assert_call_same(compiled, f, x())
    assert_call_same(compiled, f, x())


def test_default_device_context_inside():
    def f(a):
        with torch.device("cpu"):
            return a + torch.zeros(3)

    check(f, x())


def test_user_mode_around_sees_the_operations():
    seen = []

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    compiled = thunder.jit(lambda a: torch.sin(a))
    compiled(x())
    with Spy(), pytest.warns(thunder.ThunderWarning, match="mode"):
        assert_same(torch.sin(x()), compiled(x()))
    assert torch.sin in seen
    assert_same(torch.sin(x()), compiled(x()))


def test_deterministic_algorithms_flag_around():
    f = lambda a: torch.zeros(4).index_add(0, torch.tensor([0, 0, 1]), a[0])  # noqa: E731
    compiled = thunder.jit(f)
    assert_call_same(compiled, f, x())
    torch.use_deterministic_algorithms(True)
    try:
        assert_call_same(compiled, f, x())
    finally:
        torch.use_deterministic_algorithms(False)


def test_sdpa_kernel_context_inside():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def f(a):
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(a[None], a[None], a[None])

    check(f, x())


def test_profiler_context_inside():
    def f(a):
        with torch.profiler.record_function("part"):
            return a * 2

    check(f, x())


# ---- calls of one program on changing data ----


def test_values_are_never_burned_in():
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.LayerNorm(5)).eval()
    p = Pair(net)
    torch.manual_seed(0)
    for _ in range(5):
        p.same(torch.randn(4, 3))
    p.served(misses=1, hits=4)


def test_clamp_where_and_comparisons():
    check(lambda a: (a.clamp(-0.5, 0.5), torch.where(a > 0, a, a * 0.1), (a > 0) & (a < 1), a.ne(a)), x())


def test_reductions_and_norms():
    check(
        lambda a: (a.mean(), a.sum(0, keepdim=True), a.std(), a.norm(), a.amax(1), a.argmax(1), torch.var_mean(a, 0)),
        x(),
    )


def test_nan_and_infinite_values_pass_through():
    check(lambda a: (a / 0, a * math.nan, torch.nan_to_num(a / 0)), x())


# ---- intermediates that the function drops, while others live on ----


def test_a_dropped_intermediate_leaves_nothing_on_a_later_one():
    def f(a):
        dropped = a * 2
        dropped.note = "mine"
        seen = weakref.ref(dropped + 1)
        del dropped
        later = [a * k for k in (3, 4, 5)]
        assert not any(hasattr(t, "note") for t in later)
        assert not any(seen() is t for t in later)
        return later

    check(f, x())


def test_intermediates_kept_in_closures_generators_and_views_keep_their_values():
    def f(a):
        kept = [lambda t=a * k: t + 1 for k in (1, 2, 3)]
        lazy = (a * k for k in (4, 5))
        first = next(lazy)
        row = (a * 6)[0]
        for k in range(20):
            a = a * 1.5 + k
        return [g() for g in kept], first, list(lazy), row, a

    check(f, x())


def test_intermediates_inside_vmap_keep_their_values():
    def f(a):
        def row(r):
            y = r * 2
            z = r * 3
            return y.sin() + z.cos() * y

        b = a * 2
        out = torch.vmap(row)(b)
        c = a * 3
        return out, b + c

    check(f, x())
