"""``cudnn``: layer_norm and attention through cuDNN's own graph API, forward and backward.

A plan is made once per shape, layout and dtype (in C: src/executors/cudnn) and kept for the life of the process. cuDNN
9.6 or newer is looked for in the ``nvidia`` packages that torch brings, or ``THUNDER_CUDNN`` names the library; it is
opened when the first call is offered.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from thunder import _C
from thunder.executors import attention as shared
from thunder.executors.attention import Answer
from thunder.extend.executor import OperatorExecutor
from thunder.extend.registry import register_executor
from thunder.extend.toolkit import find_cudnn

_TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 9}
"""cuDNN's numbers."""

cudnn_executor = OperatorExecutor("cudnn")


@functools.cache
def library() -> tuple[str, str]:
    """The path of the library, and why there is none."""
    path = find_cudnn()
    if path is None:
        return "", "torch is built without CUDA, so cuDNN is not looked for"
    try:
        cudnn_executor.version = str(_C.cudnn_version(path))
    except RuntimeError as error:
        return "", str(error)
    return path, ""


# ---- plans ----

_plans: dict[Any, Any] = {}


def _plan(kind: str, device: torch.device, sizes: tuple[int, ...], value: float) -> Any:
    key = (kind, device.index, sizes, value)
    found = _plans.get(key)
    if found is None:
        with torch.cuda.device(device):
            found = _plans[key] = _C.CudnnPlan(library()[0], kind, device.index, sizes, value)
    return found


def _run(plan: Any, device: torch.device, *tensors: Tensor) -> None:
    scratch = torch.empty(max(plan.scratch, 16), dtype=torch.uint8, device=device)
    if torch.cuda.current_device() == device.index:
        plan(scratch, *tensors)
    else:
        with torch.cuda.device(device):
            plan(scratch, *tensors)


def _aligned(t: Tensor) -> Tensor:
    return t.clone() if t.data_ptr() % 16 else t


def _rows(t: Tensor) -> Tensor:
    return _aligned(t.contiguous())


# ---- layer_norm ----


