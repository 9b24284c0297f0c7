"""Programs of the fourth collection: control flow, exceptions in the middle of a call, caches of what was computed."""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import enum
import functools
import itertools
import operator
import sys
import types
import warnings
import weakref

import torch
from torch import nn
from torch.nn import functional as F

from tests.soundness.harness import Seen, program
from tests.soundness.world import X

FLOW = "fourth: flow"
ERRORS = "fourth: errors"
CACHES = "fourth: caches"


# ---- control flow ----


@program(FLOW)
def a_loop_with_break_and_else():
    def f(x, limits):
        for i, limit in enumerate(limits):  # noqa: B007
            if limit < 0:
                continue
            x = x + limit
            if limit > 5:
                break
        else:
            return x * 100, None
        return x, i

    yield f, X(), [1, 2, 9, 4]
    yield X(), [1, 2, 3]
    yield X(), [-1, -2]
    yield X(), []
    yield X(), [9]


@program(FLOW)
def a_tree_is_walked_by_recursion():
    @dataclasses.dataclass
    class Node:
        value: torch.Tensor
        children: list = dataclasses.field(default_factory=list)

    def total(node, depth=0):
        return node.value * (depth + 1) + sum((total(c, depth + 1) for c in node.children), torch.zeros(()))

    tree = Node(torch.tensor(1.0), [Node(torch.tensor(2.0)), Node(torch.tensor(3.0), [Node(torch.tensor(4.0))])])
    yield total, tree
    tree.children[0].value = torch.tensor(20.0)
    yield tree
    tree.children[1].children.append(Node(torch.tensor(5.0)))
    yield tree
    tree.children.reverse()
    yield tree, 2
    yield Node(torch.tensor(0.5))


@program(FLOW)
def try_finally_counts_the_way_out():
    log = []

    def f(x, mode):
        try:
            log.append("in")
            if mode == "early":
                return x + 1
            if mode == "raise":
                raise ValueError(mode)
            x = x * 2
        except ValueError as error:
            log.append(str(error))
            x = x - 1
        else:
            log.append("else")
        finally:
            log.append("out")
        return x * len(log)

    yield f, X(), "plain"
    for mode in ("early", "raise", "plain", "raise"):
        yield X(), mode
        yield Seen(log=log)


@program(FLOW)
def a_match_on_classes_and_shapes():
    @dataclasses.dataclass
    class Scale:
        by: float

    @dataclasses.dataclass
    class Shift:
        by: torch.Tensor
        twice: bool = False

    def apply(x, op):
        match op:
            case Scale(by=0):
                return torch.zeros_like(x)
            case Scale(by):
                return x * by
            case Shift(by, twice=True):
                return x + 2 * by
            case Shift(by=by):
                return x + by
            case {"chain": [first, *rest]}:
                y = apply(x, first)
                return apply(y, {"chain": rest}) if rest else y
            case str() as name if hasattr(x, name):
                return getattr(x, name)()
            case _:
                raise TypeError(op)

    yield apply, X(), Scale(2.0)
    yield X(), Scale(0)
    yield X(), Shift(X(), True)
    yield X(), Shift(X())
    yield X(), {"chain": [Scale(3.0), Shift(X()), "exp"]}
    yield X(), "sin"
    yield X(), "no_such"
    yield X(), Scale(2.5)


@program(FLOW)
def the_walrus_keeps_the_last_match():
    def f(xs, limit):
        if any((found := x).shape[0] > limit for x in xs):
            return found * 2
        return None

    yield f, [torch.ones(2), torch.ones(4)], 3
    yield [torch.ones(2), torch.ones(3)], 3
    yield [torch.ones(5), torch.ones(3)], 1
    yield [torch.ones(2), torch.ones(5)], 3


@program(FLOW)
def arguments_by_star_and_name():
    def inner(x, *rest, scale=1.0, **named):
        y = x * scale
        for r in rest:
            y = y + r
        for name in sorted(named):
            y = y * named[name] if name.startswith("m") else y - named[name]
        return y

    def f(*args, **kwargs):
        first, *others = args
        return inner(first, *others, **{**kwargs, "m1": 2.0})

    yield f, X()
    yield X(), X(1.0)
    yield X(), X(1.0), 3
    yield X(), torch.ones(1)


@program(FLOW)
def a_default_argument_is_shared():
    def f(x, seen=[]):  # noqa: B006
        seen.append(x.shape[0])
        return x * sum(seen)

    yield f, X()
    yield torch.ones(2)
    yield torch.ones(2), [1]
    yield X()
    yield Seen(seen=f.__defaults__)
    f.__defaults__ = ([100],)
    yield X()


@program(FLOW)
def groups_by_key_are_summed():
    def f(items):
        items = sorted(items, key=operator.itemgetter(0))
        return {k: sum(v for _, v in g) for k, g in itertools.groupby(items, key=lambda p: p[0])}

    yield f, [("b", X()), ("a", X(1.0)), ("b", X(2.0))]
    yield [("b", X()), ("c", X(1.0)), ("b", X(2.0))]
    yield [("a", X())]
    yield [("b", X()), ("a", X(1.0)), ("b", X(3.0))]


@program(FLOW)
def an_enumeration_chooses_the_norm():
    class Norm(enum.Enum):
        NONE = enum.auto()
        L1 = enum.auto()
        L2 = enum.auto()

        def __call__(self, x):
            return {Norm.NONE: lambda: x, Norm.L1: lambda: x / x.abs().sum(), Norm.L2: lambda: F.normalize(x, dim=0)}[
                self
            ]()

    class Block(nn.Module):
        norm = Norm.L1

        def forward(self, x):
            return self.norm(x)

    block = Block()
    yield block, X()
    block.norm = Norm.L2
    yield X()
    block.norm = Norm["NONE"]
    yield X()
    del block.norm
    yield X()


@program(FLOW)
def flags_combine():
    class Flag(enum.Flag):
        A = 1
        B = 2
        C = 4

    def f(x, flags):
        if Flag.A in flags:
            x = x + 1
        if flags & (Flag.B | Flag.C):
            x = x * 2
        return x - flags.value

    yield f, X(), Flag.A
    yield X(), Flag.A | Flag.C
    yield X(), Flag.B
    yield X(), Flag(0)


@program(FLOW)
def a_pipeline_of_generators():
    def source(x):
        for i in range(x.shape[0]):
            yield x[i]

    def scaled(rows, by):
        for row in rows:
            yield row * by

    def f(x, by):
        rows = scaled(source(x), by)
        first = next(rows)
        return first, torch.stack(list(rows)) if x.shape[0] > 1 else None

    yield f, torch.ones(3, 2), 2.0
    yield torch.ones(4, 2), 2.0
    yield torch.ones(1, 2), 3.0
    yield torch.ones(0, 2), 3.0


