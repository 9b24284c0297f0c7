"""The examination: a run in eager that lists the calls, a compiled run, and the comparison of both with float64."""

from __future__ import annotations

import collections
import copy
import re
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from thunder import _C, _verify
from thunder._errors import CaptureError, ThunderWarning
from thunder._origin import THUNDER, TORCH
from thunder.examine.report import Comparison, Operation, Report, Unsupported

_LINE = re.compile(r"^ +(?:.*? = )?([\w.]+)\(.*\)  # (\S+:\d+)$")

_SHAPED_BY_DATA = frozenset(
    ("nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount", "_unique2")
)

# What to write in place of an operation whose result depends on data.
_ALTERNATIVES = {
    "nonzero": "torch.where(condition, x, 0) or a mask keeps the shape",
    "__getitem__": "torch.where(mask, x, 0) keeps the shape",
    "where": "torch.where with three arguments keeps the shape",
    "masked_select": "multiply by the mask, or torch.where",
    "unique": "call it outside the compiled function",
    "item": "keep the number as a tensor, or compute it outside and pass it in",
    "tolist": "keep the tensor, or compute the list outside and pass it in",
    "__bool__": "torch.where chooses by data; or decide outside",
    "__int__": "keep the number as a tensor, or compute it outside and pass it in",
    "__float__": "keep the number as a tensor, or compute it outside and pass it in",
    "numpy": "stay in torch, or do this part outside",
}


class Examination:
    """Called with the arguments of a call: see ``thunder.examine``."""

    def __init__(self, fn: Any, *, executors: Any = None, show: bool = True) -> None:
        from thunder._api import _check_target, _name

        _check_target(fn)
        self.fn = fn
        self.name = type(fn).__name__ if isinstance(fn, torch.nn.Module) else _name(fn)
        self.executors = executors
        self.show = show

    def __call__(self, *args: Any, **kwargs: Any) -> Report:
        """Examine one call."""
        report = Report(self.name)
        with torch.random.fork_rng():
            seed = torch.initial_seed()
            eager = _Run(self.fn, args, kwargs, seed)
            calls = eager.observe()
            if eager.error is not None:
                report.error = report.verdict = f"eager itself raises {type(eager.error).__name__}: {eager.error}"
            else:
                self._compile(report, args, kwargs, seed, eager, calls)
        if self.show:
            report.show()
        return report

    def _compile(
        self, report: Report, args: tuple, kwargs: dict, seed: int, eager: _Run, calls: list[tuple[Any, str, str]]
    ) -> None:
        import thunder

        ours = _Run(self.fn, args, kwargs, seed)
        ours.fn = compiled = thunder.jit(ours.fn, executors=self.executors, tier="block", fallback="error")
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always", ThunderWarning)
            ours.run()
            if ours.error is None and compiled_claims(compiled) is not None:
                ours.again()  # the first run of what an executor claimed has torch's results
        report.notes = [str(w.message) for w in seen if issubclass(w.category, ThunderWarning)]
        if isinstance(ours.error, CaptureError):
            report.unsupported = _unsupported(ours.error, calls)
            report.verdict = f"not supported: {ours.error.construct or ours.error}"
            return
        if ours.error is not None:
            report.verdict = f"the compiled call raises {type(ours.error).__name__} where eager does not: {ours.error}"
            return
        if thunder.compile_stats(compiled).fallbacks:
            report.unsupported = [Unsupported("gradients", "", note, _EAGER) for note in report.notes]
            report.verdict = "it would run in eager: " + "; ".join(report.notes)
            return
        report.supported = True
        report.operations = list(_operations(compiled))
        wide = _Run(self.fn, args, kwargs, seed, double=True)
        wide.run()
        exact = wide if wide.error is None else None
        report.comparisons = list(_compare(ours, eager, exact))
        if exact and not all(c.right for c in report.comparisons):
            near = [_Run(self.fn, args, kwargs, seed, nudged=n) for n in range(1, _NUDGES + 1)]
            for run in near:
                run.run()
            report.comparisons = list(_compare(ours, eager, exact, [r for r in near if r.error is None]))
        wrong = [c.name for c in report.comparisons if not c.right]
        kernels = sum(o.count for o in report.operations)
        report.verdict = (
            f"supported, {kernels} operations, but different from eager in {', '.join(wrong)}"
            if wrong
            else f"supported, {kernels} operations, same results as eager"
        )


_NUDGES = 5  # runs of eager on inputs that differ in the last bit
_EAGER = "docs/sharp-edges.md says which uses of autograd run in eager"


