"""`python bench/gpu_kernels.py`: single launches, and our Triton kernels, beside torch and Triton, in one run.

Host cost: time to enqueue one tiny launch, 200 in a row, the GPU never waited for. Device time: forward and backward
between two events, inputs larger than the cache. Candidates take turns; each row gives the ratio of the medians to the
first candidate, the quartiles, and for device times the time that the memory traffic alone takes at the copy speed
measured on this card.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

from thunder.executors import triton as ours
from thunder.extend import cuda_kernel, triton_kernel

CALLS, ROUNDS = 200, 40

ADD = """
__global__ void add(const float* x, const float* y, float* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = x[i] + y[i];
}
"""


def _host(call: Callable[[], object]) -> float:
    """Microseconds of the host for one call."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    spent = time.perf_counter() - start
    torch.cuda.synchronize()
    return spent / CALLS * 1e6


def _device(call: Callable[[], object]) -> float:
    """Microseconds of the GPU for one call; three are enqueued, so that the host is ahead."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(10_000_000)
    start.record()
    for _ in range(3):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 3 * 1e3


def _table(title: str, candidates: dict[str, Callable[[], object]], measure: Callable, floor: float = 0.0) -> None:
    for call in candidates.values():
        for _ in range(5):
            call()
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(ROUNDS):
        for name, call in candidates.items():
            samples[name].append(measure(call))
    print(f"\n{title}" + (f"   (memory traffic alone: {floor:.0f} us)" if floor else ""))
    base = None
    for name, times in samples.items():
        lower, median, upper = statistics.quantiles(times, n=4)
        base = base or median
        print(f"  {name:34} {median / base:6.3f} x   {median:8.2f} us (quartiles {lower:.2f}..{upper:.2f})")


def _peak(call: Callable[[], object], leaf: torch.Tensor) -> float:
    """MiB that a call takes on top of its inputs."""
    leaf.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _copy_speed() -> float:
    """Bytes a second, read and written."""
    a = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.numel() / (min(_device(lambda: b.copy_(a)) for _ in range(10)) * 1e-6)


def launches() -> None:
    """Host cost of one launch."""
    from bench.gpu_kernels_triton import add

    x, y, out = (torch.ones(1024, device="cuda") for _ in range(3))
    grid = (4,)
    fixed = cuda_kernel(ADD, "add", grid=4)
    asked = cuda_kernel(ADD, "add", grid=lambda x, y, out, n: -(-n // 256))
    bound = triton_kernel(add, 4, BLOCK=256)
    bound_asked = triton_kernel(add, lambda meta: -(-meta["n"] // meta["BLOCK"]), BLOCK=256)
    _table(
        "host time of one launch: out = x + y, 1024 float32",
        {
            "torch.add(x, y, out=out)": lambda: torch.add(x, y, out=out),
            "x + y": lambda: x + y,
            "Triton kernel[grid]": lambda: add[grid](x, y, out, 1024, BLOCK=256),
            "thunder, Triton": lambda: bound(x, y, out, 1024),
            "thunder, Triton, grid asked": lambda: bound_asked(x, y, out, 1024),
            "thunder, CUDA C": lambda: fixed(x, y, out, 1024),
            "thunder, CUDA C, grid asked": lambda: asked(x, y, out, 1024),
        },
        _host,
    )


def _with_autograd(function: Callable, inputs: tuple, grad: torch.Tensor) -> Callable[[], object]:
    def call() -> None:
        for t in inputs:
            t.grad = None
        function(*inputs).backward(grad)

    return call


def cross_entropy(rows: int, classes: int, speed: float) -> None:
    """Forward and backward in bfloat16, mean."""
    logits = torch.randn(rows, classes, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, classes, (rows,), device="cuda")
    grad = torch.ones((), device="cuda", dtype=torch.bfloat16)

    def eager(x: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(x, labels)

    plain = logits.detach()

    def mine() -> None:
        _, logsumexp, count = ours.cross_entropy(plain, labels)
        ours.cross_entropy_backward(grad, plain, labels, logsumexp, count)

    candidates = {
        "eager": _with_autograd(eager, (logits,), grad),
        "torch.compile": _with_autograd(torch.compile(eager, dynamic=False), (logits,), grad),
        "thunder's Triton kernels": mine,
    }
    floor = 3 * logits.numel() * logits.element_size() / speed * 1e6
    _table(f"cross entropy {rows} x {classes} bf16, forward and backward", candidates, _device, floor)
    print("  peak memory: " + ", ".join(f"{name} {_peak(call, logits):.0f} MiB" for name, call in candidates.items()))


def rms_norm(rows: int, width: int, speed: float) -> None:
    """Forward and backward in bfloat16 with weight."""
    x = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)

    def eager(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (width,), weight, 1e-5)

    plain, plain_weight = x.detach(), weight.detach()

    def mine() -> None:
        _, rstd = ours.rms_norm(plain, plain_weight, 1e-5)
        ours.rms_norm_backward(grad, plain, plain_weight, rstd)

    candidates = {
        "eager": _with_autograd(eager, (x, weight), grad),
        "torch.compile": _with_autograd(torch.compile(eager, dynamic=False), (x, weight), grad),
        "thunder's Triton kernels": mine,
    }
    floor = 5 * x.numel() * x.element_size() / speed * 1e6
    _table(f"rms_norm {rows} x {width} bf16, forward and backward", candidates, _device, floor)


def main() -> int:
    """Prints the tables; 1 when there is no device."""
    if not torch.cuda.is_available():
        print("no CUDA device")
        return 1
    speed = _copy_speed()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {speed / 1e12:.2f} TB/s")
    launches()
    cross_entropy(8192, 32000, speed)
    cross_entropy(8192, 128256, speed)
    rms_norm(8192, 4096, speed)
    rms_norm(16384, 1024, speed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