@program(FLOW)
def names_of_layers_are_formatted():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            for i in range(3):
                setattr(self, f"layer{i}", nn.Linear(4, 4))
            self.depth = 3

        def forward(self, x):
            for i in range(self.depth):
                x = getattr(self, f"layer{i}")(x)
            return x, f"{self.depth:02d}/{x.shape[0]!r}"

    net = Net()
    yield net, X()
    net.depth = 2
    yield X()
    net.layer1 = nn.Identity()
    yield X()
    net.depth = 4
    yield X()


@program(FLOW)
def dispatch_by_a_table_of_methods():
    class Model:
        def __init__(self):
            self.table = {"up": self.up, "down": self.down}
            self.rate = 2.0

        def up(self, x):
            return x * self.rate

        def down(self, x):
            return x / self.rate

        def __call__(self, x, how):
            return self.table.get(how, lambda y: y)(x)

    model = Model()
    yield model, X(), "up"
    yield X(), "down"
    yield X(), "sideways"
    model.table["up"] = lambda x: x - 1
    yield X(), "up"
    model.rate = 8.0
    yield X(), "down"


@program(FLOW)
def single_dispatch_on_types():
    @functools.singledispatch
    def show(value):
        return value

    @show.register
    def _(value: list):
        return [show(v) for v in value]

    @show.register
    def _(value: torch.Tensor):
        return value * 2

    yield show, [X(), 3, [X(1.0)]]
    yield [X(), 3, [X(1.0)]]

    @show.register
    def _(value: int):
        return value + 1

    yield [X(), 3, [X(1.0)]]


@program(FLOW)
def a_property_with_a_setter_and_super():
    class Base(nn.Module):
        def __init__(self):
            super().__init__()
            self._temperature = 1.0

        @property
        def temperature(self):
            return self._temperature

        @temperature.setter
        def temperature(self, value):
            self._temperature = max(value, 0.1)

        def forward(self, x):
            return x / self.temperature

    class Cooling(Base):
        def forward(self, x):
            y = super().forward(x)
            self.temperature = self.temperature * 0.5
            return y

    model = Cooling()
    yield model, X()
    for _ in range(5):
        yield X()
    yield Seen(t=model.temperature)
    model.temperature = 4.0
    yield X()


@program(FLOW)
def loops_nested_with_labels_by_exception():
    class Found(Exception):
        def __init__(self, at):
            self.at = at

    def f(grid, value):
        try:
            for i, row in enumerate(grid.tolist()):
                for j, v in enumerate(row):
                    if v == value:
                        raise Found((i, j))
        except Found as found:
            return found.at, grid[found.at] * 10
        return None

    grid = torch.arange(6.0).view(2, 3)
    yield f, grid, 4.0
    yield grid, 5.0
    yield grid + 1, 1.0
    yield grid, 99.0


# ---- exceptions ----


@program(ERRORS)
def an_error_after_a_counter_and_a_buffer():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("total", torch.zeros(4))
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            self.total += x
            if self.calls == 3:
                raise RuntimeError("third call")
            return self.total * 2

    model = Model()
    yield model, X()
    for _ in range(4):
        yield X()
        yield Seen(total=model.total, calls=model.calls)


@program(ERRORS)
def a_kernel_raises_after_an_append():
    log = []

    def f(x, w):
        log.append(x.shape)
        y = x @ w
        log.append("done")
        return y

    yield f, torch.ones(2, 3), torch.ones(3, 4)
    yield torch.ones(2, 3), torch.ones(4, 4)
    yield Seen(log=[str(v) for v in log])
    yield torch.ones(2, 3), torch.ones(3, 4)
    yield torch.ones(5, 3), torch.ones(4, 4)
    yield Seen(log=[str(v) for v in log])


@program(ERRORS)
def an_index_out_of_range_after_a_write():
    table = torch.zeros(3)

    def f(i, v):
        table.add_(1)
        table[i] = v
        return table.sum()

    yield f, torch.tensor([0]), torch.tensor([5.0])
    yield torch.tensor([3]), torch.tensor([5.0])
    yield Seen(table=table)
    yield torch.tensor([2]), torch.tensor([7.0])
    yield Seen(table=table)


@program(ERRORS)
def out_of_memory_is_caught_and_halved():
    class OutOfMemory(RuntimeError):
        pass

    tries = []

    def run(x):
        tries.append(len(x))
        if len(x) > 2:
            raise OutOfMemory(f"{len(x)} rows")
        return x * 2

    def f(x):
        try:
            return run(x)
        except OutOfMemory:
            half = len(x) // 2
            return torch.cat([f(x[:half]), f(x[half:])])

    yield f, torch.arange(4.0)
    yield torch.arange(5.0)
    yield torch.arange(2.0)
    yield torch.arange(8.0)
    yield Seen(tries=tries)


@program(ERRORS)
def an_error_is_chained_and_inspected():
    class Bad(Exception):
        pass

    def inner(x):
        return {"a": x}["b"]

    def f(x):
        try:
            inner(x)
        except KeyError as error:
            raise Bad("no b") from error

    def outer(x):
        try:
            f(x)
        except Bad as error:
            return x + 1, str(error), repr(error.__cause__), error.__context__ is error.__cause__

    yield outer, X()
    yield X(2.0)


@program(ERRORS)
def a_retry_decorator_counts():
    state = {"fails": 2, "tries": 0}

    def retry(n):
        def wrap(g):
            @functools.wraps(g)
            def inner(*args):
                for i in range(n):
                    try:
                        return g(*args)
                    except ConnectionError:
                        if i == n - 1:
                            raise

            return inner

        return wrap

    @retry(3)
    def f(x):
        state["tries"] += 1
        if state["fails"] > 0:
            state["fails"] -= 1
            raise ConnectionError
        return x * state["tries"]

    yield f, X()
    yield Seen(state=state)
    yield X()
    state["fails"] = 3
    yield X()
    yield Seen(state=state)
    yield X()
    yield Seen(state=state)