class _Run:
    """One run of a copy: outputs, and the gradients of a weighted sum of them."""

    def __init__(self, fn: Any, args: tuple, kwargs: dict, seed: int, *, double: bool = False, nudged: int = 0) -> None:
        self.fn = _copied(fn)
        self._given = args, kwargs
        self._state = copy.deepcopy(self.fn.state_dict()) if isinstance(self.fn, torch.nn.Module) else {}
        self.args, self.kwargs = pytree.tree_map_only(Tensor, _leaf_copy, self._given)
        self.seed = seed
        if double:
            if isinstance(self.fn, torch.nn.Module):
                self.fn.double()
            self.args, self.kwargs = pytree.tree_map_only(Tensor, _double, (self.args, self.kwargs))
        if nudged:
            generator = torch.Generator().manual_seed(nudged)
            for t in [*_parameters(self.fn), *_tensors((self.args, self.kwargs))]:
                _nudge(t, generator)
        self.outputs: list[Tensor] = []
        self.gradients: dict[str, Tensor | None] = {}
        self.error: Exception | None = None

    def again(self) -> None:
        """A second run, from the state that the first one found."""
        if isinstance(self.fn, torch.nn.Module):
            self.fn.load_state_dict(self._state)
        self.args, self.kwargs = pytree.tree_map_only(Tensor, _leaf_copy, self._given)
        self.run()

    def observe(self) -> list[tuple[Any, str, str]]:
        """Run; the calls that a capture may not be able to follow: (function, the user's line, why)."""
        observer = _Observer()
        with observer:
            self.run(backward=False)
        if self.error is None:
            self._differentiate()
        return observer.calls

    def run(self, *, backward: bool = True) -> None:
        """Run, once."""
        torch.manual_seed(self.seed)
        try:
            output = self.fn(*self.args, **self.kwargs)
            self.outputs = list(_tensors(output))
        except Exception as error:
            self.error = error
        if backward and self.error is None:
            self._differentiate()

    def _differentiate(self) -> None:
        wrt = dict(self._leaves())
        roots = [o for o in self.outputs if o.requires_grad]
        if not wrt or not roots or not torch.is_grad_enabled():
            return
        weights = [torch.linspace(0.5, 1.5, o.numel(), dtype=torch.float64).reshape(o.shape).to(o) for o in roots]
        try:
            found = torch.autograd.grad(roots, list(wrt.values()), weights, allow_unused=True)
        except Exception as error:
            self.error = error
            return
        self.gradients = dict(zip(wrt, found, strict=True))

    def _leaves(self) -> Iterator[tuple[str, Tensor]]:
        fn = getattr(self.fn, "_thunder_module", self.fn)
        if isinstance(self.fn, torch.nn.Module) or isinstance(fn, torch.nn.Module):
            yield from ((f"gradient of {n}", p) for n, p in self.fn.named_parameters() if p.requires_grad)
        for i, t in enumerate(_tensors((self.args, self.kwargs))):
            if t.requires_grad:
                yield f"gradient of argument {i}", t


