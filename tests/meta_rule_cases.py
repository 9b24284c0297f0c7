"""Calls that op_db has no sample of: operators and properties, indexing, casts, factories, attention, views.

Each case is a function of no arguments; `cases(device)` makes them all, with the same seed each time.
"""

import itertools
import random

import torch
import torch.nn.functional as F

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.bool,
    torch.int16,
    torch.int8,
    torch.uint8,
]
LAYOUTS = [
    lambda x: x,
    lambda x: x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() > 1 else x,
    lambda x: torch.stack([x, x], -1)[..., 1] if x.dim() else x,
    lambda x: x[:1].expand_as(x) if x.dim() else x,
    lambda x: torch.cat([x.reshape(-1), x.reshape(-1)])[x.numel() :].view(x.shape),
    lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1) if x.dim() > 2 else x,
]


ZERO = [0] if torch.__version__ >= "2.13" else []  # before, an integer division by 0 may end the process


def make(device, *shape, dtype=torch.float32, layout=0):
    with torch._C.DisableTorchFunction():  # not a call to be judged
        x = torch.arange(torch.Size(shape).numel(), device=device).reshape(shape) % 7 + 1  # no zero: it would divide
        return LAYOUTS[layout](x.to(dtype))


def arithmetic(device):
    """Operators between every pair of dtypes, with and without dimensions, and with Python numbers."""
    binary = [
        lambda x, y: x + y,
        lambda x, y: x - y,
        lambda x, y: x * y,
        lambda x, y: x / y,
        lambda x, y: x // y,
        lambda x, y: x % y,
        lambda x, y: x**y,
        lambda x, y: x < y,
        lambda x, y: x == y,
        lambda x, y: x & y,
        lambda x, y: x | y,
        lambda x, y: x << y,
        lambda x, y: x >> y,
        torch.maximum,
        torch.logical_xor,
        torch.rsub,
        lambda x, y: torch.where(x > 2, x, y),
        lambda x, y: torch.add(x, y, alpha=2),
        lambda x, y: torch.sub(x, y, alpha=2.0),
        lambda x, y: torch.div(x, y, rounding_mode="floor"),
        lambda x, y: torch.clamp(x, y),
        lambda x, y: torch.masked_fill(x, x > 1, y),
    ]
    in_place = [
        lambda x, y: x.add_(y),
        lambda x, y: x.sub_(y),
        lambda x, y: x.mul_(y),
        lambda x, y: x.div_(y),
        lambda x, y: x.floor_divide_(y),
        lambda x, y: x.pow_(y),
        lambda x, y: x.__iand__(y),
        lambda x, y: x.masked_fill_(x > 1, y),
        lambda x, y: x.clamp_(max=y),
        lambda x, y: x.bitwise_or_(y),
        lambda x, y: x.__ilshift__(y),
        lambda x, y: x.__irshift__(y),
        lambda x, y: x.logical_and_(y),
        lambda x, y: x.fill_(y),
    ]
    numbers = [2, *ZERO, -1, 2.5, True, 300, 1e30, float("inf")]
    for one, other in itertools.product(DTYPES, DTYPES):
        for op in binary + in_place:
            yield lambda op=op, a=one, b=other: op(make(device, 2, 3, dtype=a), make(device, 2, 3, dtype=b))
            yield lambda op=op, a=one, b=other: op(make(device, 2, 3, dtype=a), make(device, dtype=b))
            yield lambda op=op, a=one, b=other: op(make(device, dtype=a), make(device, 3, dtype=b))
    for dtype, number, op in itertools.product(DTYPES, numbers, binary + in_place):
        yield lambda op=op, a=dtype, b=number: op(make(device, 2, 3, dtype=a), b)
        yield lambda op=op, a=dtype, b=number: op(make(device, dtype=a), b)
        yield lambda op=op, a=dtype, b=number: op(b, make(device, 2, 3, dtype=a))


