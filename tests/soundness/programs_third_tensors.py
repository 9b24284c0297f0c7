"""Metadata and aliasing of tensors, writes in place, random numbers."""

from __future__ import annotations

import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tests.soundness.harness import Seen, program

META = "third: metadata"
WRITES = "third: writes and views"
RANDOM = "third: random"

X = torch.linspace(-2, 2, 12).reshape(3, 4)


def about(t):
    return [*t.shape, *t.stride(), t.storage_offset(), t.is_contiguous()]


@program(META)
def strides_reported_of_many_layouts():
    def f(v):
        a, b = v.mT, v.reshape(-1)
        return about(a), about(v + 1), about(v.contiguous()), about(torch.empty_like(v)), b + 1, v.is_contiguous()

    yield f, X
    yield X.t()
    yield X[:, ::2]
    yield X[1:]
    yield X[:1].expand(5, 4)
    yield torch.zeros(0, 4)
    yield torch.as_strided(X, (2, 2), (1, 1))


@program(META)
def channels_last_images():
    conv = nn.Conv2d(3, 4, 3)

    def f(v):
        out = conv(v).relu()
        return out, out.is_contiguous(memory_format=torch.channels_last), (out * 2).stride()

    img = torch.randn(2, 3, 6, 6)
    yield f, img
    yield img.to(memory_format=torch.channels_last)
    conv.to(memory_format=torch.channels_last)
    yield img
    yield img[:, :, ::2, ::2]


@program(META)
def views_of_one_base_as_inputs():
    def f(a, b):
        a.mul_(2)
        return a + b

    base = X.clone()
    yield f, base[:2], base[1:]
    yield Seen(b=base)
    yield base[0], base[1]
    yield Seen(b=base)
    yield base[:, 0], base[0, :3]
    yield Seen(b=base)
    yield base, base
    yield Seen(b=base)
    yield base[0], X[0]
    yield Seen(b=base)


@program(META)
def an_expanded_input_written_to():
    def f(v):
        v.add_(1)
        return v.sum()

    a = torch.zeros(1, 4)
    yield f, a
    yield a.expand(1, 4)
    yield a.expand(3, 4)  # an error: one location several times
    yield Seen(a=a)
    yield a[0]
    yield Seen(a=a)


@program(META)
def gradients_of_some_inputs():
    def f(a, b):
        out = a * b + a.detach()
        return out, out.requires_grad, a.requires_grad

    p, q = X.clone().requires_grad_(), (X + 1).requires_grad_()
    out = yield f, p, q
    out[0].sum().backward()
    out = yield p, q.detach()
    out[0].sum().backward()
    yield Seen(p=p, q=q)
    out = yield p.detach(), q
    out[0].sum().backward()
    yield Seen(p=p, q=q)
    yield p.detach(), q.detach()
    out = yield p, p
    out[0].sum().backward()
    yield Seen(p=p, q=q)


@program(META)
def leaf_and_non_leaf_inputs_with_retained_grad():
    def f(a):
        h = a * 2
        h.retain_grad() if h.requires_grad else None
        return h, h.sin().sum(), a.is_leaf

    p = X.clone().requires_grad_()
    h, loss, _ = yield f, p
    loss.backward()
    yield Seen(p=p, g=h.grad)
    m = p * 3
    m.retain_grad()
    h, loss, _ = yield m
    loss.backward()
    yield Seen(p=p, m=m.grad, g=h.grad)
    yield X


@program(META)
def zero_dim_and_zero_size():
    def f(v):
        return v.sum(), v.mean() if v.numel() else v.sum(), v * torch.tensor(2.5), v.dim(), len(v.shape)

    yield f, torch.tensor(3)
    yield torch.tensor(3.0)
    yield torch.zeros(0)
    yield torch.zeros(2, 0, 3)
    yield torch.zeros(0, dtype=torch.int32)


@program(META)
def signed_zero_nan_inf_as_arguments():
    def f(v, k):
        return v * k, torch.copysign(v, torch.tensor(k)), k == k, 1.0 if k > 0 else -1.0

    yield f, X, 0.0
    yield X, -0.0
    yield X, float("nan")
    yield X, float("inf")
    yield X, -float("inf")
    yield X, 0.0


