"""``sdpa``: attention by the fastest of the fused kernels: ATen's flash and memory-efficient ones, and cuDNN's.

Which kernel is the fastest depends on the GPU and the shapes, and nobody waits for a measurement: the first calls of a
shape class run the candidates in turn, on the user's own data, with events of the stream around each. What they took is
read when it is known; after ``SAMPLES`` of each the fastest of the class is kept for the life of the process. While a
class is measured equal calls may differ in rounding. In training forward and backward are timed and added up.

In training cuDNN runs by our own plans (``cudnn``), not by ATen's. ATen keeps the plans of its backward by shape and
layout of query, key and value, and not by those of the gradient that comes in: one that is laid out otherwise than the
first was is read wrongly, and the gradients are wrong (torch 2.11; `tests/test_gpu_executors.py` shows it).

    class = device, dtype, heads, head size, causal, mask, training, and the sizes of batch and lengths as powers of two
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from typing import Any

import torch
from torch import Tensor

from thunder.executors import attention, cudnn
from thunder.executors.attention import laid_out
from thunder.extend.executor import OperatorExecutor
from thunder.extend.registry import register_executor

SAMPLES = 3
"""Of each candidate; the first run of one is not counted: it may build a plan."""

PATIENCE = 40
"""Calls after which a class is decided with what is known, as when no backward ever comes."""

CUDNN, FLASH, EFFICIENT = 0, 1, 2
NAMES = ("cudnn", "flash", "efficient")
_aten = torch.ops.aten

# ---- the preference ----


class Choice:
    """Of one class: the candidates and what they took.

    Args:
        candidates: kernels in the order in which they are trusted without a measurement.
        parts: what is timed and added up: 1 for a forward, 2 for a forward and a backward.
    """

    def __init__(self, candidates: tuple[int, ...], parts: int) -> None:
        self.candidates = candidates
        self.kernel: int | None = candidates[0] if len(candidates) == 1 else None
        self.times: dict[tuple[int, int], list[float]] = {(k, p): [] for k in candidates for p in range(parts)}
        self._parts = parts
        self._calls = 0
        self._pending: list[tuple[int, int, Any, Any]] = []
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

    def note(self, kernel: int, part: int, start: Any, end: Any) -> None:
        """A run between two events."""
        with self._lock:
            if self.kernel is None:
                self._pending.append((kernel, part, start, end))

    def seconds(self, kernel: int) -> float:
        """The best known time of a kernel, its parts added up; infinite where one is missing."""
        return sum(min(self.times[kernel, p][1:], default=float("inf")) for p in range(self._parts))

    def _collect(self) -> None:
        left = []
        for run in self._pending:
            kernel, part, start, end = run
            if end.query():
                self.times[kernel, part].append(start.elapsed_time(end) / 1e3)
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


def _plan(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None, gqa: bool, train: bool
) -> _Plan:
    key = (
        q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride(), q.dtype, q.device,
        None if mask is None else (mask.shape, mask.stride()), causal, scale, gqa, train,
    )  # fmt: skip
    found = _plans.get(key)
    if found is None:
        shape_class = (
            str(q.device), q.dtype, _bucket(q.shape[0]), q.shape[1], k.shape[1], _bucket(q.shape[2]),
            _bucket(k.shape[2]), q.shape[3], causal, mask is not None, train,
        )  # fmt: skip
        candidates = _candidates(q, k, v, mask, causal, gqa, train)
        if not candidates:
            raise RuntimeError("none of the fused attention kernels takes this call")
        choice = _choices.get(shape_class)
        if choice is None or choice.candidates != candidates:
            choice = _choices[shape_class] = Choice(candidates, 2 if train else 1)
        found = _plans[key] = _Plan(choice, attention.layout(q, k, v, mask, causal, gqa))
    return found


def _candidates(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, gqa: bool, train: bool
) -> tuple[int, ...]:
    """The kernels that can run it, best guess first."""
    from torch.backends import cuda

    params = cuda.SDPAParams(q, k, v, mask, 0.0, causal, gqa)
    usable = []
    if train:
        if cudnn.attention_supported(q, k, v, mask, 0.0, causal, enable_gqa=gqa)[0]:
            usable.append(CUDNN)
    elif q.shape[-1] <= 128 and cuda.can_use_cudnn_attention(params):
        usable.append(CUDNN)
    if mask is None and cuda.can_use_flash_attention(params):
        usable.append(FLASH)
    if q.shape[1] == k.shape[1] and cuda.can_use_efficient_attention(params):
        usable.append(EFFICIENT)
    if torch.cuda.get_device_capability(q.device)[0] < 9 and CUDNN in usable:
        usable.append(usable.pop(0))
    return tuple(usable)


class _timed:
    """Events around a run while its class is open."""

    __slots__ = ("choice", "end", "kernel", "part", "start")

    def __init__(self, choice: Choice, kernel: int, part: int) -> None:
        self.choice, self.kernel, self.part = choice, kernel, part
        self.start = None

    def __enter__(self) -> None:
        if self.choice.kernel is None and not torch.cuda.is_current_stream_capturing():
            self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.start.record()

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self.start is not None and kind is None:
            self.end.record()
            self.choice.note(self.kernel, self.part, self.start, self.end)


# ---- the kernels ----


def _additive(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """A mask of booleans as what is added to the scores, in memory that the kernels can read."""
    if mask is None:
        return None
    shape = (*q.shape[:2], *mask.shape[-2:])
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, float("-inf"))
    return bias.expand(shape)


@functools.cache
def _nothing(device: torch.device) -> Tensor:
    """In place of a random state that no kernel reads without dropout."""
    return torch.zeros(2, dtype=torch.int64, device=device)


def _run(
    kernel: int, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    if kernel == FLASH:
        return _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[0]
    if kernel == EFFICIENT:
        return _aten._scaled_dot_product_efficient_attention(q, k, v, bias, False, 0.0, causal, scale=scale)[0]
    return _aten._scaled_dot_product_cudnn_attention(q, k, v, bias, False, 0.0, causal, False, scale=scale)[0]


def _run_forward(
    kernel: int, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None, gqa: bool
) -> tuple[Tensor, Tensor]:
    """The result and the logsumexp of the scores."""
    if kernel == FLASH:
        return _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]
    if kernel == CUDNN:
        return cudnn.attention(q, k, v, None, 0.0, causal, scale=scale, enable_gqa=gqa)
    out, sums = _aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)[:2]
    return out, sums[..., : q.shape[2]].contiguous()  # it comes with rows up to a multiple of 32


def _run_backward(
    kernel: int, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    state = _nothing(q.device)
    if kernel == FLASH:
        return _aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, sums, None, None, q.shape[2], k.shape[2], 0.0, causal, state, state, scale=scale
        )
    if kernel == CUDNN:
        return cudnn.attention_gradients(grad, q, k, v, out, sums, causal, scale)
    rows = out.transpose(1, 2).contiguous().transpose(1, 2)  # the kernel takes it to lie as its forward leaves it
    missing = -sums.shape[2] % 32
    if missing:
        sums = torch.nn.functional.pad(sums, (0, missing), value=float("inf"))
    return _aten._scaled_dot_product_efficient_attention_backward(
        grad, q, k, v, None, rows, sums, state[0], state[1], 0.0, [True, True, True, False], causal, scale=scale
    )[:3]


# ---- the operators ----

sdpa_executor = OperatorExecutor("sdpa", version=torch.__version__)


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
) -> tuple[Tensor, Tensor, Tensor]:
    plan = _plan(query, key, value, None, is_causal, scale, enable_gqa, True)
    kernel = plan.choice.next()
    with _timed(plan.choice, kernel, 0):
        out, sums = _run_forward(kernel, query, key, value, is_causal, scale, enable_gqa)
        return laid_out(out, plan.layout), sums, torch.tensor(kernel)


def _attention_meta(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The last result is the number of the kernel."""
    return *attention.meta(*args, **kwargs), torch.empty((), dtype=torch.int64, device="cpu")


