"""What the tests of training share: a step of eager beside the same step compiled, judged in full.

The helpers that judge are themselves tested, by compilers that lie (tests/harness/test_train_checks.py).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import thunder
from tests.harness.compare import children, clone, gradients_differ
from tests.jit_checks import Pair, assert_same


def x(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Numbers from -1 to 1; without a shape, 4 x 3 of them."""
    shape = shape or (4, 3)
    return torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=torch.float64).to(dtype).reshape(shape)


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """:func:`x` as a leaf that requires grad."""
    return x(*shape, dtype=dtype).requires_grad_()


def mlp(out: int = 2) -> nn.Module:
    """3 to `out` features by way of 8, with fixed weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, out))


class Cube(torch.autograd.Function):
    """The third power, differentiable twice."""

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(a)
        return a**3

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (a,) = ctx.saved_tensors
        return grad * 3 * a**2


def tensors_in(value: Any, seen: set[int] | None = None) -> Iterator[torch.Tensor]:
    """Every tensor in containers and objects, in a fixed order; one that occurs twice comes twice."""
    seen = set() if seen is None else seen
    if isinstance(value, torch.Tensor):
        yield value
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    for part in (children(value) or {}).values():
        yield from tensors_in(part, seen)


def leaves_in(value: Any) -> list[torch.Tensor]:
    """The tensors that backward() fills `.grad` of."""
    return [t for t in tensors_in(value) if t.is_leaf and t.requires_grad]


def weights_like(tensor: torch.Tensor) -> torch.Tensor:
    """Fixed numbers in the shape of `tensor`, all different, none zero; draws nothing from any generator."""
    count = tensor.numel() * (2 if tensor.is_complex() else 1)
    numbers = torch.arange(1, count + 1, dtype=torch.float64, device=tensor.device).mul(0.7).cos().add(0.1)
    if tensor.is_complex():
        return torch.view_as_complex(numbers.reshape(*tensor.shape, 2)).to(tensor.dtype)
    return numbers.reshape(tensor.shape).to(tensor.dtype)


def weighted_sum(outputs: Any) -> torch.Tensor:
    """A float64 scalar whose gradient with respect to each differentiable output is another fixed tensor."""
    total = torch.zeros((), dtype=torch.float64)
    for tensor in tensors_in(outputs):
        if tensor.requires_grad:
            tensor = tensor.to_dense() if tensor.layout != torch.strided else tensor
            product = tensor * weights_like(tensor).detach()
            total = total + (product.real if product.is_complex() else product).double().sum()
    return total


def fresh(value: Any, call: int) -> Any:
    """A copy of the arguments for the given call: the same metadata, other values in floating and complex tensors."""
    copied = clone(value)
    changed: set[int] = set()
    for tensor in tensors_in(copied):
        if id(tensor) not in changed and (tensor.is_floating_point() or tensor.is_complex()) and call:
            changed.add(id(tensor))
            tensor.data.mul_(1 - 0.125 * call).add_(0.0625 * call)
    return copied


def assert_gradients_same(eager: Any, ours: Any, what: str = "gradient") -> None:
    """Each pair of gradients is equal within rounding; None only meets None."""
    found = gradients_differ(list(eager), list(ours))
    assert not found, f"{what}: " + "\n".join(found)


def assert_compiled(compiled: Any, misses: int | None = 1) -> None:
    """Every call so far ran compiled code, and `misses` of them had to be captured (None: any number)."""
    stats = thunder.compile_stats(compiled)
    assert stats.fallbacks == 0, f"{stats.fallbacks} of {stats.calls} calls fell back to eager"
    if misses is not None:
        assert stats.cache_misses == misses, f"{stats.cache_misses} of {stats.calls} calls were captured"


def assert_refused_clearly(error: BaseException) -> None:
    """The error is ours and says what to do."""
    assert isinstance(error, thunder.CaptureError), f"{type(error).__name__}: {error}"
    assert "What to do" in str(error), str(error)


def assert_same_error(eager: Callable[[], Any], ours: Callable[[], Any], text: str) -> None:
    """Both raise the same type of exception, with `text` in its message."""
    raised: list[BaseException | None] = []
    for call in (eager, ours):
        try:
            call()
        except Exception as error:
            raised.append(error)
        else:
            raised.append(None)
    assert raised[0] is not None, "eager raises nothing: the test is wrong"
    assert raised[1] is not None, f"eager raises {type(raised[0]).__name__}: {raised[0]}; compiled raises nothing"
    assert type(raised[0]) is type(raised[1]), f"{raised[0]!r} in eager, {raised[1]!r} compiled"
    for error in raised:
        assert text in str(error), str(error)


class _Side:
    """One of the two programs with what a step of it left behind."""

    def __init__(self, call: Callable[..., Any], owner: nn.Module | None) -> None:
        self.call = call
        self.owner = owner

    def step(self, arguments: Any, prepare: Callable[..., Any] | None, seed: int) -> None:
        args, kwargs = arguments
        self.leaves = leaves_in(arguments)
        torch.manual_seed(seed)
        self.passed = (prepare(*args, **kwargs), {}) if prepare else (args, kwargs)
        self.outputs = self.call(*self.passed[0], **self.passed[1])
        self.drawn = torch.get_rng_state()
        self.loss = weighted_sum(self.outputs)
        if self.loss.requires_grad:
            self.loss.backward()

    def state(self) -> dict[str, torch.Tensor]:
        return {**dict(self.owner.named_parameters()), **dict(self.owner.named_buffers())} if self.owner else {}

    def gradients(self) -> list[torch.Tensor | None]:
        tensors = [*self.leaves, *(self.owner.parameters() if self.owner else ())]
        return [t.grad for t in tensors]


def _compare(eager: _Side, ours: _Side) -> None:
    assert_same(eager.outputs, ours.outputs)
    for a, b in zip(tensors_in(eager.outputs), tensors_in(ours.outputs), strict=True):
        assert a.is_leaf == b.is_leaf, f"is_leaf {a.is_leaf} in eager, {b.is_leaf} here"
    assert torch.equal(eager.drawn, ours.drawn), "another number of random draws than eager"
    assert_same(eager.passed, ours.passed)
    assert_same(eager.state(), ours.state())
    assert_gradients_same(eager.gradients(), ours.gradients())


def check_training(
    fn: Callable[..., Any],
    *args: Any,
    prepare: Callable[..., Any] | None = None,
    calls: int = 2,
    misses: int | None = 1,
    allow_refusal: bool = False,
    **kwargs: Any,
) -> Any:
    """Drives ``fn`` and its compiled twin through the same steps: forward, weighted loss, backward.

    Compares outputs (metadata, strides, ``requires_grad``, ``is_leaf``; the loss is their weighted sum), random draws,
    arguments and state after the step, and the gradients of every leaf among arguments and parameters, which accumulate
    over the calls. Each call has other values. Then asserts that every call ran compiled.

    Args:
        fn: a function or a module; of a module a copy is compiled.
        args, kwargs: arguments of the first call, leaves only.
        prepare: makes the arguments that ``fn`` gets of them, for example tensors that are not leaves.
        calls: how many steps.
        misses: how many captures are right; None for any number.
        allow_refusal: a clear ``thunder.CaptureError`` or a fallback with eager's results will do.

    Returns:
        The compiled callable.
    """
    is_module = isinstance(fn, nn.Module)
    twin = copy.deepcopy(fn) if is_module else fn
    compiled = thunder.jit(twin)
    eager, ours = _Side(fn, fn if is_module else None), _Side(compiled, twin if is_module else None)
    for call in range(calls):
        eager.step(fresh((args, kwargs), call), prepare, seed=call)
        try:
            ours.step(fresh((args, kwargs), call), prepare, seed=call)
        except thunder.CaptureError as error:
            assert_refused_clearly(error)
            if allow_refusal:
                return compiled
            raise
        _compare(eager, ours)
    if not allow_refusal:
        assert_compiled(compiled, misses)
    return compiled


class TrainingPair(Pair):
    """A module in eager and its copy compiled, driven side by side through training steps of your own making."""

    def step(self, *args: Any, seed: int = 0, **kwargs: Any) -> tuple[Any, Any]:
        """Forward, weighted loss and backward of both; compares all of it and returns both outputs."""
        eager, ours = _Side(self.eager, self.eager), _Side(self.compiled, self.model)
        eager.step(clone((args, kwargs)), None, seed)
        ours.step(clone((args, kwargs)), None, seed)
        _compare(eager, ours)
        return eager.outputs, ours.outputs

    def each(self, run: Callable[[Callable[..., Any]], Any]) -> tuple[Any, Any]:
        """`run(module)` for eager and for compiled, under the same seed; compares what they return and leave."""
        results = []
        for module in (self.eager, self.compiled):
            torch.manual_seed(0)
            results.append(run(module))
        assert_same(*(_detached(result) for result in results))
        self.same_state()
        return tuple(results)

    def same_state(self) -> None:
        """Parameters, buffers and gradients of both are equal."""
        assert_same(dict(self.eager.state_dict()), dict(self.model.state_dict()))
        assert_gradients_same([p.grad for p in self.eager.parameters()], [p.grad for p in self.model.parameters()])

    def assert_compiled(self, misses: int | None = 1) -> None:
        """See :func:`assert_compiled`."""
        assert_compiled(self.compiled, misses)


def _detached(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, tuple | list):
        return type(value)(_detached(part) for part in value)
    return value


def compare_runs(fn: Callable[..., Any], run: Callable[[Callable[..., Any], int], Any], calls: int = 2) -> Any:
    """`run(fn, call)` and `run(compiled, call)` return the same, for each call.

    For what :func:`check_training` does not do by itself: `run` makes its own inputs, calls, differentiates, and
    returns everything that must be equal. Gradients in the result are compared like values.

    Returns:
        The compiled callable.
    """
    twin = copy.deepcopy(fn) if isinstance(fn, nn.Module) else fn
    compiled = thunder.jit(twin)
    for call in range(calls):
        torch.manual_seed(call)
        expected = run(fn, call)
        torch.manual_seed(call)
        got = run(compiled, call)
        assert_gradients_same(
            [t.detach() for t in tensors_in(expected)], [t.detach() for t in tensors_in(got)], "result"
        )
        assert [t.requires_grad for t in tensors_in(expected)] == [t.requires_grad for t in tensors_in(got)]
        assert_same(_without_tensors(expected), _without_tensors(got))
    return compiled


def _without_tensors(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return "tensor"
    if isinstance(value, tuple | list):
        return [_without_tensors(part) for part in value]
    return value
