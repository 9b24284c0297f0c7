"""Writes programs: Python source of a callable, of calls of it, and of what changes between them.

    writer = Writer(random.Random(3))
    print(writer.program())

The only input is a source of random choices, so that hypothesis can drive the writer and shrink what it finds. A
program is a module (see ``harness.check_source``): state as globals, a callable, and ``calls``, a generator as in
``harness.program`` that also says what must be equal after a call (``Seen``).

Everything is written from tables: a *part* is a piece of state, with expressions that read it, conditions on it,
statements that write it in the program, and changes of it between calls. ``$`` stands for the model: ``self`` in a
forward, ``MODEL`` elsewhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

HEADER = """\
import collections, contextlib, dataclasses, functools, math, random, types
import torch
from torch import nn
from tests.soundness.harness import Seen
from tests.soundness.world import Config, Pair, Rates, X, backward, make_classes
globals().update(make_classes())
"""


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece of state."""

    setup: str
    numbers: Sequence[str] = ()  # expressions
    tensors: Sequence[str] = ()
    tests: Sequence[str] = ()
    writes: Sequence[str] = ()  # statements of the program; {t} a tensor, {n} a number
    changes: Sequence[str] = ()  # statements between calls; {n} a literal
    needs: Sequence[str] = ()
    seen: str = ""  # what to compare after each call