def _without_gradient(
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
    plan = _plan(query, key, value, attn_mask, is_causal, scale, enable_gqa, False)
    kernel = plan.choice.next()
    with _timed(plan.choice, kernel, 0):
        out = _run(kernel, query, key, value, _additive(attn_mask, query), is_causal, scale)
        return laid_out(out, plan.layout)


def _attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    kernel: Tensor,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    number = int(kernel)
    plan = _plan(query, key, value, None, is_causal, scale, enable_gqa, True)
    with _timed(plan.choice, number, 1):
        grads = _run_backward(number, grad, query, key, value, out, logsumexp, is_causal, scale)
        return tuple(laid_out(g, attention.like(t)) for g, t in zip(grads, (query, key, value), strict=True))


attention_backward = sdpa_executor.register_operator(
    "attention_backward", fn=_attention_backward, meta=attention.meta_of_gradients
)


def training_supported(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *_: Any, **__: Any) -> Any:
    """What is asked in addition where a call is differentiated."""
    if attn_mask is not None:  # the memory-efficient kernel alone would be left, and cuDNN's by ATen is faster
        return False, "a mask in training is left to torch"
    return True, ""


def _rule(ctx, grad, *_):
    query, key, value, _, _, causal, scale, gqa = ctx.inputs
    return attention_backward(grad, query, key, value, *ctx.outputs, causal, scale, gqa)


_operator = sdpa_executor.register_operator("attention", fn=_attention, meta=_attention_meta, backward=_rule, saves=2)
for _name in attention.NAMES:
    sdpa_executor.register_implementation(
        _name,
        _operator,
        checker=attention.supported,
        inference=_without_gradient,
        training=training_supported,
    )

register_executor(sdpa_executor)
