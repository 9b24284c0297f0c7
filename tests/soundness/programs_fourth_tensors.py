"""Small programs of what tensors are beyond their values: layouts, aliases, views, what is written where."""

from __future__ import annotations

import types

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from tests.soundness.harness import Seen, program
from tests.soundness.programs_fourth_modules import rows
from tests.soundness.world import X, backward


def strides(*tensors):
    """What a copy of a tensor does not show."""
    return [(t.stride(), t.storage_offset(), t.is_contiguous()) for t in tensors]


# ---- metadata ----


@program("fourth: tensors")
def layouts_of_images():
    conv = nn.Conv2d(3, 2, 1)
    x = torch.arange(48.0).reshape(1, 3, 4, 4)
    out = yield lambda x: conv(x.clone()).relu(), x
    yield Seen(s=strides(out))
    out = yield x.to(memory_format=torch.channels_last)
    yield Seen(s=strides(out))
    conv.to(memory_format=torch.channels_last)
    out = yield x
    yield Seen(s=strides(out))
    out = yield x.expand(2, 3, 4, 4)
    yield Seen(s=strides(out))


@program("fourth: tensors")
def strides_decide_in_python():
    def f(x):
        if not x.is_contiguous():
            x = x.contiguous() * 10
        return x.view(-1), x.stride(), x.storage_offset()

    yield f, rows()
    yield rows().T
    yield rows(4)[1:]
    yield rows(3, 1).T
    yield rows()[:, ::2]
    yield torch.ones(1, 4).expand(3, 4)


@program("fourth: tensors")
def copies_that_keep_strides():
    def f(x):
        return (
            x.clone(),
            x + 1,
            torch.empty_like(x).zero_(),
            x.to(torch.float64),
            x.clone(memory_format=torch.contiguous_format),
        )

    out = yield f, rows()
    yield Seen(s=strides(*out))
    out = yield rows().T
    yield Seen(s=strides(*out))
    out = yield rows(4)[::2]
    yield Seen(s=strides(*out))
    out = yield torch.ones(4).expand(3, 4)
    yield Seen(s=strides(*out))


@program("fourth: tensors")
def to_that_may_copy_nothing():
    def f(x, dtype, copy):
        y = x.to(dtype, copy=copy)
        y.add_(1)
        return y, y is x

    x = X()
    yield f, x, torch.float32, False
    yield Seen(x=x)
    yield x, torch.float64, False
    yield Seen(x=x)
    yield x, torch.float32, True
    yield Seen(x=x)
    x = x.double()
    yield x, torch.float64, False
    yield Seen(x=x)


@program("fourth: tensors")
def reshape_that_is_a_view_or_a_copy():
    def f(x):
        y = x.reshape(-1)
        y += 1
        return y

    for x in (rows(), rows().T.contiguous(), rows().T, rows()[:, :2], rows().T):
        yield (f, x) if x.shape == (3, 4) and x.is_contiguous() else x
        yield Seen(x=x)


@program("fourth: tensors")
def contiguous_that_returns_itself():
    def f(x):
        y = x.contiguous()
        return y, y is x

    out = yield f, rows()
    out[0].zero_()
    x = rows().T
    out = yield x
    out[0].zero_()
    yield Seen(x=x)
    x = rows()
    out = yield x
    out[0].zero_()
    yield Seen(x=x)


@program("fourth: tensors")
def types_promoted_by_scalars_and_zero_dims():
    def f(a, b):
        return a * b, a + 1, torch.true_divide(a, 2), torch.result_type(a, b), torch.where(a > 0, a, b)

    yield f, torch.arange(4), torch.tensor(2.5)
    yield torch.arange(4), 2.5
    yield torch.arange(4), True
    yield torch.arange(4.0).bfloat16(), torch.tensor(2.0, dtype=torch.float64)
    yield torch.arange(4.0).bfloat16(), torch.ones(1, dtype=torch.float64)
    yield torch.tensor(3), 2.0
    yield torch.tensor([True, False]), torch.tensor(3, dtype=torch.uint8)
    yield 3, torch.tensor(2.0)


@program("fourth: tensors")
def empty_batches():
    norm = nn.LayerNorm(4)

    def f(x):
        return norm(x).sum(), x.sum(0), x.max() if x.numel() else None, torch.cat([x, x[:1]])

    yield f, rows()
    yield rows(0)
    yield rows(1)
    yield torch.zeros(2, 0, 4)
    out = yield rows(0, grad=True)
    backward(out)
    yield Seen(norm=norm)


