"""Train a small network on an OpenCL device, next to eager on the processor.

    python examples/opencl_device/demo.py [--steps 30] [--width 256] [--batch 128]

Three linear layers with GELU and ReLU, a cross entropy, and Adam. Prints the losses of both, which share of the
operations ran on the device, and what crossed the border. The exit status is 1 when a loss differs by more than the
tolerance or when less than nine tenths of the operations ran on the device, 2 where there is no device.
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
CLASSES, FEATURES = 10, 64


def network(width: int) -> nn.Module:
    """Three layers."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(FEATURES, width), nn.GELU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, CLASSES)
    )


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


class Trainer:
    """A model, its moments, and the functions that run a step; eager and compiled differ in those alone."""

    def __init__(self, model: nn.Module, compiled: Callable[[Callable], Callable]) -> None:
        self.model = model
        self.parameters = list(model.parameters())
        self.moments = [[torch.zeros_like(p) for p in self.parameters] for _ in range(2)]
        self.loss_of, self.adam = compiled(loss_of), compiled(adam)

    def step(self, x: Tensor, y: Tensor) -> float:
        """One update; the loss before it."""
        loss = self.loss_of(self.model, x, y)
        gradients = torch.autograd.grad(loss, self.parameters)
        with torch.no_grad():
            new, *self.moments = self.adam(self.parameters, list(gradients), *self.moments)
            for p, value in zip(self.parameters, new, strict=True):
                p.copy_(value)
        return loss.item()


def share_on_device(*compiled: Callable) -> tuple[int, int]:
    """Operations that the device runs, and all of them, in the last programs of compiled functions."""
    device = everything = 0
    for fn in compiled:
        explanation = thunder.explain(fn)
        units = {u.name: u.operations for u in explanation.units if u.executor == "opencl" and u.state == "trusted"}
        traces = [thunder.last_traces(fn)[-1]]
        traces += [thunder.last_backward_traces(fn)[-1]] if any(u.kind == "backward" for u in explanation.units) else []
        for name in (n for trace in traces for n in trace.operations()):
            device += units.get(name, 0)
            everything += units.get(name, 1)
    return device, everything


def run(steps: int, width: int, batch: int) -> int:
    """Train twice and compare; the exit status."""
    device = opencl_device.opencl_executor.device
    print(f"device: {device.device.name.strip()} ({device.device.platform.version.strip()})")
    model = network(width)
    ours = Trainer(copy.deepcopy(model), lambda fn: thunder.jit(fn, executors=["opencl"]))
    eager = Trainer(model, lambda fn: fn)
    centres = torch.randn(CLASSES, FEATURES)
    worst, spent = 0.0, [0.0, 0.0]
    for i in range(steps):
        y = torch.randint(0, CLASSES, (batch,))
        x = centres[y] + 4 * torch.randn(batch, FEATURES)
        start = time.perf_counter()
        a = ours.step(x, y)
        middle = time.perf_counter()
        b = eager.step(x, y)
        spent = [spent[0] + middle - start, spent[1] + time.perf_counter() - middle] if i else spent
        worst = max(worst, abs(a - b) / abs(b))
        if i % max(steps // 10, 1) == 0 or i == steps - 1:
            print(f"step {i:3}: loss {a:.6f} on the device, {b:.6f} in eager")
    with torch.no_grad():
        inference = thunder.jit(ours.model, executors=["opencl"])
        inference(x)  # compared with torch
        off = (inference(x) - ours.model(x)).abs().max().item()
    print(f"largest relative difference of a loss: {worst:.2e} (bound {TOLERANCE:.0e}); of a forward pass {off:.2e}")
    done, everything = share_on_device(ours.loss_of, ours.adam, inference)
    print(f"operations on the device: {done} of {everything} ({done / everything:.1%})")
    ours_ms, eager_ms = (s / max(steps - 1, 1) * 1e3 for s in spent)
    print(f"a step after the first: {ours_ms:.2f} ms, eager {eager_ms:.2f} ms")
    print(f"sent {device.sent:,} bytes, received {device.received:,}, parameters there already {device.reused:,}")
    return int(worst > TOLERANCE or off > TOLERANCE or done < 0.9 * everything)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch", type=int, default=128)
    options = parser.parse_args()
    try:
        return run(options.steps, options.width, options.batch)
    except opencl_device.NoDevice as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
