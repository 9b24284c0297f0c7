"""Train a small network on an OpenCL device, next to eager on the processor.

    python examples/opencl_device/demo.py [--steps 30]

Three linear layers with GELU and ReLU, a cross entropy, and Adam. The exit status is 1 when a loss differs by more than
the tolerance or less than nine tenths of the operations ran on the device, 2 where there is no device.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import opencl_device
import thunder

TOLERANCE = 1e-4  # relative, between two losses
CLASSES, FEATURES, WIDTH, BATCH = 10, 64, 256, 128


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """What is trained."""
    return F.cross_entropy(model(x), y)


def adam(parameters: list[Tensor], gradients: list[Tensor], first: list[Tensor], second: list[Tensor]) -> list[list]:
    """New parameters and moments."""
    new: list[list] = [[], [], []]
    for p, g, m, v in zip(parameters, gradients, first, second, strict=True):
        m = m * 0.9 + g * 0.1
        v = v * 0.99 + g * g * 0.01
        for group, t in zip(new, (p - 0.001 * m / (v.sqrt() + 1e-8), m, v), strict=True):
            group.append(t)
    return new


def training(model: nn.Module, loss_of: Callable, adam: Callable) -> Callable[[Tensor, Tensor], float]:
    """A function of a batch that does one update and gives the loss before it."""
    parameters = list(model.parameters())
    moments = [[torch.zeros_like(p) for p in parameters] for _ in range(2)]

    def step(x: Tensor, y: Tensor) -> float:
        loss = loss_of(model, x, y)
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            new, *moments[:] = adam(parameters, list(gradients), *moments)
            for p, value in zip(parameters, new, strict=True):
                p.copy_(value)
        return loss.item()

    return step


def share_on_device(*compiled: Callable) -> tuple[int, int]:
    """Operations that the device runs, and all of them, in the last programs of compiled functions."""
    device = everything = 0
    for fn in compiled:
        units = {u.name: u for u in thunder.explain(fn).units if u.executor == "opencl" and u.state == "trusted"}
        backward = any(u.kind == "backward" for u in units.values())
        last = [thunder.last_traces, thunder.last_backward_traces][: 1 + backward]
        names = [name for traces in last for name in traces(fn)[-1].operations()]
        device += sum(units[n].operations for n in names if n in units)
        everything += sum(units[n].operations if n in units else 1 for n in names)
    return device, everything


def run(steps: int) -> int:
    """Train twice and compare; the exit status."""
    device = opencl_device.opencl_executor.device
    print(f"device: {device.device.name.strip()} ({device.device.platform.version.strip()})")
    torch.manual_seed(0)
    layers = [nn.Linear(a, b) for a, b in ((FEATURES, WIDTH), (WIDTH, WIDTH), (WIDTH, CLASSES))]
    model = nn.Sequential(layers[0], nn.GELU(), layers[1], nn.ReLU(), layers[2])
    ours = copy.deepcopy(model)
    compiled = [thunder.jit(fn, executors=["opencl"]) for fn in (loss_of, adam, ours)]
    steppers = training(ours, *compiled[:2]), training(model, loss_of, adam)
    centres, worst, spent = torch.randn(CLASSES, FEATURES), 0.0, [[], []]
    for i in range(steps):
        y = torch.randint(0, CLASSES, (BATCH,))
        x = centres[y] + 4 * torch.randn(BATCH, FEATURES)
        losses = []
        for step, times in zip(steppers, spent, strict=True):
            start = time.perf_counter()
            losses.append(step(x, y))
            times.append(time.perf_counter() - start)
        worst = max(worst, abs(losses[0] - losses[1]) / abs(losses[1]))
        if i % max(steps // 10, 1) == 0 or i == steps - 1:
            print(f"step {i:3}: loss {losses[0]:.6f} on the device, {losses[1]:.6f} in eager")
    with torch.no_grad():
        compiled[2](x)  # compared with torch
        off = (compiled[2](x) - ours(x)).abs().max().item()
    print(f"largest relative difference of a loss: {worst:.2e} (bound {TOLERANCE:.0e}); of a forward pass {off:.2e}")
    done, everything = share_on_device(*compiled)
    print(f"operations on the device: {done} of {everything} ({done / everything:.1%})")
    print("median step: {:.2f} ms, eager {:.2f} ms".format(*(sorted(t)[len(t) // 2] * 1e3 for t in spent)))
    print(f"sent {device.sent:,} bytes, received {device.received:,}, parameters there already {device.reused:,}")
    return int(worst > TOLERANCE or off > TOLERANCE or done < 0.9 * everything)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    try:
        return run(parser.parse_args().steps)
    except opencl_device.NoDevice as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
