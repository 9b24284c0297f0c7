"""``torchcompile``: regions through Inductor, torch.compile's code generator, without Dynamo and its guards.

A region becomes a graph of ATen operations on fake tensors, which goes to Inductor as it is; our plan calls what
comes back with one list of tensors. The numbers are those of ``torch.compile``: fused operations round once where eager
rounds after each.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch

from thunder import _C
from thunder._verify import body_of
from thunder.extend.executor import FusionExecutor
from thunder.extend.registry import register_executor

CUT = 48  # operations: more than there are between two attentions of a transformer

# Nothing to gain for a region of these alone: torch returns them without a kernel.
_VIEWS = frozenset(
    {"view", "reshape", "transpose", "t", "T", "mT", "permute", "expand", "expand_as", "unsqueeze"}
    | {"squeeze", "flatten", "unflatten", "detach", "__getitem__", "chunk", "split", "narrow", "select", "unbind"}
    | {"swapaxes", "movedim"}
)


# A kernel of its own either way. Left out, the layers of a transformer become equal regions.
_ATTENTION = (
    "torch.nn.functional.scaled_dot_product_attention",
    *(
        f"torch.ops.aten._scaled_dot_product_{kind}{direction}.default"
        for kind in (
            "flash_attention",
            "flash_attention_for_cpu",
            "efficient_attention",
            "cudnn_attention",
            "fused_attention_overrideable",
        )
        for direction in ("", "_backward")
    ),
)


class TorchCompileExecutor(FusionExecutor):
    """See the module. Derive from it to change ``options``, which are those of ``torch.compile(options=...)``."""

    options: dict[str, Any] = {}

    def __init__(self, name: str = "torchcompile") -> None:
        super().__init__(name, version=torch.__version__, cut=CUT, background=True)
        self.support_all(but=_ATTENTION)
        self._lock = threading.Lock()  # Inductor keeps its state in globals

    def wants(self, region: Any) -> bool | str:
        """Regions with at least two operations that run a kernel; one alone is torch's as well."""
        kernels = [name for name in region.trace.operations() if name.rpartition(".")[2] not in _VIEWS]
        if len(kernels) < 2:
            return "one kernel or none: there is nothing to fuse"
        for proxy in region.trace.inputs:
            if proxy.dtype is None:
                return "an input is no tensor"
            if proxy.device.type not in ("cpu", "cuda", "xpu", "mps"):
                return f"Inductor generates no code for {proxy.device.type}"
        return True

    def fuse(self, region: Any) -> Callable | Future:
        """Generate code for a region: seconds. C++ compilers that work on it then need neither us nor each other."""
        ways = _ways(region.trace, self.options)
        compiled, compilers = self._generate(region, ways)
        if not compilers:
            return _caller(compiled)
        return _beside(functools.partial(self._join, region, ways, compiled, compilers))

    def _generate(self, region: Any, ways: list[_Way]) -> tuple[Any, list[Callable[[], None]]]:
        """What comes of the first way that works; it and those that did not are taken off the list."""
        while True:
            way = ways.pop(0)
            try:
                with self._lock:
                    return _compile(region.trace, self.options, way)
            except Exception:
                if not ways:
                    raise

    def _join(self, region: Any, ways: list[_Way], compiled: Any, compilers: list[Callable[[], None]]) -> Callable:
        while True:
            try:
                for wait in compilers:
                    wait()
                return _caller(compiled)
            except _compile_error():
                if not ways:
                    raise
                compiled, compilers = self._generate(region, ways)


class _Way(NamedTuple):
    """How a region is built.

    Attributes:
        cpp: what calls its kernels is C++ as well, which our plan calls with its handles.
        checked: Inductor finds out which instructions the compiler knows.
    """

    cpp: bool
    checked: bool


def _ways(trace: Any, options: dict[str, Any]) -> list[_Way]:
    """Those to try, in order."""
    on_cpu = all(p.device.type == "cpu" for p in (*trace.inputs, *trace.output))
    cpp = options.get("cpp_wrapper", on_cpu and _C.torch_abi()["handles"])
    checks = [True] if _instructions.doubted else [False, True]
    return [*([_Way(True, checks[0])] if cpp else []), *(_Way(False, checked) for checked in checks)]


def _compile(trace: Any, options: dict[str, Any], way: _Way) -> tuple[Any, list[Callable[[], None]]]:
    """(what Inductor makes of a region, what has to be waited for before it runs)."""
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes

    with torch.no_grad(), no_modes():
        mode, graph, fakes = aten_graph(trace)
        settings = {**_known(config), **({} if way.checked else _instructions.assumed(config)), **options}
        if way.checked:
            _instructions.doubt()
        with mode, tracing(TracingContext(mode)), config.patch(settings), _compilers_beside(graph) as compilers:
            compiled = compile_fx_inner(joint_graph_passes(graph), fakes, cpp_wrapper=way.cpp)
    return compiled, compilers


