"""``thunder.grad`` and ``thunder.value_and_grad``: the gradient of a compiled function, as a function."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from thunder import _C
from thunder._api import jit
from thunder._module import ThunderModule


def grad(
    f: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    has_aux: bool = False,
    **options: Any,
) -> Callable[..., Any]:
    """The function that returns the gradient of ``f``; ``f`` runs compiled.

    The conventions are those of ``torch.func.grad``. What ``f`` returns is differentiated with respect to the
    positional arguments at ``argnums``; other tensors that require grad, parameters included, are constants, and no
    ``.grad`` is touched.

    Args:
        f: a function or module, compiled or not, that returns a real floating tensor of shape ``()``; with ``has_aux``
            a pair of that and anything else.
        argnums: which positional arguments to differentiate with respect to; negative ones count from the end. Each is
            a tensor or a nest of lists, tuples and dicts of tensors, floating or complex.
        has_aux: ``f`` returns ``(value, aux)``.
        options: options of :func:`thunder.jit`, when ``f`` is not compiled yet.

    Returns:
        A function with the arguments of ``f``. It returns the gradient, in the structure, shapes and dtypes of the
        argument at ``argnums``, or a tuple of them where ``argnums`` is a sequence; with ``has_aux`` the pair
        ``(gradient, aux)``. What the value does not depend on gets zeros. Where grad mode is on and an argument at
        ``argnums`` requires grad, the gradient can be differentiated again, so ``grad(grad(f))`` works.

    Raises:
        TypeError: ``argnums`` is not an int or a sequence of ints; at a call: an argument holds no tensor or an integer
            one, or ``f`` returns something else than described.
        ValueError: ``argnums`` is empty or repeats an argument; at a call: it names an argument that is not there.
        RuntimeError: at a call in inference mode, which records no gradients.

    Example:
        >>> thunder.grad(lambda x: (x**3).sum())(torch.tensor([1.0, 2.0]))
        tensor([ 3., 12.])
    """
    both = value_and_grad(f, argnums, has_aux=has_aux, **options)

    @functools.wraps(both)
    def gradient(*args: Any, **kwargs: Any) -> Any:
        value, result = both(*args, **kwargs)
        return (result, value[1]) if has_aux else result

    return gradient


def value_and_grad(
    f: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    **options: Any,
) -> Callable[..., Any]:
    """The function that returns the value of ``f`` and its gradient; ``f`` runs compiled, once.

    Args:
        f, argnums, has_aux, options: as for :func:`thunder.grad`.

    Returns:
        A function with the arguments of ``f`` that returns ``(value, gradient)``; with ``has_aux`` the pair
        ``((value, aux), gradient)``. Value and aux are detached, unless the gradient can be differentiated again.

    Raises:
        TypeError, ValueError, RuntimeError: as for :func:`thunder.grad`.

    Example:
        >>> thunder.value_and_grad(lambda x: (x**2).sum())(torch.tensor([1.0, 2.0]))
        (tensor(5.), tensor([2., 4.]))
    """
    numbers = _check_argnums(argnums)
    compiled = f if isinstance(f, (_C.Callable, ThunderModule)) else jit(f, **options)
    if compiled is f and options:
        raise TypeError(f"{_name(f)} is compiled already: give the options {', '.join(options)} to thunder.jit")

    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"the gradient of {_name(f)} was called in inference mode, which records no gradients; use "
                "torch.no_grad() instead"
            )
        again = torch.is_grad_enabled()
        places = [_place(f, n, len(args)) for n in numbers]
        if len(set(places)) != len(places):
            raise ValueError(f"argnums={argnums!r} names an argument twice in a call with {len(args)} of them")
        arguments = list(args)
        variables: list[torch.Tensor] = []
        specs = []
        with torch.enable_grad():
            for place in places:
                leaves, spec = tree_flatten(args[place])
                fresh = [_variable(f, place, leaf, again) for leaf in leaves]
                if not fresh:
                    raise TypeError(f"argument {place} of {_name(f)} holds no tensor to differentiate with respect to")
                specs.append((spec, len(fresh)))
                variables += fresh
                arguments[place] = tree_unflatten(fresh, spec)
            again = again and any(not variable.is_leaf for variable in variables)
            returned = compiled(*arguments, **kwargs)
            value = _scalar(f, returned, has_aux)
            found = _differentiate(value, variables, again)
        gradients = []
        for spec, count in specs:
            gradients.append(tree_unflatten(found[:count], spec))
            found = found[count:]
        returned = returned if again else _detached(returned)
        return returned, gradients[0] if isinstance(argnums, int) else tuple(gradients)

    functools.update_wrapper(call, f, updated=())
    call._thunder_callable = getattr(compiled, "_thunder_callable", compiled)  # what compile_stats() asks
    return call


def _name(f: Any) -> str:
    return getattr(f, "__qualname__", None) or type(f).__name__


def _check_argnums(argnums: Any) -> tuple[int, ...]:
    numbers = (argnums,) if isinstance(argnums, int) else argnums
    if (
        isinstance(argnums, bool | str)
        or not isinstance(numbers, Sequence)
        or not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers)
    ):
        raise TypeError(f"argnums must be an int or a sequence of ints, not {argnums!r}")
    if not numbers:
        raise ValueError("argnums is empty: name at least one argument to differentiate with respect to")
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"argnums={argnums!r} names an argument twice")
    return tuple(numbers)


def _place(f: Any, number: int, count: int) -> int:
    if not -count <= number < count:
        raise ValueError(
            f"argnums names argument {number} of {_name(f)}, but the call has {count} positional argument"
            f"{'' if count == 1 else 's'}; arguments given by keyword cannot be differentiated"
        )
    return number % count


def _variable(f: Any, place: int, leaf: Any, again: bool) -> torch.Tensor:
    """A stand-in for one tensor of an argument: the same memory, a place of its own in the graph."""
    if not isinstance(leaf, torch.Tensor):
        raise TypeError(
            f"argument {place} of {_name(f)} holds a {type(leaf).__name__}; only tensors can be differentiated with "
            "respect to (pass numbers as torch.tensor(...))"
        )
    if not (leaf.is_floating_point() or leaf.is_complex()):
        raise TypeError(
            f"argument {place} of {_name(f)} holds a tensor of {leaf.dtype}; gradients exist for floating and complex "
            "tensors only"
        )
    if leaf.is_inference():
        leaf = leaf.clone()
    if leaf.requires_grad and again:
        return leaf.view_as(leaf)
    return leaf.detach().requires_grad_()


def _scalar(f: Any, returned: Any, has_aux: bool) -> torch.Tensor:
    value = returned
    if has_aux:
        if not (isinstance(returned, tuple) and len(returned) == 2):
            raise TypeError(f"{_name(f)} must return (value, aux) because of has_aux=True, not {_described(returned)}")
        value = returned[0]
    if not isinstance(value, torch.Tensor):
        hint = "; for a value and further results pass has_aux=True" if isinstance(value, tuple | list) else ""
        raise TypeError(
            f"{_name(f)} must return a tensor of shape () to have a gradient, not {_described(value)}{hint}"
        )
    if value.shape != () or not value.is_floating_point():
        raise TypeError(
            f"{_name(f)} must return a real floating tensor of shape () to have a gradient, not {_described(value)}"
        )
    return value


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"one of shape {tuple(value.shape)} and {value.dtype}"
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return f"a {type(value).__name__}"


def _differentiate(value: torch.Tensor, variables: list[torch.Tensor], again: bool) -> list[torch.Tensor]:
    if not value.requires_grad:
        return [torch.zeros_like(variable) for variable in variables]
    return list(torch.autograd.grad(value, variables, create_graph=again, allow_unused=True, materialize_grads=True))


def _detached(value: Any) -> Any:
    leaves, spec = tree_flatten(value)
    return tree_unflatten([leaf.detach() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], spec)
