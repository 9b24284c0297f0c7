"""A region as kernels: values, the memory that they lie in, and the steps that compute them.

    t0 = linear(x, w)          step 0: matrix product x, w -> storage 2
    t1 = gelu(t0)              nothing yet: t1 is an expression of t0
    t2 = t1 * y                nothing yet: t2 is an expression of t0 and y
    t3 = t2.t()                step 1: gelu(t0) * y -> storage 3;    t3 is storage 3 with other strides
    return (t3,)

Pointwise operations wait as expressions until somebody needs their numbers in memory; a kernel then computes all that
are of one shape. Views never run: a value is a storage, strides and an offset. Shapes are numbers in the source.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .device import Device, extent

C_TYPE = {torch.float32: "float", torch.int64: "long", torch.bool: "uchar"}
LONGEST = 40  # operations in one expression


@dataclasses.dataclass(frozen=True)
class Value:
    """Numbers in the memory of the device: where, and how they lie there."""

    storage: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    def at(self, name: str, indices: Sequence[str]) -> str:
        """The element at these indices, in C; ``name`` is that of the kernel's parameter."""
        terms = [f"({i})*{s}" for i, s, n in zip(indices, self.strides, self.shape, strict=True) if s and n > 1]
        return f"{name}[{' + '.join([str(self.offset), *terms])}]"

    def broadcast(self, shape: Sequence[int]) -> Value:
        """The same numbers as elements of a larger shape."""
        more = len(shape) - len(self.shape)
        old = (0,) * more + tuple(0 if n == 1 else s for n, s in zip(self.shape, self.strides, strict=True))
        return dataclasses.replace(self, shape=tuple(shape), strides=old)


@dataclasses.dataclass
class Waiting:
    """A pointwise operation that has not run: ``rule`` of C expressions, for its operands by name."""

    proxy: Any
    rule: Callable[[list[str]], str]
    operands: list[str]
    length: int


@dataclasses.dataclass
class Storage:
    """Memory of a program: that of input ``input``, or its own."""

    count: int
    dtype: torch.dtype
    input: int | None = None
    last_step: int = -1


class Program:
    """Collects the steps of one region; ``finish`` makes what runs it."""

    def __init__(self, trace: Any, pointwise: Callable[[Any], bool]) -> None:
        self.trace = trace
        self.storages: list[Storage] = []
        self.steps: list[tuple[str, int, list[int]]] = []  # kernel, work items, storages
        self.sources: list[str] = []
        self.values: dict[str, Value | Waiting] = {}
        self.flag: int | None = None  # a storage: an index was out of range
        self._in_memory = self._needed(pointwise)
        for i, proxy in enumerate(trace.inputs):
            self.values[proxy.name] = self._store(proxy.shape, proxy.stride(), proxy.dtype, i)

    def _needed(self, pointwise: Callable[[Any], bool]) -> set[str]:
        """Names of the values that somebody reads from memory."""
        needed = {proxy.name for proxy in self.trace.output}
        for symbol in self.trace.bound_symbols:
            shapes = {tuple(p.shape) for p in symbol.flat_proxy_outs} if pointwise(symbol) else {}
            needed |= {proxy.name for proxy in symbol.flat_proxy_args if tuple(proxy.shape) not in shapes}
        return needed

    def _store(self, shape: Any, strides: Any, dtype: torch.dtype, source: int | None = None) -> Value:
        self.storages.append(Storage(extent(shape, strides), dtype, source))
        return Value(len(self.storages) - 1, tuple(shape), tuple(strides), 0, dtype)

    # ---- for the operators ----

    def value(self, proxy: Any) -> Value:
        """A value in memory; runs what it waits for."""
        found = self.values[proxy.name]
        return self._run(proxy.name) if isinstance(found, Waiting) else found

    def new(self, proxy: Any) -> Value:
        """Memory for a result, laid out as torch lays it out."""
        made = self.values[proxy.name] = self._store(proxy.shape, proxy.stride(), proxy.dtype)
        return made

    def index_flag(self) -> Value:
        """A number that a kernel sets when an index is out of range: the run then raises IndexError."""
        if self.flag is None:
            self.flag = self._store((1,), (1,), torch.int64).storage
        return Value(self.flag, (1,), (1,), 0, torch.int64)

    def kernel(self, size: int, body: str, **values: Value) -> None:
        """One step: ``body`` for ``i`` from 0 to ``size``; ``values`` are the parameters."""
        if not size:
            return
        parameters = [f"__global {C_TYPE[v.dtype]} *{name}" for name, v in values.items()]
        name, used = f"k{len(self.steps)}", [v.storage for v in values.values()]
        self.sources.append(
            f"__kernel void {name}({', '.join(parameters)}) {{\n  const int i = get_global_id(0);\n{body}}}\n"
        )
        for s in used:
            self.storages[s].last_step = len(self.steps)
        self.steps.append((name, size, used))

    def wait(self, proxy: Any, rule: Callable[[list[str]], str], operands: Sequence[Any]) -> None:
        """A pointwise operation: it runs when its numbers are needed."""
        found = [self.values[o.name] for o in operands if tuple(o.shape) == tuple(proxy.shape)]
        length = 1 + sum(w.length for w in found if isinstance(w, Waiting))
        self.values[proxy.name] = Waiting(proxy, rule, [o.name for o in operands], length)
        if length > LONGEST:
            self._in_memory.add(proxy.name)
            self._run(proxy.name)

    # ---- expressions ----

    def _run(self, name: str) -> Value:
        """Compute a waiting value, and those on the way that are needed in memory as well."""
        shape = tuple(self.values[name].proxy.shape)
        order: list[str] = []
        self._collect(name, shape, order)
        local = {n: f"v{k}" for k, n in enumerate(order)}
        waiting = {n: w for n in order if isinstance(w := self.values[n], Waiting)}
        read = {n: self.values[n].broadcast(shape) for n in order if n not in waiting}
        written = {n: self.new(w.proxy) for n, w in waiting.items() if n in self._in_memory or n == name}
        if all(v.strides == contiguous(shape) for v in (*read.values(), *written.values())):
            shape = (count(shape),)  # they lie one after the other: one dimension will do
            flat = lambda group: {n: dataclasses.replace(v, shape=shape, strides=(1,)) for n, v in group.items()}  # noqa: E731
            read, written = flat(read), flat(written)
        indices = [f"c{d}" for d in range(len(shape))]
        lines = [unravel("i", shape)]
        for n in order:
            if n in waiting:
                dtype, what = waiting[n].proxy.dtype, waiting[n].rule([local[o] for o in waiting[n].operands])
            else:
                dtype, what = read[n].dtype, read[n].at(f"p{local[n]}", indices)
            lines.append(f"  const {C_TYPE[dtype]} {local[n]} = {what};\n")
        lines += [f"  {v.at(f'p{local[n]}', indices)} = {local[n]};\n" for n, v in written.items()]
        parameters = {f"p{local[n]}": v for n, v in (*read.items(), *written.items())}
        self.kernel(count(shape), "".join(lines), **parameters)
        return self.values[name]

    def _collect(self, name: str, shape: tuple[int, ...], order: list[str]) -> None:
        """The values of an expression, operands first; waiting ones of another shape run now."""
        if name in order:
            return
        found = self.values[name]
        if isinstance(found, Waiting):
            if tuple(found.proxy.shape) != shape:
                self._run(name)
            else:
                for operand in found.operands:
                    self._collect(operand, shape, order)
        order.append(name)

    # ---- running ----

    def finish(self, device: Device) -> Callable:
        """Compile everything; what runs the region."""
        wanted = {p.name: p for p in self.trace.output}
        for name in [n for n in self.values if n in wanted][::-1]:  # the last first: its kernel computes others too
            self.value(wanted[name])
        outputs = [(self.value(p), tuple(p.shape), p.stride()) for p in self.trace.output]
        built = device.build("\n".join(self.sources)) if self.steps else None
        kernels = [device.cl.Kernel(built, name) for name, _, _ in self.steps]
        return Runner(device, self, kernels, outputs)