PARTS = {
    "gain": Part(
        "GAIN = {n}",
        numbers=["GAIN", "abs(GAIN)", "read_gain()"],
        tests=["GAIN > 1", "isinstance(GAIN, int)", "math.copysign(1, GAIN) > 0", "GAIN != GAIN"],
        writes=["global GAIN; GAIN = GAIN + 1", "global GAIN; GAIN = {n}"],
        changes=["GAIN = {n}", "GAIN = {n}", "GAIN = GAIN"],
        seen="GAIN",
    ),
    "table": Part(
        'TABLE = {"a": {n}, "t": torch.ones(4)}',
        numbers=["TABLE['a']", "len(TABLE)", "TABLE.get('b', 1.5)", "list(TABLE).index('a')"],
        tensors=["TABLE['t']", "TABLE.get('u', X())", "TABLE.setdefault('u', X(3.0))"],
        tests=["'b' in TABLE", "next(iter(TABLE)) == 'a'", "TABLE.get('b') is None", "len(TABLE) > 2"],
        writes=[
            "TABLE['a'] = {n}", "TABLE['t'] = {t}", "TABLE['b'] = TABLE.get('b', 0) + 1", "TABLE.pop('b', None)",
            "TABLE.update(b={n})", "TABLE['t'].add_(1)", "TABLE['u'] = {t}", "TABLE['log'] = [{t}]", "TABLE.clear()",
        ],
        changes=[
            "TABLE['a'] = {n}", "TABLE['b'] = {n}", "TABLE.pop('b', None)", "TABLE['a'] = TABLE.pop('a', 0)",
            "TABLE['t'] = X({n})", "TABLE['t'] = torch.ones(4, dtype=torch.double)", "TABLE['t'].mul_(2)",
            "TABLE['u'] = TABLE['t']", "TABLE['t'] = TABLE['t'].clone().requires_grad_()",
            "TABLE.update(a=TABLE.get('a', 1))", "TABLE = dict(TABLE)", "TABLE = {'a': {n}, 't': X()}",
        ],
        seen="TABLE",
    ),
    "numbers": Part(
        "NUMBERS = [{n}, 2]",
        numbers=["NUMBERS[0]", "NUMBERS[-1]", "len(NUMBERS)", "sum(NUMBERS)", "max(NUMBERS)"],
        tests=["len(NUMBERS) > 2", "2 in NUMBERS", "NUMBERS == [1.0, 2]", "all(NUMBERS)"],
        writes=["NUMBERS.append({n})", "NUMBERS[0] = {n}", "NUMBERS.pop()", "NUMBERS[0] += 1", "NUMBERS.reverse()"],
        changes=[
            "NUMBERS.append({n})", "NUMBERS[0] = {n}", "NUMBERS.pop()", "NUMBERS.reverse()", "NUMBERS[:] = [{n}]",
            "NUMBERS = [{n}, {n}]", "NUMBERS.sort()", "NUMBERS = tuple(NUMBERS)",
        ],
        seen="NUMBERS",
    ),
    "items": Part(
        "ITEMS = [torch.ones(4), X(0.5)]",
        numbers=["len(ITEMS)"],
        tensors=["ITEMS[0]", "ITEMS[-1]", "sum(ITEMS)", "ITEMS[len(ITEMS) // 2]"],
        tests=["len(ITEMS) > 2", "ITEMS[0] is ITEMS[-1]", "ITEMS[0] is x", "ITEMS[0].requires_grad"],
        writes=[
            "ITEMS.append({t})", "ITEMS[0] = {t}", "ITEMS.pop()", "ITEMS[0].mul_(2)", "ITEMS.reverse()",
            "ITEMS[0], ITEMS[-1] = ITEMS[-1], ITEMS[0]", "ITEMS[:] = [{t}, {t}]", "ITEMS.extend([{t}])",
            "for item in ITEMS:\n    item.add_(1)",
        ],
        changes=[
            "ITEMS.append(X({n}))", "ITEMS[0] = X({n})", "ITEMS.pop()", "ITEMS.reverse()", "ITEMS[-1] = ITEMS[0]",
            "ITEMS[0] = ITEMS[0].double()", "ITEMS[0].fill_({n})", "ITEMS[0] = ITEMS[0].clone()", "ITEMS[0] = x",
            "ITEMS[1] = ITEMS[0][:4]", "ITEMS[0].requires_grad_()", "ITEMS = [X(), X(1.0), X(2.0)]",
        ],
        seen="ITEMS",
    ),
    "names": Part(
        "NAMES = {'a', 'b'}",
        numbers=["len(NAMES)", "sum(map(len, NAMES))"],
        tests=["'a' in NAMES", "'c' in NAMES", "NAMES == {'a'}", "1 in NAMES"],
        writes=["NAMES.add('c')", "NAMES.discard('a')", "NAMES.add(len(NAMES))"],
        changes=["NAMES.add('c')", "NAMES.discard('a')", "NAMES.clear()", "NAMES = {'a', 'b'}", "NAMES ^= {'a', 1}"],
        seen="NAMES",
    ),
    "order": Part(
        "ORDER = collections.OrderedDict(a={n}, b=3.0)",
        numbers=["next(iter(ORDER.values()))", "ORDER['a']", "len(ORDER)"],
        tests=["list(ORDER) == ['a', 'b']", "'c' in ORDER"],
        writes=["ORDER['c'] = {n}", "ORDER.move_to_end('a')"],
        changes=["ORDER.move_to_end('a')", "ORDER['a'] = {n}", "ORDER['c'] = {n}", "ORDER.move_to_end('b', last=False)"],
        seen="ORDER",
    ),
    "queue": Part(
        "QUEUE = collections.deque([{n}, 2.0], maxlen=3)",
        numbers=["QUEUE[0]", "len(QUEUE)", "sum(QUEUE)"],
        tests=["len(QUEUE) == QUEUE.maxlen", "QUEUE[0] == 2.0"],
        writes=["QUEUE.append({n})", "QUEUE.rotate()"],
        changes=["QUEUE.append({n})", "QUEUE.rotate()", "QUEUE.popleft()", "QUEUE = collections.deque([1.0])"],
        seen="QUEUE",
    ),
    "config": Part(
        "CONFIG = Config(scale={n})",
        numbers=["CONFIG.scale", "CONFIG.rates.rate", "getattr(CONFIG, 'extra', 1.5)", "len(CONFIG.rates.steps)",
                 "CONFIG.rates.steps[0]", "dataclasses.asdict(CONFIG)['scale']"],
        tests=["CONFIG.flag", "CONFIG.rates.mode == 'up'", "CONFIG == Config()", "hasattr(CONFIG, 'extra')",
               "CONFIG.rates == Rates()"],
        writes=["CONFIG.scale = {n}", "CONFIG.rates.rate = {n}", "CONFIG.rates.steps.append({n})",
                "CONFIG.last = {t}", "CONFIG.flag = not CONFIG.flag"],
        changes=[
            "CONFIG.scale = {n}", "CONFIG.rates.rate = {n}", "CONFIG.flag = not CONFIG.flag",
            "CONFIG.rates.mode = 'down'", "CONFIG.rates = Rates(rate={n})", "CONFIG = Config()", "CONFIG.extra = {n}",
            "CONFIG.rates.steps.append(3)", "CONFIG = dataclasses.replace(CONFIG, scale={n})",
            "CONFIG.rates.steps[0] = {n}", "vars(CONFIG)['scale'] = {n}", "CONFIG.__dict__ = dict(vars(CONFIG), scale={n})",
        ],
        seen="CONFIG",
    ),
    "slots": Part(
        "SLOTS = Slotted({n})",
        numbers=["SLOTS.value", "getattr(SLOTS, 'extra', 1.5)"],
        tests=["SLOTS.value > 1", "hasattr(SLOTS, 'extra')"],
        writes=["SLOTS.value = {n}", "SLOTS.extra = {t}", "SLOTS.value += 1"],
        changes=["SLOTS.value = {n}", "SLOTS.extra = {n}", "SLOTS = Slotted({n})", "del SLOTS.value"],
        seen="SLOTS",
    ),
    "object": Part(
        "OBJECT = Scaler({n})",
        numbers=["OBJECT.value", "OBJECT.doubled", "OBJECT.factor", "Scaler.factor", "len(OBJECT.seen)"],
        tensors=["OBJECT({t})", "OBJECT.scaled({t})"],
        tests=["OBJECT.value == 2.0", "'extra' in vars(OBJECT)", "callable(OBJECT)"],
        writes=["OBJECT.value = {n}", "OBJECT.seen.append({n})", "OBJECT.seen.append({t})", "OBJECT.last = {t}",
                "Scaler.factor = {n}", "setattr(OBJECT, 'value', {n})"],
        changes=[
            "OBJECT.value = {n}", "Scaler.factor = {n}", "OBJECT.factor = {n}", "OBJECT = Scaler({n})",
            "Scaler.scaled = lambda self, t: t - self.value", "OBJECT.scaled = lambda t: t * 3",
            "Scaler.doubled = property(lambda self: self.value + 7)", "Scaler.__call__ = lambda self, t: t + 9",
            "OBJECT.seen.append(1)", "OBJECT.extra = 1", "OBJECT.__class__ = type('Other', (Scaler,), {'factor': 5.0})",
        ],
        seen="OBJECT",
    ),
    "state": Part(
        "STATE = torch.zeros(4)",
        tensors=["STATE", "STATE[:]", "STATE.view(2, 2).t().reshape(-1)"],
        tests=["STATE is x", "STATE.requires_grad", "STATE.dtype == torch.float32", "STATE.is_contiguous()"],
        writes=["STATE.add_({t})", "STATE[1:3] = 7", "global STATE; STATE = {t}", "global STATE; STATE = STATE + {t}",
                "STATE.copy_({t})", "STATE.view(2, 2)[0].mul_(2)", "torch.add({t}, {t}, out=STATE)",
                "STATE += {t}", "STATE.zero_()"],
        changes=["STATE = X({n})", "STATE.fill_({n})", "STATE = torch.zeros(4, dtype=torch.double)", "STATE = x",
                 "STATE = torch.zeros(8)[::2]", "STATE.requires_grad_()", "STATE = x[:]", "STATE = STATE.clone()",
                 "STATE.data = X({n})", "STATE = nn.Parameter(X())"],
        seen="STATE",
    ),
    "helper": Part(
        "def helper(t, by={n}):\n    return t * by if by > 1 else t - float(by)",
        tensors=["helper({t})", "helper({t}, {n})", "helper({t}, by=2.0)"],
        numbers=["helper.__defaults__[0]"],
        changes=[
            "helper.__defaults__ = ({n},)", "helper.__code__ = (lambda t, by=1: t + by).__code__",
            "def helper(t, by={n}):\n    return t + by", "helper = torch.relu", "helper = functools.partial(torch.mul, other=2)",
        ],
    ),
    "closure": Part(
        "",
        numbers=["rate", "len(seen)"],
        tests=["rate > 1", "bool(seen)"],
        writes=["nonlocal rate; rate = rate + 1", "seen.append({n})", "seen.append({t})", "nonlocal rate; rate = {n}"],
        changes=["change({n})", "change({n})", "SEEN.append(1)", "SEEN.clear()"],
        seen="SEEN",
    ),
    "model": Part(
        "MODEL = {Model}()",
        numbers=["$.scale", "$.doubled", "$.factor", "$.inner.scale", "$.count", "len($.items)", "len($.layers)",
                 "$.table['a']", "len($.table)", "$.config.scale", "$.config.rates.rate", "getattr($, 'extra', 1.5)",
                 "len($._forward_hooks)", "len(list($.parameters()))", "type($).factor"],
        tensors=["$.w", "$.buf", "$.inner({t})", "$.method({t})", "$.items[0]", "sum($.items)",
                 "functools.reduce(lambda t, l: l(t), $.layers, {t})", "Net.forward($, {t})", "$.inner.bias",
                 "$.state_dict()['buf']", "sum(p.sum() for p in $.parameters())", "torch.func.functional_call($.inner, {'bias': {t}}, ({t},))",
                 "$.get_buffer('buf')", "getattr($, 'w')", "vars($)['_buffers']['buf']", "$.layers[-1]({t})"],
        tests=["$.training", "$.mode == 'up'", "$.flag", "$.last is None", "'extra' in $.__dict__", "hasattr($, 'extra')",
               "$.w.requires_grad", "$.buf.dtype == torch.float32", "$.inner.training", "isinstance($.inner, Inner)",
               "$.config.flag", "$.config == Config()", "'b' in $.table", "$.buf is x", "len($.layers) > 2"],
        writes=["$.count += 1", "$.last = {t}", "$.buf.add_(1)", "$.buf = $.buf + 1", "$.scale = {n}", "$.items.append({t})",
                "$.table['c'] = {n}", "$.items[0] = {t}", "$.buf.copy_({t}.detach())", "$.flag = not $.flag",
                "$.register_buffer('extra_buf', {t}.detach())", "$.config.scale = {n}", "$.inner.scale += 1",
                "with torch.no_grad():\n    $.w.mul_(2)", "$.w.data.add_(1)", "$.items.pop()", "$.mode = 'down'",
                "$.table['t'] = {t}", "setattr($, 'last', {t})", "$.__dict__['last'] = {t}", "$.buf[0] = 5"],
        changes=[
            "MODEL.scale = {n}", "MODEL.mode = 'down'", "MODEL.flag = not MODEL.flag", "MODEL.count += 1",
            "MODEL.last = X()", "MODEL.last = None", "MODEL.items.append(X({n}))", "MODEL.table['a'] = {n}",
            "MODEL.table['b'] = MODEL.table.pop('b', 0)", "MODEL.table.pop('b', None)", "MODEL.config.scale = {n}",
            "MODEL.config = Config(scale={n})", "MODEL.config.rates.rate = {n}", "MODEL.inner.scale = {n}",
            "MODEL.inner = Inner({n})", "MODEL.layers.append(Inner({n}))", "MODEL.layers[0].scale = {n}",
            "MODEL.train(not MODEL.training)", "MODEL.inner.eval()", "MODEL.w = nn.Parameter(X({n}))",
            "MODEL.w.data.mul_(2)", "MODEL.w.data = X({n})", "MODEL.w.requires_grad_(False)", "MODEL.buf = X({n})",
            "MODEL.buf.add_(1)", "MODEL.buf = MODEL.buf.double()", "MODEL.double()", "MODEL.float()",
            "MODEL.register_forward_hook(lambda m, a, out: out)", "MODEL.inner.register_forward_hook(lambda m, a, out: out * 2)",
            "MODEL.inner.register_forward_pre_hook(lambda m, a: (a[0] + 1,))",
            "MODEL.inner.register_full_backward_hook(lambda m, g, o: (g[0] * 2,))",
            "HANDLE = MODEL.inner.register_forward_hook(lambda m, a, out: out - 3)", "HANDLE.remove()",
            "MODEL.method = lambda t: t - 2", "Net.factor = {n}", "MODEL.factor = {n}", "MODEL.extra = {n}",
            "del MODEL.extra", "Inner.forward = lambda self, t: t * 5", "MODEL.inner.forward = lambda t: t * 6",
            "Net.method = lambda self, t: t * 8", "MODEL.inner.__class__ = type('Wide', (Inner,), {'forward': lambda self, t: t + 4})",
            "MODEL.load_state_dict({k: v + 1 for k, v in MODEL.state_dict().items()})", "MODEL.inner.bias = MODEL.w",
            "MODEL.zero_grad()", "MODEL.items[0] = MODEL.buf", "MODEL.requires_grad_(False)", "MODEL.requires_grad_()",
            "MODEL.register_buffer('extra', X())", "del MODEL.layers[0]", "MODEL.layers[0] = MODEL.layers[-1]",
            "MODEL.buf = x", "MODEL.w.register_hook(lambda g: g * 3) if MODEL.w.requires_grad else None",
            "Net.doubled = property(lambda self: 11.0)", "MODEL.buf.resize_(4)", "MODEL.buf = torch.zeros(8)[::2]",
            "MODEL.inner = torch.nn.Identity()", "MODEL.apply(lambda m: setattr(m, 'scale', {n}))",
            "MODEL.w.data = torch.zeros(8)[::2]", "MODEL.items.reverse()", "setattr(MODEL.inner, 'scale', {n})",
        ],
        seen="MODEL",
    ),
    "xs": Part(
        "",
        numbers=["len(xs)"],
        tensors=["xs[0]", "xs[-1]", "sum(xs)"],
        tests=["len(xs) > 2", "xs[0] is x", "xs[0] is xs[-1]", "xs[0].requires_grad"],
        writes=["xs.append({t})", "xs[0] = {t}", "xs[0].add_(1)", "xs.pop()", "xs.reverse()", "xs[-1].mul_(2)"],
        changes=["xs = [X()]", "xs = [X(), X(1.0), x]", "xs = [x, x]", "xs.append(X())", "xs = [X(2.0), y]", "xs = [x[:], y]"],
        seen="xs",
    ),
    "d": Part(
        "",
        numbers=["d['n']", "len(d)", "d.get('m', 2)"],
        tensors=["d['t']", "d.get('u', x)"],
        tests=["'u' in d", "next(iter(d)) == 't'", "d['n'] == 1.0"],
        writes=["d['t'] = {t}", "d['n'] = {n}", "d['u'] = {t}", "d['t'].add_(1)", "d.pop('u', None)", "d['k'] = [{t}, 1]"],
        changes=["d = {'t': X(), 'n': {n}}", "d['n'] = {n}", "d = {'n': {n}, 't': X(1.0)}", "d['u'] = x", "d['t'] = y", "d['t'] = X({n})"],
        seen="d",
    ),
    "s": Part(
        "",
        numbers=["s", "s", "s + 1"],
        tests=["s > 1", "isinstance(s, bool)", "isinstance(s, int)", "s != s", "math.copysign(1, s) < 0"],
        changes=["s = {n}", "s = {n}", "s = True"],
    ),
}  # fmt: skip

