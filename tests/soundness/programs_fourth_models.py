"""Small programs in the styles that models, training scripts and serving code are written in."""

from __future__ import annotations

import collections
import dataclasses
import math
import types

import torch
from torch import nn
from torch.nn import functional as F

from tests.soundness.harness import Seen, program
from tests.soundness.programs_fourth_modules import rows
from tests.soundness.world import X, backward

TOKENS = torch.tensor([[1, 5, 2, 0], [3, 3, 4, 6]])


@dataclasses.dataclass
class Settings:
    """Of a small decoder."""

    vocab: int = 8
    width: int = 8
    heads: int = 2
    layers: int = 2
    dropout: float = 0.0
    window: int | None = None
    tie: bool = False
    rope_theta: float = 100.0
    softcap: float | None = None


class Attention(nn.Module):
    """With a cache of keys and values, and rotary positions."""

    def __init__(self, config, index):
        super().__init__()
        self.config, self.index = config, index
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x, positions, cache=None):
        c = self.config
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, c.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = self.rotate(q, positions), self.rotate(k, positions)
        if cache is not None:
            k, v = cache.update(k, v, self.index)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if c.softcap is not None:
            scores = c.softcap * torch.tanh(scores / c.softcap)
        seen = torch.arange(k.shape[2])[None, :] <= positions[:, None]
        if c.window is not None:
            seen = seen & (torch.arange(k.shape[2])[None, :] > positions[:, None] - c.window)
        scores = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        scores = F.dropout(scores, c.dropout, self.training)
        return self.out((scores @ v).transpose(1, 2).reshape(b, t, -1))

    def rotate(self, x, positions):
        half = x.shape[-1] // 2
        angles = positions[:, None] / self.config.rope_theta ** (torch.arange(half) / half)
        a, b = x.chunk(2, -1)
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


class Cache:
    """Keys and values of all layers."""

    def __init__(self):
        self.keys, self.values = [], []

    def update(self, k, v, layer):
        if len(self.keys) <= layer:
            self.keys.append(k)
            self.values.append(v)
        else:
            self.keys[layer] = torch.cat([self.keys[layer], k], 2)
            self.values[layer] = torch.cat([self.values[layer], v], 2)
        return self.keys[layer], self.values[layer]

    def __len__(self):
        return self.keys[0].shape[2] if self.keys else 0

    def crop(self, n):
        self.keys = [k[:, :, :n] for k in self.keys]
        self.values = [v[:, :, :n] for v in self.values]


class Answer(collections.OrderedDict):
    """Like the outputs of transformers: attributes, keys and places."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def to_tuple(self):
        return tuple(self.values())


class Decoder(nn.Module):
    """A language model with what is optional in them."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.width)
        self.attention = nn.ModuleList(Attention(config, i) for i in range(config.layers))
        self.mlp = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8)) for _ in self.attention)
        self.norm = nn.RMSNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab, bias=False)

    def forward(self, tokens, labels=None, cache=None, output_hidden=False, return_dict=True, keep=0):
        start = 0 if cache is None else len(cache)
        positions = torch.arange(start, start + tokens.shape[1])
        x, hidden = self.embed(tokens), []
        for attention, mlp in zip(self.attention, self.mlp, strict=True):
            hidden.append(x)
            x = x + attention(self.norm(x), positions, cache)
            x = x + mlp(x)
        weight = self.embed.weight if self.config.tie else self.head.weight
        logits = F.linear(self.norm(x)[:, -keep:], weight)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=0)
        out = Answer(logits=logits)
        if loss is not None:
            out["loss"] = loss
        if output_hidden:
            out["hidden"] = tuple(hidden)
        return out if return_dict else out.to_tuple()


@program("fourth: models")
def decoder_with_optional_outputs():
    model = Decoder(Settings())
    out = yield model, TOKENS
    yield Seen(names=list(out), kind=type(out).__name__)
    out = yield TOKENS, TOKENS
    out.loss.backward()
    yield Seen(model=model)
    out = yield TOKENS, None, None, True
    yield Seen(names=list(out), n=len(out.hidden))
    yield TOKENS, TOKENS, None, True, False
    yield TOKENS[:, :3], TOKENS[:, :3]
    yield TOKENS, None, None, False, True, 1


