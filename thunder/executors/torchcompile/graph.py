"""A region as a graph of ATen operations on fake tensors."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from thunder._verify import body_of, function_of
from thunder.executors._families import Form, Text


@contextlib.contextmanager
def no_modes() -> Any:
    """A build in the thread of a call sees none of the modes around that call."""
    from torch.utils._python_dispatch import _disable_current_modes

    with torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


def aten_graph(trace: Any, form: Form | None = None) -> tuple[Any, torch.fx.GraphModule, list[torch.Tensor]]:
    """A region as ATen operations: (fake mode, graph, its fake inputs)."""
    from torch._functorch.compile_utils import fx_graph_cse
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    body = body_of(trace) if form is None else function_of(trace, form.text.generalised(form.numbers))
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=None if form is None else ShapeEnv())

    def program(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        _tracing_is_ours_alone()
        return tuple(_laid_out(t, p.stride()) for t, p in zip(body(*tensors), trace.output, strict=True))

    inputs = [(p.shape, p.stride(), p.dtype, p.device) for p in trace.inputs]
    if form is not None:
        fakes = [_symbolic(mode, i, form, *given) for i, given in enumerate(inputs)]
    with mode:
        if form is None:
            fakes = [torch.empty_strided(shape, stride, dtype=d, device=v) for shape, stride, d, v in inputs]
        graph = make_fx(program, decomposition_table=select_decomp_table())(*fakes)
    graph.graph = fx_graph_cse(graph.graph)  # what operations have in common comes out when they are taken apart
    graph.recompile()
    return mode, graph, fakes


def _tracing_is_ours_alone() -> None:
    """The flag that says that FX traces is the process's: calls in other threads would refuse to run under Dynamo."""
    from torch.fx import _symbolic_trace

    if getattr(_symbolic_trace, "_is_fx_tracing_flag", False):
        _symbolic_trace._is_fx_tracing_flag = False


def _symbolic(mode: Any, i: int, form: Form, shape: Any, stride: Any, dtype: Any, device: Any) -> torch.Tensor:
    """An input some of whose sizes may be any."""
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    kinds = [DimDynamic.DUCK if (i, d) in form.free else DimDynamic.STATIC for d in range(len(shape))]
    given = torch.empty_strided(shape, stride, dtype=dtype, device=device)
    return mode.from_tensor(given, symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds))


def _here(n: Any) -> int:
    """A size or stride of the region that code is generated from."""
    return n.node.hint if isinstance(n, torch.SymInt) else n


def _laid_out(t: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """A result as eager lays it out: some decompositions have other strides than the kernels they stand for."""
    if all(_here(n) <= 1 or _here(a) == b for n, a, b in zip(t.shape, t.stride(), strides, strict=True)):
        return t
    order = sorted(range(t.dim()), key=lambda d: -strides[d])
    back = sorted(range(t.dim()), key=lambda d: order[d])
    return t.permute(order).clone(memory_format=torch.contiguous_format).permute(back)


class Symbols:
    """Code for any sizes, and for which it was made: torch knows what it took for granted of them."""

    def __init__(self, form: Form, mode: Any, fakes: list[torch.Tensor]) -> None:
        self.form = form
        self._env = mode.shape_env
        self._symbols = {}
        for i, d in set(form.free.values()):
            self._symbols[fakes[i].shape[d].node._expr] = i, d  # not what it turned out to be equal to

    def check(self) -> None:
        """Nothing was decided that leaves one size only.

        Raises:
            ValueError: something was.
        """
        if any(self._env.replace(symbol).is_number for symbol in self._symbols):
            raise ValueError("the operations are for one size only")

    def hold(self, text: Text) -> bool:
        """Does the code serve a region of this text?"""
        if not self.form.fits(text):
            return False
        values = {symbol: text.shapes[i][d] for symbol, (i, d) in self._symbols.items()}
        within = all(self._env.var_to_range[s].lower <= n <= self._env.var_to_range[s].upper for s, n in values.items())
        return within and all(bool(guard.expr.xreplace(values) == True) for guard in self._env.guards)  # noqa: E712