@program("fourth: tensors")
def mean_of_nothing_and_of_one():
    def f(x):
        return x.mean(), x.std(), x.var(0, unbiased=x.shape[0] > 1), x.amax(1)

    yield f, rows()
    yield rows(1)
    yield rows(0)
    yield rows(2)
    yield rows(2, 0)


@program("fourth: tensors")
def complex_numbers_lazily_conjugated():
    def f(z):
        return z * 2, z.abs(), torch.view_as_real(z.resolve_conj()), z.is_conj()

    z = torch.tensor([1 + 2j, 3 - 1j])
    yield f, z
    yield z.conj()
    yield z.conj().resolve_conj()
    yield z.real.to(torch.complex64)


@program("fourth: tensors")
def imaginary_part_that_is_written():
    def f(z, r):
        z.imag.copy_(r)
        z.real[0] = 7.0
        return z.sum(), z.conj() * z

    z = torch.tensor([1 + 2j, 3 - 1j])
    yield f, z, torch.tensor([5.0, 6.0])
    yield Seen(z=z)
    yield z, torch.zeros(2)
    yield Seen(z=z)
    w = torch.tensor([[1 + 1j, 2j], [0j, 3]])
    yield w[:, 1], torch.ones(2)
    yield Seen(w=w)


@program("fourth: tensors")
def numbers_of_numpy_as_arguments():
    def f(x, s):
        return x * s + 1

    yield f, X(), np.float64(2.5)
    yield X(), np.float64(3.5)
    yield X(), np.float32(3.5)
    yield X(), np.int64(2)
    yield X(), 2
    yield torch.arange(3), np.float32(1.5)
    yield X(), np.bool_(True)


@program("fourth: tensors")
def one_tensor_twice_then_two():
    def f(a, b):
        a.mul_(2)
        b.add_(1)
        return a - b, a is b

    a, b = X(), X(1.0)
    yield f, a, b
    yield a, a
    yield Seen(a=a, b=b)
    yield a, a.view(4)
    yield Seen(a=a)
    yield b, a
    yield Seen(a=a, b=b)


@program("fourth: tensors")
def windows_that_overlap():
    def f(a, b):
        a.mul_(2)
        b.add_(a)
        return a.sum() + b.sum()

    base = torch.arange(8.0)
    yield f, base[:4].clone(), base[4:].clone()
    yield base[:4], base[4:]
    yield Seen(base=base)
    yield base[:4], base[2:6]
    yield Seen(base=base)
    yield base[::2], base[1::2]
    yield Seen(base=base)
    yield base[2:6], base[2:6]
    yield Seen(base=base)


@program("fourth: tensors")
def views_of_a_parameter_as_arguments():
    layer = nn.Linear(4, 4)

    def f(row, x):
        return layer(x) * row

    out = yield f, layer.weight[0], rows()
    backward(out)
    yield Seen(layer=layer)
    with torch.no_grad():
        layer.weight[0].fill_(2.0)
    out = yield layer.weight[0].detach(), rows()
    backward(out)
    yield Seen(layer=layer)
    out = yield layer.bias, rows()
    backward(out)
    yield Seen(layer=layer)


@program("fourth: tensors")
def parameter_as_an_argument_now_and_then():
    def f(x, w):
        return F.linear(x, w).sum(), w.requires_grad, w.is_leaf, isinstance(w, nn.Parameter)

    w = torch.ones(2, 4)
    p = nn.Parameter(torch.ones(2, 4))
    yield f, rows(), w
    out = yield rows(), p
    backward(out)
    yield Seen(p=p)
    yield rows(), p * 1
    yield rows(), p.data
    p.requires_grad_(False)
    yield rows(), p


