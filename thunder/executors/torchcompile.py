"""``torchcompile``: regions through Inductor, torch.compile's code generator, without Dynamo and its guards.

A region becomes a graph of ATen operations on fake tensors, which goes to Inductor as it is; our plan calls what
comes back with one list of tensors. The numbers are those of ``torch.compile``: fused operations round once where eager
rounds after each.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import torch

from thunder import _C
from thunder._verify import body_of
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

    def fuse(self, region: Any) -> Callable:
        """Generate code for a region: seconds."""
        with self._lock:
            return _compile(region.trace, self.options)


def _compile(trace: Any, options: dict[str, Any]) -> Callable:
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes

    with torch.no_grad(), no_modes():
        mode, graph, fakes = aten_graph(trace)
        with mode, tracing(TracingContext(mode)), config.patch({**_known(config), **options}):
            compiled = compile_fx_inner(joint_graph_passes(graph), fakes)
    return _caller(compiled)


def _known(config: Any) -> dict[str, Any]:
    """What generated code need not look at: where torch's C interface is there, the plan compares its inputs before."""
    return {"size_asserts": False} if _C.torch_abi()["handles"] and hasattr(config, "size_asserts") else {}


def _caller(compiled: Any) -> Callable:
    call = getattr(compiled, "current_callable", None) or compiled

    def run(*tensors: torch.Tensor) -> Any:
        return call([*tensors])

    return run


@contextlib.contextmanager
def no_modes() -> Any:
    """A build in the thread of a call sees none of the modes around that call."""
    from torch.utils._python_dispatch import _disable_current_modes

    with torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


def aten_graph(trace: Any) -> tuple[Any, torch.fx.GraphModule, list[torch.Tensor]]:
    """A region as ATen operations: (fake mode, graph, its fake inputs)."""
    from torch._functorch.compile_utils import fx_graph_cse
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    body = body_of(trace)
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def program(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        _tracing_is_ours_alone()
        return tuple(_laid_out(t, p.stride()) for t, p in zip(body(*tensors), trace.output, strict=True))

    with mode:
        fakes = [torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device=p.device) for p in trace.inputs]
        graph = make_fx(program, decomposition_table=select_decomp_table())(*fakes)
    graph.graph = fx_graph_cse(graph.graph)  # what operations have in common comes out when they are taken apart
    graph.recompile()
    return mode, graph, fakes


def _tracing_is_ours_alone() -> None:
    """The flag that says that FX traces is the process's: calls in other threads would refuse to run under Dynamo."""
    from torch.fx import _symbolic_trace

    if getattr(_symbolic_trace, "_is_fx_tracing_flag", False):
        _symbolic_trace._is_fx_tracing_flag = False


def _laid_out(t: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """A result as eager lays it out: some decompositions have other strides than the kernels they stand for."""
    if all(n <= 1 or a == b for n, a, b in zip(t.shape, t.stride(), strides, strict=True)):
        return t
    order = sorted(range(t.dim()), key=lambda d: -strides[d])
    back = sorted(range(t.dim()), key=lambda d: order[d])
    return t.permute(order).clone(memory_format=torch.contiguous_format).permute(back)


torchcompile_executor = register_executor(TorchCompileExecutor())
