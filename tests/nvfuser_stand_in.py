"""What thunder uses of nvFuser's front end, by torch's operations: strict about ranks and dtypes, as nvFuser is."""

from __future__ import annotations

import operator
from types import SimpleNamespace

import torch


class DataType:
    Half, BFloat16, Float, Double = torch.float16, torch.bfloat16, torch.float32, torch.float64
    Int32, Int, Bool, Null = torch.int32, torch.int64, torch.bool, None


def _alike(*operands):
    """Tensors of equal rank and dtype, sizes equal or one; numbers go with any."""
    tensors = [x for x in operands if isinstance(x, torch.Tensor) and x.ndim]
    assert len({x.ndim for x in tensors}) <= 1, [x.shape for x in tensors]
    assert len({x.dtype for x in tensors}) <= 1, [x.dtype for x in tensors]


def _binary(function):
    def run(a, b):
        _alike(a, b)
        assert not {torch.float16, torch.bfloat16} & {getattr(x, "dtype", None) for x in (a, b)}
        return function(*(x if isinstance(x, torch.Tensor) else torch.tensor(x) for x in (a, b)))

    return run


def _where(condition, x, y):
    assert condition.dtype == torch.bool
    _alike(x, y)
    dtype = next(t.dtype for t in (x, y) if isinstance(t, torch.Tensor))
    return torch.where(condition, *(t if isinstance(t, torch.Tensor) else torch.tensor(t, dtype=dtype) for t in (x, y)))


def _broadcast(x, is_broadcast_dim):
    assert is_broadcast_dim.count(False) == x.ndim
    for d, flag in enumerate(is_broadcast_dim):
        x = x.unsqueeze(d) if flag else x
    return x


def _var_mean(x, dims, correction, keepdim):
    return torch.var_mean(x, dims, correction=correction, keepdim=keepdim)


def _var(x, dims, correction, keepdim):
    return torch.var(x, dims, correction=correction, keepdim=keepdim)


def _slice(x, start_indices, end_indices):
    return x[tuple(slice(a, b) for a, b in zip(start_indices, end_indices, strict=True))]


class Ops:
    add, sub, mul, div = (_binary(f) for f in (torch.add, torch.sub, torch.mul, torch.div))
    pow, maximum, minimum = (_binary(f) for f in (torch.pow, torch.maximum, torch.minimum))
    eq, ne, lt, le, gt, ge = (_binary(getattr(operator, n)) for n in ("eq", "ne", "lt", "le", "gt", "ge"))
    logical_and, bitwise_and = _binary(torch.logical_and), _binary(torch.bitwise_and)
    where, broadcast, var_mean, var, slice = map(staticmethod, (_where, _broadcast, _var_mean, _var, _slice))

    @staticmethod
    def cast(x, dtype):
        return x.to(dtype)

    @staticmethod
    def sum(x, dims, keepdim, dtype):
        return x.sum(dims, keepdim)

    @staticmethod
    def max(x, dims, keepdim, dtype):
        return x.amax(dims, keepdim)

    @staticmethod
    def reshape(x, new_shape):
        return x.reshape(new_shape)

    @staticmethod
    def expand(x, shape):
        assert len(shape) == x.ndim
        return x.expand(shape)

    @staticmethod
    def permute(x, dims):
        return x.permute(dims)

    @staticmethod
    def stride_order(x, stride_order):
        slowest = sorted(range(x.ndim), key=lambda d: -stride_order[d])
        back = [slowest.index(d) for d in range(x.ndim)]
        return x.permute(slowest).contiguous().permute(back)

    @staticmethod
    def squeeze(x, dims):
        assert all(x.shape[d] == 1 for d in dims)
        return x.squeeze(dims)

    @staticmethod
    def cat(parts, dim):
        return torch.cat(parts, dim)

    @staticmethod
    def gather(x, index, dim):
        return torch.gather(x, dim, index)

    @staticmethod
    def iota(length, start, step, dtype):
        return torch.arange(start, start + length * step, step, dtype=dtype)

    @staticmethod
    def full(shape, fill_value, dtype):
        return torch.full(shape, fill_value, dtype=dtype)


class Val:
    """A value that is computed when the fusion runs."""

    def __init__(self, function, args=(), kwargs=None):
        self.function, self.args, self.kwargs = function, args, kwargs or {}

    def compute(self, known):
        if self not in known:
            args = [_compute(a, known) for a in self.args]
            known[self] = self.function(*args, **{k: _compute(v, known) for k, v in self.kwargs.items()})
        return known[self]


def _compute(x, known):
    if isinstance(x, list):
        return [_compute(y, known) for y in x]
    return x.compute(known) if isinstance(x, Val) else x


def _operation(name):
    def unary(x):
        assert x.dtype not in (torch.float16, torch.bfloat16)
        return getattr(torch, name)(x)

    return getattr(Ops, name, unary)


class _Lazy:
    def __getattr__(self, name):
        def call(*args, **kwargs):
            value = Val(_operation(name), args, kwargs)
            if name == "var_mean":
                return tuple(Val(operator.itemgetter(i), (value,)) for i in range(2))
            return value

        return call


class FusionDefinition:
    """nvFuser's, with values in place of kernels."""

    def __init__(self):
        self.ops = _Lazy()
        self.inputs, self.outputs, self.shapes = [], [], []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def define_tensor(self, sizes, strides, dtype, static_sizes, is_cpu):
        self.inputs.append(Val(None))
        self.shapes.append((tuple(sizes), tuple(strides), dtype))
        return self.inputs[-1]

    def define_scalar(self, value, dtype):
        return Val(lambda: value)

    def add_output(self, value):
        self.outputs.append(value)

    def execute(self, tensors):
        assert [(tuple(t.shape), t.stride(), t.dtype) for t in tensors] == self.shapes
        known = dict(zip(self.inputs, tensors, strict=True))
        return [o.compute(known) for o in self.outputs]


front_end = SimpleNamespace(FusionDefinition=FusionDefinition, DataType=DataType)