@program("fourth: models")
def decoder_with_settings_that_change():
    model = Decoder(Settings()).eval()
    c = model.config
    yield model, TOKENS
    c.window = 2
    yield TOKENS
    c.window = 3
    yield TOKENS
    c.tie = True
    yield TOKENS
    c.rope_theta = 50.0
    yield TOKENS
    c.softcap = 2.0
    yield TOKENS
    c.softcap = 1.0
    yield TOKENS
    c.dropout = 0.5
    yield TOKENS
    model.train()
    yield TOKENS
    model.config = dataclasses.replace(c, tie=False)
    yield TOKENS
    model.attention[0].config = model.config
    model.config.softcap = None
    yield TOKENS


@program("fourth: models")
def decoder_with_a_cache():
    model = Decoder(Settings()).eval()

    @torch.no_grad()
    def f(tokens, cache):
        return model(tokens, cache=cache, keep=1).logits

    cache = Cache()
    yield f, TOKENS, cache
    for i in range(4):
        yield TOKENS[:, i : i + 1], cache
        yield Seen(cache=cache)
    cache.crop(3)
    yield TOKENS[:, :2], cache
    yield Seen(cache=cache, n=len(cache))
    other = Cache()
    yield TOKENS[:1], other
    other.keys[0].zero_()
    yield TOKENS[:1, :1], other
    yield Seen(cache=other)


@program("fourth: models")
def greedy_loop_that_stops():
    model = Decoder(Settings(layers=1)).eval()
    settings = types.SimpleNamespace(max_new=3, stop=-1, temperature=1.0, bias={})

    @torch.no_grad()
    def generate(tokens):
        cache = Cache()
        step = tokens
        for _ in range(settings.max_new):
            logits = model(step, cache=cache, keep=1).logits[:, -1] / settings.temperature
            for token, bias in settings.bias.items():
                logits[:, token] += bias
            step = logits.argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, step], 1)
            if (step == settings.stop).all():
                break
        return tokens

    out = yield generate, TOKENS
    settings.stop = int(out[0, 4])
    yield TOKENS[:1]
    settings.bias[7] = 100.0
    yield TOKENS
    settings.bias[6] = 200.0
    settings.max_new = 2
    yield TOKENS
    settings.stop = 6
    yield TOKENS
    settings.bias.clear()
    yield TOKENS[:, :3]