def unary(device, dtypes):
    ops = [
        lambda x: -x,
        lambda x: +x,
        lambda x: 2 / x,
        lambda x: 2.5 / x,
        lambda x: 2 // x,
        lambda x: 2 % x,
        lambda x: 2**x,
        lambda x: 2.5**x,
        lambda x: torch.pow(2, x),
        lambda x: x.zero_(),
        lambda x: F.glu(x),
        lambda x: F.glu(x, 0),
        lambda x: ~x,
        abs,
        torch.exp,
        torch.rsqrt,
        torch.sign,
        torch.square,
        torch.floor,
        torch.isnan,
        torch.logical_not,
        F.relu,
        torch.relu,
        torch.selu,
        torch.rand_like,
        F.gelu,
        F.silu,
        F.relu6,
        F.hardtanh,
        F.softplus,
        F.logsigmoid,
        torch.sigmoid,
        lambda x: F.gelu(x, approximate="tanh"),
        lambda x: F.gelu(x, approximate="other"),
        lambda x: F.relu(x, inplace=True),
        lambda x: x.relu_(),
        lambda x: x.exp_(),
        lambda x: x.abs_(),
        lambda x: F.dropout(x, 0.5, False),
        lambda x: F.dropout(x, 0.0, True),
        lambda x: F.dropout(x, 0.5, True),
        lambda x: F.dropout(x, 1.0, True),
        lambda x: F.dropout(x, 2.0, True),
        lambda x: torch.dropout(x, 0.5, False),
        lambda x: torch.clamp(x, 0.5),
        lambda x: torch.clamp(x, 1, 2),
        lambda x: x.clamp(max=2),
        lambda x: x.clamp_(min=1),
        lambda x: x.sum(),
        lambda x: x.mean(),
        lambda x: x.max(),
        lambda x: x.min(),
        lambda x: x.argmax(),
        lambda x: x.any(),
        lambda x: x.sum(dtype=torch.float32),
        lambda x: x.var(),
        lambda x: x.cumsum(0),
        lambda x: x.softmax(-1),
        lambda x: x.softmax(-1, dtype=torch.float32),
        lambda x: F.softmax(x, dim=-1, dtype=torch.float32),
        lambda x: x.clone(),
        lambda x: x.detach(),
        lambda x: x.data,
        lambda x: torch.zeros_like(x),
        lambda x: torch.full_like(x, 2.5),
        lambda x: torch.ones_like(x, dtype=torch.float16),
        lambda x: torch.randn_like(x),
    ]
    shapes = [(), (3,), (2, 3), (2, 3, 4), (2, 3, 4, 5), (0, 3)]
    for op, dtype, shape, layout in itertools.product(ops, dtypes, shapes, range(len(LAYOUTS))):
        yield lambda op=op, d=dtype, s=shape, lay=layout: op(make(device, *s, dtype=d, layout=lay))


