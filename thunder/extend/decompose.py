"""What no executor before torch takes is taken apart, and its pieces are offered again.

    torch.nn.functional.layer_norm(x, ...)   ->   var_mean, sub, add, rsqrt, mul, ...

The pieces are ATen operations, found with torch's own decompositions. An operation is taken apart only where an
executor takes one of its pieces; otherwise it stays whole and torch runs it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from thunder import _C
from thunder.extend.claims import Claims
from thunder.extend.executor import Implementation, takes
from thunder.extend.operator import dotted_name
from thunder.transforms._base import Transform


class Decompose(Transform):
    """The step between the passes and the claims; only of callables with an executor that has ``decompose=True``."""

    def __init__(self, claims: Claims) -> None:
        self.claims = claims

    def transform_trace_post_optimization(self, trace: _C.Trace, *, kind: str) -> _C.Trace:
        """Replace what nobody takes by pieces, where somebody takes some of them."""
        for symbol in trace.bound_symbols:
            if symbol.effects or self._is_taken(symbol):
                continue
            pieces = self._pieces(symbol)
            if pieces is not None:
                trace = trace.replace(symbol, pieces)
        return trace

    def _is_taken(self, symbol: Any) -> bool:
        args, kwargs = _fakes((tuple(symbol.args), dict(symbol.kwargs)))
        return any(_agrees(table, _C.operator_key(symbol.name), args, kwargs) for table in self.claims.tables)

    def _pieces(self, symbol: Any) -> Callable | None:
        """A function of the operation's arguments that runs its pieces, or None where it stays whole."""
        leaves, spec = pytree.tree_flatten((tuple(symbol.args), dict(symbol.kwargs)))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, _C.TensorProxy)]
        graph = None
        for table in _tables():  # larger pieces first
            try:
                graph = _graph(symbol.sym, leaves, spec, places, table)
            except Exception:  # torch cannot take it apart: it stays whole
                return None
            calls = [node for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
            if len(calls) > 1 and any(self._takes_piece(node) for node in calls):
                break
        else:
            return None

        def run(*args: Any, **kwargs: Any) -> Any:
            given = pytree.tree_leaves((args, kwargs))
            return graph(*(given[i] for i in places))

        return run

    def _takes_piece(self, node: torch.fx.Node) -> bool:
        args, kwargs = pytree.tree_map_only(torch.fx.Node, lambda n: n.meta.get("val"), (node.args, node.kwargs))
        key = _C.operator_key(dotted_name(node.target))
        return any(
            executor.decompose and _agrees(table, key, args, kwargs)
            for executor, table in zip(self.claims.executors, self.claims.tables, strict=True)
        )


def decompositions(claims: Claims | None) -> tuple[Transform, ...]:
    """The step, where an executor asks for it."""
    return (Decompose(claims),) if claims is not None and any(e.decompose for e in claims.executors) else ()


def _agrees(table: dict[str, Any], key: str, args: Any, kwargs: Any) -> bool:
    known = table[key] if key in table else table.get("*")
    if isinstance(known, Implementation):
        return takes(known.checker, tuple(args), dict(kwargs))[0]
    return known is True


# Core operators of torch that are more than one step: taken apart last.
_COMPOUND = frozenset(
    """
    native_layer_norm native_group_norm native_batch_norm _softmax _log_softmax gelu silu mish elu softplus leaky_relu
    hardswish hardsigmoid addmm baddbmm addmv addcmul addcdiv mse_loss smooth_l1_loss huber_loss nll_loss_forward
    binary_cross_entropy native_layer_norm_backward _softmax_backward_data _log_softmax_backward_data gelu_backward
    silu_backward sigmoid_backward tanh_backward threshold_backward mse_loss_backward
    """.split()  # noqa: SIM905
)


def _tables() -> list[dict[Any, Callable]]:
    """Torch's decompositions: what autograd does not see; into the core operators; those that are compound too."""
    from torch._decomp import core_aten_decompositions, decomposition_table

    core = dict(core_aten_decompositions())
    compound = {op: rule for op, rule in decomposition_table.items() if _base_name(op) in _COMPOUND}
    return [{}, core, {**core, **compound}]


def _base_name(op: Any) -> str:
    return op.name().partition("::")[2].partition(".")[0] if isinstance(op, torch._ops.OpOverload) else ""


def _graph(
    function: Callable, leaves: list[Any], spec: Any, places: list[int], table: dict[Any, Callable]
) -> torch.fx.GraphModule:
    from torch.fx.experimental.proxy_tensor import make_fx

    def call(*tensors: torch.Tensor) -> Any:
        given = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            given[place] = tensor
        args, kwargs = pytree.tree_unflatten(given, spec)
        return function(*args, **kwargs)

    fakes = _fakes([leaves[i] for i in places])
    with torch.no_grad():
        return make_fx(call, decomposition_table=table)(*fakes)


def _fakes(tree: Any) -> Any:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        return pytree.tree_map_only(
            _C.TensorProxy,
            lambda p: torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device=p.device),
            tree,
        )
