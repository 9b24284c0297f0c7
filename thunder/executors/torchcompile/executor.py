"""The executor: what it takes, and which code serves which regions."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

from thunder.executors._families import Form, Text, form_of
from thunder.executors.torchcompile import inductor
from thunder.executors.torchcompile.graph import Symbols
from thunder.executors.torchcompile.inductor import Way
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
    """See the package. Derive from it to change ``options``, which are those of ``torch.compile(options=...)``."""

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

    def _build(self, trace: Any, form: Form | None = None) -> tuple[Callable | Future, Symbols | None]:
        ways = inductor.ways_for(trace, self.options)
        compiled, compilers, symbols = self._generate(trace, form, ways)
        if not compilers:
            return inductor.caller(compiled), symbols
        return _beside(functools.partial(self._join, trace, form, ways, compiled, compilers)), symbols

    def _generate(self, trace: Any, form: Form | None, ways: list[Way]) -> tuple[Any, list[Callable], Symbols | None]:
        """What comes of the first way that works; it and those that did not are taken off the list."""
        while True:
            way = ways.pop(0)
            try:
                with self._lock:
                    return inductor.build(trace, form, self.options, way)
            except Exception as error:
                if not ways:
                    raise
                if way.cpp and isinstance(error, inductor.compile_error()):
                    inductor.leave_wrapping(trace, ways, error)

    def _join(
        self, trace: Any, form: Form | None, ways: list[Way], compiled: Any, compilers: list[Callable]
    ) -> Callable:
        while True:
            try:
                for wait in compilers:
                    wait()
                return inductor.caller(compiled)
            except inductor.compile_error() as error:
                if not ways:
                    raise
                inductor.leave_wrapping(trace, ways, error)
                compiled, compilers, _ = self._generate(trace, form, ways)


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
        self._made: list[tuple[Symbols, Callable | Future]] = []

    def made_for(self, text: Text) -> Callable | Future | None:
        """Code that is there already."""
        return next((made for symbols, made in self._made if symbols.hold(text)), None)

    def form_with(self, text: Text) -> Form | None:
        """That of code for any sizes, if some should be generated now."""
        if self.hopeless or not self.texts or len(self._made) >= self.MOST:
            return None
        return form_of(self.texts[-1], text)

    def keep(self, made: Callable | Future, symbols: Symbols) -> Callable | Future:
        self._made.append((symbols, made))
        return made


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


torchcompile_executor = register_executor(TorchCompileExecutor())