def casts(device):
    names = ["float", "half", "bfloat16", "double", "int", "long", "short", "char", "byte", "bool"]
    for dtype, layout in itertools.product(DTYPES, range(len(LAYOUTS))):

        def x(d=dtype, lay=layout):
            return make(device, 2, 3, 4, 5, dtype=d, layout=lay)

        for name in names:
            yield lambda x=x, name=name: getattr(x(), name)()
        for target in DTYPES:
            yield lambda x=x, t=target: x().to(t)
            yield lambda x=x, t=target: x().to(dtype=t)
            yield lambda x=x, t=target: x().to("cpu", t)
            yield lambda x=x, t=target: x().type(t)
            yield lambda x=x, t=target: x().type_as(make(device, dtype=t))
            yield lambda x=x, t=target: x().to(make(device, dtype=t))
        same = [
            lambda x: x.contiguous(),
            lambda x: x.contiguous(memory_format=torch.channels_last),
            lambda x: torch.stack([x, x]),
            lambda x: torch.stack([x, x], 1),
            lambda x: torch.stack([x[0], x[0]], -1),
            lambda x: torch.stack([x[0], x[1]], 0),
            lambda x: torch.stack([x[..., 0], x[..., 1]], -1),
            lambda x: torch.cat([x, x]),
            lambda x: torch.cat([x, x.contiguous()], 1),
            lambda x: x.clone(memory_format=torch.contiguous_format),
            lambda x: x.to("cpu"),
            lambda x: x.to(torch.device("cpu")),
            lambda x: x.to(x.device),
            lambda x: x.to(x.device, x.dtype),
            lambda x: x.to(device=x.device, dtype=torch.float32),
            lambda x: x.to(device=x.device, non_blocking=True),
            lambda x: x.to(x.dtype, copy=True),
            lambda x: x.to(x.dtype, False, True),
            lambda x: x.to(x.device, x.dtype, True, True),
            lambda x: x.to(x, True),
            lambda x: x.to(torch.float32, memory_format=torch.channels_last),
            lambda x: x.to(torch.complex64),
            lambda x: x.to("nowhere"),
            lambda x: x.to(),
            lambda x: x.to(None),
            lambda x: x.to(None, torch.float64),
        ]
        for op in same:
            yield lambda x=x, op=op: op(x())


def random_index(rng, x, device):
    """One subscript of x, mostly valid."""

    def item(size):
        kind = rng.randrange(12)
        if kind < 4:
            bounds = [None, *range(-size - 2, size + 3)]
            return slice(rng.choice(bounds), rng.choice(bounds), rng.choice([None, None, 1, 2, 3]))
        if kind < 6:
            return rng.randrange(-size - (rng.random() < 0.1), max(size, 1))
        if device != "cpu":
            size = min(x.shape)  # it may come to index another dimension, and out of range would end the CUDA context
        if kind < 7 and size:
            return [rng.randrange(-size, size) for _ in range(rng.randint(1, 3))]
        if kind < 9 and size:
            shape = rng.choice([(), (3,), (1,), (2, 1), (2, 3), (1, 3)])
            dtype = rng.choice([torch.int64, torch.int64, torch.int32, torch.uint8])
            lowest = 0 if dtype == torch.uint8 else -size
            index = torch.tensor([rng.randrange(lowest, size) for _ in range(torch.Size(shape).numel())], dtype=dtype)
            index = index.reshape(shape).to(device)
            return index.expand(2, 3) if shape == (1, 3) and rng.random() < 0.5 else index
        if kind < 10:
            return slice(None)
        return rng.choice([slice(None), slice(None), True, torch.ones(size, dtype=torch.bool, device=device)])

    items = [item(x.shape[i]) for i in range(rng.randint(0, x.dim()))]
    if rng.random() < 0.3:
        items.insert(rng.randint(0, len(items)), Ellipsis)
    for _ in range(rng.choice([0, 0, 1, 2])):
        items.insert(rng.randint(0, len(items)), None)
    return items[0] if len(items) == 1 and rng.random() < 0.7 else tuple(items)


def indexing(device, count):
    rng = random.Random(0)
    shapes = [(), (4,), (3, 4), (2, 3, 4), (1, 3, 1, 4), (2, 3, 4, 5), (0, 3)]
    for _ in range(count):
        x = make(device, *rng.choice(shapes), layout=rng.randrange(len(LAYOUTS)))
        index = random_index(rng, x, device)
        yield lambda x=x, index=index: x[index]


