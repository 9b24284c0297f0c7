"""Operations of compiled programs that torch has not, or not right."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from thunder._C import expect as expect


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


# ---- torch.autograd.Function under autocast ----


class _UnderAutocast:
    """``Function.apply``, with autocast as it was where the code called it: a program runs with autocast off."""

    def __init__(self, apply: Callable[..., Any], settings: tuple[tuple[str, torch.dtype], ...]) -> None:
        self._thunder_apply = apply
        self.settings = settings

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for device, dtype in self.settings:
                stack.enter_context(torch.autocast(device, dtype))
            return self._thunder_apply(*args, **kwargs)


def under_autocast(apply: Any) -> Callable[..., Any]:
    """``apply``, bound to its class, under autocast as it is now. The class keeps it, so that it is one object."""
    settings = tuple(
        (device, torch.get_autocast_dtype(device)) for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)
    )
    kept = apply.__self__.__dict__.get("_thunder_under_autocast")
    if kept is None:
        kept = {}
        apply.__self__._thunder_under_autocast = kept
    return kept.setdefault(settings, _UnderAutocast(apply, settings))


# ---- checks of data ----


def raise_if(flag: torch.Tensor, kind: str, message: str) -> None:
    """Raise when ``flag``, of one element, is true; recorded during a capture, where that is not known yet.

    Args:
        kind: the exception, ``"ValueError"`` or ``"RuntimeError"``.
    """
    if torch.overrides.has_torch_function_unary(flag):
        torch.overrides.handle_torch_function(raise_if, (flag,), flag, kind, message)
    elif flag:
        raise (ValueError if kind == "ValueError" else RuntimeError)(message)


def warn_if(flag: torch.Tensor, message: str) -> None:
    """Warn, likewise."""
    if torch.overrides.has_torch_function_unary(flag):
        torch.overrides.handle_torch_function(warn_if, (flag,), flag, message)
    elif flag:
        warnings.warn(message, stacklevel=2)


# ---- sizes ----


def extent(tensor: torch.Tensor, dimension: int, number: int) -> None:
    """A mark in programs for any sizes: size ``dimension`` of ``tensor`` is number ``number`` of what they compute."""


def expect_sizes(tensor: torch.Tensor, *sizes: int) -> None:
    """A mark in programs for any sizes: what ``sizes`` ``tensor`` has to have; -1 may be any.

    Raises:
        ValueError: it has others.
    """
    found = torch.Size(tensor.shape)
    if any(want not in (-1, size) for want, size in zip(sizes, found, strict=True)):
        raise ValueError(f"sizes {sizes} are expected, not {tuple(found)}")


def expect_contiguous(tensor: torch.Tensor) -> None:
    """A mark in programs for any sizes: ``tensor`` has to be contiguous.

    Raises:
        ValueError: it is not.
    """
    if not tensor.is_contiguous():
        raise ValueError("a contiguous tensor is expected")


def expect_not_contiguous(tensor: torch.Tensor) -> None:
    """A mark in programs for any sizes: ``tensor`` has to be one that ``contiguous`` copies.

    Raises:
        ValueError: it is not.
    """
    if tensor.is_contiguous():
        raise ValueError("a tensor is expected that is not contiguous")


# ---- hooks of captured code ----


class CapturedHook:
    """A hook that captured code registered on a tensor it computes; also the handle that it got for it.

    Args:
        function: the user's.
        capturing: ``remove`` is possible. It is while the capture runs: the program that comes out of it has the hook
            or has it not.
    """

    def __init__(self, function: Callable[..., Any], capturing: bool = True) -> None:
        self.function = function
        self.capturing = capturing
        self.removed = False

    @property
    def id(self) -> int:
        return id(self)

    def remove(self) -> None:
        """Take the hook off again.

        Raises:
            RuntimeError: the compiled call that registered it has returned.
        """
        if not self.capturing and not self.removed:
            raise RuntimeError(
                "thunder: a hook that was registered inside a compiled function on a tensor computed there cannot be "
                "removed after the call; remove it inside, or return the tensor and register the hook outside"
            )
        self.removed = True

    def __enter__(self) -> CapturedHook:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


class ModuleNode:
    """Stands, during a capture, for the node that torch puts at each end of a module with backward hooks."""

    def __init__(self) -> None:
        self.hooks: list[CapturedHook] = []
        self.prehooks: list[CapturedHook] = []

    def name(self) -> str:
        return "BackwardHookFunctionBackward"

    def register_hook(self, hook: Callable[..., Any]) -> CapturedHook:
        self.hooks.append(CapturedHook(hook))
        return self.hooks[-1]

    def register_prehook(self, hook: Callable[..., Any]) -> CapturedHook:
        self.prehooks.append(CapturedHook(hook))
        return self.prehooks[-1]

    def functions(self) -> list[Any]:
        return [hook.function for hook in (*self.hooks, *self.prehooks)]

    def close(self) -> None:
        for hook in (*self.hooks, *self.prehooks):
            hook.capturing = False


def tie_hook(tensor: torch.Tensor, hook: CapturedHook) -> None:
    """What a captured ``register_hook`` does when its trace is run as Python."""
    if tensor.requires_grad and not hook.removed:
        tensor.register_hook(hook.function)


def tie_grad(tensor: torch.Tensor) -> None:
    """``retain_grad``, likewise."""
    if tensor.requires_grad:
        tensor.retain_grad()


def tie_module(node: ModuleNode, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The border of a module with backward hooks, likewise."""
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in tensors):
        return tuple(tensor.view_as(tensor) for tensor in tensors)
    results = torch.nn.modules._functions.BackwardHookFunction.apply(*tensors)
    grad_fn = next(result.grad_fn for result in results if result.requires_grad)
    for hook in node.hooks:
        grad_fn.register_hook(hook.function)
    for hook in node.prehooks:
        grad_fn.register_prehook(hook.function)
    return results