class Runner:
    """What ``fuse`` returns: sends the inputs, queues the kernels, fetches the results."""

    def __init__(self, device: Device, program: Program, kernels: list[Any], outputs: list[Any]) -> None:
        self.device = device
        self.storages, self.flag = program.storages, program.flag
        self.steps = [(k, size, used) for k, (_, size, used) in zip(kernels, program.steps, strict=True)]
        self.inputs, self.outputs = [p.stride() for p in program.trace.inputs], outputs
        self.fetched = {v.storage for v, _, _ in outputs} | ({self.flag} if self.flag is not None else set())
        self.source = "\n".join(program.sources)

    def __call__(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Tensors of the region's inputs to a list of its results."""
        with self.device.lock, torch.no_grad():
            tensors = tuple(map(_laid_out, tensors, self.inputs))
            return self._results(self._compute(tensors), tensors)

    def _compute(self, tensors: tuple[torch.Tensor, ...]) -> dict[int, Any]:
        buffers: dict[int, Any] = {}
        for n, (kernel, size, used) in enumerate(self.steps):
            for s in set(used) - buffers.keys():
                storage = self.storages[s]
                if storage.input is not None:
                    buffers[s] = self.device.send(tensors[storage.input])
                else:
                    buffers[s] = self.device.allocate(storage.count * storage.dtype.itemsize, zero=s == self.flag)
            kernel(self.device.queue, (size,), None, *(buffers[s] for s in used))
            for s in set(used) - self.fetched:
                if self.storages[s].last_step == n:
                    del buffers[s]
        return buffers

    def _results(self, buffers: dict[int, Any], tensors: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        host: dict[int, torch.Tensor] = {}
        if self.flag in buffers and self.device.receive(buffers[self.flag], 1, torch.int64).item():
            raise IndexError("index out of range")
        results = []
        for value, shape, strides in self.outputs:
            storage, s = self.storages[value.storage], value.storage
            if storage.input is not None:
                host[s] = tensors[storage.input].detach()
            elif s not in host:  # one without a step has no elements
                host[s] = self.device.receive(buffers.get(s), storage.count if s in buffers else 0, storage.dtype)
            results.append(host[s].as_strided(shape, strides, host[s].storage_offset() + value.offset))
        return results


def _laid_out(t: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """As the trace says; some rules of torch for results without data differ from its kernels in that."""
    if all(n < 2 or a == b for n, a, b in zip(t.shape, t.stride(), strides, strict=True)):
        return t
    return torch.empty_strided(t.shape, strides, dtype=t.dtype).copy_(t)


def count(shape: Sequence[int]) -> int:
    """How many elements."""
    return math.prod(shape)


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of elements that lie one after the other, the last dimension fastest."""
    return tuple(itertools.accumulate(reversed([*shape[1:], 1]), lambda a, b: a * b))[::-1] if shape else ()


def unravel(index: str, shape: Sequence[int], name: str = "c") -> str:
    """C that turns a number of an element into its indices ``c0``, ``c1``, ...."""
    lines = []
    for d, step in enumerate(contiguous(shape)):
        quotient = index if step == 1 else f"{index} / {step}"
        lines.append(f"  const int {name}{d} = {quotient if d == 0 else f'{quotient} % {shape[d]}'};\n")
    return "".join(lines)
