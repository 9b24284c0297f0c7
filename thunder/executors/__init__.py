"""Executors that come with the package. Each is a module that registers itself; what it needs is imported when used."""

from thunder.executors.cudnn import cudnn_executor
from thunder.executors.nvfuser import nvfuser_executor
from thunder.executors.sdpa import sdpa_executor
from thunder.executors.torchcompile import torchcompile_executor
from thunder.executors.triton.executor import triton_executor

__all__ = ["cudnn_executor", "nvfuser_executor", "sdpa_executor", "torchcompile_executor", "triton_executor"]
