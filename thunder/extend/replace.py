"""Python functions of the user's whose calls are calls of an operator.

    executor.register_operator("norm", ..., replaces=library.norm)

A capture sees what a function does and not that it is called. So the code of the function becomes a stub, once and for
all: it asks whether a callable that has the executor is being captured in this thread, and calls the operator, or what
the function was. All who hold the function mean the stub, under whatever name.
"""

from __future__ import annotations

import inspect
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from thunder import _C
from thunder.extend.operator import Operator, dotted_name

_PLACE = "its name"  # in the constants of the stub
_replaced: dict[str, Replaced] = {}


def _stub(*args: Any, **kwargs: Any) -> Any:
    from thunder.extend import replace

    return replace.call("its name", args, kwargs)


class Replaced:
    """A function that operators stand for.

    Attributes:
        name: of the function, dotted.
        original: what it was.
        operators: executor -> the operator that stands for the function.
    """

    def __init__(self, name: str, original: Callable) -> None:
        self.name = name
        self.original = original
        self._here = threading.local()
        self.operators: weakref.WeakKeyDictionary[Any, Operator] = weakref.WeakKeyDictionary()

    def call(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The operator of the callable that is being captured, or what the function was."""
        claims = _C.capturing_for()
        inside = getattr(self._here, "inside", False)  # the shape rule of an operator that is like the function
        operator = None
        if claims is not None and not inside:
            operator = claims.stands_in(self, _differentiated(args, kwargs))
        if operator is None:
            return self.original(*args, **kwargs)
        self._here.inside = True
        try:
            return operator(*args, **kwargs)
        finally:
            self._here.inside = False


def _differentiated(args: tuple, kwargs: dict[str, Any]) -> bool:
    leaves = pytree.tree_leaves((args, kwargs)) if torch.is_grad_enabled() else ()
    return any(isinstance(a, torch.Tensor) and a.requires_grad for a in leaves)


def is_python(function: Any) -> bool:
    """Whether a capture would look into a function: those of torch are recorded as they are."""
    return isinstance(function, types.FunctionType) and function.__module__.partition(".")[0] != "torch"


def replace(function: types.FunctionType, executor: Any, operator: Operator) -> None:
    """Let ``operator`` stand for ``function`` where ``executor`` takes part.

    Raises:
        ValueError: the function has no importable name.
    """
    name = dotted_name(function)
    if name not in _replaced or _replaced[name].original is not function.__dict__.get("__wrapped__"):
        _replaced[name] = _install(function, name)
    _replaced[name].operators[executor] = operator


def call(name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What the stub of a function does; torch.compile looks into what the function was."""
    if torch.compiler.is_dynamo_compiling():
        return _replaced[name].original(*args, **kwargs)
    return _replaced[name].call(args, kwargs)


def _install(function: types.FunctionType, name: str) -> Replaced:
    code = function.__code__
    original = types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    original.__kwdefaults__ = function.__kwdefaults__
    original.__qualname__, original.__module__ = function.__qualname__, function.__module__
    function.__signature__ = inspect.signature(function)
    function.__wrapped__ = original
    function.__code__ = _stub.__code__.replace(
        co_consts=tuple(name if c == _PLACE else c for c in _stub.__code__.co_consts),
        co_freevars=code.co_freevars,
        co_filename=code.co_filename,
        co_firstlineno=code.co_firstlineno,
        co_name=code.co_name,
        co_qualname=code.co_qualname,
    )
    return Replaced(name, original)
