"""Small programs of random numbers, of autocast, and of the modes that gradients are computed in."""

from __future__ import annotations

import contextlib
import types

import torch
from torch import nn
from torch.nn import functional as F

from tests.soundness.harness import Seen, program
from tests.soundness.programs_fourth_modules import rows
from tests.soundness.world import X, backward

# ---- random numbers ----


@program("fourth: random")
def dropout_with_seeds_between_calls():
    drop = nn.Dropout(0.5)

    def f(x):
        return drop(x), torch.rand(2)

    yield f, torch.ones(8)
    yield Seen(after=torch.rand(3))
    torch.manual_seed(3)
    yield torch.ones(8)
    drop.p = 0.1
    yield torch.ones(8)
    yield Seen(after=torch.rand(3))
    drop.eval()
    yield torch.ones(8)
    drop.train()
    drop.inplace = True
    x = torch.ones(8)
    yield x
    yield Seen(x=x, after=torch.rand(3))


@program("fourth: random")
def generator_as_an_argument():
    def f(x, g=None):
        return x + torch.randn(4, generator=g), torch.randperm(4, generator=g)

    g = torch.Generator().manual_seed(1)
    yield f, X(), g
    yield X(), g
    state = g.get_state()
    yield X(), g
    g.set_state(state)
    yield X(), g
    yield X()
    h = torch.Generator().manual_seed(1)
    yield X(), h
    yield Seen(g=g.get_state(), h=h.get_state(), after=torch.rand(2))


@program("fourth: random")
def generator_of_a_sampler_object():
    class Sampler:
        def __init__(self, seed):
            self.generator = torch.Generator().manual_seed(seed)
            self.temperature = 1.0

        def __call__(self, logits):
            probs = torch.softmax(logits / self.temperature, -1)
            return torch.multinomial(probs, 1, generator=self.generator)

    sampler = Sampler(0)
    yield lambda x: sampler(x), rows()
    sampler.temperature = 0.1
    yield rows()
    sampler.generator.manual_seed(0)
    yield rows()
    sampler.generator = torch.Generator().manual_seed(5)
    yield rows()
    sampler.generator = None
    yield rows()
    yield Seen(after=torch.rand(2))


@program("fourth: random")
def seed_inside_the_function():
    def f(x, seed):
        torch.manual_seed(seed)
        return x + torch.rand(4)

    yield f, X(), 1
    yield Seen(after=torch.rand(2))
    yield X(), 1
    yield X(), 2
    yield X(), 3
    yield Seen(after=torch.rand(2))


@program("fourth: random")
def forked_state_inside_and_outside():
    def f(x, seed=None):
        with torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            noise = torch.randn(4)
        return x + noise, torch.rand(2)

    yield f, X()
    yield X(), 4
    yield X(), 4
    with torch.random.fork_rng():
        yield X(), 5
        yield X()
    yield Seen(after=torch.rand(2))


@program("fourth: random")
def reparametrised_sample():
    class Vae(nn.Module):
        def __init__(self):
            super().__init__()
            self.enc, self.dec, self.beta = nn.Linear(4, 4), nn.Linear(2, 4), 1.0

        def forward(self, x):
            mean, logvar = self.enc(x).chunk(2, -1)
            z = mean + torch.randn_like(mean) * (0.5 * logvar).exp() if self.training else mean
            kl = -0.5 * (1 + logvar - mean.square() - logvar.exp()).sum()
            return F.mse_loss(self.dec(z), x) + self.beta * kl

    model = Vae()
    for beta in (1.0, 0.5, 0.25, 0.125):
        model.beta = beta
        out = yield (model, rows()) if beta == 1.0 else rows()
        backward(out)
        yield Seen(model=model)
    model.eval()
    yield rows()
    model.train()
    yield rows(5)
    yield Seen(after=torch.rand(1))


@program("fourth: random")
def many_ways_to_draw():
    def f(x, p):
        return (
            torch.bernoulli(x.sigmoid()),
            torch.normal(x, 1.0),
            F.gumbel_softmax(x, tau=p, hard=True),
            F.dropout(x, p, training=True),
            F.rrelu(x, training=True),
            torch.empty(3).uniform_(0, p),
            torch.randint(0, 10, (2,)),
            torch.rand_like(x) < p,
            nn.init.kaiming_uniform_(torch.empty(2, 3)),
        )

    yield f, X(), 0.5
    yield X(), 0.5
    yield X(), 0.25
    yield X(), 0.75
    yield rows(2), 0.75
    yield Seen(after=torch.rand(2))


