"""Operations under autocast: the casts are operations of the trace, by what torch itself does."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils import _pytree as pytree

import thunder

# Captured neither with autocast nor without, or what autocast does inside of the kernel is not known.
REFUSED = {
    "cov", "narrow", "tensor_split", "sparse.sampled_addmm", "sparse.mm", "to_sparse",
    "nn.functional.gaussian_nll_loss", "nn.functional.bilinear", "linalg.pinv", "pinverse",
}  # fmt: skip
UNINITIALISED = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"}
OPS = sorted(
    {op.name: op for op in op_db if torch.float32 in op.supported_dtypes("cpu")}.values(), key=lambda op: op.name
)
OPS = [op for op in OPS if not op.name.startswith("jiterator")]  # of GPUs alone


def tensors_of(result: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def under_autocast(run: Callable[..., Any], sample: Any, grad: bool) -> list[torch.Tensor]:
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
        results = tensors_of(run(sample.input, *sample.args, **sample.kwargs))
    if not grad:
        return results
    wanted = [t for t in tensors_of((sample.input, sample.args, sample.kwargs)) if t.requires_grad]
    outs = [t for t in results if t.requires_grad and t.is_floating_point()]
    grads = torch.autograd.grad([t.float().sum() for t in outs], wanted, allow_unused=True) if outs and wanted else ()
    return [*results, *[g for g in grads if g is not None]]


def samples_of(op: Any, grad: bool) -> list[Any]:
    try:
        return list(op.sample_inputs("cpu", torch.float32, requires_grad=grad))[:1]
    except (RuntimeError, ImportError, ValueError, TypeError):
        return []


def check(op: Any, grad: bool) -> None:
    def function(x: Any, *args: Any, **kwargs: Any) -> Any:
        return op.op(x, *args, **kwargs)

    compared = 0
    for sample in samples_of(op, grad):
        try:
            wanted = under_autocast(function, sample, grad)
        except RuntimeError:  # eager refuses these dtypes
            continue
        try:
            results = under_autocast(thunder.jit(function), sample, grad)
        except thunder.CaptureError as error:
            if torch.cuda.is_initialized() and "the random number generator" in str(error):
                pytest.skip("the database seeds inside of the operation, and CUDA has a generator of its own")
            assert op.name in REFUSED
            return
        assert [(t.dtype, t.shape) for t in results] == [(t.dtype, t.shape) for t in wanted]
        if op.name not in UNINITIALISED:
            for result, want in zip(results, wanted, strict=True):
                torch.testing.assert_close(result, want, equal_nan=True)
        compared += 1
    if not compared:
        pytest.skip("torch itself refuses it under autocast, or has no sample")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_operations_give_eagers_dtypes_and_values(op: Any) -> None:
    check(op, grad=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("op", [op for op in OPS if op.supports_autograd], ids=lambda op: op.name)
def test_operations_give_eagers_gradients(op: Any) -> None:
    check(op, grad=True)


@pytest.mark.parametrize("name", ["tensordot", "nn.functional.linear", "cov", "fft.hfft"])
def test_gradients_of_some(name: str) -> None:
    check(next(op for op in OPS if op.name == name), grad=True)


def test_a_gradient_that_is_lazily_conjugated() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.fft.hfft(x.to(torch.complex64) * 2).sum()

    x = torch.randn(4, 5, requires_grad=True)
    (grad,), (want,) = (torch.autograd.grad(f(x), x) for f in (thunder.jit(function), function))
    torch.testing.assert_close(grad, want)


def test_operations_are_recorded_by_our_rules() -> None:
    """Not kernel by kernel, for which sizes cannot be followed and captures take longer."""
    attention = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    net = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.GELU(), torch.nn.LayerNorm(16), torch.nn.Linear(16, 16))

    def function(x: torch.Tensor) -> torch.Tensor:
        h = net(x)
        q = h.view(*h.shape[:-1], 2, 8).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, q, torch.cat([q, q], 2)[:, :, : q.shape[2]])
        return (out.transpose(1, 2).reshape(h.shape) @ attention.in_proj_weight.t()).softmax(-1)

    compiled = thunder.jit(function)
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(2, 5, 16, requires_grad=True)
        torch.testing.assert_close(compiled(x), function(x))
    entry = thunder.compile_stats(compiled).entries[0]
    assert entry["recorded_by_torch"] <= 1  # the attention
    assert "torch.ops.aten" not in str(thunder.last_traces(compiled)[0])


def test_sizes_are_followed() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8))

    def function(x: torch.Tensor) -> torch.Tensor:
        return net(x).view(x.shape[0] * x.shape[1], -1) * x.shape[1]

    compiled = thunder.jit(function)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for n in range(3, 12):
            x = torch.randn(2, n, 8)
            torch.testing.assert_close(compiled(x), function(x))
    assert thunder.cache_misses(compiled) == 2


def test_what_was_found_for_one_kind_is_not_taken_for_another() -> None:
    """matrix_power casts where it multiplies, and not where it copies."""
    for n in (2, 1, 0, 3, -1):
        function = lambda x, n=n: torch.linalg.matrix_power(x, n)  # noqa: E731
        x = torch.randn(3, 3)
        with torch.autocast("cpu", torch.bfloat16):
            try:
                want = function(x)
            except RuntimeError:
                continue
            result = thunder.jit(function, fallback="eager")(x)
        assert result.dtype == want.dtype
        torch.testing.assert_close(result, want)


def test_a_block_inside_of_the_function_ends_where_it_ends() -> None:
    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            a = x @ x
            with torch.autocast("cpu", enabled=False):
                b = x @ x
            asked = torch.is_autocast_enabled("cpu")
            c = x.add_(1) if asked else x
        return a, b, c @ x

    x = torch.randn(3, 3)
    compiled = thunder.jit(function)
    for _ in range(2):
        for result, want in zip(compiled(x.clone()), function(x.clone()), strict=True):
            assert result.dtype == want.dtype
            torch.testing.assert_close(result, want)


def test_nothing_is_said_where_nothing_is_cast() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", thunder.ThunderWarning)
        compiled = thunder.jit(lambda x: (x + 1).relu_())
        with torch.autocast("cpu", torch.bfloat16):
            assert compiled(torch.ones(3)).dtype == torch.float32
