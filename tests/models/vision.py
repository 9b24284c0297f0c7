"""Image models of transformers."""

from __future__ import annotations

from typing import Any

from tests.models import Entry, hf, image

TRANSFORMER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


def _classifier(name: str, prefix: str, **options: Any) -> Entry:
    return Entry(name, name, "vision", hf(f"{prefix}Config", f"{prefix}ForImageClassification", options, image))


ENTRIES = [
    _classifier("vit", "ViT", **TRANSFORMER),
    _classifier("deit", "DeiT", **TRANSFORMER),
    _classifier("beit", "Beit", **TRANSFORMER),
    _classifier("dinov2", "Dinov2", **TRANSFORMER),
    _classifier(
        "swin", "Swin", image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4
    ),
    _classifier(
        "swinv2", "Swinv2", image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4
    ),
    _classifier("convnext", "ConvNext", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2),
    _classifier("convnextv2", "ConvNextV2", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2),
    _classifier("resnet", "ResNet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
    _classifier("regnet", "RegNet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=4),
    _classifier("mobilenet_v1", "MobileNetV1", depth_multiplier=0.25, image_size=32),
    _classifier("mobilenet_v2", "MobileNetV2", depth_multiplier=0.25, image_size=32),
    _classifier("poolformer", "PoolFormer", hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1]),
    _classifier(
        "segformer",
        "Segformer",
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16,
    ),
]
