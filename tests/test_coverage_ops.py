"""Every tenth entry of torch's op_db is right or refused with a clear error (`make coverage-ops` runs all of them).

Values and gradients: of the entries that the models use most, and of each tenth of the others.
"""

from __future__ import annotations

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db

import thunder
from tests.harness.judge_op import CLEAR, RIGHT, SKIPPED, full_name, judge
from tests.harness.judge_op_grad import FELL_BACK, differentiable, judge_gradients

# What the models of the zoo use most must be right, not merely refused.
FREQUENT = (
    "__getitem__", "abs", "add", "arange", "bmm", "cat", "chunk", "clone", "contiguous", "cos", "cumsum",
    "div.no_rounding_mode", "exp", "expand", "flatten", "float", "linalg.vector_norm", "masked_fill", "matmul",
    "mean", "mul", "neg", "new_ones", "nn.functional.batch_norm", "nn.functional.conv2d",
    "nn.functional.dropout", "nn.functional.embedding", "nn.functional.gelu", "nn.functional.layer_norm",
    "nn.functional.linear", "nn.functional.relu", "nn.functional.scaled_dot_product_attention",
    "nn.functional.silu", "permute", "pow", "reshape", "rsqrt", "sigmoid", "sin",
    "softmax", "split", "squeeze", "sub", "sum", "tanh", "to", "transpose", "unbind", "unsqueeze", "view",
    "where",
)  # fmt: skip

BY_NAME = {full_name(op): op for op in op_db}


@pytest.mark.parametrize("name", [name for name in FREQUENT if name in BY_NAME])
def test_frequent_operator_equals_eager(name):
    verdict = judge(BY_NAME[name])
    assert verdict.outcome == RIGHT, verdict.reason


@pytest.mark.parametrize("name", [name for name in list(BY_NAME)[::10] if name not in FREQUENT])
def test_operator_equals_eager_or_is_refused(name):
    verdict = judge(BY_NAME[name])
    assert verdict.outcome in (RIGHT, CLEAR, SKIPPED), verdict.reason


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in FREQUENT if name in BY_NAME and differentiable(BY_NAME[name])])
def test_gradients_of_frequent_operator_equal_eager(name):
    verdict = judge_gradients(BY_NAME[name])
    assert verdict.outcome == RIGHT, verdict.reason


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [n for n in list(BY_NAME)[::10] if n not in FREQUENT and differentiable(BY_NAME[n])])
def test_gradients_of_operator_equal_eager_or_are_refused(name):
    verdict = judge_gradients(BY_NAME[name])
    assert verdict.outcome in (RIGHT, FELL_BACK, CLEAR, SKIPPED), verdict.reason


GRADCHECKED = (
    "mul", "sub", "div.no_rounding_mode", "matmul", "bmm", "exp", "tanh", "sigmoid", "softmax", "log_softmax", "cumsum",
    "cumprod", "logsumexp", "nn.functional.gelu", "nn.functional.silu", "nn.functional.layer_norm",
    "nn.functional.linear", "nn.functional.conv2d", "nn.functional.batch_norm", "nn.functional.group_norm",
    "nn.functional.scaled_dot_product_attention", "nn.functional.mse_loss", "linalg.inv", "where", "gather",
    "index_select", "var", "prod", "pow",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", GRADCHECKED)
def test_gradcheck(name):
    """The gradient is the derivative: against finite differences instead of eager."""
    op = BY_NAME[name]
    checked = 0
    for sample in op.sample_inputs("cpu", torch.float64, requires_grad=True):
        tensors = [t for t in (sample.input, *sample.args) if isinstance(t, torch.Tensor) and t.requires_grad]
        if not tensors or sum(t.numel() for t in tensors) > 2000 or checked == 2:
            continue

        def function(*leaves, sample=sample):
            given = iter(leaves)
            arguments = [
                next(given) if isinstance(t, torch.Tensor) and t.requires_grad else t
                for t in (sample.input, *sample.args)
            ]
            return sample.output_process_fn_grad(op.op(*arguments, **sample.kwargs))

        compiled = thunder.jit(function)
        assert torch.autograd.gradcheck(compiled, [t.detach().requires_grad_() for t in tensors], fast_mode=True)
        assert thunder.compile_stats(compiled).fallbacks == 0
        checked += 1
    assert checked


def test_every_frequent_name_exists():
    assert [name for name in FREQUENT + GRADCHECKED if name not in BY_NAME] == []
