"""litgpt's GPT in the shapes of six published models."""

from __future__ import annotations

from typing import Any

import torch

from tests.models import VOCAB, Entry, Inputs, token_ids

TINY = {"n_layer": 2, "n_embd": 32, "n_head": 4, "block_size": 32, "padded_vocab_size": VOCAB, "intermediate_size": 64}


def _gpt(name: str, published: str, kind: str = "text", **over: Any) -> Entry:
    def make() -> tuple[torch.nn.Module, Inputs]:
        from tests.harness.third_party import import_litgpt

        litgpt = import_litgpt()
        config = litgpt.Config.from_name(published, **{**TINY, **over})
        return litgpt.GPT(config), lambda seed: {"idx": token_ids(seed)}

    return Entry(name, "litgpt GPT", kind, make)


ENTRIES = [
    _gpt("litgpt_pythia", "pythia-14m"),
    _gpt("litgpt_llama2", "Llama-2-7b-hf"),
    _gpt("litgpt_llama3", "Llama-3-8B", n_query_groups=2),
    _gpt("litgpt_gemma2", "Gemma-2-2b", n_query_groups=2, head_size=8),
    _gpt("litgpt_phi", "phi-2"),
    _gpt("litgpt_mixtral", "Mixtral-8x7B-v0.1", "mixture of experts", n_query_groups=2, moe_intermediate_size=64),
]
