"""Tiny configurations of real architectures with random weights: the material of `make coverage-models`.

    entry = zoo()["llama"]
    model, inputs = entry.build()      # model in eval mode, always with the same weights
    model(**inputs(seed=0))

`inputs(0)` and `inputs(1)` have the same shapes and dtypes and other values; attention masks differ in their padding,
so a capture that burns a value in gives itself away on the second input.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

BATCH, LENGTH, VOCAB = 2, 12, 99
PAD, BOS, EOS, FIRST_WORD = 0, 1, 2, 3

Inputs = Callable[[int], dict[str, Any]]
_SECTIONS = ("text_decoder", "text_encoder", "vision", "audio_and_pairs", "lit", "timm_models")

# One of each kind of construction; the pytest tier runs these.
QUICK = (
    "llama", "llama_cache", "gpt2", "mistral", "mixtral", "mamba", "bert", "deberta_v2", "modernbert", "t5",
    "vit", "swin", "convnext", "clip", "wav2vec2", "whisper", "litgpt_pythia", "litgpt_llama3", "timm_vit",
    "timm_resnet18",
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One configuration: how to build it, and what it stands for."""

    name: str
    architecture: str  # configurations of one architecture share it
    kind: str  # "text", "vision", "audio", "encoder-decoder", "mixture of experts", "state space", "multimodal"
    make: Callable[[], tuple[torch.nn.Module, Inputs]]

    def build(self) -> tuple[torch.nn.Module, Inputs]:
        """The model in eval mode and the function from a seed to its keyword arguments."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, inputs = self.make()
            model.eval()
            _wake_up(model, inputs)
        return model, inputs


def _wake_up(model: torch.nn.Module, inputs: Inputs) -> None:
    """Gives noise to whatever starts out constant: zero heads and tiny layer scales would hide wrong results."""
    with torch.no_grad():
        for parameter in model.parameters():
            if (
                parameter.numel() > 1
                and parameter.is_floating_point()
                and bool((parameter == parameter.flatten()[0]).all())
            ):
                parameter.add_(0.1 * torch.randn_like(parameter))
        norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
        if norms:  # statistics of one batch, as a trained model would have; the initial ones let the signal die out
            momenta = [norm.momentum for norm in norms]
            for norm in norms:
                norm.train().momentum = 1.0
            model(**inputs(2))
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.eval().momentum = momentum


def generator(seed: int) -> torch.Generator:
    """A CPU generator that starts from `seed`."""
    return torch.Generator().manual_seed(seed)


def token_ids(seed: int) -> torch.Tensor:
    """int64 (BATCH, LENGTH) of words, no special tokens."""
    return torch.randint(FIRST_WORD, VOCAB, (BATCH, LENGTH), generator=generator(seed))


def left_padding_mask(seed: int) -> torch.Tensor:
    """int64 (BATCH, LENGTH): all ones for seed 0, otherwise seed + 2 zeros at the start of the first row."""
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    if seed:
        mask[0, : seed + 2] = 0
    return mask


def pixels(seed: int, size: int = 32, channels: int = 3) -> torch.Tensor:
    """float32 (BATCH, channels, size, size) of normal noise."""
    return torch.randn(BATCH, channels, size, size, generator=generator(seed))


def noise(seed: int, *shape: int) -> torch.Tensor:
    """float32 normal noise of the given shape."""
    return torch.randn(*shape, generator=generator(seed))


def words(seed: int) -> dict[str, Any]:
    """Keyword arguments of a text model."""
    return {"input_ids": token_ids(seed), "attention_mask": left_padding_mask(seed)}


def image(seed: int) -> dict[str, Any]:
    """Keyword arguments of an image model of transformers."""
    return {"pixel_values": pixels(seed)}


def text_to_text(seed: int) -> dict[str, Any]:
    """Keyword arguments of an encoder-decoder model."""
    return {**words(seed), "decoder_input_ids": token_ids(seed + 7)}


def hf(
    config: str, model: str, options: dict[str, Any], inputs: Inputs
) -> Callable[[], tuple[torch.nn.Module, Inputs]]:
    """A maker for a transformers model: `model(config(**options))`."""

    def make() -> tuple[torch.nn.Module, Inputs]:
        import transformers

        return getattr(transformers, model)(getattr(transformers, config)(**options)), inputs

    return make


@functools.cache
def zoo() -> dict[str, Entry]:
    """All configurations by name, in a fixed order."""
    entries: dict[str, Entry] = {}
    for section in _SECTIONS:
        for entry in importlib.import_module(f"tests.models.{section}").ENTRIES:
            if entry.name in entries:
                raise ValueError(f"two configurations are called {entry.name}")
            entries[entry.name] = entry
    return entries
