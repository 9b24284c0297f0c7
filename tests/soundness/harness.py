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
results, what was printed, and the errors must be the same; ``yield Seen(x=x, state=state)`` compares more than that.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Generator
from typing import Any

import torch

import thunder
from tests.soundness.snapshot import difference, holds, snapshot
from tests.soundness.world import SECOND_TIME

Program = Callable[[], Generator[Any, Any, None]]
PROGRAMS: dict[str, tuple[str, Program]] = {}


def program(category: str) -> Callable[[Program], Program]:
    """Register a program."""

    def add(f: Program) -> Program:
        assert f.__name__ not in PROGRAMS, f.__name__
        PROGRAMS[f.__name__] = (category, f)
        return f

    return add


class Seen:
    """What a program yields to have it compared: values as they are at that moment."""

    def __init__(self, **values: Any) -> None:
        self.error = values.pop("error", "")  # of a backward pass
        self.values = snapshot(values)

    def differs(self, other: Seen) -> str:
        """How ``other``, of the run with the compiled callable, differs; "" when it does not."""
        return (
            f"backward raised {other.error}"
            if other.error
            else difference(self.values, other.values, single=holds(self.values, torch.float32))
        )


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
        self.shot = snapshot(self.result)
        self.single = holds(snapshot((args, self.result)), torch.float32)

    def differs(self, other: Outcome) -> str:
        """How ``other``, of the compiled callable, differs; "" when it does not."""
        if self.error != other.error:
            return f"raised {other.error} ({other.text}) where eager raised {self.error}"
        if self.printed != other.printed:
            return f"printed {other.printed!r} where eager printed {self.printed!r}"
        return difference(self.shot, other.shot, "result", self.single)


def outcomes(make: Program, compile_with: Callable[[Any], Any]) -> list[Outcome | Seen]:
    """All calls of one run of a program."""
    torch.manual_seed(0)
    steps = make()
    fn, *args = next(steps)
    call = compile_with(fn)
    found = [Outcome(call, tuple(args))]
    result = found[-1].result
    while True:
        try:
            step = steps.send(result)
        except StopIteration:
            return found
        if isinstance(step, Seen):
            found.append(step)
            continue
        found.append(Outcome(call, step if isinstance(step, tuple) else (step,)))
        result = found[-1].result


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


def check_source(source: str, **options: Any) -> tuple[str, Any]:
    """Run a program given as source, a module with ``calls``: the first difference, and the compiled callable.

    Calls that are not captured run in eager: then what a failed capture leaves behind is what is judged.
    """
    compiled: list[Any] = []

    def compile_with(fn: Any) -> Any:
        compiled.append(thunder.jit(fn, **{"fallback": "eager"} | options))
        return compiled[-1]

    code = compile(source, "<program>", "exec")
    expected = outcomes(fresh(code), lambda fn: fn)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        actual = outcomes(fresh(code), compile_with)
    calls = -1
    for theirs, ours in zip(expected, actual, strict=True):
        calls += isinstance(theirs, Outcome)
        if isinstance(theirs, Seen) and (theirs.error or ours.error == SECOND_TIME):
            break  # how far it came is torch's matter; and a compiled part is one node, which refuses as a whole
        found = theirs.differs(ours)
        if found:
            return f"call {calls}: {found}", compiled[-1]
    return "", compiled[-1]


def fresh(code: Any) -> Program:
    """``calls`` of a newly run module."""
    namespace: dict[str, Any] = {"__name__": "program"}
    exec(code, namespace)
    return namespace["calls"]


def check_writer(write: Callable[[int], str]) -> None:
    """What writes programs writes equal ones for equal seeds, and they parse without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(200):
            source = write(seed)
            assert source == write(seed)
            compile(source, "<program>", "exec")