NUMBERS = ("2.0", "1.0", "0.0", "-0.0", "3", "1", "True", "0.5", "float('nan')", "-1.5", "float('inf')", "2")

OPS = {  # operand shapes are kept: (4,), or ()
    "{t} + {u}", "{t} * {u}", "{t} - {u}", "{t} * {n}", "{t} + {n}", "torch.relu({t})", "{t}.sin()", "torch.where({t} > 0, {t}, {u})",
    "torch.copysign({t}, torch.tensor(float({n})))", "{t}.clamp(min=-1)", "{t} / 2", "{t}.cumsum(-1)", "torch.cat([{t}[:2], {u}[2:]])",
    "{t}.softmax(-1)", "{t}.flip(0)", "{t}.clone()", "nn.functional.gelu({t})", "{t}.float().view(2, 2).matmul({u}.float().view(2, 2)).view(-1)",
    "nn.functional.layer_norm({t}, (4,))", "torch.stack([{t}, {u}]).sum(0)", "-{t}", "{t}.to(torch.float32)", "{t}.sum() + {u}",
    "{t}.mean() * {u}", "torch.outer({t}, {u})[0]", "{t}.exp().log1p()", "nn.functional.dropout({t}, 0.5, True)", "torch.rand_like({t}) + {u}",
    "{t} ** 2", "{t}.masked_fill({u} > 0, {n})", "{t}.float() @ {u}.float() * {t}", "torch.zeros(4) + {t}", "{t}.repeat(2)[::2]",
}  # fmt: skip