def _compile_error() -> type[Exception]:
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

    def doubt(self) -> None:
        """Forget what was taken for granted."""
        if self.doubted:
            return
        from torch._inductor import cpu_vec_isa

        self.doubted = True
        kinds = [type(isa).__bool__ for isa in getattr(cpu_vec_isa, "supported_vec_isa_list", [])]
        for known in (getattr(cpu_vec_isa, "valid_vec_isa_list", None), *kinds):
            if hasattr(known, "cache_clear"):
                known.cache_clear()


_instructions = _Instructions()


@contextlib.contextmanager
def _compilers_beside(graph: torch.fx.GraphModule) -> Iterator[list[Callable[[], None]]]:
    """Inductor starts a C++ compiler for each kernel and waits for all of them. Within, it does not wait: what it would
    have done is in the list. Code for other devices is kept with what its compilers made, so it waits."""
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.codecache import CppWrapperCodeCache

    waits: list[Callable[[], None]] = []
    values = [n.meta["val"] for n in graph.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    if any(v.device.type != "cpu" for v in values):
        yield waits
        return
    wait, load, here = AsyncCompile.wait, CppWrapperCodeCache.__dict__.get("load_pybinding"), threading.get_ident()
    load_now = CppWrapperCodeCache.load_pybinding

    def wait_later(self: AsyncCompile, scope: dict[str, Any]) -> None:
        if threading.get_ident() != here:
            return wait(self, scope)
        waits.append(functools.partial(wait, self, scope))

    def load_later(cls: type, *args: Any, **kwargs: Any) -> Callable:
        if threading.get_ident() != here:
            return load_now(*args, **kwargs)
        loaded = _Loaded(cls.load_pybinding_async(*args, submit_fn=AsyncCompile.submit, **kwargs))
        waits.append(loaded.wait)
        return loaded

    AsyncCompile.wait = wait_later
    CppWrapperCodeCache.load_pybinding = classmethod(load_later)
    try:
        yield waits
    finally:
        AsyncCompile.wait = wait
        if load is None:
            del CppWrapperCodeCache.load_pybinding
        else:
            CppWrapperCodeCache.load_pybinding = load


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


def _beside(work: Callable[[], Any]) -> Future:
    """Its result, from a thread of its own."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="thunder-compile", daemon=True).start()
    return future


def _known(config: Any) -> dict[str, Any]:
    """What generated code need not look at: where torch's C interface is there, the plan compares its inputs before."""
    return {"size_asserts": False} if _C.torch_abi()["handles"] and hasattr(config, "size_asserts") else {}


def _caller(compiled: Any) -> Callable:
    call = getattr(compiled, "current_callable", None) or compiled
    function = _function_of_handles(call)
    if function is not None:
        return _C.HandleCall(function)

    def run(*tensors: torch.Tensor) -> Any:
        return call([*tensors])

    return run


def _function_of_handles(call: Any) -> Callable | None:
    """The C++ below the Python that Inductor puts around it, where that only makes handles and tensors of each other:
    constants of the graph and results that are numbers make it another."""
    code, scope = getattr(call, "__code__", None), getattr(call, "__globals__", {})
    names = ("args", "input_tensors", "input_handles", "output_handles", "output_tensors")
    if code is None or code.co_varnames != names or "item" in code.co_names:
        return None
    function = scope.get("inductor_entry")
    return function.function if isinstance(function, _Loaded) else function


@contextlib.contextmanager
def no_modes() -> Any:
    """A build in the thread of a call sees none of the modes around that call."""
    from torch.utils._python_dispatch import _disable_current_modes

    with torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


def aten_graph(trace: Any) -> tuple[Any, torch.fx.GraphModule, list[torch.Tensor]]:
    """A region as ATen operations: (fake mode, graph, its fake inputs)."""
    from torch._functorch.compile_utils import fx_graph_cse
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    body = body_of(trace)
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def program(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        _tracing_is_ours_alone()
        return tuple(_laid_out(t, p.stride()) for t, p in zip(body(*tensors), trace.output, strict=True))

    with mode:
        fakes = [torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device=p.device) for p in trace.inputs]
        graph = make_fx(program, decomposition_table=select_decomp_table())(*fakes)
    graph.graph = fx_graph_cse(graph.graph)  # what operations have in common comes out when they are taken apart
    graph.recompile()
    return mode, graph, fakes


def _tracing_is_ours_alone() -> None:
    """The flag that says that FX traces is the process's: calls in other threads would refuse to run under Dynamo."""
    from torch.fx import _symbolic_trace

    if getattr(_symbolic_trace, "_is_fx_tracing_flag", False):
        _symbolic_trace._is_fx_tracing_flag = False


def _laid_out(t: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """A result as eager lays it out: some decompositions have other strides than the kernels they stand for."""
    if all(n <= 1 or a == b for n, a, b in zip(t.shape, t.stride(), strides, strict=True)):
        return t
    order = sorted(range(t.dim()), key=lambda d: -strides[d])
    back = sorted(range(t.dim()), key=lambda d: order[d])
    return t.permute(order).clone(memory_format=torch.contiguous_format).permute(back)


torchcompile_executor = register_executor(TorchCompileExecutor())
