"""The executors for GPUs: what they claim and decline, and on a GPU their numbers, forward and backward."""

from __future__ import annotations

import importlib.util
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

import thunder
from thunder import extend
from thunder.executors import cudnn, sdpa
from thunder.executors.triton import support

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

# ---- what is claimed ----


def fake(*shape, dtype=torch.bfloat16, device="cuda"):
    with FakeTensorMode():
        return torch.empty(shape, dtype=dtype, device=device)


def answer(executor, op, *args, **kwargs):
    """(whether it takes the call, why not)"""
    known = executor.implementations[extend.executor.operator_key(op)]
    with FakeTensorMode():
        return extend.executor.takes(known.checker, args, kwargs)


def attention_cases():
    q = fake(2, 4, 128, 64)
    with FakeTensorMode():
        strided = torch.empty(2, 4, 64, 128, dtype=torch.bfloat16, device="cuda").transpose(2, 3)
        mask = torch.ones(128, 128, dtype=torch.bool, device="cuda")
    return [
        ((q, q, q), {}, ""),
        ((q, q, q), {"is_causal": True, "scale": 0.5}, ""),
        ((q, fake(2, 2, 128, 64), fake(2, 2, 128, 64)), {"enable_gqa": True}, ""),
        ((q, q, q, mask), {}, ""),
        ((fake(2, 4, 128, 64, device="cpu"),) * 3, {}, "query is on cpu"),
        ((fake(2, 4, 128, 64, dtype=torch.float32),) * 3, {}, "float16 or bfloat16 is"),
        ((fake(4, 128, 64),) * 3, {}, "dimensions batch, head, position, size"),
        ((q, q, q), {"dropout_p": 0.1}, "dropout is left to torch"),
        ((fake(2, 4, 128, 36),) * 3, {}, "multiples of 8"),
        ((fake(2, 4, 128, 264),) * 3, {}, "up to 256"),
        ((q, q, strided), {}, "not contiguous"),
        ((q, fake(2, 2, 128, 64), fake(2, 2, 128, 64)), {}, "4 heads of the query, 2 of the key"),
        ((q, q, q, mask), {"is_causal": True}, "a mask and is_causal"),
        ((q, q, q, fake(128, 128)), {}, "may need a gradient"),
    ]


@pytest.mark.parametrize(("args", "kwargs", "reason"), attention_cases())
def test_sdpa_claims_what_its_kernels_take(args, kwargs, reason):
    takes, why = answer(sdpa.sdpa_executor, F.scaled_dot_product_attention, *args, **kwargs)
    assert takes == (not reason)
    assert reason in why


def test_sdpa_takes_masks_without_gradients_alone():
    known = sdpa.sdpa_executor.implementations[extend.executor.operator_key(F.scaled_dot_product_attention)]
    q = fake(2, 4, 128, 64)
    mask = fake(128, 128, dtype=torch.bool)
    with FakeTensorMode():
        assert extend.executor.takes(known.checker, (q, q, q, mask), {}) == (True, "")
        assert extend.executor.takes(known.training, (q, q, q), {"scale": 0.5}) == (True, "")
        for args, kwargs in (((q, q, q, mask), {}), ((q, q, q), {"attn_mask": mask})):
            assert "left to torch" in extend.executor.takes(known.training, args, kwargs)[1]


def test_sdpa_leaves_deterministic_programs_alone():
    torch.use_deterministic_algorithms(True)
    try:
        q = fake(2, 4, 128, 64)
        takes, why = answer(sdpa.sdpa_executor, F.scaled_dot_product_attention, q, q, q)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not takes and "deterministic" in why


class FakeEvent:
    """Times that a test sets."""

    def __init__(self, milliseconds=0.0, done=True):
        self.milliseconds, self.done = milliseconds, done

    def query(self):
        return self.done

    def elapsed_time(self, end):
        return end.milliseconds


def test_the_fastest_kernel_is_kept():
    choice = sdpa.Choice((sdpa.CUDNN, sdpa.FLASH), parts=2)
    took = {sdpa.CUDNN: (3.0, 1.0), sdpa.FLASH: (1.0, 2.0)}
    tried = []
    while choice.kernel is None:
        kernel = choice.next()
        tried.append(kernel)
        if choice.kernel is None:
            for part in range(2):
                choice.note(kernel, part, FakeEvent(), FakeEvent(took[kernel][part]))
    assert tried[:4] == [sdpa.CUDNN, sdpa.FLASH] * 2
    assert len(tried) <= 2 * (sdpa.SAMPLES + 1) + 1
    assert choice.kernel == sdpa.FLASH and choice.seconds(sdpa.FLASH) == pytest.approx(3e-3)


