"""``thunder.jit`` and what can be asked about a compiled callable."""

from __future__ import annotations

import difflib
import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from thunder import _C
from thunder._errors import ThunderWarning
from thunder._module import ThunderModule
from thunder._recompile import Log, Recompiles
from thunder.dynamo import Fallback
from thunder.extend import Executor, resolve_executors
from thunder.extend.claims import TIERS, VERIFY, make_claims
from thunder.extend.decompose import decompositions
from thunder.transforms._base import check_transforms, copied_tree, overrides, run_hook, trace_hook

_CACHE_OPTIONS = {"constant values": 0, "no caching": 1, "same input": 2}
_FALLBACKS = ("dynamo", "eager", "error")
DEFAULT_FALLBACK = "dynamo"
_REMAT = {"off": 0, "auto": 1, "max": 2}


def jit(
    fn: Callable | torch.nn.Module | None = None,
    /,
    *,
    executors: Sequence[Executor | str] | None = None,
    transforms: Sequence[Any] | None = None,
    cache: str = "constant values",
    fallback: str | None = None,
    remat: str = "auto",
    verify: str = "first",
    tier: str = "background",
    fuel: int | None = None,
    branch_limit: int = 16,
    recompile_limit: int = 8,
    dynamic: bool | None = None,
    **options: Any,
) -> Any:
    """Compile a PyTorch callable or module.

    Args:
        fn: a function, method or other callable of PyTorch code, or an ``nn.Module``. Left out: a decorator.
        executors: executors or their names, in order of priority; ``None`` takes the default ones.
        transforms: ``thunder.Transform`` objects to apply, in order. Those that change modules get a copy of the module
            tree that shares its tensors.
        cache: ``"constant values"`` compiles once for each set of argument structures, values of numbers and tensor
            metadata; ``"no caching"`` compiles at every call; ``"same input"`` compiles once and checks the arguments
            only, on the caller's word that nothing else changes.
        fallback: what to do with a callable that cannot be captured: ``"dynamo"``, the default, warns once and runs it
            under ``torch.compile`` with thunder as its backend, which keeps Python's meaning by breaking the program
            into graphs; ``"eager"`` warns once and runs the original; ``"error"`` raises ``thunder.CaptureError``.
        remat: what a training step saves for its backward pass: ``"off"`` what PyTorch's autograd would, ``"auto"``
            less where cheap operations can make a value again, ``"max"`` as little as possible.
        verify: when what another executor than torch computes is compared with torch: ``"first"`` at its first run,
            ``"always"``, ``"off"``.
        tier: what to do while an executor builds a region: ``"background"`` has torch run it until then, ``"block"``
            waits.
        fuel: how many units executors may claim in all; None: any number. ``thunder.bisect`` turns it.
        branch_limit: how many programs a call may have for different values of tensors that steer it (``if x.sum() >
            0``, ``x.item()``, ``nonzero``); beyond, it takes the fallback. 0: it always does.
        recompile_limit: after how many captures, the first not counted, to warn once of what makes them necessary;
            ``thunder.explain_recompile`` lists the causes. Calls go on being compiled.
        dynamic: sizes of arguments that change from call to call. ``None``: a program is made for any of them where
            what the code does with them can be followed, and each decision by a size (``if x.shape[0] > 1``) holds for
            the sizes that decide alike. ``True``: on the caller's word that sizes decide nothing. ``False``: each set
            of sizes has a program of its own.

    Returns:
        For a module a ``thunder.ThunderModule`` that shares its parameters and buffers; for another callable an object
        that is called like it.

    Raises:
        TypeError: ``fn`` cannot be compiled (a class, a generator function, a coroutine function, something that went
            through ``torch.compile``), an option is unknown, or a transform changes modules and ``fn`` is none.
        ValueError: an option has an unknown value.
        thunder.TransformError: a transform failed; also at a call.
        thunder.CaptureError: at a call, when the program cannot be captured.
    """
    settings = {
        "executors": executors,
        "transforms": transforms,
        "cache": cache,
        "fallback": DEFAULT_FALLBACK if fallback is None else fallback,
        "remat": remat,
        "verify": verify,
        "tier": tier,
        "fuel": fuel,
        "branch_limit": branch_limit,
        "recompile_limit": recompile_limit,
        "dynamic": dynamic,
    }
    if fn is None:
        return lambda target: jit(target, **settings, **options)
    _check_options(settings, options)
    _check_target(fn)
    chosen = resolve_executors(executors)
    settings["executors"] = chosen
    settings["transforms"] = check_transforms(transforms)
    return _compile(fn, settings)


