"""Whose files are: torch's, our own, and those of installed packages, wherever (``pip install --target``)."""

from __future__ import annotations

import functools
import os

import torch

TORCH = os.path.dirname(torch.__file__) + os.sep
THUNDER = os.path.dirname(__file__) + os.sep
_LIBRARY = os.path.dirname(os.__file__)


def standard(path: str) -> bool:
    """Whether it is of Python's own library."""
    return path.startswith((_LIBRARY, "<frozen")) and "site-packages" not in path


def from_library(path: str) -> bool:
    """Whether it is of Python's own library, or of an installed package."""
    return standard(path) or installed(path)


def installed(path: str) -> bool:
    """Whether a list of installed files beside the package names it."""
    folder = os.path.dirname(path)
    while folder != os.path.dirname(folder):
        if os.path.relpath(path, folder).replace(os.sep, "/") in _installed_in(folder):
            return True
        folder = os.path.dirname(folder)
    return False


@functools.lru_cache(maxsize=1024)
def _installed_in(folder: str) -> frozenset[str]:
    """The files that the records of the packages in a folder name, relative to it."""
    found: set[str] = set()
    try:
        records = [e.path for e in os.scandir(folder) if e.name.endswith(".dist-info")]
    except OSError:
        return frozenset()
    for record in records:
        try:
            with open(os.path.join(record, "RECORD"), encoding="utf-8") as lines:
                found.update(line.split(",", 1)[0] for line in lines)
        except (OSError, UnicodeDecodeError):
            continue
    return frozenset(found)