@program("fourth: models")
def sampling_with_many_knobs():
    @dataclasses.dataclass
    class Knobs:
        temperature: float = 1.0
        top_k: int | None = None
        top_p: float = 1.0
        penalty: float = 1.0
        banned: list = dataclasses.field(default_factory=list)

    knobs = Knobs()

    def sample(logits, previous):
        k = knobs
        if k.penalty != 1.0:
            score = logits.gather(1, previous)
            logits = logits.scatter(1, previous, torch.where(score < 0, score * k.penalty, score / k.penalty))
        if k.banned:
            logits = logits.index_fill(1, torch.tensor(k.banned), float("-inf"))
        logits = logits / k.temperature
        if k.top_k is not None:
            low = logits.topk(min(k.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < low, float("-inf"))
        if k.top_p < 1.0:
            ordered, index = logits.sort(descending=True)
            drop = ordered.softmax(-1).cumsum(-1) > k.top_p
            drop[:, 1:] = drop[:, :-1].clone()
            drop[:, 0] = False
            logits = logits.masked_fill(drop.scatter(1, index, drop), float("-inf"))
        return logits, torch.multinomial(logits.softmax(-1), 1)

    logits, previous = torch.arange(16.0).reshape(2, 8).sin() * 3, torch.tensor([[1, 2], [0, 7]])
    yield sample, logits, previous
    for name, value in (
        ("temperature", 0.5),
        ("top_k", 3),
        ("top_k", 100),
        ("top_p", 0.7),
        ("top_p", 0.3),
        ("penalty", 1.5),
        ("penalty", 2.5),
        ("banned", [1]),
        ("banned", [1, 2]),
        ("temperature", 2.0),
    ):
        setattr(knobs, name, value)
        yield logits, previous
    knobs.banned.append(0)
    yield logits, previous
    yield Seen(after=torch.rand(1))


@program("fourth: models")
def images_through_stages_with_a_new_classifier():
    class Drop(nn.Module):
        def __init__(self, p=0.0):
            super().__init__()
            self.p = p

        def forward(self, x):
            if not self.training or not self.p:
                return x
            return x * torch.rand(x.shape[0], 1, 1, 1).add(1 - self.p).floor() / (1 - self.p)

    class Stage(nn.Module):
        def __init__(self, a, b):
            super().__init__()
            self.conv, self.norm, self.drop = nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), Drop()
            self.skip = nn.Conv2d(a, b, 1) if a != b else nn.Identity()
            self.gamma = nn.Parameter(torch.ones(b)) if a == b else None

        def forward(self, x):
            h = self.norm(self.conv(x)).relu()
            if self.gamma is not None:
                h = h * self.gamma.view(1, -1, 1, 1)
            return self.skip(x) + self.drop(h)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stages = nn.Sequential(Stage(1, 2), Stage(2, 2))
            self.pool, self.head = "avg", nn.Linear(2, 3)

        def reset_classifier(self, n, pool=None):
            self.pool = pool or self.pool
            self.head = nn.Linear(2, n) if n else nn.Identity()

        def forward_features(self, x):
            return self.stages(x)

        def forward_head(self, x, pre_logits=False):
            x = x.mean((2, 3)) if self.pool == "avg" else x.amax((2, 3)) if self.pool == "max" else x
            return x if pre_logits else self.head(x)

        def forward(self, x):
            return self.forward_head(self.forward_features(x))

    model, x = Net(), torch.arange(32.0).reshape(2, 1, 4, 4).cos()
    yield model, x
    model.reset_classifier(5, "max")
    out = yield x
    backward(out)
    yield Seen(model=model)
    model.stages[1].drop.p = 0.5
    yield x
    model.stages[0].drop.p = 0.25
    yield x
    model.stages[1].gamma = None
    model.reset_classifier(0)
    yield x
    model.eval()
    model.forward_head = lambda x: x.flatten(1)
    yield x
    yield Seen(model=model)


@program("fourth: models")
def recurrent_state_carried_over():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(4, 3, num_layers=2, batch_first=True, dropout=0.0)
            self.out = nn.Linear(3, 2)
            self.stateful, self.state = False, None

        def forward(self, x, state=None):
            state = self.state if state is None and self.stateful else state
            h, state = self.rnn(x, state)
            if self.stateful:
                self.state = tuple(s.detach() for s in state)
            return self.out(h), state

    model = Tagger()
    out = yield model, rows(6)[None]
    out = yield rows(6)[None], out[1]
    backward(out)
    yield Seen(model=model)
    model.stateful = True
    yield rows(6)[None]
    yield rows(3)[None]
    yield Seen(state=model.state)
    model.state = None
    yield rows(6)[None]
    model.state[0].zero_()
    yield rows(6)[None]
    model.rnn.dropout = 0.5
    yield rows(6)[None]
    yield Seen(state=model.state, after=torch.rand(1))


@program("fourth: models")
def cells_in_a_python_loop():
    cell = nn.GRUCell(4, 3)
    settings = {"steps": 3, "reverse": False, "teacher": 1.0}

    def f(x, h=None):
        h = torch.zeros(x.shape[1], 3) if h is None else h
        out = []
        order = range(min(settings["steps"], len(x)))
        for t in reversed(order) if settings["reverse"] else order:
            h = cell(x[t] * settings["teacher"], h)
            out.append(h)
        return torch.stack(out), h

    x = torch.arange(24.0).reshape(3, 2, 4).sin()
    out = yield f, x
    settings["steps"] = 2
    yield x, out[1].detach()
    settings["reverse"] = True
    out = yield x
    backward(out)
    yield Seen(cell=cell)
    for settings["teacher"] in (0.5, 0.25, 0.0):
        yield x
    settings["steps"] = 10
    yield x[:2]


