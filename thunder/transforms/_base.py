"""The base class of transforms, and calling their hooks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from thunder import _C
from thunder._errors import TransformError

if TYPE_CHECKING:
    from thunder._module import ThunderModule


class Transform:
    """What changes a module before it is compiled, or its programs while they are.

    Subclasses override the hooks they need; those here change nothing. Several transforms run in the order in which
    ``thunder.jit(..., transforms=[...])`` names them, each hook for all transforms before the next hook. An exception
    in a hook reaches the user as a :class:`thunder.TransformError` that names the transform.
    """

    def transform_module(self, model: ThunderModule) -> None:
        """Change the module, once, before the first compile.

        ``model`` is the compiled module; it works on a copy of the user's module tree that shares its tensors, so
        ``model.override(name, tensor)``, ``register_parameter`` on a submodule and the like leave the original as it
        is. Values written into a tensor are written for both.
        """

    def transform_state_dict_for_submodule(
        self, model: ThunderModule, submodule_name: str, state_dict: dict[str, Any]
    ) -> dict[str, Any]:
        """From a state dict of the original submodule to one of the transformed submodule.

        ``ThunderModule.load_original_state_dict`` calls it for each submodule. Keys are those of the submodule's own
        parameters and buffers (``"weight"``). Returns the new state dict; it may change and return the given one.
        """
        return state_dict

    def reverse_transform_state_dict_for_submodule(
        self, model: ThunderModule, submodule_name: str, state_dict: dict[str, Any]
    ) -> dict[str, Any]:
        """The way back, for ``ThunderModule.original_state_dict``; transforms are asked in reverse order."""
        return state_dict

    def transform_trace(self, trace: _C.Trace, **info: Any) -> _C.Trace:
        """Change the program: called after the passes on functional form, before differentiation.

        Args:
            trace: the program. Parameters, buffers and constants are inputs beside the arguments.
            info: ``tensors``, a dict from the proxies of those inputs to the tensors; ``names``, a dict from the
                proxies of parameters and buffers to their dotted names; ``module``, the compiled module, or None for a
                function. Later versions may add others, so overrides take ``**info``.

        Returns:
            The trace or an edit of it. Tensors that edits bring along are read like any other: parameters of the module
            tree are bound and differentiated, others are constants.
        """
        return trace

    def transform_trace_post_optimization(self, trace: _C.Trace, *, kind: str) -> _C.Trace:
        """Change what will run.

        Args:
            trace: the program, without ``del``.
            kind: ``"inference"``, or for a program with gradients ``"forward"``, then ``"backward"``.
                ``trace.saved`` are the values that one hands to the other.

        Returns:
            The trace or an edit of it. Results and inputs keep their types, except for saved values: there both halves
            must agree. Nothing is differentiated any more, so changes of values here change values alone.
        """
        return trace

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def opaque_call(function: Callable[..., Any], *args: Any, like: Any = None) -> Any:
    """Inside a function that is given to an edit of a trace: a call that is kept as it is.

    The function is not looked into; it runs each time that the trace runs, in its place. Outside of edits it is called.

    Args:
        function: any Python callable.
        args: positional arguments: tensors, and plain values, nested in tuples, lists and dicts.
        like: ``None`` for a function whose result nobody uses; or a tensor or proxy, or a tuple of those, with the
            shape, strides, dtype and device that the result will have.

    Returns:
        Tensors of the form of ``like``, or ``None``. In ``transform_trace`` such a result is differentiated as far as
        torch's autograd can follow the function.

    Raises:
        RuntimeError: inside a function that ``thunder.jit`` captures.
    """
    return _C.opaque_call(function, args, like)


# ---- calling hooks ----


def check_transforms(transforms: Sequence[Any] | None) -> tuple[Transform, ...]:
    """The transforms as a tuple.

    Raises:
        TypeError: one is no instance of Transform.
    """
    if isinstance(transforms, Transform):
        raise TypeError(f"transforms must be a list: write transforms=[{transforms!r}]")
    for transform in transforms or ():
        if isinstance(transform, type) and issubclass(transform, Transform):
            raise TypeError(f"transforms must be instances: write {transform.__name__}() for {transform.__name__}")
        if not isinstance(transform, Transform):
            raise TypeError(f"transforms must be thunder.Transform objects, not {type(transform).__name__}")
    return tuple(transforms or ())


def run_hook(transform: Transform, hook: str, *args: Any, **kwargs: Any) -> Any:
    """Call one hook.

    Raises:
        TransformError: the hook raised; that is its cause.
    """
    try:
        return getattr(transform, hook)(*args, **kwargs)
    except Exception as error:
        raise TransformError(f"{transform!r}.{hook} failed: {type(error).__name__}: {error}") from error


def overrides(transform: Transform, hook: str) -> bool:
    """Does its class define the hook itself?"""
    return getattr(type(transform), hook) is not getattr(Transform, hook)


def copied_tree(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of a module tree with the same parameters and buffers in it.

    Raises:
        TransformError: it cannot be copied.
    """
    tensors = [*model.parameters(), *model.buffers()]
    try:
        return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    except Exception as error:
        raise TransformError(
            f"transforms that change modules work on a copy of the module tree, and {type(model).__name__} cannot be "
            f"copied: {type(error).__name__}: {error}"
        ) from error


