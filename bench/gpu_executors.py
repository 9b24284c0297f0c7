"""`python bench/gpu_executors.py`: the GPU executors beside eager and torch.compile, on one GPU, in bfloat16.

kernels   rms_norm, layer_norm, softmax, bias + gelu + residual, cross entropy and attention, forward and backward: time
          of the GPU between two events
models    forward, and training step without the optimiser, with its loss: litgpt GPT in the manner of Pythia and of
          Llama, Hugging Face BERT and Llama; wall time, everybody in turn

Ratios are of medians, to eager's with the quartiles. `error` is the distance of the results (models: of all gradients
together) from the same in float32, relative in the Euclidean norm; `peak` is the memory that a step adds.

python bench/gpu_executors.py [--only PART ...] [--seconds S] [--layers N] [--candidates NAME ...]
"""

from __future__ import annotations

import argparse
import collections
import copy
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import nn

import thunder
from thunder.executors import sdpa
from thunder.measure import interleaved

LISTS = {
    "thunder": [],
    "thunder torchcompile": ["torchcompile"],
    "thunder sdpa+torchcompile": ["sdpa", "torchcompile"],
    "thunder cudnn+triton+torchcompile": ["cudnn", "triton", "torchcompile"],
    "thunder nvfuser": ["nvfuser"],
}
ROUNDS = 20


def compiled(program: Any, how: str) -> Any:
    """The program as a candidate runs it."""
    if how == "eager":
        return program
    if how == "torch.compile":
        torch._dynamo.reset()
        return torch.compile(program)
    return thunder.jit(program, executors=LISTS.get(how, how.split()[-1].split("+")), tier="block")


