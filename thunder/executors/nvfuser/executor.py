"""The executor: what it takes into regions, and how one is built. See the package."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch

from thunder._errors import ThunderWarning
from thunder.executors.nvfuser.definition import TYPES, Definition, NoRule, define
from thunder.executors.sdpa import laid_out
from thunder.executors.torchcompile.graph import aten_graph, no_modes
from thunder.extend.executor import FusionExecutor
from thunder.extend.registry import register_executor

CUT = 48  # operations, as torchcompile

_FRONT_ENDS = ("nvfuser_direct", "nvfuser")

# By any name of an operator. Products of matrices are torch's; so is what draws random numbers.
_OPERATORS = [
    "abs",
    "neg",
    "exp",
    "expm1",
    "log",
    "log1p",
    "sqrt",
    "rsqrt",
    "sin",
    "cos",
    "tan",
    "tanh",
    "erf",
    "sigmoid",
    "reciprocal",
    "relu",
    "floor",
    "ceil",
    "round",
    "sign",
    "add",
    "sub",
    "mul",
    "div",
    "true_divide",
    "pow",
    "maximum",
    "minimum",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "logical_and",
    "logical_or",
    "logical_not",
    "where",
    "clamp",
    "sum",
    "mean",
    "amax",
    "amin",
    "var",
    "square",
    "softmax",
    "log_softmax",
    "reshape",
    "transpose",
    "permute",
    "unsqueeze",
    "squeeze",
    "gather",
    "cat",
    "split",
    "narrow",
    "flatten",
]
_METHODS = [
    "view",
    "reshape",
    "expand",
    "transpose",
    "permute",
    "unsqueeze",
    "to",
    "float",
    "type_as",
    "add",
    "mul",
    "sub",
    "neg",
    "contiguous",
]
_FUNCTIONS = [
    "gelu",
    "silu",
    "relu",
    "softmax",
    "log_softmax",
    "layer_norm",
    "rms_norm",
    "softplus",
    "sigmoid",
    "tanh",
    "nll_loss",
    "cross_entropy",
]
_ATEN = [
    "gelu_backward",
    "silu_backward",
    "tanh_backward",
    "sigmoid_backward",
    "threshold_backward",
    "_softmax_backward_data",
    "_log_softmax_backward_data",
    "native_layer_norm",
    "native_layer_norm_backward",
    "nll_loss_forward",
    "nll_loss_backward",
    "_to_copy",
    "slice_backward",
    "_softmax",
    "_log_softmax",
    "_fused_rms_norm",
    "_fused_rms_norm_backward",
]
_VIEWS = frozenset(
    f"aten.{n}" for n in ["view.default", "permute.default", "expand.default", "slice.Tensor", "t.default"]
)


@functools.cache
def probe() -> tuple[Any, str]:
    """nvFuser's Python front end, and why there is none: what was tried and what came of it."""
    found = []
    for name in _FRONT_ENDS:
        try:
            module = importlib.import_module(name)
            module.FusionDefinition, module.DataType.BFloat16  # noqa: B018
        except Exception as error:  # whatever an extension for another torch does
            found.append(f"import {name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            continue
        return module, ""
    return None, "; ".join(found)


@functools.cache
def _missing() -> str:
    """Why there is no nvFuser, said once."""
    reason = probe()[1]
    if reason:
        reason = f"nvFuser does not work with torch {torch.__version__}: {reason}"
        warnings.warn(
            f"executor 'nvfuser': {reason}. Others run its operations. Its packages are called nvfuser-cu130-torch210 "
            "and the like: the one for this CUDA and this torch is needed",
            ThunderWarning,
            stacklevel=2,
        )
    return reason


class NvFuserExecutor(FusionExecutor):
    """See the package.

    Args:
        front_end: nvFuser's Python module; None: it is looked for.
        device: the type of the devices that it serves.
    """

    def __init__(self, name: str = "nvfuser", *, front_end: Any = None, device: str = "cuda") -> None:
        super().__init__(name, cut=CUT, background=True)
        self._front_end = front_end
        self._device = device
        self._definitions: dict[Any, Definition | str] = {}
        for name in (
            *(f"torch.{n}" for n in _OPERATORS),
            *(f"torch.Tensor.{n}" for n in _METHODS),
            *(f"torch.nn.functional.{n}" for n in _FUNCTIONS),
            *(f"torch.ops.aten.{n}.default" for n in _ATEN),
        ):
            self.register_supported(name, self.operands_supported)

    def operands_supported(self, *args: Any, **kwargs: Any) -> tuple[bool, str]:
        """Whether nvFuser can compute with these tensors, whatever the operation, and why not."""
        tensors = [t for a in (*args, *kwargs.values()) for t in (a if isinstance(a, (list, tuple)) else (a,))]
        tensors = [t for t in tensors if isinstance(t, torch.Tensor)]
        for t in tensors:
            if t.device.type != self._device:
                return False, f"an operand is on {t.device}, not on a {self._device.upper()} device"
            if t.dtype not in TYPES:
                return False, f"nvFuser computes no {t.dtype}"
            if t.numel() == 0:
                return False, "an operand is empty"
        if not tensors:
            return False, "there is no operand"
        reason = "" if self._front_end else _missing()
        return not reason, reason

    def definition(self, region: Any) -> Definition | str:
        """Of a region; or why it has none."""
        found = self._definitions.get(region.trace)
        if found is None:
            found = self._definitions[region.trace] = _translate(region.trace)
        return found

    def wants(self, region: Any) -> bool | str:
        """What can be expressed, and computes something."""
        found = self.definition(region)
        return found if isinstance(found, str) else True

    def fuse(self, region: Any) -> Callable:
        """Compile: nvFuser does so when a fusion runs the first time, here on zeros."""
        found = self.definition(region)
        if isinstance(found, str):
            raise NoRule(found)
        run = build(found, self._front_end or probe()[0])
        like = [(p.shape, p.stride(), p.dtype, p.device) for p in region.trace.inputs]
        zeros = [torch.empty_strided(n, s, dtype=d, device=where).zero_() for n, s, d, where in like]
        with torch.no_grad(), no_modes():
            run(*zeros)
        return run


def _translate(trace: Any) -> Definition | str:
    try:
        with torch.no_grad(), no_modes():
            _, graph, _ = aten_graph(trace)
        calls = [n for n in graph.graph.nodes if n.op == "call_function"]
        if sum(str(n.target) not in _VIEWS for n in calls) < 2:
            return "one kernel or none: there is nothing to fuse"
        (output,) = (n for n in graph.graph.nodes if n.op == "output")
        if any(_is_view_of_input(n) for n in output.args[0]):
            return "a result is a view of an input"
        return define(graph)
    except NoRule as reason:
        return str(reason)


def _is_view_of_input(node: torch.fx.Node) -> bool:
    while node.op == "call_function" and str(node.target) in {*_VIEWS, "aten.unsqueeze.default", "aten.squeeze.dim"}:
        node = node.args[0]
    return node.op == "placeholder"


def build(found: Definition, front_end: Any) -> Callable:
    """Something that runs a definition, by nvFuser's front end."""
    names: dict[str, Any] = {}
    exec(found.text, names)
    fusion = front_end.FusionDefinition()
    with fusion:
        names["definition"](fusion, front_end.DataType)
    strides = found.strides

    def run(*tensors: torch.Tensor) -> list[torch.Tensor]:
        results = fusion.execute(list(tensors))
        return [r if r.stride() == s else laid_out(r, s) for r, s in zip(results, strides, strict=True)]

    return run


nvfuser_executor = register_executor(NvFuserExecutor())
