"""Programs of the fourth collection: control flow, exceptions in the middle of a call, caches of what was computed."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import enum
import functools
import itertools
import operator

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