@program("fourth: random")
def depth_that_is_drawn():
    class Path(nn.Module):
        def __init__(self, p):
            super().__init__()
            self.p, self.scale_by_keep = p, True

        def forward(self, x):
            if self.p == 0.0 or not self.training:
                return x
            keep = 1 - self.p
            mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
            if keep > 0.0 and self.scale_by_keep:
                mask.div_(keep)
            return x * mask

    model = Path(0.5)
    yield model, rows(6)
    model.scale_by_keep = False
    yield rows(6)
    model.p = 0.0
    yield rows(6)
    model.p = 1.0
    yield rows(6)
    model.p = 0.2
    yield rows(2, 2)
    out = yield rows(6, grad=True)
    backward(out)
    yield Seen(after=torch.rand(2))


@program("fourth: random")
def noise_drawn_only_when_it_matters():
    def f(x, sigma):
        noise = torch.randn_like(x)
        return x + sigma * noise if sigma else x

    yield f, X(), 0.0
    yield Seen(after=torch.rand(1))
    yield X(), 0.5
    yield X(), 0.25
    yield Seen(after=torch.rand(1))
    yield X(), 0
    yield Seen(after=torch.rand(1))


@program("fourth: random")
def state_saved_and_restored_around_calls():
    yield lambda x: F.dropout(x, 0.5), torch.ones(6)
    state = torch.get_rng_state()
    yield torch.ones(6)
    torch.set_rng_state(state)
    yield torch.ones(6)
    torch.set_rng_state(state)
    out = yield torch.ones(6, requires_grad=True)
    backward(out)
    yield Seen(after=torch.rand(2))


# ---- autocast ----


@program("fourth: modes")
def autocast_on_in_parts_of_a_function():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    box = types.SimpleNamespace(enabled=True, dtype=torch.bfloat16)

    def f(x):
        with torch.autocast("cpu", dtype=box.dtype, enabled=box.enabled):
            h = model(x)
            with torch.autocast("cpu", enabled=False):
                return h, model[0](x) + h.float().sum()

    yield f, rows()
    box.enabled = False
    yield rows()
    with torch.autocast("cpu", torch.bfloat16):
        yield rows()
    box.enabled, box.dtype = True, torch.float16
    yield rows()
    out = yield rows()
    backward(out)
    yield Seen(model=model)


@program("fourth: modes")
def loss_in_full_precision():
    model = nn.Linear(4, 3)

    def f(x, y):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x)
            loss = F.cross_entropy(logits, y)
        return loss, logits.dtype, torch.is_autocast_enabled("cpu")

    y = torch.tensor([0, 2, 1])
    out = yield f, rows(), y
    backward(out)
    yield Seen(model=model)
    model.double()
    yield rows().double(), y
    model.bfloat16()
    yield rows().bfloat16(), y
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        yield rows().bfloat16(), y


@program("fourth: modes")
def autocast_flipped_between_calls():
    model = nn.Sequential(nn.Conv1d(1, 2, 2), nn.GELU(), nn.Flatten(), nn.LazyLinear(2))
    x = rows()[:, None]
    model(x)
    yield model, x
    with torch.autocast("cpu", torch.bfloat16):
        yield x
    with torch.autocast("cpu", torch.float16):
        yield x
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        yield x
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        out = yield x
        backward(out)
        yield Seen(model=model)
    yield x


@program("fourth: modes")
def decorated_with_autocast_and_no_grad():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        @torch.autocast("cpu", torch.bfloat16)
        def low(self, x):
            return self.a(x)

        @torch.no_grad()
        def fixed(self, x):
            return self.b(x)

        def forward(self, x):
            return self.low(x), self.fixed(x), self.low(x).float() + self.fixed(x)

    net = Net()
    out = yield net, rows()
    backward(out)
    yield Seen(net=net)
    Net.fixed = lambda self, x: self.b(x)
    net.zero_grad()
    out = yield rows()
    backward(out)
    yield Seen(net=net)


# ---- gradient modes ----


@program("fourth: modes")
def gradients_switched_by_an_argument():
    model = nn.Linear(4, 2)

    def f(x, train):
        with torch.set_grad_enabled(train):
            h = model(x)
        return h, h.requires_grad, torch.is_grad_enabled(), h * 2

    out = yield f, rows(), True
    backward(out)
    yield rows(), False
    with torch.no_grad():
        yield rows(), True
        yield rows(), False
    yield Seen(model=model)
    yield rows(grad=True), False


@program("fourth: modes")
def mode_left_switched_by_the_function():
    def f(x, on):
        torch.set_grad_enabled(on)
        return x * 2

    x = X(grad=True)
    yield f, x, True
    try:
        yield x, False
        yield Seen(on=torch.is_grad_enabled())
        yield x, False
        yield x, True
        yield Seen(on=torch.is_grad_enabled())
    finally:
        torch.set_grad_enabled(True)


@program("fourth: modes")
def inference_mode_and_its_tensors():
    w = torch.ones(4, requires_grad=True)

    def f(x):
        y = x * w
        return y, y.is_inference(), x.is_inference()

    yield f, X()
    with torch.inference_mode():
        inside = X()
        yield inside
        yield X()
    yield inside
    yield X()
    with torch.no_grad():
        yield inside
    out = yield inside.clone()
    yield Seen(grad=out[0].requires_grad)