@program(META)
def bool_int_float_arguments_that_are_equal():
    def f(v, k):
        return v + k, isinstance(k, bool), type(k).__name__, v[k] if not isinstance(k, float) else v

    v = torch.arange(6).reshape(2, 3)
    yield f, v, 1
    yield v, True
    yield v, 1.0
    yield v, 1 + 0j
    yield v, 1


@program(META)
def large_integers():
    def f(v, n):
        return v + n, n * 3, n // 7, v * (n % 1000)

    v = torch.arange(3)
    yield f, v, 2**40
    yield v, 2**62
    yield v, -(2**63)
    yield v, 2**64
    yield v, 5


@program(META)
def numpy_scalars_and_arrays():
    def f(v, k):
        return v * k, type(k).__name__

    yield f, X, np.float32(0.1)
    yield X, np.float64(0.1)
    yield X, np.int64(3)
    yield X, np.bool_(True)
    yield X.long(), np.float32(0.5)
    yield X, np.ones(4, dtype=np.float32)
    yield X, 0.1


@program(META)
def a_numpy_array_shared_with_a_tensor():
    a = np.zeros((3, 4), dtype=np.float32)
    t = torch.from_numpy(a)

    def f(v):
        t.add_(v)
        return t * 2, float(a[0, 0])

    yield f, X
    a[0, 0] = 100.0
    yield X
    yield Seen(t=t, a=a.tolist())
    a[:] = 0
    yield X
    yield Seen(t=t, a=a.tolist())


LOG: list = []


