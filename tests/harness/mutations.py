"""Changes of a model that a compiled callable has to see: every attribute of every module, one at a time.

for change in mutations(model):
    undo = change.apply()       # None: nothing to change
    ...
    undo()
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Undo = Callable[[], None]
MAX_DEPTH = 4
# What nn.Module keeps for itself: its parts are changed one by one.
OWN = frozenset(vars(nn.Module())) - {"training"}


@dataclass(frozen=True)
class Mutation:
    name: str
    apply: Callable[[], Undo | None]


def mutations(model: nn.Module) -> Iterator[Mutation]:
    """All of them, in a fixed order; an object or tensor that is found in several places is changed in the first."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        where = name or "model"
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield from _of_parameter(f"{where}.{key}", module, key)
        for key, buffer in module._buffers.items():
            if buffer is not None and id(buffer) not in seen:
                seen.add(id(buffer))
                yield from _of_buffer(f"{where}.{key}", module, key)
        for key in list(module._modules):
            yield Mutation(f"{where}.{key} = Identity()", _item(module._modules, key, nn.Identity()))
        yield Mutation(f"{where}: forward hook", lambda m=module: m.register_forward_hook(_scale).remove)
        yield Mutation(f"{where}: forward pre-hook", lambda m=module: m.register_forward_pre_hook(_scale_inputs).remove)
        yield from _of_attributes(where, vars(module), seen, 0, skip=OWN)


# ---- tensors ----


def _of_parameter(where: str, module: nn.Module, key: str) -> Iterator[Mutation]:
    parameter = module._parameters[key]
    yield Mutation(f"{where}.add_", _in_place(parameter))
    yield Mutation(f"{where}.requires_grad", _flag(parameter))
    yield Mutation(f"{where} replaced", _item(module._parameters, key, nn.Parameter(_other(parameter))))
    if parameter.is_floating_point():
        yield Mutation(f"{where}.double()", _data(parameter, parameter.detach().double()))


def _of_buffer(where: str, module: nn.Module, key: str) -> Iterator[Mutation]:
    buffer = module._buffers[key]
    yield Mutation(f"{where}.add_", _in_place(buffer))
    yield Mutation(f"{where} replaced", _item(module._buffers, key, _other(buffer)))


def _other(tensor: torch.Tensor) -> torch.Tensor:
    plain = tensor.detach()
    return plain * 1.5 + 0.25 if plain.is_floating_point() or plain.is_complex() else plain.flip(-1)


def _in_place(tensor: torch.Tensor) -> Callable[[], Undo]:
    def apply() -> Undo:
        before = tensor.detach().clone()
        with torch.no_grad():
            tensor.copy_(_other(tensor).clone())

        def undo() -> None:
            with torch.no_grad():
                tensor.copy_(before)

        return undo

    return apply


def _flag(tensor: torch.Tensor) -> Callable[[], Undo]:
    def apply() -> Undo:
        before = tensor.requires_grad
        tensor.requires_grad_(not before)

        def undo() -> None:
            tensor.requires_grad_(before)

        return undo

    return apply


def _data(tensor: torch.Tensor, data: torch.Tensor) -> Callable[[], Undo]:
    def apply() -> Undo:
        before = tensor.data
        tensor.data = data

        def undo() -> None:
            tensor.data = before

        return undo

    return apply


# ---- attributes ----


def _item(owner: Any, key: Any, value: Any) -> Callable[[], Undo]:
    def apply() -> Undo:
        before = owner[key]
        owner[key] = value

        def undo() -> None:
            owner[key] = before

        return undo

    return apply


def _removed(owner: dict[Any, Any], key: Any) -> Callable[[], Undo]:
    def apply() -> Undo:
        before = dict(owner)
        del owner[key]

        def undo() -> None:
            owner.clear()
            owner.update(before)

        return undo

    return apply


def _appended(owner: list[Any]) -> Callable[[], Undo]:
    def apply() -> Undo:
        owner.append(owner[0])

        def undo() -> None:
            owner.pop()

        return undo

    return apply


def _of_attributes(
    where: str, attributes: Any, seen: set[int], depth: int, skip: frozenset[str] = frozenset()
) -> Iterator[Mutation]:
    """The values of a dictionary or list of attributes, and what is inside them."""
    keys = list(attributes) if isinstance(attributes, dict) else range(len(attributes))
    for key in keys:
        if key in skip:
            continue
        name, value = f"{where}.{key}", attributes[key]
        for other in _others(value):
            yield Mutation(f"{name} = {other!r}", _item(attributes, key, other))
        if isinstance(value, torch.Tensor) and id(value) not in seen:
            seen.add(id(value))
            yield Mutation(f"{name}.add_", _in_place(value))
        if depth < MAX_DEPTH and id(value) not in seen:
            seen.add(id(value))
            yield from _inside(name, value, seen, depth + 1)


def _inside(name: str, value: Any, seen: set[int], depth: int) -> Iterator[Mutation]:
    if isinstance(value, dict) and value:
        yield Mutation(f"del {name}[...]", _removed(value, next(iter(value))))
    if isinstance(value, list) and value:
        yield Mutation(f"{name}.append", _appended(value))
    if isinstance(value, dict | list):
        yield from _of_attributes(name, value, seen, depth)
    elif hasattr(value, "__dict__") and not isinstance(value, type | nn.Module | torch.Tensor) and not callable(value):
        yield from _of_attributes(name, vars(value), seen, depth)


def _others(value: Any) -> list[Any]:
    """Values of the same type, or what a user may write in its place."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, 0]
    if isinstance(value, float):
        return [value * 1.5 + 0.25, -0.0]
    if isinstance(value, str):
        return [f"{value}_"]
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return [torch.float64]
    if isinstance(value, tuple) and value and isinstance(value[0], int | float):
        return [(value[0] + 1, *value[1:])]
    return [1] if value is None else []


# ---- hooks ----


def _scale(module: nn.Module, args: Any, out: Any) -> Any:
    return out * 1.5 if isinstance(out, torch.Tensor) and out.is_floating_point() else out


def _scale_inputs(module: nn.Module, args: Any) -> Any:
    return tuple(a * 1.5 if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)