def distance(ours: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """Relative, all tensors together."""
    apart = sum((o.double() - e.double()).square().sum() for o, e in zip(ours, exact, strict=True))
    return (apart / sum(e.double().square().sum() for e in exact)).sqrt().item()


# ---- kernels ----


def kernel_programs() -> dict[str, tuple[Callable, list[torch.Tensor], list[str], float]]:
    """Name -> (program, inputs, executors to try, bytes that forward and backward have to move)."""
    rows, width, classes = 8192, 4096, 32000
    torch.manual_seed(0)
    x, r = (torch.randn(rows, width, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    w, b = (torch.randn(width, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    logits = torch.randn(rows, classes, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(0, classes, (rows,), device="cuda")
    q, k, v = (torch.randn(4, 2048, 16, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    one = 2.0 * rows * width
    return {
        "rms_norm 8192x4096": (
            lambda x, w: F.rms_norm(x, (width,), w, 1e-5), [x, w], ["triton", "nvfuser", "torchcompile"], 5 * one
        ),
        "layer_norm 8192x4096": (
            lambda x, w, b: F.layer_norm(x, (width,), w, b), [x, w, b], ["cudnn", "nvfuser", "torchcompile"], 5 * one
        ),
        "softmax 8192x4096": (lambda x: F.softmax(x, -1), [x], ["nvfuser", "torchcompile"], 5 * one),
        "bias gelu residual 8192x4096": (
            lambda x, b, r: F.gelu(x + b) + r, [x, b, r], ["nvfuser", "torchcompile"], 6 * one
        ),
        "cross entropy 8192x32000": (
            lambda x, y: F.cross_entropy(x, y), [logits, labels], ["triton", "nvfuser", "torchcompile"],
            3 * 2.0 * rows * classes,
        ),
        "attention 4x16x2048x128 causal": (
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), [q, k, v], ["sdpa", "cudnn"], 0.0
        ),
    }  # fmt: skip


def gradients(call: Callable, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The result and the gradients of the inputs."""
    out = call(*inputs)
    leaves = [t for t in inputs if t.requires_grad]
    return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]


def gpu_time(call: Callable[[], object]) -> float:
    """Microseconds of the GPU for one call; three are enqueued, so that the host is ahead."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(10_000_000)
    start.record()
    for _ in range(3):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 3 * 1e3


def copy_speed() -> float:
    """Bytes a second that a copy moves."""
    x, y = (torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2 * x.numel() / (min(gpu_time(lambda: y.copy_(x)) for _ in range(5)) * 1e-6)


def kernels(options: argparse.Namespace) -> None:
    """One row for each program and candidate."""
    speed = copy_speed()
    print(f"copy {speed / 1e12:.2f} TB/s")
    for name, (program, inputs, executors, moved) in kernel_programs().items():
        inputs = [t.requires_grad_() if t.is_floating_point() else t for t in inputs]
        wide = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in inputs]
        exact = gradients(program, wide) if moved and "cross" not in name else gradients(program, inputs)
        floor = f"   memory alone {moved / speed * 1e6:.0f} us" if moved else ""
        print(f"\n{name}, forward and backward{floor}")
        calls = {"eager": program, "torch.compile": compiled(program, "torch.compile")}
        calls |= {f"thunder {e}": compiled(program, f"thunder {e}") for e in executors if wanted(e, options)}
        runs, errors = {}, {}
        for how, call in calls.items():
            run = lambda call=call: gradients(call, inputs)  # noqa: E731
            for _ in range(10):
                run()
            errors[how] = distance(run(), exact)
            runs[how] = run
        del exact, wide
        times: dict[str, list[float]] = {how: [] for how in runs}
        for _ in range(ROUNDS):
            for how, run in runs.items():
                times[how].append(gpu_time(run))
        eager = statistics.median(times["eager"])
        for how, t in times.items():
            lower, median, upper = statistics.quantiles(t, n=4)
            mark = "" if claimed(calls[how]) else "  (nothing claimed)"
            print(
                f"  {how:22} {median:8.1f} us ({lower:.1f}..{upper:.1f})  {median / eager:.3f} x eager  "
                f"error {errors[how]:.1e}{mark}"
            )
        if "attention" in name:
            print(f"  sdpa chose {sorted(set(sdpa.preferences().values()))}")


def claims_of(call: Any) -> Any:
    """What executors claim of a compiled function or module; None: it is neither."""
    return getattr(getattr(call, "_thunder_callable", call), "_thunder_claims", None)


def claimed(call: Any) -> bool:
    """Whether the executors run anything of it."""
    claims = claims_of(call)
    return claims is None or any(region.state == "trusted" for _, region, _ in claims.units)


def wanted(executor: str, options: argparse.Namespace) -> bool:
    """Is it to be measured here?"""
    from thunder.executors.nvfuser import probe

    return executor != "nvfuser" or not probe()[1]


# ---- models ----


class Loss(nn.Module):
    """A model that ends in its loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Cross entropy of language models, the mean square of what an encoder gives."""
        out = self.model(tokens)
        if hasattr(out, "last_hidden_state"):
            return out.last_hidden_state.float().square().mean()
        logits = getattr(out, "logits", out)
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))


def litgpt(name: str, **changes: Any) -> nn.Module:
    """A GPT of litgpt's."""
    from tests.harness.third_party import import_litgpt

    library = import_litgpt()
    return library.GPT(library.Config.from_name(name, **changes))


def bert(layers: int) -> nn.Module:
    """Hugging Face's, of the size of bert-base, without dropout."""
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(num_hidden_layers=layers, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        add_pooling_layer=False,
    )


def llama(layers: int) -> nn.Module:
    """Hugging Face's, of the width of Llama-3.2-1B."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=layers, hidden_size=2048, intermediate_size=8192, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=32000, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def models(layers: int) -> dict[str, tuple[Callable[[], nn.Module], int, int, int]]:
    """Name -> (model, vocabulary, batch, length)."""
    wide = {"n_layer": layers // 2, "n_embd": 2048, "n_head": 16, "n_query_groups": 4, "intermediate_size": 5632}
    return {
        f"litgpt pythia-160m, {layers} layers, 8x1024": (lambda: litgpt("pythia-160m", n_layer=layers), 50254, 8, 1024),
        f"litgpt Llama, {layers // 2} layers, 4x2048": (
            lambda: litgpt("Llama-2-7b-hf", **wide, padded_vocab_size=32000, block_size=2048), 32000, 4, 2048,
        ),
        f"HF BERT, {layers} layers, 16x512": (lambda: bert(layers), 30522, 16, 512),
        f"HF Llama, {layers // 3} layers, 4x2048": (lambda: llama(layers // 3), 32000, 4, 2048),
    }  # fmt: skip


def step(module: nn.Module, call: Any, inputs: tuple) -> torch.Tensor:
    """Forward and backward."""
    for p in module.parameters():
        p.grad = None
    loss = call(*inputs)
    loss.backward()
    return loss


def peak(run: Callable[[], object]) -> float:
    """GiB that a run adds."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def first_calls(module: nn.Module, calls: dict[str, Any], inputs: tuple, exact: list) -> dict[str, str]:
    """Warm everybody up; what there is to say of each."""
    notes = {}
    for how in list(calls):
        start = time.perf_counter()
        try:
            calls[how] = compiled(module, how)
            for _ in range(12):
                step(module, calls[how], inputs)
            with torch.no_grad():
                for _ in range(3):
                    calls[how](*inputs)
        except Exception as error:
            print(f"  {how}: {type(error).__name__}: {str(error)[:300]}")
            del calls[how]
            continue
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        error = distance([p.grad for p in module.parameters()], exact)
        memory = peak(lambda how=how: step(module, calls[how], inputs))
        notes[how] = f"error {error:.2e}  peak {memory:.2f} GiB  ready in {seconds:.0f} s{units(calls[how])}"
    return notes


def units(call: Any) -> str:
    """How many units each executor runs."""
    claims = claims_of(call)
    if claims is None:
        return ""
    count = collections.Counter(
        region.executor.name if region.state == "trusted" else f"{region.executor.name} {region.state}"
        for _, region, _ in claims.units
    )
    return f"  {dict(count)}"


def model(name: str, options: argparse.Namespace) -> None:
    """The rows of one model."""
    make, vocabulary, batch, length = models(options.layers)[name]
    torch.manual_seed(0)
    module = Loss(make()).cuda()
    inputs = tuple(torch.randint(0, vocabulary, (batch, length), device="cuda") for _ in range(2))
    with torch.no_grad():
        reference = copy.deepcopy(module).bfloat16().float()
    step(reference, reference, inputs)
    exact = [p.grad for p in reference.parameters()]
    del reference
    module = module.bfloat16()
    print(f"\n{name}")
    calls = dict.fromkeys(c for c in ("eager", "torch.compile", *LISTS) if chosen(c, options))
    notes = first_calls(module, calls, inputs, exact)

    def forward(call: Any) -> None:
        with torch.no_grad():
            call(*inputs)
        torch.cuda.synchronize()

    def train(call: Any) -> None:
        step(module, call, inputs)
        torch.cuda.synchronize()

    for what, run in (("forward", forward), ("training step", train)):
        runs = {how: lambda call=call, run=run: run(call) for how, call in calls.items()}
        times = interleaved(runs, seconds=options.seconds, repeats=12, warmup=2)
        eager = times["eager"].median
        for how, t in times.items():
            spread = f"{t.lower / eager:.3f}..{t.upper / eager:.3f}"
            note = notes[how] if what != "forward" else ""
            other = (
                f", {t.median / times['torch.compile'].median:.3f} x torch.compile" if "torch.compile" in times else ""
            )
            ratio = f"{t.median / eager:.3f} ({spread}) x eager{other}"
            print(f"  {what:14} {how:34} {t.median * 1e3:8.2f} ms  {ratio}  {note}")


def chosen(candidate: str, options: argparse.Namespace) -> bool:
    """Is it asked for, and there?"""
    if candidate == "eager":
        return True
    if options.candidates and candidate not in options.candidates:
        return False
    return wanted(candidate.split()[-1], options)


def main() -> int:
    """Prints the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="kernels, or a part of a model's name")
    parser.add_argument("--seconds", type=float, default=4.0, help="per model and row")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--candidates", nargs="+", default=[])
    options = parser.parse_args()
    warnings.simplefilter("once", thunder.ThunderWarning)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}")
    if not options.only or "kernels" in options.only:
        kernels(options)
    for name in models(options.layers):
        if not options.only or any(part in name for part in options.only):
            model(name, options)
            torch.cuda.empty_cache()
    print({str(k): v for k, v in sdpa.preferences().items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
