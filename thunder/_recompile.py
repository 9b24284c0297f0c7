"""Why a callable was captured again: ``thunder.explain_recompile``."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import inspect
import types
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch

from thunder._errors import ThunderWarning

_KEPT = 64  # descriptions of calls
_SEARCHED = 200_000  # objects looked at for the name of one


@dataclasses.dataclass
class Recompile:
    """One capture after the first.

    Attributes:
        call: the number of the call, from 1.
        cause: what differed from the programs that were there, in words.
        by_value: a tensor had a value that no program was made for.
        unfollowed: why the program that was made is for these sizes and ints alone, where it was tried to make one for
            any; empty otherwise.
    """

    call: int
    cause: str
    by_value: bool = False
    unfollowed: str = ""

    def __str__(self) -> str:
        return self.cause + (f" (not for any sizes: {self.unfollowed})" if self.unfollowed else "")


@dataclasses.dataclass
class Recompiles:
    """What ``thunder.explain_recompile`` tells; ``str()`` is a report.

    Attributes:
        name: of the callable.
        recompiles: oldest first.
    """

    name: str
    recompiles: list[Recompile]

    def __str__(self) -> str:
        if not self.recompiles:
            return f"{self.name}: captured once at most"
        return "\n".join(
            [f"{self.name}: captured again {len(self.recompiles)} times"]
            + [f"  call {r.call}: {r}" for r in self.recompiles]
        )


class Log:
    """What a callable's captures were for. Holds descriptions, none of the caller's objects."""

    def __init__(self, fn: Callable, name: str, limit: int, quiet: bool = False) -> None:
        self.fn = fn
        self.name = name
        self.limit = limit
        self.quiet = quiet
        self.told = False
        self.recompiles: deque[Recompile] = deque(maxlen=1000)
        self.count = 0
        self.calls: deque[dict[str, str]] = deque(maxlen=_KEPT)

    def note(self, call: int, args: tuple[Any, ...], kwnames: tuple[str, ...] | None, cause: Any, values: Any) -> None:
        """A call is about to be captured.

        Args:
            call: its number.
            args, kwnames: its arguments, those by name last.
            cause: what made a program unfit whose arguments fit: (text, owner, key, before, after), or None.
            values: values of tensors that were met, or None.
        """
        now = dict(_describe_call(self.fn, args, kwnames))
        before = list(self.calls)
        self.calls.append(now)
        if not before:
            return
        if values is not None:
            text = f"a value of a tensor is {_short(values[-1])}, which no program was made for"
        else:
            text = self._of_guard(*cause) if cause else _nearest_difference(before, now)
        self.recompiles.append(Recompile(call, text, values is not None))
        self.count += values is None
        if self.count > self.limit and not self.told and not self.quiet:
            self.told = True
            warnings.warn(
                f"{self.name} was captured again {self.count} times, each for milliseconds; the last time because "
                f"{text}. thunder.explain_recompile lists all causes; recompile_limit moves this warning",
                ThunderWarning,
                stacklevel=2,
            )

    def unfollowed(self, error: BaseException) -> None:
        """The capture in progress could not be made for any sizes, because of ``error``."""
        if self.recompiles:
            text = str(error).splitlines()[0] if str(error) else "what is done with a size cannot be followed"
            self.recompiles[-1].unfollowed = (
                text if type(error).__name__ == "SizesChanged" else f"{type(error).__name__}: {text}"
            )

    def _of_guard(self, text: str, owner: Any, key: Any, before: Any, after: Any) -> str:
        place = None if owner is None else _place(self.fn, owner, key)
        if place is None:
            return text
        if text.startswith("a parameter or buffer changed"):
            return f"{place}{text.removeprefix('a parameter or buffer')}"
        if before is None and after is None and key is None:
            return f"{place} changed"
        if _plain(before) and _plain(after):
            return f"{place} went from {_short(before)} to {_short(after)}"
        return f"{place} is another {type(after if after is not None else before).__name__}"


# ---- arguments ----


def _describe_call(fn: Callable, args: tuple, kwnames: tuple | None) -> Iterator[tuple[str, str]]:
    yield "grad mode", "on" if torch.is_grad_enabled() else "off"
    yield "inference mode", "on" if torch.is_inference_mode_enabled() else "off"
    autocast = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    yield "autocast", ", ".join(f"{kind} {torch.get_autocast_dtype(kind)}" for kind in autocast) or "off"
    yield "default dtype", str(torch.get_default_dtype())
    named = len(kwnames or ())
    names = [*_parameter_names(fn, len(args) - named), *(kwnames or ())]
    yield "number of arguments", str(len(args))
    for name, value in zip(names, args, strict=True):
        yield from _describe(f"argument {name!r}" if name.isidentifier() else name, value, 0)


def _parameter_names(fn: Callable, count: int) -> list[str]:
    target = fn.forward if isinstance(fn, torch.nn.Module) else fn
    names: list[str] = []
    try:
        for p in inspect.signature(target).parameters.values():
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD):
                names.append(p.name)
    except (TypeError, ValueError):
        pass
    return (names + [f"argument {i}" for i in range(len(names), count)])[:count]


def _describe(place: str, value: Any, depth: int) -> Iterator[tuple[str, str]]:
    if isinstance(value, torch.Tensor):
        yield f"class of {place}", type(value).__name__
        quiet = torch._C.DisableTorchFunctionSubclass()  # a subclass may count what it is asked
        with quiet, contextlib.suppress(RuntimeError, NotImplementedError):  # nested ones have no such thing
            yield f"dtype of {place}", str(value.dtype)
            yield f"device of {place}", str(value.device)
            yield f"requires_grad of {place}", str(value.requires_grad)
            yield f"shape of {place}", str(tuple(value.shape))
            yield f"strides of {place}", str(value.stride())
    elif depth < 6 and isinstance(value, dict) and len(value) <= 1000:
        yield f"keys of {place}", _short(list(value))
        for key, item in value.items():
            yield from _describe(f"{place}[{key!r}]", item, depth + 1)
    elif depth < 6 and isinstance(value, (list, tuple)) and len(value) <= 1000:
        yield f"length of {place}", str(len(value))
        for i, item in enumerate(value):
            yield from _describe(f"{place}[{i}]", item, depth + 1)
    elif _plain(value):
        yield place, _short(value)
    else:
        yield f"class of {place}", type(value).__name__
        attributes = getattr(value, "__dict__", {}) if depth < 4 else {}
        for key, item in list(attributes.items())[:200]:
            if _plain(item) or isinstance(item, (torch.Tensor, list, tuple, dict)):
                yield from _describe(f"{place}.{key}", item, depth + 1)
        if not attributes:
            yield f"identity of {place}", hex(id(value))


def _nearest_difference(before: list[dict[str, str]], now: dict[str, str]) -> str:
    def differences(old: dict[str, str]) -> list[str]:
        keys = [k for k in {**now, **old} if now.get(k) != old.get(k)]
        return [f"{k} went from {old.get(k, 'nothing')} to {now.get(k, 'nothing')}" for k in keys]

    found = min((differences(old) for old in reversed(before)), key=len)
    if not found:
        return "arguments share memory in another way, or hold something that cannot be compared"
    found.sort(key=lambda text: text.startswith("strides of"))  # these follow from shapes
    return found[0] + (f", and {len(found) - 1} more" if len(found) > 1 else "")


# ---- names ----


_ATTRIBUTES = (".__dict__", "._parameters", "._buffers", "._modules")  # dictionaries that attributes live in


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _place(fn: Callable, owner: Any, key: Any) -> str | None:
    """What the user calls it: ``Net.layers.0.scale``, ``the global SCALE of train.py``."""
    if isinstance(owner, types.CellType):
        name = _variable(owner)
        return f"the variable {name!r} of an enclosing function" if name else None
    if isinstance(owner, dict) and "__builtins__" in owner:
        return f"the global {key!r} of {owner.get('__name__', '?')}"
    path = _path(fn, owner)
    if path is None:
        return None
    if key is None:
        return path
    for kind in _ATTRIBUTES:
        if isinstance(owner, dict) and path.endswith(kind):
            return f"{path.removesuffix(kind)}.{key}"
    return f"{path}[{key!r}]" if isinstance(owner, dict) else f"{path}.{key}"


def _variable(cell: types.CellType) -> str | None:
    for holder in gc.get_referrers(cell):
        if isinstance(holder, tuple):
            for f in gc.get_referrers(holder):
                if isinstance(f, types.FunctionType) and f.__closure__ is holder:
                    return next(n for n, c in zip(f.__code__.co_freevars, holder, strict=True) if c is cell)
    return None


def _parts(o: Any, path: str) -> Iterator[tuple[Any, str]]:
    if isinstance(o, torch.nn.Module):
        for name, child in o._modules.items():
            yield child, f"{path}.{name}"
        for kind in ("_parameters", "_buffers", "_modules"):
            yield o.__dict__.get(kind), f"{path}.{kind}"
    if isinstance(o, dict):
        for key, value in o.items():
            named = path.endswith(".__dict__") and isinstance(key, str)
            yield value, f"{path.removesuffix('.__dict__')}.{key}" if named else f"{path}[{key!r}]"
    elif isinstance(o, (list, tuple)):
        for i, value in enumerate(o):
            yield value, f"{path}[{i}]"
    elif isinstance(o, types.FunctionType):
        yield o.__defaults__, f"the defaults of {path}"
        for name, cell in zip(o.__code__.co_freevars, o.__closure__ or (), strict=True):
            try:
                yield cell.cell_contents, name
            except ValueError:
                continue
        for name in o.__code__.co_names:
            if name in o.__globals__:
                yield o.__globals__[name], name
    elif isinstance(o, types.MethodType):
        yield o.__self__, type(o.__self__).__name__
        yield o.__func__, path
    if isinstance(getattr(o, "__dict__", None), dict) and not isinstance(o, (type, types.ModuleType)):
        yield o.__dict__, f"{path}.__dict__"
    if isinstance(o, type) is False and not isinstance(o, (types.FunctionType, types.ModuleType)):
        yield type(o), type(o).__name__


def _path(fn: Callable, owner: Any) -> str | None:
    start = type(fn).__name__ if isinstance(fn, torch.nn.Module) else getattr(fn, "__name__", "the function")
    todo, seen = deque([(fn, start)]), {id(fn)}
    while todo and len(seen) < _SEARCHED:
        o, path = todo.popleft()
        if o is owner:
            return path
        if o is None or isinstance(o, (int, float, str, bytes, torch.Tensor)):
            continue
        for part, name in _parts(o, path):
            if id(part) not in seen:
                seen.add(id(part))
                todo.append((part, name))
    return None