@program("fourth: models")
def experts_chosen_by_a_router():
    class Moe(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(4, 3, bias=False)
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
            self.top, self.noise, self.capacity = 1, 0.0, 1.0
            self.register_buffer("load", torch.zeros(3))

        def forward(self, x):
            scores = self.gate(x)
            if self.training and self.noise:
                scores = scores + torch.randn_like(scores) * self.noise
            weights, index = scores.softmax(-1).topk(self.top, -1)
            out = torch.zeros_like(x)
            for i, expert in enumerate(self.experts):
                here = (index == i).to(x.dtype)
                out = out + expert(x) * (weights * here).sum(-1, keepdim=True)
                self.load[i] += here.sum().detach()
            return out * self.capacity

    moe = Moe()
    out = yield moe, rows(5)
    backward(out)
    yield Seen(moe=moe)
    moe.top = 2
    out = yield rows(5)
    backward(out)
    moe.noise = 0.5
    yield rows(5)
    moe.noise = 0.75
    yield rows(5)
    moe.capacity = 2.0
    yield rows(5)
    moe.experts.append(nn.Identity())
    yield rows(5)
    yield Seen(load=moe.load, after=torch.rand(1))


@program("fourth: models")
def denoising_steps_of_a_scheduler():
    class Scheduler:
        order = 1

        def __init__(self, n=10):
            self.config = {"n": n, "clip": True, "kind": "epsilon"}
            self.alphas = torch.linspace(0.99, 0.9, n).cumprod(0)
            self.timesteps, self.history, self.index = list(range(n - 1, -1, -3)), [], 0

        def step(self, noise, t, x, eta=0.0, generator=None):
            a = self.alphas[t]
            before = self.alphas[t - 3] if t >= 3 else torch.tensor(1.0)
            kind = self.config["kind"]
            clean = (x - (1 - a).sqrt() * noise) / a.sqrt() if kind == "epsilon" else noise
            clean = clean.clamp(-1, 1) if self.config["clip"] else clean
            self.history = [*self.history, clean][-2:]
            self.index += 1
            out = before.sqrt() * clean + (1 - before).sqrt() * noise
            if eta > 0:
                out = out + eta * torch.randn(x.shape, generator=generator)
            return {"prev": out, "clean": clean}

    model, scheduler = nn.Linear(5, 4), Scheduler()

    @torch.no_grad()
    def f(x, t, eta=0.0, guidance=1.0):
        noise = model(torch.cat([x, torch.full((x.shape[0], 1), t / 10)], 1))
        noise = noise * guidance
        return scheduler.step(noise, t, x, eta)

    x = rows()
    for i, t in enumerate(scheduler.timesteps):
        out = yield (f, x, t) if not i else (x, t)
        x = out["prev"]
    yield Seen(history=scheduler.history, index=scheduler.index)
    scheduler.config["clip"] = False
    yield x, 6, 0.5
    scheduler.config["kind"] = "sample"
    yield x, 6, 0.25, 7.5
    yield x, 3, 0.25, 5.0
    scheduler.history.clear()
    scheduler.alphas = scheduler.alphas**2
    yield x, 3
    yield Seen(history=scheduler.history, index=scheduler.index, after=torch.rand(1))


@program("fourth: models")
def metric_updated_and_reset():
    class Accuracy:
        def __init__(self):
            self.top, self.reset = 1, self._clear
            self._clear()

        def _clear(self):
            self.right, self.total, self.history = torch.tensor(0.0), 0, []

        def update(self, logits, y):
            found = (logits.topk(self.top).indices == y[:, None]).any(1).float()
            self.right = self.right + found.sum()
            self.total += len(y)
            self.history.append(found.mean())

        def compute(self):
            return self.right / self.total if self.total else torch.tensor(0.0)

    metric = Accuracy()

    def f(logits, y):
        metric.update(logits, y)
        return metric.compute()

    y = torch.tensor([0, 3, 2])
    yield f, rows().sin(), y
    yield rows(start=1.0).sin(), y
    metric.top = 2
    yield rows().sin(), y
    yield Seen(metric=(metric.right, metric.total, metric.history))
    metric.reset()
    yield rows(5).sin(), torch.tensor([0, 1, 2, 3, 0])
    yield rows(5).sin(), torch.tensor([0, 1, 2, 3, 0])
    yield Seen(metric=(metric.right, metric.total, metric.history))


@program("fourth: models")
def graph_messages_over_edges():
    class Conv(nn.Module):
        aggregate = "add"

        def __init__(self):
            super().__init__()
            self.layer, self.loops, self.cached, self._norm = nn.Linear(4, 4), True, False, None

        def forward(self, x, edges, weight=None):
            if self.loops:
                here = torch.arange(x.shape[0])
                edges = torch.cat([edges, torch.stack([here, here])], 1)
            if self._norm is None or not self.cached:
                degree = torch.zeros(x.shape[0]).index_add_(0, edges[1], torch.ones(edges.shape[1]))
                self._norm = degree.clamp(min=1).rsqrt()
            message = self.layer(x)[edges[0]] * (self._norm[edges[0]] * self._norm[edges[1]])[:, None]
            if weight is not None:
                message = message * F.pad(weight, (0, edges.shape[1] - len(weight)), value=1.0)[:, None]
            if self.aggregate == "add":
                return torch.zeros_like(x).index_add(0, edges[1], message)
            index = edges[1][:, None].expand_as(message)
            return torch.zeros_like(x).scatter_reduce(0, index, message, self.aggregate, include_self=False)

    conv = Conv()
    edges = torch.tensor([[0, 1, 2], [1, 2, 0]])
    yield conv, rows(), edges
    yield rows(), edges[:, :2]
    conv.cached = True
    yield rows(), edges
    conv.loops = False
    yield rows(), edges
    conv._norm.mul_(2)
    out = yield rows(), edges, torch.tensor([1.0, 2.0, 3.0])
    backward(out)
    yield Seen(conv=conv)
    Conv.aggregate = "mean"
    yield rows(), edges
    Conv.aggregate = "amax"
    yield rows(), edges
    conv._norm = None
    yield rows(), edges


@program("fourth: models")
def detector_with_thresholds():
    def overlap(a, b):
        low = torch.max(a[:, None, :2], b[None, :, :2])
        high = torch.min(a[:, None, 2:], b[None, :, 2:])
        both = (high - low).clamp(min=0).prod(2)
        area = lambda z: (z[:, 2:] - z[:, :2]).prod(1)  # noqa: E731
        return both / (area(a)[:, None] + area(b)[None] - both)

    class Post:
        threshold, limit, most = 0.3, 0.5, 10

        def __call__(self, boxes, scores):
            keep = scores > self.threshold
            boxes, scores = boxes[keep], scores[keep]
            order = scores.argsort(descending=True)
            boxes, scores = boxes[order], scores[order]
            overlaps, kept = overlap(boxes, boxes), []
            for i in range(len(boxes)):
                if all(overlaps[i, j] <= self.limit for j in kept):
                    kept.append(i)
                if len(kept) == self.most:
                    break
            return boxes[kept], scores[kept]

    post = Post()
    boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 3], [3, 3, 4, 5], [0, 1, 2, 2]])
    scores = torch.tensor([0.9, 0.8, 0.6, 0.2])
    yield lambda b, s: post(b, s), boxes, scores
    post.threshold = 0.1
    yield boxes, scores
    post.limit = 0.7
    yield boxes, scores
    post.most = 1
    yield boxes, scores
    yield boxes, torch.zeros(4)
    yield boxes, scores.flip(0)


