"""``torchcompile``: regions through Inductor, torch.compile's code generator, without Dynamo and its guards.

A region becomes a graph of ATen operations on fake tensors, which goes to Inductor as it is; our plan calls what
comes back with one list of tensors. The numbers are those of ``torch.compile``: fused operations round once where eager
rounds after each.
"""

from thunder.executors.torchcompile.executor import TorchCompileExecutor, torchcompile_executor

__all__ = ["TorchCompileExecutor", "torchcompile_executor"]
