"""``thunder.examine``: what of a model is supported, who would run it, and whether the results are right.

::

    report = thunder.examine(model)(*args, **kwargs)

    from thunder.examine import examine
    report = examine(model, *args, **kwargs)

Both print a table and return a ``Report``. The model is copied: its parameters, buffers and gradients stay as they are.
"""

from __future__ import annotations

import sys
import types
from typing import Any

from thunder.examine.inspect import Examination
from thunder.examine.report import Comparison, Operation, Report, Unsupported

__all__ = ["Comparison", "Operation", "Report", "Unsupported", "examine"]


def examine(fn: Any, *args: Any, executors: Any = None, show: bool = True, **kwargs: Any) -> Any:
    """Examine a callable or module.

    Args:
        fn: an ``nn.Module`` or another callable of PyTorch code.
        args, kwargs: those of a call. Without any, a function is returned that takes them.
        executors: as for ``thunder.jit``.
        show: print the report.

    Returns:
        a ``Report``, or without arguments a function that makes one.
    """
    examination = Examination(fn, executors=executors, show=show)
    return examination(*args, **kwargs) if args or kwargs else examination


class _CallableModule(types.ModuleType):
    """``thunder.examine`` is the module and the function in one."""

    def __call__(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        return examine(fn, *args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
