"""`python bench/torchcompile.py`: the torchcompile executor beside torch.compile.

cold         first training step and first forward, each in a fresh process with an empty cache of Inductor's, together
             with the making of what is called: torch.compile() imports Inductor there
background   first call with tier="background", against the first call with the torch executor alone
steady       training step and forward at moderate width, taking turns in one run
host         a tiny program: the time is what surrounds the kernels; for a step also without what the loss, torch's
             autograd and the gradients of the same parameters take around any callable ("beyond the bare step")

python bench/torchcompile.py [--device cuda] [--seconds S] [--only {cold,steady,host} ...]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import thunder
from thunder.measure import interleaved

PARTS = ("cold", "steady", "host")


def gpt(layers: int, width: int, length: int, device: str) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """litgpt's GPT in the manner of Llama."""
    from tests.harness.third_party import import_litgpt

    litgpt = import_litgpt()
    config = litgpt.Config(
        n_layer=layers,
        n_head=width // 64,
        n_embd=width,
        block_size=length,
        padded_vocab_size=512,
        rotary_percentage=1.0,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        intermediate_size=2 * width,
        bias=False,
        parallel_residual=False,
    )
    torch.manual_seed(0)
    return litgpt.GPT(config).to(device), (torch.randint(0, 512, (2, length), device=device),)


def bert(layers: int, width: int, length: int, device: str) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """A Hugging Face encoder, without dropout."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        vocab_size=512,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertModel(config).to(device)
    return model, (torch.randint(0, 512, (2, length), device=device),)


def result(output: object) -> torch.Tensor:
    """The tensor of a model's output."""
    return output if isinstance(output, torch.Tensor) else output.last_hidden_state


def step(model: torch.nn.Module, call: object, arguments: tuple) -> None:
    """One training step without the optimiser."""
    for p in model.parameters():
        p.grad = None
    result(call(*arguments)).float().square().mean().backward()


class Bare(torch.autograd.Function):
    """Gives a ready result and fresh gradients: a step around it is what every compiled model pays."""

    @staticmethod
    def forward(ctx: object, result: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        """A tensor like the result, and nothing computed."""
        ctx.parameters = parameters
        return torch.empty_like(result)

    @staticmethod
    def backward(ctx: object, _gradient: torch.Tensor) -> tuple:
        """Gradients of the parameters' sizes."""
        return (None, *(torch.empty_like(p) for p in ctx.parameters))


def bare(model: torch.nn.Module, arguments: tuple) -> object:
    """A callable in the place of the model that does nothing."""
    with torch.no_grad():
        ready = result(model(*arguments))
    return lambda *_: Bare.apply(ready, *model.parameters())


def synchronise(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def compiled(model: torch.nn.Module, how: str) -> object:
    """The model as `how` says."""
    if how == "torch.compile":
        return torch.compile(model)
    if how == "torch":
        return thunder.jit(model)
    tier = "background" if how == "background" else "block"
    return thunder.jit(model, executors=["torchcompile"], tier=tier)


def cold(how: str, layers: int, train: bool, device: str) -> None:
    """In a process of its own: the seconds that the first step takes."""
    torch.set_num_threads(2)
    model, arguments = gpt(layers, 256, 128, device)
    start = time.perf_counter()
    call = compiled(model, how)
    with contextlib.nullcontext() if train else torch.no_grad():
        step(model, call, arguments) if train else call(*arguments)
    synchronise(device)
    print(time.perf_counter() - start)


def cold_seconds(how: str, layers: int, train: bool, device: str) -> float:
    """`cold` in a fresh process with an empty cache."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--cold", how, "--layers", str(layers), "--device", device]
        run = subprocess.run(
            command + (["--train"] if train else []),
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder},
            capture_output=True,
            text=True,
            check=True,
        )
        return float(run.stdout.splitlines()[-1])


def cold_rows(device: str, layers: int, rounds: int) -> None:
    """First calls, taking turns."""
    for train in (True, False):
        pair = ("block", "torch.compile")
        seconds = [[cold_seconds(how, layers, train, device) for how in pair] for _ in range(rounds)]
        ratios = sorted(ours / theirs for ours, theirs in seconds)
        what = "step" if train else "forward"
        detail = ", ".join(f"{ours:.1f} s / {theirs:.1f} s" for ours, theirs in seconds)
        row = f"{statistics.median(ratios):6.3f} x torch.compile ({ratios[0]:.3f}..{ratios[-1]:.3f}; {detail})"
        print(f"cold first {what}, GPT of {layers} layers   {row}")
    first = {how: [cold_seconds(how, layers, False, device) for _ in range(5)] for how in ("background", "torch")}
    ours, theirs = (statistics.median(first[how]) for how in ("background", "torch"))
    spread = ", ".join(f"{how} {min(t) * 1e3:.1f}..{max(t) * 1e3:.1f} ms" for how, t in first.items())
    print(f"first call, background tier            {ours / theirs:6.3f} x the torch executor's ({spread})")


def turns(label: str, model: torch.nn.Module, arguments: tuple, options: argparse.Namespace) -> None:
    """Training step and forward, everybody in turn."""
    torch._dynamo.reset()
    calls = {"eager": model, "thunder": compiled(model, "block"), "torch.compile": compiled(model, "torch.compile")}
    host = label.startswith("host")

    def timed(call: object, train: bool) -> object:
        def run() -> None:
            with contextlib.nullcontext() if train else torch.no_grad():
                step(model, call, arguments) if train else call(*arguments)
            synchronise(options.device)

        return run

    for train in (True, False):
        runs = {name: timed(call, train) for name, call in calls.items()}
        if host and train:
            runs["bare"] = timed(bare(model, arguments), train)
        for run in runs.values():
            for _ in range(3):
                run()
        times = interleaved(runs, seconds=options.seconds)
        ours, theirs = times["thunder"].minimum, times["torch.compile"].minimum
        what = "training step" if train else "forward"
        detail = "; ".join(f"{name} {t}" for name, t in times.items())
        beside = f"{ours / theirs:6.3f} x torch.compile, {ours / times['eager'].minimum:.3f} x eager"
        if host and train:
            floor = times["bare"].minimum
            beside += f"; beyond the bare step {(ours - floor) / (theirs - floor):.3f} x torch.compile"
        print(f"{label + ', ' + what:38} {beside}")
        print(f"{'':38} {detail}")


def host_rows(options: argparse.Namespace) -> None:
    """Programs whose kernels take next to nothing."""
    turns("host: GPT, 2 layers, 64 wide, 8 tokens", *gpt(2, 64, 8, options.device), options)
    tiny = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU(), torch.nn.LayerNorm(4)).to(options.device)
    turns("host: linear, gelu, layer_norm, 2x4", tiny, (torch.randn(2, 4, device=options.device),), options)


def main() -> int:
    """Prints the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=4.0, help="per row")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3, help="of cold first calls")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="background belongs to cold")
    parser.add_argument("--cold", help=argparse.SUPPRESS)
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cold:
        cold(options.cold, options.layers, options.train, options.device)
        return 0
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if "cold" in options.only:
        cold_rows(options.device, options.layers, options.rounds)
    if "steady" in options.only:
        wide = 256 if options.device == "cpu" else 1024
        turns(f"GPT, 4 layers, {wide} wide", *gpt(4, wide, 128, options.device), options)
        turns(f"BERT, 4 layers, {wide} wide", *bert(4, wide, 128, options.device), options)
    if "host" in options.only:
        host_rows(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
