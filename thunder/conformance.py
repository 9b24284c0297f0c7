"""``python -m thunder conformance EXECUTOR``: is an executor right wherever it says that it takes a call?

Each entry of torch's op_db makes cases: its samples in several dtypes, with strides of other kinds, with nothing in
them, with no dimension, with gradients, and from several threads at once. A case is a program of that one operation
(for an executor of regions, of one more behind it). It runs twice, with other values the second time, on the executor
without the check of first runs, and in eager.

    claimed     the executor took the operation: the case is right, wrong, or raised an error that eager does not raise
    declined    it did not: torch ran it, so the case says nothing about the executor

    crashed     the process died, or did not answer in time: the command judges in a process of its own, which is
                started again behind such a case

A case counts for every operator in its programs, those of the backward too. Cases that eager refuses are left out, as
are those where thunder without the executor differs from eager.
"""

from __future__ import annotations

import argparse
import collections
import copy
import dataclasses
import functools
import importlib
import itertools
import json
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import thunder
from thunder import _conformance_child, _verify
from thunder.extend import Executor, FusionExecutor, get_executor
from thunder.extend.executor import operator_key

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool)
THREADS, ROUNDS = 4, 12
_MARK = 0.7265625  # the number in the operation that is put behind the one under test
_OUTCOMES = ("right", "wrong", "raised", "crashed")


# ---- cases ----


@dataclasses.dataclass(frozen=True)
class Case:
    """One way of calling one entry: the same call with two sets of values."""

    entry: Any
    dtype: torch.dtype
    index: int  # of the sample
    layout: str  # a key of LAYOUTS; "" as the sample comes
    samples: tuple[Any, Any]
    gradients: bool

    def __str__(self) -> str:
        parts = (str(self.dtype).removeprefix("torch."), f"sample {self.index}", self.layout)
        return f"{entry_name(self.entry)}, {' '.join(filter(None, parts))}{' with gradients' * self.gradients}"


def entry_name(entry: Any) -> str:
    """`name` or `name.variant`: unique in op_db."""
    return f"{entry.name}.{entry.variant_test_name}" if entry.variant_test_name else entry.name


def _samples(entry: Any, dtype: torch.dtype, seed: int, count: int) -> list[Any]:
    """The one of most dimensions, then the first ones."""
    torch.manual_seed(seed)
    try:
        found = list(itertools.islice(entry.sample_inputs("cpu", dtype, requires_grad=False, set_seed=False), 20))
    except Exception:  # the generator needs a library that is missing here
        return []
    largest = max(range(len(found)), key=lambda i: _dimensions(found[i]), default=0)
    return (found[largest : largest + 1] + found[:largest] + found[largest + 1 :])[:count]


def _dimensions(sample: Any) -> tuple[bool, int]:
    tensors = _tensors((sample.input, sample.args))
    return all(t.numel() for t in tensors), max((t.ndim for t in tensors), default=0)


def _transposed(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT if t.ndim > 1 else t


def _expanded(t: Tensor) -> Tensor:
    return t[:1].expand(t.shape) if t.ndim and t.shape[0] > 1 else t


def _empty(t: Tensor) -> Tensor:
    return t[:0] if t.ndim else t


def _zero_dimensional(t: Tensor) -> Tensor:
    return t.reshape(-1)[0].clone() if t.numel() else t


LAYOUTS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "strided": None,  # as op_db makes it
    "transposed": _transposed,
    "expanded": _expanded,
    "empty": _empty,
    "zero-dimensional": _zero_dimensional,
}


def _changed(sample: Any, layout: str) -> Any:
    """A sample in another layout; raises where torch cannot lay it out so."""
    if not layout:
        return sample
    change = LAYOUTS[layout]
    if change is None:
        return sample.noncontiguous()
    return sample.transform(lambda t: change(t) if isinstance(t, Tensor) else t)


def cases(entry: Any, count: int, *, plain: bool = False) -> Iterator[Case]:
    """The cases of an entry: every dtype as it comes, the first one in all layouts, and gradients of the floats.

    With ``plain`` the first dtype as it comes, and no more.
    """
    supported = [d for d in DTYPES if entry.supports_dtype(d, "cpu")]
    for dtype in supported[:1] if plain else supported:
        kinds = [False, True] if entry.supports_autograd and dtype in (torch.float32, torch.float64) else [False]
        layouts = ["", *LAYOUTS] if dtype is supported[0] and not plain else [""]
        pairs = zip(*(_samples(entry, dtype, seed, count) for seed in (0, 1)), strict=False)
        for (i, pair), layout in itertools.product(enumerate(pairs), layouts):
            try:
                samples = tuple(_changed(s, layout) for s in pair)
            except Exception:
                continue
            yield from (Case(entry, dtype, i, layout, samples, k) for k in kinds)


