"""Operations that compute each element by itself, as C expressions.

A rule is called like the operator; its tensors are names of C variables, its numbers are ``Number``, which prints as a
C literal. A call that it cannot be called with, or for which it gives None, is declined.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from thunder.extend.executor import operator_key


class Decline(Exception):
    """Not this call; the message says why."""


class Number(float):
    """A number that prints as a C literal of type float."""

    def __format__(self, spec: str) -> str:
        if math.isnan(self):
            return "NAN"
        if math.isinf(self):
            return "INFINITY" if self > 0 else "(-INFINITY)"
        return f"({float(self)!r}f)"

    __str__ = __repr__ = lambda self: format(self)


def _clamp(x: str, min: Any = None, max: Any = None) -> str | None:
    if isinstance(min, str) or isinstance(max, str) or (min is None and max is None):
        return None
    low = x if min is None else f"({x} < {min} ? {min} : {x})"  # NaN stays NaN
    return low if max is None else f"({low} > {max} ? {max} : {low})"


def _gelu(x: str, *, approximate: str = "none") -> str:
    if approximate == "tanh":
        return f"0.5f * {x} * (1 + {_inner_tanh(x)})"
    return f"0.5f * {x} * (1 + erf({x} * 0.70710678f))"


def _inner_tanh(x: str) -> str:
    return f"tanh(0.7978845608f * ({x} + 0.044715f * {x} * {x} * {x}))"


def _gelu_backward(g: str, x: str, *, approximate: str = "none") -> str:
    if approximate == "tanh":
        t, slope = _inner_tanh(x), f"0.7978845608f * (1 + 0.134145f * {x} * {x})"
        return f"{g} * (0.5f * (1 + {t}) + 0.5f * {x} * (1 - {t} * {t}) * {slope})"
    return f"{g} * (0.5f * (1 + erf({x} * 0.70710678f)) + {x} * 0.39894228f * exp(-0.5f * {x} * {x}))"


_RULES: dict[str, Callable[..., str | None]] = {
    "add": lambda x, y, *, alpha=1: f"{x} + {y}" if alpha == 1 else f"{x} + {Number(alpha)} * {y}",
    "sub": lambda x, y, *, alpha=1: f"{x} - {Number(alpha)} * {y}",
    "rsub": lambda x, y, alpha=1: f"{y} - {Number(alpha)} * {x}",
    "mul": lambda x, y: f"{x} * {y}",
    "div": lambda x, y, *, rounding_mode=None: None if rounding_mode else f"{x} / {y}",
    "rdiv": lambda x, y: f"{y} / {x}",
    "pow": lambda x, y: f"{x} * {x}" if isinstance(y, Number) and y == 2 else f"pow({x}, {y})",
    "rpow": lambda x, y: f"pow({y}, {x})",
    "maximum": lambda x, y: f"isnan({x}) || {x} > {y} ? {x} : {y}",
    "minimum": lambda x, y: f"isnan({x}) || {x} < {y} ? {x} : {y}",
    "where": lambda c, x, y: f"{c} ? {x} : {y}" if isinstance(c, str) else None,
    "addcmul": lambda x, a, b, *, value=1: f"{x} + {Number(value)} * {a} * {b}",
    "addcdiv": lambda x, a, b, *, value=1: f"{x} + {Number(value)} * {a} / {b}",
    "clamp": _clamp,
    "neg": lambda x: f"-{x}",
    "abs": lambda x: f"fabs({x})",
    "sign": lambda x: f"(float)(({x} > 0) - ({x} < 0))",
    "square": lambda x: f"{x} * {x}",
    "reciprocal": lambda x: f"1 / {x}",
    "torch.relu": lambda x: f"{x} < 0 ? 0 : {x}",
    "torch.nn.functional.relu": lambda x, inplace=False: None if inplace else f"{x} < 0 ? 0 : {x}",
    "silu": lambda x, inplace=False: None if inplace else f"{x} / (1 + exp(-{x}))",
    "sigmoid": lambda x: f"1 / (1 + exp(-{x}))",
    "gelu": _gelu,
    "torch.ops.aten.gelu_backward.default": _gelu_backward,
    "torch.ops.aten.threshold_backward.default": lambda g, x, threshold: f"{x} <= {threshold} ? 0 : {g}",
    "torch.ops.aten.sigmoid_backward.default": lambda g, y: f"{g} * {y} * (1 - {y})",
    "torch.ops.aten.tanh_backward.default": lambda g, y: f"{g} * (1 - {y} * {y})",
    "torch.ops.aten.silu_backward.default": lambda g, x: (
        f"{g} / (1 + exp(-{x})) * (1 + {x} * (1 - 1 / (1 + exp(-{x}))))"
    ),
}
for _key, _sign in {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}.items():
    _RULES[_key] = lambda x, y, sign=_sign: f"{x} {sign} {y}"
for _key in ("exp", "exp2", "expm1", "log", "log2", "log1p", "sqrt", "rsqrt", "sin", "cos", "tanh", "erf"):
    _RULES[_key] = lambda x, fn=_key: f"{fn}({x})"

RULES = {operator_key(key): rule for key, rule in _RULES.items()}


def expression(key: str, names: Iterator[str], args: tuple, kwargs: dict[str, Any], is_tensor: Callable) -> str:
    """The expression of a call; ``names`` gives the C variables of its tensors in order.

    Raises:
        Decline: the rule does not know this call.
    """

    def plain(a: Any) -> Any:
        if is_tensor(a):
            return next(names)
        if a is not None and not isinstance(a, (bool, int, float, str)):
            raise Decline("an argument that is neither a tensor nor a real number")
        return Number(a) if isinstance(a, (int, float)) and not isinstance(a, bool) else a

    try:
        made = RULES[key](*(plain(a) for a in args), **{k: plain(a) for k, a in kwargs.items()})
    except TypeError as error:
        raise Decline(f"called in a way that it does not know: {error}") from None
    if made is None:
        raise Decline("an option that it does not know")
    return made