def test_nobody_waits_for_a_measurement():
    choice = sdpa.Choice((sdpa.CUDNN, sdpa.FLASH), parts=1)
    for _ in range(sdpa.PATIENCE):
        choice.note(choice.next(), 0, FakeEvent(), FakeEvent(1.0, done=False))
    assert choice.next() == choice.kernel == sdpa.CUDNN, "the one that is trusted without a measurement"


def test_the_only_kernel_is_not_measured():
    assert sdpa.Choice((sdpa.EFFICIENT,), parts=2).next() == sdpa.EFFICIENT


def test_cudnn_says_why_it_is_not_there():
    if torch.version.cuda:
        pytest.skip("torch has CUDA")
    q = fake(2, 4, 128, 64)
    takes, why = answer(cudnn.cudnn_executor, F.scaled_dot_product_attention, q, q, q)
    assert not takes and "built without CUDA" in why


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ((fake(4, 64, device="cpu"), (64,)), "input is on cpu"),
        ((fake(4, 64, dtype=torch.float64), (64,)), "float32, bfloat16 and float16"),
        ((fake(4, 8, 8), (8, 8), fake(8, 8)), "is not the last dimension"),
        ((fake(4, 60), (60,), fake(60)), "a multiple of 8"),
        ((fake(4, 64), (64,)), "there is no weight"),
        ((fake(4, 64), (64,), fake(64, dtype=torch.float32)), "weight and bias are not"),
        ((fake(4, 64), (64,), fake(64)), ""),
    ],
)
def test_cudnn_claims_layer_norm(monkeypatch, args, reason):
    monkeypatch.setattr(cudnn, "library", lambda: ("libcudnn.so.9", ""))
    takes, why = answer(cudnn.cudnn_executor, F.layer_norm, *args)
    assert takes == (not reason)
    assert reason in why


def test_a_cudnn_that_cannot_be_opened_is_an_error_that_says_so():
    with pytest.raises(RuntimeError, match=r"no cuDNN: .*no_such_library"):
        thunder._C.cudnn_version("/no_such_library.so")


def test_triton_claims(monkeypatch):
    monkeypatch.setattr(support, "has_triton", lambda: True)
    executor = extend.get_executor("triton")
    x, labels = fake(8, 100), fake(8, dtype=torch.int64)
    assert answer(executor, F.cross_entropy, x, labels) == (True, "")
    assert answer(executor, F.cross_entropy, x, labels, reduction="none", ignore_index=3) == (True, "")
    assert "label_smoothing" in answer(executor, F.cross_entropy, x, labels, label_smoothing=0.1)[1]
    assert "size_average" in answer(executor, F.cross_entropy, x, labels, size_average=True)[1]
    assert answer(executor, F.rms_norm, x, (100,), fake(100), 1e-5) == (True, "")
    assert "not the last dimension" in answer(executor, F.rms_norm, x, (8, 100))[1]


def test_all_are_registered_and_none_is_a_default():
    for name in ("sdpa", "cudnn", "triton", "nvfuser"):
        executor = extend.get_executor(name)
        assert executor is getattr(thunder, f"{name}_executor")
        assert executor not in extend.get_default_executors()


def test_on_the_cpu_everything_is_declined_and_runs_on_torch():
    def program(x, w, labels):
        q = x.view(2, 8, 4, 16).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).reshape(16, 64)
        return F.cross_entropy(F.rms_norm(F.layer_norm(y, (64,), w), (64,), w), labels)

    x, w = torch.randn(16, 64, requires_grad=True), torch.randn(64, requires_grad=True)
    labels = torch.randint(0, 64, (16,))
    compiled = thunder.jit(program, executors=["sdpa", "cudnn", "triton", "nvfuser"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", thunder.ThunderWarning)
        ours, theirs = compiled(x, w, labels), program(x, w, labels)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, (x, w)), torch.autograd.grad(theirs, (x, w)))
    assert compiled._thunder_claims.units == []
    assert {executor for executor, _, _ in compiled._thunder_claims.declines} >= {"cudnn", "triton"}


# ---- on a GPU: numbers ----


