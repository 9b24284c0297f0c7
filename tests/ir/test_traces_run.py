"""Runs every golden trace with torch, before and after its passes, and compares.

A printed trace is Python. So each `tests/ir/**/*.ir` file is executed twice on equal inputs, as it was written and as
it is expected to be. A file that cannot run (made-up operators) says so in a line `# NORUN: reason`.

The second run has inputs that start elsewhere in their storages than the trace says: one program serves both.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ir.running import Run, assert_same

FILES = sorted(Path(__file__).parent.rglob("*.ir"))


@pytest.mark.parametrize("shift", [0, 3])
@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_golden_trace_runs_the_same_before_and_after(path: Path, shift: int) -> None:
    text = path.read_text()
    if "# NORUN:" in text:
        pytest.skip(text.split("# NORUN:")[1].splitlines()[0])
    if "# EXPECT:" not in text:
        pytest.skip("expects an error")
    source, expected = text.split("# EXPECT:\n")
    assert_same(Run(source, shift).run(), Run(expected, shift).run())
