"""``nvfuser``: regions of pointwise operations, reductions and normalisations through NVIDIA's nvFuser.

    region --- ATen operations (as torchcompile sees them) --- definition.py ---> text of a fusion definition
                                                                                      |
                                      nvfuser_direct.FusionDefinition <--- exec -------+

nvFuser is a package of its own (``nvfuser-cu130-torch210`` and the like), built for one version of torch. Whether it
works with the torch that is there is found out by importing it when the first operation on a GPU is offered. If it does
not, every claim is declined with what was tried, and one warning says so.
"""

from thunder.executors.nvfuser.executor import nvfuser_executor, probe

__all__ = ["nvfuser_executor", "probe"]
