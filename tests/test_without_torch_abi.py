"""THUNDER_TORCH_ABI=0 switches off every handle and shim: the road through Python builtins gives the same results."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FILES = [*sorted(path.name for path in Path(__file__).parent.glob("test_jit_*.py")), "test_dynamic_sizes.py"]


def test_the_same_tests_pass_without_torchs_c_abi() -> None:
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--no-header", *[f"tests/{name}" for name in FILES]],
        cwd=here.parent,
        env={**os.environ, "THUNDER_TORCH_ABI": "0"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:]


def test_the_switch_turns_the_abi_off() -> None:
    program = "import thunder; print(thunder._C.torch_abi()['handles'])"
    env = {**os.environ, "THUNDER_TORCH_ABI": "0"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