def _arguments(sample: Any, gradients: bool) -> tuple[Any, tuple, dict[str, Any]]:
    """Leaves with memory of their own; the parts of one storage stay together."""

    def leaf(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        return t.detach().requires_grad_(gradients and t.is_floating_point())

    return copy.deepcopy(tree_map(leaf, (sample.input, sample.args, sample.kwargs)))


# ---- running one ----


def _tensors(value: Any) -> list[Tensor]:
    return [t for t in tree_leaves(value) if isinstance(t, Tensor)]


def _program(entry: Any, neighbour: bool) -> Callable:
    """The function under test: one operation, for executors of regions one more for each floating result."""
    function = entry.op

    def program(first: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        out = function(first, *args, **kwargs)
        if not neighbour:
            return out
        parts = out if isinstance(out, (tuple, list)) else (out,)
        return out, [torch.mul(t, _MARK) for t in parts if isinstance(t, Tensor) and t.is_floating_point()]

    return program


class Step:
    """One run: the results, the gradients of the arguments, and the arguments afterwards."""

    def __init__(self, program: Callable, arguments: Any, gradients: bool, strided: bool = False) -> None:
        torch.manual_seed(0)
        before = [(t.untyped_storage()._cdata if t.layout == torch.strided else 0) for t in _tensors(arguments)]
        if not gradients:
            with torch.no_grad():
                results = program(*arguments)
        else:
            results = program(*arguments)
        self.results = _tensors(results)
        self.arguments = [t.detach() for t in _tensors(arguments)]
        self.memory = [self._memory(t, before) for t in self.results]
        self.gradients: list[Tensor | None] = []
        if gradients:
            self._differentiate(arguments, strided)

    @staticmethod
    def _memory(t: Tensor, before: list[int]) -> int | None:
        """The argument whose memory a result is, if any."""
        if t.layout != torch.strided or not t.numel():
            return None
        return next((i for i, s in enumerate(before) if s == t.untyped_storage()._cdata), None)

    def _differentiate(self, arguments: Any, strided: bool) -> None:
        leaves = [t for t in _tensors(arguments) if t.requires_grad]
        chosen = [t for t in self.results if t.requires_grad]
        if not leaves or not chosen:
            raise ValueError("nothing to differentiate")
        given = [torch.linspace(-1, 1, t.numel(), dtype=torch.float64).reshape(t.shape).to(t.dtype) for t in chosen]
        if strided:
            given = [_transposed(g) for g in given]
        self.gradients = list(torch.autograd.grad(chosen, leaves, given, allow_unused=True))


def _compare(eager: Step, ours: Step, truth: Callable[[], Step | None]) -> str:
    """What differs, in words; "" if nothing does. ``truth`` is the run in float64."""
    if len(eager.results) != len(ours.results):
        return f"{len(ours.results)} results where eager gives {len(eager.results)}"
    for what in ("results", "gradients"):
        for i, (e, r) in enumerate(zip(getattr(eager, what), getattr(ours, what), strict=True)):
            found = _differs(e, r, lambda what=what, i=i: getattr(truth(), what)[i], strides=what == "results")
            if found:
                return f"{what[:-1]} {i} {found}"
    for i, (e, r) in enumerate(zip(eager.memory, ours.memory, strict=True)):
        if e != r:
            return f"result {i} {_shares(r)} where eager's {_shares(e)}"
    for i, (e, r) in enumerate(zip(eager.arguments, ours.arguments, strict=True)):
        if e.layout == torch.strided and not _verify._same_bits(e, r):
            return f"argument {i} is not afterwards what it is in eager"
    return ""


def _shares(argument: int | None) -> str:
    return "has memory of its own" if argument is None else f"is memory of argument {argument}"


def _differs(e: Tensor | None, r: Tensor | None, truth: Callable[[], Any], *, strides: bool) -> str:
    if e is None or r is None:
        if e is r:
            return ""
        e, r = (torch.zeros_like(r) if e is None else e), (torch.zeros_like(e) if r is None else r)
    if e.layout != torch.strided or e.is_quantized:
        return ""
    found = _verify._other_form(e, r)
    if found.startswith("has strides") and not strides:
        found = ""
    found = found or _verify._other_numbers(e, r)
    if found.startswith("is off") and e.dtype.is_floating_point and e.dtype != torch.float64:
        try:
            exact = truth()
        except Exception:  # it says float32 somewhere: nothing decides
            return found
        return "" if _verify.nearer(exact, e, r) else found
    return found


def _wide(arguments: Any, gradients: bool) -> Any:
    def widen(t: Any) -> Any:
        if isinstance(t, Tensor) and t.is_floating_point():
            return t.detach().double().requires_grad_(gradients)
        return t

    return tree_map(widen, arguments)


@torch.enable_grad()
def _truth(*args: Any) -> Step:
    return Step(*args)


def _run(case: Case, compiled: Callable, neighbour: bool) -> tuple[str, str]:
    """(outcome, message) of the two calls of a case; ("", "") where eager refuses both."""
    program, outcome = _program(case.entry, neighbour), ""
    strided = case.layout in ("strided", "transposed")
    for round_, sample in enumerate(case.samples):
        try:
            arguments = _arguments(sample, case.gradients)
            eager = Step(program, copy.deepcopy(arguments), case.gradients, strided)
        except Exception:
            continue
        truth = functools.cache(
            lambda a=arguments: _truth(program, _wide(copy.deepcopy(a), case.gradients), case.gradients, strided)
        )
        try:
            ours = Step(compiled, copy.deepcopy(arguments), case.gradients, strided)
        except Exception as error:
            return "raised", f"{type(error).__name__}: {error}"
        with torch.no_grad():
            found = _compare(eager, ours, truth)
        if found:
            return "wrong", found + (" (second call)" if round_ else "")
        outcome = "right"
    return outcome, ""


# ---- who ran what ----


@dataclasses.dataclass
class Claimed:
    """Operators of one compiled callable: those in units of the executor, and those that it left."""

    inside: set[str]
    left: dict[str, str]  # operator -> why
    refused: set[str]  # operators of units that were found to be wrong
    unbuilt: str  # why a unit could not be built


def _callable(compiled: Any) -> Any:
    return getattr(compiled, "_thunder_callable", compiled)


def _operators(symbols: Any) -> set[str]:
    """The keys of operations, without the one that was put behind and those that are thunder's own."""
    keys = set()
    for s in symbols:
        marked = any(isinstance(a, float) and a == _MARK for a in s.args)
        if isinstance(s.name, str) and s.name.startswith("torch.") and not marked:
            keys.add(operator_key(s.name))
    return keys


def _last_traces(compiled: Any) -> list[Any]:
    found = []
    for last in (thunder.last_traces, thunder.last_backward_traces):
        try:
            found.append(last(compiled)[-1])
        except RuntimeError:  # there is no backward
            continue
    return found


def _keep_units(compiled: Any, told: Callable[[Any], None] = lambda region: None) -> list[Any]:
    """A list that every unit that is claimed from now on goes into: a program that raises takes its units along."""
    claims, kept = _callable(compiled)._thunder_claims, []
    bind = claims.bind

    def keep(i: int, region: Any, kind: str) -> str | None:
        name = bind(i, region, kind)
        if name is not None:
            kept.append(region)
            told(region)
        return name

    claims.bind = keep
    return kept


def _claimed(compiled: Any, executor: Executor, kept: list[Any]) -> Claimed:
    claims = _callable(compiled)._thunder_claims
    units = [region for region in kept if region.executor is executor]
    inside = {key for region in units for key in _operators(region.trace.bound_symbols)}
    refused = {key for r in units if r.state == "refused" for key in _operators(r.trace.bound_symbols)}
    reasons = {operator_key(name): why for (_, name, why) in claims.declines if name != "a region"}
    about_regions = [why for (_, name, why) in claims.declines if name == "a region"]
    known, left = executor.implementations, {}
    for key in {k for trace in _last_traces(compiled) for k in _operators(trace.bound_symbols)} - inside:
        if known.get(key, known.get("*")) is not None:
            other = (
                about_regions[0] if about_regions else "it writes, draws random numbers, or its memory is written to"
            )
            left[key] = reasons.get(key, other)
    unbuilt = next((why for why in about_regions if why.startswith("it was not built")), "")
    return Claimed(inside, left, refused, unbuilt)


# ---- judging ----


@dataclasses.dataclass
class Row:
    """What became of the cases of one operator."""

    right: int = 0
    wrong: int = 0
    raised: int = 0
    crashed: int = 0
    declined: int = 0
    failures: list[str] = dataclasses.field(default_factory=list)
    reasons: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    @property
    def claimed(self) -> int:
        """Cases in which the executor took it."""
        return sum(getattr(self, outcome) for outcome in _OUTCOMES)


@dataclasses.dataclass
class Report:
    """Rows by operator; ``str()`` is the table."""

    executor: str
    rows: dict[str, Row]
    entries: int

    def total(self, what: str) -> int:
        """The sum of one column."""
        return sum(getattr(row, what) for row in self.rows.values())

    @property
    def never_claimed(self) -> list[str]:
        """Operators without a claimed case."""
        return sorted(key for key, row in self.rows.items() if not row.claimed)

    @property
    def passed(self) -> bool:
        """Something was claimed, and all of that was right."""
        return self.total("claimed") == self.total("right") > 0

    def __str__(self) -> str:
        columns = " ".join(f"{outcome:>7}" for outcome in _OUTCOMES)
        lines = [f"{'operator':48} {'claimed':>8} {columns} {'declined':>8}"]
        for key, row in sorted(self.rows.items()):
            if row.claimed:
                figures = " ".join(f"{getattr(row, outcome):7}" for outcome in _OUTCOMES)
                lines.append(f"{key:48} {row.claimed:8} {figures} {row.declined:8}")
                lines += [f"    {text}" for text in row.failures[:3]]
        lines += [f"{key:48} never claimed: {_reason(self.rows[key])}" for key in self.never_claimed]
        count = {what: self.total(what) for what in ("claimed", *_OUTCOMES, "declined")}
        lines.append(
            f"{self.executor}: {len(self.rows)} operators in {self.entries} entries of op_db; {count['claimed']} "
            f"claimed ({', '.join(f'{count[outcome]} {outcome}' for outcome in _OUTCOMES)}), "
            f"{count['declined']} declined; {len(self.never_claimed)} operators never claimed"
        )
        if not count["claimed"]:
            lines.append("nothing was claimed, so nothing was tested")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = {key: vars(row) | {"claimed": row.claimed} for key, row in sorted(self.rows.items())}
        return {
            "executor": self.executor,
            "torch": torch.__version__,
            "passed": self.passed,
            "entries": self.entries,
            "totals": {what: self.total(what) for what in ("claimed", *_OUTCOMES, "declined")},
            "never_claimed": self.never_claimed,
            "operators": rows,
        }


def _reason(row: Row) -> str:
    return row.reasons.most_common(1)[0][0] if row.reasons else "no sample reaches it"


class Table:
    """Rows, from what a suite tells."""

    def __init__(self) -> None:
        self.rows: collections.defaultdict[str, Row] = collections.defaultdict(Row)
        self.entries = 0

    def hear(self, what: str, *of: Any) -> None:
        """One event: see ``Suite``."""
        if what == "entry":
            self.entries += 1
        elif what == "count":
            outcome, keys, line = of
            for key in keys:
                row = self.rows[key]
                setattr(row, outcome, getattr(row, outcome) + 1)
                if line:
                    row.failures.append(f"{outcome}: {line}")
        elif what == "declined":
            key, why = of
            self.rows[key].declined += 1
            self.rows[key].reasons[why] += 1

    def report(self, executor: str, known: Sequence[str]) -> Report:
        """The rows so far, and one for each operator in ``known``."""
        for key in known:
            self.rows[key]
        return Report(executor, dict(self.rows), self.entries)


class Suite:
    """Judges the entries one after the other.

    What it finds it tells: ``tell("entry", name)`` when it starts with one, ``tell("case", number, text)`` before each
    case of it, ``tell("takes", keys)`` when a unit with these operators is about to run, ``tell("threads", number)``
    when a case is chosen for the threads, ``tell("count", outcome, keys, line)`` and ``tell("declined", key, why)``.
    """

    def __init__(self, executor: Executor, count: int, tell: Callable[..., None]) -> None:
        self.executor, self.count, self.tell = executor, count, tell
        self.neighbour = isinstance(executor, FusionExecutor)

    def concerns(self, entry: Any) -> bool:
        """Whether the executor knows an operator that the first cases reach, forward or backward."""
        known = self.executor.implementations
        if known.get("*") is not None:
            return True
        for case in cases(entry, self.count, plain=True):
            compiled = thunder.jit(_program(entry, False), executors=[])
            if not _run(case, compiled, False)[0]:
                continue
            for trace in _last_traces(compiled):
                if any(known.get(key) is not None for key in _operators(trace.bound_symbols)):
                    return True
        return False

    def judge(self, entry: Any, start: int = 0, threads: int | None = None) -> None:
        """The cases of an entry from number ``start``; ``threads``: the one that was chosen for the threads before."""
        if not start:
            self.tell("entry", entry_name(entry))
        number, together = -1, None
        for number, case in enumerate(cases(entry, self.count)):
            if number == threads:
                together = case
            if number < start:
                continue
            self.tell("case", number, str(case))
            found = self._judge_case(case)
            if found is not None and together is None and not case.gradients:
                together = case
                self.tell("threads", number)
        if together is not None and start <= number + 1:
            self.tell("case", number + 1, _from_threads(together))
            self._judge_threads(together)

    def _units(self, compiled: Any) -> list[Any]:
        return _keep_units(compiled, lambda region: self.tell("takes", sorted(_operators(region.trace.bound_symbols))))

    def _jit(self, case: Case, executors: list[Any], verify: str = "off") -> Any:
        return thunder.jit(_program(case.entry, self.neighbour), executors=executors, verify=verify, tier="block")

    def _judge_case(self, case: Case) -> Claimed | None:
        """Counts one case; what was claimed if it was right."""
        compiled = self._jit(case, [self.executor])
        units = self._units(compiled)
        outcome, message = _run(case, compiled, self.neighbour)
        if not outcome:
            return None
        claimed = _claimed(compiled, self.executor, units)
        for key, why in claimed.left.items():
            if not claimed.unbuilt:
                self.tell("declined", key, why)
        if claimed.unbuilt:
            self._count("raised", set(claimed.left), str(case), claimed.unbuilt)
        if not claimed.inside:
            return None
        if outcome != "right" and _run(case, self._jit(case, []), self.neighbour)[0] != "right":
            return None  # not the executor's fault
        keys = claimed.inside if outcome == "right" else self._guilty(case) or claimed.inside
        self._count(outcome, keys, str(case), message)
        self._count("right", claimed.inside - keys, str(case), "")
        return claimed if outcome == "right" else None

    def _guilty(self, case: Case) -> set[str]:
        """The operators of the units that the check of first runs refuses."""
        compiled = self._jit(case, [self.executor], verify="always")
        units = _keep_units(compiled)
        _run(case, compiled, self.neighbour)
        return _claimed(compiled, self.executor, units).refused

    def _count(self, outcome: str, keys: set[str], case: str, message: str) -> None:
        if keys:
            self.tell("count", outcome, sorted(keys), f"{case}: {message}" if message else "")

    # ---- threads ----

    def _judge_threads(self, case: Case) -> None:
        """Several threads call one compiled callable; each must get what it gets when it calls alone."""
        compiled = self._jit(case, [self.executor])
        units = self._units(compiled)
        samples = [_samples(case.entry, case.dtype, seed, case.index + 1)[-1] for seed in range(THREADS)]
        arguments = [_arguments(_changed(s, case.layout), False) for s in samples]
        try:
            alone = [Step(compiled, copy.deepcopy(a), False) for a in arguments]
        except Exception:  # a sample that eager refuses as well
            return
        outcome, message = _at_once(compiled, arguments, alone)
        if outcome != "right" and _at_once(self._jit(case, []), arguments, alone)[0] != "right":
            return  # random numbers: torch's generator is one for all threads
        claimed = _claimed(compiled, self.executor, units)
        self._count(outcome, claimed.inside, _from_threads(case), message)


def _from_threads(case: Case) -> str:
    return f"{case} from {THREADS} threads at once"


def _at_once(compiled: Callable, arguments: list[Any], expected: list[Step]) -> tuple[str, str]:
    outcomes: list[tuple[str, str]] = []
    barrier = threading.Barrier(len(arguments))

    def work(mine: Any, right: Step) -> None:
        barrier.wait()
        for _ in range(ROUNDS):
            try:
                with torch.no_grad():
                    results = _tensors(compiled(*mine))
            except Exception as error:
                outcomes.append(("raised", f"{type(error).__name__}: {error}"))
                return
            for e, r in zip(right.results, results, strict=True):
                found = _verify._other_form(e, r) or _verify._other_numbers(e, r) if e.layout == torch.strided else ""
                if found:
                    outcomes.append(("wrong", f"a result {found}"))
                    return

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=pair) for pair in zip(arguments, expected, strict=True)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:
        sys.setswitchinterval(interval)
    return outcomes[0] if outcomes else ("right", "")


def find(executor: Executor | str, ops: str) -> tuple[Executor, list[Any]]:
    """The executor, and the entries of op_db in whose name ``ops`` is found.

    Raises:
        LookupError: as ``run``.
    """
    from torch.testing._internal.common_methods_invocations import op_db

    executor = get_executor(executor) if isinstance(executor, str) else executor
    if not executor.implementations:
        raise LookupError(f"the executor {executor.name!r} claims no operator: there is nothing to test")
    chosen = [entry for entry in op_db if re.search(ops, entry_name(entry))]
    if not chosen:
        raise LookupError(f"no entry of op_db is called like {ops!r}")
    return executor, chosen


def known_operators(executor: Executor, ops: str) -> list[str]:
    """Those that have a row even when no case reaches them."""
    return [key for key, known in executor.implementations.items() if known is not None and key != "*" and not ops]


def run(
    executor: Executor | str, *, ops: str = "", samples: int = 3, progress: Callable[[str], None] | None = None
) -> Report:
    """Judge an executor in this process; an executor that crashes takes it along.

    Args:
        executor: or its name.
        ops: a regular expression; only entries of op_db in whose name it is found.
        samples: of each dtype and entry.
        progress: told the name of each entry before it is judged.

    Raises:
        LookupError: no executor of that name, one that claims nothing, or no entry of that name.
    """
    executor, chosen = find(executor, ops)
    table = Table()
    suite = Suite(executor, samples, table.hear)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for entry in chosen:
            if suite.concerns(entry):
                if progress:
                    progress(entry_name(entry))
                suite.judge(entry)
    return table.report(executor.name, known_operators(executor, ops))


# ---- the command ----


def add_command(commands: Any) -> None:
    """Puts ``conformance`` on the command line."""
    parser = commands.add_parser("conformance", help="is an executor right in whatever it claims?")
    parser.add_argument("executor", metavar="EXECUTOR", help="its name")
    parser.add_argument(
        "--import", dest="module", metavar="MODULE", help="import this first: it registers the executor"
    )
    parser.add_argument("--ops", default="", metavar="REGEX", help="only entries of op_db with such a name")
    parser.add_argument("--samples", type=int, default=3, metavar="N", help="of each dtype (default: 3)")
    parser.add_argument(
        "--timeout", type=float, default=300.0, metavar="S", help="seconds that a case may take (default: 300)"
    )
    parser.add_argument(
        "--in-process", action="store_true", help="judge in this process, for debuggers: a crash ends it"
    )
    parser.add_argument("--json", metavar="FILE", help="write the report there")
    parser.add_argument("--quiet", action="store_true", help="the table alone, no line for each entry")
    parser.set_defaults(run=command)


def command(options: argparse.Namespace) -> int:
    """Prints the table; 0: all that was claimed is right, 1: it is not, or nothing was claimed, 2: misuse."""
    sys.path.insert(0, "")  # as `python -m` has it, for the installed script
    say = None if options.quiet else lambda name: print(f"... {name}", file=sys.stderr, flush=True)
    what: dict[str, Any] = {"ops": options.ops, "samples": options.samples, "progress": say}
    try:
        if options.in_process:
            if options.module:
                importlib.import_module(options.module)
            report = run(options.executor, **what)
        else:
            report = _conformance_child.run_apart(
                options.executor, module=options.module, timeout=options.timeout, **what
            )
    except (LookupError, ImportError) as error:
        print(error.args[0] if error.args else error, file=sys.stderr)
        return 2
    print(report)
    if options.json:
        Path(options.json).write_text(json.dumps(report.as_dict(), indent=2) + "\n", encoding="utf-8")
    return 0 if report.passed else 1
