"""Numbers that change from call to call, such as a learning rate: followed through a capture.

An argument that is a float becomes a ``Number``, which is a float that writes down what is computed of it, and what it
was compared with: a call for which a comparison has another outcome is for another program. Whatever looks at its value
otherwise (``int()``, ``str()``) fixes it: the program is for that value then.
"""

from __future__ import annotations

import dis
import math
import operator
from collections.abc import Callable, Iterable
from types import CodeType
from typing import Any

from thunder._origin import THUNDER, TORCH
from thunder._relevance import may_ask_for

_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
_SIGNS = {"neg": "-", "pos": "+"}
_SYMBOLS = {"add": "+", "sub": "-", "mul": "*", "truediv": "/", "floordiv": "//", "mod": "%", "pow": "**"} | _SIGNS
# Code that mentions these may hand a number to C code that reads it without asking.
_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_MANY = 64  # comparisons: what makes more looks at a number in a loop
_READERS = frozenset(("np", "numpy", "struct", "decimal", "fractions", "ctypes"))


class Tape:
    """The numbers of one capture and what was computed of them.

    Attributes:
        values: of each number, in this capture.
        terms: for each number an argument's place, or (operation, operands); operands are other numbers' places, as
            ``Ref``, or constants.
        origins: for each number the arguments it depends on.
        fixed: arguments whose values were looked at.
        conditions: (comparison, operands, outcome), each once.
    """

    def __init__(self) -> None:
        self.values: list[float] = []
        self.terms: list[Any] = []
        self.origins: list[frozenset[int]] = []
        self.fixed: set[int] = set()
        self.count = 0
        self.conditions: dict[Any, tuple[str, Any, Any, bool]] = {}
        self._known: dict[Any, int] = {}  # the places of what has been computed: the same again has the same one

    def argument(self, value: float, number: int = 0) -> Number:
        """The next argument, or what counts as one."""
        self.count += 1
        return self._new(value, self.count - 1, frozenset((self.count - 1,)))

    def _new(self, value: float, term: Any, origins: frozenset[int]) -> Number:
        self.values.append(value)
        self.terms.append(term)
        self.origins.append(origins)
        return self._number(value, len(self.values) - 1)

    def _number(self, value: float, place: int) -> Number:
        number = Number(value)
        number._tape, number._place = self, place
        return number

    def computed(self, name: str, result: Any, *operands: Any) -> Any:
        """A result of arithmetic."""
        origins = frozenset().union(*(self.origins[o._place] for o in operands if isinstance(o, Number)))
        if type(result) is not float:  # a complex power
            self.fixed |= origins
            return result
        # not by functions of math, which look at numbers
        key = (name, *(o._place if isinstance(o, Number) else repr(o) for o in operands))
        if key in self._known:
            return self._number(result, self._known[key])
        terms = tuple(Ref(o._place) if isinstance(o, Number) else o for o in operands)
        self._known[key] = len(self.values)
        return self._new(result, (name, *terms), origins)

    def compared(self, name: str, outcome: bool, one: Number, other: Any) -> None:
        """A comparison decided something, perhaps."""
        key = (name, one._place, other._place if isinstance(other, Number) else repr(other))
        if len(self.conditions) >= _MANY and key not in self.conditions:
            for number in (one, other):
                self.fixed |= self.origins[number._place] if isinstance(number, Number) else frozenset()
            return
        right = Ref(other._place) if isinstance(other, Number) else other
        self.conditions[key] = (name, Ref(one._place), right, outcome)

    def holds(self, free: frozenset[int]) -> Callable[..., bool] | None:
        """Whether all comparisons of numbers that depend on these arguments come out as they did: of all arguments;
        ``None``: there were none."""
        texts = self.sources(frozenset(range(self.count)) - free)
        parts = []
        for name, one, other, outcome in self.conditions.values():
            places = [o.place for o in (one, other) if isinstance(o, Ref)]
            if not any(self.origins[place] & free for place in places):
                continue
            right = texts[other.place] if isinstance(other, Ref) else self._constant(other)
            parts.append(f"({texts[one.place]} {_COMPARISONS[name]} {right}) is {outcome}")
        return self._lambda(" and ".join(parts)) if parts else None

    def unseen(self, before: tuple[float, ...], known: frozenset[int]) -> frozenset[int]:
        """Arguments that may be any where a program is the same as that of a former capture, and has none as a literal.

        Args:
            before: the arguments of the former capture.
            known: arguments that may be any there.
        """
        now = [value for value, term in zip(self.values, self.terms, strict=True) if isinstance(term, int)]
        changed = {i for i in range(self.count) if _bits(now[i]) != _bits(before[i])}
        return frozenset(known | changed) - self.fixed

    def fix_all(self) -> None:
        """Something read numbers without asking them."""
        self.fixed |= set(range(self.count))

    def folded(self, place: int) -> None:
        """An operation with this number was run to see its result, a constant."""
        self.fixed |= self.origins[place]

    def ran(self, codes: Iterable[CodeType]) -> bool:
        """Code ran, which may read numbers without asking them. True: it may have taken them for no floats."""
        asked = False
        for code in codes:
            if code.co_filename.startswith((TORCH, THUNDER)):
                continue
            if _READERS & set(code.co_names) or _formats(code):
                self.fix_all()
            asked |= may_ask_for(code, "float")
        return asked

    def sources(self, pinned: frozenset[int] = frozenset()) -> list[str]:
        """Each number as an expression in a0, a1, ...; constants are c[i].

        Args:
            pinned: arguments that are constants.
        """
        texts: list[str] = []
        self.constants: list[Any] = []
        for value, term in zip(self.values, self.terms, strict=True):
            if isinstance(term, int):
                texts.append(self._constant(value) if term in pinned else f"a{term}")
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
        self, before: tuple[float, ...], literals: list[tuple[float, int]], known: frozenset[int]
    ) -> tuple[Callable[..., tuple[float, ...]], frozenset[int]] | None:
        """What gives the literals of a program at each call.

        Args:
            before: the arguments of a former capture, whose program is the same one but for these literals.
            literals: the value of each in that program, and its place among the numbers here; -1: it is none of them.
            known: arguments that may be any there.

        Returns:
            A function of all arguments, and which of them may be any, for the rest are constants; None when some
            literal is another number than it was there.
        """
        try:
            others = self._function(self.sources())(*before)
        except ArithmeticError:
            return None
        if any(place < 0 or isinstance(others[place], complex) or _bits(others[place]) != _bits(old)
               for old, place in literals):  # fmt: skip
            return None
        free = self.unseen(before, known).union(*(self.origins[place] for _, place in literals)) - self.fixed
        texts = self.sources(frozenset(range(self.count)) - free)
        return (self._function(texts[place] for _, place in literals), free) if free else None

    def _function(self, texts: Iterable[str]) -> Any:
        return self._lambda(f"({''.join(t + ', ' for t in texts)})")

    def _lambda(self, text: str) -> Any:
        names = ", ".join(f"a{i}" for i in range(self.count))
        return eval(f"lambda {names}: {text}", {"c": self.constants, "__builtins__": {"abs": abs}})


