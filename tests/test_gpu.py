"""The same programs on CUDA tensors: results, streams, no synchronisation of our own."""

from __future__ import annotations

import copy

import pytest
import torch

import thunder
from tests.harness.judge_model import CLEAR, RIGHT, judge
from tests.harness.judge_model_train import FELL_BACK, judge_training
from tests.models import QUICK, zoo

pytestmark = pytest.mark.gpu
GPU_MODELS = [name for name in QUICK if not name.startswith(("litgpt", "timm"))]


# Programs that some versions of transformers write so that a capture refuses them on CUDA; others are right.
MAY_BE_REFUSED = {
    "mamba": "calls torch's associative_scan, which starts torch.compile",
    "deberta_v2": "calls a TorchScript function that torch has fused into a kernel of its own",
}


@pytest.mark.parametrize("name", GPU_MODELS)
def test_model_on_cuda_equals_eager(name: str) -> None:
    verdict = judge(zoo()[name], "cuda")
    if name in MAY_BE_REFUSED and verdict.outcome == CLEAR:
        pytest.skip(f"refused with a clear error: {MAY_BE_REFUSED[name]}")
    assert verdict.outcome == RIGHT, verdict.reason


# Some versions of transformers write them so that training runs in eager with a warning, or is refused: they ask for
# values (mixtral's grouped products, whisper's check for infinities), or see tests/training_gaps.py.
MAY_FALL_BACK = ("wav2vec2", "mamba", "deberta_v2", "mixtral", "whisper")


@pytest.mark.parametrize("name", GPU_MODELS)
def test_model_trains_on_cuda_like_eager(name: str) -> None:
    verdict = judge_training(zoo()[name], "cuda")
    if name in MAY_FALL_BACK and verdict.outcome in (FELL_BACK, CLEAR):
        pytest.skip(f"does not train compiled: {verdict.reason}")
    assert verdict.outcome == RIGHT, verdict.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_training_dtypes_on_cuda_equal_eager(dtype: torch.dtype) -> None:
    model = _block().train().to(dtype)
    twin, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    compiled = thunder.jit(twin)
    for seed in (0, 1):
        x = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)
        for call, value in ((model, x), (compiled, x), (exact, x.double())):
            call(value).square().mean().backward()
    _assert_gradients_as_exact_as_eager(twin, model, exact, dtype)
    assert thunder.compile_stats(compiled).fallbacks == 0


def _assert_gradients_as_exact_as_eager(
    ours: torch.nn.Module, eager: torch.nn.Module, exact: torch.nn.Module, dtype: torch.dtype
) -> None:
    """No further from the float64 gradient than twice what eager is, and a unit in the last place of its largest."""
    for (name, p), q, true in zip(ours.named_parameters(), eager.parameters(), exact.parameters(), strict=True):
        errors = [float((grad.double() - true.grad).abs().max()) for grad in (p.grad, q.grad)]
        unit = torch.finfo(dtype).eps * float(true.grad.abs().max())
        assert errors[0] <= 2 * errors[1] + unit, f"{name}: off by {errors[0]:.3g}, eager by {errors[1]:.3g}"


def test_autocast_training_on_cuda_equals_eager() -> None:
    model = _block().train()
    twin, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    compiled = thunder.jit(twin)
    scaler = torch.amp.GradScaler("cuda")
    x = torch.randn(2, 16, 64, device="cuda")
    for call in (model, compiled):
        with torch.autocast("cuda", dtype=torch.float16):
            loss = call(x).float().square().mean()
        scaler.scale(loss).backward()
    scaler.scale(exact(x.double()).square().mean()).backward()
    _assert_gradients_as_exact_as_eager(twin, model, exact, torch.float16)
    assert thunder.compile_stats(compiled).fallbacks == 0


def test_dropout_masks_on_cuda_agree_between_forward_and_backward() -> None:
    compiled = thunder.jit(lambda a: torch.nn.functional.dropout(a, 0.5))
    a = torch.ones(1000, device="cuda", requires_grad=True)
    for _ in range(2):
        out = compiled(a)
        (gradient,) = torch.autograd.grad(out.sum(), a)
        assert torch.equal(gradient, out.detach())
    assert thunder.compile_stats(compiled).fallbacks == 0