def _compile(fn: Any, settings: dict[str, Any], transformed: bool = False, quiet: bool = False) -> Any:
    """What jit returns, from checked settings. transformed: the transforms have changed this module already; quiet: a
    part of a program of which it was said already that it runs in parts."""
    transforms, cache, fallback = settings["transforms"], settings["cache"], settings["fallback"]
    is_module = isinstance(fn, torch.nn.Module)
    changing = [t for t in transforms if overrides(t, "transform_module")]
    if changing and not is_module:
        raise TypeError(f"{changing[0]!r} changes modules: pass thunder.jit the nn.Module, not a {type(fn).__name__}")
    if changing and not transformed:
        fn = copied_tree(fn)
    result: list[Any] = []  # the hooks are told the compiled module
    claims = make_claims(settings["executors"], verify=settings["verify"], tier=settings["tier"], fuel=settings["fuel"])
    final = (*transforms, *decompositions(claims))
    if settings["dynamic"] and (claims is not None or final) and not quiet:
        warnings.warn(
            f"{_name(fn)}: dynamic=True is without effect where other executors than torch or transforms take part: "
            "each set of sizes has a program of its own",
            ThunderWarning,
            stacklevel=3,
        )
    log = Log(fn, _name(fn), settings["recompile_limit"], quiet or cache == "no caching")
    # A module is called through a plain function so that all of its hooks run during the capture.
    compiled = _C.Callable(
        fn,
        module=fn if is_module else _bound_module(fn),
        cache=_CACHE_OPTIONS[cache],
        refused=_refused(fn, settings),
        on_event=None if quiet else _reporter(fn, fallback),
        remat=_REMAT[settings["remat"]],
        transform=trace_hook(final, lambda: result[0] if is_module else None),
        needs_transform=any(overrides(t, "transform_trace") for t in transforms),
        claims=claims,
        branch_limit=settings["branch_limit"],
        log=log,
        dynamic={None: 1, False: 0, True: 2}[settings["dynamic"]],
    )
    compiled._thunder_settings = settings
    compiled._thunder_claims = claims
    compiled._thunder_log = log
    if is_module:
        result.append(ThunderModule(fn, compiled))
        for transform in changing if not transformed else ():
            run_hook(transform, "transform_module", result[0])
        return result[0]
    _copy_identity(compiled, fn)
    return compiled


_CHOICES = {"cache": (*_CACHE_OPTIONS,), "fallback": _FALLBACKS, "remat": (*_REMAT,), "verify": VERIFY, "tier": TIERS}


