"""The kinds of executors, and what they can say of an operation."""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch

from thunder import _C
from thunder.extend.operator import Operator, dotted_name
from thunder.extend.replace import is_python, replace

Checker = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Implementation:
    """How an executor runs one operator.

    Attributes:
        fn: called like the operator; ``None`` where a fusion executor takes it into a region.
        checker: called like the operator, with tensors that have no data; see ``register_implementation``.
        operator: with a derivative of its own, which takes the operator's place before differentiation.
        native: of a C executor, a ``thunder._C.NativeOperator``, which gives a kernel for each call.
        training: asked as well before the operator takes the place; see ``register_implementation``.
    """

    fn: Callable | None
    checker: Checker | None = None
    operator: Operator | None = None
    native: Any = None
    training: Checker | None = None


class Executor:
    """Somebody who can run operations. ``torch`` and ``python`` are built in; both are always on.

    Args:
        name: by which users name it; an identifier.
        version: of the library behind it, for reports.
        decompose: an operation that nobody takes is taken apart where this executor takes one of its pieces.
    """

    cut = 0

    def __init__(self, name: str, *, version: str | None = None, decompose: bool = False) -> None:
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"the name of an executor is an identifier, not {name!r}")
        self.name = name
        self.version = version
        self.decompose = decompose
        self._table: dict[str, Any] = {}
        self._names: set[str] = set()  # of the operators that are its own

    def __repr__(self) -> str:
        return f"thunder.extend.{type(self).__name__}({self.name!r})"

    @property
    def implementations(self) -> dict[str, Any]:
        """What it knows, by operator: a copy."""
        return dict(self._table)


