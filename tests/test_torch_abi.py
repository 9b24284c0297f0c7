"""What is read of torch's objects and of a thread without asking Python: it is found, and no change of it is missed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import thunder


def test_everything_is_found_in_this_torch() -> None:
    found = thunder._C.torch_abi()
    if not found["handles"]:
        pytest.skip("switched off by the environment")
    assert set(found["off"].values()) <= {"symbol not found"}
    assert all(found[name] for name in ("shims", "wrap", "requires_grad", "layout", "state"))


# ---- a parameter or buffer that changes between two calls ----


class Scaled(torch.nn.Module):
    """Asks for everything that describes its weight."""

    def __init__(self, dims: int = 2) -> None:
        super().__init__()
        shape = (2, 3, 2, 2, 2, 2)[:dims]
        self.weight = torch.nn.Parameter(torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape))
        self.register_buffer("mask", torch.ones(shape))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[object, ...]]:
        w, m = self.weight, self.mask
        said = (tuple(w.shape), w.stride(), str(w.dtype), str(w.device), w.requires_grad, m.requires_grad)
        return x * w.sum().to(x.dtype) + m.sum().to(x.dtype), said


def made_by_an_operation(net: Scaled) -> None:
    net.mask = torch.ones(2, 3, requires_grad=True) * 2


CHANGES: dict[str, Callable[[Scaled], object]] = {
    "shape": lambda net: setattr(net.weight, "data", torch.ones(3, 2)),
    "one dimension more": lambda net: setattr(net.weight, "data", torch.ones(2, 3, 1)),
    "strides": lambda net: setattr(net.weight, "data", torch.ones(3, 2).t()),
    "stride 0": lambda net: setattr(net.weight, "data", torch.ones(2, 1).expand(2, 3)),
    "dtype": lambda net: setattr(net.weight, "data", torch.ones(2, 3, dtype=torch.float64)),
    "set_": lambda net: net.mask.set_(torch.ones(4, 4)),
    "resize_": lambda net: net.mask.resize_(1, 3),
    "t_": lambda net: net.mask.t_(),
    "requires_grad of the weight": lambda net: net.weight.requires_grad_(False),
    "requires_grad of the buffer": lambda net: net.mask.requires_grad_(True),
    "an operation's result": made_by_an_operation,
    "a view of a parameter": lambda net: setattr(net, "mask", net.weight.view(2, 3)),
    "module.to": lambda net: net.to(torch.float64),
    "swap_tensors": lambda net: torch.utils.swap_tensors(net.mask, torch.full((2, 3), 4.0)),
    "negated": lambda net: setattr(net, "mask", torch._neg_view(torch.ones(2, 3))),
    "values only": lambda net: net.mask.mul_(3),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("grad", [False, True])
def test_a_change_of_a_parameter_is_seen(change: str, grad: bool) -> None:
    net, x = Scaled(), torch.ones(2)
    compiled = thunder.jit(net)
    with torch.set_grad_enabled(grad):
        for call in range(5):
            if call == 3:
                CHANGES[change](net)
            out, said = compiled(x)
            wanted, wanted_said = net(x)
            torch.testing.assert_close(out, wanted)
            assert said == wanted_said
            assert out.requires_grad == wanted.requires_grad


def test_dimensions_that_lie_elsewhere() -> None:
    net, x = Scaled(dims=6), torch.ones(2)
    compiled = thunder.jit(net)
    for data in (net.weight.data, torch.ones(2, 3, 2, 2, 2, 3), torch.ones(2, 3, 2, 2, 2, 2).transpose(4, 5)):
        net.weight.data = data
        for _ in range(2):
            assert compiled(x)[1] == net(x)[1]


# ---- the state of the thread ----


class Times(TorchFunctionMode):
    """Every product is twice what it is."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out * 2 if func is torch.mul else out


class Plus(TorchDispatchMode):
    """Every product is one more than it is."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out + 1 if func is torch.ops.aten.mul.Tensor else out


class DefaultDtype:
    """The default dtype is float64."""

    def __enter__(self) -> None:
        torch.set_default_dtype(torch.float64)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(torch.float32)


STATES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast of another device": lambda: torch.autocast("xpu", dtype=torch.bfloat16, enabled=True),
    "a function mode": Times,
    "a dispatch mode": Plus,
    "a default dtype": DefaultDtype,
}


def program(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.mul(x, x), x @ x, torch.ones(2), x.sum() * 2


def same(
    compiled: Callable[..., tuple[torch.Tensor, ...]], x: torch.Tensor, around: AbstractContextManager[object]
) -> None:
    with around:
        outs, all_wanted = compiled(x), program(x)
    for out, wanted in zip(outs, all_wanted, strict=True):
        torch.testing.assert_close(out, wanted)
        assert (out.requires_grad, out.is_inference()) == (wanted.requires_grad, wanted.is_inference())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("thread", [False, True], ids=["", "in a thread"])
def test_a_change_of_the_thread_is_seen(state: str, thread: bool) -> None:
    compiled = thunder.jit(program, fallback="eager")
    errors: list[BaseException] = []

    def run() -> None:
        try:
            x = torch.randn(3, 3, requires_grad=True)
            for around in (nullcontext, nullcontext, STATES[state], nullcontext, STATES[state], nullcontext):
                same(compiled, x, around())
        except BaseException as error:
            errors.append(error)

    if thread:
        worker = threading.Thread(target=run)
        worker.start()
        worker.join()
    else:
        run()
    assert not errors, errors


def test_a_transform_around_the_call_is_seen() -> None:
    compiled, x = thunder.jit(program, fallback="eager"), torch.randn(4, 3, 3)
    same(compiled, x[0], nullcontext())
    for out, wanted in zip(torch.vmap(compiled)(x), torch.vmap(program)(x), strict=True):
        torch.testing.assert_close(out, wanted)
    same(compiled, x[0], nullcontext())
