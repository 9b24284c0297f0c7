"""Executors in C: shared objects with the interface of ``include/thunder/executor.h``."""

from __future__ import annotations

import functools
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thunder import _C
from thunder._errors import ThunderWarning
from thunder.extend.executor import Implementation, OperatorExecutor
from thunder.extend.registry import register_executor


class NativeExecutor(OperatorExecutor):
    """An executor that is a shared object: made by ``load_executor``.

    Attributes:
        path: of the shared object.
        operators: the new operators, by name: what ``torch.ops.thunder_<executor>`` has.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(Path(path).resolve())
        name, version, operators = _C.load_native(self.path)
        super().__init__(name, version=version)
        self.operators: dict[str, Any] = {}
        self._library: torch.library.Library | None = None
        by_name = {op.name: op for op in operators}
        for op in operators:
            key = _C.operator_key(op.name) if op.schema is None else self._define(op)
            self._table[key] = Implementation(None, native=op)
        for op in operators:
            if op.derivative is not None:
                if op.derivative not in by_name:
                    raise ImportError(f"{self.path}: it has no {op.derivative}, the derivative of {op.name}")
                self._differentiate(op)

    def _define(self, op: Any) -> str:
        """A new operator, in ``torch.ops.thunder_<executor>``."""
        space = f"thunder_{self.name}"
        if torch._C._jit_get_schemas_for_operator(f"{space}::{op.name}"):
            raise ImportError(
                f"{self.path}: operator {space}::{op.name} is there already, of another executor called {self.name!r}"
            )
        if self._library is None:
            self._library = torch.library.Library(space, "FRAGMENT")
        try:
            self._library.define(f"{op.name}{op.schema}")
        except RuntimeError as error:
            raise ImportError(f"{self.path}: the operator {op.name}{op.schema}: {error}") from None
        self._library.impl(op.name, functools.partial(_run, self, op), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{space}::{op.name}", functools.partial(_meta, op), lib=self._library)
        overload = getattr(getattr(torch.ops, space), op.name).default
        self.operators[op.name] = overload
        return f"torch.ops.{space}.{op.name}.default"

    def _differentiate(self, op: Any) -> None:
        backward = self.operators[op.derivative]

        def keep(ctx: Any, inputs: tuple, output: Any) -> None:
            ctx.save_for_backward(*(a for a in inputs if isinstance(a, Tensor)))
            ctx.others = [None if isinstance(a, Tensor) else (a,) for a in inputs]

        def differentiate(ctx: Any, *grads: Any) -> tuple:
            saved = iter(ctx.saved_tensors)
            inputs = [next(saved) if other is None else other[0] for other in ctx.others]
            found = backward(*grads, *inputs)
            given = iter(found if isinstance(found, (tuple, list)) else (found,))
            return tuple(next(given) if other is None else None for other in ctx.others)

        torch.library.register_autograd(
            f"thunder_{self.name}::{op.name}", differentiate, setup_context=keep, lib=self._library
        )


def _flat(results: list[Tensor]) -> Any:
    return results[0] if len(results) == 1 else tuple(results)


def _meta(op: Any, *args: Any) -> Any:
    return _flat(op.meta(args))


def _run(executor: NativeExecutor, op: Any, *args: Any) -> Any:
    """A call outside compiled code; once more with contiguous arguments where their strides are not taken."""
    kernel = _bind(executor, op, args)
    if isinstance(kernel, str):
        args = tuple(a.contiguous() if isinstance(a, Tensor) else a for a in args)
        again = _bind(executor, op, args)
        if isinstance(again, str):
            raise RuntimeError(f"executor {executor.name!r} does not take this call of {op.name}: {again}")
        kernel = again
    return kernel(*args)


def _bind(executor: NativeExecutor, op: Any, args: tuple) -> Any:
    """The kernel for a call, from a trace of this one operation; or why there is none."""
    names = [f"a{i}" for i in range(len(args))]
    tensors = {n: a for n, a in zip(names, args, strict=True) if isinstance(a, Tensor)}
    results = {f"r{i}": t for i, t in enumerate(op.meta(args))}
    lines = [
        "def call(" + ", ".join(f'{n}: "{_annotation(t)}"' for n, t in tensors.items()) + "):",
        *(f'    {n}: "{_annotation(t)}"' for n, t in results.items()),
        f"    {', '.join(results)} = torch.ops.thunder_{executor.name}.{op.name}.default("
        + ", ".join(n if n in tensors else repr(a) for n, a in zip(names, args, strict=True))
        + ")",
        f"    return ({', '.join(results)},)",
    ]
    return op.bind(_C.Trace("\n".join(lines) + "\n"))


def _annotation(t: Tensor) -> str:
    device = t.device.type if t.device.index is None else f"{t.device.type}:{t.device.index}"
    shape = ", ".join(map(str, t.shape))
    strides = "" if t.is_contiguous() else "{" + ", ".join(map(str, t.stride())) + "}"
    return f"{device} {_C_NAMES[t.dtype]}[{shape}]{strides}"


_C_NAMES = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
    torch.complex64: "c64",
    torch.complex128: "c128",
}


def load_executor(path: str | Path) -> NativeExecutor:
    """Load an executor written in C and register it; one that is loaded already is registered once more.

    Args:
        path: of a shared object that exports ``thunder_executor`` of ``include/thunder/executor.h``.

    Returns:
        the executor, registered under its own name.

    Raises:
        ImportError: it cannot be opened, lacks the symbol, or was built for another version of the interface; the
            message says which.
    """
    key = str(Path(path).resolve())
    if key not in _loaded:
        _loaded[key] = NativeExecutor(path)
    return register_executor(_loaded[key])


_loaded: dict[str, NativeExecutor] = {}  # by path: a process loads a library once


def load_folder(folder: str | Path) -> list[NativeExecutor]:
    """Load every shared object of a folder; one that cannot be is left out with a warning."""
    found = []
    if not Path(folder).is_dir():
        warnings.warn(f"THUNDER_EXECUTORS: there is no folder {folder}", ThunderWarning, stacklevel=2)
    for path in sorted(Path(folder).glob("*.so")):
        try:
            found.append(load_executor(path))
        except ImportError as error:
            warnings.warn(f"THUNDER_EXECUTORS: {error}", ThunderWarning, stacklevel=2)
    return found


if os.environ.get("THUNDER_EXECUTORS"):
    load_folder(os.environ["THUNDER_EXECUTORS"])
