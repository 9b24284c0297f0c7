"""Operators of the user: a Python function as one operation, with a shape rule and a derivative."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from thunder import _C, _verify


class Context:
    """What the backward of an operator is given.

    Attributes:
        inputs: the arguments of the call, in order, defaults included.
        outputs: its results; a tuple also when there is one.
    """

    __slots__ = ("inputs", "outputs")

    def __init__(self, inputs: tuple, outputs: tuple) -> None:
        self.inputs = inputs
        self.outputs = outputs


class Operator(_C.OperatorCall):
    """A function that is one operation: made by ``thunder.extend.op`` and ``OperatorExecutor.register_operator``.

    A call runs the function; under autograd, a capture, a mode or a transform it goes through torch's dispatcher.

    Attributes:
        function: what was decorated.
        name, namespace: in ``torch.library``.
    """

    def __init__(
        self,
        fn: Callable,
        *,
        namespace: str = "thunder_user",
        name: str | None = None,
        mutates: Sequence[str] = (),
        tags: Sequence[Any] = (),
        like: Callable | None = None,
        check: bool = True,
        saves: int = 0,
        example: Any = None,
    ) -> None:
        name = name or getattr(fn, "__name__", "")
        if not name.isidentifier():
            raise ValueError(f"the name of an operator is an identifier, not {name!r}: pass name=")
        self.name = _free_name(namespace, name)
        self.namespace = namespace
        self.saves = saves
        self._proven = not check  # a real run has agreed with the shape rule
        self._example = example
        self._mutates = tuple(mutates)
        self._meta: Callable | None = None
        self._backward: Callable | None = None
        self._signature = _signature(fn, like)
        try:
            self._library = torch.library.custom_op(
                f"{namespace}::{self.name}", self._typed(fn), mutates_args=self._mutates, tags=tuple(tags) or None
            )
        except (ValueError, NotImplementedError) as error:
            raise TypeError(f"{self.name}: no operator can be made of this signature: {error}") from None
        written = tuple((list(self._signature.parameters).index(name), name) for name in self._mutates)
        self._runs(fn, self._library._opoverload, written)
        self.key = f"torch.ops.{namespace}.{self.name}.default"
        functools.update_wrapper(self, fn, updated=())

    def __repr__(self) -> str:
        return f"<operator {self.namespace}::{self.name}>"

    def _transformed(self, *args: Any, **kwargs: Any) -> Any:
        """A call inside transforms of ``torch.func``: ext/operator.c.

        Torch runs an operator once for each element of a batch, and refuses to differentiate one that has a derivative.
        In forward mode it would take the results for constants: there the function's own operations are transformed.
        """
        kinds = {layer.key() for layer in torch._C._functorch.get_interpreter_stack() or ()}
        run = self.function if torch._C._functorch.TransformType.Jvp in kinds else self._overload
        return run(*args, **kwargs)

    @property
    def has_backward(self) -> bool:
        """Whether it has a derivative of its own."""
        return self._backward is not None

    def meta(self, rule: Callable) -> Callable:
        """Decorator: the shape rule. Called like the operator with tensors without data; gives such results.

        It is compared with a real run on the example right here; without one, when the function first runs in a
        compiled program or under autograd.

        Raises:
            ValueError: it disagrees with what the function gives for the example, or that writes to an argument.
        """
        self._meta = rule
        for args in self._examples():
            _check_meta(self, args, {})
            _check_writes(self, args, {})
            self._proven = True
        torch.library.register_fake(f"{self.namespace}::{self.name}", rule)
        return rule

    def backward(self, rule: Callable | None = None, *, check: bool = True) -> Callable:
        """Decorator: the derivative, ``rule(ctx, *grads)``.

        ``grads`` are the gradients of the results (None where there is none), ``ctx`` is a ``Context``. Returns the
        gradients of the tensor arguments in order, None for one without; a single one need not be in a tuple. That of
        a list of tensors is a list.
        It is compared with numerical differences on the example, in float64, unless ``check`` is false.

        Raises:
            TypeError: the operator writes to its arguments.
            ValueError: it disagrees with the differences.
        """
        if rule is None:
            return functools.partial(self.backward, check=check)
        if self._mutates:
            raise TypeError(f"{self!r} writes to its arguments: it can have no backward")
        self._backward = rule
        self._library.register_autograd(_Backward(self, rule), setup_context=functools.partial(_keep, self.saves))
        for args in self._examples() if check else []:
            _check_gradient(self, args, {})
        return rule

    def check(self, *args: Any, **kwargs: Any) -> None:
        """Compare the shape rule with a real run, the schema with what the function does, the backward with numbers.

        Args:
            args, kwargs: of a call; for the derivative floating tensors that require grad, best in float64.

        Raises:
            ValueError: something does not hold; the message says what.
        """
        _check_meta(self, args, kwargs)
        _check_writes(self, args, kwargs)
        if self.has_backward:
            _check_gradient(self, args, kwargs)

    def _examples(self) -> list[tuple]:
        given = self._example() if callable(self._example) else self._example
        if given is None:
            return []
        return given if isinstance(given, list) else [given]

    def _first_run(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The function, checked: a program was compiled for what its shape rule says."""
        if self._meta is None:
            return self.function(*args, **kwargs)
        before = _copied(args)
        result = self.function(*args, **kwargs)
        _compare_meta(self, _flat(result), before, kwargs)
        _compare_writes(self, _flat(result), before, args)
        self._proven = True
        return result

    def _typed(self, fn: Callable) -> Callable:
        """``fn`` with the annotations that make its schema."""
        signature = self._signature

        @functools.wraps(fn)
        def run(*args: Any, **kwargs: Any) -> Any:
            return fn(*args, **kwargs) if self._proven else self._first_run(args, kwargs)

        del run.__wrapped__
        run.__signature__ = signature
        run.__annotations__ = {n: p.annotation for n, p in signature.parameters.items()}
        run.__annotations__["return"] = signature.return_annotation
        return run


