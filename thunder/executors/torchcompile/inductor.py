"""Inductor, called as its own front end calls it, but for a few things: compilers work side by side, what a processor
knows is not found out first, and what calls the kernels is C++ that our plan calls with its handles.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from thunder import _C
from thunder._errors import ThunderWarning
from thunder.executors._families import Form
from thunder.executors.torchcompile.graph import Symbols, aten_graph, no_modes


class Way(NamedTuple):
    """How a region is built.

    Attributes:
        cpp: what calls its kernels is C++ as well, which our plan calls with its handles.
        checked: Inductor finds out which instructions the compiler knows.
    """

    cpp: bool
    checked: bool


def ways_for(trace: Any, options: dict[str, Any]) -> list[Way]:
    """Those to try, in order."""
    devices = _devices(trace)
    fits = devices <= _wrapped and _C.torch_abi()["handles"] and not options.get("triton.cudagraphs")
    cpp = options.get("cpp_wrapper", fits)
    checks = [True] if _instructions.doubted else [False, True]
    wrapped = checks[:1] if devices == {"cpu"} else checks  # of kernels on the CPU it is the lesser part
    return [*(Way(True, checked) for checked in wrapped if cpp), *(Way(False, checked) for checked in checks)]


def _devices(trace: Any) -> set[str]:
    return {p.device.type for p in (*trace.inputs, *trace.output)}


_wrapped = {"cpu", "cuda"}  # devices for which C++ can call the kernels


def leave_wrapping(trace: Any, ways: list[Way], error: Exception) -> None:
    """C++ that calls CUDA's kernels needs CUDA's headers, which torch does not bring: once it did not compile it is not
    tried again."""
    if "cuda" not in _wrapped & _devices(trace) or any(way.cpp for way in ways):
        return
    _wrapped.discard("cuda")
    lines = [line.strip() for line in str(error).splitlines() if "error" in line]
    warnings.warn(
        "thunder: torchcompile calls CUDA kernels from Python, which takes longer: the C++ that would call them does "
        f"not compile ({lines[-1] if lines else type(error).__name__}). What to do: install the headers of the CUDA "
        "toolkit that torch was built with, and set CUDA_HOME if they are not found.",
        ThunderWarning,
        stacklevel=2,
    )


def build(
    trace: Any, form: Form | None, options: dict[str, Any], way: Way
) -> tuple[Any, list[Callable[[], None]], Symbols | None]:
    """(what Inductor makes of a region, what has to be waited for before it runs, its sizes where they may be any)."""
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes

    with torch.no_grad(), no_modes():
        mode, graph, fakes = aten_graph(trace, form)
        symbols = None if form is None else Symbols(form, mode, fakes)
        assumed = {} if way.checked else _instructions.assumed(config)
        settings = {**_known(config), **assumed, **(_wrapper_settings() if way.cpp else {}), **options}
        if way.checked:
            _instructions.doubt()
        granted = contextlib.nullcontext() if way.checked else _instructions.granted()
        tracing_here = tracing(TracingContext(mode))
        with mode, tracing_here, config.patch(settings), granted, _compilers_beside(graph) as compilers:
            compiled = compile_fx_inner(joint_graph_passes(graph), fakes, cpp_wrapper=way.cpp)
        if symbols is not None:
            symbols.check()
    return compiled, compilers, symbols


def _wrapper_settings() -> dict[str, Any]:
    """What Inductor sets for C++ wrappers: kernels of GPUs are tuned while code is generated, and kept as files."""
    from torch._inductor import compile_fx

    return compile_fx.get_cpp_wrapper_config() if hasattr(compile_fx, "get_cpp_wrapper_config") else {}


def compile_error() -> type[Exception]:
    """What a C++ compiler's failure raises."""
    from torch._inductor.exc import CppCompileError

    return CppCompileError


class _Instructions:
    """Which vector instructions a C++ compiler knows. Inductor compiles a file of torch's headers for each kind before
    it generates anything, which takes longer than the kernels. What the processor has is taken for granted here until
    a kernel does not compile: then Inductor finds out.

    Attributes:
        doubted: one did not.
    """

    def __init__(self) -> None:
        self.doubted = False

    def assumed(self, config: Any) -> dict[str, Any]:
        """Settings for a build."""
        return {"cpp.vec_isa_ok": True} if getattr(config.cpp, "vec_isa_ok", False) is None else {}

    @contextlib.contextmanager
    def granted(self) -> Iterator[None]:
        """For a build: kinds with parts that not all processors of theirs have ask for those whatever the settings.
        Where Inductor knows already, nothing; else it does not know afterwards either."""
        from torch._inductor import cpu_vec_isa

        kind, here = getattr(cpu_vec_isa, "VecISA", None), threading.get_ident()
        check, found = getattr(kind, "check_build", None), getattr(cpu_vec_isa, "valid_vec_isa_list", None)
        if check is None or not hasattr(found, "cache_info") or found.cache_info().currsize:
            yield
            return

        def granted(self: Any, code: str) -> bool:
            return True if threading.get_ident() == here else check(self, code)

        with _replaced(kind, "check_build", granted):
            try:
                yield
            finally:
                self._forget()

    def doubt(self) -> None:
        """Inductor finds out from here on."""
        if not self.doubted:
            self.doubted = True
            self._forget()

    def _forget(self) -> None:
        from torch._inductor import cpu_vec_isa

        isas = getattr(cpu_vec_isa, "supported_vec_isa_list", [])
        for isa in isas:  # which parts a processor has
            for part in [name for name in vars(isa) if name.endswith("_supported")]:
                delattr(isa, part)
        answers = [answer for isa in isas for kind in type(isa).__mro__ for answer in vars(kind).values()]
        for known in (getattr(cpu_vec_isa, "valid_vec_isa_list", None), *answers):
            if hasattr(known, "cache_clear"):
                known.cache_clear()


