"""Generated programs do as eager does, call by call. A failure prints the program: keep it, reduced, in programs_found.

The quick tier runs 300 programs, the same ones each time; ``pytest -m slow tests/soundness`` runs 10,000.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

import thunder
from tests.soundness.generator import Writer
from tests.soundness.harness import check_source, check_writer

CHECKS = {"deadline": None, "database": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


def check_program(choices: Any) -> None:
    source = Writer(choices).program()
    found, _ = check_source(source)
    assert not found, f"{found}\n\n{source}"


@settings(max_examples=300, **CHECKS)
@given(st.randoms(use_true_random=False))
def test_generated_program(choices):
    check_program(choices)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_generated_program_of_ten_thousand(part):
    @seeded(part)
    @settings(max_examples=1000, **CHECKS)
    @given(st.randoms(use_true_random=False))
    def check(choices: Any) -> None:
        check_program(choices)

    check()


def test_generated_programs_are_compiled_and_hit():
    calls = hits = fallbacks = 0
    for seed in range(60):
        stats = thunder.compile_stats(check_source(Writer(random.Random(seed)).program())[1])
        calls, hits, fallbacks = calls + stats.calls, hits + stats.cache_hits, fallbacks + stats.fallbacks
    assert hits > calls / 10
    assert fallbacks < calls / 2


def test_generated_programs_find_a_compiler_that_does_not_look_at_state():
    found = [check_source(Writer(random.Random(seed)).program(), cache="same input")[0] for seed in range(60)]
    assert sum(map(bool, found)) > 4


def test_writers_given_equal_choices_write_equal_programs():
    check_writer(lambda seed: Writer(random.Random(seed)).program())