class Logged(torch.Tensor):
    """Notes what is computed."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ in ("sin", "add", "mul"):
            LOG.append(func.__name__)
        return super().__torch_function__(func, types, args, kwargs or {})


@program(META)
def a_subclass_that_logs():
    log = LOG
    log.clear()

    def f(v):
        return v.sin() + 1

    yield f, X
    yield X.as_subclass(Logged)
    yield Seen(log=log)
    yield X.as_subclass(Logged)
    yield Seen(log=log)
    yield X


@program(META)
def a_parameter_as_argument():
    def f(p):
        return p * 2, isinstance(p, nn.Parameter), type(p.data).__name__, type(p + 0).__name__

    p = nn.Parameter(X.clone())
    out = yield f, p
    out[0].sum().backward()
    yield Seen(p=p)
    yield X
    yield nn.Parameter(X, requires_grad=False)
    yield p.detach()


@program(META)
def the_default_dtype_changed():
    def f(v):
        return torch.ones(2) + 1.5, torch.tensor(0.5), v.to(torch.get_default_dtype()), v.long() / 2

    yield f, X
    torch.set_default_dtype(torch.float64)
    try:
        yield X
    finally:
        torch.set_default_dtype(torch.float32)
    yield X


@program(META)
def attributes_put_on_tensors():
    def f(v):
        v.tag = getattr(v, "tag", 0) + 1
        out = v * v.tag
        out.source = "f"
        return out, v.tag, out.source

    a = X.clone()
    yield f, a
    yield a
    yield Seen(tag=a.tag)
    a.tag = 10
    yield a
    yield X.clone()


@program(META)
def the_version_counter_and_identity():
    def f(v):
        before = v._version
        w = v.view(-1)
        w[0] = 1
        return v._version - before, v.add_(0) is v, w.data_ptr() == v.data_ptr(), w._base is v

    yield f, X.clone()
    yield X.clone()
    yield X.clone()[1:]
    yield X.double()


@program(META)
def shapes_used_as_numbers():
    def f(v):
        n, m = v.shape
        return v / n, v.view(m, n), torch.full((n,), m), [v[i].sum() for i in range(n)], f"{n}x{m}"

    yield f, X
    yield torch.ones(5, 2)
    yield torch.ones(1, 1)
    yield torch.ones(0, 3)
    yield torch.ones(7, 2)
    yield torch.ones(2)


# Writes.


@program(WRITES)
def results_written_with_out():
    buf = torch.empty(3, 4)

    def f(v, out):
        torch.mul(v, 2, out=out)
        torch.add(out, 1, out=buf)
        return out is v, buf.sum()

    o = torch.empty(3, 4)
    yield f, X, o
    yield Seen(o=o, b=buf)
    yield X, buf
    yield Seen(o=o, b=buf)
    t = X.clone()
    yield t, t
    yield Seen(t=t, b=buf)
    e = torch.empty(0)
    yield X, e
    yield Seen(e=e, b=buf)


@program(WRITES)
def scatter_and_index_put():
    def f(v, i, w):
        v.index_put_((i,), w, accumulate=True)
        v.scatter_(0, i[None, :], w[:1])
        v.masked_fill_(v > 4, 0)
        v[i] = v[i] * 2
        return v.sum(0)

    a = X.clone()
    i = torch.tensor([0, 2, 0, 1])
    yield f, a, i, torch.ones(4, 4)
    yield Seen(a=a)
    yield a, torch.tensor([1, 1, 1, 1]), torch.full((4, 4), 3.0)
    yield Seen(a=a)
    yield a, torch.tensor([1, 1, 1, 9]), torch.full((4, 4), 3.0)
    yield a.double(), i, torch.ones(4, 4).double()


@program(WRITES)
def a_write_through_detach():
    def f(v):
        d = v.detach()
        d.mul_(2)
        v.data[0] = 0
        return v * 1

    p = X.clone().requires_grad_()
    out = yield f, p
    out.sum().backward()
    yield Seen(p=p)
    yield p
    yield Seen(p=p)
    q = X.clone()
    yield q
    yield Seen(q=q)


@program(WRITES)
def views_of_a_parameter_written_without_grad():
    lin = nn.Linear(4, 3)

    def f(v):
        with torch.no_grad():
            lin.weight[0].zero_()
            lin.weight[:, 1] += 1
            lin.bias.view(-1)[0] = 7
        return lin(v)

    out = yield f, X
    out.sum().backward()
    yield Seen(lin=lin)
    with torch.no_grad():
        lin.weight.fill_(1)
    out = yield X
    out.square().sum().backward()
    yield Seen(lin=lin)
    lin.weight = nn.Parameter(torch.ones(3, 4).t().contiguous().t())
    yield X
    yield Seen(w=lin.weight)


@program(WRITES)
def a_leaf_written_in_place_is_an_error():
    def f(v):
        return v.mul_(2)

    p = X.clone().requires_grad_()
    yield f, p
    yield Seen(p=p)
    with torch.no_grad():
        yield p
    yield Seen(p=p)
    yield X.clone()
    yield p[0]


@program(WRITES)
def an_input_returned_and_a_view_of_it():
    def f(v):
        return v, v[0], v.view(-1), v.t()

    a = X.clone()
    out = yield f, a
    out[1].zero_()
    out[3][0, 1] = 9
    yield Seen(a=a, same=out[0] is a, base=out[2]._base is a)
    out = yield a
    out[2].add_(1)
    yield Seen(a=a, same=out[0] is a)
    p = X.clone().requires_grad_()
    out = yield p
    (out[1].sum() + out[2].sum()).backward()
    yield Seen(p=p)


@program(WRITES)
def results_that_share_memory_with_each_other():
    def f(v):
        a = v * 2
        b = a[1:]
        c = a.detach()
        return a, b, c, a

    out = yield f, X
    out[1].zero_()
    yield Seen(out=out, same=out[0] is out[3])
    out = yield X
    out[2].fill_(3)
    yield Seen(out=out)
    p = X.clone().requires_grad_()
    out = yield p
    out[1].sum().backward()
    yield Seen(p=p, v=out[1]._is_view())


@program(WRITES)
def a_write_between_forward_and_backward():
    w = X.clone()

    def f(v):
        return (v * w).sin()

    p = X.clone().requires_grad_()
    out = yield f, p
    w.add_(1)
    error = ""
    try:
        out.sum().backward()
    except RuntimeError as e:
        error = type(e).__name__
    yield Seen(p=p, told=error)
    out = yield p
    out.sum().backward()
    yield Seen(p=p)


@program(WRITES)
def in_place_activations_on_an_intermediate():
    def f(v):
        h = v * 2
        y = h.view(-1)
        y[::2].clamp_(max=1)
        h = h * 1
        h += y.view(3, 4)
        return h, y

    p = X.clone().requires_grad_()
    out = yield f, p
    (out[0].sum() + (out[1] ** 2).sum()).backward()
    yield Seen(p=p)
    yield X
    out = yield p
    out[0].sum().backward()
    yield Seen(p=p)


@program(WRITES)
def set_and_resize_of_an_input():
    def f(v):
        v.resize_(2, 2)
        return v.sum()

    a = torch.arange(6.0)
    yield f, a
    yield Seen(a=a)
    yield a
    yield torch.arange(4.0)
    b = torch.arange(8.0)
    yield b
    yield Seen(b=b)


@program(WRITES)
def a_swap_through_data_inside():
    a, b = X.clone(), X + 1

    def f(v):
        a.data, b.data = b.data, a.data
        return a * v, b

    yield f, X
    yield Seen(a=a, b=b)
    yield X
    yield Seen(a=a, b=b)
    a.data = torch.ones(4)
    yield X
    yield Seen(a=a, b=b)


@program(WRITES)
def transposes_and_swaps_in_place():
    def f(v):
        v.t_()
        v.unsqueeze_(0)
        return v.shape, v * 2

    a = X.clone()
    yield f, a
    yield Seen(s=tuple(a.shape), a=a)
    b = X.clone()
    yield b
    yield b.squeeze(0)
    yield Seen(s=tuple(b.shape), a=b)
    yield b


@program(WRITES)
def copy_between_overlapping_parts():
    def f(v):
        v[1:] = v[:-1].clone()
        v[:, 0].copy_(v[:, 3])
        v[0], v[1] = v[1], v[0]
        return v.cumsum(0)

    a = X.clone()
    yield f, a
    yield Seen(a=a)
    yield a
    yield Seen(a=a)
    yield a.t()[:3]
    yield Seen(a=a)


@program(WRITES)
def gradients_accumulated_by_hand_in_grad():
    w = X.clone().requires_grad_()

    def f(v):
        loss = (v * w).square().sum()
        loss.backward()
        with torch.no_grad():
            w.sub_(0.1 * w.grad)
            if w.grad.norm() > 5:
                w.grad = None
            else:
                w.grad.zero_()
        return loss

    yield f, X
    yield Seen(w=w)
    yield X
    yield Seen(w=w)
    w.grad = torch.ones(3, 4)
    yield X
    yield Seen(w=w)
    w.grad = None
    yield X * 0.1
    yield Seen(w=w)


# Random numbers.


@program(RANDOM)
def dropout_seeded_again_and_switched():
    drop = nn.Dropout(0.5)

    def f(v):
        return drop(v), F.dropout(v, 0.3, drop.training)

    yield f, X
    yield X
    torch.manual_seed(0)
    yield X
    drop.p = 0.1
    yield X
    drop.eval()
    yield X
    yield Seen(state=torch.get_rng_state())
    drop.train()
    yield X
    yield Seen(r=torch.rand(3))


@program(RANDOM)
def a_generator_argument():
    g = torch.Generator().manual_seed(3)

    def f(v, gen):
        return v + torch.rand(v.shape, generator=gen), torch.randperm(4, generator=gen)

    yield f, X, g
    yield X, g
    g.manual_seed(3)
    yield X, g
    yield X, None
    yield X, torch.Generator().manual_seed(9)
    yield Seen(r=torch.rand(3), s=g.get_state())


@program(RANDOM)
def seeded_inside():
    def f(v, seed):
        torch.manual_seed(seed)
        return v * torch.randn_like(v), torch.initial_seed()

    yield f, X, 0
    yield X, 1
    yield Seen(r=torch.rand(3))
    yield X, 0
    yield Seen(r=torch.rand(3))


@program(RANDOM)
def fork_rng_inside():
    def f(v):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            a = torch.rand(4)
        return v + a, torch.rand(2)

    yield f, X
    yield X
    yield Seen(r=torch.rand(3))
    torch.manual_seed(1)
    yield X
    yield Seen(r=torch.rand(3))


@program(RANDOM)
def multinomial_sampling_of_logits():
    def f(v, temperature):
        if temperature == 0:
            return v.argmax(-1)
        return torch.multinomial((v / temperature).softmax(-1), 1)

    yield f, X, 1.0
    yield X, 0.5
    yield X, 0
    yield X, 1.0
    yield Seen(r=torch.rand(3))


@program(RANDOM)
def python_random_decides_the_layers():
    layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(4)])

    def f(v):
        for layer in layers:
            if random.random() > 0.5:
                v = layer(v)
        return v

    random.seed(0)
    yield f, X
    yield X
    yield X
    yield X
    yield Seen(r=random.random())
    random.seed(0)
    out = yield X
    if out.requires_grad:
        out.sum().backward()
    yield Seen(layers=layers)


@program(RANDOM)
def numpy_random_noise():
    rng = np.random.default_rng(0)

    def f(v):
        return v + torch.as_tensor(rng.normal(size=4), dtype=torch.float32) * np.random.rand()

    np.random.seed(0)
    yield f, X
    yield X
    yield Seen(r=np.random.rand())
    np.random.seed(0)
    yield X
    yield Seen(r=[rng.random(), np.random.rand()])


@program(RANDOM)
def uniform_bernoulli_and_normal_in_place():
    noise = torch.empty(3, 4)

    def f(v):
        noise.uniform_(-1, 1)
        mask = torch.bernoulli(torch.full_like(v, 0.5))
        return v * mask + noise.clone().normal_(), torch.randint(0, 10, (3,))

    yield f, X
    yield X
    yield Seen(n=noise, r=torch.rand(2))
    yield X.double()
    yield Seen(n=noise, r=torch.rand(2))


@program(RANDOM)
def mixup_with_a_beta_distribution():
    dist = torch.distributions.Beta(0.5, 0.5)

    def f(v):
        lam = dist.sample()
        perm = torch.randperm(v.shape[0])
        return lam * v + (1 - lam) * v[perm], perm

    yield f, X
    yield X
    dist = torch.distributions.Beta(5.0, 1.0)
    yield X
    yield Seen(r=torch.rand(2))


@program(RANDOM)
def reparametrised_samples_with_gradients():
    lin = nn.Linear(4, 4)

    def f(v):
        mu, log = lin(v).chunk(2, -1)
        q = torch.distributions.Normal(mu, log.exp())
        z = q.rsample()
        kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(torch.zeros(2), torch.ones(2)))
        return z.square().sum() + kl.mean()

    out = yield f, X
    out.backward()
    yield Seen(lin=lin)
    out = yield X
    out.backward()
    yield Seen(lin=lin)
    yield X * float("nan")
    yield Seen(r=torch.rand(2))


@program(RANDOM)
def the_rng_state_restored_inside():
    def f(v):
        state = torch.get_rng_state()
        a = torch.rand(2)
        torch.set_rng_state(state)
        return v[0, :2] + a, torch.rand(2)

    yield f, X
    yield X
    yield Seen(r=torch.rand(2))
    torch.manual_seed(11)
    yield X
    yield Seen(r=torch.rand(2))


@program(RANDOM)
def rrelu_gumbel_and_attention_dropout():
    def f(q, train):
        a = F.rrelu(q, training=train)
        b = F.gumbel_softmax(q, hard=True)
        c = F.scaled_dot_product_attention(q[None], q[None], q[None], dropout_p=0.2 if train else 0.0)
        return a + b + c[0]

    p = X.clone().requires_grad_()
    out = yield f, p, True
    out.sum().backward()
    yield Seen(p=p, r=torch.rand(2))
    yield p, False
    yield p, True
    yield Seen(r=torch.rand(2))
