"""What running a program for its values needs: to leave no trace of having run.

A program that asks for the value of a tensor (``item()``, ``if x.sum() > 0``) is run up to there while it is captured,
and a run that meets another value than its program was made for is taken back. Both draw random numbers and write
tensors that the caller will see drawn and written once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def _device_generators() -> Any:
    """torch.cuda, or the module of whatever accelerator is there; None while it holds no state."""
    kind = torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") else None
    module = torch.get_device_module(kind) if kind is not None else torch.cuda
    started = getattr(module, "is_initialized", lambda: False)()
    return module if started and hasattr(module, "get_rng_state_all") else None


_States = tuple[torch.Tensor, list[torch.Tensor], list[tuple[torch.Generator, torch.Tensor]]]


def generators(others: Sequence[torch.Generator]) -> _States:
    """The states of torch's generators, on the processor and on the accelerator's devices, and of others."""
    module = _device_generators()
    states = module.get_rng_state_all() if module else []
    return torch.get_rng_state(), states, [(other, other.get_state()) for other in others]


def set_generators(states: _States) -> None:
    """Put them back."""
    torch.set_rng_state(states[0])
    if states[1]:
        _device_generators().set_rng_state_all(states[1])
    for other, state in states[2]:
        other.set_state(state)


def copies(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors of the same values and layouts in memory of their own; those that share memory share it again."""
    storages: dict[int, torch.UntypedStorage] = {}
    result = []
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage._cdata not in storages:
            storages[storage._cdata] = storage.clone()
        view = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        result.append(view.set_(storages[storage._cdata], tensor.storage_offset(), tensor.shape, tensor.stride()))
    return result


class Undo:
    """How tensors and generators were before a run.

    Args:
        tensors: that the run may write.
        others: the generators besides torch's own that it may draw random numbers from; None: it draws none at all.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], others: Sequence[torch.Generator] | None) -> None:
        with torch.no_grad():
            self.tensors = [(tensor.detach(), tensor.detach().clone()) for tensor in tensors]
        self.generators = generators(others) if others is not None else None

    def restore(self) -> None:
        """Put them back."""
        with torch.no_grad():
            for tensor, before in self.tensors:
                tensor.copy_(before)
        if self.generators is not None:
            set_generators(self.generators)
