"""Numbers that change from call to call, such as a learning rate: followed through a capture.

An argument that is a float becomes a ``Number``, which is a float that writes down what is computed of it. Whatever
looks at its value otherwise (a comparison, ``int()``, ``str()``) fixes it: the program is for that value then.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from types import CodeType
from typing import Any

from thunder._origin import TORCH

_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
_SIGNS = {"neg": "-", "pos": "+"}
_SYMBOLS = {"add": "+", "sub": "-", "mul": "*", "truediv": "/", "floordiv": "//", "mod": "%", "pow": "**"} | _SIGNS
# Code that mentions these may hand a number to C code that reads it without asking.
_READERS = frozenset(("np", "numpy", "struct", "decimal", "fractions", "ctypes"))


class Tape:
    """The numbers of one capture and what was computed of them.

    Attributes:
        values: of each number, in this capture.
        terms: for each number an argument's place, or (operation, operands); operands are other numbers' places, as
            ``Ref``, or constants.
        origins: for each number the arguments it depends on.
        fixed: arguments whose values were looked at.
    """

    def __init__(self) -> None:
        self.values: list[float] = []
        self.terms: list[Any] = []
        self.origins: list[frozenset[int]] = []
        self.fixed: set[int] = set()
        self.count = 0

    def argument(self, value: float, number: int = 0) -> Number:
        """The next argument, or what counts as one."""
        self.count += 1
        return self._new(value, self.count - 1, frozenset((self.count - 1,)))

    def _new(self, value: float, term: Any, origins: frozenset[int]) -> Number:
        number = Number(value)
        number._tape, number._place = self, len(self.values)
        self.values.append(value)
        self.terms.append(term)
        self.origins.append(origins)
        return number

    def computed(self, name: str, result: Any, *operands: Any) -> Any:
        """A result of arithmetic."""
        origins = frozenset().union(*(self.origins[o._place] for o in operands if isinstance(o, Number)))
        if type(result) is not float:  # a complex power
            self.fixed |= origins
            return result
        terms = tuple(Ref(o._place) if isinstance(o, Number) else o for o in operands)
        return self._new(result, (name, *terms), origins)

    def unseen(self) -> frozenset[int]:
        """Arguments that nothing looked at."""
        return frozenset(range(self.count)) - self.fixed

    def fix_all(self) -> None:
        """Something read numbers without asking them."""
        self.fixed |= set(range(self.count))

    def ran(self, codes: Iterable[CodeType]) -> None:
        """Code ran: some of it may have read numbers without asking them."""
        for code in codes:
            if _READERS & set(code.co_names) and not code.co_filename.startswith(TORCH):
                self.fix_all()

    def sources(self) -> list[str]:
        """Each number as an expression in a0, a1, ...; constants are c[i]."""
        texts: list[str] = []
        self.constants: list[Any] = []
        for term in self.terms:
            if isinstance(term, int):
                texts.append(f"a{term}")
                continue
            operands = [texts[t.place] if isinstance(t, Ref) else self._constant(t) for t in term[1:]]
            symbol = _SYMBOLS.get(term[0])
            if len(operands) == 1:
                texts.append(f"({symbol}{operands[0]})" if symbol else f"abs({operands[0]})")
            else:
                texts.append(f"({operands[0]} {symbol} {operands[1]})")
        return texts

    def _constant(self, value: Any) -> str:
        self.constants.append(value)
        return f"c[{len(self.constants) - 1}]"

    def formula(
        self, before: tuple[float, ...], pairs: list[tuple[float, float]]
    ) -> tuple[Callable[..., tuple[float, ...]], frozenset[int]] | None:
        """What gives the numbers of a program at each call.

        Args:
            before: the arguments of the other program.
            pairs: for each number that differs: its value in the other program, and in this one.

        Returns:
            A function of all arguments, and which of them it is of; None when some number does not follow from them.
        """
        texts, names = self.sources(), ", ".join(f"a{i}" for i in range(self.count))
        space = {"c": self.constants, "__builtins__": {"abs": abs}}
        try:
            others = eval(f"lambda {names}: ({''.join(t + ', ' for t in texts)})", space)(*before)
        except ArithmeticError:
            return None
        chosen, free = [], frozenset[int]()
        for old, new in pairs:
            found = [
                (f"({sign}{text})", origins)
                for text, origins, a, b in zip(texts, self.origins, others, self.values, strict=True)
                for sign, factor in (("", 1.0), ("-", -1.0))
                if _bits(factor * a) == _bits(old) and _bits(factor * b) == _bits(new)
            ]
            if not found or len({origins for _, origins in found}) != 1 or found[0][1] & self.fixed:
                return None
            chosen.append(found[0][0])
            free |= found[0][1]
        return eval(f"lambda {names}: ({''.join(t + ', ' for t in chosen)})", space), free


def _bits(value: float) -> tuple[float, float] | str:
    return "nan" if math.isnan(value) else (value, math.copysign(1.0, value))


class Ref:
    """The place of a number on the tape."""

    def __init__(self, place: int) -> None:
        self.place = place


class Number(float):
    """A float of a tape."""

    _tape: Tape
    _place: int


def _known(other: Any) -> bool:
    return type(other) in (float, int, Number)


def _plain(value: Any) -> Any:
    return float.__float__(value) if isinstance(value, Number) else value


def _binary(name: str) -> None:
    function = getattr(operator, name)

    def forward(self: Number, other: Any) -> Any:
        if not _known(other):
            return NotImplemented
        return self._tape.computed(name, function(_plain(self), _plain(other)), self, other)

    def backward(self: Number, other: Any) -> Any:
        if not _known(other):
            return NotImplemented
        return self._tape.computed(name, function(_plain(other), _plain(self)), other, self)

    setattr(Number, f"__{name}__", forward)
    setattr(Number, f"__r{name}__", backward)


def _unary(name: str) -> None:
    function = getattr(operator, name)
    setattr(Number, f"__{name}__", lambda self: self._tape.computed(name, function(_plain(self)), self))


def _looks(name: str) -> None:
    function = getattr(float, name)

    def look(self: Number, *args: Any) -> Any:
        self._tape.fixed |= self._tape.origins[self._place]
        return function(_plain(self), *map(_plain, args))

    setattr(Number, name, look)


for _name in _BINARY:
    _binary(_name)
_COMPARE = "__eq__ __ne__ __lt__ __le__ __gt__ __ge__ __hash__ __bool__"
_CONVERT = "__float__ __int__ __trunc__ __floor__ __ceil__ __round__ __divmod__ __rdivmod__ is_integer as_integer_ratio"
_WRITE = "__str__ __repr__ __format__ __getnewargs__ hex conjugate"
for _name in f"{_COMPARE} {_CONVERT} {_WRITE}".split():
    if hasattr(float, _name):
        _looks(_name)