@program("fourth: models")
def nets_with_skips_and_lists():
    class Unet(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
            self.up = nn.ModuleList(nn.Linear(8, 4) for _ in range(2))
            self.scale, self.skips = 1.0, None

        def forward(self, x, extra=()):
            skips = []
            for layer in self.down:
                x = layer(x).relu()
                skips.append(x)
            for i, value in enumerate(extra):
                skips[i] = skips[i] + value
            self.skips = [s.detach() for s in skips]
            for layer in self.up:
                x = layer(torch.cat([x, skips.pop() * self.scale], -1))
            assert not skips
            return x

    net = Unet()
    out = yield net, rows()
    backward(out)
    yield Seen(net=net)
    yield rows(), (1.0,)
    yield rows(), [torch.ones(4), 2]
    net.scale = 0.5
    yield rows()
    net.scale = 0.75
    yield rows()
    yield Seen(skips=net.skips)
    net.up.append(nn.Linear(8, 4))
    yield rows()
    net.down.append(nn.Linear(4, 4))
    yield rows()


@program("fourth: models")
def quantised_weights_unpacked():
    class Quantised(nn.Module):
        def __init__(self, layer, bits=8):
            super().__init__()
            self.bits, self.observe = bits, False
            scale = layer.weight.detach().abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
            self.register_buffer("scale", scale)
            self.register_buffer("packed", (layer.weight.detach() / scale).round().to(torch.int8))
            self.register_buffer("peak", torch.tensor(0.0))
            self.bias = layer.bias

        def forward(self, x):
            if self.observe:
                self.peak.copy_(torch.maximum(self.peak, x.detach().abs().max()))
            return F.linear(x, self.packed.to(x.dtype) * self.scale.to(x.dtype), self.bias)

    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    yield model, rows()
    model[0] = Quantised(model[0])
    yield rows()
    model[0].observe = True
    yield rows(start=5.0)
    yield Seen(model=model)
    model[0].packed = model[0].packed.to(torch.int16) + 1
    out = yield rows(grad=True)
    backward(out)
    model[0].scale *= 2
    yield rows()
    yield Seen(model=model)


@program("fourth: models")
def ensemble_by_stacked_weights():
    models = [nn.Linear(4, 2) for _ in range(3)]
    base = nn.Linear(4, 2).to("meta")
    params, buffers = torch.func.stack_module_state(models)

    def f(x):
        def one(p, b, x):
            return torch.func.functional_call(base, (p, b), (x,))

        return torch.func.vmap(one, in_dims=(0, 0, None))(params, buffers, x)

    out = yield f, rows()
    backward(out)
    yield Seen(params=params)
    with torch.no_grad():
        params["weight"][1].zero_()
    yield rows()
    params["bias"] = torch.ones(3, 2)
    yield rows(5)
    params, buffers = torch.func.stack_module_state(models[:2])
    yield rows()


@program("fourth: models")
def early_exit_by_confidence():
    class Exits(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
            self.heads = nn.ModuleList(nn.Linear(4, 2) for _ in range(3))
            self.threshold, self.used = 0.5, 0

        def forward(self, x):
            for i, (block, head) in enumerate(zip(self.blocks, self.heads, strict=True)):
                x = block(x).tanh()
                out = head(x).softmax(-1)
                self.used = i
                if not self.training and out.max().item() > self.threshold:
                    break
            return out

    model = Exits().eval()
    yield model, rows()
    for threshold in (0.99, 0.6, 0.7, 0.0):
        model.threshold = threshold
        yield rows()
        yield Seen(used=model.used)
    model.train()
    yield rows()
    yield rows(start=4.0)
    yield Seen(used=model.used)


@program("fourth: models")
def warm_up_inside_the_loss():
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.step, self.warm, self.weights = 0, 4, {"a": 1.0, "b": 0.5}

        def forward(self, x, y):
            self.step += 1
            factor = min(1.0, self.step / self.warm)
            cosine = 0.5 * (1 + math.cos(math.pi * self.step / 10))
            a, b = F.mse_loss(x, y), F.l1_loss(x, y)
            return self.weights["a"] * a + factor * self.weights["b"] * b + cosine * a.detach(), factor, cosine

    loss, x = Loss(), X(grad=True)
    for i in range(7):
        out = yield (loss, x, X(1.0)) if not i else (x, X(float(i)))
        out[0].backward()
        yield Seen(x=x, step=loss.step)
        if i == 4:
            loss.weights["b"] = 0.0
        if i == 5:
            loss.step = 0


@program("fourth: models")
def batches_collated_with_padding():
    embed, out = nn.Embedding(8, 4, padding_idx=0), nn.Linear(4, 1)

    def f(batch):
        tokens = nn.utils.rnn.pad_sequence(batch["tokens"], batch_first=True, padding_value=batch.get("pad", 0))
        mask = tokens != batch.get("pad", 0)
        h = embed(tokens.clamp(min=0)) * mask[..., None]
        return out(h.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)), mask

    got = yield f, {"tokens": [torch.tensor([1, 2, 3]), torch.tensor([4])]}
    backward(got)
    yield Seen(embed=embed)
    yield {"tokens": [torch.tensor([1, 2]), torch.tensor([4, 5])]}
    yield {"tokens": [torch.tensor([1, 2, 0])], "pad": -1}
    yield {"tokens": (torch.tensor([1]), torch.tensor([2]), torch.tensor([3, 0]))}
    yield {"tokens": [], "pad": 0}
    with torch.no_grad():
        embed.weight[0].fill_(1.0)
    yield {"tokens": [torch.tensor([1, 2, 3]), torch.tensor([4])]}


@program("fourth: models")
def requests_served_with_options():
    model = nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1)).eval()
    labels = ["cat", "dog", "bird", "fish"]

    class Pipeline:
        def __init__(self):
            self.model, self.defaults, self.calls = model, {"top": 1, "names": True}, collections.Counter()

        @torch.inference_mode()
        def __call__(self, x, **options):
            options = {**self.defaults, **{k: v for k, v in options.items() if v is not None}}
            self.calls["total"] += 1
            probs, index = self.model(x).topk(options["top"])
            return probs, [labels[i] for i in index[0].tolist()] if options["names"] else index

    pipe = Pipeline()
    yield lambda x, o: pipe(x, **o), rows(1), {}
    yield rows(1), {"top": 2}
    yield rows(1), {"top": None, "names": False}
    labels[0], labels[1] = labels[1], labels[0]
    yield rows(1, start=3.0), {"top": 4}
    pipe.defaults["top"] = 3
    yield rows(1), {}
    pipe.model = nn.Sequential(model, nn.Identity())
    yield rows(2), {"names": False}
    yield rows(1), {"top": 9}
    yield Seen(calls=pipe.calls)


@program("fourth: models")
def transformers_with_flags_that_change():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=16, n_positions=16, n_embd=8, n_layer=2, n_head=2, attn_pdrop=0.0, embd_pdrop=0.0)
    model = GPT2LMHeadModel(config).eval()

    def f(tokens, **kw):
        out = model(tokens, use_cache=False, **kw)
        return out.logits, out.loss, out.hidden_states, type(out).__name__

    def call(tokens, kw):
        return f(tokens, **kw)

    yield call, TOKENS, {}
    yield TOKENS, {"attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])}
    out = yield TOKENS, {"labels": TOKENS}
    backward(out[1])
    yield Seen(model=[p.grad for p in model.parameters()])
    model.config.output_hidden_states = True
    yield TOKENS, {}
    model.config.output_hidden_states = False
    model.transformer.h[1].mlp.act = nn.Tanh()
    yield TOKENS, {}
    model.transformer.drop.p = 0.5
    model.train()
    yield TOKENS, {}
    model.resize_token_embeddings(20, mean_resizing=False)
    yield TOKENS, {"labels": TOKENS}
    yield Seen(after=torch.rand(1))