@program(ERRORS)
def a_nested_module_raises_for_one_shape():
    class Strict(nn.Module):
        def __init__(self):
            super().__init__()
            self.bad = 0

        def forward(self, x):
            if x.ndim != 2:
                self.bad += 1
                raise ValueError(f"expected 2 dimensions, not {x.ndim}")
            return x.sum(1)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.strict, self.lin = Strict(), nn.Linear(3, 3)

        def forward(self, x):
            return self.strict(self.lin(x))

    model = Outer()
    yield model, torch.ones(2, 3)
    yield torch.ones(3)
    yield torch.ones(2, 2, 3)
    yield Seen(bad=model.strict.bad)
    y = yield torch.ones(4, 3)
    y.sum().backward()
    yield Seen(grad=model.lin.weight.grad)
    yield torch.ones(2, 4)


@program(ERRORS)
def a_backward_of_the_users_raises():
    class Guarded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            if x.shape[0] == 3:
                raise ArithmeticError("three")
            return grad * 2

    def f(x):
        return Guarded.apply(x).sum()

    for n in (4, 3, 4):
        x = torch.ones(n, requires_grad=True)
        y = yield (f, x) if n == 4 and not hasattr(f, "begun") else x
        f.begun = True
        try:
            y.backward()
            raised = None
        except ArithmeticError as error:
            raised = str(error)
        yield Seen(grad=x.grad, raised=raised)


@program(ERRORS)
def suppressed_errors_leave_their_effects():
    done = []

    def f(x, table, key):
        with contextlib.suppress(KeyError):
            done.append("before")
            x = x * table[key]
            done.append("after")
        return x + len(done)

    yield f, X(), {"a": 2.0}, "a"
    yield X(), {"a": 2.0}, "b"
    yield X(), {"b": 3.0}, "b"
    yield X(), {}, "b"
    yield Seen(done=done)


@program(ERRORS)
def an_interrupt_in_the_middle():
    state = {"n": 0, "x": torch.zeros(4)}

    class Stop(KeyboardInterrupt):
        pass

    def f(x):
        state["n"] += 1
        state["x"] += x
        if state["n"] == 2:
            raise Stop
        return state["x"] * 1

    def g(x):
        try:
            return f(x)
        except Stop:
            return "stopped"

    yield g, X()
    yield X()
    yield Seen(state=state)
    yield X()
    yield Seen(state=state)


@program(ERRORS)
def the_context_manager_swallows_and_restores():
    class Swapped:
        def __init__(self, module, value):
            self.module, self.value = module, value

        def __enter__(self):
            self.old = self.module.scale
            self.module.scale = self.value

        def __exit__(self, kind, error, trace):
            self.module.scale = self.old
            return kind is ZeroDivisionError

    class Model(nn.Module):
        scale = 1.0

        def forward(self, x, n):
            y = x
            with Swapped(self, 3.0):
                y = x * self.scale
                y = y * (1 / n)
            return y, self.scale

    model = Model()
    yield model, X(), 2
    yield X(), 0
    yield X(), 5
    model.scale = 2.0
    yield X(), 0


# ---- caches ----


@program(CACHES)
def keys_and_values_as_a_list_of_pairs():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(4, 12)

        def forward(self, x, past):
            q, k, v = self.qkv(x).chunk(3, -1)
            if past is not None:
                k, v = torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)
            return F.scaled_dot_product_attention(q, k, v), (k, v)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(2))

        def forward(self, x, past=None):
            present = []
            for layer, p in zip(self.layers, past or [None] * len(self.layers), strict=True):
                x, kv = layer(x, p)
                present.append(kv)
            return x, present

    model = Model().requires_grad_(False)
    out, past = yield model, torch.randn(1, 3, 4)
    for _ in range(5):
        out, past = yield out[:, -1:], past
    yield torch.randn(2, 3, 4)


@program(CACHES)
def a_preallocated_cache_by_index_copy():
    class Cache(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("k", torch.zeros(1, 8, 4), persistent=False)

        def update(self, pos, k):
            self.k.index_copy_(1, pos, k)
            return self.k

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.cache = nn.Linear(4, 4), None

        def forward(self, x, pos):
            k = self.lin(x)
            if self.cache is not None:
                k = self.cache.update(pos, k)
            mask = torch.arange(k.shape[1]) <= pos[:, None]
            return F.scaled_dot_product_attention(x, k, k, attn_mask=mask)

    model = Attention().requires_grad_(False)
    yield model, torch.randn(1, 3, 4), torch.arange(3)
    model.cache = Cache()
    yield torch.randn(1, 3, 4), torch.arange(3)
    for i in range(3, 6):
        yield torch.randn(1, 1, 4), torch.tensor([i])
        yield Seen(k=model.cache.k)
    model.cache.k.zero_()
    yield torch.randn(1, 2, 4), torch.arange(2)
    model.cache = Cache()
    yield torch.randn(1, 2, 4), torch.arange(2)
    yield Seen(k=model.cache.k)


@program(CACHES)
def a_cache_written_by_slices_at_an_int_position():
    class Cached:
        def __init__(self):
            self.buffer, self.pos = torch.zeros(2, 8), 0

        def __call__(self, x):
            n = x.shape[1]
            self.buffer[:, self.pos : self.pos + n] = x
            self.pos += n
            return self.buffer[:, : self.pos].cumsum(1)

    cached = Cached()
    yield cached, torch.ones(2, 3)
    for i in range(4):
        yield torch.full((2, 1), float(i))
        yield Seen(pos=cached.pos, buffer=cached.buffer)
    cached.pos = 2  # rewound
    yield torch.full((2, 2), 9.0)
    yield torch.full((2, 6), 9.0)  # does not fit
    yield Seen(pos=cached.pos, buffer=cached.buffer)


@program(CACHES)
def rotary_tables_grow_with_the_length():
    class Rotary(nn.Module):
        def __init__(self):
            super().__init__()
            self.length, self.cos, self.sin = 0, None, None

        def forward(self, x):
            n = x.shape[0]
            if n > self.length:
                self.length = n
                t = torch.outer(torch.arange(n).float(), torch.tensor([1.0, 0.1]))
                self.cos, self.sin = t.cos(), t.sin()
            a, b = x.chunk(2, -1)
            c, s = self.cos[:n], self.sin[:n]
            return torch.cat([a * c - b * s, a * s + b * c], -1)

    model = Rotary()
    yield model, torch.ones(3, 4)
    for n in (2, 3, 5, 4, 5, 6, 7, 3):
        yield torch.ones(n, 4)
        yield Seen(length=model.length, cos=model.cos)
    model.length = 0
    yield torch.ones(2, 4)
    yield Seen(cos=model.cos)


@program(CACHES)
def masks_are_kept_per_length_in_a_dict():
    class Masks:
        def __init__(self):
            self.kept, self.made = {}, 0

        def get(self, n):
            try:
                return self.kept[n]
            except KeyError:
                self.made += 1
                self.kept[n] = torch.full((n, n), float("-inf")).triu(1)
                return self.kept[n]

    masks = Masks()

    def f(x):
        return (x @ x.T + masks.get(len(x))).softmax(-1) @ x

    yield f, torch.ones(2, 3)
    for n in (3, 2, 4, 3, 4):
        yield torch.ones(n, 3)
    yield Seen(made=masks.made, kept=masks.kept)
    masks.kept[3] = torch.zeros(3, 3)
    yield torch.arange(9.0).view(3, 3)


@program(CACHES)
def a_table_under_lru_cache_that_is_cleared():
    scale = [1.0]

    @functools.lru_cache(maxsize=2)
    def table(n):
        return torch.arange(n) * scale[0]

    def f(x):
        return x + table(len(x))

    yield f, X()
    scale[0] = 5.0
    yield X()
    table.cache_clear()
    yield X()
    yield torch.ones(2)
    yield torch.ones(3)
    scale[0] = 7.0
    yield X()  # was evicted
    yield X()
    yield Seen(info=tuple(table.cache_info())[2:])


@program(CACHES)
def greedy_decoding_grows_the_tokens():
    torch.manual_seed(4)
    embed, head = nn.Embedding(7, 8), nn.Linear(8, 7)

    @torch.no_grad()
    def generate(tokens, n, stop):
        for _ in range(n):
            h = embed(tokens).cumsum(1)
            token = head(h[:, -1]).argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, token], 1)
            if (token == stop).all():
                break
        return tokens

    yield generate, torch.tensor([[1, 2]]), 4, 0
    yield torch.tensor([[3, 4], [5, 6]]), 3, 0
    yield torch.tensor([[1, 2]]), 6, 3
    with torch.no_grad():
        head.bias.copy_(torch.arange(7.0))
    yield torch.tensor([[1, 2]]), 6, 6


