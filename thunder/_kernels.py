"""Operations of compiled programs that torch has not, or not right."""

from __future__ import annotations

import torch


def as_strided_scatter(
    input: torch.Tensor,
    src: torch.Tensor,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    storage_offset: int | None = None,
) -> torch.Tensor:
    """A copy of ``input`` with ``src`` in the elements that ``input.as_strided(size, stride, storage_offset)`` shows.

    Like ``torch.as_strided_scatter``, whose derivative for ``input`` is wrong in torch 2.13: it is ``grad`` inside the
    region and zero outside.

    Args:
        input: any shape; every element in storage of its own.
        src: of shape ``size``, same dtype.
        size, stride, storage_offset: the region, in elements; without an offset it begins where ``input`` does.
    """
    result = torch.empty_strided(input.shape, input.stride(), dtype=input.dtype, device=input.device).copy_(input)
    start = 0 if storage_offset is None else storage_offset - input.storage_offset()
    result.as_strided(size, stride, start).copy_(src)
    return result