def _bits(value: float) -> tuple[float, float] | str:
    return "nan" if math.isnan(value) else (value, math.copysign(1.0, value))


def _formats(code: CodeType) -> bool:
    """``"%f" % s`` does not ask."""
    return any(isinstance(c, str) and "%" in c for c in code.co_consts) and any(
        i.opname == "BINARY_OP" and i.argrepr == "%" for i in dis.get_instructions(code)
    )


class Ref:
    """The place of a number on the tape."""

    def __init__(self, place: int) -> None:
        self.place = place


class Number(float):
    """A float of a tape."""

    _tape: Tape
    _place: int

    @property
    def __class__(self) -> type:
        return float

    @property
    def real(self) -> Number:
        return self


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


def _compares(name: str) -> None:
    function = getattr(operator, name)

    def compare(self: Number, other: Any) -> Any:
        if not _known(other):
            self._tape.fixed |= self._tape.origins[self._place]
            return getattr(float, f"__{name}__")(_plain(self), other)
        outcome = function(_plain(self), _plain(other))
        self._tape.compared(name, outcome, self, other)
        return outcome

    setattr(Number, f"__{name}__", compare)


def _truth(self: Number) -> bool:
    return self != 0


def _looks(name: str) -> None:
    function = getattr(float, name)

    def look(self: Number, *args: Any) -> Any:
        self._tape.fixed |= self._tape.origins[self._place]
        return function(_plain(self), *map(_plain, args))

    setattr(Number, name, look)


for _name in _BINARY:
    _binary(_name)
for _name in ("neg", "pos", "abs"):
    _unary(_name)
for _name in _COMPARISONS:
    _compares(_name)
Number.__bool__ = _truth  # type: ignore[method-assign, attr-defined]
_COMPARE = "__hash__"
_CONVERT = "__float__ __int__ __trunc__ __floor__ __ceil__ __round__ __divmod__ __rdivmod__ is_integer as_integer_ratio"
_WRITE = "__str__ __repr__ __format__ __getnewargs__ hex conjugate"
for _name in f"{_COMPARE} {_CONVERT} {_WRITE}".split():
    if hasattr(float, _name):
        _looks(_name)
