"""Regions that are equal but for sizes, and code for all of them.

The second region of such a family says which numbers of the text vary. Those that are sizes of inputs become symbols,
the others follow from them: ``n``, ``n + 1``, ``64 * n``. Whether a third region is of that form is computed, not
assumed: with its sizes put in, every number of its text has to come out.
"""

from __future__ import annotations

import io
import re
import tokenize
from typing import Any, NamedTuple

_INTEGER = re.compile(r"\d+")
_ALIAS = re.compile(r"; alias \d+")


class Number(NamedTuple):
    """What a number of the text is: ``factor`` times size ``dim`` of input ``input``, and ``rest``."""

    input: int
    dim: int
    factor: int
    rest: int

    def at(self, shapes: list[tuple[int, ...]]) -> int:
        return self.factor * shapes[self.input][self.dim] + self.rest


class Text:
    """The text of a region, apart from its numbers and the names of its values.

    Attributes:
        skeleton: equal for regions of one family.
        numbers: the numbers, in order.
        shapes: of the inputs.
    """

    def __init__(self, trace: Any) -> None:
        self.trace = trace
        self.shapes = [tuple(p.shape) for p in trace.inputs]
        self.numbers: list[int] = []
        self._places: list[tuple[int, int, int, int] | None] = []  # line, from, to; None: in the type of a value
        names: dict[str, int] = {}
        skeleton: list[Any] = []
        text = str(trace)
        self._lines = text.splitlines()
        defined = set(re.findall(r'(\w+): "', text)) | {p.name for p in (*trace.inputs, *trace.output)}
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type in (tokenize.COMMENT, tokenize.NL):
                continue
            if token.type == tokenize.NUMBER and token.string.isdigit():
                self._add(int(token.string), (token.start[0] - 1, token.start[1], token.end[1]))
                skeleton.append(0)
            elif token.type == tokenize.STRING and token.string.startswith('"') and "[" in token.string:
                kind = _ALIAS.sub("", token.string)
                at = kind.index("[")
                for number in _INTEGER.findall(kind[at:]):
                    self._add(int(number), None)
                skeleton.append(kind[:at] + _INTEGER.sub("0", kind[at:]))
            elif token.type == tokenize.NAME and token.string in defined:
                skeleton.append(names.setdefault(token.string, len(names) + 1))
            else:
                skeleton.append(token.string)
        self.skeleton = tuple(skeleton)

    def _add(self, number: int, place: Any) -> None:
        self.numbers.append(number)
        self._places.append(place)

    def generalised(self, numbers: dict[int, Number]) -> str:
        """The text with sizes of its inputs in the place of numbers that follow from them."""
        lines = list(self._lines)
        for i in sorted(numbers, reverse=True):
            if self._places[i] is not None:
                line, start, end = self._places[i]
                n = numbers[i]
                size = f"({n.factor} * {self.trace.inputs[n.input].name}.shape[{n.dim}] + {n.rest})"
                lines[line] = lines[line][:start] + size + lines[line][end:]
        return "\n".join(lines) + "\n"


class Form(NamedTuple):
    """What the regions of a family have in common.

    Attributes:
        text: of the region that code was generated from.
        numbers: those that vary, by place.
        free: sizes of inputs that vary: {(input, dim): the first one that always equals it}.
    """

    text: Text
    numbers: dict[int, Number]
    free: dict[tuple[int, int], tuple[int, int]]

    def fits(self, other: Text) -> bool:
        """Is that region of this form?"""
        if any(s < 2 for (i, d) in self.free for s in [other.shapes[i][d]]):
            return False  # of sizes 0 and 1 code is other code
        if any(other.shapes[i][d] != other.shapes[j][e] for (i, d), (j, e) in self.free.items()):
            return False
        for at, (mine, theirs) in enumerate(zip(self.text.numbers, other.numbers, strict=True)):
            number = self.numbers.get(at)
            if theirs != (mine if number is None else number.at(other.shapes)):
                return False
        return True


def form_of(a: Text, b: Text) -> Form | None:
    """The form of two regions of a family, or None: no sizes of inputs explain the differences."""
    firsts: dict[tuple[int, int], tuple[int, int]] = {}
    free: dict[tuple[int, int], tuple[int, int]] = {}
    for i, (there, here) in enumerate(zip(a.shapes, b.shapes, strict=True)):
        for d, (m, n) in enumerate(zip(there, here, strict=True)):
            if m != n:
                free[i, d] = firsts.setdefault((m, n), (i, d))
    if len({n for _, n in firsts}) != len(firsts):
        return None  # sizes that are equal here only would become one
    numbers: dict[int, Number] = {}
    for at, (m, n) in enumerate(zip(a.numbers, b.numbers, strict=True)):
        if m != n:
            found = _explain(m, n, firsts)
            if found is None:
                return None
            numbers[at] = found
    form = Form(b, numbers, free)
    return form if firsts and form.fits(a) and form.fits(b) else None


def _explain(m: int, n: int, firsts: dict[tuple[int, int], tuple[int, int]]) -> Number | None:
    """A number that is m there and n here: a size, a multiple of one, or one and a constant, in that order."""
    best: tuple[int, Number] | None = None
    for (p, q), (i, d) in firsts.items():
        if (n - m) % (q - p):
            continue
        factor = (n - m) // (q - p)
        number = Number(i, d, factor, n - factor * q)
        cost = (factor != 1) + 2 * (number.rest != 0)
        if factor > 0 and (best is None or cost < best[0]):
            best = cost, number
    return best and best[1]
