"""Generated programs whose behaviour depends on sizes and ints do as eager does, whatever sizes come.

The quick tier runs 200 programs, the same ones each time; ``pytest -m slow`` runs 5,000.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import thunder
from tests.soundness.generator_sizes import Writer
from tests.soundness.harness import check_source, check_writer


@pytest.fixture(autouse=True)
def without_gradients():
    """Programs with gradients have one size only."""
    with torch.no_grad():
        yield


def check_programs(seeds: range) -> list[Any]:
    """All compiled callables."""
    made = []
    for seed in seeds:
        source = Writer(random.Random(seed)).program()
        found, compiled = check_source(source)
        made.append(compiled)
        assert not found, f"{found}\n\nseed {seed}\n{source}"
    return made


def test_generated_program_with_sizes():
    stats = [thunder.compile_stats(compiled) for compiled in check_programs(range(200))]
    assert sum(s.cache_hits for s in stats) > sum(s.calls for s in stats) / 8  # sizes change at most calls
    assert sum(s.fallbacks for s in stats) < sum(s.calls for s in stats) / 20


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_generated_program_with_sizes_of_five_thousand(part):
    check_programs(range(1000 + 500 * part, 1500 + 500 * part))


def test_generated_programs_find_a_compiler_that_does_not_look_at_sizes():
    """With the caller's word that sizes decide nothing, which is not true of these."""
    found = [check_source(Writer(random.Random(seed)).program(), dynamic=True)[0] for seed in range(40, 60)]
    exact = [check_source(Writer(random.Random(seed)).program(), dynamic=False)[0] for seed in range(40, 60)]
    assert sum(map(bool, found)) > sum(map(bool, exact))


def test_writers_given_equal_choices_write_equal_programs_of_sizes():
    check_writer(lambda seed: Writer(random.Random(seed)).program())