VIEWS = (
    "{t}[:]", "{t}.view(2, 2).t().reshape(-1)", "{t}.detach()", "{t}.unsqueeze(0)[0]", "{t}.view(2, 2).view(4)", "{t}.expand(1, 4)[0]",
    "{t}.narrow(0, 0, 4)", "{t}.contiguous()", "{t}.to({t}.dtype)", "{t}.chunk(1)[0]", "{t}.data",
    "{t}.reshape(4)", "{t}.T", "{t}.view_as({t})", "{t}.alias()" , "{t}.squeeze()", "{t}.real", "{t}.type_as({u})", "{t}.requires_grad_()",
)  # fmt: skip

IN_PLACE = (
    "{v}.add_(1)", "{v}.mul_({u})", "{v}[1:3] = {n}", "{v}[0] += 1", "{v} += {u}", "{v}.zero_()", "{v}.copy_({u})", "{v}[:2].neg_()",
    "{v}.view(2, 2)[0].mul_(3)", "torch.mul({u}, 2, out={v})", "{v}.masked_fill_({v} > 0, {n})", "{v}.relu_()", "{v}[[0, 2]] = {u}[:2]",
    "{v}.t_()", "{v}.index_add_(0, torch.tensor([1, 1]), {u}[:2])", "{v}.fill_({n})", "{v}.data.add_(1)",
    "{v}.clamp_(max=1)", "{v}[{v} < 0] = 0", "{v}.set_({u})", "{v}.swapaxes_(0, 0)", "{v}.unsqueeze_(0); {v}.squeeze_(0)",
    "{v}.detach_()", "nn.functional.relu({v}, inplace=True)", "{v}.bernoulli_(0.5)", "torch.nn.init.ones_({v})",
)  # fmt: skip