class _Backward:
    """The user's rule as ``torch.library`` wants it: a gradient or None for every argument."""

    def __init__(self, operator: Operator, rule: Callable) -> None:
        self.operator = operator
        self.rule = rule

    def __call__(self, ctx: Any, *grads: Any) -> Any:
        inputs, outputs = ctx.thunder_inputs(), ctx.thunder_outputs()
        answer = self.rule(Context(inputs, outputs), *grads)
        given = list(answer) if isinstance(answer, (tuple, list)) else [answer]
        places = [i for i, a in enumerate(inputs) if isinstance(a, Tensor) or (a and _is_tensor_list(a))]
        if len(given) != len(places):
            raise ValueError(
                f"the backward of {self.operator!r} gave {len(given)} gradients for {len(places)} tensor arguments: "
                "return one for each, None where there is none"
            )
        result: list[Any] = [[None] * len(a) if _is_tensor_list(a) else None for a in inputs]
        for place, gradient in zip(places, given, strict=True):
            if gradient is not None:
                result[place] = gradient
        # For a schema with lists torch wants what the dispatcher passed on, without defaults at the end;
        # its spec has an argument of its own besides.
        spec = getattr(getattr(ctx, "_pt_metadata", None), "input_spec", None)
        return tuple(result[: ctx.thunder_positional if spec is None else spec.num_children - 1])


def _keep(saves: int, ctx: Any, inputs: tuple, output: Any, keyword_only_inputs: Any = None) -> None:
    ctx.thunder_positional = len(inputs)
    inputs = (*inputs, *(keyword_only_inputs or {}).values())
    outputs = tuple(output) if isinstance(output, (tuple, list)) else (output,)
    if saves:
        ctx.mark_non_differentiable(*outputs[-saves:])
    leaves, spec = pytree.tree_flatten((inputs, outputs))
    ctx.save_for_backward(*(a for a in leaves if isinstance(a, Tensor)))
    plan = [None if isinstance(a, Tensor) else (a,) for a in leaves]

    def items() -> Any:
        saved = iter(ctx.saved_tensors)
        return pytree.tree_unflatten([next(saved) if entry is None else entry[0] for entry in plan], spec)

    ctx.thunder_inputs = lambda: items()[0]
    ctx.thunder_outputs = lambda: items()[1]