@program("fourth: modes")
def gradients_enabled_inside():
    model = nn.Linear(4, 2)

    def f(x):
        with torch.no_grad():
            h = model(x)
            with torch.enable_grad():
                return model(h.detach()[:, :1].expand(-1, 4)), h

    out = yield f, rows()
    backward(out)
    yield Seen(model=model)
    with torch.no_grad():
        out = yield rows()
    backward(out)
    yield Seen(model=model)
    with torch.inference_mode():
        yield rows()


@program("fourth: modes")
def modes_asked_about():
    def f(x):
        if torch.is_grad_enabled() and x.requires_grad:
            x = x * 2
        if torch.is_inference_mode_enabled():
            x = x * 3
        if torch.is_autocast_enabled("cpu"):
            x = x * 5
        if torch.are_deterministic_algorithms_enabled():
            x = x * 7
        if torch.is_anomaly_enabled():
            x = x * 11
        return x.to(torch.get_default_dtype())

    yield f, X()
    yield X(grad=True)
    with torch.no_grad():
        yield X(grad=True)
    with torch.inference_mode():
        yield X()
    with torch.autocast("cpu", torch.bfloat16):
        yield X()
    try:
        torch.use_deterministic_algorithms(True)
        yield X()
    finally:
        torch.use_deterministic_algorithms(False)
    with torch.autograd.set_detect_anomaly(True):
        yield X()
    try:
        torch.set_default_dtype(torch.float64)
        yield X()
    finally:
        torch.set_default_dtype(torch.float32)
    yield X()


@program("fourth: modes")
def default_dtype_between_calls():
    def f(n):
        return torch.arange(n) * 0.5, torch.ones(n), torch.tensor(1.5), torch.linspace(0, 1, n), torch.tensor(3) / 2

    yield f, 3
    try:
        torch.set_default_dtype(torch.float64)
        yield 3
        yield 4
        torch.set_default_dtype(torch.bfloat16)
        yield 3
    finally:
        torch.set_default_dtype(torch.float32)
    yield 3
    yield 5


@program("fourth: modes")
def default_dtype_inside():
    @contextlib.contextmanager
    def default(dtype):
        old = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(old)

    def f(x, dtype):
        with default(dtype):
            return x + torch.ones(4)

    yield f, X(), torch.float32
    yield X(), torch.float64
    yield X(), torch.float32
    yield Seen(dtype=torch.get_default_dtype())


@program("fourth: modes")
def devices_of_a_context():
    def f(x):
        y = torch.ones(4)
        return y.device.type, x.device.type, torch.zeros_like(x) + (y if y.device == x.device else 0.0)

    yield f, X()
    with torch.device("meta"):
        yield torch.ones(4, device="cpu")
    yield X()
    try:
        torch.set_default_device("cpu")
        yield X()
    finally:
        torch.set_default_device(None)
    yield X()


@program("fourth: modes")
def attention_kernels_chosen():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    box = types.SimpleNamespace(backend=SDPBackend.MATH, causal=False, scale=None)

    def f(q):
        with sdpa_kernel(box.backend):
            return F.scaled_dot_product_attention(q, q, q, is_causal=box.causal, scale=box.scale)

    q = torch.arange(24.0).reshape(1, 2, 3, 4).sin()
    yield f, q
    box.causal = True
    yield q
    box.scale = 0.1
    yield q
    box.backend = [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]
    yield q
    out = yield q.clone().requires_grad_()
    backward(out)
    box.scale = 0.2
    yield q


@program("fourth: modes")
def saved_tensors_packed_outside():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    packed = []

    def pack(t):
        packed.append(tuple(t.shape))
        return t

    out = yield model, rows()
    backward(out)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t * 2):
        yield rows().requires_grad_(False)
    yield Seen(any=bool(packed))
    with torch.autograd.graph.save_on_cpu():
        out = yield rows()
    model.zero_grad()
    backward(out)
    yield Seen(model=model)


@program("fourth: modes")
def modes_of_functions_put_around():
    from torch.overrides import TorchFunctionMode

    class Count(TorchFunctionMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.names.append(func.__name__)
            return func(*args, **(kwargs or {}))

    yield lambda x: x.sin() + 1, X()
    with Count() as count:
        yield X()
    yield Seen(names=[n for n in count.names if n in ("sin", "add", "__add__")])
    yield X()


@program("fourth: modes")
def anomaly_and_errors_in_backward():
    x = X(grad=True)
    out = yield lambda x: (x - x).sqrt() * 0, x
    backward(out)
    yield Seen(x=x)
    with torch.autograd.set_detect_anomaly(True):
        out = yield x
        yield Seen(raised=backward(out))
    x.grad = None
    out = yield x
    backward(out)
    yield Seen(x=x)
