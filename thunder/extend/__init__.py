"""Executors: who runs the operations of a trace. The guide is docs/executors.md."""

from thunder._errors import KernelCompileError
from thunder.extend.build import wait_for_builds
from thunder.extend.cuda import cuda_kernel
from thunder.extend.executor import Executor, FusionExecutor, OperatorExecutor, single_op_executor
from thunder.extend.native import NativeExecutor, load_executor
from thunder.extend.operator import Context, Operator, op
from thunder.extend.registry import (
    add_always_executor,
    add_default_executor,
    add_executor_lists,
    deregister_executor,
    get_all_executors,
    get_always_executors,
    get_default_executors,
    get_executor,
    python_executor,
    pytorch_executor,
    register_executor,
    remove_always_executor,
    remove_default_executor,
    resolve_executors,
    set_always_executors,
    set_default_executors,
)
from thunder.extend.triton import triton_kernel

__all__ = [
    "Context",
    "Executor",
    "FusionExecutor",
    "KernelCompileError",
    "NativeExecutor",
    "Operator",
    "OperatorExecutor",
    "add_always_executor",
    "add_default_executor",
    "add_executor_lists",
    "cuda_kernel",
    "deregister_executor",
    "get_all_executors",
    "get_always_executors",
    "get_default_executors",
    "get_executor",
    "load_executor",
    "op",
    "python_executor",
    "pytorch_executor",
    "register_executor",
    "remove_always_executor",
    "remove_default_executor",
    "resolve_executors",
    "set_always_executors",
    "set_default_executors",
    "single_op_executor",
    "triton_kernel",
    "wait_for_builds",
]
