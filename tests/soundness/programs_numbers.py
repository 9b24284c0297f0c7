"""Programs of floats that change from call to call: what is computed of them and happens to be the same twice is none
that may be any, and what looks at their values some other way fixes them."""

from __future__ import annotations

import cmath
import math
import types

import torch
from torch.nn import functional as F

from tests.soundness.harness import Seen, program
from tests.soundness.world import X

SIGNS = (-1.0, 1.0, 3.0, -4.0, float("nan"))
NEAR = (1.2, 1.5, 30.0, -0.5)


def set_first(x, s):
    y = x.clone()
    y[0] = s
    return y


def two_ways(x, s):
    squared, twice = s * s, s + s  # of 0 and 2 the same
    assert squared is not twice
    return x * twice


# A function of a tensor and a float, and the floats of its calls, one after the other.
OF_A_FLOAT = {
    "size_of_it_as_a_result": (lambda x, s: (x + 1, abs(s)), SIGNS),
    "size_of_it": (lambda x, s: x * abs(s), SIGNS),
    "square": (lambda x, s: x * (s * s), SIGNS),
    "square_as_alpha": (lambda x, s: x.add(x, alpha=s * s), SIGNS),
    "power": (lambda x, s: x * (s**2 + 1), SIGNS),
    "complex_power": (lambda x, s: x * abs(s**0.5), SIGNS),
    "nothing_of_it": (lambda x, s: x * (s * 0.0), (-1.0, -2.0, float("inf"))),
    "remainder": (lambda x, s: x * (s % 2.0), (1.0, 3.0, 2.5)),
    "whole_quotient": (lambda x, s: x * (s // 2.0), (1.0, 1.5, 2.5)),
    "two_formulas": (two_ways, (0.0, 2.0, 3.0)),
    "its_real_part": (lambda x, s: x * abs(s.real), SIGNS),
    "its_type": (lambda x, s: x * s if type(s) is float else x + s, (0.5, 0.7, 0.9)),
    "its_class": (lambda x, s: x * s if s.__class__ is float else x + s, (0.5, 0.7, 0.9)),
    "cosine": (lambda x, s: x * math.cos(s), SIGNS),
    "question_for_nan": (lambda x, s: x if math.isnan(s) else x + 1, SIGNS),
    "complex_exponential": (lambda x, s: x * abs(cmath.exp(1j * s)), SIGNS),
    "old_format": (lambda x, s: x * len("%f" % abs(s)), NEAR),  # noqa: UP031
    "format": (lambda x, s: x * len(f"{s:.0f}"), NEAR),
    "whole_number": (lambda x, s: x * int(s), NEAR),
    "rounded": (lambda x, s: x * round(s), NEAR),
    "largest": (lambda x, s: x * max(s, 2.0), NEAR),
    "tensor_of_it": (lambda x, s: x * torch.tensor(s).abs(), SIGNS),
    "tensor_of_a_list": (lambda x, s: x * torch.tensor([s, s]).abs().sum(), SIGNS),
    "sign_of_a_tensor_of_it": (lambda x, s: x * (torch.tensor(s) > 0), NEAR),
    "full_tensor": (lambda x, s: x * torch.full((4,), s).abs(), SIGNS),
    "item_of_a_tensor_of_it": (lambda x, s: x * torch.tensor(s).abs().item(), SIGNS),
    "new_tensor": (lambda x, s: x * x.new_tensor(s).abs(), SIGNS),
    "range": (lambda x, s: torch.arange(0, s).sum() + x, (1.5, 1.8, 4.0)),
    "linspace": (lambda x, s: torch.linspace(0, s, 4).sign() + x, NEAR),
    "scale_of_an_image": (lambda x, s: F.interpolate(x.view(1, 1, 4), scale_factor=s), (1.5, 1.6, 4.0)),
    "written_to_a_tensor": (set_first, SIGNS),
    "norm": (lambda x, s: x.norm(s), (2.0, 3.0, float("inf"))),
}


def add(name: str, f, floats) -> None:
    def calls():
        yield f, X(), floats[0]
        for s in floats[1:]:
            yield X(), s

    calls.__name__ = f"float_that_changes_{name}"
    program("floats that change")(calls)


for name, case in OF_A_FLOAT.items():
    add(name, *case)


@program("floats that change")
def one_of_two_floats():
    def f(x, scale, rate):
        return x * scale + x * (scale * rate)

    yield f, X(), 0.5, 0.1
    yield X(), 0.5, 0.2
    yield X(), 0.7, 0.2
    yield X(), 0.7, 0.9
    yield X(), 0.1, 0.2


@program("floats that change")
def unused_float_beside_one_that_stayed():
    yield lambda x, scale, rate: x * scale, X(), 0.5, 0.1
    yield X(), 0.5, 0.2
    yield X(), 0.7, 0.2
    yield X(), 0.9, 0.9


@program("floats that change")
def two_floats_of_which_one_changes_its_sign():
    yield lambda x, s, u: x * abs(s) * u, X(), -1.5, 1.0
    yield X(), 1.5, 2.0
    yield X(), 3.0, 3.0
    yield X(), -4.0, 3.0


@program("floats that change")
def attribute_made_positive():
    world = types.SimpleNamespace(gain=-1.5)

    def f(x):
        world.gain = abs(world.gain)
        return x * world.gain

    yield f, X()
    for gain in (5.0, float("inf"), -3.0, -1.5):
        world.gain = gain
        yield X()
        yield Seen(world=world)


@program("kernels")
def infinity_in_small_kernels():
    def f(x):
        return F.gelu(x), F.gelu(x, approximate="tanh"), F.silu(x), torch.tanh(x), torch.sigmoid(x), x.mean()

    far = float("inf")
    for grad in (False, True):
        first = not grad
        x = torch.tensor([far, -far, 2e38, -3e38, 3e38, 1.0], requires_grad=grad)
        yield (f, x) if first else (x,)
        yield torch.tensor([2.5e38, 2.5e38], requires_grad=grad)
        yield torch.tensor([far, far, float("nan")], requires_grad=grad)