class OperatorExecutor(Executor):
    """Runs single operations.

    Example::

        mine = thunder.extend.OperatorExecutor("mine", version="0.1")
        thunder.extend.register_executor(mine)

        mine.register_implementation(torch.nn.functional.gelu, fn=my_gelu, checker=lambda x, approximate="none":
                                     x.device.type == "cpu" and approximate == "none")
        compiled = thunder.jit(model, executors=["mine"])
    """

    def register_operator(
        self,
        name: str,
        *,
        like: Callable | None = None,
        meta: Callable | None = None,
        fn: Callable,
        tags: Sequence[Any] = (),
        replaces: Callable | None = None,
        backward: Callable | None = None,
        mutates: Sequence[str] = (),
        saves: int = 0,
    ) -> Operator:
        """A new operator that this executor runs.

        Args:
            name: an identifier; the operator is called ``thunder_<executor>::<name>`` in ``torch.library``, with a
                number where another executor of the same name has taken that.
            like: an operation with the same signature and results of the same shapes and types; or
            meta: a function with the signature of ``fn`` that gives results of the right shape, dtype and device,
                such as ``torch.empty_like(x)``. One of the two is needed.
            fn: what runs it: tensors in, tensors out. Its parameters need type hints that ``torch.library`` knows,
                or the ones of ``like`` or ``meta`` are taken.
            tags: ``torch.Tag`` members.
            replaces: an importable function whose calls become calls of this operator: one of torch, or a Python
                function, of a library say, with the same signature. The code of a Python function becomes a stub that
                calls the operator while a callable with this executor is captured, and else what it was.
            backward: see ``thunder.extend.op``.
            mutates: names of the parameters that ``fn`` writes to.
            saves: how many of its last results are tensors for the backward alone: what it implements does not have
                them, ``ctx.outputs`` does.

        Returns:
            the operator, to be called in code that is compiled or not.

        Raises:
            TypeError: neither ``like`` nor ``meta`` was given, or the signature has no schema.
            ValueError: this executor has an operator of that name, or it is no identifier; ``replaces`` is neither
                torch's nor a Python function with an importable name.
        """
        if (like is None) == (meta is None):
            raise TypeError("register_operator() needs either like= or meta=")
        if name in self._names:
            raise ValueError(f"{self!r} has an operator {name!r} already")
        if replaces is not None:  # before anything is registered
            dotted_name(replaces) if is_python(replaces) else operator_key(replaces)
        operator = Operator(
            fn,
            namespace=f"thunder_{self.name}",
            name=name,
            mutates=mutates,
            tags=tags,
            like=like if like is not None else meta,
            check=False,
            saves=saves,
        )
        operator.meta(meta if meta is not None else like)
        if backward is not None:
            operator.backward(backward, check=False)
        self._names.add(name)
        self._table[operator.key] = Implementation(operator.function)
        if replaces is not None and is_python(replaces):
            replace(replaces, self, operator)
        elif replaces is not None:
            self.register_implementation(replaces, operator)
        return operator

    def register_implementation(
        self,
        operation: Any,
        /,
        op: Operator | Callable | None = None,
        *,
        fn: Callable | None = None,
        checker: Checker | None = None,
        execution_transform: Callable | None = None,
        grad_transform: Callable | None = None,
        inference: Callable | None = None,
        training: Checker | None = None,
    ) -> None:
        """Say how this executor runs an operator.

        Args:
            operation: what it runs: a torch function (``torch.nn.functional.gelu``), an overload
                (``torch.ops.aten.gelu.default``), what ``torch.library.custom_op`` gives, an ``Operator``, or a dotted
                name. All spellings of one operator are
                meant: ``torch.add``, ``torch.Tensor.add`` and ``a + b``.
            op, fn: what runs it: a function called like the operation, or an ``Operator``. An operator with a backward
                brings its derivative along; in other cases the derivative is the one of ``operation``.
            checker: called like the operator, with tensors that have shape, dtype, device and strides and no data.
                Returns whether the executor takes the call; ``(False, "why not")`` or a string gives the reason that
                ``thunder.examine`` shows.
            execution_transform: like ``fn``, a function of operations of this executor and of torch.
            grad_transform: a function ``(ctx, *grads)`` as ``thunder.extend.op`` takes for ``backward``: the derivative
                of this implementation.
            inference: what runs it where nothing is differentiated, called like ``operation``; by default the operator.
            training: like ``checker``, asked as well where the operator would bring its derivative along.

        Raises:
            TypeError: nothing to run it with, or too much; something is not callable.
            ValueError: the operator has no importable name.
        """
        given = [f for f in (op, fn, execution_transform) if f is not None]
        if len(given) != 1:
            raise TypeError("register_implementation() takes one of: op=, fn=, execution_transform=")
        if not callable(given[0]):
            raise TypeError(f"an implementation is callable, not {type(given[0]).__name__}")
        optional = {"checker": checker, "grad_transform": grad_transform, "inference": inference, "training": training}
        for name, value in optional.items():
            if value is not None and not callable(value):
                raise TypeError(f"{name} is callable, not {type(value).__name__}")
        operator = given[0] if isinstance(given[0], Operator) else None
        if grad_transform is not None:
            if operator is not None and operator.has_backward:
                raise TypeError(f"{operator!r} has a backward: leave grad_transform out")
            operator = _with_backward(self, operation, given[0], grad_transform)
        run = operator.function if operator is not None else given[0]
        if operator is not None and operator.saves:
            run = _without_saved(operator)
        if inference is not None:
            run = inference
        key = operator_key(operation)
        differentiable = operator if operator is not None and operator.has_backward else None
        self._table[key] = Implementation(run, checker, differentiable, training=training)
        if differentiable is not None:
            self._table[operator.key] = Implementation(operator.function)


def _without_saved(operator: Operator) -> Callable:
    """The operator with the results of what it implements."""
    count = -operator.saves

    def run(*args: Any, **kwargs: Any) -> Any:
        results = operator.function(*args, **kwargs)[:count]
        return results[0] if len(results) == 1 else results

    return run


def _with_backward(executor: Executor, op: Any, fn: Callable, backward: Callable) -> Operator:
    """An operator of the same signature as ``op`` with a derivative."""
    operator = Operator(
        fn if not isinstance(fn, Operator) else fn.function,
        namespace=f"thunder_{executor.name}",
        name=f"{operator_key(op).rpartition('.')[2]}_{len(executor._table)}",
        check=False,
    )
    operator.meta(op)
    operator.backward(backward, check=False)
    return operator


