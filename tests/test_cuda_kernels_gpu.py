"""Kernels of one's own on a GPU: results, streams, graphs, shared memory, and our Triton kernels against float64."""

from __future__ import annotations

import importlib.util
import threading

import pytest
import torch
import torch.nn.functional as F

import thunder
from thunder.executors import triton as ours
from thunder.extend import cuda_kernel, triton_kernel

pytestmark = pytest.mark.gpu
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

ADD = """
__global__ void add(const float* x, const float* y, float* out, int64_t n) {
    int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x;
    if (i < n) out[i] = x[i] + y[i];
}
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("THUNDER_CACHE_DIR", str(tmp_path))


def _add():
    return cuda_kernel(ADD, "add", grid=lambda x, y, out, n: -(-n // 256))


@pytest.mark.parametrize("n", [0, 1, 255, 100_003])
def test_cuda_kernel_computes(n):
    x, y = torch.randn(n, device="cuda"), torch.randn(n, device="cuda")
    out = torch.full((n,), float("nan"), device="cuda")
    assert _add()(x, y, out, n) is None
    torch.testing.assert_close(out, x + y, rtol=0, atol=0)


def test_a_kernel_runs_on_the_current_stream():
    kernel = _add()
    x, y, out = (torch.ones(1 << 20, device="cuda") for _ in range(3))
    kernel(x, y, out, x.numel())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.fill_(5.0)
        kernel(x, y, out, x.numel())
    torch.cuda.synchronize()
    assert out.eq(6.0).all(), "on another stream the kernel would have run before fill_"


def test_a_kernel_is_part_of_a_cuda_graph():
    kernel = _add()
    x, y, out = (torch.ones(1000, device="cuda") for _ in range(3))
    kernel(x, y, out, 1000)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel(x, y, out, 1000)
        kernel(out, y, out, 1000)
    del kernel
    x.fill_(3.0)
    graph.replay()
    torch.cuda.synchronize()
    assert out.eq(5.0).all()


def test_a_thread_that_never_used_the_gpu_may_launch():
    kernel = _add()
    x, y, out = (torch.ones(1000, device="cuda") for _ in range(3))
    failures = []

    def run():
        try:
            kernel(x, y, out, 1000)
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert not failures and out.eq(2.0).all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_kernel_runs_where_its_tensors_are():
    kernel = _add()
    for device in ("cuda:1", "cuda:0", "cuda:1"):
        x, y, out = (torch.ones(1000, device=device) for _ in range(3))
        kernel(x, y, out, 1000)
        torch.cuda.synchronize(device)
        assert out.eq(2.0).all()
    assert torch.cuda.current_device() == 0
    with pytest.raises(ValueError, match=r"parameter 'y'.*the tensor is on cuda:0, another device than the first"):
        kernel(x, y.to("cuda:0"), out, 1000)
    logits, labels = torch.randn(9, 100, device="cuda:1"), torch.arange(9, device="cuda:1")
    torch.testing.assert_close(ours.cross_entropy(logits, labels)[0], F.cross_entropy(logits, labels))


def test_scalars_of_every_type_arrive():
    source = """
    __global__ void put(double* out, bool a, int8_t b, uint16_t c, int d, unsigned e, int64_t f, uint64_t g, float h,
                        double i, const int* null) {
        double values[] = {(double)a, (double)b, (double)c, (double)d, (double)e, (double)f, (double)g, h, i,
                           (double)(null == nullptr)};
        out[threadIdx.x] = values[threadIdx.x];
    }
    """
    out = torch.zeros(10, dtype=torch.float64, device="cuda")
    values = [True, -5, 60000, -(2**31), 2**32 - 1, -(2**52), 2**53, 0.1, 0.1, None]
    cuda_kernel(source, "put", grid=1, block=10)(out, *values)
    wanted = [*map(float, values[:7]), torch.tensor(0.1).item(), 0.1, 1.0]
    assert out.tolist() == wanted


def test_half_and_bfloat16_and_templates():
    source = """
    #include <cuda_fp16.h>
    #include <cuda_bf16.h>
    template <typename T> __global__ void twice(T* x, int n) {
        int i = blockIdx.x * blockDim.x + threadIdx.x;
        if (i < n) x[i] = x[i] + x[i];
    }
    """
    for name, dtype in (("__half", torch.float16), ("__nv_bfloat16", torch.bfloat16), ("double", torch.float64)):
        x = torch.randn(1000, device="cuda", dtype=dtype)
        wanted = x + x
        cuda_kernel(source, f"twice<{name}>", f"{name}* x, int n", grid=4)(x, 1000)
        assert torch.equal(x, wanted)


def test_shared_memory_above_48_kib():
    source = """
    __global__ void reverse(const float* x, float* out, int n) {
        extern __shared__ float tile[];
        for (int i = threadIdx.x; i < n; i += blockDim.x) tile[i] = x[i];
        __syncthreads();
        for (int i = threadIdx.x; i < n; i += blockDim.x) out[i] = tile[n - 1 - i];
    }
    """
    n = 20_000
    x, out = torch.randn(n, device="cuda"), torch.empty(n, device="cuda")
    cuda_kernel(source, "reverse", grid=1, block=1024, shared=4 * n)(x, out, n)
    assert torch.equal(out, x.flip(0))
    with pytest.raises(RuntimeError, match="of shared memory: the device has"):
        cuda_kernel(source, "reverse", grid=1, shared=1 << 20)(x, out, n)


def test_a_compile_error_and_an_argument_on_the_cpu_are_told():
    x = torch.ones(8, device="cuda")
    with pytest.raises(thunder.extend.KernelCompileError, match=r"line 4:\n    if \(i < n\) out\[i\] = x\[i\] \+ z"):
        cuda_kernel(ADD.replace("y[i]", "z[i]"), "add", grid=1)(x, x, x, 8)
    with pytest.raises(ValueError, match=r"add: parameter 'y' \(const float\*\): the tensor is on cpu"):
        _add()(x, x.cpu(), x, 8)


def test_a_kernel_serves_a_compiled_program_as_a_custom_operator():
    kernel = _add()

    @torch.library.custom_op("thunder_tests::add", mutates_args=())
    def add(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        kernel(x, y, out, x.numel())
        return out

    add.register_fake(lambda x, y: torch.empty_like(x))
    add.register_autograd(lambda ctx, grad: (grad, grad))
    compiled = thunder.jit(lambda x, y: (add(x, y) * 2).sum())
    x, y = (torch.randn(1000, device="cuda", requires_grad=True) for _ in range(2))
    result = compiled(x, y)
    result.backward()
    torch.testing.assert_close(result, ((x + y) * 2).sum())
    assert x.grad.eq(2).all() and y.grad.eq(2).all()


# ---- Triton ----


@needs_triton
@pytest.mark.parametrize("n", [1, 16, 1000, 4096])
def test_triton_kernel_equals_tritons_own_launch(n):
    from tests.triton_case import scaled

    kernel = triton_kernel(scaled, lambda meta: -(-meta["n"] // meta["BLOCK"]), BLOCK=256)
    for dtype in (torch.float32, torch.bfloat16):
        base = torch.randn(n + 1, device="cuda", dtype=dtype)
        for x in (base[:-1], base[1:]):
            for alpha, m in ((0.5, 1), (2, 2**33), (1, 0)):
                ours_, theirs = torch.empty_like(x), torch.empty_like(x)
                kernel(x, ours_, n, alpha, m)
                scaled[(-(-n // 256),)](x, theirs, n, alpha, m, BLOCK=256)
                assert torch.equal(ours_, theirs)


@needs_triton
def test_scratch_memory_is_given_to_kernels_that_ask_for_it():
    from tests.triton_case import by_descriptor

    x = torch.randn(64, 64, device="cuda")
    out = torch.empty_like(x)
    triton_kernel(by_descriptor, (2, 2), BLOCK=32)(x, out, 64, 64)
    assert torch.equal(out, x + 1)


TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def _close(got, wanted, dtype):
    """Within a few roundings of the dtype, relative to the largest value."""
    error = (got.double() - wanted).abs().max()
    assert got.dtype == dtype
    assert error <= TOLERANCE[dtype] * max(1e-6, wanted.abs().max().item()), (error, wanted.abs().max())


@needs_triton
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("rows", "classes"), [(1, 1), (7, 10), (64, 1000), (33, 32001), (3000, 257)])
def test_cross_entropy_equals_float64(rows, classes, reduction, dtype):
    torch.manual_seed(0)
    logits = (torch.randn(rows, classes + 3, device="cuda") * 4).to(dtype)[:, :classes]
    labels = torch.randint(0, classes, (rows,), device="cuda")
    if rows > 1:
        labels[::3] = -100
    assert ours.cross_entropy_supported(logits, labels, reduction=reduction) == (True, "")
    reference = logits.double().requires_grad_()
    wanted = F.cross_entropy(reference, labels, reduction=reduction)
    grad = torch.randn(wanted.shape, device="cuda").to(dtype)
    wanted.backward(grad.double())
    loss, logsumexp, count = ours.cross_entropy(logits, labels, reduction=reduction)
    _close(loss, wanted, dtype)
    result = ours.cross_entropy_backward(grad, logits, labels, logsumexp, count, reduction=reduction)
    _close(result, reference.grad, dtype)


@needs_triton
def test_cross_entropy_of_the_edges():
    logits = torch.randn(4, 10, device="cuda")
    ignored = torch.full((4,), 7, device="cuda")
    loss, *_ = ours.cross_entropy(logits, ignored, ignore_index=7)
    assert loss.isnan(), "the mean of nothing, as in torch"
    loss, *_ = ours.cross_entropy(logits, ignored, ignore_index=7, reduction="sum")
    assert loss == 0
    wrong = torch.tensor([0, 10, 1, 2], device="cuda")
    assert ours.cross_entropy(logits, wrong, reduction="none")[0].isnan().tolist() == [False, True, False, False]
    logits[0, 1:], logits[1, 0] = -float("inf"), 1e4
    labels = torch.tensor([0, 0, 1, 2], device="cuda")
    torch.testing.assert_close(ours.cross_entropy(logits, labels)[0], F.cross_entropy(logits, labels))
    empty = ours.cross_entropy(logits[:0], labels[:0], reduction="sum")[0]
    assert empty == 0


@needs_triton
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 33), (1000, 768), (4, 16384), (2000, 4096)], ids=str)
def test_rms_norm_equals_float64(shape, weighted, dtype):
    torch.manual_seed(0)
    x = torch.randn(shape, device="cuda").to(dtype)
    weight = torch.randn(shape[-1:], device="cuda").to(dtype) if weighted else None
    assert ours.rms_norm_supported(x, shape[-1:], weight) == (True, "")
    x64, w64 = x.double().requires_grad_(), weight.double().requires_grad_() if weighted else None
    wanted = F.rms_norm(x64, shape[-1:], w64, 1e-5)
    grad = torch.randn(shape, device="cuda").to(dtype)
    wanted.backward(grad.double())
    y, rstd = ours.rms_norm(x, weight, 1e-5)
    _close(y, wanted, dtype)
    dx, dweight = ours.rms_norm_backward(grad, x, weight, rstd)
    if shape != (1, 1):  # its gradient is nothing but the difference of equal numbers
        _close(dx, x64.grad, dtype)
    assert (dweight is None) == (not weighted)
    if weighted:
        _close(dweight, w64.grad, dtype)


@needs_triton
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rms_norm_has_torchs_default_epsilon(dtype):
    x = torch.full((2, 64), 1e-3, device="cuda", dtype=dtype)
    torch.testing.assert_close(ours.rms_norm(x)[0], F.rms_norm(x, (64,)))


@needs_triton
def test_our_kernels_are_deterministic():
    x, weight = torch.randn(5000, 1024, device="cuda"), torch.randn(1024, device="cuda")
    labels = torch.randint(0, 1024, (5000,), device="cuda")
    first, *rest = [
        (*ours.cross_entropy(x, labels), *ours.rms_norm_backward(x, x, weight, ours.rms_norm(x, weight)[1]))
        for _ in range(4)
    ]
    assert all(torch.equal(a, b) for other in rest for a, b in zip(first, other, strict=True))


def test_what_our_kernels_do_not_serve_is_told():
    x, labels = torch.randn(4, 8, device="cuda"), torch.zeros(4, dtype=torch.int64, device="cuda")
    for arguments, reason in [
        ((x.double(), labels), "input is torch.float64"),
        ((x[None], labels), "has the shape (1, 4, 8)"),
        ((x.T, labels), "the last dimension of input is not contiguous"),
        ((x, labels.int()), "target is not one int64 class"),
        ((x, labels.cpu()), "target is on cpu"),
        ((x, labels, x[0]), "weights of classes"),
        ((x, labels, None, -100, "mean", 0.1), "label_smoothing"),
        ((x, labels, None, -100, "max"), "reduction 'max'"),
    ]:
        ok, why = ours.cross_entropy_supported(*arguments)
        assert not ok and reason in why
    for arguments, reason in [
        ((x, (4, 8)), "normalized_shape (4, 8) is not the last dimension"),
        ((torch.empty(2, 20000, device="cuda"), (20000,)), "rows of 20000 elements"),
        ((torch.empty(2, 4, 8, device="cuda").transpose(0, 1), (8,)), "input is not contiguous"),
        ((x, (8,), x[0].double()), "weight is torch.float64"),
        ((x, (8,), x[0].cpu()), "weight is on cpu"),
    ]:
        ok, why = ours.rms_norm_supported(*arguments)
        assert not ok and reason in why