def _check_options(settings: dict[str, Any], unknown: dict[str, Any]) -> None:
    for name in unknown:
        near = difflib.get_close_matches(name, settings, 1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known options are {', '.join(settings)}"
        raise TypeError(f"thunder.jit got an unknown option {name!r}{hint}")
    for name, choices in _CHOICES.items():
        value = settings[name]
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, not {value!r}")
    fuel = settings["fuel"]
    if fuel is not None and (not isinstance(fuel, int) or fuel < 0):
        raise ValueError(f"fuel must be None or a number of units, not {fuel!r}")
    if settings["dynamic"] not in (None, True, False):
        raise ValueError(f"dynamic must be None, True or False, not {settings['dynamic']!r}")
    for name in ("branch_limit", "recompile_limit"):
        if not isinstance(settings[name], int) or settings[name] < 0:
            raise ValueError(f"{name} must be a number of programs, not {settings[name]!r}")


def _uses_torch_compile(fn: Any) -> str | None:
    """What of ``fn`` went through torch.compile, or None."""
    if isinstance(fn, functools.partial):
        return _uses_torch_compile(fn.func)
    if not isinstance(fn, torch.nn.Module):
        return "a function that went" if _is_compiled_function(fn) else None
    if part := _compiled_part(fn):
        return f"a module{part}"
    todo = [("", fn)]  # by hand: named_modules() costs more than the rest of jit()
    while todo:
        prefix, module = todo.pop()
        for name, child in module._modules.items():
            if child is None:
                continue
            if part := _compiled_part(child):
                return f"the submodule {prefix + name!r}{part}"
            todo.append((f"{prefix}{name}.", child))
    return None


def _compiled_part(module: torch.nn.Module) -> str | None:
    """Whether a module went through torch.compile, or its forward: how, or None."""
    kind, own = type(module), module.__dict__
    if kind.__name__ == "OptimizedModule" and kind.__module__.startswith("torch._dynamo"):
        return " that went"
    if own.get("_compiled_call_impl") is not None:
        return " that went"
    forward = own.get("forward") or getattr(kind, "forward", None)
    return " whose forward went" if _is_compiled_function(forward) else None


def _is_compiled_function(fn: Any) -> bool:
    """What torch.compiler.disable gives has the marks of torch.compile too."""
    return hasattr(fn, "_torchdynamo_orig_callable") and not getattr(fn, "_torchdynamo_disable", False)


def _check_target(fn: Any) -> None:
    how = _uses_torch_compile(fn)
    if how:
        raise TypeError(
            f"thunder.jit was given {how} through torch.compile. Compile with one of them: to have "
            "torch.compile optimise regions of the program, leave torch.compile out and write thunder.jit(model, "
            "executors=[thunder.extend.get_executor('torchcompile'), *thunder.get_always_executors()])"
        )
    if isinstance(fn, (_C.Callable, ThunderModule)):
        raise TypeError("thunder.jit was given something that is compiled already: pass the original")
    if isinstance(fn, type):
        raise TypeError(
            f"thunder.jit was given the class {fn.__name__}: make an instance first, thunder.jit({fn.__name__}(...))"
        )
    if not callable(fn):
        raise TypeError(f"thunder.jit compiles callables and modules, not {type(fn).__name__}")
    code = fn.forward if isinstance(fn, torch.nn.Module) else fn
    if inspect.isgeneratorfunction(code) or inspect.isasyncgenfunction(code):
        raise TypeError(
            f"thunder.jit cannot compile the generator function {_name(fn)}: return a list instead of yielding"
        )
    if inspect.iscoroutinefunction(code):
        raise TypeError(f"thunder.jit cannot compile the coroutine function {_name(fn)}: compile the synchronous part")


def _name(fn: Any) -> str:
    return getattr(fn, "__qualname__", None) or type(fn).__name__


def _bound_module(fn: Any) -> torch.nn.Module | None:
    """The module whose state a bound method reads."""
    owner = getattr(fn, "__self__", None)
    return owner if isinstance(owner, torch.nn.Module) else None


def _copy_identity(compiled: Any, fn: Any) -> None:
    for attribute in ("__name__", "__qualname__", "__doc__", "__module__"):
        value = getattr(fn, attribute, None)
        if value is not None:
            compiled.__dict__[attribute] = value


def _refused(fn: Any, settings: dict[str, Any]) -> Callable | None:
    """What runs the callable where it cannot be captured; None: nobody."""
    if settings["fallback"] == "error":
        return None
    if settings["fallback"] == "eager":
        return fn
    part = {**settings, "fallback": "eager", "transforms": (), "fuel": None, "cache": "constant values"}
    return Fallback(fn, lambda graph: _compile(graph, part, quiet=True))


def _reporter(fn: Any, fallback: str) -> Callable[[str, Any], None]:
    name = _name(fn)
    how = "runs under torch.compile, in parts" if fallback == "dynamo" else "runs eager"

    def report(event: str, detail: Any) -> None:
        if event == "grad":
            text = f"{name}: runs eager where gradients are needed: {detail}"
        elif event == "raised":
            text = f"{name}: runs eager: {detail}"
        elif event == "modes":
            text = f"{name}: a torch function or dispatch mode is active around the call, so it runs eager"
        else:
            text = f"{name}: {how}: {detail}"
        warnings.warn(text, ThunderWarning, stacklevel=2)

    return report


# ---- questions about a compiled callable ----


def _compiled(fn: Any) -> Any:
    fn = getattr(fn, "_thunder_callable", fn)  # of a module, of thunder.grad
    if isinstance(fn, _C.Callable):
        return fn
    raise TypeError(f"not something that thunder.jit returned: {type(fn).__name__}")


def cache_hits(fn: Any) -> int:
    """How many calls were served by a program compiled before."""
    return _compiled(fn)._stats()["cache_hits"]


def cache_misses(fn: Any) -> int:
    """How many calls had to capture."""
    return _compiled(fn)._stats()["cache_misses"]


def explain_recompile(fn: Any) -> Recompiles:
    """Why calls of ``fn`` were captured after the first: what had changed, from what to what.

    ::

        >>> print(thunder.explain_recompile(compiled))
        Net: captured again 2 times
          call 2: Net.scale went from 1.0 to 2.0
          call 3: shape of argument 'x' went from (2, 3) to (4, 3), and 1 more
    """
    log = _compiled(fn)._thunder_log
    return Recompiles(log.name, list(log.recompiles))


def cache_option(fn: Any) -> str:
    """The ``cache`` option that ``fn`` was compiled with."""
    return last_compile_options(fn)["cache"]


def last_compile_options(fn: Any) -> dict[str, Any]:
    """The options that ``fn`` was compiled with, defaults included."""
    return dict(_compiled(fn)._thunder_settings)


def list_transforms(fn: Any) -> tuple[Any, ...]:
    """The transforms that ``fn`` was compiled with, in order."""
    return last_compile_options(fn)["transforms"]


class CompileStats:
    """Counters of a compiled callable, read when this object is made.

    Attributes:
        calls, cache_hits, cache_misses: calls and how they were served.
        fallbacks: calls that ran the original instead of compiled code.
        last_trace_tracing_start, last_trace_tracing_stop: when the newest program was captured, in nanoseconds; their
            difference is what counts.
        entries: a dict for each compiled program, most recent first: ``hits``, times in milliseconds (``capture_ms``,
            ``passes_ms``, ``lower_ms``), ``operations``, ``instructions``, ``values`` (of tensors: how many it was
            captured for), ``any_sizes`` (it serves calls of any sizes and ints that decide alike), and how operations
            were recorded. Of one that was differentiated: ``saved_bytes``, ``catalogue_rules`` (how many operations had
            a derivative of ours) and ``derived_rules`` (the names of those whose derivative was taken from torch's
            autograd).
    """

    def __init__(self, stats: dict[str, Any]) -> None:
        self.calls: int = stats["calls"]
        self.cache_hits: int = stats["cache_hits"]
        self.cache_misses: int = stats["cache_misses"]
        self.fallbacks: int = stats["fallbacks"]
        self.entries: list[dict[str, Any]] = stats["entries"]
        self.last_trace_tracing_start = 0
        self.last_trace_tracing_stop = int(self.entries[0]["capture_ms"] * 1e6) if self.entries else 0

    def __repr__(self) -> str:
        return (
            f"CompileStats(calls={self.calls}, cache_hits={self.cache_hits}, cache_misses={self.cache_misses}, "
            f"fallbacks={self.fallbacks}, entries={len(self.entries)})"
        )


def compile_stats(fn: Any) -> CompileStats:
    """Counters of a compiled callable."""
    return CompileStats(_compiled(fn)._stats())


def last_traces(fn: Any) -> list[_C.Trace]:
    """The trace of the program used last at every stage: as captured, after each pass, and as it runs. Printable.

    The last one differs from the pass before it where operations without inputs were evaluated once: their results are
    objects named ``k_...`` there. Like all foreign objects they are in ``namespace()`` of the trace, which is what its
    text needs to run: ``exec(str(trace), names := trace.namespace())``.

    Raises:
        RuntimeError: nothing was compiled yet.
    """
    traces = _compiled(fn)._traces()
    if traces is None:
        raise RuntimeError("nothing was compiled yet: call the function first")
    captured, final = traces[:2]
    return [*captured.stages(), final]


def last_backward_traces(fn: Any) -> list[_C.Trace]:
    """How the program used last is differentiated: the gradients computed from its inputs, then the backward that runs.

    The inputs of the backward are what the forward saved (the last values that ``last_traces(fn)[-1]`` returns) and the
    gradients of its results.

    Raises:
        RuntimeError: nothing was compiled yet, or the program used last needed no gradients.
    """
    traces = _compiled(fn)._traces()
    if traces is None or len(traces) < 4:
        raise RuntimeError(
            "no program with gradients was compiled: call the function on tensors that require grad first"
        )
    return list(traces[2:])