def judged(program, inputs, executors, units, *, calls=3):
    """Forward and gradients of the compiled program against float64: no farther than eager by more than a bit.

    Args:
        inputs: on the GPU; floating ones are differentiated.
        units: names that must be among those that run in the executors, all of them trusted.
    """

    def gradients(call, arguments):
        leaves = [a.detach().requires_grad_() if a.is_floating_point() else a for a in arguments]
        out = call(*leaves)
        grad = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).reshape(out.shape)
        return [out, *torch.autograd.grad(out, [a for a in leaves if a.requires_grad], grad.to(out.dtype))]

    with warnings.catch_warnings():
        warnings.simplefilter("error", thunder.ThunderWarning)
        compiled = thunder.jit(program, executors=executors, tier="block")
        exact = gradients(program, [a.double() if a.is_floating_point() else a for a in inputs])
        theirs = gradients(program, inputs)
        for _ in range(calls):
            ours = gradients(compiled, inputs)
            for o, t, e in zip(ours, theirs, exact, strict=True):
                assert o.dtype == t.dtype and o.shape == t.shape
                size = e.abs().max().item()
                bound = 2 * (t.double() - e).abs().max().item() + 4 * torch.finfo(o.dtype).eps * size
                assert (o.double() - e).abs().max().item() <= bound
        with torch.no_grad():
            for _ in range(2):
                torch.testing.assert_close(compiled(*inputs), theirs[0].detach(), rtol=2e-2, atol=2e-2)
    ran = {name: region.state for name, region, _ in compiled._thunder_claims.units}
    for name in units:
        assert any(n.startswith(name) for n in ran), (ran, compiled._thunder_claims.declines)
    assert set(ran.values()) == {"trusted"}, ran
    return compiled


def qkv(batch, heads, kv_heads, length, kv_length, size, dtype, layout):
    """Tensors as models have them: heads cut out of rows ("rows"), or dense ("heads")."""
    torch.manual_seed(0)
    shapes = [(batch, heads, length, size), *[(batch, kv_heads, kv_length, size)] * 2]
    if layout == "heads":
        return [torch.randn(s, device="cuda").to(dtype) for s in shapes]
    return [torch.randn(s[0], s[2], s[1], s[3], device="cuda").to(dtype).transpose(1, 2) for s in shapes]


ATTENTIONS = [
    (2, 4, 4, 128, 128, 64),
    (1, 8, 2, 256, 256, 128),
    (1, 2, 2, 1024, 1024, 128),
    (2, 3, 3, 100, 100, 32),
    (1, 2, 2, 64, 192, 64),
]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sdpa", "cudnn"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["heads", "rows"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", ATTENTIONS, ids=str)
def test_attention(name, sizes, causal, layout, dtype):
    gqa = sizes[1] != sizes[2]

    def program(q, k, v):
        return F.scaled_dot_product_attention(q * 1, k * 1, v * 1, is_causal=causal, enable_gqa=gqa)

    judged(program, qkv(*sizes, dtype, layout), [name], [f"{name}_attention_", f"{name}_attention_backward"], calls=12)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", sdpa.NAMES)
@pytest.mark.parametrize("layout", ["heads", "rows"])
@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("sizes", ATTENTIONS, ids=str)
def test_each_kernel_of_sdpa(kernel, sizes, layout, scale, monkeypatch):
    """What the choice would take on another machine."""
    candidates = sdpa._candidates

    def alone(*args):
        found = tuple(k for k in candidates(*args) if sdpa.NAMES[k] == kernel)
        return found or pytest.skip("the kernel does not take it")

    monkeypatch.setattr(sdpa, "_candidates", alone)
    monkeypatch.setattr(sdpa, "_plans", {})
    monkeypatch.setattr(sdpa, "_choices", {})
    gqa, causal = sizes[1] != sizes[2], sizes[3] == sizes[4]
    inputs = qkv(*sizes, torch.bfloat16, layout)
    alone(*inputs, None, causal, gqa, True)

    def program(q, k, v):
        return F.scaled_dot_product_attention(q * 1, k * 1, v * 1, is_causal=causal, scale=scale, enable_gqa=gqa)

    judged(program, inputs, ["sdpa"], ["sdpa_attention_", "sdpa_attention_backward"])


@pytest.mark.gpu
def test_sdpa_leaves_masks_in_training_to_torch():
    mask = torch.rand(128, 128, device="cuda") > 0.3
    inputs = [t.requires_grad_() for t in qkv(2, 4, 4, 128, 128, 64, torch.bfloat16, "rows")]

    def program(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    compiled = thunder.jit(program, executors=["sdpa"])
    compiled(*inputs).sum().backward()
    assert compiled._thunder_claims.units == []


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sdpa", "cudnn"])
@pytest.mark.parametrize("layout", ["heads", "rows"])
@pytest.mark.parametrize("other", ["heads", "rows"])
def test_gradients_do_not_depend_on_the_layouts_of_earlier_ones(name, layout, other):
    """Eager's do, by ATen's cuDNN kernels in torch 2.11: plans are kept by the layout of query, key and value alone."""
    inputs = [t.requires_grad_() for t in qkv(2, 4, 4, 256, 256, 64, torch.bfloat16, layout)]
    dense, turned = (qkv(2, 4, 4, 256, 256, 64, torch.bfloat16, way)[0] for way in (other, layout))

    def program(q, k, v, weight):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True) * weight

    compiled = thunder.jit(program, executors=[name], tier="block")
    wide = [t.detach().double().requires_grad_() for t in inputs]
    for weight in (dense, turned):
        torch.autograd.grad(program(*inputs, weight), inputs, torch.ones_like(weight))
        grads = torch.autograd.grad(program(*wide, weight.double()), wide, torch.ones_like(weight).double())
        for _ in range(12):
            ours = torch.autograd.grad(compiled(*inputs, weight), inputs, torch.ones_like(weight))
            for o, e in zip(ours, grads, strict=True):
                assert (o.double() - e).norm() <= 2e-2 * e.norm()
    assert {region.state for _, region, _ in compiled._thunder_claims.units} == {"trusted"}