_instructions = _Instructions()


@contextlib.contextmanager
def _compilers_beside(graph: torch.fx.GraphModule) -> Iterator[list[Callable[[], None]]]:
    """Inductor starts a C++ compiler for each kernel and wrapper and waits for all of them. Within, it does not wait:
    what it would have done is in the list. Code for other devices is kept with what the compilers of its kernels made,
    so it waits for those; its wrapper, which holds no kernels, is compiled with few optimisations."""
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.codecache import CppWrapperCodeCache

    waits: list[Callable[[], None]] = []
    values = [n.meta["val"] for n in graph.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    on_cpu = all(v.device.type == "cpu" for v in values)
    wait, load_now, here = AsyncCompile.wait, CppWrapperCodeCache.load_pybinding, threading.get_ident()
    header = CppWrapperCodeCache.__dict__.get("_get_uncompiled_header")

    def wait_later(self: AsyncCompile, scope: dict[str, Any]) -> None:
        if threading.get_ident() != here:
            return wait(self, scope)
        waits.append(functools.partial(wait, self, scope))

    def load_later(cls: type, *args: Any, **kwargs: Any) -> Callable:
        if threading.get_ident() != here:
            return load_now(*args, **kwargs)
        if not on_cpu and kwargs.get("kernel_code", True) is None:
            kwargs["kernel_code"] = ""
        loaded = _Loaded(cls.load_pybinding_async(*args, submit_fn=AsyncCompile.submit, **kwargs))
        waits.append(loaded.wait)
        return loaded

    with contextlib.ExitStack() as undo:
        if on_cpu:
            undo.enter_context(_replaced(AsyncCompile, "wait", wait_later))
        undo.enter_context(_replaced(CppWrapperCodeCache, "load_pybinding", classmethod(load_later)))
        if on_cpu and header is not None:
            both = classmethod(lambda cls, device: _with_kernels(header.__get__(None, cls)(device)))
            undo.enter_context(_replaced(CppWrapperCodeCache, "_get_uncompiled_header", both))
        yield waits


@contextlib.contextmanager
def _replaced(cls: type, name: str, value: Any) -> Iterator[None]:
    """``value`` in the place of an attribute that a class has itself or inherits."""
    own = cls.__dict__.get(name)
    setattr(cls, name, value)
    try:
        yield
    finally:
        if own is None:
            delattr(cls, name)
        else:
            setattr(cls, name, own)


def _with_kernels(header: str | None) -> str | None:
    """Inductor precompiles the header of C++ wrappers alone: that of the kernels in the same file, which takes a second
    to parse, comes along. What it writes is ``#include <...>``."""
    return header and f"{header}>\n#include <torch/csrc/inductor/cpp_prefix.h"


class _Loaded:
    """The function of a C++ wrapper: there once its compiler was waited for."""

    def __init__(self, load: Callable[[], Callable]) -> None:
        self._load = load
        self.function: Callable | None = None

    def wait(self) -> None:
        if self.function is None:
            self.function = self._load()

    def __call__(self, handles: list[Any]) -> list[Any]:
        self.wait()
        return self.function(handles)


def _known(config: Any) -> dict[str, Any]:
    """What generated code need not look at: where torch's C interface is there, the plan compares its inputs before."""
    return {"size_asserts": False} if _C.torch_abi()["handles"] and hasattr(config, "size_asserts") else {}


def caller(compiled: Any) -> Callable:
    """What a plan calls, with its handles where C++ takes them, else with tensors."""
    call = getattr(compiled, "current_callable", None) or compiled
    below, aligned = _below_alignment(call)
    function = _function_of_handles(below)
    if function is not None:
        return _C.HandleCall(function, aligned, *_alignment()) if any(aligned) else _C.HandleCall(function)

    def run(*tensors: torch.Tensor) -> Any:
        return call([*tensors])

    return run


def _below_alignment(call: Any) -> tuple[Any, bytes]:
    """(what Inductor calls once the addresses of some inputs are known to be aligned, for each input whether it is one
    of them); a call that writes to inputs stays as it is."""
    code = getattr(call, "__code__", None)
    if code is None or code.co_freevars != ("inputs_to_check", "model", "mutated_input_idxs"):
        return call, b""
    places, model, written = (cell.cell_contents for cell in call.__closure__)
    return (call, b"") if written else (model, bytes(i in places for i in range(max(places) + 1)))


def _alignment() -> tuple[int, Callable]:
    """(bytes, what makes an aligned copy)"""
    from torch._inductor import utils

    return utils.ALIGNMENT, utils.clone_preserve_strides


def _function_of_handles(call: Any) -> Callable | None:
    """The C++ below the Python that Inductor puts around it, where that only makes handles and tensors of each other:
    constants of the graph and results that are numbers make it another."""
    code, scope = getattr(call, "__code__", None), getattr(call, "__globals__", {})
    names = ["args", "input_tensors", "input_handles", "output_handles", "output_tensors"]
    if code is None or [n for n in code.co_varnames if n != "arg"] != names or "item" in code.co_names:
        return None
    function = scope.get("inductor_entry")
    return function.function if isinstance(function, _Loaded) else function