def layer_norm_supported(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Answer:
    """Whether cuDNN can serve a call of ``torch.nn.functional.layer_norm``, and why not."""
    if input.device.type != "cuda":
        return False, f"input is on {input.device}, not on a CUDA device"
    if input.dtype not in _TYPES:
        return False, f"input is {input.dtype}; float32, bfloat16 and float16 are supported"
    if len(normalized_shape) != 1 or not input.ndim or tuple(normalized_shape) != tuple(input.shape[-1:]):
        return False, f"normalized_shape {tuple(normalized_shape)} is not the last dimension of {tuple(input.shape)}"
    if input.numel() == 0 or input.shape[-1] % 8:
        return False, f"rows of {input.shape[-1]} elements; a multiple of 8 is supported"
    if not input.is_contiguous():
        return False, "input is not contiguous"
    if weight is None:
        return False, "there is no weight"
    if any(t is not None and (t.dtype != input.dtype or not t.is_contiguous()) for t in (weight, bias)):
        return False, f"weight and bias are not contiguous tensors of {input.dtype}, as the input is"
    return (True, "") if library()[0] else (False, library()[1])


def _norm_sizes(x: Tensor) -> tuple[int, ...]:
    number = _TYPES[x.dtype]
    return number, number, x.numel() // x.shape[-1], x.shape[-1]


@functools.lru_cache(16)
def _zeros(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(width, dtype=dtype, device=device)


def _layer_norm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = _norm_sizes(input)
    bias = _zeros(input.shape[-1], input.dtype, input.device) if bias is None else bias
    y = torch.empty_like(input, memory_format=torch.contiguous_format)
    mean, rstd = (torch.empty(sizes[2], dtype=torch.float32, device=input.device) for _ in range(2))
    plan = _plan("layer_norm", input.device, sizes, float(eps))
    _run(plan, input.device, _rows(input), _aligned(weight), _aligned(bias), y, mean, rstd)
    return y, mean, rstd


def _layer_norm_meta(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = (input.numel() // input.shape[-1],)
    mean, rstd = (input.new_empty(rows, dtype=torch.float32) for _ in range(2))
    return input.new_empty(input.shape), mean, rstd


def _layer_norm_backward(
    grad: Tensor, input: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(input, memory_format=torch.contiguous_format)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(weight)
    plan = _plan("layer_norm_backward", input.device, _norm_sizes(input), 0.0)
    _run(plan, input.device, _rows(grad), _rows(input), _aligned(weight), mean, rstd, dx, dweight, dbias)
    return dx, dweight, dbias


layer_norm_backward = cudnn_executor.register_operator(
    "layer_norm_backward",
    fn=_layer_norm_backward,
    meta=lambda grad, input, weight, mean, rstd: (
        input.new_empty(input.shape),
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape),
    ),
)


def _layer_norm_rule(ctx, grad, *_):
    input, _, weight, bias, _ = ctx.inputs
    grads = layer_norm_backward(grad, input, weight, *ctx.outputs[1:])
    return grads if bias is not None else grads[:2]


cudnn_executor.register_implementation(
    torch.nn.functional.layer_norm,
    cudnn_executor.register_operator(
        "layer_norm", fn=_layer_norm, meta=_layer_norm_meta, backward=_layer_norm_rule, saves=2
    ),
    checker=layer_norm_supported,
)

# ---- attention ----


def attention_supported(
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
    """Whether cuDNN can serve a call of ``scaled_dot_product_attention``, and why not."""
    answer = shared.supported(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa=enable_gqa)
    if not answer[0]:
        return answer
    if attn_mask is not None:
        return False, "a mask is not supported"
    if query.shape[3] > 128:
        return False, f"heads of {query.shape[3]}; up to 128 are supported"
    if query.shape[2] < 2 or key.shape[2] < 2:
        return False, "a single position"
    if any(s % 8 or not s for t in (query, key, value) for s in t.stride()[:3]):
        return False, "a stride of query, key or value is no multiple of 16 bytes"
    return (True, "") if library()[0] else (False, library()[1])


def _attention_sizes(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, out: tuple[int, ...], grad: tuple[int, ...] | None = None
) -> tuple[int, ...]:
    shape = (q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3])
    gradients = (0,) * 12 if grad is None else (*shared.like(q), *shared.like(k), *shared.like(v))
    strides = (*q.stride(), *k.stride(), *v.stride(), *out, *(grad or (0,) * 4), *gradients)
    return (_TYPES[q.dtype], int(causal), *shape, *strides)


def _scale(scale: float | None, q: Tensor) -> float:
    return float(q.shape[-1] ** -0.5 if scale is None else scale)


def attention(
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
    """The result and the logsumexp of the scores."""
    device = query.device
    query, key, value = _aligned(query), _aligned(key), _aligned(value)
    strides = shared.layout(query, key, value, None, is_causal, enable_gqa)
    out = torch.empty_strided(query.shape, strides, dtype=query.dtype, device=device)
    logsumexp = torch.empty(query.shape[:3], dtype=torch.float32, device=device)
    plan = _plan("attention", device, _attention_sizes(query, key, value, is_causal, strides), _scale(scale, query))
    _run(plan, device, query, key, value, out, logsumexp)
    return out, logsumexp


def attention_gradients(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    is_causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value."""
    device = query.device
    if grad.stride(3) != 1 or any(s % 8 or not s for s in grad.stride()[:3]):
        grad = shared.laid_out(grad, out.stride())
    grad, query, key, value, out = (_aligned(t) for t in (grad, query, key, value, out))
    grads = tuple(torch.empty_like(t) for t in (query, key, value))
    sizes = _attention_sizes(query, key, value, is_causal, out.stride(), grad.stride())
    plan = _plan("attention_backward", device, sizes, _scale(scale, query))
    _run(plan, device, grad, query, key, value, out, logsumexp, *grads)
    return grads


attention_backward = cudnn_executor.register_operator(
    "attention_backward", fn=attention_gradients, meta=shared.meta_of_gradients
)


def _attention_rule(ctx, grad, *_):
    query, key, value, _, _, causal, scale, _ = ctx.inputs
    return attention_backward(grad, query, key, value, *ctx.outputs, causal, scale)


_attention_operator = cudnn_executor.register_operator(
    "attention", fn=attention, meta=shared.meta, backward=_attention_rule, saves=1
)
for _name in shared.NAMES:
    cudnn_executor.register_implementation(_name, _attention_operator, checker=attention_supported)

register_executor(cudnn_executor)
