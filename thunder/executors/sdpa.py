"""``sdpa``: attention without gradients by the fastest of ATen's fused kernels (cuDNN, flash, memory-efficient).

Which kernel is the fastest depends on the GPU and the shapes, and nobody waits for a measurement: the
first calls of a shape class run the candidates in turn, on the user's own data, with events of the stream around each.
What they took is read when it is known; after ``SAMPLES`` of each the fastest of the class is kept for the life of the
process. While a class is measured equal calls may differ in rounding.

Programs that are differentiated keep torch's own attention, which chooses among the same kernels by rules.

    class = device, dtype, heads, head size, causal, mask, and the sizes of batch and lengths as powers of two
"""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import torch
from torch import Tensor

from thunder.extend.executor import OperatorExecutor
from thunder.extend.registry import register_executor

SAMPLES = 3
"""Of each candidate; the first run of one is not counted: it may build a plan."""

PATIENCE = 40
"""Calls after which a class is decided with what is known, as when no backward ever comes."""

CUDNN, FLASH, EFFICIENT = 0, 1, 2
NAMES = ("cudnn", "flash", "efficient")
_DTYPES = (torch.float16, torch.bfloat16)
_aten = torch.ops.aten

Answer = tuple[bool, str]

# ---- the preference ----


class Choice:
    """Of one class: the candidates and what they took.

    Args:
        candidates: kernels in the order in which they are trusted without a measurement.
    """

    def __init__(self, candidates: tuple[int, ...]) -> None:
        self.candidates = candidates
        self.kernel: int | None = candidates[0] if len(candidates) == 1 else None
        self.times: dict[int, list[float]] = {k: [] for k in candidates}
        self._calls = 0
        self._pending: list[tuple[int, Any, Any]] = []
        self._lock = threading.Lock()

    def next(self) -> int:
        """The kernel for a forward."""
        with self._lock:
            if self.kernel is not None:
                return self.kernel
            self._collect()
            if self.kernel is not None:
                return self.kernel
            self._calls += 1
            return self.candidates[(self._calls - 1) % len(self.candidates)]

    def note(self, kernel: int, start: Any, end: Any) -> None:
        """A run between two events."""
        with self._lock:
            if self.kernel is None:
                self._pending.append((kernel, start, end))

    def seconds(self, kernel: int) -> float:
        """The best known time of a kernel; infinite where there is none."""
        return min(self.times[kernel][1:], default=float("inf"))

    def _collect(self) -> None:
        left = []
        for run in self._pending:
            kernel, start, end = run
            if end.query():
                self.times[kernel].append(start.elapsed_time(end) / 1e3)
            else:
                left.append(run)
        self._pending = left
        if all(len(t) > SAMPLES for t in self.times.values()) or self._calls >= PATIENCE:
            self.kernel = min(self.candidates, key=self.seconds)
            self._pending = []


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is known of calls with the same arguments."""

    choice: Choice
    layout: tuple[int, ...]  # strides of the result, as torch lays it out


_choices: dict[Any, Choice] = {}
_plans: dict[Any, _Plan] = {}


def preferences() -> dict[Any, str]:
    """Which kernel each class has, "measuring" while that is open."""
    return {k: "measuring" if c.kernel is None else NAMES[c.kernel] for k, c in _choices.items()}


def _bucket(n: int) -> int:
    return (n - 1).bit_length()


def _plan(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None, gqa: bool) -> _Plan:
    key = (
        q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride(), q.dtype, q.device,
        None if mask is None else (mask.shape, mask.stride()), causal, scale, gqa,
    )  # fmt: skip
    found = _plans.get(key)
    if found is None:
        shape_class = (
            str(q.device), q.dtype, _bucket(q.shape[0]), q.shape[1], k.shape[1], _bucket(q.shape[2]),
            _bucket(k.shape[2]), q.shape[3], causal, mask is not None,
        )  # fmt: skip
        candidates = _candidates(q, k, v, mask, causal, gqa)
        if not candidates:
            raise RuntimeError("none of ATen's fused attention kernels takes this call")
        choice = _choices.get(shape_class)
        if choice is None or choice.candidates != candidates:
            choice = _choices[shape_class] = Choice(candidates)
        found = _plans[key] = _Plan(choice, layout(q.device, q, k, v, causal, gqa, mask))
    return found


def _candidates(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, gqa: bool) -> tuple[int, ...]:
    """The kernels that torch says can run it, best guess first."""
    from torch.backends import cuda

    params = cuda.SDPAParams(q, k, v, mask, 0.0, causal, gqa)
    usable = []
    if q.shape[-1] <= 128 and cuda.can_use_cudnn_attention(params):
        usable.append(CUDNN)
    if mask is None and cuda.can_use_flash_attention(params):
        usable.append(FLASH)
    if q.shape[1] == k.shape[1] and cuda.can_use_efficient_attention(params):
        usable.append(EFFICIENT)
    if torch.cuda.get_device_capability(q.device)[0] < 9 and CUDNN in usable:
        usable.append(usable.pop(0))
    return tuple(usable)


def layout(
    device: torch.device, q: Tensor, k: Tensor, v: Tensor, causal: bool, gqa: bool, mask: Tensor | None = None
) -> tuple[int, ...]:
    """How torch lays out the result of a call with tensors like these, whatever device they are on."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(), torch.no_grad():
        fakes = [
            t if t is None else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
            for t in (q, k, v, mask)
        ]
        return _torch(*fakes, causal, None, gqa).stride()


def _torch(q: Tensor, k: Tensor, v: Tensor, mask: Any, causal: bool, scale: float | None, gqa: bool) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=gqa
    )


def laid_out(t: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The tensor, or a copy of it with these strides."""
    if t.stride() == strides:
        return t
    return torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device).copy_(t)


class _timed:
    """Events around a run while its class is open."""

    __slots__ = ("choice", "end", "kernel", "start")

    def __init__(self, choice: Choice, kernel: int) -> None:
        self.choice, self.kernel = choice, kernel
        self.start = None

    def __enter__(self) -> None:
        if self.choice.kernel is None and not torch.cuda.is_current_stream_capturing():
            self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.start.record()

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self.start is not None and kind is None:
            self.end.record()
            self.choice.note(self.kernel, self.start, self.end)


# ---- the kernels ----


def _additive(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """A mask of booleans as what is added to the scores, in memory that the kernels can read."""
    if mask is None:
        return None
    shape = (*q.shape[:2], *mask.shape[-2:])
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, float("-inf"))
    return bias.expand(shape)


def _run(
    kernel: int, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    if kernel == FLASH:
        return _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[0]
    if kernel == EFFICIENT:
        return _aten._scaled_dot_product_efficient_attention(q, k, v, bias, False, 0.0, causal, scale=scale)[0]
    return _aten._scaled_dot_product_cudnn_attention(q, k, v, bias, False, 0.0, causal, False, scale=scale)[0]


# ---- the operators ----

sdpa_executor = OperatorExecutor("sdpa", version=torch.__version__)


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


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    plan = _plan(query, key, value, attn_mask, is_causal, scale, enable_gqa)
    kernel = plan.choice.next()
    with _timed(plan.choice, kernel):
        out = _run(kernel, query, key, value, _additive(attn_mask, query), is_causal, scale)
        return laid_out(out, plan.layout)


for _name in (
    torch.nn.functional.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,  # under autocast
):
    sdpa_executor.register_implementation(_name, fn=_attention, checker=attention_supported)

register_executor(sdpa_executor)