class FusionExecutor(Executor):
    """Runs regions: several operations at once. Derive from it and write ``fuse``.

    Args:
        name, version, decompose: as for ``Executor``.
        cut: a region ends where one value alone goes on, once it has that many operations: so the equal layers of a
            model become equal regions, which are built once. 0: never.
        background: ``fuse`` takes long: torch runs the region until it is built (``thunder.jit(tier="block")`` waits).
    """

    def __init__(
        self,
        name: str,
        *,
        version: str | None = None,
        decompose: bool = False,
        cut: int = 0,
        background: bool = False,
    ) -> None:
        super().__init__(name, version=version, decompose=decompose)
        self.cut = cut
        self.background = background
        self._built: dict[Any, Any] = {}

    def register_supported(self, op: Any, checker: Checker | None = None) -> None:
        """Take this operator into regions.

        Args:
            op: as for ``OperatorExecutor.register_implementation``.
            checker: likewise.
        """
        self._table[operator_key(op)] = True if checker is None else Implementation(None, checker)

    def support_all(self, *, but: Sequence[Any] = ()) -> None:
        """Take every operator that neither writes, nor draws random numbers, but these."""
        self._table["*"] = True
        for op in but:
            self._table[operator_key(op)] = None

    def wants(self, region: Any) -> bool | str | tuple[bool, str]:
        """Whether a region is worth fusing, answered as a checker does. ``region`` is as for ``fuse``."""
        return True

    def fuse(self, region: Any) -> Callable | Future:
        """Something that runs the region.

        Args:
            region: ``region.trace`` is the region as a ``thunder.Trace``: its inputs, operations and results, with
                types. Equal regions, whatever the names in them, come once.

        Returns:
            a callable that takes the tensors of the region's inputs in order and returns a tuple or list of its
            results; or a ``concurrent.futures.Future`` of it, where a compiler works on it: the next region is built
            meanwhile.

        Raises:
            anything: it is reported once, and torch runs the region.
        """
        raise NotImplementedError(f"{type(self).__name__}.fuse")


def single_op_executor(name: str, op: Any, fn: Callable, *, checker: Checker | None = None) -> OperatorExecutor:
    """An executor, not registered, that runs one operator: arguments as for ``register_implementation``."""
    executor = OperatorExecutor(name)
    executor.register_implementation(op, fn=fn, checker=checker)
    return executor


def operator_key(op: Any) -> str:
    """Under which name claims find an operator.

    Raises:
        ValueError: the function cannot be imported under any name, or is not torch's, so no trace can name it.
    """
    if isinstance(op, Operator):
        return op.key
    if isinstance(op, str):
        return _C.operator_key(op)
    name = dotted_name(op)
    if name.partition(".")[0] != "torch" or isinstance(op, type):
        way = (
            "register_operator(..., replaces=) puts an operator in its place"
            if isinstance(op, types.FunctionType)
            else "make a Python function that calls it an operator, by @thunder.extend.op, and call that"
        )
        raise ValueError(f"{name} is no operation of torch, so no trace names it: {way}")
    return _C.operator_key(name)


def takes(checker: Checker | None, args: tuple, kwargs: dict[str, Any]) -> tuple[bool, str]:
    """Whether a checker agrees to a call, and why not."""
    return (True, "") if checker is None else verdict(checker(*args, **kwargs), checker)


def verdict(answer: Any, asked: Callable) -> tuple[bool, str]:
    """Yes or no, and why not, from what was answered: a truth value, the reason why not, or a tuple of both."""
    first, reason = (False, answer) if isinstance(answer, str) else (answer, "")
    if isinstance(answer, tuple):
        first, reason = [*answer, False, ""][:2] if len(answer) != 1 else (answer[0], "")
    if first:
        return True, ""
    return False, str(reason) or f"{_label(asked)} says no"


def _label(checker: Checker) -> str:
    name = getattr(checker, "__name__", type(checker).__name__)
    if name == "<lambda>":
        try:
            return f"its checker in line {inspect.getsourcelines(checker)[1]}"
        except (OSError, TypeError):
            return "its checker"
    return name


def torch_version() -> str:
    """Of the torch that is loaded."""
    return torch.__version__
