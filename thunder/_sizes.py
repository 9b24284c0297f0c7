"""Sizes and ints that change from call to call, such as the length of a sequence: followed through a capture.

A size of an argument that differs from a former call is an ``Extent`` to the captured code: it passes for an int and
writes down what is computed of it. Where its value decides something (``if n > 1``), the decision becomes a condition
of the program; whatever else looks at it (``range(n)``, ``str(n)``) fixes it to the value that it has.

What is written down goes by number, in the order in which the program comes to know it::

    n = x.shape[1]          number 0: size 1 of x
    y = x.new_zeros(n + 1)  number 1: number 0 plus 1
    if n > 1:               number 2: number 0 greater than 1, which has to be true
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from types import CodeType
from typing import Any

import torch

from thunder._origin import THUNDER, TORCH, standard
from thunder._relevance import may_ask_for

OPERATIONS = (
    "size",
    "argument",
    "add",
    "sub",
    "mul",
    "floordiv",
    "mod",
    "neg",
    "abs",
    "lt",
    "le",
    "gt",
    "ge",
    "eq",
    "ne",
)
_LIMIT = 4000  # of numbers: what goes on beyond is no program that one wants to run
_LARGEST = 1 << 40


def _ours(path: str) -> bool:
    """Torch's, thunder's or Python's own."""
    return standard(path) or path.startswith((TORCH, THUNDER))


class Unfollowed(Exception):
    """What the code does with a size cannot be followed: it is captured for these sizes alone."""


class Sizes:
    """The sizes of one capture and what was computed of them.

    Attributes:
        values: of each number, in this capture.
        terms: of each number (operation, first, second, condition): an operand is an int, or the place of a number in a
            tuple of its own, ``(place,)``; a condition has to have the value that it has here.
        spoiled: why the sizes cannot be followed, or None.
    """

    def __init__(self) -> None:
        self.values: list[int] = []
        self.terms: list[tuple[int, Any, Any, bool]] = []
        self.spoiled: str | None = None
        self.open = True
        self._known: dict[tuple[Any, ...], int] = {}

    def spoil(self, why: str) -> None:
        if self.open and self.spoiled is None:
            self.spoiled = why

    def close(self, codes: Iterable[CodeType]) -> None:
        """The capture is over: extents that live on are as good as ints. codes: what has run."""
        for code in codes:
            if not _ours(code.co_filename) and may_ask_for(code, "int"):
                self.spoil(f"{code.co_name} may ask for its type")
        self.open = False

    def size(self, value: int, dimension: int, size: int) -> Extent:
        """Size ``dimension`` of value number ``value`` of the trace."""
        return Extent(self, self._place("size", value, dimension, size, False))

    def argument(self, value: int, number: int) -> Any:
        """An int among the arguments, or what counts as one."""
        if abs(value) > _LARGEST:
            self.spoil("an int is too large")
            return value
        return Extent(self, self._place("argument", number, 0, value, False))

    def _place(self, name: str, a: Any, b: Any, result: int, condition: bool) -> int:
        key = (name, a, b, condition)
        place = self._known.get(key)
        if place is not None:
            return place
        if len(self.values) >= _LIMIT or abs(result) > _LARGEST:
            self.spoil("there are too many numbers, or too large ones")
            raise Unfollowed
        self.values.append(result)
        self.terms.append((OPERATIONS.index(name), a, b, condition))
        self._known[key] = len(self.values) - 1
        return len(self.values) - 1

    def computed(self, name: str, result: int, a: Any, b: Any = 0) -> Any:
        """A result of arithmetic."""
        if not self.open:
            return result
        return Extent(self, self._place(name, self._operand(a), self._operand(b), result, False))

    def decided(self, name: str, result: bool, a: Any, b: Any) -> bool:
        """What a comparison said."""
        if self.open:
            self._place(name, self._operand(a), self._operand(b), int(result), True)
        return result

    def _operand(self, value: Any) -> Any:
        if isinstance(value, Extent):
            return (value.place,)
        if abs(value) >= 1 << 63:
            self.spoil("an int is too large")
            raise Unfollowed
        return int(value)

    def pin(self, extent: Extent) -> int:
        """Fix a number to its value."""
        value = extent.value
        self.decided("eq", True, extent, value)
        return value

    def product(self, sizes: Sequence[Any]) -> Any:
        result: Any = 1
        for size in sizes:
            result = result * size
        return result


