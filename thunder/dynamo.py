"""Thunder under ``torch.compile``: Dynamo follows the Python, thunder compiles the graphs.

::

    compiled = torch.compile(model, backend=thunder.dynamo.backend)

Dynamo breaks a program where values of tensors steer it or where it has effects, runs that part in Python, and hands
over the graphs in between; each becomes a program of ``thunder.jit``. That is what ``thunder.jit(fallback="dynamo")``,
the default, does with a callable that cannot be captured whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Graphs end where values become numbers and where shapes depend on values: that part is Python's. Its numbers are
# constants: Dynamo joins a message (f"step {self.step}") whose number varies without writing the number as text, so
# that the call raises. What numpy draws, numpy draws: Dynamo shuffles in another order.
_BREAKS = {
    "capture_scalar_outputs": False,
    "capture_dynamic_output_shape_ops": False,
    "specialize_int": True,
    "specialize_float": True,
    "use_numpy_random_stream": True,
    "suppress_errors": True,
}


def backend(graph: torch.fx.GraphModule, example_inputs: list[Any], **options: Any) -> Callable:
    """A backend of ``torch.compile``.

    Args:
        graph: what Dynamo found, as a module of torch operations.
        example_inputs: its inputs, not looked at.
        options: of ``thunder.jit``, by ``functools.partial(thunder.dynamo.backend, executors=[...])``.
    """
    import thunder

    if _enters_levels(graph):
        return graph
    return thunder.jit(graph, **{"fallback": "eager", **options})


class Fallback:
    """What runs a callable that cannot be captured: made at the first call."""

    def __init__(self, fn: Callable, compile_part: Callable[[torch.fx.GraphModule], Callable]) -> None:
        self.fn = fn
        self.compile_part = compile_part
        self.compiled: Callable | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it."""
        if self.compiled is None:
            self.compiled = torch.compile(self._plain(), backend=self._backend)
        with torch._dynamo.config.patch(**_BREAKS):
            return self.compiled(*args, **kwargs)

    def _plain(self) -> Callable:
        """A function: torch.compile would take a module to be another one."""
        fn = self.fn
        return (lambda *args, **kwargs: fn(*args, **kwargs)) if isinstance(fn, torch.nn.Module) else fn

    def _backend(self, graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable:
        return graph if _enters_levels(graph) else self.compile_part(graph)


def _enters_levels(graph: torch.fx.GraphModule) -> bool:
    """Does it enter a level of forward-mode derivatives, or of vmap? A capture that ends inside would not leave it."""
    code = graph.code  # a lazy graph module writes it when it is first asked for: not in the middle of a capture
    return any(enters in code for enters in ("_enter_dual_level", "_increment_nesting"))