def views(device):
    sizes = [(), (24,), (2, 3, 4), (6, 4), (2, 12), (-1,), (4, -1), (-1, -1), (5, -1), (2, 1, 3, 1, 4), (3, 8), (0,)]
    for shape, layout in itertools.product([(2, 3, 4), (24,), (4, 1, 6), (), (1,), (0, 3)], range(len(LAYOUTS))):

        def x(s=shape, lay=layout):
            return make(device, *s, layout=lay)

        for size in sizes:
            yield lambda x=x, s=size: x().view(s)
            yield lambda x=x, s=size: x().view(*s)
            yield lambda x=x, s=size: x().reshape(s)
            yield lambda x=x, s=size: x().expand(s)
            yield lambda x=x, s=size: x().repeat(s)
            yield lambda x=x, s=size: x().new_zeros(s)
            yield lambda x=x, s=size: torch.broadcast_to(x(), s)
        same = [
            lambda x: x.T,
            lambda x: x.mT,
            lambda x: x.t(),
            lambda x: x.squeeze(),
            lambda x: x.squeeze(0),
            lambda x: x.squeeze((0, 1)),
            lambda x: x.unsqueeze(-1),
            lambda x: x.unsqueeze(1),
            lambda x: x.flatten(),
            lambda x: x.flatten(1),
            lambda x: x.flatten(0, 1),
            lambda x: x.transpose(0, -1),
            lambda x: x.transpose(-1, -1),
            lambda x: x.permute(2, 0, 1),
            lambda x: x.permute((-1, 0, 1)),
            lambda x: x.movedim(0, -1),
            lambda x: x.view_as(x),
            lambda x: x.reshape_as(x),
            lambda x: x.expand_as(x),
            lambda x: x.unflatten(-1, (2, -1)),
            lambda x: x.narrow(0, 1, 1),
            lambda x: x.narrow(-1, -1, 1),
            lambda x: x.select(0, -1),
            lambda x: x.chunk(2, -1),
            lambda x: x.chunk(5),
            lambda x: x.split(2, -1),
            lambda x: x.split([1, 1], 0),
            lambda x: torch.split(x, 1),
            lambda x: torch.split(x, [1, 2, 1], dim=-1),
            lambda x: x.unbind(),
            lambda x: x.unbind(-1),
            lambda x: x.diagonal(),
            lambda x: x.diagonal(1, -1, 0),
            lambda x: x.view(torch.int32),
            lambda x: x.contiguous().view(-1),
            lambda x: torch.cat([x, x], -1),
            lambda x: torch.cat((x, x.long())),
            lambda x: torch.stack([x, x]),
            lambda x: torch.stack([x, x], 1),
            lambda x: torch.cat([x.new_zeros(0), x], -1),
            lambda x: torch.cat([torch.zeros(0, dtype=torch.float64), x]),
            lambda x: x.repeat_interleave(2, dim=-1, output_size=2 * x.shape[-1]),
            lambda x: torch.stack([x, x], -1),
            lambda x: x.repeat_interleave(2),
            lambda x: x.repeat_interleave(2, dim=0),
            lambda x: x.roll(1, 0),
            lambda x: x.flip(0),
            lambda x: x.tril(),
            lambda x: x.triu(1),
            lambda x: x.tile(2),
            lambda x: F.pad(x, (1, 2)),
            lambda x: F.pad(x, (0, 0)),
            lambda x: F.pad(x, (-1, 2)),
            lambda x: F.pad(x, (1, 1, 2, 2), value=1.0),
            lambda x: F.pad(x, (1, 1), mode="reflect"),
        ]
        for op in same:
            yield lambda x=x, op=op: op(x())


