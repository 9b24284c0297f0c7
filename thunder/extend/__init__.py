"""Executors: who runs the operations of a trace."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from thunder._errors import KernelCompileError  # noqa: F401
from thunder.extend.cuda import cuda_kernel  # noqa: F401
from thunder.extend.triton import triton_kernel  # noqa: F401


class Executor:
    """Somebody who can run operations. ``torch`` and ``python`` are built in; both are always on.

    Args:
        name: by which users name it.
        version: of the library behind it, for reports.
    """

    def __init__(self, name: str, *, version: str | None = None) -> None:
        self.name = name
        self.version = version

    def __repr__(self) -> str:
        return f"thunder.extend.{type(self).__name__}({self.name!r})"


def _torch_version() -> str:
    import torch

    return torch.__version__


pytorch_executor = Executor("torch", version=_torch_version())
python_executor = Executor("python")

_registry: dict[str, Executor] = {e.name: e for e in (pytorch_executor, python_executor)}
_always: list[Executor] = [pytorch_executor, python_executor]


def get_all_executors() -> tuple[Executor, ...]:
    """Every registered executor."""
    return tuple(_registry.values())


def get_default_executors() -> tuple[Executor, ...]:
    """Executors that are used when none are named, before the always executors."""
    return ()


def get_always_executors() -> tuple[Executor, ...]:
    """Executors that follow whatever the user named, so that every operation has somebody to run it."""
    return tuple(_always)


def get_executor(name: str) -> Executor:
    """The executor of that name.

    Raises:
        LookupError: no such executor; the message lists the known ones.
    """
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
    chosen: list[Executor] = []
    for item in get_default_executors() if executors is None else executors:
        if isinstance(item, str):
            item = get_executor(item)
        if not isinstance(item, Executor):
            raise TypeError(f"executors must be names or executors, not {type(item).__name__}")
        if item not in chosen:
            chosen.append(item)
    chosen.extend(e for e in _always if e not in chosen)
    return tuple(chosen)
