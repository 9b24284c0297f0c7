"""What ``thunder.examine`` found: as data, as text, as JSON and as a page."""

from __future__ import annotations

import dataclasses
import html
import json
import sys
from pathlib import Path
from typing import Any


@dataclasses.dataclass
class Operation:
    """One distinct operation of the program.

    Attributes:
        name: dotted, such as ``torch.nn.functional.linear``.
        kind: ``"inference"``, ``"forward"`` or ``"backward"``.
        count: how many times the program has it.
        executor: who runs it.
        lines: the user's lines that it comes from, at most three.
        declines: (executor, reason) of those that know it and did not take it.
    """

    name: str
    kind: str
    count: int
    executor: str
    lines: tuple[str, ...] = ()
    declines: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass
class Unsupported:
    """Something that keeps the program from being compiled, or from being compiled with gradients.

    Attributes:
        construct: what; an operation's dotted name or a description.
        place: the user's file and line, ``""`` when unknown.
        reason, alternative: why, and what to write instead.
        certain: the capture ended here. Others of the list come after it in the program and may well be supported
            where their values are known.
    """

    construct: str
    place: str
    reason: str
    alternative: str
    certain: bool = True


@dataclasses.dataclass
class Comparison:
    """One tensor of the results or of the gradients, against eager and against float64.

    Attributes:
        name: ``"output 0"`` or ``"gradient of weight"``.
        dtype: of the tensor.
        difference: largest difference from eager; None where the forms differ.
        error, eager_error: largest differences of thunder and of eager from float64; None where that did not run.
        right: equal within what the dtype allows, or as near to float64 as eager is.
    """

    name: str
    dtype: str
    difference: float | None
    error: float | None
    eager_error: float | None
    right: bool

    @property
    def nearer(self) -> str:
        """Which side is nearer to float64: ``"thunder"``, ``"eager"``, ``"same"`` or ``"unknown"``."""
        if self.error is None or self.eager_error is None:
            return "unknown"
        if self.error == self.eager_error:
            return "same"
        return "thunder" if self.error < self.eager_error else "eager"


@dataclasses.dataclass
class Report:
    """The result of an examination.

    Attributes:
        name: of the callable.
        supported: the whole program is compiled, forward and, where gradients are needed, backward.
        verdict: one line.
        operations, unsupported, comparisons: the tables.
        notes: warnings that were given on the way.
        error: what eager itself raised, or None.
    """

    name: str
    supported: bool = False
    verdict: str = ""
    operations: list[Operation] = dataclasses.field(default_factory=list)
    unsupported: list[Unsupported] = dataclasses.field(default_factory=list)
    comparisons: list[Comparison] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    error: str | None = None

    @property
    def right(self) -> bool:
        """Supported, and everything compared is right."""
        return self.supported and all(c.right for c in self.comparisons)

    def to_dict(self) -> dict[str, Any]:
        """Everything, in plain types."""
        plain = dataclasses.asdict(self)
        for entry, comparison in zip(plain["comparisons"], self.comparisons, strict=True):
            entry["nearer"] = comparison.nearer
        return {**plain, "right": self.right}

    def to_json(self) -> str:
        """The same as JSON."""
        return json.dumps(self.to_dict(), indent=1)

    def save(self, path: str | Path) -> None:
        """Write the report: ``.html``, ``.json``, or text for any other name."""
        path = Path(path)
        text = {".html": self.to_html, ".json": self.to_json}.get(path.suffix, self.__str__)()
        path.write_text(text, encoding="utf-8")

    def tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """(title, column names, rows) of each table that has rows."""
        unsupported = [
            [u.construct if u.certain else f"({u.construct})", u.place, u.reason, u.alternative]
            for u in self.unsupported
        ]
        operations = [
            [
                o.name,
                o.kind,
                str(o.count),
                o.executor,
                ", ".join(o.lines),
                "; ".join(f"{e}: {reason}" for e, reason in o.declines),
            ]
            for o in self.operations
        ]
        comparisons = [
            [c.name, c.dtype, _number(c.difference), _number(c.error), _number(c.eager_error), c.nearer, _mark(c.right)]
            for c in self.comparisons
        ]
        all_tables = [
            ("Not supported", ["what", "where", "why", "instead"], unsupported),
            ("Operations", ["operation", "in", "times", "run by", "lines", "declined by"], operations),
            (
                "Compared",
                ["tensor", "dtype", "from eager", "from float64", "eager from float64", "nearer", "right"],
                comparisons,
            ),
        ]
        return [table for table in all_tables if table[2]]

    def __str__(self) -> str:
        return self.to_text()

    def to_text(self, *, colour: bool = False) -> str:
        """As a table for the terminal."""
        lines = [_paint(f"{self.name}: {self.verdict}", "32" if self.right else "31", colour)]
        for title, columns, rows in self.tables():
            widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
            lines += ["", _paint(title, "1", colour)]
            for row in [columns, *rows]:
                cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
                lines.append(("  " + "  ".join(cells)).rstrip())
        if self.notes:
            lines += ["", _paint("Notes", "1", colour), *(f"  {note}" for note in self.notes)]
        return "\n".join(lines)

    def to_html(self) -> str:
        """As a page of its own."""
        parts = [
            "<!doctype html><meta charset=utf-8><title>thunder.examine</title>",
            "<style>body{font-family:sans-serif}td,th{padding:2px 10px;text-align:left;border-bottom:1px solid #ccc}"
            "td:first-child{font-family:monospace}.bad{color:#b00}.good{color:#070}</style>",
            f"<h1>{html.escape(self.name)}</h1>",
            f'<p class="{"good" if self.right else "bad"}">{html.escape(self.verdict)}</p>',
        ]
        for title, columns, rows in self.tables():
            head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
            body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
            parts.append(f"<h2>{title}</h2><table><tr>{head}</tr>{body}</table>")
        if self.notes:
            parts.append("<h2>Notes</h2>" + "".join(f"<pre>{html.escape(n)}</pre>" for n in self.notes))
        return "\n".join(parts)

    def show(self) -> None:
        """Print it, with colours on a terminal."""
        print(self.to_text(colour=sys.stdout.isatty()))


def _paint(text: str, code: str, colour: bool) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if colour else text


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2e}"


def _mark(right: bool) -> str:
    return "yes" if right else "NO"
