"""Decoder-only language models: dense, mixture of experts, state space."""

from __future__ import annotations

from typing import Any

from tests.models import BOS, EOS, PAD, VOCAB, Entry, hf, words

BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "use_cache": False,
}
GPT2_LIKE = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
SLIDING = {"head_dim": 8, "sliding_window": 8}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS_QWEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def _causal(
    name: str, prefix: str, kind: str = "text", arch: str | None = None, config: str | None = None, **over: Any
) -> Entry:
    make = hf(config or f"{prefix}Config", f"{prefix}ForCausalLM", {**BASE, **over}, words)
    return Entry(name, arch or name, kind, make)


ENTRIES = [
    _causal("llama", "Llama"),
    _causal("llama_cache", "Llama", arch="llama", use_cache=True),
    _causal("llama_eager_attention", "Llama", arch="llama", attn_implementation="eager"),
    _causal("mistral", "Mistral", sliding_window=8),
    _causal("qwen2", "Qwen2"),
    _causal("qwen3", "Qwen3", head_dim=8),
    _causal("gemma", "Gemma", head_dim=8),
    _causal("gemma2", "Gemma2", **SLIDING),
    _causal("gemma3", "Gemma3", config="Gemma3TextConfig", **SLIDING),
    _causal("phi", "Phi"),
    _causal("phi3", "Phi3"),
    Entry("gpt2", "gpt2", "text", hf("GPT2Config", "GPT2LMHeadModel", {**BASE, **GPT2_LIKE}, words)),
    _causal("gpt_neox", "GPTNeoX"),
    _causal("gpt_neo", "GPTNeo", num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]),
    _causal("gptj", "GPTJ", rotary_dim=4, **GPT2_LIKE),
    _causal("opt", "OPT", ffn_dim=64, word_embed_proj_dim=32),
    _causal("bloom", "Bloom", n_layer=2, n_head=4),
    _causal("falcon", "Falcon"),
    _causal("stablelm", "StableLm"),
    _causal("olmo2", "Olmo2"),
    _causal("cohere", "Cohere"),
    _causal("granite", "Granite"),
    _causal("starcoder2", "Starcoder2"),
    _causal("smollm3", "SmolLM3"),
    _causal("glm4", "Glm4", head_dim=8),
    _causal("xglm", "XGLM", d_model=32, ffn_dim=64, num_layers=2, attention_heads=4),
    _causal("codegen", "CodeGen", rotary_dim=4, n_ctx=64, **GPT2_LIKE),
    _causal("mixtral", "Mixtral", "mixture of experts", **EXPERTS),
    _causal("mixtral_eager", "Mixtral", "mixture of experts", "mixtral", experts_implementation="eager", **EXPERTS),
    _causal(
        "mixtral_batched", "Mixtral", "mixture of experts", "mixtral", experts_implementation="batched_mm", **EXPERTS
    ),
    _causal("qwen3_moe", "Qwen3Moe", "mixture of experts", head_dim=8, **EXPERTS_QWEN),
    _causal("qwen2_moe", "Qwen2Moe", "mixture of experts", shared_expert_intermediate_size=32, **EXPERTS_QWEN),
    _causal("olmoe", "Olmoe", "mixture of experts", num_experts=4, num_experts_per_tok=2),
    _causal("granitemoe", "GraniteMoe", "mixture of experts", **EXPERTS),
    _causal(
        "deepseek_v3",
        "DeepseekV3",
        "mixture of experts",
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=16,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=1,
        num_key_value_heads=4,
    ),
    _causal("mamba", "Mamba", "state space", state_size=4),
    _causal(
        "mamba2", "Mamba2", "state space", state_size=4, num_heads=8, head_dim=8, n_groups=2, expand=2, chunk_size=4
    ),
    _causal(
        "jamba",
        "Jamba",
        "state space",
        num_experts=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=4,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
]