def _block(width: int = 64) -> torch.nn.Module:
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
    return torch.nn.Sequential(layer, torch.nn.LayerNorm(width), torch.nn.Linear(width, width)).eval().cuda()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_on_cuda_equal_eager(dtype: torch.dtype) -> None:
    model = _block().to(dtype)
    compiled = thunder.jit(model)
    with torch.no_grad():
        for seed in (0, 1):
            x = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)
            torch.testing.assert_close(compiled(x), model(x))
    assert thunder.cache_hits(compiled) == 1


def test_autocast_on_cuda_gives_eager_dtypes_and_values() -> None:
    model = _block()
    compiled = thunder.jit(model)
    x = torch.randn(2, 16, 64, device="cuda")
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        for _ in range(2):
            expected, got = model(x), compiled(x)
            assert got.dtype == expected.dtype
            torch.testing.assert_close(got, expected)


def test_compiled_call_adds_no_synchronisation() -> None:
    model = _block()
    compiled = thunder.jit(model)
    x = torch.randn(2, 16, 64, device="cuda")
    with torch.no_grad():
        for _ in range(3):
            compiled(x)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            compiled(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_work_goes_to_the_current_stream() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        return (x * 2 + 1).relu()

    compiled = thunder.jit(program)
    x = torch.zeros(1 << 20, device="cuda")
    with torch.no_grad():
        compiled(x)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)  # what follows on this stream must wait for it
            x.fill_(3.0)
            got = compiled(x)
        torch.cuda.current_stream().wait_stream(side)
        torch.testing.assert_close(got, torch.full_like(got, 7.0))


def test_cuda_graph_captures_a_compiled_call() -> None:
    model = _block()
    compiled = thunder.jit(model)
    x = torch.randn(2, 16, 64, device="cuda")
    with torch.no_grad():
        for _ in range(3):
            compiled(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = compiled(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.testing.assert_close(y, model(x))


def test_constants_made_on_the_device_are_evaluated_once() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        mask = torch.arange(8, device=x.device)[:, None] >= torch.arange(8, device=x.device)[None, :]
        return x.masked_fill(~mask, 0.0)

    compiled = thunder.jit(program)
    x = torch.randn(8, 8, device="cuda")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), program(x))
        torch.testing.assert_close(compiled(x), program(x))
    assert "torch.arange" not in str(thunder.last_traces(compiled)[-1])


def test_mixed_devices_raise_torchs_error() -> None:
    compiled = thunder.jit(lambda x, y: x + y)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"same device|different devices"):
        compiled(torch.randn(2, 2, device="cuda"), torch.randn(2, 2))
    with torch.no_grad():
        assert compiled(torch.ones(2, device="cuda"), torch.ones(2, device="cuda")).sum().item() == 4


@pytest.mark.filterwarnings("ignore")
def test_a_seed_inside_is_the_seed_of_all_devices() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return x + torch.rand_like(x)

    def cuda_alone(x: torch.Tensor) -> torch.Tensor:
        torch.cuda.manual_seed(5)
        return torch.nn.functional.dropout(x)

    x = torch.ones(8, device="cuda")
    for f in (function, cuda_alone):
        compiled = thunder.jit(f, fallback="eager")
        for _ in range(3):
            assert torch.equal(compiled(x), f(x))
        drawn = []
        for run in (compiled, f):
            run(x)
            drawn.append(torch.rand(4, device="cuda"))
        assert torch.equal(*drawn)


@pytest.mark.filterwarnings("ignore")
def test_a_jiterator_kernel_is_not_called_while_captured() -> None:
    twice = torch.cuda.jiterator._create_jit_fn("template <typename T> T twice(T x) { return x + x; }")

    def program(x: torch.Tensor) -> torch.Tensor:
        return twice(x + 1) - 1

    x = torch.randn(8, device="cuda")
    with pytest.raises(thunder.CaptureError, match="custom_op"):
        thunder.jit(program, fallback="error")(x)
    compiled = thunder.jit(program, fallback="eager")
    for _ in range(2):
        assert torch.equal(compiled(x), program(x))