def factories(device):
    """Shapes, dtypes and devices from numbers alone. The device is given where it is not the default one."""
    x = make(device, 2, 3)
    where = {} if device == "cpu" else {"device": x.device}
    for dtype in [None, *DTYPES]:
        kw = {**where, **({"dtype": dtype} if dtype else {})}
        yield lambda kw=kw: torch.zeros(2, 3, **kw)
        yield lambda kw=kw: torch.ones((2, 3), **kw)
        yield lambda kw=kw: torch.empty([], **kw)
        yield lambda kw=kw: torch.eye(3, **kw)
        yield lambda kw=kw: torch.rand(2, 3, **kw)
        yield lambda kw=kw: torch.linspace(0, 1, 5, **kw)
        yield lambda kw=kw: torch.tensor([[1, 2, 3], [4, 5, 6]], **kw)
        yield lambda kw=kw: torch.tensor([True, False], **kw)
        yield lambda kw=kw: torch.tensor([1, 2.5, True], **kw)
        yield lambda kw=kw: torch.tensor(3, **kw)
        yield lambda kw=kw: torch.tensor([[1, 2], [3]], **kw)
        yield lambda kw=kw: torch.tensor([[], []], **kw)
        yield lambda kw=kw: x.new_zeros(2, 3, **kw)
        yield lambda kw=kw: x.new_ones((2, 3), **kw)
        yield lambda kw=kw: x.new_empty([2], **kw)
        yield lambda kw=kw: x.new_full((2,), 3, **kw)
        yield lambda kw=kw: x.new_tensor([1, 2], **kw)
        for value in (1, 2.5, True, 1e30, -1):
            yield lambda kw=kw, v=value: torch.full((2, 3), v, **kw)
            yield lambda kw=kw, v=value: torch.full_like(x, v, **kw)
        for bounds in (
            (5,),
            (1, 5),
            (1, 5, 2),
            (5, 1, -1),
            (0, 1, 0.1),
            (5.0,),
            (0,),
            (5, 1),
            (1, 5, *ZERO),
            (-3, 3),
            (300,),
        ):
            if ZERO or bounds != (0, 1, 0.1) or dtype is None or dtype.is_floating_point:  # a step of 0 as an integer
                yield lambda kw=kw, b=bounds: torch.arange(*b, **kw)
        yield lambda kw=kw: torch.arange(end=5, **kw)
        yield lambda kw=kw: torch.arange(1, end=5, **kw)
        yield lambda kw=kw: torch.arange(start=1, end=5, step=2, **kw)
        yield lambda kw=kw: torch.arange(start=5, **kw)
    yield lambda: torch.zeros(2, requires_grad=True)
    yield lambda: torch.zeros(2, device="meta")
    yield lambda: torch.zeros(2, layout=torch.strided, pin_memory=False)
    yield lambda: torch.zeros(-1)