def undefined(like: torch.Tensor) -> torch.Tensor:
    """Zeros in the place of a gradient that did not come in; they know it."""
    like._thunder_undefined = True
    return like


def _is_undefined(tensor: torch.Tensor) -> bool:
    return getattr(tensor, "_thunder_undefined", False)


def _laid_out(tensor: torch.Tensor, stride: Sequence[int]) -> torch.Tensor:
    if tuple(tensor.stride()) == tuple(stride) or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return tensor
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _check(result: Any, grad: torch.Tensor, hook: Any) -> torch.Tensor:
    """The rules that torch has for what a hook returns."""
    name = getattr(hook, "__name__", type(hook).__name__)
    if not isinstance(result, torch.Tensor):
        raise TypeError(f"expected Variable, but hook returned '{type(result).__name__}'")
    if result.dtype != grad.dtype or result.device != grad.device or result.layout != grad.layout:
        raise RuntimeError(f"hook '{name}' has changed the type of value (was {grad.type()} got {result.type()})")
    if result.shape != grad.shape:
        raise RuntimeError(f"hook '{name}' has changed the size of value")
    return result


def run_hook(
    hook: CapturedHook, grad: torch.Tensor, stride: Sequence[int], sources: Sequence[torch.Tensor]
) -> torch.Tensor:
    """The gradient of a tensor as its hook leaves it.

    Args:
        grad: the whole gradient.
        stride: of the result.
        sources: the gradients of the call's results that it depends on. When none came in, autograd would not have come
            by here.
    """
    if hook.removed or (sources and all(map(_is_undefined, sources))):
        return _laid_out(grad, stride)
    given = grad.clone()  # others may hold the same tensor, and hooks that change theirs in place are common
    result = hook.function(given)
    return _laid_out(given if result is None else _check(result, grad, hook.function), stride)


def run_module_hooks(
    node: ModuleNode,
    grads: Sequence[torch.Tensor | None],
    kinds: Sequence[tuple[Sequence[int], Sequence[int], torch.dtype, torch.device]],
    sources: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, ...]:
    """The gradients at the border of a module as its hooks leave them.

    Args:
        grads: of the tensors that cross the border; ``None`` where none arrives.
        kinds: shape, stride, dtype and device of each result.
        sources: as for :func:`run_hook`.
    """
    outs = tuple(None if grad is None or _is_undefined(grad) else grad for grad in grads)
    fire = not sources or not all(map(_is_undefined, sources))
    for hook in node.prehooks if fire else ():
        result = None if hook.removed else hook.function(outs)
        outs = outs if result is None else _as_many(result, outs, hook.function)
    results = tuple(
        torch.zeros(shape, dtype=dtype, device=device) if out is None else out
        for out, (shape, _, dtype, device) in zip(outs, kinds, strict=True)
    )
    for hook in node.hooks if fire else ():
        result = None if hook.removed else hook.function(results, outs)
        results = results if result is None else _as_many(result, results, hook.function)
    return tuple(
        _laid_out(torch.zeros(shape, dtype=dtype, device=device) if result is None else result, stride)
        for result, (shape, stride, dtype, device) in zip(results, kinds, strict=True)
    )


def _as_many(result: Any, given: tuple, hook: Any) -> tuple:
    result = result if isinstance(result, tuple) else (result,)
    if len(result) != len(given):
        name = getattr(hook, "__name__", type(hook).__name__)
        raise RuntimeError(
            f"hook '{name}' has returned an incorrect number of values ({len(result)}, expected {len(given)})"
        )
    for new, old in zip(result, given, strict=True):
        if new is not None and old is not None:
            _check(new, old, hook)
    return result


class Kept:
    """Fills ``.grad`` of a result on which captured code called ``retain_grad``.

    torch's own ``retain_grad`` sees what comes from outside. The rest comes from other results of the same call, so the
    backward program knows the whole.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = weakref.ref(tensor)
        self.before: tuple[torch.Tensor | None] | None = None
        tensor.register_hook(self.look)  # runs before the one that retains
        tensor.retain_grad()

    def look(self, grad: torch.Tensor) -> None:
        tensor = self.tensor()
        self.before = None if tensor is None else (tensor.grad,)

    def add(self, total: torch.Tensor) -> None:
        """``total``: the gradient that this backward pass found."""
        tensor = self.tensor()
        if tensor is not None:
            before = self.before[0] if self.before else tensor.grad
            tensor.grad = total.clone() if before is None else before + total
        self.before = None


def once_differentiable(grad: torch.Tensor, incoming: Sequence[torch.Tensor]) -> torch.Tensor:
    """A gradient from a backward that its author marked with ``torch.autograd.function.once_differentiable``.

    Under ``create_graph`` it has no history, and where one of the gradients that came in has one, differentiating it
    raises torch's error.
    """
    if not torch.is_grad_enabled():
        return grad
    grad = grad.detach()
    if not any(given.requires_grad for given in incoming):
        return grad
    error = torch._C._functions.DelayedError(
        b"trying to differentiate twice a function that was marked with @once_differentiable", 1
    )
    return error(grad.requires_grad_())
