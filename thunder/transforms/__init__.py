"""Transforms: programs and modules changed between the user's code and what runs.

A transform is a subclass of :class:`Transform`. ``thunder.jit(model, transforms=[...])`` calls its hooks: first those
on modules, then, at each compile, those on traces. docs/transforms.md is the guide.
"""

from thunder.transforms._base import Transform, opaque_call
from thunder.transforms.folding import ConstantFolding
from thunder.transforms.lora import LoRA
from thunder.transforms.nvtx import NvtxRanges
from thunder.transforms.offload import OffloadSaved

__all__ = ["ConstantFolding", "LoRA", "NvtxRanges", "OffloadSaved", "Transform", "opaque_call"]
