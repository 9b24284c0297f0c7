"""The executor: what it claims, and how a region becomes kernels."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

from thunder.extend import FusionExecutor
from thunder.extend.executor import operator_key

from . import operators, pointwise
from .device import Device
from .pointwise import Decline
from .program import Program

LARGEST = 2**31 - 1  # elements: indices in kernels are int


class OpenCLExecutor(FusionExecutor):
    """Regions of float32 operations on a ``Device``: the first one there is, if none is given.

    Their inputs and results are tensors of the host.
    """

    def __init__(self, name: str = "opencl", device: Device | None = None) -> None:
        super().__init__(name)
        self._device = device
        for keys, check in (
            (pointwise.RULES, _check_pointwise),
            (operators.VIEWS, lambda *call: operators.check_view(*call, _is_tensor)),
            (operators.EMITTERS, lambda key, args, kwargs: operators.EMITTERS[key](None, None, *args, **kwargs)),
        ):
            for key in keys:
                self.register_supported(key, _checker(key, check))

    @property
    def device(self) -> Device:
        """Raises NoDevice, with what to install, where there is none."""
        if self._device is None:
            self._device = Device()
        return self._device

    def wants(self, region: Any) -> bool | str:
        """Regions that compute something: views alone cost torch nothing."""
        views = all(operator_key(name) in operators.VIEWS for name in region.trace.operations())
        return "views alone: there is nothing to compute" if views else True

    def fuse(self, region: Any) -> Callable:
        """Generate the kernels of a region and compile them."""
        program = Program(region.trace, lambda symbol: operator_key(symbol.name) in pointwise.RULES)
        for symbol in region.trace.bound_symbols:
            _emit(program, symbol, operator_key(symbol.name))
        return program.finish(self.device)


def _emit(program: Program, symbol: Any, key: str) -> None:
    args, kwargs, out = symbol.args, symbol.kwargs, symbol.flat_proxy_outs
    if key in operators.VIEWS:
        operators.emit_view(program, symbol)
    elif key in operators.EMITTERS:
        operators.EMITTERS[key](program, out[0] if len(out) == 1 else out, *args, **kwargs)
    else:
        rule = lambda names: pointwise.expression(key, iter(names), args, kwargs, _is_tensor)  # noqa: E731
        operands = [a for a in (*args, *kwargs.values()) if _is_tensor(a)]
        program.wait(out[0], rule, operands)


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "stride")  # of a trace, or without data


# ---- checkers: called like the operator, with tensors that have no data ----


def _checker(key: str, check: Callable) -> Callable:
    def checker(*args: Any, **kwargs: Any) -> bool | str:
        try:
            _check_tensors(args, kwargs)
            check(key, args, kwargs)
        except Decline as reason:
            return str(reason)
        except TypeError as error:
            return f"called in a way that it does not know: {error}"
        return True

    return checker


def _check_tensors(args: tuple, kwargs: dict[str, Any]) -> None:
    for item in (*args, *kwargs.values()):
        for t in filter(_is_tensor, item if isinstance(item, (list, tuple)) else (item,)):
            operators.require(t.device.type == "cpu", f"a tensor on {t.device.type}: the border is the host's memory")
            operators.require(t.layout == torch.strided, f"layout {t.layout}")
            operators.require(t.dtype in (torch.float32, torch.int64, torch.bool), f"dtype {t.dtype}")
            operators.require(t.numel() <= LARGEST, "more elements than an int counts")


def _check_pointwise(key: str, args: tuple, kwargs: dict[str, Any]) -> None:
    tensors = [a for a in (*args, *kwargs.values()) if _is_tensor(a)]
    conditions = int(key == "where")
    operators.require(len(tensors) > conditions, "no tensor to compute with")
    for i, t in enumerate(tensors):
        wanted = torch.bool if i < conditions else torch.float32
        operators.require(t.dtype == wanted, f"dtype {t.dtype} where the kernel takes {wanted}")
    pointwise.expression(key, (f"v{i}" for i in itertools.count()), args, kwargs, _is_tensor)
