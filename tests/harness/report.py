"""Writes the sections of docs/coverage.md between their markers, and the same figures as JSON into out/."""

from __future__ import annotations

import json
import platform
import re
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
COVERAGE = ROOT / "docs" / "coverage.md"
OUT = ROOT / "out"


def environment() -> str:
    """What the figures were measured on."""
    parts = [f"torch {torch.__version__}", f"Python {platform.python_version()}", platform.machine()]
    for module in ("transformers", "timm"):
        try:
            import importlib.metadata

            parts.insert(1, f"{module} {importlib.metadata.version(module)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(parts)


def write_section(name: str, lines: list[str], path: Path = COVERAGE) -> None:
    """Replaces what stands between `<!-- name:begin -->` and `<!-- name:end -->`.

    Raises:
        ValueError: a marker is missing from the file.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    text = path.read_text(encoding="utf-8")
    head, found_begin, rest = text.partition(begin)
    _, found_end, tail = rest.partition(end)
    if not (found_begin and found_end):
        raise ValueError(f"{path} has no section between {begin} and {end}")
    path.write_text("\n".join([head + begin, "", *lines, "", end + tail]), encoding="utf-8")


def write_json(name: str, content: Any) -> Path:
    """Writes out/NAME.json and returns its path."""
    OUT.mkdir(exist_ok=True)
    path = OUT / f"{name}.json"
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return path


def one_line(text: object, width: int = 160) -> str:
    """A message fit for a table cell: one line, bounded, no cell separator, paths from the package or the tree on."""
    short = re.sub(r"(?:/[^\s/:]+)*/site-packages/", "", str(text)).replace(f"{ROOT}/", "")
    line = " ".join(short.split()).replace("|", "\\|").replace("<", "&lt;")
    return line if len(line) <= width else line[: width - 3] + "..."
