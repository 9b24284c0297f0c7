"""Small programs whose world changes between calls: a compiled callable must do as eager does, call by call.

    @program("globals")
    def a_number_that_a_helper_reads():
        world = types.SimpleNamespace(scale=2.0)

        def helper(x):
            return x * world.scale

        yield lambda x: helper(x) + 1, X      # the callable and the arguments of its first call
        world.scale = 3.0                     # the world changes
        yield X                               # the arguments of the next call

A program is a generator, run twice from the start: once in eager, once with the callable compiled. After each call the
results, what was printed, and the errors must be the same.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch.utils import _pytree as pytree

import thunder

Program = Callable[[], Generator[Any, Any, None]]
PROGRAMS: dict[str, tuple[str, Program]] = {}


def program(category: str) -> Callable[[Program], Program]:
    """Register a program."""

    def add(f: Program) -> Program:
        assert f.__name__ not in PROGRAMS, f.__name__
        PROGRAMS[f.__name__] = (category, f)
        return f

    return add


class Outcome:
    """What one call did."""

    def __init__(self, call: Callable, args: tuple) -> None:
        said = io.StringIO()
        self.error: str | None = None
        self.text = ""
        self.result: Any = None
        with contextlib.redirect_stdout(said):
            try:
                self.result = call(*args)
            except Exception as error:
                self.error = f"{type(error).__name__}"
                self.text = str(error)
        self.printed = said.getvalue()

    def differs(self, other: Outcome) -> str:
        """How ``other``, of the compiled callable, differs; "" when it does not."""
        if self.error != other.error:
            return f"raised {other.error} ({other.text}) where eager raised {self.error}"
        if self.printed != other.printed:
            return f"printed {other.printed!r} where eager printed {self.printed!r}"
        ours, spec = pytree.tree_flatten(other.result)
        theirs, wanted = pytree.tree_flatten(self.result)
        if spec != wanted:
            return f"returned {spec} where eager returned {wanted}"
        for o, t in zip(ours, theirs, strict=True):
            if isinstance(t, torch.Tensor):
                if not isinstance(o, torch.Tensor) or o.shape != t.shape or o.dtype != t.dtype:
                    return f"returned {o} where eager returned {t}"
                if not torch.allclose(o.double(), t.double(), rtol=1e-4, atol=1e-5, equal_nan=True):
                    return f"returned {o} where eager returned {t}"
                if o.requires_grad != t.requires_grad:
                    return "differs in requires_grad"
            elif not (o == t or (o != o and t != t)):
                return f"returned {o!r} where eager returned {t!r}"
        return ""


def outcomes(make: Program, compile_with: Callable[[Any], Any]) -> list[Outcome]:
    """All calls of one run of a program."""
    torch.manual_seed(0)
    steps = make()
    fn, *args = next(steps)
    call = compile_with(fn)
    found = [Outcome(call, tuple(args))]
    while True:
        try:
            step = steps.send(found[-1].result)
        except StopIteration:
            return found
        found.append(Outcome(call, step if isinstance(step, tuple) else (step,)))


def check(name: str) -> tuple[str, list[str]]:
    """Run a program both ways: the first difference ("" for none), and the warnings that were given."""
    _, make = PROGRAMS[name]
    torch._dynamo.reset()
    expected = outcomes(make, lambda fn: fn)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        actual = outcomes(make, lambda fn: thunder.jit(fn, fallback="dynamo"))
    given = [str(w.message) for w in seen if issubclass(w.category, thunder.ThunderWarning)]
    for i, (theirs, ours) in enumerate(zip(expected, actual, strict=True)):
        found = theirs.differs(ours)
        if found:
            return f"call {i}: {found}", given
    return "", given
