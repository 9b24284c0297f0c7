"""Encoders of text, and encoder-decoder models."""

from __future__ import annotations

from typing import Any

from tests.models import EOS, PAD, Entry, hf, text_to_text, words
from tests.models.text_decoder import BASE

DISENTANGLED = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
ENCODER_DECODER = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "decoder_start_token_id": EOS,
}
T5_LIKE = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": PAD}


def _masked(name: str, prefix: str, **over: Any) -> Entry:
    return Entry(name, name, "text", hf(f"{prefix}Config", f"{prefix}ForMaskedLM", {**BASE, **over}, words))


def _pair(name: str, prefix: str, **over: Any) -> Entry:
    make = hf(f"{prefix}Config", f"{prefix}ForConditionalGeneration", {**BASE, **over}, text_to_text)
    return Entry(name, name, "encoder-decoder", make)


ENTRIES = [
    _masked("bert", "Bert"),
    Entry(
        "bert_classifier",
        "bert",
        "text",
        hf("BertConfig", "BertForSequenceClassification", {**BASE, "num_labels": 3}, words),
    ),
    _masked("roberta", "Roberta"),
    _masked("distilbert", "DistilBert", dim=32, n_layers=2, n_heads=4, hidden_dim=64),
    _masked("deberta", "Deberta", **DISENTANGLED),
    _masked("deberta_v2", "DebertaV2", position_buckets=8, **DISENTANGLED),
    _masked("albert", "Albert", embedding_size=16),
    _masked("electra", "Electra", embedding_size=16),
    _masked("modernbert", "ModernBert", local_attention=8),
    _masked("ernie", "Ernie"),
    _masked("mpnet", "MPNet"),
    _masked("camembert", "Camembert"),
    _masked("xlm_roberta", "XLMRoberta"),
    _masked("convbert", "ConvBert", embedding_size=32, conv_kernel_size=3, head_ratio=2),
    _masked("squeezebert", "SqueezeBert", embedding_size=32),
    Entry(
        "fnet",
        "fnet",
        "text",
        hf("FNetConfig", "FNetForMaskedLM", BASE, lambda s: {"input_ids": words(s)["input_ids"]}),
    ),
    _pair("t5", "T5", **T5_LIKE),
    _pair("bart", "Bart", **ENCODER_DECODER),
    _pair("pegasus", "Pegasus", **ENCODER_DECODER),
    _pair("mbart", "MBart", **ENCODER_DECODER),
    Entry(
        "marian",
        "marian",
        "encoder-decoder",
        hf("MarianConfig", "MarianMTModel", {**BASE, **ENCODER_DECODER}, text_to_text),
    ),
]
