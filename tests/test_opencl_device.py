"""The executor for OpenCL devices from examples/: its numbers, what it claims, what it keeps on the device."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import thunder
from examples import opencl_device
from thunder import conformance

ROOT = Path(__file__).resolve().parent.parent


def why_not() -> str:
    try:
        opencl_device.opencl_executor.device  # noqa: B018  (opens it)
    except opencl_device.NoDevice as error:
        return f"`make opencl` runs these: {error}"
    return ""


REASON = why_not()
needs_device = pytest.mark.skipif(bool(REASON), reason=REASON)
pytestmark = pytest.mark.filterwarnings("error::thunder.ThunderWarning")


@pytest.fixture
def executor():
    return opencl_device.OpenCLExecutor("opencl_under_test", opencl_device.Device())


def compare(program, *arguments, executors, calls=3):
    """Calls with fresh values against eager; the compiled function."""
    compiled = thunder.jit(program, executors=executors)
    for _ in range(calls):
        ours, theirs = compiled(*arguments), program(*arguments)
        torch.testing.assert_close(ours, theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert a.stride() == b.stride()
        arguments = tuple(torch.randn_like(a) if a.is_floating_point() else a for a in arguments)
    return compiled


def sources(compiled) -> list[str]:
    claims = getattr(compiled, "_thunder_callable", compiled)._thunder_claims
    return [region.implementation.source for _, region, _ in claims.units]


@needs_device
def test_a_chain_of_pointwise_operations_is_one_kernel(executor):
    def program(x, y):
        a = torch.tanh(x * 2 + y)
        return (a.exp() - torch.sigmoid(y) / 3, a)

    compiled = compare(program, torch.randn(5, 7), torch.randn(5, 7), executors=[executor])
    (source,) = sources(compiled)
    assert source.count("__kernel") == 1


@needs_device
def test_views_are_strides(executor):
    def program(x):
        y = x.transpose(0, 1)[1:, ::2].unsqueeze(0).expand(3, -1, -1) * 2
        return (y, y.permute(2, 0, 1).reshape(-1) + 1, torch.cat([y, y * 3], dim=1).sum((0, 2)))

    compiled = compare(program, torch.randn(6, 5), executors=[executor])
    assert {u.state for u in thunder.explain(compiled).units} == {"trusted"}


@needs_device
def test_results_of_reductions_have_eagers_layout(executor):
    x = torch.randn(4, 5, 6).permute(2, 0, 1)
    compare(lambda x: ((x * 2).sum(0), (x + 1).mean((1,), keepdim=True)), x, executors=[executor], calls=1)


@needs_device
def test_a_result_that_is_memory_of_an_argument_stays_that(executor):
    def program(x):
        y = x.t()
        return y, y * 2

    compiled, x = thunder.jit(program, executors=[executor]), torch.randn(3, 4)
    for _ in range(2):
        view, _ = compiled(x)
        assert view.data_ptr() == x.data_ptr()


@needs_device
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_training_gives_eagers_gradients(executor, reduction):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 4))
    x, y = torch.randn(5, 6), torch.tensor([0, 3, -100, 2, 1])

    def loss(model, x, y):
        return F.cross_entropy(model(x), y, reduction=reduction)

    compiled = thunder.jit(loss, executors=[executor])
    for _ in range(3):
        ours, theirs = (torch.autograd.grad(f(model, x, y), list(model.parameters())) for f in (compiled, loss))
        torch.testing.assert_close(ours, theirs)
    found = thunder.explain(compiled)
    assert {(u.kind, u.state) for u in found.units} == {("forward", "trusted"), ("backward", "trusted")}
    assert not found.declines


@needs_device
def test_parameters_stay_on_the_device_until_they_change(executor):
    model, x = nn.Linear(8, 8), torch.randn(2, 8)
    compiled, device = thunder.jit(model, executors=[executor]), executor.device
    with torch.no_grad():
        for _ in range(2):
            compiled(x)
        sent = device.sent
        compiled(x)
        assert device.sent - sent == x.nbytes
        for change in (lambda p: p.add_(1), lambda p: p.data.add_(1), lambda p: p.numpy().fill(0.5)):
            change(model.weight)
            torch.testing.assert_close(compiled(x), model(x))


@needs_device
def test_an_index_out_of_range_is_an_error_as_in_eager(executor):
    def loss(x, y):
        return F.cross_entropy(x, y)

    x, y = torch.randn(3, 4, requires_grad=True), torch.tensor([0, 1, 2])
    compiled = thunder.jit(loss, executors=[executor])
    for _ in range(2):
        compiled(x, y).backward()
    y[1] = 7
    with pytest.raises(IndexError):
        compiled(x, y)


@needs_device
def test_threads_share_the_device(executor):
    compiled = thunder.jit(lambda x, w: torch.tanh(x @ w) + 1, executors=[executor])
    pairs = [(torch.randn(9, 8), torch.randn(8, 7)) for _ in range(4)]
    compiled(*pairs[0])
    wrong = []

    def work(x, w):
        for _ in range(20):
            if not torch.allclose(compiled(x, w), torch.tanh(x @ w) + 1, atol=1e-5):
                wrong.append(1)

    threads = [threading.Thread(target=work, args=pair) for pair in pairs]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@needs_device
def test_conformance_of_a_few_operations(executor):
    report = conformance.run(executor, ops=r"^(mm|nn\.functional\.gelu|log_softmax|where|clamp|permute)$", samples=1)
    assert report.passed, str(report)


@needs_device
def test_the_demo_trains_on_the_device():
    done = subprocess.run(
        [sys.executable, "examples/opencl_device/demo.py", "--steps", "4"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "(100.0%)" in done.stdout


# ---- without a device ----


def declined(program, *arguments) -> str:
    compiled = thunder.jit(program, executors=["opencl"])
    torch.testing.assert_close(compiled(*arguments), program(*arguments))
    return " ".join(reason for _, _, reason in thunder.explain(compiled).declines)


def test_what_it_does_not_know_is_declined_with_a_reason():
    x = torch.randn(3, 4)
    assert "torch.float64" in declined(lambda x: x.double() * 2, x)
    assert "an option that it does not know" in declined(lambda x: torch.div(x, 2, rounding_mode="floor"), x)
    assert "no dim" in declined(lambda x: torch.softmax(x, 0, dtype=torch.float64), x)
    assert "an index that is a tensor" in declined(lambda x, i: x[i], x, torch.tensor([0, 2]))
    assert "an index that is a list" in declined(lambda x: x[[0, 2]], x)
    assert "a vector" in declined(lambda x: x[0] @ x[1], x)


def test_a_missing_driver_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyopencl", None)
    with pytest.raises(opencl_device.NoDevice, match=r"pip install pyopencl.*apt-get install pocl-opencl-icd"):
        opencl_device.Device()


def test_without_a_device_torch_runs_everything(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyopencl", None)
    executor = opencl_device.OpenCLExecutor("opencl_without_device")
    compiled, x = thunder.jit(lambda x: x * 2 + 1, executors=[executor]), torch.randn(3)
    with pytest.warns(thunder.ThunderWarning, match="pip install pyopencl"):
        torch.testing.assert_close(compiled(x), x * 2 + 1)


@needs_device
def test_parameters_without_a_version_are_sent_each_time(executor):
    with torch.inference_mode():
        model, x = nn.Linear(8, 8), torch.randn(2, 8)
        compiled = thunder.jit(model, executors=[executor])
        for _ in range(3):
            torch.testing.assert_close(compiled(x), model(x))
    assert {u.state for u in thunder.explain(compiled).units} == {"trusted"}
    assert executor.device.reused == 0


@needs_device
def test_inputs_are_read_in_the_layout_in_which_they_arrive(executor):
    """A value of another kernel, whose strides are not those of torch's rule for tensors without data."""
    compiled = thunder.jit(lambda x: torch.tanh(x) + 1, executors=[executor])
    compiled(torch.randn(4, 5))
    ((_, region, _),) = compiled._thunder_claims.units
    x = torch.randn(5, 4).t()
    (ours,) = region.implementation(x)
    torch.testing.assert_close(ours, torch.tanh(x) + 1)
