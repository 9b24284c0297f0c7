"""What generated programs are made of: modules, objects and configurations with state of every kind."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree


def X(start: float = -1.5, grad: bool = False) -> torch.Tensor:
    """Four numbers around zero."""
    return (torch.arange(4.0) + start).requires_grad_(grad)


@dataclasses.dataclass
class Rates:
    rate: float = 0.5
    mode: str = "up"
    steps: list = dataclasses.field(default_factory=lambda: [1, 2])


@dataclasses.dataclass
class Config:
    scale: float = 2.0
    flag: bool = True
    rates: Rates = dataclasses.field(default_factory=Rates)


Pair = collections.namedtuple("Pair", "a b")


def make_classes() -> dict[str, Any]:
    """Classes that a program may patch: new ones for each run."""

    class Slotted:
        __slots__ = ("extra", "value")

        def __init__(self, value):
            self.value = value

    class Scaler:
        factor = 2.0

        def __init__(self, value):
            self.value = value
            self.seen = []

        @property
        def doubled(self):
            return self.value * 2

        def scaled(self, t):
            return t * self.value + self.factor

        def __call__(self, t):
            return self.scaled(t) - 1

    class Inner(nn.Module):
        def __init__(self, scale=1.5):
            super().__init__()
            self.scale = scale
            self.bias = nn.Parameter(torch.tensor([0.5, -0.5, 1.0, 0.0]))

        def forward(self, t):
            t = t * self.scale
            return t + self.bias if self.training else t - self.bias

    class Net(nn.Module):
        factor = 2.0

        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1.0, 2.0, -1.0, 0.5]))
            self.register_buffer("buf", torch.tensor([0.0, 1.0, 2.0, 3.0]))
            self.scale, self.mode, self.flag, self.count, self.last = 2.0, "up", True, 0, None
            self.items = [torch.ones(4), torch.tensor([1.0, -1.0, 1.0, -1.0])]
            self.table = {"a": 1.0, "b": 2}
            self.config = Config()
            self.inner = Inner()
            self.layers = nn.ModuleList([Inner(0.5), Inner(-1.0)])

        @property
        def doubled(self):
            return self.scale * 2

        def method(self, t):
            return t * self.scale + self.factor

        def forward(self, t):
            return self.inner(t) * self.w + self.buf

    return {"Slotted": Slotted, "Scaler": Scaler, "Inner": Inner, "Net": Net}


SECOND_TIME = "the graph was freed by an earlier backward pass"


def backward(out: Any) -> str:
    """Backward from all of a result that is differentiable; the type of the error, "" for none."""
    tensors = [t for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
    try:
        losses = [t.double().sum() for t in tensors if t.requires_grad]
        if losses:
            sum(losses).backward()
    except Exception as error:
        return SECOND_TIME if "a second time" in str(error) else type(error).__name__
    return ""