TESTS = (
    "x.requires_grad", "x.is_contiguous()", "x is y", "x.dtype == torch.float32", "x.shape == y.shape", "x.shape[0] > 4",
    "torch.is_grad_enabled()", "torch.is_autocast_enabled('cpu')", "x.data_ptr() == y.data_ptr()", "isinstance(x, nn.Parameter)",
    "x.is_leaf", "x.stride() == (1,)", "x.storage_offset() == 0", "torch.get_default_dtype() == torch.float32", "x._base is None",
    "x.grad is None", "x.grad_fn is None", "x._version == 0", "torch.is_inference_mode_enabled()", "y.requires_grad",
    "x.is_inference()", "x.numel() == 4", "x.layout == torch.strided", "not x.is_conj()", "x.untyped_storage().nbytes() == 16",
)  # fmt: skip

DATA_TESTS = ("{t}.sum() > 0", "bool(({t} > 1).any())", "{t}[0].item() > 0", "torch.equal({t}, {u})")

MODES = (
    "torch.no_grad()", "torch.enable_grad()", "torch.autocast('cpu', dtype=torch.bfloat16)", "torch.set_grad_enabled({b})",
    "torch.inference_mode()", "contextlib.nullcontext()", "torch.autocast('cpu', enabled=False)",
)  # fmt: skip