class _Observer(torch.overrides.TorchFunctionMode):
    """Notes what is called, and where the user calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, str, str]] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        why = _depends_on_data(func, args)
        if why:
            self.calls.append((func, _user_line(), why))
        return func(*args, **(kwargs or {}))


def _depends_on_data(func: Any, args: tuple) -> str:
    """Why a capture may not be able to follow this call; "" where it is."""
    kind = _kind(func)
    if kind in ("data", "refuse"):
        return "it asks for values" if kind == "data" else "it acts on memory, storage or hooks"
    name = getattr(func, "__name__", "")
    mask = name == "__getitem__" and any(
        isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in pytree.tree_leaves(args[1:])
    )
    if mask or name in _SHAPED_BY_DATA or (name == "where" and len(args) == 1):
        return "the shape of its result depends on values"
    return ""


def _user_line() -> str:
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if not path.startswith((TORCH, THUNDER)):
            return f"{path.rpartition('/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def _copied(fn: Any) -> Any:
    if isinstance(fn, torch.nn.Module):
        return copy.deepcopy(fn)
    owner = getattr(fn, "__self__", None)
    if isinstance(owner, torch.nn.Module):
        return getattr(copy.deepcopy(owner), fn.__name__)
    return fn


def _parameters(fn: Any) -> list[Tensor]:
    return list(fn.parameters()) if isinstance(fn, torch.nn.Module) else []


@torch.no_grad()
def _nudge(t: Tensor, generator: torch.Generator) -> None:
    """Round every number the other way, or not: what eager makes of that is as right as what it made before."""
    if t.is_floating_point() and t.layout == torch.strided:
        signs = torch.randint(-1, 2, t.shape, generator=generator).to(t)
        t.mul_(1 + signs * torch.finfo(t.dtype).eps)


def _leaf_copy(t: Tensor) -> Tensor:
    return t.detach().clone().requires_grad_(t.requires_grad)


def _double(t: Tensor) -> Tensor:
    return t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t


def _tensors(value: Any) -> Iterator[Tensor]:
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif hasattr(leaf, "__dataclass_fields__"):
            yield from _tensors([getattr(leaf, n) for n in leaf.__dataclass_fields__])


def compiled_claims(compiled: Any) -> Any:
    """The claims of something that ``thunder.jit`` returned; None where torch runs everything."""
    return getattr(compiled, "_thunder_callable", compiled)._thunder_claims


# ---- tables ----


def _unsupported(error: CaptureError, calls: list[tuple[Any, str, str]]) -> list[Unsupported]:
    place = f"{error.file}:{error.line}" if error.file else ""
    found = [Unsupported(error.construct or str(error), place, error.reason, error.fix)]
    seen = {(found[0].construct.partition("(")[0], place.rpartition("/")[2])}
    for function, line, why in calls:
        name = torch.overrides.resolve_name(function) or getattr(function, "__qualname__", str(function))
        if (name, line) in seen:
            continue
        seen.add((name, line))
        alternative = _ALTERNATIVES.get(name.rpartition(".")[2], "call it outside the compiled function")
        found.append(Unsupported(name, line, why, alternative, certain=False))
    return found


def _kind(function: Callable) -> str:
    try:
        return _C.function_kind(function)
    except Exception:
        return ""


def _operations(compiled: Any) -> Iterator[Operation]:
    import thunder

    claims = compiled_claims(compiled)
    declines: dict[str, list[tuple[str, str]]] = collections.defaultdict(list)
    for executor, name, reason in claims.declines if claims else ():
        declines[name].append((executor, reason))
    traces = [thunder.last_traces(compiled)[-1]]
    kinds = ["inference"]
    try:
        traces.append(thunder.last_backward_traces(compiled)[-1])
        kinds = ["forward", "backward"]
    except RuntimeError:
        pass
    for trace, kind in zip(traces, kinds, strict=True):
        counts: collections.Counter[tuple[str, str]] = collections.Counter()
        lines: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
        for name, executor, line in _calls(trace):
            counts[name, executor] += 1
            if line and line not in lines[name, executor]:
                lines[name, executor].append(line)
        for (name, executor), count in counts.most_common():
            yield Operation(
                name, kind, count, executor, tuple(lines[name, executor][:3]), tuple(declines.get(name, ()))
            )


def _calls(trace: Any) -> Iterator[tuple[str, str, str]]:
    """(operation, executor, line) of a trace, those inside its units included."""
    names = trace.namespace()
    lines = {}
    for text in str(trace).splitlines():
        match = _LINE.match(text)
        if match:
            lines.setdefault(match[1], []).append(match[2])
    for name in trace.operations():
        unit = names.get(name)
        line = lines[name].pop(0) if lines.get(name) else ""
        if isinstance(unit, _C.Region):
            executor = "torch" if unit.state == "refused" else unit.executor.name
            yield from ((inner, executor, place or line) for inner, _, place in _calls(unit.trace))
        else:
            yield name, "torch", line


def _compare(ours: _Run, eager: _Run, wide: _Run | None, near: Sequence[_Run] = ()) -> Iterator[Comparison]:
    """``near``: eager on inputs that differ in the last bit, by which its error is known where all is rounding."""
    theirs = {**_numbered(eager.outputs), **eager.gradients}
    mine = {**_numbered(ours.outputs), **ours.gradients}
    truth = {**_numbered(wide.outputs), **wide.gradients} if wide else {}
    for name, expected in theirs.items():
        found = mine.get(name)
        if expected is None and found is None:
            continue
        others = [{**_numbered(r.outputs), **r.gradients}.get(name) for r in near]
        yield _one(name, found, expected, truth.get(name), [o for o in others if o is not None])


def _numbered(outputs: list[Tensor]) -> dict[str, Tensor]:
    return {f"output {i}": t for i, t in enumerate(outputs)}


def _one(
    name: str, found: Tensor | None, expected: Tensor | None, truth: Tensor | None, others: list[Tensor]
) -> Comparison:
    if expected is None or found is None:
        present = expected if found is None else found
        zero = torch.zeros_like(present)
        found, expected = (zero if found is None else found), (zero if expected is None else expected)
    found, expected = found.detach(), expected.detach()
    dtype = str(expected.dtype).removeprefix("torch.")
    wrong = _verify._other_form(expected, found)
    if wrong and not wrong.startswith("has strides"):
        return Comparison(name, dtype, None, None, None, False)
    wrong = _verify._other_numbers(expected, found)
    error = eager_error = None
    if truth is not None and truth.shape == expected.shape and expected.dtype.is_floating_point:
        error, eager_error = _distance(found, truth.detach()), _distance(expected, truth.detach())
    usual = [_distance(o.detach(), truth.detach()) for o in others if error is not None and o.shape == truth.shape]
    # The median: one that took another branch says nothing of rounding.
    allowed = 4 * max(eager_error, statistics.median(usual) if usual else 0.0) if error is not None else 0.0
    right = not wrong or (error is not None and error <= allowed)
    return Comparison(name, dtype, _distance(found, expected), error, eager_error, right)


def _distance(a: Tensor, b: Tensor) -> float:
    if not a.numel():
        return 0.0
    wide = torch.complex128 if a.dtype.is_complex or b.dtype.is_complex else torch.float64
    return (a.to(wide) - b.to(wide)).abs().nan_to_num(nan=0.0).max().item()
