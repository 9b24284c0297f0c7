"""``torch.optim`` while it is captured.

Its steps count in a tensor. In eager they take the number out of it and go on in Python's floats; while something
compiles them they stay with the tensor, whose float32 loses half of the digits of ``1 - 0.999**step``. A capture goes
on with it as a float64 tensor: arithmetic as in Python, and a program that holds for every step. Where no executor
could fuse it, that would take longer than eager's floats, and the step is refused.
"""

from __future__ import annotations

import sys
from types import FunctionType
from typing import Any

import torch


def _in_double(x: Any) -> Any:  # in the place of torch.optim.optimizer._get_value: with its globals
    return x.double() if isinstance(x, torch.Tensor) else x


def value_function() -> tuple[FunctionType, Any] | None:
    """torch's function and the code that it has during a capture; ``None``: this torch has none like it."""
    found = getattr(sys.modules.get("torch.optim.optimizer"), "_get_value", None)
    if not isinstance(found, FunctionType) or found.__code__.co_varnames != ("x",) or found.__closure__:
        return None
    return found, _in_double.__code__
