"""The nvfuser executor: definitions as text, run by a stand-in of nvFuser's front end; on a GPU by nvFuser itself."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode

import thunder
from tests import nvfuser_stand_in
from thunder import extend
from thunder.executors.nvfuser import executor as nvfuser

WIDTH = 64


def rms_norm(x, w):
    return F.rms_norm(x, (WIDTH,), w, 1e-5)


def layer_norm(x, w, b):
    return F.layer_norm(x, (WIDTH,), w, b)


def softmax(x):
    return F.softmax(x, -1)


def bias_gelu_residual(x, b, r):
    return F.gelu(x + b, approximate="tanh") + r


def exact_gelu(x, b):
    return F.gelu(x * b) * 2.0


def cross_entropy(x, labels):
    return F.cross_entropy(x, labels)


def shapes(x):
    y = x.view(8, 4, WIDTH).transpose(0, 1) * 2
    left, right = y.split([24, 40], -1)
    return torch.cat((-right, left), -1).reshape(32, WIDTH) + x.sum(0, keepdim=True)


def masked(x, w):
    return torch.where(x > 0.1, x, w).clamp(-0.5, 2.0).pow(3).mean(-1) + (x * w).var(-1)


def swiglu(x, w):
    return F.silu(x) * w.to(x.dtype)


def turned(x):
    y = x.exp() + 1
    return y.t(), x.sigmoid().unsqueeze(0), y


PROGRAMS = {
    rms_norm: ((32, WIDTH), (WIDTH,)),
    layer_norm: ((32, WIDTH), (WIDTH,), (WIDTH,)),
    softmax: ((32, WIDTH),),
    bias_gelu_residual: ((32, WIDTH), (WIDTH,), (32, WIDTH)),
    exact_gelu: ((32, WIDTH), (WIDTH,)),
    cross_entropy: ((32, WIDTH), "labels"),
    shapes: ((32, WIDTH),),
    masked: ((32, WIDTH), (WIDTH,)),
    swiglu: ((32, WIDTH), (32, WIDTH)),
    turned: ((32, WIDTH),),
}


def arguments(program, dtype, device):
    torch.manual_seed(0)
    return [
        torch.randint(0, WIDTH, (32,), device=device) if s == "labels" else torch.randn(s, device=device).to(dtype)
        for s in PROGRAMS[program]
    ]


def gradients(call, inputs):
    leaves = [a.detach().requires_grad_() if a.is_floating_point() else a for a in inputs]
    outs = call(*leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    grads = [torch.linspace(-1, 1, o.numel(), device=o.device).to(o.dtype).reshape(o.shape) for o in outs]
    return [*outs, *torch.autograd.grad(outs, [a for a in leaves if a.requires_grad], grads)]


def judged(program, executor, dtype, device):
    """Against float64; how many regions ran in the executor."""
    inputs = arguments(program, dtype, device)
    with warnings.catch_warnings():
        warnings.simplefilter("error", thunder.ThunderWarning)
        compiled = thunder.jit(program, executors=[executor], tier="block")
        exact = gradients(program, [a.double() if a.is_floating_point() else a for a in inputs])
        theirs = gradients(program, inputs)
        for _ in range(2):
            for ours, t, e in zip(gradients(compiled, inputs), theirs, exact, strict=True):
                assert ours.dtype == t.dtype and ours.shape == t.shape and ours.stride() == t.stride()
                size = e.abs().max().item()
                bound = 2 * (t.double() - e).abs().max().item() + 8 * torch.finfo(t.dtype).eps * size
                assert (ours.double() - e).abs().max().item() <= bound
    units = compiled._thunder_claims.units
    assert units and {region.state for _, region, _ in units} == {"trusted"}, compiled._thunder_claims.declines
    return units


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
def test_definitions_compute_what_torch_does(program, dtype):
    executor = nvfuser.NvFuserExecutor("nvfuser_stand_in", front_end=nvfuser_stand_in.front_end, device="cpu")
    judged(program, executor, dtype, "cpu")


def test_the_definition_is_a_text():
    trace = thunder.Trace(
        'def region(x: "cuda bf16[8, 64]", b: "cuda bf16[64]"):\n'
        '    t0: "cuda bf16[8, 64]" = torch.Tensor.add(x, b)\n'
        '    t1: "cuda bf16[8]" = torch.sum(t0, -1)\n'
        "    return (t1,)\n"
    )
    found = nvfuser._translate(trace)
    assert found.text == (
        "def definition(fd, DataType):\n"
        "    t0 = fd.define_tensor(sizes=[8, 64], strides=[64, 1], dtype=DataType.BFloat16, static_sizes=True, "
        "is_cpu=False)\n"
        "    t1 = fd.ops.cast(t0, dtype=DataType.Float)\n"
        "    t2 = fd.define_tensor(sizes=[64], strides=[1], dtype=DataType.BFloat16, static_sizes=True, is_cpu=False)\n"
        "    t3 = fd.ops.cast(t2, dtype=DataType.Float)\n"
        "    t4 = fd.ops.broadcast(t3, is_broadcast_dim=[True, False])\n"
        "    t5 = fd.ops.add(t1, t4)\n"
        "    t6 = fd.ops.sum(t5, [1], False, DataType.Null)\n"
        "    t7 = fd.ops.cast(t6, dtype=DataType.BFloat16)\n"
        "    fd.add_output(t7)\n"
    )
    assert found.strides == ((1,),)


def test_what_has_no_rule_is_declined_by_name():
    trace = thunder.Trace(
        'def region(x: "cuda f32[8, 64]"):\n'
        '    t0: "cuda f32[8, 64]" = torch.Tensor.mul(x, 2)\n'
        '    t1: "cuda f32[8, 64]" = torch.cumsum(t0, -1)\n'
        "    return (t1,)\n"
    )
    assert nvfuser._translate(trace) == "nvFuser has no aten.cumsum.default"


def test_a_missing_nvfuser_is_said_once(monkeypatch):
    nvfuser.probe.cache_clear()
    nvfuser._missing.cache_clear()
    monkeypatch.setattr(nvfuser, "_FRONT_ENDS", ("no_such_nvfuser",))
    executor = extend.get_executor("nvfuser")
    with FakeTensorMode():
        x = torch.empty(4, device="cuda")
        with pytest.warns(thunder.ThunderWarning, match="No module named 'no_such_nvfuser'"):
            takes, why = executor.operands_supported(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert executor.operands_supported(x, 2.0) == (takes, why)
    nvfuser.probe.cache_clear()
    nvfuser._missing.cache_clear()
    assert not takes and "does not work with torch" in why


def test_operands_are_looked_at_before_nvfuser_is():
    executor = extend.get_executor("nvfuser")
    assert "on cpu" in executor.operands_supported(torch.ones(2))[1]
    with FakeTensorMode():
        assert "complex" in executor.operands_supported(torch.empty(2, device="cuda", dtype=torch.complex64))[1]
        assert "empty" in executor.operands_supported(torch.empty(0, device="cuda"))[1]
    assert "no operand" in executor.operands_supported(2)[1]


def test_a_model_is_split_around_its_products():
    executor = nvfuser.NvFuserExecutor("nvfuser_split", front_end=nvfuser_stand_in.front_end, device="cpu")
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 8), nn.Softmax(-1))
    x = torch.randn(4, 8)
    compiled = thunder.jit(model, executors=[executor], tier="block")
    for _ in range(2):
        torch.testing.assert_close(compiled(x), model(x))
    text = str(thunder.last_traces(compiled)[-1])
    assert text.count("functional.linear") == 2 and "= nvfuser_split_" in text


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
def test_on_cuda(program, dtype):
    if nvfuser.probe()[1]:
        pytest.skip(nvfuser.probe()[1])
    judged(program, "nvfuser", dtype, "cuda")
