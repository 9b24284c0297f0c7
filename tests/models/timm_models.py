"""Image models of timm, as small as their constructors allow, on 64 x 64 pixels."""

from __future__ import annotations

from typing import Any

import torch

from tests.models import Entry, Inputs, pixels


def _timm(name: str, model: str, **options: Any) -> Entry:
    def make() -> tuple[torch.nn.Module, Inputs]:
        from tests.harness.third_party import import_timm

        net = import_timm().create_model(model, pretrained=False, num_classes=10, **options)
        return net, lambda seed: {"x": pixels(seed, 64)}

    return Entry(name, name, "vision", make)


ENTRIES = [
    _timm("timm_vit", "vit_tiny_patch16_224", img_size=64, depth=2),
    _timm("timm_resnet18", "resnet18"),
    _timm("timm_convnext", "convnext_atto"),
    _timm("timm_efficientnet", "efficientnet_b0"),
    _timm("timm_mixer", "mixer_s32_224", img_size=64),
    _timm("timm_swin", "swin_tiny_patch4_window7_224", img_size=64, window_size=4),
    _timm("timm_mobilenetv3", "mobilenetv3_small_050"),
    _timm("timm_regnet", "regnetx_002"),
    _timm("timm_ghostnet", "ghostnet_050"),
    _timm("timm_mobilevit", "mobilevit_xxs"),
]