INPUTS = (
    "X()", "X()", "X(1.0)", "X(0.5)", "X(grad=True)", "X().double()", "torch.arange(6.0)", "torch.arange(4)", "torch.arange(8.0)[::2]",
    "torch.arange(6.0)[1:5]", "nn.Parameter(X())", "X(grad=True) * 2", "X(grad=True)[:]", "torch.ones(2, 2)", "torch.zeros(4)",
    "torch.ones(4).requires_grad_()", "torch.ones(1).expand(4)", "torch.tensor([1.0, -1.0, float('nan'), 0.0])", "X() > 0",
    "torch.ones(4, dtype=torch.bfloat16)", "torch.ones(4, dtype=torch.complex64).conj()",
)  # fmt: skip


ALIASES = (
    "y = x", "x, y = (BASE := torch.arange(6.0))[:4], BASE[2:]", "y = x.view(2, 2).view(4)", "y = x[:]", "x, y = y, x", "y = x.detach()",
    "x = x.detach().clone().requires_grad_(x.is_floating_point())", "y = x.clone()", "x, y = (BASE := torch.arange(8.0))[:4], BASE[4:]",
    "x = y.flip(0)", "y = x.t()", "x.requires_grad_()", "x = x.detach()", "x.data = X(2.0)", "x.resize_(4)", "x.add_(1)", "x.grad = None",
    "x.grad = torch.ones(4)", "x.detach_()",
)  # fmt: skip

CALL_MODES = (
    "torch.no_grad()", "torch.autocast('cpu', dtype=torch.bfloat16)", "torch.inference_mode()", "torch.enable_grad()",
    "torch.random.fork_rng()", "torch.set_grad_enabled(False)", "torch.device('cpu')",
)  # fmt: skip


