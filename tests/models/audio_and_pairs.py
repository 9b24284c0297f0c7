"""Audio models, and models of two modalities."""

from __future__ import annotations

from typing import Any

from tests.models import BATCH, BOS, EOS, PAD, VOCAB, Entry, Inputs, hf, noise, pixels, token_ids, words
from tests.models.text_decoder import BASE
from tests.models.text_encoder import ENCODER_DECODER
from tests.models.vision import TRANSFORMER

WAVE = {
    **BASE,
    "conv_dim": [16, 16],
    "conv_kernel": [4, 4],
    "conv_stride": [4, 4],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
}
WHISPER = {
    **BASE,
    **ENCODER_DECODER,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "max_target_positions": 32,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
TEXT_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 32,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}


def _wave(seed: int) -> dict[str, Any]:
    return {"input_values": noise(seed, BATCH, 400)}


def _speech_to_text(seed: int) -> dict[str, Any]:
    return {"input_features": noise(seed, BATCH, 8, 32), "decoder_input_ids": token_ids(seed)}


def _spectrogram(seed: int) -> dict[str, Any]:
    return {"input_values": noise(seed, BATCH, 32, 16)}


def _text_and_image(seed: int) -> dict[str, Any]:
    return {**words(seed), "pixel_values": pixels(seed)}


def _towers(name: str, prefix: str, inputs: Inputs, **options: Any) -> Entry:
    options = {"text_config": TEXT_TOWER, "vision_config": TRANSFORMER, **options}
    return Entry(name, name, "multimodal", hf(f"{prefix}Config", f"{prefix}Model", options, inputs))


ENTRIES = [
    Entry("wav2vec2", "wav2vec2", "audio", hf("Wav2Vec2Config", "Wav2Vec2ForCTC", WAVE, _wave)),
    Entry("hubert", "hubert", "audio", hf("HubertConfig", "HubertForCTC", WAVE, _wave)),
    Entry(
        "whisper", "whisper", "audio", hf("WhisperConfig", "WhisperForConditionalGeneration", WHISPER, _speech_to_text)
    ),
    Entry(
        "audio_spectrogram",
        "audio_spectrogram",
        "audio",
        hf(
            "ASTConfig",
            "ASTForAudioClassification",
            {**TRANSFORMER, "max_length": 32, "num_mel_bins": 16, "time_stride": 8, "frequency_stride": 8},
            _spectrogram,
        ),
    ),
    _towers("clip", "CLIP", _text_and_image, projection_dim=16),
    _towers("siglip", "Siglip", lambda seed: {"input_ids": token_ids(seed), "pixel_values": pixels(seed)}),
]
