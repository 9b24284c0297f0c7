"""``ThunderModule``: a compiled ``nn.Module`` that stands for the original."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch

_get = object.__getattribute__


def _overrides(cls: type, name: str) -> bool:
    """Does ``cls``, or a base of it below ``nn.Module``, define this name?"""
    return any(name in base.__dict__ for base in cls.__mro__[: cls.__mro__.index(torch.nn.Module)])


def _returning(wrapper: ThunderModule, model: torch.nn.Module, method: Any) -> Any:
    """A method of the original; where it overrides one of ``nn.Module`` and returns itself, it returns the wrapper."""
    if getattr(method, "__self__", None) is not model or not hasattr(torch.nn.Module, getattr(method, "__name__", "")):
        return method

    @functools.wraps(method)
    def through(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        return wrapper if result is model else result

    return through


class ThunderModule(torch.nn.Module):
    """What ``thunder.jit`` returns for a module.

    It shares parameters, buffers and submodules with the original: ``state_dict`` has the same keys, ``to``, ``train``
    and ``load_state_dict`` act on the original, other attributes are looked up there and set there. Hooks belong to the
    original too, so they are part of what is compiled. Methods that the original's class overrides are the original's.
    """

    _own = ("_thunder_model", "_thunder_callable")

    def __init__(self, model: torch.nn.Module, compiled: Any) -> None:
        # nn.Module.__init__ is not run: this object has no parameters, buffers or hooks of its own.
        object.__setattr__(self, "_thunder_model", model)
        object.__setattr__(self, "_thunder_callable", compiled)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _get(self, "_thunder_callable")(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the compiled module; the same as calling it."""
        return _get(self, "_thunder_callable")(*args, **kwargs)

    def __getattribute__(self, name: str) -> Any:
        own = _get(self, "__dict__")
        if name in own:
            return own[name]
        model = own.get("_thunder_model")
        if model is None:
            return super().__getattribute__(name)
        # What nn.Module keeps in an instance's __dict__ (_parameters, training, hooks, ...) is the original's.
        if name == "__dict__":
            return model.__dict__
        if name in model.__dict__:
            return model.__dict__[name]
        if not name.startswith("__") and name not in ThunderModule.__dict__ and _overrides(type(model), name):
            return _returning(self, model, getattr(model, name))
        return super().__getattribute__(name)

    def __getattr__(self, name: str) -> Any:
        model = _get(self, "__dict__").get("_thunder_model")
        if model is None:
            raise AttributeError(name)
        return getattr(model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ThunderModule._own:
            object.__setattr__(self, name, value)
        else:
            setattr(self._thunder_model, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._thunder_model, name)

    def __dir__(self) -> list[str]:
        return sorted(set(super().__dir__()) | set(dir(self._thunder_model)))

    def __len__(self) -> int:
        return len(self._thunder_model)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._thunder_model)  # type: ignore[call-overload]

    def __getitem__(self, key: Any) -> Any:
        return self._thunder_model[key]  # type: ignore[index]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._thunder_model[key] = value  # type: ignore[index]

    def __delitem__(self, key: Any) -> None:
        del self._thunder_model[key]  # type: ignore[attr-defined]

    def __bool__(self) -> bool:
        return True

    def extra_repr(self) -> str:
        return "compiled by thunder"

    def _get_name(self) -> str:
        return f"ThunderModule({type(self._thunder_model).__name__})"

    def train(self, mode: bool = True) -> ThunderModule:
        """Set training mode on the original module."""
        self._thunder_model.train(mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> ThunderModule:
        self._thunder_model._apply(fn, recurse)
        return self

    def apply(self, fn: Callable[[torch.nn.Module], None]) -> ThunderModule:
        """Apply a function to the original and each of its submodules."""
        self._thunder_model.apply(fn)
        return self

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.nn.Module]]:
        """The original and its submodules by name."""
        return self._thunder_model.named_modules(*args, **kwargs)

    def requires_grad_(self, requires_grad: bool = True) -> ThunderModule:
        """Set requires_grad on the original's parameters."""
        self._thunder_model.requires_grad_(requires_grad)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The original's state dict: same keys, same tensors."""
        return self._thunder_model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load into the original module."""
        return self._thunder_model.load_state_dict(*args, **kwargs)

    def override(self, name: str, tensor: torch.Tensor) -> None:
        """Put another parameter or buffer in the place of one: for ``Transform.transform_module``.

        A transform that changes modules gets a module tree of its own, so the user's module keeps its tensor.

        Args:
            name: dotted name of a parameter or buffer that is there.
            tensor: an ``nn.Parameter``, or for a buffer a tensor; shape, dtype and device are free. A plain tensor in
                the place of a parameter becomes a buffer of that name.

        Raises:
            AttributeError: there is no parameter or buffer of that name.
        """
        prefix, _, leaf = name.rpartition(".")
        owner = self._thunder_model.get_submodule(prefix)
        if leaf not in owner._parameters and leaf not in owner._buffers:
            raise AttributeError(f"{type(owner).__name__} {prefix!r} has no parameter or buffer {leaf!r}")
        place = owner._parameters if isinstance(tensor, torch.nn.Parameter) else owner._buffers
        if leaf in place:
            place[leaf] = tensor  # keeps the order, and whether a buffer is persistent
            return
        delattr(owner, leaf)
        register = owner.register_parameter if place is owner._parameters else owner.register_buffer
        register(leaf, tensor)

    def original_state_dict(self) -> dict[str, Any]:
        """A state dict for the module as it was before the transforms; each transform reverses what it did.

        Tensors that no transform touches are those of the module. Without transforms it is ``state_dict()``.

        Raises:
            TransformError: a transform failed.
        """
        transforms = self._thunder_callable._thunder_settings["transforms"][::-1]
        return self._through("reverse_transform_state_dict_for_submodule", transforms, dict(self.state_dict()))

    def load_original_state_dict(
        self, state_dict: dict[str, Any], strict: bool = True
    ) -> torch.nn.modules.module._IncompatibleKeys:
        """Load a state dict of the module as it was before the transforms; each transform turns it into what it needs.

        Args:
            state_dict: as the original's ``state_dict()`` gives it; it is not changed.
            strict: as for ``load_state_dict``.

        Raises:
            TransformError: a transform failed.
            RuntimeError: keys or shapes do not fit, as for ``load_state_dict``.
        """
        transforms = self._thunder_callable._thunder_settings["transforms"]
        made = self._through("transform_state_dict_for_submodule", transforms, dict(state_dict))
        return self._thunder_model.load_state_dict(made, strict)

    def _through(self, hook: str, transforms: tuple[Any, ...], state_dict: dict[str, Any]) -> dict[str, Any]:
        """Each submodule's own part of a state dict through a hook of the transforms."""
        from thunder.transforms._base import run_hook

        for transform in transforms:
            made: dict[str, Any] = {}
            for name, _ in self._thunder_model.named_modules():
                prefix = name + "." if name else ""
                keys = [k for k in state_dict if k.startswith(prefix) and "." not in k[len(prefix) :]]
                part = {k[len(prefix) :]: state_dict.pop(k) for k in keys}
                part = run_hook(transform, hook, self, name, part)
                made.update({prefix + key: value for key, value in part.items()})
            state_dict = made | state_dict  # keys of no submodule are for load_state_dict to complain about
        return state_dict

    def _recompiled(self, model: torch.nn.Module) -> ThunderModule:
        from thunder._api import _compile

        return _compile(model, self._thunder_callable._thunder_settings, transformed=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> ThunderModule:
        result = self._recompiled(copy.deepcopy(self._thunder_model, memo))
        memo[id(self)] = result
        return result

    def __copy__(self) -> ThunderModule:
        return self._recompiled(copy.copy(self._thunder_model))

    def __reduce_ex__(self, protocol: Any) -> tuple:
        settings = dict(self._thunder_callable._thunder_settings)
        settings["executors"] = [executor.name for executor in settings["executors"]]
        return _unpickle, (self._thunder_model, settings)


def _hide_from_dynamo() -> None:
    """torch.compile calls a compiled module as it is, and compiles what is around it."""
    frames = torch._C._dynamo.eval_frame
    for function in (*vars(ThunderModule).values(), _overrides, _returning):
        if not inspect.isfunction(function):
            continue
        function._torchdynamo_disable = True  # type: ignore[attr-defined]
        if hasattr(frames, "set_code_exec_strategy"):
            skip = frames._FrameAction.SKIP
            frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))
        else:  # before torch 2.12
            frames.skip_code(function.__code__)


_hide_from_dynamo()


def _unpickle(model: torch.nn.Module, settings: dict[str, Any]) -> ThunderModule:
    from thunder._api import _compile
    from thunder.extend import resolve_executors

    return _compile(model, settings | {"executors": resolve_executors(settings["executors"])}, transformed=True)