class Writer:
    """Writes one program. ``random``: what :class:`random.Random` offers."""

    def __init__(self, random: Any) -> None:
        self.random = random
        chosen = random.sample(sorted(PARTS), random.randint(1, 4))
        self.target = self.pick(["function", "function", "model", "model", "method", "partial", "object"])
        if self.target in ("model", "method") and "model" not in chosen:
            chosen.append("model")
        if self.target in ("model", "method") and "closure" in chosen:
            chosen.remove("closure")
        if self.target in ("object", "partial") and "closure" in chosen:
            self.target = "function"
        self.parts = {name: PARTS[name] for name in chosen}
        self.model = "self" if self.target in ("model", "method") else "MODEL"
        self.keeps = self.chance(50)
        self.locals: list[str] = []
        self.lines: list[str] = []

    # ---- choices ----

    def pick(self, choices: Sequence[Any]) -> Any:
        return choices[self.random.randint(0, len(choices) - 1)]

    def chance(self, percent: int) -> bool:
        return self.random.randint(0, 99) < percent

    def read(self, kind: str) -> str:
        """An expression of a part, or ""."""
        found = [text for part in self.parts.values() for text in getattr(part, kind)]
        return self.pick(found) if found else ""

    def number(self) -> str:
        text = self.read("numbers") if self.chance(75) else ""
        return text or (self.pick(NUMBERS) if self.chance(60) else self.pick(["x.dim()", "len(x)", "x.shape[0]"]))

    def tensor(self, depth: int = 0) -> str:
        if self.chance(60) or depth > 1:
            return self.pick(["x", "y", *self.locals, *self.locals])
        text = self.read("tensors")
        return self.fill(text, depth + 1) if text else self.pick(["x", "y"])

    def fill(self, text: str, depth: int = 0) -> str:
        """The template with expressions in its places."""
        while "{t}" in text:
            text = text.replace("{t}", self.tensor(depth), 1)
        while "{u}" in text:
            text = text.replace("{u}", self.tensor(depth + 1), 1)
        while "{n}" in text:
            text = text.replace("{n}", self.number(), 1)
        if "{v}" in text:
            text = text.replace("{v}", self.pick(["x", "y", *self.locals * 3]))
        if "{b}" in text:
            text = text.replace("{b}", self.read("tests") or "x.requires_grad")
        return text

    def input(self) -> str:
        """An argument."""
        return self.pick(INPUTS)

    def literal(self, text: str) -> str:
        while "{n}" in text:
            text = text.replace("{n}", self.pick(NUMBERS), 1)
        return text

    # ---- the body ----

    def say(self, depth: int, text: str) -> None:
        text = text.replace("$", self.model)
        self.lines += ["    " * depth + line for line in text.split("\n")]

    def test(self) -> str:
        if self.chance(6):
            return self.fill(self.pick(DATA_TESTS))
        text = self.read("tests") if self.chance(70) else ""
        text = text or self.pick(TESTS)
        return f"not {text}" if self.chance(20) else text

    def assign(self, depth: int, text: str) -> None:
        text = self.fill(text)
        name = self.pick(self.locals) if self.locals and self.chance(25) else f"t{len(self.locals)}"
        self.say(depth, f"{name} = {text}")
        if self.keeps:
            self.say(depth, f"kept.append({name})")
        if name not in self.locals:
            self.locals.append(name)

    def block(self, depth: int) -> None:
        kept = list(self.locals)
        for _ in range(self.random.randint(1, 2)):
            self.statement(depth)
        self.locals[:] = kept

    def statement(self, depth: int) -> None:
        kind = self.random.randint(0, 99)
        if kind < 25:
            self.assign(depth, self.pick(sorted(OPS)))
        elif kind < 37:
            self.assign(depth, self.pick(VIEWS))
        elif kind < 55:
            self.say(depth, self.fill(self.pick(IN_PLACE)))
        elif kind < 72:
            text = self.read("writes")
            if text:
                self.say(depth, self.fill(text))
            else:
                self.assign(depth, "{t} + {n}")
        elif kind < 84 and depth < 3:
            self.say(depth, f"if {self.test()}:")
            self.block(depth + 1)
            if self.chance(50):
                self.say(depth, "else:")
                self.block(depth + 1)
        elif kind < 90 and depth < 3:
            self.say(depth, f"with {self.fill(self.pick(MODES))}:")
            self.block(depth + 1)
        elif kind < 93 and depth < 3:
            self.say(depth, f"for i in range({self.pick(['2', 'len(x)', '3'])}):")
            self.block(depth + 1)
        elif kind < 95 and depth < 3:
            self.say(depth, "try:")
            self.block(depth + 1)
            self.say(
                depth, f"except {self.pick(['RuntimeError', 'Exception', 'ValueError', '(KeyError, IndexError)'])}:"
            )
            self.block(depth + 1)
        elif kind < 97:
            self.say(
                depth,
                f"if {self.test()}:\n    {self.pick(['raise ValueError(str(s))', self.returns(), 'assert False'])}",
            )
        elif kind < 98:
            self.say(depth, self.pick(["print(len(x))", "random.random()", "torch.manual_seed(3)", "backward(x * 2)"]))
        else:
            self.assign(depth, "sum([{t} * i for i in range(3)])")

    def returns(self) -> str:
        one = self.tensor
        if self.keeps:
            return f"return kept, {one()}"
        return "return " + self.pick(
            [one(), one(), f"{one()} * 1", f"({one()}, {one()})", f"{{'a': {one()}, 'b': {self.number()}}}",
             f"[{one()}, ({one()}, {self.number()})]", f"Pair({one()}, {one()})", f"{one()} + {one()}", f"{one()}.view(-1)[1:3]",
             f"({one()}, {self.test()})"]
        )  # fmt: skip

    def body(self, depth: int) -> list[str]:
        self.lines, self.locals = [], []
        if self.keeps:
            self.say(depth, "kept = []")
        for _ in range(self.random.randint(1, 5)):
            self.statement(depth)
        self.say(depth, self.returns())
        declared = [
            w for w in ("global GAIN", "global STATE", "nonlocal rate") if any(w in line for line in self.lines)
        ]
        lines = []
        for line in self.lines:
            for words in declared:
                line = line.replace(f"{words}; ", "")
            lines.append(line)
        if "+= " in "".join(lines) and "STATE +=" in "".join(lines) and "global STATE" not in declared:
            declared.append("global STATE")
        return ["    " * depth + words for words in declared] + lines

    # ---- the whole ----

    def arguments(self) -> list[str]:
        return ["x", "y", *[name for name in ("s", "xs", "d") if name in self.parts]]

    def write_target(self) -> list[str]:
        names = ", ".join(self.arguments())
        if self.target in ("model", "method"):
            name = "forward" if self.target == "model" else "step"
            return ["class Main(Net):", f"    def {name}(self, {names}):", *self.body(2), ""]
        if "closure" in self.parts:
            return [
                "SEEN = []", "", "def make():", f"    rate, seen = {self.pick(NUMBERS)}, SEEN", f"    def f({names}):", *self.body(2),
                "    def change(to):", "        nonlocal rate", "        rate = to", "    return f, change", "", "f, change = make()",
            ]  # fmt: skip
        if self.target == "object":
            return ["class Call:", f"    def __call__(self, {names}):", *self.body(2), "", "f = Call()"]
        if self.target == "partial":
            return [f"def g(k, {names}):", *self.body(1), "", "f = functools.partial(g, 2.0)"]
        return [f"def f({names}):", *self.body(1)]

    def write_changes(self, lines: list[str]) -> None:
        if self.chance(25):
            return
        for _ in range(self.random.randint(0, 2)):
            text = self.literal(self.read("changes")) or "x = X()"
            lines += ["    with contextlib.suppress(Exception):", *[f"        {line}" for line in text.split("\n")]]
        if self.chance(20):
            lines.append(f"    x = {self.input()}")
        if self.chance(10):
            lines.append(f"    y = {self.input()}")
        if self.chance(20):
            lines.append(f"    with contextlib.suppress(Exception):\n        {self.pick(ALIASES)}")
        if self.chance(15):
            lines.append(self.pick([
                "    if isinstance(out, torch.Tensor) and not out.requires_grad and not INFERENCE:\n        with contextlib.suppress(RuntimeError):\n            out.mul_(2)",
                "    if isinstance(out, torch.Tensor) and out.shape == (4,) and not out.requires_grad:\n        x = out",
                "    if isinstance(out, torch.Tensor) and out.shape == (4,):\n        x = out.detach()",
            ]))  # fmt: skip

    def write_call(self, lines: list[str], first: bool) -> None:
        names = ", ".join(self.arguments())
        target = {"model": "MODEL", "method": "MODEL.step"}.get(self.target, "f")
        call = f"yield {target}, {names}" if first else f"yield {names}"
        if self.chance(18):
            lines += [f"    with {self.pick(CALL_MODES)}:", f"        out = {call}"]
        else:
            lines.append(f"    out = {call}")
        seen = [name for name in ("out", "x", "y", *[part.seen for part in self.parts.values()]) if name]
        error = "error=backward(out), " if self.chance(60) else ""
        lines.append(f"    yield Seen({error}same=out is x, {', '.join(f'{name}={name}' for name in seen)})")

    def program(self) -> str:
        setups, globals_ = [], []
        target = self.write_target()
        for name, part in self.parts.items():
            setups.append(
                self.literal(part.setup).replace("{Model}", "Main" if self.target in ("model", "method") else "Net")
            )
            if name == "gain":
                setups.append("def read_gain():\n    return GAIN * 2")
            globals_ += {"gain": ["GAIN"], "table": ["TABLE"], "numbers": ["NUMBERS"], "items": ["ITEMS"], "config": ["CONFIG"],
                         "slots": ["SLOTS"], "object": ["OBJECT"], "state": ["STATE"], "helper": ["helper"], "queue": ["QUEUE"],
                         "names": ["NAMES"]}.get(name, [])  # fmt: skip
        lines = ["def calls():"]
        if globals_:
            lines.append(f"    global {', '.join(globals_)}")
        grad = "grad=True" if self.chance(20) else ""
        lines += [f"    x, y = X({grad}), X(0.5)", "    s, xs, d = 2.0, [X(1.0), X()], {'t': X(2.0), 'n': 1.0}"]
        if "s" not in self.parts:
            lines[-1] = lines[-1].replace("s, xs, d = 2.0, ", "xs, d = ")
        self.write_call(lines, True)
        for _ in range(self.random.randint(1, 4)):
            self.write_changes(lines)
            self.write_call(lines, False)
        # The result of a view under inference mode is an inference tensor, where eager's is not.
        inference = any("inference_mode()" in line for line in [*target, *lines])
        lines = [line.replace(" and not INFERENCE", " and out.numel() < 0" if inference else "") for line in lines]
        return "\n".join([HEADER, *target, *setups, "", *lines, ""])
