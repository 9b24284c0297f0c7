"""Checks the rules that keep the C tree in layers.

    base <- ir <- ops <- passes <- runtime <- executors          (src/, no Python)
    ext/                                                         (the only C that sees Python)

A file may include headers of its own layer and of those to its left. The public headers in include/ are open to
all. Only src/base/dylib.c loads libraries and only src/base/env.c reads the environment.

    python tools/check_layers.py [ROOT]      prints `file:line: message` per violation; exit status 1 if there is any
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

LAYERS = ("base", "ir", "ops", "passes", "runtime", "executors")
SUFFIXES = {".c", ".h", ".def", ".inc"}

INCLUDE = re.compile(r'^\s*#\s*include\s*(?:"([^"]+)"|<([^>]+)>)')
# Word -> the one file of src/ and ext/ that may call it.
RESERVED_CALLS = {
    "dlopen": "src/base/dylib.c",
    "dlmopen": "src/base/dylib.c",
    "getenv": "src/base/env.c",
    "secure_getenv": "src/base/env.c",
}
RESERVED = re.compile(r"\b(" + "|".join(RESERVED_CALLS) + r")\s*\(")
PYTHON_NAME = re.compile(r"\b(PyObject|_?Py_[A-Za-z]\w*|Py[A-Z][A-Za-z]*_[A-Za-z]\w*)\b")
NOT_CODE = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'', re.DOTALL)


def _without_comments_and_strings(text: str) -> str:
    """Blanks comments and literals, keeping the line structure."""
    return NOT_CODE.sub(lambda m: re.sub(r"[^\n]", " ", m.group()), text)


def _layer(path: str) -> str | None:
    parts = path.split("/")
    return parts[1] if len(parts) > 2 and parts[0] == "src" and parts[1] in LAYERS else None


def _resolve(root: Path, file: Path, name: str) -> str | None:
    """The file an include means, relative to the root, in the order in which the compiler looks."""
    for folder in (file.parent, root / "src", root / "include"):
        candidate = (folder / name).resolve()
        if candidate.is_file() and candidate.is_relative_to(root):
            return candidate.relative_to(root).as_posix()
    return None


def _check_include(root: Path, file: Path, path: str, name: str, quoted: bool) -> str | None:
    if Path(name).name == "Python.h" or name.startswith(("cpython/", "internal/pycore")):
        return f"{name} belongs in ext/; the core knows no Python"
    target = _resolve(root, file, name)
    if target is None:
        if quoted and not name.endswith(".inc"):  # .inc files are generated into the build folder
            return f'"{name}" is in neither this folder, src/ nor include/'
        return None
    if path.startswith("include/"):
        return None if target.startswith("include/") else f"public headers include only public headers, not {target}"
    if target.startswith("ext/"):
        return f"the core must not include {target}"
    mine, other = _layer(path), _layer(target)
    if mine and other and LAYERS.index(other) > LAYERS.index(mine):
        return f"{mine} must not include {other} ({target}); the road is {' <- '.join(LAYERS)}"
    return None


def _sources(root: Path, *tops: str) -> list[Path]:
    return [f for top in tops for f in sorted((root / top).rglob("*")) if f.suffix in SUFFIXES]


def _reserved_calls(path: str, text: str) -> Iterator[tuple[str, int, str]]:
    for number, line in enumerate(_without_comments_and_strings(text).splitlines(), 1):
        for call in RESERVED.finditer(line):
            if path != RESERVED_CALLS[call[1]]:
                yield path, number, f"{call[1]} is called only in {RESERVED_CALLS[call[1]]}"


def violations(root: Path) -> Iterator[tuple[str, int, str]]:
    """Yields (file, line, message) for each broken rule below `root`."""
    root = root.resolve()
    core = _sources(root, "src", "include")
    for file in core:
        path = file.relative_to(root).as_posix()
        if path.startswith("src/") and _layer(path) is None:
            yield path, 1, f"a file of src/ lives in one of {', '.join(LAYERS)}"
        text = file.read_text(encoding="utf-8")
        for number, line in enumerate(text.splitlines(), 1):
            found = INCLUDE.match(line)
            if found:
                message = _check_include(root, file, path, found[1] or found[2], bool(found[1]))
                if message:
                    yield path, number, message
        for number, line in enumerate(_without_comments_and_strings(text).splitlines(), 1):
            python = PYTHON_NAME.search(line)
            if python:
                yield path, number, f"{python[1]} belongs in ext/; the core knows no Python"
    for file in core + _sources(root, "ext"):
        yield from _reserved_calls(file.relative_to(root).as_posix(), file.read_text(encoding="utf-8"))


def main(argv: list[str]) -> int:
    """Prints every violation; returns the exit status."""
    root = Path(argv[1]) if len(argv) > 1 else Path(__file__).resolve().parent.parent
    found = list(violations(root))
    for path, line, message in found:
        print(f"{path}:{line}: {message}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