def trace_hook(transforms: Sequence[Transform], module: Callable[[], Any]) -> Callable[..., _C.Trace] | None:
    """What the compiler calls with each trace: ``hook(stage, trace, tensors, names)``. None: no transform asks."""
    program = [t for t in transforms if overrides(t, "transform_trace")]
    final = [t for t in transforms if overrides(t, "transform_trace_post_optimization")]
    if not program and not final:
        return None

    saved: list[tuple[Any, ...]] = []  # by the forward trace

    def call(stage: str, trace: _C.Trace, tensors: Any, names: Any) -> _C.Trace:
        for transform in program if stage == "program" else final:
            if stage == "program":
                hook, info = "transform_trace", {"tensors": tensors, "names": names, "module": module()}
            else:
                hook, info = "transform_trace_post_optimization", {"kind": stage}
            given, trace = trace, run_hook(transform, hook, trace, **info)
            if not isinstance(trace, _C.Trace):
                raise TransformError(f"{transform!r}.{hook} must return a Trace, not {type(trace).__name__}")
            check_borders(transform, hook, stage, given, trace)
        if stage == "forward":
            saved[:] = trace.saved
        elif stage == "backward":
            check_saved(final, saved, trace.saved)
        return trace

    return call


def _layout(proxy: _C.TensorProxy | None) -> Any:
    return proxy and (proxy.dtype, proxy.device, proxy.shape, proxy.stride())


def _results(trace: _C.Trace) -> list[Any]:
    output = trace.output if isinstance(trace.output, tuple) else (trace.output,)
    return [_layout(proxy) for proxy in output[: len(output) - len(trace.saved)]]


def check_borders(transform: Transform, hook: str, stage: str, given: _C.Trace, made: _C.Trace) -> None:
    """Is one trace made from the other by edits? They keep the inputs and the number of results.

    Raises:
        TransformError: it is not; or the types of results differ where the program was differentiated already.
    """
    if given.inputs != made.inputs:
        raise TransformError(f"{transform!r}.{hook} must return an edit of the trace that it was given")
    if stage == "forward" and _results(given) != _results(made):
        raise TransformError(f"{transform!r}.{hook} must keep the types of the results of the forward trace")


def check_saved(transforms: Sequence[Transform], out: Sequence[Any], back: Sequence[Any]) -> None:
    """Does the backward trace expect what the forward one saves?

    Raises:
        TransformError: it does not.
    """
    for left, came in zip(out, back, strict=True):
        if _layout(left) != _layout(came):
            names = ", ".join(map(repr, transforms))
            raise TransformError(f"{names}: the forward trace saves {left!r}, the backward trace expects {came!r}")