class Extent(torch.SymInt):
    """An int of ``Sizes``. It is a ``SymInt`` so that ``torch.Size`` holds it."""

    def __init__(self, sizes: Sizes, place: int) -> None:
        self.sizes = sizes
        self.place = place
        self.value = sizes.values[place]

    @property
    def __class__(self) -> type:  # isinstance(n, int)
        return int

    @property
    def node(self) -> Any:
        self.sizes.spoil("torch looks into it")
        raise Unfollowed

    def __hash__(self) -> int:
        if self.sizes.open:
            self.sizes.spoil("it is the key of a dictionary or a cache")
            raise Unfollowed
        return hash(self.value)

    def _same(self) -> Extent:
        return self

    __pos__ = __trunc__ = __floor__ = __ceil__ = __copy__ = conjugate = _same
    real = numerator = property(_same)
    imag = 0
    denominator = 1

    def __deepcopy__(self, memo: Any) -> Extent:
        return self

    def __bool__(self) -> bool:
        return self.sizes.decided("ne", self.value != 0, self, 0)

    def __neg__(self) -> Any:
        return self.sizes.computed("neg", -self.value, self)

    def __abs__(self) -> Any:
        return self.sizes.computed("abs", abs(self.value), self)

    def __reduce__(self) -> Any:
        return int, (self.sizes.pin(self),)


def _whole(other: Any) -> bool:
    return type(other) in (int, bool, Extent)


def _foreign(other: Any) -> bool:
    """It would look at a size without asking it, or take it for no int; not so torch, and what is no number."""
    return not isinstance(other, (torch.Tensor, torch.SymInt, str, tuple, list, dict, type(None)))


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Extent) else value


def _tracked(name: str) -> None:
    function = getattr(operator, name)

    def forward(self: Extent, other: Any) -> Any:
        if not _whole(other):
            return function(self.sizes.pin(self), other) if _foreign(other) else NotImplemented
        return self.sizes.computed(name, function(self.value, _plain(other)), self, other)

    def backward(self: Extent, other: Any) -> Any:
        if not _whole(other):
            return function(other, self.sizes.pin(self)) if _foreign(other) else NotImplemented
        return self.sizes.computed(name, function(_plain(other), self.value), other, self)

    setattr(Extent, f"__{name}__", forward)
    setattr(Extent, f"__r{name}__", backward)


def _compared(name: str) -> None:
    function = getattr(operator, name)

    def compare(self: Extent, other: Any) -> Any:
        if not _whole(other):
            return function(self.sizes.pin(self), other) if _foreign(other) else NotImplemented
        return self.sizes.decided(name, function(self.value, _plain(other)), self, other)

    setattr(Extent, f"__{name}__", compare)


def _pinned(name: str) -> None:
    function = getattr(int, name)

    def look(self: Extent, *args: Any) -> Any:
        return function(self.sizes.pin(self), *map(_plain, args))

    setattr(Extent, name, look)


for _name in ("add", "sub", "mul", "floordiv", "mod"):
    _tracked(_name)
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    _compared(_name)
_CONVERT = "__index__ __int__ __float__ __round__ __str__ __repr__ __format__"
_METHODS = "bit_length bit_count to_bytes as_integer_ratio"
_ARITHMETIC = "truediv rtruediv pow rpow divmod rdivmod and rand or ror xor rxor lshift rlshift rshift rrshift invert"
for _name in (*_CONVERT.split(), *_METHODS.split(), *(f"__{_short}__" for _short in _ARITHMETIC.split())):
    _pinned(_name)
