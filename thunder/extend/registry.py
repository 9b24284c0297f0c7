"""The executors that exist, and which of them are used when none are named."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from thunder.extend.executor import Executor, OperatorExecutor, torch_version

pytorch_executor = Executor("torch", version=torch_version())
python_executor = OperatorExecutor("python")

_registry: dict[str, Executor] = {e.name: e for e in (pytorch_executor, python_executor)}
_default: list[Executor] = []
_always: list[Executor] = [pytorch_executor, python_executor]


def register_executor(executor: Executor) -> Executor:
    """Let users name an executor. One of the same name is replaced, in the lists of default and always executors too.

    Raises:
        TypeError: it is no executor.
        ValueError: ``torch`` and ``python`` stay what they are.
    """
    if not isinstance(executor, Executor):
        raise TypeError(f"an executor derives from thunder.extend.Executor, {type(executor).__name__} does not")
    if executor.name in ("torch", "python") and _registry[executor.name] is not executor:
        raise ValueError(f"the executor {executor.name!r} is built in and cannot be replaced")
    former = _registry.get(executor.name)
    _registry[executor.name] = executor
    for group in (_default, _always):
        group[:] = _distinct(executor if e is former else e for e in group)
    return executor


def deregister_executor(executor: Executor | str) -> None:
    """Forget an executor, in the lists of default and always executors too.

    Raises:
        LookupError: it is not registered, or there is none of that name.
        ValueError: ``torch`` and ``python`` stay.
    """
    found = _find(executor)
    if found in (pytorch_executor, python_executor):
        raise ValueError(f"the executor {found.name!r} is built in and cannot be removed")
    if _registry.get(found.name) is not found:
        raise LookupError(f"{found!r} is not registered")
    del _registry[found.name]
    for group in (_default, _always):
        if found in group:
            group.remove(found)


def get_all_executors() -> tuple[Executor, ...]:
    """Every registered executor."""
    return tuple(_registry.values())


def get_default_executors() -> tuple[Executor, ...]:
    """Executors that are used when none are named, before the always executors."""
    return tuple(_default)


def get_always_executors() -> tuple[Executor, ...]:
    """Executors that follow whatever the user named, so that every operation has somebody to run it."""
    return tuple(_always)


def set_default_executors(executors: Iterable[Executor | str]) -> None:
    """Replace the default executors."""
    _default[:] = _distinct(executors)


def add_default_executor(executor: Executor | str) -> None:
    """Put an executor before the other default ones."""
    _default[:] = _distinct([executor, *_default])


def remove_default_executor(executor: Executor | str) -> None:
    """Take an executor from the default ones; one that is not there is no error."""
    found = _find(executor)
    _default[:] = [e for e in _default if e is not found]


def set_always_executors(executors: Iterable[Executor | str]) -> None:
    """Replace the always executors; ``torch`` stays among them, at the end if it was not named."""
    _always[:] = _distinct([*executors, pytorch_executor])


def add_always_executor(executor: Executor | str) -> None:
    """Put an executor before the other always ones."""
    _always[:] = _distinct([executor, *_always])


def remove_always_executor(executor: Executor | str) -> None:
    """Take an executor from the always ones.

    Raises:
        ValueError: ``torch`` is needed for what nobody else runs.
    """
    found = _find(executor)
    if found is pytorch_executor:
        raise ValueError("the torch executor runs what nobody else does: it cannot be removed")
    _always[:] = [e for e in _always if e is not found]


def get_executor(name: str) -> Executor:
    """The executor of that name.

    Raises:
        LookupError: no such executor; the message lists the known ones.
        TypeError: it is no name.
    """
    if not isinstance(name, str):
        raise TypeError(f"the name of an executor is a str, not {type(name).__name__}")
    found = _registry.get(name)
    if found is None:
        near = difflib.get_close_matches(name, _registry, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise LookupError(f"no executor is called {name!r}; known are {', '.join(map(repr, _registry))}.{hint}")
    return found


def resolve_executors(executors: Sequence[Executor | str] | None) -> tuple[Executor, ...]:
    """Names and executors to executors, in order, followed by the always executors that are missing.

    Raises:
        LookupError: a name is unknown.
        TypeError: an item is neither a name nor an executor.
    """
    if isinstance(executors, str):
        raise TypeError(f"executors must be a list of names or executors: write executors=[{executors!r}]")
    if isinstance(executors, Executor):
        raise TypeError(f"executors must be a list of names or executors: write executors=[{executors!r}]")
    return add_executor_lists(_default if executors is None else executors, _always)


def add_executor_lists(*lists: Iterable[Executor | str] | None) -> tuple[Executor, ...]:
    """Several lists one after the other, each executor where it comes first."""
    return tuple(_distinct(e for group in lists for e in (group or ())))


def _find(executor: Any) -> Executor:
    if isinstance(executor, str):
        return get_executor(executor)
    if not isinstance(executor, Executor):
        raise TypeError(f"executors must be names or executors, not {type(executor).__name__}")
    return executor


def _distinct(executors: Iterable[Executor | str]) -> list[Executor]:
    return list(dict.fromkeys(_find(e) for e in executors))
