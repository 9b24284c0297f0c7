"""An executor for a device that thunder knows nothing of, from outside: the guide is docs/accelerators.md.

import opencl_device                                    # registers it
compiled = thunder.jit(model, executors=["opencl"])
"""

from thunder.extend import register_executor

from .device import Device, NoDevice
from .executor import OpenCLExecutor

__all__ = ["Device", "NoDevice", "OpenCLExecutor", "opencl_executor"]

opencl_executor = register_executor(OpenCLExecutor())
