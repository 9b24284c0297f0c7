"""The training programs that the benchmark times, and the models whose saved bytes it counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from bench.programs import gpt

Step = Callable[[Callable[..., Any]], Any]


@dataclass(frozen=True)
class TrainProgram:
    """A module, one step with it, and what thunder must reach: its time over eager's and over torch.compile's.

    `make()` gives the module and `step`; `step(callable)` runs the module, eager or compiled, and leaves no gradient
    behind.
    """

    name: str
    make: Callable[[], tuple[torch.nn.Module, Step]]
    over_eager: float
    over_compile: float | None = None


def drop_gradients(module: torch.nn.Module) -> Callable[[], None]:
    """What `zero_grad` does, without its overhead: that would be most of a tiny step."""
    parameters = list(module.parameters())

    def drop() -> None:
        for parameter in parameters:
            parameter.grad = None

    return drop


def _backward_of(module: torch.nn.Module, x: torch.Tensor) -> tuple[torch.nn.Module, Step]:
    gradient, drop = torch.ones_like(module(x)), drop_gradients(module)

    def step(call: Callable[..., Any]) -> None:
        call(x).backward(gradient)
        drop()

    return module, step


def _linear_forward() -> tuple[torch.nn.Module, Step]:
    x = torch.randn(2, 2)
    return torch.nn.Linear(2, 2), lambda call: call(x)


def _linear() -> tuple[torch.nn.Module, Step]:
    return _backward_of(torch.nn.Linear(2, 2), torch.randn(2, 2))


def _deep() -> tuple[torch.nn.Module, Step]:
    layers = [m for _ in range(100) for m in (torch.nn.Linear(8, 8), torch.nn.ReLU())]
    return _backward_of(torch.nn.Sequential(*layers), torch.randn(2, 8))


def language_model_step(module: torch.nn.Module, tokens: torch.Tensor) -> tuple[torch.nn.Module, Step]:
    """Forward, cross entropy of the next token, backward. Takes what a Hugging Face model returns, too."""
    drop = drop_gradients(module)
    targets = tokens.roll(-1, 1).flatten()

    def step(call: Callable[..., Any]) -> None:
        logits = call(tokens)
        logits = getattr(logits, "logits", logits)
        F.cross_entropy(logits.flatten(0, 1), targets).backward()
        drop()

    return module, step


def tiny_gpt(layers: int) -> tuple[torch.nn.Module, Step]:
    """A training step of litgpt's GPT, 32 wide."""
    model, (tokens,) = gpt(layers)
    return language_model_step(model.train(), tokens)


TRAIN_PROGRAMS = (
    TrainProgram("forward with grad, Linear(2, 2)", _linear_forward, over_eager=1.0),
    TrainProgram("forward+backward, Linear(2, 2)", _linear, over_eager=1.0),
    TrainProgram("forward+backward, 100 x (Linear(8, 8) + ReLU)", _deep, over_eager=0.6),
    TrainProgram("training step, litgpt GPT, 12 layers, 32 wide", lambda: tiny_gpt(12), over_eager=0.5),
)


def gpt_for_memory(small: bool = False) -> tuple[torch.nn.Module, torch.Tensor]:
    """litgpt's GPT, 6 layers, 384 wide, and 4 sequences of 256 tokens."""
    from tests.harness.third_party import import_litgpt

    litgpt = import_litgpt()
    layers, width, length, batch = (2, 32, 16, 2) if small else (6, 384, 256, 4)
    config = litgpt.Config.from_name(
        "pythia-14m",
        n_layer=layers,
        n_embd=width,
        n_head=width // 16 if small else 6,
        block_size=length,
        padded_vocab_size=512,
        intermediate_size=4 * width,
    )
    torch.manual_seed(0)
    return litgpt.GPT(config).train(), torch.randint(0, 512, (batch, length))


def bert_for_memory(small: bool = False) -> tuple[torch.nn.Module, torch.Tensor]:
    """transformers' BertForMaskedLM, 6 layers, 384 wide, dropout 0.1, and 4 sequences of 256 tokens."""
    import transformers

    layers, width, length, batch = (2, 32, 16, 2) if small else (6, 384, 256, 4)
    config = transformers.BertConfig(
        vocab_size=512,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2 if small else 6,
        intermediate_size=4 * width,
        max_position_embeddings=length,
    )
    torch.manual_seed(0)
    return transformers.BertForMaskedLM(config).train(), torch.randint(3, 512, (batch, length))


MEMORY_MODELS = {"litgpt GPT": gpt_for_memory, "BERT encoder": bert_for_memory}