def op(fn: Callable | None = None, *, name: str | None = None, mutates: Sequence[str] = (), example: Any = None) -> Any:
    """Decorator: make an operator of a Python function.

    ::

        @thunder.extend.op
        def scaled_silu(x: Tensor, scale: float) -> Tensor:
            return torch.empty_like(x).copy_(my_kernel(x, scale))

        @scaled_silu.meta
        def _(x, scale):
            return torch.empty_like(x)

        @scaled_silu.backward
        def _(ctx, grad):
            x, scale = ctx.inputs
            return my_kernel_backward(grad, x, scale)

    The compiler sees one operation; what happens inside is the function's own matter: a CUDA or Triton kernel, numpy,
    a library. Without ``meta`` it is run to know the shape of its results, and a program is made for each; without
    ``backward`` it has no gradient.

    Args:
        fn: its parameters and result need type hints that ``torch.library.infer_schema`` knows: ``Tensor``,
            ``Tensor | None``, ``list[Tensor]``, ``int``, ``float``, ``bool``, ``str``, ``torch.dtype``, ....
        name: in place of the function's own. In ``torch.library`` it gets a number where it is taken, so that two
            functions of one name, or one that was defined anew, are two operators.
        mutates: names of the parameters that it writes to.
        example: a tuple of arguments, a list of such tuples, or a function that gives one of them. ``meta`` and
            ``backward`` run the function on it and raise ValueError where they disagree with it.

    Raises:
        TypeError: the signature has no schema.
        ValueError: the function has no name that is an identifier.
    """
    if fn is None:
        return functools.partial(op, name=name, mutates=mutates, example=example)
    return Operator(fn, name=name, mutates=mutates, example=example)


# ---- checks ----


def _flat(result: Any) -> list[Any]:
    return list(result) if isinstance(result, (tuple, list)) else [result]


def _is_tensor_list(a: Any) -> bool:
    return isinstance(a, (list, tuple)) and all(isinstance(t, Tensor) for t in a)


def _copied(args: Sequence[Any]) -> list[Any]:
    return pytree.tree_map_only(Tensor, lambda a: a.detach().clone(), list(args))


def _check_meta(operator: Operator, args: tuple, kwargs: dict[str, Any]) -> None:
    if operator._meta is None:
        raise ValueError(f"{operator!r} has no shape rule: write @{operator.name}.meta")
    with torch.no_grad():
        real = _flat(operator.function(*_copied(args), **kwargs))
    _compare_meta(operator, real, args, kwargs)


