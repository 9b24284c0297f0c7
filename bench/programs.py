"""The programs that the benchmark times; all tiny, so that what surrounds the kernels is what shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Program:
    """A callable, its arguments, and what it must reach: thunder's time over eager's and over torch.compile's."""

    name: str
    make: Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]
    over_eager: float
    over_compile: float | None = None


def _add() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    def add(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y

    return add, (torch.randn(2, 2), torch.randn(2, 2))


def _pointwise() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    def pointwise(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        a = x * y
        b = a + x
        c = b - y
        d = torch.sigmoid(c)
        e = d * c
        f = torch.tanh(e)
        g = f + y
        h = torch.relu(g)
        i = h * x
        return i + 1.0

    return pointwise, (torch.randn(2, 2), torch.randn(2, 2))


def _mlp() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    layers = [m for _ in range(6) for m in (torch.nn.Linear(4, 4), torch.nn.Tanh())]
    return torch.nn.Sequential(*layers).eval(), (torch.randn(2, 4),)


def _deep() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    layers = [m for _ in range(100) for m in (torch.nn.Linear(8, 8), torch.nn.ReLU())]
    return torch.nn.Sequential(*layers).eval(), (torch.randn(2, 8),)


def gpt(layers: int) -> tuple[torch.nn.Module, tuple[torch.Tensor]]:
    """litgpt's GPT in the shape of pythia, 32 wide, block 16, and one sequence of 16 tokens."""
    from tests.harness.third_party import import_litgpt

    litgpt = import_litgpt()
    config = litgpt.Config.from_name(
        "pythia-14m", n_layer=layers, n_embd=32, n_head=4, block_size=16, padded_vocab_size=128, intermediate_size=128
    )
    torch.manual_seed(0)
    return litgpt.GPT(config).eval(), (torch.randint(0, 128, (1, 16)),)


PROGRAMS = (
    Program("x + y, 2x2", _add, over_eager=1.5, over_compile=0.25),
    Program("10 pointwise operations, 2x2", _pointwise, over_eager=0.6),
    Program("MLP of 12 operations, 2x4", _mlp, over_eager=0.65),
    Program("100 x (Linear(8, 8) + ReLU)", _deep, over_eager=0.45),
    Program("litgpt GPT, 12 layers, 32 wide, block 16", lambda: gpt(12), over_eager=0.38),
)


class ManyParameters(torch.nn.Module):
    """`count` additions of `distinct` parameters."""

    def __init__(self, count: int, distinct: int):
        super().__init__()
        self.leaves = torch.nn.ParameterList(torch.randn(2) for _ in range(distinct))
        self.count = count

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x, with every parameter added to it in turn."""
        leaves = list(self.leaves)
        for i in range(self.count):
            x = x + leaves[i % len(leaves)]
        return x


def llama(layers: int = 4) -> tuple[torch.nn.Module, tuple[torch.Tensor], dict[str, bool]]:
    """Hugging Face's Llama, 64 wide, and one sequence of 16 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval(), (torch.randint(0, 128, (1, 16)),), {"use_cache": False}


# What they are called, microseconds of guards that they may take, and a callable with its arguments.
GUARDED = (
    ("300 parameters", 10.0, lambda: (ManyParameters(300, 300), (torch.randn(2),), {})),
    ("Hugging Face Llama, 4 layers", 8.0, llama),
)


def chain(length: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function of `length` frequent operations, none of which can be merged or removed."""

    def run(x: torch.Tensor) -> torch.Tensor:
        for i in range(length // 4):
            x = x * (i + 2.0)
            x = torch.tanh(x)
            x = x.transpose(0, 1)
            x = torch.nn.functional.gelu(x)
        return x

    return run
