"""Every program of the package does as eager does, call by call."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import tests.soundness as package
from tests.soundness.harness import PROGRAMS, check

for module in pkgutil.iter_modules(package.__path__):
    if module.name.startswith("programs_"):
        importlib.import_module(f"{package.__name__}.{module.name}")


@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_program(name):
    found, warned = check(name)
    assert not found, f"{found} (warnings: {warned})"
    assert len(warned) <= 1, warned


def test_the_comparison_sees_a_difference():
    from tests.soundness.harness import Outcome

    assert Outcome(lambda: 1, ()).differs(Outcome(lambda: 2, ()))
    assert Outcome(lambda: print("x"), ()).differs(Outcome(lambda: None, ()))
    assert Outcome(lambda: 1 / 0, ()).differs(Outcome(lambda: None, ()))
    assert not Outcome(lambda: [1, float("nan")], ()).differs(Outcome(lambda: [1, float("nan")], ()))
