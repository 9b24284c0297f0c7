"""``torchcompile``: regions through Inductor, torch.compile's code generator, without Dynamo and its guards.

A region becomes a graph of ATen operations on fake tensors, which goes to Inductor as it is; our plan calls what
comes back with one list of tensors. The numbers are those of ``torch.compile``: fused operations round once where eager
rounds after each.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch

from thunder import _C
from thunder._errors import ThunderWarning
from thunder._verify import body_of, function_of
from thunder.executors._families import Form, Text, form_of
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
        self._families: dict[Any, _Family] = {}

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
        """Generate code for a region: seconds. C++ compilers that work on it then need neither us nor each other.

        For the second region that is equal to a former one but for sizes, it is code for any sizes, which serves those
        that follow.
        """
        text = Text(region.trace)
        family = self._families.setdefault(text.skeleton, _Family())
        made = family.made_for(text)
        if made is not None:
            return made
        form = family.form_with(text)
        if form is not None:
            try:
                return family.keep(*self._build(region.trace, form))
            except Exception:  # some operations are not for any sizes
                family.hopeless = True
        family.texts.append(text)
        return self._build(region.trace)[0]

    def _build(self, trace: Any, form: Form | None = None) -> tuple[Callable | Future, _Symbols | None]:
        ways = _ways(trace, self.options)
        compiled, compilers, symbols = self._generate(trace, form, ways)
        if not compilers:
            return _caller(compiled), symbols
        return _beside(functools.partial(self._join, trace, form, ways, compiled, compilers)), symbols

    def _generate(self, trace: Any, form: Form | None, ways: list[_Way]) -> tuple[Any, list[Callable], _Symbols | None]:
        """What comes of the first way that works; it and those that did not are taken off the list."""
        while True:
            way = ways.pop(0)
            try:
                with self._lock:
                    return _compile(trace, form, self.options, way)
            except Exception as error:
                if not ways:
                    raise
                if way.cpp and isinstance(error, _compile_error()):
                    _leave_wrapping(trace, ways, error)

    def _join(
        self, trace: Any, form: Form | None, ways: list[_Way], compiled: Any, compilers: list[Callable]
    ) -> Callable:
        while True:
            try:
                for wait in compilers:
                    wait()
                return _caller(compiled)
            except _compile_error() as error:
                if not ways:
                    raise
                _leave_wrapping(trace, ways, error)
                compiled, compilers, _ = self._generate(trace, form, ways)


class _Symbols:
    """Code for any sizes, and for which it was made: torch knows what it took for granted of them."""

    def __init__(self, form: Form, mode: Any, fakes: list[torch.Tensor]) -> None:
        self.form = form
        self._env = mode.shape_env
        self._symbols = {}
        for i, d in set(form.free.values()):
            self._symbols[fakes[i].shape[d].node._expr] = i, d  # not what it turned out to be equal to

    def check(self) -> None:
        """Nothing was decided that leaves one size only.

        Raises:
            ValueError: something was.
        """
        if any(self._env.replace(symbol).is_number for symbol in self._symbols):
            raise ValueError("the operations are for one size only")

    def hold(self, text: Text) -> bool:
        if not self.form.fits(text):
            return False
        values = {symbol: text.shapes[i][d] for symbol, (i, d) in self._symbols.items()}
        within = all(self._env.var_to_range[s].lower <= n <= self._env.var_to_range[s].upper for s, n in values.items())
        return within and all(bool(guard.expr.xreplace(values) == True) for guard in self._env.guards)  # noqa: E712


class _Family:
    """Regions that are equal but for numbers.

    Attributes:
        texts: those that have code for their very sizes.
        hopeless: code for any sizes was tried in vain.
    """

    MOST = 2  # codes for any sizes

    def __init__(self) -> None:
        self.texts: list[Text] = []
        self.hopeless = False
        self._made: list[tuple[_Symbols, Callable | Future]] = []

    def made_for(self, text: Text) -> Callable | Future | None:
        """Code that is there already."""
        return next((made for symbols, made in self._made if symbols.hold(text)), None)

    def form_with(self, text: Text) -> Form | None:
        """That of code for any sizes, if some should be generated now."""
        if self.hopeless or not self.texts or len(self._made) >= self.MOST:
            return None
        return form_of(self.texts[-1], text)

    def keep(self, made: Callable | Future, symbols: _Symbols) -> Callable | Future:
        self._made.append((symbols, made))
        return made


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
    devices = _devices(trace)
    cpp = options.get("cpp_wrapper", devices <= _wrapped and _C.torch_abi()["handles"])
    checks = [True] if _instructions.doubted else [False, True]
    wrapped = checks[:1] if devices == {"cpu"} else checks  # of kernels on the CPU it is the lesser part
    return [*(_Way(True, checked) for checked in wrapped if cpp), *(_Way(False, checked) for checked in checks)]


def _devices(trace: Any) -> set[str]:
    return {p.device.type for p in (*trace.inputs, *trace.output)}


_wrapped = {"cpu", "cuda"}  # devices for which C++ can call the kernels


def _leave_wrapping(trace: Any, ways: list[_Way], error: Exception) -> None:
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


def _compile(
    trace: Any, form: Form | None, options: dict[str, Any], way: _Way
) -> tuple[Any, list[Callable[[], None]], _Symbols | None]:
    """(what Inductor makes of a region, what has to be waited for before it runs, its sizes where they may be any)."""
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes

    with torch.no_grad(), no_modes():
        mode, graph, fakes = aten_graph(trace, form)
        symbols = None if form is None else _Symbols(form, mode, fakes)
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


@contextlib.contextmanager
def no_modes() -> Any:
    """A build in the thread of a call sees none of the modes around that call."""
    from torch.utils._python_dispatch import _disable_current_modes

    with torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


def aten_graph(trace: Any, form: Form | None = None) -> tuple[Any, torch.fx.GraphModule, list[torch.Tensor]]:
    """A region as ATen operations: (fake mode, graph, its fake inputs)."""
    from torch._functorch.compile_utils import fx_graph_cse
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    body = body_of(trace) if form is None else function_of(trace, form.text.generalised(form.numbers))
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=None if form is None else ShapeEnv())

    def program(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        _tracing_is_ours_alone()
        return tuple(_laid_out(t, p.stride()) for t, p in zip(body(*tensors), trace.output, strict=True))

    inputs = [(p.shape, p.stride(), p.dtype, p.device) for p in trace.inputs]
    if form is not None:
        fakes = [_symbolic(mode, i, form, *given) for i, given in enumerate(inputs)]
    with mode:
        if form is None:
            fakes = [torch.empty_strided(shape, stride, dtype=d, device=v) for shape, stride, d, v in inputs]
        graph = make_fx(program, decomposition_table=select_decomp_table())(*fakes)
    graph.graph = fx_graph_cse(graph.graph)  # what operations have in common comes out when they are taken apart
    graph.recompile()
    return mode, graph, fakes


def _tracing_is_ours_alone() -> None:
    """The flag that says that FX traces is the process's: calls in other threads would refuse to run under Dynamo."""
    from torch.fx import _symbolic_trace

    if getattr(_symbolic_trace, "_is_fx_tracing_flag", False):
        _symbolic_trace._is_fx_tracing_flag = False


def _symbolic(mode: Any, i: int, form: Form, shape: Any, stride: Any, dtype: Any, device: Any) -> torch.Tensor:
    """An input some of whose sizes may be any."""
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    kinds = [DimDynamic.DUCK if (i, d) in form.free else DimDynamic.STATIC for d in range(len(shape))]
    given = torch.empty_strided(shape, stride, dtype=dtype, device=device)
    return mode.from_tensor(given, symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds))


def _here(n: Any) -> int:
    """A size or stride of the region that code is generated from."""
    return n.node.hint if isinstance(n, torch.SymInt) else n


def _laid_out(t: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """A result as eager lays it out: some decompositions have other strides than the kernels they stand for."""
    if all(_here(n) <= 1 or _here(a) == b for n, a, b in zip(t.shape, t.stride(), strides, strict=True)):
        return t
    order = sorted(range(t.dim()), key=lambda d: -strides[d])
    back = sorted(range(t.dim()), key=lambda d: order[d])
    return t.permute(order).clone(memory_format=torch.contiguous_format).permute(back)


torchcompile_executor = register_executor(TorchCompileExecutor())