def _compare_meta(operator: Operator, real: list[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """``real`` is what the function gave for these arguments."""
    with torch.no_grad(), torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = pytree.tree_map_only(Tensor, mode.from_tensor, list(args))
        told = _flat(operator._meta(*fakes, **kwargs))
    if len(real) != len(told):
        raise ValueError(f"{operator!r} gives {len(real)} results, its shape rule {len(told)}")
    for i, (r, t) in enumerate(zip(real, told, strict=True)):
        for what in ("shape", "dtype", "device"):
            if isinstance(r, Tensor) and getattr(r, what) != getattr(t, what):
                raise ValueError(
                    f"result {i} of {operator!r} has {what} {getattr(r, what)}, its shape rule says {getattr(t, what)}"
                )
        if isinstance(r, Tensor) and r.numel() > 1 and r.stride() != t.stride():
            raise ValueError(f"result {i} of {operator!r} has strides {r.stride()}, its shape rule says {t.stride()}")


def _check_writes(operator: Operator, args: tuple, kwargs: dict[str, Any]) -> None:
    copies = _copied(args)
    with torch.no_grad():
        results = _flat(operator.function(*copies, **kwargs))
    _compare_writes(operator, results, args, copies)


def _compare_writes(operator: Operator, results: list[Any], args: Sequence[Any], copies: Sequence[Any]) -> None:
    """``copies`` are the arguments after the call, ``args`` as they were before it."""
    for name, befores, afters in zip(operator._signature.parameters, args, copies, strict=False):
        if name in operator._mutates:
            continue
        for before, after in zip(pytree.tree_leaves(befores), pytree.tree_leaves(afters), strict=True):
            if not isinstance(before, Tensor):
                continue
            if not _verify._same_bits(before, after):
                raise ValueError(f"{operator!r} writes to {name!r}: say mutates=[{name!r}]")
            for r in pytree.tree_leaves(results):
                if isinstance(r, Tensor) and r.numel() and torch._C._is_alias_of(r, after):
                    raise ValueError(f"{operator!r} returns {name!r} or a view of it: return a new tensor")


def _check_gradient(operator: Operator, args: tuple, kwargs: dict[str, Any]) -> None:
    leaves, spec = pytree.tree_flatten(list(args))
    double = [
        a.detach().double().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in leaves
    ]

    def call(*given: Any) -> Any:
        return operator._overload(*pytree.tree_unflatten(list(given), spec), **kwargs)

    wrong = ""
    try:
        torch.autograd.gradcheck(call, double, raise_exception=True)
    except Exception as error:
        wrong = str(error)
    if wrong:
        raise ValueError(f"the backward of {operator!r} does not agree with numerical differences: {wrong}")


# ---- signatures and names ----


def _free_name(namespace: str, name: str) -> str:
    """``name``, with a number where ``torch.library`` has one of that name: what was compiled for that goes on."""
    known, found, n = vars(getattr(torch.ops, namespace)), name, 0
    while found in known or torch._C._jit_get_schemas_for_operator(f"{namespace}::{found}"):
        n += 1
        found = f"{name}_{n}"
    return found


def _signature(fn: Callable, like: Callable | None) -> inspect.Signature:
    """That of ``fn``, or where it has none that of ``like``; hints that it lacks are those of ``like``.

    Raises:
        TypeError: neither has one.
    """
    try:
        model = _signature_of(like)
    except NameError:  # its hints are names that are not there
        model = None
    signature = _signature_of(fn) or model
    if signature is None:
        raise TypeError(f"{fn!r} has no signature: wrap it in a function with type hints")
    hints = {} if model is None else {p.name: p.annotation for p in model.parameters.values()}
    parameters = [
        p.replace(annotation=_guess(p, hints.get(p.name, p.empty))) if p.annotation is p.empty else p
        for p in signature.parameters.values()
    ]
    returns = [signature.return_annotation, Tensor if model is None else model.return_annotation, Tensor]
    return signature.replace(
        parameters=parameters, return_annotation=next(r for r in returns if r is not inspect.Signature.empty)
    )


def _signature_of(fn: Callable | None) -> inspect.Signature | None:
    try:
        return None if fn is None else inspect.signature(fn, eval_str=True)
    except ValueError:  # a builtin
        return None


def _guess(p: inspect.Parameter, hint: Any) -> Any:
    """The type of a parameter without a hint: that of its namesake, of its default, or a tensor."""
    if hint is not p.empty:
        return hint
    if p.default is p.empty:
        return Tensor
    if p.default is None:
        return Tensor | None
    return type(p.default)


def dotted_name(function: Any) -> str:
    """The importable name of a function.

    Raises:
        ValueError: it has none.
    """
    if isinstance(function, torch.library.CustomOpDef):
        function = function._opoverload
    if isinstance(function, torch._ops.OpOverload):
        space, _, rest = function.name().partition("::")
        base, _, overload = rest.partition(".")
        return f"torch.ops.{space}.{base}.{overload or 'default'}"
    if isinstance(function, torch._ops.OpOverloadPacket):
        return f"torch.ops.{function._qualified_op_name.replace('::', '.')}.default"
    for path in _paths(function):
        if _resolve(path) is function:
            return path
    raise ValueError(f"{function!r} has no importable name, so no trace can name it: pass its dotted name as a string")


def _paths(function: Any) -> list[str]:
    name = getattr(function, "__name__", None) or ""
    owner = getattr(function, "__objclass__", None)
    paths = [f"torch.{name}", f"torch.nn.functional.{name}"]
    if owner is not None:
        paths.insert(0, f"torch.Tensor.{name}")
    paths += [f"torch.{space}.{name}" for space in ("special", "linalg", "fft", "nn.init")]
    paths.append(f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', name)}")
    return paths


def _resolve(path: str) -> Any:
    import sys

    found: Any = None
    module, _, rest = path.rpartition(".")
    parts = [rest]
    while module and module not in sys.modules:
        module, _, last = module.rpartition(".")
        parts.insert(0, last)
    if not module:
        return None
    found = sys.modules[module]
    for part in parts:
        found = getattr(found, part, None)
    return found