def layers(device):
    """Linear, norms, embedding, convolutions and pools in the layouts that models bring."""
    for dtype, layout in itertools.product(
        [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64], range(len(LAYOUTS))
    ):

        def m(*shape, d=dtype, lay=layout):
            return make(device, *shape, dtype=d, layout=lay)

        yield lambda m=m: F.linear(m(2, 3, 4), m(5, 4), m(5))
        yield lambda m=m: F.linear(m(2, 4), m(5, 4))
        yield lambda m=m: F.linear(m(4), m(5, 4), m(5))
        yield lambda m=m: F.linear(m(2, 3, 2, 4), m(5, 4), m(1))
        yield lambda m=m: F.linear(m(2, 3), m(5, 4))
        yield lambda m=m: F.linear(m(0, 4), m(5, 4), m(5))
        for a, b in itertools.product(
            [(4,), (3, 4), (2, 3, 4), (5, 1, 3, 4), (0, 4)], [(4,), (4, 2), (2, 4, 3), (5, 2, 4, 3)]
        ):
            yield lambda m=m, a=a, b=b: m(*a) @ m(*b)
            yield lambda m=m, a=a, b=b: torch.matmul(m(*a), m(*b).to(torch.float32))
        yield lambda m=m: torch.outer(m(3), m(4))
        yield lambda m=m: torch.addmm(m(5), m(2, 3), m(3, 5), alpha=2)
        yield lambda m=m: torch.baddbmm(m(4, 2, 5), m(4, 2, 3), m(4, 3, 5), beta=0.5)
        yield lambda m=m: F.layer_norm(m(2, 3, 4), (4,), m(4), m(4))
        yield lambda m=m: F.layer_norm(m(2, 3, 4), [3, 4])
        yield lambda m=m: torch.layer_norm(m(2, 3, 4), (4,), m(4), None, 1e-5)
        yield lambda m=m: torch.layer_norm(m(2, 3, 4), (4,), m(4).float(), None, 1e-5)
        yield lambda m=m: F.rms_norm(m(2, 3, 4), (4,), m(4))
        yield lambda m=m: F.rms_norm(m(2, 3, 4), (4,), m(4), 1e-6)
        yield lambda m=m: F.group_norm(m(2, 4, 3, 3), 2, m(4), m(4))
        for size in ((2, 4, 3, 3), (2, 4), (2, 4, 5), (1, 4, 1, 1)):
            yield lambda m=m, s=size: F.batch_norm(m(*s), m(4), m(4).abs(), m(4), m(4))
            yield lambda m=m, s=size: F.batch_norm(m(*s), m(4), m(4), training=True)
            yield lambda m=m, s=size: torch.batch_norm(m(*s), m(4), m(4), m(4), m(4), False, 0.1, 1e-5, True)
        for index in (torch.int64, torch.int32, torch.float32):
            yield lambda m=m, i=index: F.embedding(make(device, 2, 3, dtype=i), m(9, 4))
            yield lambda m=m, i=index: F.embedding(make(device, dtype=i), m(9, 4), padding_idx=-1)
            yield lambda m=m, i=index: torch.embedding(m(9, 4), make(device, 2, 3, dtype=i))
            yield lambda m=m, i=index: F.embedding(make(device, 3, dtype=i), m(9, 4), padding_idx=99)
        for kw in (
            {},
            {"stride": 2, "padding": 1},
            {"groups": 2},
            {"padding": (1, 0), "dilation": 2},
            {"padding": "same"},
        ):
            yield lambda m=m, kw=kw: F.conv2d(m(2, 4, 6, 5), m(4, 4 // kw.get("groups", 1), 2, 3), m(4), **kw)
            yield lambda m=m, kw=kw: F.conv2d(m(4, 6, 5), m(4, 4 // kw.get("groups", 1), 1, 1), None, **kw)
            yield lambda m=m, kw=kw: F.conv2d(m(1, 1, 6, 5), m(2, 1, 3, 3), **kw)
            yield lambda m=m, kw=kw: F.conv1d(m(2, 4, 6), m(4, 4 // kw.get("groups", 1), 3), m(4), **kw)
        for op in (F.max_pool2d, F.avg_pool2d, torch.max_pool2d):
            yield lambda m=m, op=op: op(m(2, 4, 6, 5), 2)
            yield lambda m=m, op=op: op(m(2, 4, 6, 5), (3, 2), stride=2, padding=1)
            yield lambda m=m, op=op: op(m(4, 6, 5), 3, ceil_mode=True)
            yield lambda m=m, op=op: op(m(1, 1, 6, 5), 3, (2, 1), 0)
        yield lambda m=m: torch.max_pool1d(m(2, 4, 6), 2)
        for kw in (
            {"size": 4},
            {"size": (3, 7), "mode": "bilinear"},
            {"scale_factor": 2},
            {"scale_factor": (1.5, 0.7), "mode": "bicubic", "align_corners": True},
            {"scale_factor": 0.3, "mode": "nearest-exact"},
            {"scale_factor": 2.0, "mode": "bilinear", "antialias": True},
        ):
            yield lambda m=m, kw=kw: F.interpolate(m(2, 4, 6, 5), **kw)
        for classes in ((2, 5), (5,), (2, 5, 3), (2, 5, 3, 4)):
            target = make(device, *(classes[:1] + classes[2:] if len(classes) > 1 else ()), dtype=torch.int64) % 5
            for kw in ({}, {"reduction": "sum"}, {"reduction": "none"}, {"label_smoothing": 0.1}, {"ignore_index": 1}):
                yield lambda m=m, c=classes, t=target, kw=kw: F.cross_entropy(m(*c), t, **kw)
            yield lambda m=m, c=classes, t=target: F.nll_loss(m(*c), t)
            yield lambda m=m, c=classes, t=target: F.cross_entropy(m(*c), t, m(5))
            yield lambda m=m, c=classes: F.cross_entropy(m(*c), m(*c))
        for loss in (F.mse_loss, F.l1_loss, F.binary_cross_entropy_with_logits):
            yield lambda m=m, f=loss: f(m(2, 3), m(2, 3))
            yield lambda m=m, f=loss: f(m(2, 3), m(2, 3), reduction="sum")
            yield lambda m=m, f=loss: f(m(2, 3), m(2, 1))
            yield lambda m=m, f=loss: f(m(2, 3), m(2, 3), m(2, 3))
        offsets = torch.tensor([4, 8], dtype=torch.int32, device=device)
        for width in (8, 16, 20, 24):
            yield lambda m=m, w=width: torch._grouped_mm(m(8, 16), m(2, 16, w), offs=offsets)
            yield lambda m=m, w=width: torch._grouped_mm(m(8, 16), m(2, w, 16).mT, offs=offsets)
            yield lambda m=m, w=width: torch._grouped_mm(m(2, 8, 16), m(2, 16, w))
            yield lambda m=m, w=width: torch._grouped_mm(m(8, w), m(2, 16, w), offs=offsets)
        yield lambda m=m: torch.max_pool3d(m(2, 4, 6, 5, 4), 2, stride=1)
        yield lambda m=m: F.adaptive_avg_pool2d(m(2, 4, 6, 5), 1)
        yield lambda m=m: F.adaptive_avg_pool2d(m(2, 4, 6, 5), (None, 2))
        yield lambda m=m: F.adaptive_avg_pool2d(m(2, 1, 6, 5), 1)
        yield lambda m=m: F.softmax(m(2, 3, 4), -1)
        yield lambda m=m: F.log_softmax(m(2, 3, 4, 5), 1)
        yield lambda m=m: torch.logsumexp(m(2, 3, 4), -1)
        yield lambda m=m: m(2, 3, 4).mean((0, 1), keepdim=True)
        yield lambda m=m: m(2, 3, 4).var(-1, unbiased=False)
        yield lambda m=m: m(2, 3, 4).std(-1, correction=0)
        yield lambda m=m: m(2, 3, 4).var(-1, False, True)
        yield lambda m=m: m(2, 3, 4).var(False)
        yield lambda m=m: m(2, 3, 4).pow(2).mean(-1, keepdim=True)
        yield lambda m=m: torch.max(m(2, 3), m(3))
        yield lambda m=m: torch.max(m(2, 3), 1)
        yield lambda m=m: torch.where(m(2, 3) > 1, 1.0, 2.0)
        yield lambda m=m: torch.where(m(2, 3) > 1, m(2, 1), 0.0)
        yield lambda m=m: m(2, 3).where(m(3) > 1, m(2, 1))
        yield lambda m=m: torch.where(m(2, 3) > 1, 1, m(3))


def attention(device):
    for dtype, layout in itertools.product(
        [torch.float32, torch.bfloat16, torch.float64, torch.int64], ["bhld", "blhd", "packed"]
    ):
        for b, h, n, s, d, dv in [
            (2, 4, 8, 8, 16, 16),
            (2, 4, 8, 6, 16, 16),
            (2, 4, 1, 8, 16, 16),
            (2, 1, 8, 8, 16, 16),
            (1, 4, 8, 8, 16, 12),
            (1, 1, 1, 1, 4, 4),
            (2, 4, 0, 8, 5, 5),
        ]:

            def part(length, width, b=b, h=h, dtype=dtype, layout=layout):
                if layout == "bhld":
                    return make(device, b, h, length, width, dtype=dtype)
                if layout == "blhd":
                    return make(device, b, length, h, width, dtype=dtype).transpose(1, 2)
                return (
                    make(device, b, length, 3 * h * width, dtype=dtype)
                    .chunk(3, -1)[1]
                    .view(b, length, h, width)
                    .transpose(1, 2)
                )

            def run(n=n, s=s, d=d, dv=dv, part=part, **kw):
                return F.scaled_dot_product_attention(part(n, d), part(s, d), part(s, dv), **kw)

            yield run
            for heads in (1, 2, 3):

                def grouped(heads=heads, n=n, s=s, d=d, part=part):
                    q, k = part(n, d), part(s, d)[:, :heads]
                    return F.scaled_dot_product_attention(q, k, k, enable_gqa=True)

                yield grouped
            for kw in (
                {"is_causal": True},
                {"scale": 0.5},
                {"enable_gqa": True},
                {"dropout_p": 0.5},
                {"attn_mask": make(device, n, s, dtype=dtype)},
                {"attn_mask": make(device, n, s) >= 0},
                {"attn_mask": make(device, b, h, n, s, dtype=dtype)},
                {"attn_mask": make(device, b, 1, n, s, dtype=dtype)},
                {"attn_mask": make(device, b, 1, 1, s) >= 0},
                {"attn_mask": make(device, h, n, s, dtype=dtype)},
                {"attn_mask": make(device, s, dtype=dtype)},
            ):
                yield lambda run=run, kw=kw: run(**kw)


def backward_kernels(device):
    """Kernels that derivatives call, on incoming gradients of every layout and dtype."""
    aten = torch.ops.aten
    by_element = [
        lambda g, x: aten.threshold_backward.default(g, x, 0),
        lambda g, x: aten.gelu_backward.default(g, x),
        lambda g, x: aten.gelu_backward.default(g, x, approximate="tanh"),
        lambda g, x: aten.silu_backward.default(g, x),
        lambda g, x: aten.mish_backward.default(g, x),
        lambda g, x: aten.softplus_backward.default(g, x, 1, 20),
        lambda g, x: aten.hardtanh_backward.default(g, x, -1.0, 1.0),
        lambda g, x: aten.hardswish_backward.default(g, x),
        lambda g, x: aten.hardsigmoid_backward.default(g, x),
        lambda g, x: aten.leaky_relu_backward.default(g, x, 0.01, False),
        lambda g, x: aten.elu_backward.default(g, 1.0, 1, 1, False, x),
        lambda g, x: aten._softmax_backward_data.default(g, x, 0, x.dtype),
        lambda g, x: aten._log_softmax_backward_data.default(g, x, -1, x.dtype),
        lambda g, x: aten.mse_loss_backward.default(g, x, g, 0),
        lambda g, x: aten.mse_loss_backward.default(g.sum(), x, g, 1),
        lambda g, x: aten.glu_backward.default(g[..., : g.shape[-1] // 2], x, -1),
        lambda g, x: aten.nll_loss_backward.default(
            g.sum(), x, torch.zeros(x.shape[0], dtype=torch.int64, device=device), None, 1, -100, x.sum()
        ),
        lambda g, x: aten.embedding_dense_backward.default(
            g, torch.zeros(g.shape[:-1], dtype=torch.int64), 5, -1, False
        ),
        lambda g, x: aten.index_put.default(x.contiguous(), [torch.zeros(g.shape[0], dtype=torch.int64)], g, True),
        lambda g, x: aten.index_add.default(x.contiguous(), 0, torch.zeros(g.shape[0], dtype=torch.int64), g),
    ]
    for f, a, b, dtype, shape in itertools.product(
        by_element, range(len(LAYOUTS)), range(len(LAYOUTS)), DTYPES[:4:3], [(2, 4), (2, 3, 4), (2, 0), ()]
    ):
        yield lambda f=f, a=a, b=b, dtype=dtype, shape=shape: f(
            make(device, *shape, dtype=dtype, layout=a), make(device, *shape, dtype=dtype, layout=b)
        )


def cases(device, long=False):
    yield from arithmetic(device)
    yield from unary(device, DTYPES if long else DTYPES[::3])
    yield from casts(device)
    yield from indexing(device, 100_000 if long else 3000)
    yield from views(device)
    yield from factories(device)
    yield from layers(device)
    yield from attention(device)
    yield from backward_kernels(device)
