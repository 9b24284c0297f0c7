"""What the executors of one compiled callable claim."""

from __future__ import annotations

import collections
import contextlib
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

from thunder import _C, _verify
from thunder._errors import CaptureError, ThunderWarning
from thunder._stopwatch import stopwatch_for
from thunder.extend import build
from thunder.extend.executor import Executor, FusionExecutor, Implementation, takes, verdict
from thunder.extend.operator import Operator
from thunder.extend.replace import Replaced

VERIFY = ("off", "first", "always")
TIERS = ("background", "block")
_LINES = 24  # of a trace in a warning


class Claims:
    """Answers the compiler's questions for the executors before ``torch``: see ext/claim.c.

    Attributes:
        declines: (executor, operator, reason) -> how often an executor declined a call of an operator that it knows.
        units: what was claimed, in order: a list of (name, ``thunder._C.Region`` or None once it is gone).
        fuel: how many units may still be claimed; None: any number.
    """

    def __init__(self, executors: tuple[Executor, ...], *, verify: str, tier: str, fuel: int | None) -> None:
        names = [e.name for e in executors]
        before = executors[: names.index("torch")] if "torch" in names else executors
        self.executors = tuple(before)
        self.cuts = tuple(e.cut for e in self.executors)
        self.judge = _verify.judge
        self.verify = verify
        self.block = tier == "block"
        self.fuel = fuel
        self.declines: collections.Counter[tuple[str, str, str]] = collections.Counter()
        self._units: list[tuple[str, Any, str]] = []
        self._numbers: collections.Counter[str] = collections.Counter()
        self._refused: dict[Any, str] = {}  # body -> why its executor may not run it
        self._open: list[tuple[build.Build, Any]] = []  # what a call has to wait for, and who hears of it
        self._origins: dict[str, tuple[str, Operator]] = {}  # key of an operator -> what it stands for, the operator
        self._banned: set[str] = set()  # operators that are not to stand for others

    @property
    def tables(self) -> tuple[dict[str, Any], ...]:
        """What each executor knows by now, by operator, as ext/claim.c reads it."""
        tables = tuple(dict(e._table) for e in self.executors)
        for table in tables if self._banned else ():
            for key in [k for k, known in table.items() if _stand_in(known) in self._banned]:
                del table[key]
        return tables

    @property
    def fuses(self) -> bool:
        """Somebody takes every operator into regions."""
        return any(isinstance(e, FusionExecutor) and "*" in e._table for e in self.executors)

    @property
    def operators(self) -> bool:
        """Some implementation has a derivative of its own."""
        return any(_stand_in(known) for e in self.executors for known in list(e._table.values()))

    @property
    def units(self) -> list[tuple[str, Any, str]]:
        """(name, region, kind of the program) of each unit that still exists."""
        return [(name, ref(), kind) for name, ref, kind in self._units if ref() is not None]

    def stands_in(self, replaced: Replaced, differentiated: bool) -> Operator | None:
        """The operator that stands for a function of the user's, which is captured for these executors."""
        for executor in self.executors:
            operator = replaced.operators.get(executor)
            if operator is None or operator.key in self._banned:
                continue
            if not differentiated or operator.has_backward:
                self._origins[operator.key] = replaced.name, operator
                return operator
            self.declines[executor.name, replaced.name, f"{operator!r} has no backward"] += 1
        return None

    def ask(self, i: int, known: Implementation, name: str, args: tuple, kwargs: dict[str, Any]) -> int:
        """Does executor ``i`` take this call: 0 no, 1 alone, 2 with its neighbours."""
        executor = self.executors[i]
        if not self._agrees(executor, known.checker, name, args, kwargs):
            return 0
        return 2 if isinstance(executor, FusionExecutor) else 1

    def _agrees(self, executor: Executor, checker: Any, name: str, args: tuple, kwargs: dict[str, Any]) -> bool:
        with _asking(executor, f"its checker for {name}"):
            agrees, reason = takes(checker, args, kwargs)
        if not agrees:
            self.declines[executor.name, name, reason] += 1
        return agrees

    def declined(self, i: int, name: str, reason: str) -> None:
        """A C executor said no."""
        self.declines[self.executors[i].name, name, reason] += 1

    def ask_operator(
        self, i: int, known: Any, name: str, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[str, int] | None:
        """The operator with its own derivative that takes the place of this call: its name, the results it saves."""
        operator = getattr(known, "operator", None)
        if operator is None or not self.ask(i, known, name, args, kwargs):
            return None
        if not self._agrees(self.executors[i], known.training, name, args, kwargs):
            return None
        self._origins[operator.key] = name, operator
        return operator.key, operator.saves

    def bind(self, i: int, region: Any, kind: str) -> str | None:
        """Give a unit what runs it; its name, or None when the executor does not want it after all."""
        executor = self.executors[i]
        if self.fuel is not None:
            if self.fuel <= 0:
                return None
            self.fuel -= 1
        region.claims = weakref.ref(self)
        region.operator, region.origin_trace, region.differentiated = None, None, False
        region.saved, region.timed = 0, None
        if region.fused:
            if not self._bind_fused(executor, region):
                return None
            label = executor.name
        else:
            operator = self._bind_operator(i, region)
            if operator is None:
                return None
            label = f"{executor.name}_{operator}"
        number = self._numbers[label]
        self._numbers[label] += 1
        name = f"{label}_{number}"
        self._units.append((name, weakref.ref(region), kind))
        return name

    def _bind_operator(self, i: int, region: Any) -> str | None:
        (callee,) = region.trace.operations()
        table = self.executors[i]._table
        known = table.get(_C.operator_key(callee)) or table.get("*")
        if callee in self._origins:
            origin, operator = self._origins[callee]
            region.operator, region.saved = callee, operator.saves
            region.differentiated = operator.has_backward
            region.origin_trace = _C.Trace(_origin_text(str(region.trace), callee, origin, alone=True))
            region._compare_with(_C.Trace(_origin_text(str(region.trace), callee, origin)))
        implementation = known.fn if known.native is None else known.native.bind(region.trace)
        if isinstance(implementation, str):
            self.declined(i, callee, implementation)
            return None
        self._install(region, implementation)
        return callee.removesuffix(".default").rpartition(".")[2]

    def _bind_fused(self, executor: FusionExecutor, region: Any) -> bool:
        with _asking(executor, "wants()"):
            wanted, reason = verdict(executor.wants(region), executor.wants)
        if not wanted:
            self.declines[executor.name, "a region", reason] += 1
            return False
        made = build.start(executor, region, block=self.block)
        if made.error is not None:
            self._failed(executor, region, made)
            return False
        tell = build.installer(region, self._finish)
        if self.block and not made.done.is_set():
            self._open.append((made, tell))
        else:
            made.then(tell)
        return True

    def settle(self) -> None:
        """The regions of a program are all known and it will run: what it may not run without is waited for."""
        waiting, self._open = self._open, []
        build.finish(made for made, _ in waiting)
        for made, tell in waiting:
            tell(made)

    def _finish(self, region: Any, made: build.Build) -> None:
        if made.error is None:
            self._install(region, made.implementation)
            return
        self._failed(region.executor, region, made)
        region.refuse(self._refused[region.trace])

    def _install(self, region: Any, implementation: Any) -> None:
        if region.trace in self._refused:
            region.refuse(self._refused[region.trace])
        else:
            region.timed = region.stopwatch = stopwatch_for(region)
            region.install(implementation, trusted=self.verify == "off", always=self.verify == "always")

    def _failed(self, executor: Executor, region: Any, made: build.Build) -> None:
        reason = f"it was not built: {type(made.error).__name__}: {made.error}"
        self.declines[executor.name, "a region", reason] += 1
        self._report(region, reason)

    def refused(self, region: Any, reason: str) -> None:
        """What a unit computed is not what torch computes: equal ones are not run either."""
        self._report(region, reason)
        for _, other, _ in self.units:
            if other.executor is region.executor and other.trace == region.trace:
                other.refuse(reason)

    def _report(self, region: Any, reason: str) -> None:
        """One warning for all equal units: who did what wrong, where, and that torch takes over."""
        if region.trace in self._refused:
            return
        self._refused[region.trace] = reason
        lines = str(region.trace).rstrip().splitlines()
        if len(lines) > _LINES:
            lines[_LINES // 2 : -_LINES // 2] = [f"    ... {len(lines) - _LINES} more lines"]
        warnings.warn(
            f"executor {region.executor.name!r}: {reason}. Torch runs this from now on; "
            "thunder.bisect(fn, *args) finds others. The operations:\n    " + "\n    ".join(lines),
            ThunderWarning,
            stacklevel=2,
        )

    def ban(self, region: Any, reason: str) -> None:
        """An operator that stands for another computes something else: it is not taken again."""
        self._report(region, reason)
        self._banned.add(region.operator)


def _stand_in(known: Any) -> str | None:
    """The operator with a derivative of its own that takes another's place."""
    operator = getattr(known, "operator", None)
    return None if operator is None else operator.key


@contextlib.contextmanager
def _asking(executor: Executor, what: str) -> Iterator[None]:
    """What an executor raises when it is asked says who was asked."""
    try:
        yield
    except CaptureError as error:
        raise RuntimeError(
            f"executor {executor.name!r}: {what} uses values of tensors. It is asked before the program runs: the "
            "tensors have shape, dtype, device and strides, and no data"
        ) from error
    except Exception as error:
        error.add_note(f"executor {executor.name!r} was asked: {what}")
        raise


def _origin_text(text: str, callee: str, origin: str, *, alone: bool = False) -> str:
    """What torch runs in an operator's place; the results that it has for its backward come from itself, or are left
    out (``alone``)."""
    lines = text.splitlines()
    (at,) = [i for i, line in enumerate(lines) if f" = {callee}(" in line]
    outs, call = lines[at].strip().split(f" = {callee}(", 1)
    first, *saved = outs.strip("()").split(", ")
    if not saved or ":" in outs:  # the only result, its type beside it
        return text.replace(f"{callee}(", f"{origin}(")
    top = next(i for i, line in enumerate(lines) if line.endswith("):")) + 1
    types = {line.strip().partition(":")[0]: line for line in lines[top:at]}
    body = [*(types[n] for n in (first,) if n in types), f"    {first} = {origin}({call}"]
    if alone:
        return "\n".join([*lines[:top], *body, f"    return ({first},)"]) + "\n"
    if any(name != "_" for name in saved):
        body += [types[n] for n in saved if n in types]
        body += [f"    _, {', '.join(saved)} = {callee}({call}"]
    return "\n".join([*lines[:top], *body, *lines[at + 1 :]]) + "\n"


def make_claims(executors: tuple[Executor, ...], *, verify: str, tier: str, fuel: int | None) -> Claims | None:
    """The claims of a callable, or None where torch runs everything."""
    claims = Claims(executors, verify=verify, tier=tier, fuel=fuel)
    return claims if claims.executors else None
