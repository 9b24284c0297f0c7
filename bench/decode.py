"""Decoding with a cache that grows: what a call costs at a length that was never met before."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import thunder
from bench.row import Row

STEPS, PROMPT, SAMPLED = 256, 6, 16


def decoding() -> list[Row]:
    """A Llama of 4 layers decodes 256 tokens: each new length beside a call of a program made for that very length."""
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    model = LlamaForCausalLM(config).eval()
    compiled, exact = thunder.jit(model), thunder.jit(model, dynamic=False, recompile_limit=STEPS)
    cache, ids = DynamicCache(config=config), torch.arange(PROMPT)[None]
    new, known, eager = [], [], []
    for step in range(STEPS):
        if step % (STEPS // SAMPLED) == SAMPLED - 1:
            run(exact, ids, copy.deepcopy(cache))
            known.append(min(run(exact, ids, copy.deepcopy(cache))[0] for _ in range(5)))
            eager.append(min(run(model, ids, copy.deepcopy(cache))[0] for _ in range(5)))
        elapsed, ids = run(compiled, ids, cache)
        new.append(elapsed)
    captures, free = thunder.cache_misses(compiled), statistics.median(known)
    detail = f"{captures} captures; capture-free {1e3 * free:.2f} ms, eager {1e3 * statistics.median(eager):.2f} ms"
    total = statistics.mean(new)
    return [
        Row("decoding, a new length", statistics.median(new) / free, 2.0, "x capture-free", detail),
        Row("", total / free, 2.0, "x capture-free", "all 256 calls, the captures among them"),
        Row("", total / statistics.median(eager), None, "x eager", "likewise"),
    ]


def run(call: Callable[..., Any], ids: torch.Tensor, cache: Any) -> tuple[float, torch.Tensor]:
    """Seconds of one call, and the token after it."""
    start = time.perf_counter()
    logits = call(ids, past_key_values=cache, use_cache=True).logits
    return time.perf_counter() - start, logits[:, -1:].argmax(-1)
