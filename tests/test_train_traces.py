"""What training shows: forward and backward traces that run as they are printed, and what is saved."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch

import thunder
from tests.train_checks import check_training


def _model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 32), torch.nn.GELU(), torch.nn.LayerNorm(32), torch.nn.Linear(32, 3))


def _function(trace: thunder.Trace) -> Callable[..., tuple]:
    scope = trace.namespace()
    exec(compile(str(trace), "trace.py", "exec"), scope)
    (function,) = [value for name, value in scope.items() if name in ("forward", "backward", "computation")]
    return torch.no_grad()(function)


@pytest.mark.parametrize("remat", ["off", "auto", "max"])
def test_printed_forward_and_backward_run_to_the_same_gradients(remat):
    model = _model()
    compiled = thunder.jit(model, remat=remat)
    x = torch.randn(5, 6)
    out = compiled(x)
    out.backward(torch.ones_like(out))
    forward = thunder.last_traces(compiled)[-1]
    everything, backward = thunder.last_backward_traces(compiled)
    inputs = {"a0": x, **{f"p_{name.replace('.', '_')}": p for name, p in model.named_parameters()}}
    names = list(inspect.signature(_function(forward)).parameters)
    arguments = [inputs[name] for name in names]
    results = _function(forward)(*arguments)
    torch.testing.assert_close(results[0], out.detach())
    gradients = _function(backward)(*results[1:], torch.ones_like(out))
    again = _function(everything)(*arguments, torch.ones_like(out))
    expected = {f"p_{name.replace('.', '_')}": p.grad for name, p in model.named_parameters()}
    wanted = [expected[name] for name in names if name in expected]
    for got, other, right in zip(gradients, again, wanted, strict=True):
        torch.testing.assert_close(got, right)
        torch.testing.assert_close(other, right)


def test_traces_read_back_as_printed():
    compiled = thunder.jit(_model())
    compiled(torch.randn(5, 6))
    for trace in (thunder.last_traces(compiled)[-1], *thunder.last_backward_traces(compiled)):
        assert str(thunder.Trace(str(trace))) == str(trace)


def test_less_is_saved_the_more_may_run_again():
    saved = {}
    for remat in ("off", "auto", "max"):
        compiled = thunder.jit(_model(), remat=remat)
        compiled(torch.randn(64, 6))
        (entry,) = thunder.compile_stats(compiled).entries
        saved[remat] = entry["saved_bytes"]
        assert entry["saved_bytes"] <= entry["saved_bytes_without_remat"]
    assert saved["off"] > saved["auto"] > saved["max"] == 0


def test_no_backward_traces_without_gradients():
    compiled = thunder.jit(_model())
    with torch.no_grad():
        compiled(torch.randn(5, 6))
    with pytest.raises(RuntimeError, match="no program with gradients"):
        thunder.last_backward_traces(compiled)


def test_unknown_remat_is_refused():
    with pytest.raises(ValueError, match="remat must be one of"):
        thunder.jit(_model(), remat="some")


@pytest.mark.parametrize("shapes", [((2, 3), (2, 3)), ((1, 3), (2, 1))])
def test_broadcast_tensors_counts_each_gradient_once(shapes):
    a, b = (torch.randn(shape, requires_grad=True) for shape in shapes)
    check_training(lambda x, y: [t.sin() for t in torch.broadcast_tensors(x, y)], a, b)