@program(CACHES)
def beams_reorder_the_cache():
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.past = []
            self.lin = nn.Linear(4, 4)

        def reorder(self, order):
            self.past = [p.index_select(0, order) for p in self.past]

        def forward(self, x, order=None):
            if order is not None:
                self.reorder(order)
            self.past.append(self.lin(x))
            return torch.stack(self.past).sum(0)

    model = Decoder().requires_grad_(False)
    yield model, torch.randn(3, 4)
    yield torch.randn(3, 4), torch.tensor([2, 0, 0])
    yield torch.randn(3, 4), torch.tensor([1, 1, 2])
    yield Seen(past=model.past)
    yield torch.randn(3, 4)
    yield torch.randn(2, 4), torch.tensor([1, 2])
    yield Seen(past=model.past)
    model.past.clear()
    yield torch.randn(3, 4)


@program(CACHES)
def a_draft_is_verified_and_the_cache_is_cut():
    class Model:
        def __init__(self):
            self.k = torch.zeros(0, 4)

        def crop(self, n):
            self.k = self.k[:n]

        def __call__(self, x, accept):
            self.k = torch.cat([self.k, x])
            y = self.k.cumsum(0)[-len(x) :]
            self.crop(len(self.k) - len(x) + accept)
            return y

    model = Model()
    yield model, torch.randn(3, 4), 2
    for n, a in ((3, 3), (4, 1), (1, 1), (3, 0), (3, 2)):
        yield torch.randn(n, 4), a
        yield Seen(k=model.k)


@program(CACHES)
def a_dynamic_cache_of_transformers():
    from transformers import DynamicCache

    cache = DynamicCache()

    def f(x, cache):
        k, v = cache.update(x, x * 2, 0)
        return F.scaled_dot_product_attention(x, k, v), cache.get_seq_length()

    x = torch.randn(1, 2, 3, 4)
    yield f, x, cache
    for i in range(3):
        yield x[:, :, :1] + i, cache
    cache.crop(-2)
    yield x, cache
    other = copy.deepcopy(cache)
    yield x, other
    yield x[:, :, :2], cache
    yield Seen(a=cache.get_seq_length(), b=other.get_seq_length(), k=cache.layers[0].keys)


@program(CACHES)
def a_static_cache_of_transformers_is_reset():
    from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

    config = LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    cache = StaticCache(config=config, max_cache_len=8)

    def f(ids):
        return model(ids, past_key_values=cache).logits[:, -1]

    yield f, torch.tensor([[1, 2, 3]])
    yield torch.tensor([[4]])
    yield torch.tensor([[5]])
    cache.reset()
    yield torch.tensor([[1, 2, 3]])
    yield torch.tensor([[4]])
    yield Seen(k=cache.layers[0].keys)


@program(CACHES)
def litgpt_decodes_with_its_cache():
    from tests.harness.third_party import import_litgpt

    litgpt = import_litgpt()
    config = litgpt.Config(
        block_size=16, vocab_size=11, padded_vocab_size=11, n_layer=1, n_head=2, n_embd=8, intermediate_size=8
    )
    torch.manual_seed(0)
    model = litgpt.GPT(config).eval().requires_grad_(False)
    yield model, torch.tensor([[1, 2, 3]])
    model.set_kv_cache(batch_size=1)
    yield torch.tensor([[1, 2, 3]]), torch.arange(3)
    for i in range(3, 6):
        yield torch.tensor([[i]]), torch.tensor([i])
    model.max_seq_length = 8
    model.clear_kv_cache()
    model.set_kv_cache(batch_size=2)
    yield torch.tensor([[1, 2], [3, 4]]), torch.arange(2)
    model.clear_kv_cache()
    yield torch.tensor([[1, 2], [3, 4]])


@program(CACHES)
def hidden_state_is_carried_and_detached():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.GRUCell(3, 4)
            self.h = None

        def forward(self, x):
            h = torch.zeros(len(x), 4) if self.h is None else self.h.detach()
            for t in range(x.shape[1]):
                h = self.cell(x[:, t], h)
            self.h = h
            return h.sum()

    net = Net()
    loss = yield net, torch.randn(2, 3, 3)
    loss.backward()
    yield Seen(h=net.h, grad=net.cell.weight_ih.grad)
    for _ in range(2):
        loss = yield torch.randn(2, 2, 3)
        loss.backward()
        yield Seen(h=net.h, grad=net.cell.weight_ih.grad)
    net.h = None
    yield torch.randn(1, 3, 3)


SWAPPED = "fourth: swapped code"