class Tagged(torch.Tensor):
    """Results of operations on it say so."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(out, Tagged):
            out.tag = "seen"
        return out


@program("fourth: tensors")
def subclass_among_the_arguments():
    def f(x):
        y = x * 2 + 1
        return y, getattr(y, "tag", None)

    yield f, X()
    yield X().as_subclass(Tagged)
    yield X()
    yield nn.Parameter(X())


# ---- writes ----


@program("fourth: tensors")
def rows_scattered_into_a_cache():
    class Cache(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("keys", torch.zeros(6, 2))
            self.length = 0

        def forward(self, k, at):
            self.keys.index_copy_(0, at, k)
            self.length = max(self.length, int(at.max()) + 1)
            return self.keys[: self.length].sum(0), self.keys[: self.length]

    cache = Cache()
    out = yield cache, torch.ones(2, 2), torch.tensor([0, 1])
    kept = out[1]
    yield torch.ones(1, 2) * 2, torch.tensor([2])
    yield Seen(cache=cache, kept=kept)
    kept.fill_(9.0)
    yield torch.ones(1, 2) * 3, torch.tensor([3])
    cache.keys = torch.zeros(6, 2)
    cache.length = 0
    yield torch.ones(1, 2) * 4, torch.tensor([0])
    yield Seen(cache=cache, kept=kept)


@program("fourth: tensors")
def writes_with_masks_and_indices():
    def f(x, mask, index):
        x[mask] = 0.0
        x[index, 0] += 1
        x.index_put_((index, index), torch.tensor(5.0), accumulate=True)
        x.masked_fill_(~mask[:, None] if mask.dim() == 1 else ~mask, -1.0)
        return x.sum()

    x = rows(4)
    yield f, x, x > 0, torch.tensor([1, 3])
    yield Seen(x=x)
    yield x, x < 0, torch.tensor([1, 1])
    yield Seen(x=x)
    yield x, torch.tensor([True, False, True, False]), torch.tensor([0])
    yield Seen(x=x)
    yield x, torch.zeros(4, dtype=torch.bool), torch.tensor([], dtype=torch.long)
    yield Seen(x=x)


@program("fourth: tensors")
def results_written_into_given_memory():
    def f(a, b, out):
        torch.mul(a, b, out=out)
        torch.add(out, 1, out=out)
        return out

    out = torch.zeros(4)
    got = yield f, X(), X(1.0), out
    yield Seen(same=got is out, out=out)
    base = torch.zeros(2, 4)
    got = yield X(), X(2.0), base[1]
    yield Seen(base=base)
    a = X()
    got = yield a, X(2.0), a
    yield Seen(a=a)
    empty = torch.empty(0)
    got = yield X(), X(3.0), empty
    yield Seen(same=got is empty, empty=empty)
    got = yield X(), X(3.0), torch.zeros(4, dtype=torch.float64)
    got = yield X(), X(3.0), torch.zeros(4, dtype=torch.long)


@program("fourth: tensors")
def results_that_alias_and_are_written_afterwards():
    def f(x):
        y = x * 2
        return y, y[1:], y.view(2, 2), y.T

    out = yield f, X()
    out[1].zero_()
    yield Seen(out=out)
    out[2].add_(1)
    yield Seen(out=out)
    out = yield X(1.0)
    out[0].mul_(3)
    yield Seen(out=out)


@program("fourth: tensors")
def argument_given_back_or_a_view_of_it():
    def f(x, flip):
        return (x if not flip else x.flip(0)), x[None], x.unbind(), x.split(2)

    x = X()
    out = yield f, x, False
    yield Seen(same=out[0] is x)
    out[0].add_(1)
    out[2][1].fill_(50.0)
    yield Seen(x=x, out=out)
    out = yield x, True
    out[0].add_(1)
    out[3][0].zero_()
    yield Seen(x=x, out=out)


@program("fourth: tensors")
def constant_given_back_and_written():
    table = torch.arange(4.0)
    box = types.SimpleNamespace(bias=torch.ones(4))

    def f(x):
        return x + table, table, box.bias.view(2, 2), torch.zeros(4)

    out = yield f, X()
    out[1].add_(10)
    out[2].mul_(3)
    out[3].add_(1)
    out = yield X()
    yield Seen(table=table, bias=box.bias)
    box.bias = table
    out = yield X()
    out[2].zero_()
    yield X()


@program("fourth: tensors")
def data_written_and_swapped():
    p = nn.Parameter(torch.ones(4))

    def f(x, rate):
        p.data.sub_(rate * x)
        return p.detach() * 2

    yield f, X(), 0.1
    yield X(), 0.2
    yield Seen(p=p)
    p.data = torch.zeros(4)
    yield X(), 0.3
    yield Seen(p=p)
    q = p.data
    q.fill_(4.0)
    yield X(), 0.4
    yield Seen(p=p, q=q)


@program("fourth: tensors")
def data_assigned_inside():
    layer = nn.Linear(4, 2, bias=False)

    def f(x):
        layer.weight.data = layer.weight.data.clamp(-0.2, 0.2)
        return layer(x)

    yield f, rows()
    yield Seen(layer=layer)
    with torch.no_grad():
        layer.weight.add_(1)
    out = yield rows()
    backward(out)
    yield Seen(layer=layer)


@program("fourth: tensors")
def set_and_resized_between_calls():
    x = X()
    yield lambda x: (x * 2, x.shape, x.numel()), x
    x.resize_(2, 1)
    yield x
    x.set_(torch.arange(6.0).reshape(2, 3))
    yield x
    x.set_(torch.arange(6.0).untyped_storage(), 1, (2,), (3,))
    yield x
    x.unsqueeze_(0).t_()
    yield x


@program("fourth: tensors")
def in_place_changes_of_shape_inside():
    def f(x):
        y = x.clone()
        y.unsqueeze_(0)
        y.t_()
        z = x.squeeze_() if x.dim() > 1 else x
        return y * 2, z

    yield f, X()
    x = rows(1)
    yield X(1.0)
    yield x
    yield Seen(shape=x.shape)
    yield rows(1, 1)


@program("fourth: tensors")
def writes_through_chains_of_views():
    def f(x):
        h = x.view(2, 2).T
        h[0].mul_(10)
        h.diagonal().add_(1)
        x.narrow(0, 1, 2).neg_()
        return h, x * 1

    x = X()
    out = yield f, x
    yield Seen(x=x, out=out)
    out[0].zero_()
    yield Seen(x=x)
    base = torch.arange(8.0)
    yield base[::2]
    yield Seen(base=base)
    y = X(grad=True)
    out = yield y * 1
    backward(out)
    yield Seen(y=y)


@program("fourth: tensors")
def expanded_memory_written():
    def f(x, y):
        y = y + 0 if y.stride(0) == 0 else y
        y += x
        return y

    yield f, X(), X()
    y = torch.ones(1).expand(4)
    yield X(), y
    yield Seen(y=y)
    yield X(), y.contiguous()


@program("fourth: tensors")
def written_through_expand_raises_as_eager():
    def f(x, y):
        return y.add_(x)

    yield f, X(), X()
    y = torch.ones(1).expand(4)
    yield X(), y
    yield Seen(y=y)
    yield X(), torch.ones(1)
    yield X(), torch.ones(4, dtype=torch.long)
    yield X(), torch.ones(2, 4)


@program("fourth: tensors")
def gradients_with_strides_of_their_own():
    w = rows(3, 4, grad=True)

    def f(x):
        return (w.T @ x).T

    out = yield f, rows(3, 2)
    out.backward(torch.ones(4, 2).T.contiguous())
    yield Seen(w=w)
    out = yield rows(3, 2)
    out.backward(torch.arange(8.0).reshape(4, 2).T)
    yield Seen(w=w)
    out = yield rows(3, 2)
    out.backward(torch.ones(1).expand(2, 4))
    yield Seen(w=w)


@program("fourth: tensors")
def gradient_that_is_read_inside():
    w = X(grad=True)

    def f(x):
        g = w.grad
        return x if g is None else x - 0.1 * g

    yield f, X()
    (w * 2).sum().backward()
    yield X()
    w.grad.mul_(3)
    yield X()
    w.grad = torch.ones(4)
    yield X()
    w.grad = None
    yield X()


@program("fourth: tensors")
def zero_dimensional_tensors_as_numbers():
    scale = torch.tensor(2.0)
    step = torch.tensor(0)

    def f(x, n):
        step.add_(1)
        return x * scale + n, x[: int(n)], step + 0

    yield f, X(), torch.tensor(2)
    scale.fill_(3.0)
    yield X(), torch.tensor(3)
    yield X(), 1
    scale = torch.tensor(4.0, dtype=torch.float64)
    yield X(), torch.tensor(2)
    scale = 5
    yield X(), torch.tensor(2)
    yield Seen(step=step)


@program("fourth: tensors")
def attribute_of_a_tensor_set_between_calls():
    w = torch.ones(4)

    def f(x):
        return x * getattr(w, "factor", 1.0) + w

    yield f, X()
    w.factor = 3.0
    yield X()
    w.factor = 4.0
    yield X()
    del w.factor
    yield X()
