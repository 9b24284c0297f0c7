"""The comparison behind the coverage figures sees each kind of difference."""

from __future__ import annotations

import collections
from dataclasses import dataclass

import pytest
import torch

from tests.harness.compare import as_exact_as_eager, clone, differences


@dataclass
class Output:
    logits: torch.Tensor
    cache: object = None


class Cache:
    def __init__(self, *layers: torch.Tensor):
        self.layers = list(layers)


ONES = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("eager", "ours", "says"),
    [
        (ONES, ONES + 1e-3, "6 of 6 values differ, by up to 0.001"),
        (ONES, ONES.double(), "dtype"),
        (ONES, torch.ones(3, 2), "shape"),
        (ONES, torch.full((2, 3), torch.nan), "differ"),
        (ONES.long(), ONES.long() + 1, "6 of 6"),
        (ONES, None, "NoneType here"),
        (ONES, torch.nn.Parameter(ONES), "type"),
        ([ONES], (ONES,), "list in eager, tuple here"),
        ([ONES, ONES], [ONES], "parts"),
        ({"a": ONES}, {"b": ONES}, "parts"),
        ({"a": ONES}, {"a": ONES * 2}, "output['a']"),
        (Output(ONES), Output(ONES * 2), "output.logits"),
        (Output(ONES, Cache(ONES)), Output(ONES, Cache(ONES * 2)), "output.cache.layers[0]"),
        (collections.OrderedDict(a=1), {"a": 1}, "OrderedDict"),
        (1.0, 1.1, "1.1 here"),
        (1, True, "int in eager, bool here"),
        ("a", "b", "'b' here"),
    ],
)
def test_a_difference_is_named(eager, ours, says):
    found = differences(eager, ours)
    assert len(found) == 1
    assert says in found[0]


@pytest.mark.parametrize(
    "value", [ONES, {"a": [ONES, (1, None, 2.5)]}, Output(ONES, Cache(ONES)), torch.tensor(torch.nan)]
)
def test_a_copy_is_equal(value):
    assert differences(value, clone(value)) == []


def test_strides_are_compared_on_request():
    transposed = torch.ones(3, 2).t()
    assert differences(ONES, transposed) == []
    assert "stride" in differences(ONES, transposed, strides=True)[0]


def test_clone_keeps_views_of_one_storage_together():
    base = torch.zeros(4)
    pair = clone([base, base[1:3]])
    pair[1].add_(1)
    assert pair[0].tolist() == [0, 1, 1, 0]
    assert base.tolist() == [0, 0, 0, 0]


def test_float64_decides_who_is_further_away():
    exact = ONES.double()
    assert as_exact_as_eager(ONES + 1e-4, ONES - 1e-4, exact)
    assert not as_exact_as_eager(ONES + 1e-5, ONES + 1e-3, exact)
    assert not as_exact_as_eager(ONES, torch.full((2, 3), torch.nan), exact)