@pytest.mark.gpu
def test_attention_under_autocast():
    def program(q, k, v):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    inputs = [t.requires_grad_() for t in qkv(2, 4, 4, 128, 128, 64, torch.float32, "rows")]
    compiled = thunder.jit(program, executors=["sdpa"])
    for _ in range(2):
        torch.testing.assert_close(compiled(*inputs), program(*inputs), rtol=2e-2, atol=2e-2)
    if "scaled_dot_product_attention.default" in str(thunder.last_traces(compiled)[0]):  # this torch lets us see it
        assert any(name.startswith("sdpa_attention") for name, *_ in compiled._thunder_claims.units)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["heads", "rows"])
@pytest.mark.parametrize("masked", [False, True])
def test_sdpa_attention_without_gradients(masked, layout):
    mask = torch.rand(128, 128, device="cuda") > 0.3 if masked else None

    def program(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)

    inputs = qkv(2, 4, 4, 128, 128, 64, torch.bfloat16, layout)
    compiled = thunder.jit(program, executors=["sdpa"])
    exact = program(*(t.double() for t in inputs))
    with torch.no_grad():
        for _ in range(12):
            ours = (compiled(*inputs).double() - exact).abs().max()
            assert ours <= 2 * (program(*inputs).double() - exact).abs().max() + 1e-3
    assert {u.state for _, u, _ in compiled._thunder_claims.units} == {"trusted"}


@pytest.mark.gpu
def test_preferences_are_known_after_a_few_calls():
    inputs = qkv(2, 16, 16, 1024, 1024, 64, torch.bfloat16, "rows")
    compiled = thunder.jit(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), executors=["sdpa"])
    for _ in range(20):
        compiled(*inputs)
        torch.cuda.synchronize()
    mine = [v for k, v in sdpa.preferences().items() if k[3] == 16 and not k[-1]]
    assert mine and "measuring" not in mine


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(64, 768), (3, 50, 1024), (4096, 4096)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_cudnn_layer_norm(shape, bias, dtype):
    torch.manual_seed(0)
    inputs = [torch.randn(s, device="cuda").to(dtype) for s in (shape, shape[-1:], shape[-1:])][: 3 if bias else 2]

    def program(x, *weights):
        return F.layer_norm(x, x.shape[-1:], *weights)

    judged(program, inputs, ["cudnn"], ["cudnn_layer_norm_", "cudnn_layer_norm_backward"])


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_triton_cross_entropy(reduction, dtype):
    torch.manual_seed(0)
    logits = torch.randn(300, 1000, device="cuda").to(dtype)
    labels = torch.randint(0, 1000, (300,), device="cuda")
    labels[::7] = -100

    def program(x, labels):
        return F.cross_entropy(x, labels, reduction=reduction)

    judged(program, [logits, labels], ["triton"], ["triton_cross_entropy_", "triton_cross_entropy_backward"])


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_triton_rms_norm(dtype, weighted):
    torch.manual_seed(0)
    inputs = [torch.randn(s, device="cuda").to(dtype) for s in ((5, 40, 768), (768,))][: 2 if weighted else 1]

    def program(x, *weight):
        return F.rms_norm(x, (768,), *weight)

    judged(program, inputs, ["triton"], ["triton_rms_norm_", "triton_rms_norm_backward"])


@pytest.mark.gpu
def test_explain_tells_the_time_on_the_gpu():
    """Between two events, so what the host does meanwhile does not count, and nobody waits for the GPU to know it."""

    def long(x, approximate="none"):
        torch.cuda._sleep(20_000_000)  # some milliseconds, which the host does not wait for
        return F.gelu(x, approximate=approximate)

    executor = thunder.extend.single_op_executor("long", F.gelu, long)
    compiled, x = thunder.jit(F.gelu, executors=[executor]), torch.randn(64, 64, device="cuda")
    for _ in range(24):
        compiled(x)
    torch.cuda.synchronize()
    (unit,) = thunder.explain(compiled).units
    assert unit.device == "cuda:0" and unit.device_milliseconds > 4 > 2 * unit.milliseconds
    assert "ms on cuda:0)" in str(thunder.explain(compiled))