@program(SWAPPED)
def the_class_of_an_object_is_exchanged():
    class Slow:
        def act(self, x):
            return x + 1

    class Fast(Slow):
        def act(self, x):
            return super().act(x) * 10

    o = Slow()

    def f(x):
        return o.act(x)

    yield f, X()
    o.__class__ = Fast
    yield X()
    Slow.act = lambda self, x: x - 1
    yield X()
    Fast.__bases__ = (type("Other", (Slow,), {"act": lambda self, x: x * 0}),)
    yield X()


@program(SWAPPED)
def the_forward_of_an_instance_and_then_of_the_class():
    class Net(nn.Module):
        def forward(self, x):
            return x + 1

    net, other = Net(), Net()

    def f(x):
        return net(x) + other(x)

    yield f, X()
    net.forward = lambda x: x * 100
    yield X()
    Net.forward = lambda self, x: x - 5
    yield X()
    del net.forward
    yield X()


@program(SWAPPED)
def a_function_gets_other_code_and_defaults():
    def helper(x, k=2.0, *, b=1.0):
        return x * k + b

    def other(x, k=2.0, *, b=1.0):
        return x / k - b

    def f(x):
        return helper(x)

    yield f, X()
    helper.__kwdefaults__["b"] = 4.0
    yield X()
    helper.__defaults__ = (5.0,)
    yield X()
    helper.__code__ = other.__code__
    yield X()
    helper.__kwdefaults__ = {"b": 0.0}
    yield X()


@program(SWAPPED)
def a_global_shadows_a_builtin():
    def f(x):
        return x * len(x) + abs(-2)

    yield f, X()
    globals()["len"] = lambda x: 100
    try:
        yield X()
    finally:
        del globals()["len"]
    yield X()


@program(SWAPPED)
def a_module_of_the_users_is_patched():
    lib = types.ModuleType("lib")
    exec("K = 2.0\ndef scale(x):\n    return x * K\n", lib.__dict__)
    sys.modules["fourth_lib"] = lib

    def f(x):
        import fourth_lib

        return fourth_lib.scale(x)

    yield f, X()
    lib.K = 3.0
    yield X()
    lib.scale = lambda x: x - 1
    yield X()
    del lib.scale
    yield X()
    del sys.modules["fourth_lib"]


@program(SWAPPED)
def patched_for_a_while_by_mock():
    from unittest import mock

    class Clock:
        def now(self):
            return 1.0

    clock = Clock()

    def f(x):
        return x + clock.now()

    yield f, X()
    with mock.patch.object(clock, "now", lambda: 5.0):
        yield X()
    yield X()
    with mock.patch.object(Clock, "now", return_value=7.0) as m:
        yield X()
        yield X()
        yield Seen(calls=m.call_count)
    yield X()
    with mock.patch.dict(f.__globals__, {"F": None}):
        yield X()


@program(SWAPPED)
def a_cell_is_emptied_and_filled():
    def make():
        k = 2.0

        def f(x):
            return x * k

        def put(value):
            nonlocal k
            k = value

        def drop():
            nonlocal k
            del k

        return f, put, drop

    f, put, drop = make()
    yield f, X()
    put(3.0)
    yield X()
    drop()
    yield X()  # NameError
    put(torch.ones(4))
    yield X()


@program(SWAPPED)
def properties_and_descriptors_are_added_later():
    class Config:
        def __init__(self):
            self.scale = 2.0

    config = Config()

    def f(x):
        return x * config.scale * getattr(config, "extra", 1.0)

    yield f, X()
    Config.scale = property(lambda self: 9.0)
    yield X()
    Config.extra = 4.0
    yield X()
    Config.__getattr__ = lambda self, name: 7.0
    del Config.extra
    yield X()
    del Config.scale
    yield X()


@program(SWAPPED)
def operators_of_a_user_class_change():
    class Money:
        def __init__(self, v):
            self.v = v

        def __mul__(self, x):
            return x * self.v

        def __bool__(self):
            return self.v > 1

        def __len__(self):
            return 3

        def __contains__(self, x):
            return x == self.v

    m = Money(2.0)

    def f(x):
        y = m * x
        if m:
            y = y + len(m)
        return y, 2.0 in m

    yield f, X()
    m.v = 1.0
    yield X()
    Money.__mul__ = lambda self, x: x - self.v
    yield X()
    del Money.__bool__
    yield X()
    Money.__len__ = lambda self: 0
    yield X()


# ---- exceptions, again ----


