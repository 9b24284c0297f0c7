"""Thunder: a deep-learning compiler for PyTorch with a C core.

``thunder.jit(fn_or_module)`` gives back a callable with the same results.
"""

import torch as _torch  # noqa: F401  (the extension binds to the torch that is loaded)

from thunder import _kernels, _rows, dynamo, examine, executors, extend, transforms  # noqa: F401  (traces name _kernels, _rows)
from thunder._api import (
    CompileStats,
    cache_hits,
    cache_misses,
    cache_option,
    compile_stats,
    explain_recompile,
    jit,
    last_backward_traces,
    last_compile_options,
    last_traces,
    list_transforms,
)
from thunder._bisect import bisect
from thunder._C import BoundSymbol, TensorProxy, Trace
from thunder._errors import CaptureError, ThunderError, ThunderWarning, TransformError
from thunder._explain import explain
from thunder._grad import grad, value_and_grad
from thunder._module import ThunderModule
from thunder._warm import warm_up as _warm_up
from thunder.executors import (
    cudnn_executor,
    nvfuser_executor,
    sdpa_executor,
    torchcompile_executor,
    triton_executor,
)
from thunder.extend import (
    add_executor_lists,
    get_all_executors,
    get_always_executors,
    get_default_executors,
    get_executor,
    pytorch_executor,
    resolve_executors,
)
from thunder.transforms import Transform

__version__ = "0.1.0"

_warm_up()

__all__ = [
    "BoundSymbol",
    "CaptureError",
    "CompileStats",
    "TensorProxy",
    "ThunderError",
    "ThunderModule",
    "ThunderWarning",
    "Trace",
    "Transform",
    "TransformError",
    "add_executor_lists",
    "bisect",
    "cache_hits",
    "cache_misses",
    "cache_option",
    "compile_stats",
    "cudnn_executor",
    "dynamo",
    "examine",
    "executors",
    "explain",
    "explain_recompile",
    "extend",
    "get_all_executors",
    "get_always_executors",
    "get_default_executors",
    "get_executor",
    "grad",
    "jit",
    "last_backward_traces",
    "last_compile_options",
    "last_traces",
    "list_transforms",
    "nvfuser_executor",
    "pytorch_executor",
    "resolve_executors",
    "sdpa_executor",
    "torchcompile_executor",
    "transforms",
    "triton_executor",
    "value_and_grad",
]
