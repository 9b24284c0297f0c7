"""One figure of the benchmark, and how a figure is measured in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

from tests.harness.report import ROOT


@dataclass
class Row:
    """One figure and what it must reach; `target` is an upper bound."""

    name: str
    measured: float
    target: float | None
    unit: str  # "x eager", "us", ...
    detail: str
    fell_back: bool = False  # it measured eager, so it reached nothing

    @property
    def missed(self) -> bool:
        """Whether there is a target and it was not reached."""
        return self.target is not None and (self.fell_back or self.measured > self.target)

    def __str__(self) -> str:
        verdict = "" if self.target is None else f"<= {self.target:g} {'MISSED' if self.missed else 'reached'}"
        detail = f"ran in eager; {self.detail}" if self.fell_back else self.detail
        return f"{self.name:46} {self.measured:8.3f} {self.unit:16} {verdict:18} {detail}"


def fresh_process(*arguments: str) -> dict[str, Any]:
    """Runs Python in a new process with empty compile caches; its last line of output is JSON."""
    with tempfile.TemporaryDirectory() as caches:
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor", "TRITON_CACHE_DIR": f"{caches}/triton"}
        done = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)[:60]} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