@program(ERRORS)
def an_error_at_the_second_size_after_effects():
    log = []

    class Strict(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            log.append(len(x))
            self.seen += len(x)
            if len(x) == 5:
                raise ValueError(f"five after {log[:-1]}")
            return x * self.seen

    model = Strict()
    yield model, torch.ones(3)
    for n in (4, 5, 6, 5, 7, 5):
        yield torch.ones(n)
        yield Seen(seen=model.seen, log=log)


@program(ERRORS)
def effects_before_and_after_a_failing_kernel_in_a_try():
    log = []

    def f(x, w):
        log.append("a")
        try:
            y = x @ w
            log.append("b")
        except RuntimeError as error:
            log.append(type(error).__name__)
            y = x * 0
        finally:
            log.append("c")
        return y.sum() + len(log)

    yield f, torch.ones(2, 3), torch.ones(3, 2)
    yield torch.ones(2, 3), torch.ones(2, 2)
    yield torch.ones(2, 3), torch.ones(3, 2)
    yield torch.ones(4, 2), torch.ones(2, 2)
    yield torch.ones(4, 2), torch.ones(3, 2)
    yield Seen(log=log)


@program(ERRORS)
def the_message_names_values_and_shapes():
    class Shape(Exception):
        pass

    def f(x):
        if x.shape[-1] != 4:
            raise Shape(f"got {tuple(x.shape)}, {x.dtype}, {x.sum().item():.1f}")
        return x * 2

    def g(x):
        try:
            return f(x), None
        except Shape as error:
            return None, str(error)

    yield g, X()
    yield torch.ones(3)
    yield torch.ones(3) * 2
    yield torch.ones(2, 5).double()
    yield X()


@program(ERRORS)
def groups_of_exceptions_are_split():
    def f(x, kinds):
        errors, out = [], []
        for k in kinds:
            try:
                if k:
                    raise k("no")
                out.append(x)
            except (KeyError, ValueError) as error:
                errors.append(error)
        try:
            if errors:
                raise ExceptionGroup("several", errors)
        except* KeyError as group:
            out.append(x * len(group.exceptions))
        return sum(out, torch.zeros(4))

    yield f, X(), (None, KeyError)
    yield X(), (None, None)
    yield X(), (KeyError, KeyError, None)
    yield X(), (KeyError, ValueError)
    yield X(), (TypeError,)


@program(ERRORS)
def a_generator_is_closed_in_the_middle():
    log = []

    def rows(x):
        try:
            for i in range(len(x)):
                yield x[i] * 2
        except GeneratorExit:
            log.append("closed")
            raise
        finally:
            log.append("end")

    def f(x, n):
        out = []
        it = rows(x)
        for row in it:
            out.append(row)
            if len(out) == n:
                break
        it.close()
        return torch.stack(out), len(log)

    yield f, torch.ones(3, 2), 2
    yield torch.ones(3, 2), 5
    yield torch.ones(3, 2), 1
    yield torch.ones(0, 2), 1
    yield Seen(log=log)


@program(ERRORS)
def recursion_goes_too_deep():
    def f(x, n):
        return x if n == 0 else f(x + 1, n - 1)

    def g(x, n):
        try:
            return f(x, n)
        except RecursionError:
            return None

    yield g, X(), 3
    yield X(), 10**6
    yield X(), 5


@program(ERRORS)
def the_state_is_rolled_back_by_the_user():
    class Transaction:
        def __init__(self, store):
            self.store = store

        def __enter__(self):
            self.saved = dict(self.store)
            return self.store

        def __exit__(self, kind, value, trace):
            if kind is not None:
                self.store.clear()
                self.store.update(self.saved)

    store = {"n": 0, "x": torch.zeros(4)}

    def f(x, limit):
        with Transaction(store) as s:
            s["n"] += 1
            s["x"] = s["x"] + x
            if s["n"] > limit:
                raise ValueError(s["n"])
        return s["x"] * s["n"]

    yield f, X(), 2
    for limit in (2, 2, 9, 3):
        yield X(), limit
        yield Seen(store=store)


@program(ERRORS)
def a_hook_of_backward_raises_once():
    state = {"armed": True}
    lin = nn.Linear(4, 4)

    def guard(grad):
        if state["armed"]:
            raise FloatingPointError("armed")
        return grad * 2

    def f(x):
        y = lin(x)
        if y.requires_grad:
            y.register_hook(guard)
        return y.sum()

    for armed in (True, False, True):
        state["armed"] = armed
        loss = yield (f, X()) if armed and lin.weight.grad is None and "begun" not in state else X()
        state["begun"] = True
        try:
            loss.backward()
            error = None
        except FloatingPointError as e:
            error = str(e)
        yield Seen(grad=lin.weight.grad, raised=error)


@program(ERRORS)
def an_error_between_two_writes_to_an_argument():
    def f(x, i, table):
        x.add_(1)
        y = table[i]
        x.mul_(y.sum())
        return x

    x = X()
    yield f, x, 0, [torch.ones(2), torch.ones(3)]
    yield Seen(x=x)
    yield x, 5, [torch.ones(2)]
    yield Seen(x=x)
    yield x, torch.tensor(1), [torch.ones(2), torch.ones(3)]
    yield Seen(x=x)
    yield x, "a", {}
    yield Seen(x=x)
    yield x, 0, [torch.ones(2, 2)]
    yield Seen(x=x)


# ---- caches, again ----


@program(CACHES)
def a_sliding_window_cache_wraps_round():
    class Window:
        def __init__(self, size):
            self.k, self.n = torch.zeros(size, 2), 0

        def push(self, x):
            i = self.n % len(self.k)
            self.k[i] = x
            self.n += 1
            return self.k[: min(self.n, len(self.k))]

    window = Window(3)

    def f(x):
        return window.push(x).sum(0) + x

    yield f, torch.ones(2)
    for i in range(7):
        yield torch.full((2,), float(i))
        yield Seen(k=window.k, n=window.n)


@program(CACHES)
def pages_of_a_cache_are_handed_out():
    class Paged:
        def __init__(self):
            self.pages, self.free, self.table = torch.zeros(4, 2, 3), [3, 2, 1, 0], {}

        def append(self, seq, x):
            pages, n = self.table.setdefault(seq, ([], 0))
            if n % 2 == 0:
                if not self.free:
                    raise MemoryError("no page")
                pages.append(self.free.pop())
            self.pages[pages[n // 2], n % 2] = x
            self.table[seq] = (pages, n + 1)
            return self.pages[torch.tensor(pages)].flatten(0, 1)[: n + 1]

        def release(self, seq):
            pages, _ = self.table.pop(seq)
            self.free.extend(pages)

    cache = Paged()

    def f(x, seq, done=False):
        y = cache.append(seq, x).mean(0)
        if done:
            cache.release(seq)
        return y

    yield f, torch.ones(3), "a"
    calls = [("b", False), ("a", False), ("a", False), ("b", True), ("c", False), ("d", False)]
    for i, (seq, done) in enumerate(calls):
        yield torch.full((3,), float(i)), seq, done
        yield Seen(free=cache.free, pages=cache.pages, table={k: (list(p), n) for k, (p, n) in cache.table.items()})
    yield torch.ones(3), "e"
    yield Seen(free=cache.free)


@program(CACHES)
def a_prefix_cache_shares_and_copies_on_write():
    store = {}

    def f(tokens, x):
        key = tuple(tokens)
        for n in range(len(key), 0, -1):
            if key[:n] in store:
                base = store[key[:n]].clone()
                break
        else:
            n, base = 0, torch.zeros(4)
        for t in key[n:]:
            base += x * t
        store[key] = base
        return base * 1, n

    yield f, [1, 2], X()
    yield [1, 2, 3], X()
    yield [1, 2, 3], X(2.0)
    yield [4], X()
    store.pop((1, 2, 3))
    yield [1, 2, 3], X(1.0)
    yield Seen(store={str(k): v for k, v in store.items()})


@program(CACHES)
def a_sliding_window_layer_of_transformers():
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicSlidingWindowLayer

    cache = DynamicCache()
    cache.layers = [DynamicSlidingWindowLayer(sliding_window=3)]

    def f(x, cache):
        k, v = cache.update(x, x + 1, 0)
        return (k * v).sum(2)

    x = torch.arange(16.0).view(1, 2, 2, 4)
    yield f, x, cache
    for i in range(4):
        yield x[:, :, :1] + i, cache
        yield Seen(k=cache.layers[0].keys, n=cache.get_seq_length())


@program(CACHES)
def gpt2_generates_greedily_with_its_cache():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=13, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(config).eval().requires_grad_(False)

    def f(ids, n):
        past, out = None, []
        for _ in range(n):
            result = model(ids, past_key_values=past, use_cache=True)
            past = result.past_key_values
            ids = result.logits[:, -1:].argmax(-1)
            out.append(ids)
        return torch.cat(out, 1), past.get_seq_length()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield f, torch.tensor([[1, 2, 3]]), 3
        yield torch.tensor([[1, 2], [3, 4]]), 2
        model.lm_head.weight.mul_(-1)
        yield torch.tensor([[1, 2, 3]]), 3


@program(CACHES)
def gradients_are_cached_by_micro_batch():
    class Accumulate:
        def __init__(self):
            self.w, self.sum, self.n = torch.ones(4, requires_grad=True), torch.zeros(4), 0

        def __call__(self, x, every):
            loss = (self.w * x).square().sum()
            self.n += 1
            self.sum = self.sum + 2 * (self.w * x * x).detach()
            if self.n % every == 0:
                with torch.no_grad():
                    self.w -= 0.01 * self.sum / every
                self.sum = torch.zeros(4)
            return loss

    a = Accumulate()
    yield a, X(), 2
    for i in range(4):
        yield X(float(i)), 2
        yield Seen(w=a.w, sum=a.sum, n=a.n)


@program(CACHES)
def a_cache_keyed_by_tensors_identity():
    cache = {}

    def f(x, w):
        if w not in cache:
            cache[w] = w.exp()
        return x * cache[w]

    a, b = X(), X(1.0)
    yield f, X(), a
    yield X(), b
    yield X(), a
    a.zero_()
    yield X(), a
    yield Seen(values=list(cache.values()))


@program(CACHES)
def a_weak_cache_of_modules():
    cache = weakref.WeakKeyDictionary()

    def f(m, x):
        if m not in cache:
            cache[m] = len(cache) + 1
        return m(x) * cache[m]

    a, b = nn.Identity(), nn.Identity()
    yield f, a, X()
    yield b, X()
    yield a, X()
    c = nn.Identity()
    yield c, X()
    yield Seen(n=len(cache))


@program(CACHES)
def the_key_is_a_shape_dtype_and_mode():
    kept, made = {}, []

    def f(x):
        key = (x.shape, x.dtype, x.device, torch.is_grad_enabled(), x.requires_grad)
        if key not in kept:
            made.append(str(key[1]))
            kept[key] = torch.ones_like(x, requires_grad=False) * len(kept)
        return x + kept[key]

    yield f, X()
    yield X().double()
    with torch.no_grad():
        yield X()
    yield X(grad=True)
    yield torch.ones(2, 2)
    yield X()
    yield Seen(made=made, values=list(kept.values()))


@program(FLOW)
def a_state_machine_of_strings():
    class Machine:
        def __init__(self):
            self.state, self.trail = "idle", []

        def on_idle(self, x):
            self.state = "busy" if len(x) > 2 else "idle"
            return x

        def on_busy(self, x):
            self.state = "done"
            return x * 2

        def on_done(self, x):
            self.state = "idle"
            return x - 1

        def __call__(self, x):
            self.trail.append(self.state[0])
            return getattr(self, f"on_{self.state}")(x)

    m = Machine()
    yield m, X()
    for n in (4, 4, 2, 4, 4, 3, 1):
        yield torch.ones(n)
        yield Seen(state=m.state, trail="".join(m.trail))


@program(FLOW)
def expressions_are_evaluated():
    env = {"k": 2.0}

    def f(x, text):
        return eval(text, {"x": x, "torch": torch, **env})

    yield f, X(), "x * k"
    yield X(), "torch.sin(x) + k"
    env["k"] = 3.0
    yield X(), "x * k"
    yield X(), "x *"


@program(FLOW)
def a_chain_of_comprehensions_with_conditions():
    def f(xs, names):
        table = {n: x * i for i, (n, x) in enumerate(zip(names, xs, strict=False)) if not n.startswith("_")}
        flat = [v for row in [[x, x + 1] for x in xs] for v in row]
        best = {k: v * 1 for k, v in sorted(table.items(), key=lambda p: p[0], reverse=True)}
        return best, torch.stack(flat).sum(0), {len(n) for n in names}

    yield f, [X(), X(1.0)], ["b", "a"]
    yield [X(), X(1.0)], ["_b", "a"]
    yield [X(), X(1.0), X()], ["bb", "a", "c"]
    yield [X()], ["q", "unused"]


@program(FLOW)
def functions_are_composed_by_reduce():
    ops = [torch.sin, lambda x: x * 2]

    def f(x):
        return functools.reduce(lambda y, op: op(y), ops, x)

    yield f, X()
    ops.append(torch.neg)
    yield X()
    ops[0] = torch.cos
    yield X()
    ops.clear()
    yield X()


@program(FLOW)
def the_same_class_defined_twice():
    def make(k):
        class Layer(nn.Module):
            def forward(self, x):
                return x * k

        return Layer

    world = {"cls": make(2.0)}

    def f(x):
        return world["cls"]()(x)

    yield f, X()
    world["cls"] = make(3.0)
    yield X()
    world["cls"].forward = lambda self, x: x + 50
    yield X()


@program(FLOW)
def a_named_tuple_and_a_dataclass_come_back():
    Pair = collections.namedtuple("Pair", "a b", defaults=[None])

    @dataclasses.dataclass
    class Out:
        loss: torch.Tensor
        extra: dict = dataclasses.field(default_factory=dict)

        def __post_init__(self):
            self.extra["n"] = len(self.loss)

    def f(x):
        return Pair(x * 2), Out(x + 1), Pair(a=1, b=x)._replace(a=2), dataclasses.asdict(Out(x))

    yield f, X()
    yield torch.ones(2)
    x = X(grad=True)
    pair, out, *_ = yield x
    (pair.a.sum() + out.loss.sum()).backward()
    yield Seen(grad=x.grad)


IDENTITY = "fourth: identity"


@program(IDENTITY)
def an_argument_that_is_the_enclosed_tensor():
    a, b = X(), X(1.0)

    def f(w):
        return w * 2 if w is a else w * 3

    yield f, b
    yield a
    yield b
    yield a


@program(IDENTITY)
def a_module_asks_whether_it_got_its_own_buffer():
    class Held(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("b", X())
            self.w = nn.Parameter(X())

        def own(self, x):
            return x is self.b or any(x is p for p in self.parameters())

        def forward(self, x):
            return x * (2 if self.own(x) else 3)

    model = Held()
    yield model, X()
    yield model.b
    y = yield model.w
    y.sum().backward()
    yield Seen(grad=model.w.grad)
    yield X()
    model.b = X(1.0)
    yield model.b


@program(IDENTITY)
def the_last_input_is_remembered_by_identity():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.memory, self.runs = None, None, 0

        def forward(self, x, q):
            if x is not self.last:
                self.last, self.memory = x, x.cumsum(0)
                self.runs += 1
            return self.memory * q

    a, b = X(), X(2.0)
    model = Encoder()
    yield model, a, X()
    for x in (a, b, b, a, a, b):
        yield x, X()
        yield Seen(runs=model.runs, same=model.last is x)


@program(IDENTITY)
def a_table_keyed_by_tensors_is_asked():
    a, b = X(), X(1.0)
    table = {a: 2.0}

    def f(w):
        return w * table.get(w, 1.0)

    yield f, a
    yield b
    table[b] = 5.0
    yield b
    yield a


@program(IDENTITY)
def a_set_collects_its_arguments():
    seen = set()

    def f(w):
        known = w in seen
        seen.add(w)
        return w * len(seen), known

    a, b = X(), X(1.0)
    yield f, a
    for w in (b, a, b, X()):
        yield w
        yield Seen(n=len(seen), held=[a in seen, b in seen])


@program(IDENTITY)
def results_are_sets_and_keyed_by_tensors():
    def f(x):
        y = x + 1
        return {y: "y"}, {y}, frozenset([(1, x)])

    table, group, frozen = yield f, X()
    yield Seen(key=next(iter(table)), member=next(iter(group)), pair=next(iter(frozen)))
    table, group, frozen = yield X(1.0)
    yield Seen(key=next(iter(table)), member=next(iter(group)), pair=next(iter(frozen)))


@program(IDENTITY)
def tensors_computed_in_the_call_are_keys_of_a_memo():
    memo = {}

    def f(x):
        y = x * 2
        memo[y] = len(memo)
        return y + len(memo)

    yield f, X()
    yield X()
    yield X(1.0)
    yield Seen(values=list(memo.values()), keys=list(memo))


@program(IDENTITY)
def a_dict_keyed_by_tensors_is_passed():
    def f(x, weights):
        return x * sum(k.sum() * v for k, v in weights.items())

    a, b = X(), X(1.0)
    yield f, X(), {a: 1.0}
    yield X(), {b: 1.0}
    a.add_(1)
    yield X(), {a: 1.0, b: 2.0}
    yield X(), {a: 1.0}
    yield X(), {torch.tensor(2.0): 1.0}
    yield X(), {torch.tensor(2.0): 1.0}


@program(IDENTITY)
def optimizer_state_is_keyed_by_parameters():
    params = [nn.Parameter(X()), nn.Parameter(X(1.0))]
    state = collections.defaultdict(dict)

    @torch.no_grad()
    def step(g):
        for p in params:
            s = state[p]
            s["m"] = s.get("m", torch.zeros_like(p)) * 0.5 + g
            s["t"] = s.get("t", 0) + 1
            p.sub_(s["m"] / s["t"])

    yield step, X()
    for i in range(3):
        yield X(float(i))
        yield Seen(params=params, state=list(state.values()), own=[p in state for p in params])
    params.append(nn.Parameter(X(5.0)))
    yield X()
    yield Seen(params=params, n=len(state))


@program(IDENTITY)
def the_list_that_is_passed_is_its_own():
    log = []

    def f(x, out):
        out.append(x.sum())
        return x * len(log)

    other = []
    yield f, X(), other
    yield X(), log
    yield X(), log
    yield X(), other
    yield Seen(log=log, other=other)


@program(IDENTITY)
def the_cache_that_is_passed_is_the_layers_own():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.cache = {"k": torch.zeros(1)}

        def forward(self, x):
            self.cache["k"] = torch.cat([self.cache["k"], x])
            return x + self.cache["k"].sum()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Layer()

        def forward(self, x, cache):
            return self.layer(x) * len(cache["k"])

    model = Model()
    yield model, X(), {"k": torch.zeros(1)}
    for _ in range(3):
        yield X(), model.layer.cache
        yield Seen(k=model.layer.cache["k"])
    yield X(), {"k": torch.zeros(1)}


@program(IDENTITY)
def one_object_in_two_places():
    class State:
        def __init__(self, k):
            self.k, self.x = k, X()

    world = State(2.0)

    def f(y, s, t):
        s.k = s.k + 1
        s.x = s.x + y
        return t.x * t.k + world.x * world.k

    a, b = State(2.0), State(2.0)
    yield f, X(), a, b
    yield X(), a, a
    yield X(), b, a
    yield X(), world, a
    yield X(), a, world
    yield Seen(a=a, b=b, world=world)


@program(IDENTITY)
def one_list_for_two_arguments():
    def f(x, a, b):
        a.append(x)
        return torch.stack(b).sum(0) if b else x * 0

    a, b = [X()], [X(1.0)]
    yield f, X(), a, b
    yield X(), a, a
    yield X(), b, a
    yield X(), b, b
    yield Seen(a=a, b=b)


@program(IDENTITY)
def a_deque_is_passed_and_enclosed():
    recent = collections.deque(maxlen=2)

    def f(x, q):
        q.append(x)
        return sum(recent, torch.zeros(4)) + len(q)

    other = collections.deque(maxlen=2)
    yield f, X(), other
    yield X(), recent
    yield X(1.0), recent
    yield X(2.0), other
    yield Seen(recent=list(recent), other=list(other))


@program(IDENTITY)
def a_registry_of_objects_is_asked_for_an_argument():
    class Adapter:
        def __init__(self, k):
            self.k, self.shift = k, X()

    a, b, c = Adapter(2.0), Adapter(2.0), Adapter(2.0)
    weights, frozen, order = {a: 10.0}, {b}, [c]

    def f(x, o):
        y = x * weights.get(o, 1.0) + o.shift * o.k
        return y * (2 if o in frozen else 1), o in order

    yield f, X(), c
    for o in (a, b, c, a, Adapter(2.0)):
        yield X(), o


@program(IDENTITY)
def an_argument_with_a_finalizer():
    ended = []

    class Handle:
        def __init__(self, x):
            self.x, self.uses = x, 0

        def __del__(self):
            ended.append(self.uses)

    def f(x, h):
        h.uses += 1
        return x * h.x * h.uses

    a, b = Handle(X()), Handle(X(2.0))
    yield f, X(), a
    for h in (a, b, a):
        yield X(), h
        yield Seen(ended=ended, uses=(a.uses, b.uses))
