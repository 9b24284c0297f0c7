"""What the executors of ``scaled_dot_product_attention`` share: what fused kernels take, how torch lays results out."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

Answer = tuple[bool, str]

NAMES = (
    torch.nn.functional.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,  # under autocast
)

_DTYPES = (torch.float16, torch.bfloat16)


def supported(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Answer:
    """Whether a fused kernel can serve a call of ``scaled_dot_product_attention``, and why not."""
    if query.device.type != "cuda":
        return False, f"query is on {query.device}, not on a CUDA device"
    if query.dtype not in _DTYPES or not query.dtype == key.dtype == value.dtype:
        return False, f"query, key and value are {query.dtype}, {key.dtype} and {value.dtype}; float16 or bfloat16 is"
    if not query.ndim == key.ndim == value.ndim == 4:
        return False, "query, key and value do not have the dimensions batch, head, position, size"
    if dropout_p != 0.0:
        return False, "dropout is left to torch, whose random numbers are eager's"
    sizes = {query.shape[3], key.shape[3], value.shape[3]}
    if len(sizes) > 1 or query.shape[3] % 8 or query.shape[3] > 256:
        return False, f"heads of {query.shape[3]} and {value.shape[3]}; equal multiples of 8 up to 256 are supported"
    if any(t.stride(3) != 1 for t in (query, key, value)):
        return False, "the last dimension of query, key or value is not contiguous"
    if 0 in query.shape or 0 in key.shape:
        return False, "a dimension is empty"
    if query.shape[1] != key.shape[1] and not enable_gqa:
        return False, f"{query.shape[1]} heads of the query, {key.shape[1]} of the key"
    if torch.are_deterministic_algorithms_enabled():
        return False, "deterministic algorithms are asked for"
    return _mask_answer(query, key, attn_mask, is_causal)


def _mask_answer(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool) -> Answer:
    if mask is None:
        return True, ""
    if causal:
        return False, "a mask and is_causal together"
    if mask.dtype != torch.bool:
        return False, f"the mask is {mask.dtype}: it may need a gradient; a mask of booleans is supported"
    if mask.shape[-2:] != (query.shape[2], key.shape[2]) or key.shape[2] % 16:
        return False, f"a mask of {tuple(mask.shape)}; (..., length, length), the last a multiple of 16, is supported"
    return True, ""


def meta(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """The shape rule of a forward in training: a result laid out as torch's, the logsumexp of the scores."""
    with torch.no_grad():
        out = _torch(query, key, value, attn_mask, is_causal, enable_gqa)
    out = torch.empty_strided(out.shape, out.stride(), dtype=out.dtype, device=out.device)
    return out, query.new_empty(query.shape[:3], dtype=torch.float32)


def meta_of_gradients(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """The shape rule of a backward."""
    return tuple(torch.empty_like(t) for t in (query, key, value))


def like(t: Tensor) -> tuple[int, ...]:
    """The strides of the gradient of a tensor."""
    return _like(t.shape, t.stride())


@functools.lru_cache(4096)
def _like(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty_like(torch.empty_strided(shape, strides, device="meta")).stride()


@functools.lru_cache(4096)
def _layout(device: torch.device, dtype: torch.dtype, tensors: Any, mask: Any, causal: bool, gqa: bool) -> Any:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(), torch.no_grad():
        fakes = [torch.empty_strided(*t, dtype=dtype, device=device) for t in tensors]
        seen = None if mask is None else torch.empty_strided(*mask, dtype=torch.bool, device=device)
        return _torch(*fakes, seen, causal, gqa).stride()


def layout(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, gqa: bool) -> tuple[int, ...]:
    """The strides of the result as torch has them."""
    forms = tuple((t.shape, t.stride()) for t in (q, k, v))
    return _layout(q.device, q.dtype, forms, None if mask is None else (mask.shape, mask.stride()), causal, gqa)


def _torch(q: Tensor, k: Tensor, v: Tensor, mask: Any, causal: bool, gqa: bool) -> Tensor:
    return NAMES[0](q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=gqa)


def laid_out(t: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The tensor, or a copy of it with these strides."""
    if t.stride() == strides:
        return t
    return torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device).copy_(t)
