"""Side effects, values that decide, control flow, exceptions, caches."""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
import time
import weakref

import torch
import torch.nn.functional as F
from torch import nn

from tests.soundness.harness import Seen, program

IMPURE = "third: impurity"
DATA = "third: data dependence"
FLOW = "third: control flow"
ERRORS = "third: exceptions"
CACHES = "third: caches"

X = torch.linspace(-2, 2, 12).reshape(3, 4)


@program(IMPURE)
def prints_of_shapes_and_values():
    verbose = True

    def f(v):
        print("shape", tuple(v.shape), end="; ")
        out = v.sum()
        if verbose:
            print(f"sum {out.item():.3f}", v.dtype)
        return out

    yield f, X
    yield X + 1
    verbose = False
    yield X
    verbose = True
    yield X.double()


@program(IMPURE)
def print_of_constants_only():
    name = "one"

    def f(v):
        print("in", name)
        return v * 2

    yield f, X
    yield X
    name = "two"
    yield X


@program(IMPURE)
def a_clock_that_is_patched():
    old, now = time.time, 100.0
    time.time = lambda: now
    try:

        def f(v):
            return v * time.time()

        yield f, X
        now = 5.0
        yield X
        time.time = lambda: now * 2
        yield X
    finally:
        time.time = old


@program(IMPURE)
def an_elapsed_time_recorded():
    spans = []

    def f(v):
        start = time.perf_counter()
        out = v.exp()
        spans.append(time.perf_counter() - start)
        return out

    yield f, X
    yield X
    yield Seen(n=len(spans), distinct=len(set(spans)))
    yield X
    yield Seen(n=len(spans), distinct=len(set(spans)))


@program(IMPURE)
def files_written_and_read():
    with tempfile.TemporaryDirectory() as d:
        path = os.path.join(d, "scale.txt")
        with open(path, "w") as out:
            out.write("2.0")

        def f(v):
            with open(path) as src:
                scale = float(src.read())
            return v * scale

        yield f, X
        with open(path, "w") as out:
            out.write("3.0")
        yield X
        os.remove(path)
        yield X


@program(IMPURE)
def a_log_file_appended_to():
    with tempfile.TemporaryDirectory() as d:
        path = os.path.join(d, "log.txt")

        def f(v):
            with open(path, "a") as out:
                out.write(f"{v.shape[0]}\n")
            return v.sum()

        def lines():
            with open(path) as src:
                return src.read()

        yield f, X
        yield X
        yield Seen(t=lines())
        yield torch.ones(5)
        yield Seen(t=lines())


@program(IMPURE)
def an_environment_variable():
    def f(v):
        return v * float(os.environ.get("MY_SCALE", "1")) + ("MY_FLAG" in os.environ)

    try:
        yield f, X
        os.environ["MY_SCALE"] = "4"
        yield X
        os.environ["MY_FLAG"] = ""
        yield X
        del os.environ["MY_SCALE"]
        yield X
    finally:
        os.environ.pop("MY_SCALE", None)
        os.environ.pop("MY_FLAG", None)


@program(IMPURE)
def an_itertools_counter():
    ids = itertools.count()

    def f(v):
        return v * next(ids)

    yield f, X
    yield X
    next(ids)
    yield X
    yield Seen(n=next(ids))


@program(IMPURE)
def an_iterator_consumed_across_calls():
    it = iter([X, X + 1, X + 2])
    z = zip([1.0, 2.0, 3.0], "abc", strict=True)

    def f(v):
        return v * next(it, torch.zeros(())), next(z, None)

    yield f, X
    yield X
    yield X
    yield X


@program(IMPURE)
def a_callback_given_as_argument():
    seen = []

    def f(v, callback):
        h = v * 2
        callback(h)
        return h + 1

    yield f, X, seen.append
    yield X, seen.append
    yield Seen(s=seen)
    yield X, lambda h: seen.append(h.sum().item())
    yield X, print
    yield Seen(s=seen)


@program(IMPURE)
def ids_hashes_and_weak_references():
    a, b = X.clone(), X.clone()
    names = {id(a): 2.0}
    table = weakref.WeakKeyDictionary({a: 5.0})

    def f(v):
        return v * names.get(id(v), 1.0) + table.get(v, 0.0)

    yield f, a
    yield b
    names[id(b)] = 3.0
    yield b
    table[b] = 1.0
    yield b
    yield a


# Data dependence.


@program(DATA)
def an_item_that_scales():
    def f(v):
        k = v.abs().max().item()
        return v / k if k > 1 else v, k

    yield f, X
    yield X * 0.1
    yield X * 10
    yield X * float("nan")
    yield X * 0


@program(DATA)
def a_while_loop_until_converged():
    def f(v, tol):
        n = 0
        while v.norm() > tol and n < 20:
            v = v * 0.5
            n += 1
        return v, n

    yield f, X, 1.0
    yield X * 4, 1.0
    yield X, 0.01
    yield X, 100.0


@program(DATA)
def nonzero_unique_and_masked_select():
    def f(v):
        return v.nonzero(), v.unique(return_counts=True), v[v > 0].sum(), torch.where(v > 1), v.masked_select(v < 0)

    yield f, X.round()
    yield X
    yield X * 0
    yield torch.zeros(0)


@program(DATA)
def an_if_on_any_and_all():
    def f(v):
        if (v > 0).all():
            return v.log()
        if torch.isnan(v).any():
            return torch.nan_to_num(v)
        return v.relu() if v.sum() else -v

    p = (X + 3).requires_grad_()
    out = yield f, p
    out.sum().backward()
    out = yield (X.clone() * float("nan"))
    q = (X + 1).requires_grad_()
    out = yield q
    out.sum().backward()
    yield Seen(p=p, q=q)
    yield X


@program(DATA)
def argmax_indexes_a_module_list():
    experts = nn.ModuleList([nn.Linear(4, 2) for _ in range(4)])

    def f(v):
        return experts[v.mean(0).argmax()](v), experts[int(v[0].argmin())](v)

    out = yield f, X
    out[0].sum().backward()
    out = yield -X
    (out[0].sum() + out[1].sum()).backward()
    yield Seen(e=experts)
    yield X[:, [3, 0, 1, 2]]


@program(DATA)
def a_mixture_of_experts_routed_by_topk():
    gate = nn.Linear(4, 3)
    experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

    def f(v):
        w, i = gate(v).softmax(-1).topk(2)
        out = torch.zeros_like(v)
        for e, expert in enumerate(experts):
            rows, slot = torch.where(i == e)
            if rows.numel() == 0:
                continue
            out.index_add_(0, rows, expert(v[rows]) * w[rows, slot, None])
        return out

    p = X.clone().requires_grad_()
    out = yield f, p
    out.sum().backward()
    yield Seen(p=p, g=gate, e=experts)
    q = (-X * 3).requires_grad_()
    out = yield q
    out.square().sum().backward()
    yield Seen(q=q, g=gate, e=experts)
    yield X[:1]


@program(DATA)
def lists_of_values_index_a_table():
    words = ["zero", "one", "two"]

    def f(i):
        return [words[k] for k in i.tolist()], i.numpy().sum().item(), {int(k): i[k] for k in i}

    yield f, torch.tensor([0, 2, 1])
    yield torch.tensor([0, 1])
    words[1] = "uno"
    yield torch.tensor([1])
    yield torch.tensor([], dtype=torch.long)


@program(DATA)
def greedy_decoding_until_the_end_token():
    emb, head = nn.Embedding(6, 4), nn.Linear(4, 6)

    @torch.no_grad()
    def f(tokens, limit):
        for _ in range(limit):
            nxt = head(emb(tokens).mean(0)).argmax()
            tokens = torch.cat([tokens, nxt[None]])
            if nxt == 2:
                break
        return tokens

    yield f, torch.tensor([1]), 5
    yield torch.tensor([4, 4]), 5
    with torch.no_grad():
        head.bias[2] = 100
    yield torch.tensor([1]), 5
    yield torch.tensor([1]), 0


@program(DATA)
def packed_sequences_by_lengths():
    rnn = nn.GRU(4, 4, batch_first=True)

    def f(v, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(v, lengths, batch_first=True, enforce_sorted=False)
        out, h = rnn(packed)
        return nn.utils.rnn.pad_packed_sequence(out, batch_first=True)[0], h

    v = torch.randn(3, 5, 4)
    out = yield f, v, torch.tensor([5, 2, 3])
    out[0].sum().backward()
    yield Seen(r=rnn)
    yield v, torch.tensor([1, 2, 2])
    yield v, torch.tensor([0, 2, 2])


@program(DATA)
def sizes_that_come_from_values():
    def f(n, v):
        k = int(n.sum())
        return torch.arange(k) * 2, v.repeat_interleave(n, 0), v.split(n.tolist()), torch.zeros(k, k).fill_diagonal_(1)

    yield f, torch.tensor([1, 2]), X
    yield torch.tensor([2, 1]), X
    yield torch.tensor([0, 3]), X
    yield torch.tensor([1, 1]), X


@program(DATA)
def a_loss_skipped_when_not_finite():
    model = nn.Linear(4, 1)
    skipped = []

    def f(v):
        loss = model(v).square().mean()
        if not torch.isfinite(loss):
            skipped.append(float(loss))
            return None
        return loss

    out = yield f, X
    out.backward()
    yield Seen(m=model)
    yield X * float("inf")
    out = yield X
    out.backward()
    yield Seen(m=model, s=skipped)


@program(DATA)
def a_binary_search_over_a_threshold():
    def f(v, k):
        lo, hi = v.min(), v.max()
        for _ in range(8):
            mid = (lo + hi) / 2
            if (v > mid).sum() > k:
                lo = mid
            else:
                hi = mid
        return v.clamp(min=hi), float(hi)

    yield f, X, 3
    yield X, 6
    yield X.flip(0), 3
    yield X * X, 0


# Control flow.


@program(FLOW)
def a_generator_function_inside():
    n = 3

    def chunks(v):
        for i in range(n):
            got = yield v * i
            if got is not None:
                v = v + got

    def f(v):
        g = chunks(v)
        out = [next(g)]
        with contextlib.suppress(StopIteration):
            while True:
                out.append(g.send(1.0))
        return torch.stack(out), sum(t.mean() for t in chunks(v))

    yield f, X
    n = 2
    yield X
    n = 1
    yield X


@program(FLOW)
def a_generator_returned():
    scale = 2.0

    def f(v):
        return (t * scale for t in v)

    out = yield f, X
    yield Seen(o=list(out))
    scale = 3.0
    out = yield X
    scale = 4.0
    yield Seen(o=list(out))


@program(FLOW)
def a_match_on_arguments():
    def f(op, v):
        match op:
            case {"kind": "scale", "by": (int() | float()) as k}:
                return v * k
            case ["shift", k, *rest]:
                return v + k + len(rest)
            case str(name) if hasattr(torch, name):
                return getattr(torch, name)(v)
            case None:
                return v
            case _:
                return "unknown"

    yield f, {"kind": "scale", "by": 2}, X
    yield {"kind": "scale", "by": 2.5}, X
    yield ["shift", 1.0, 0, 0], X
    yield "relu", X
    yield "nothing", X
    yield {"kind": "scale", "by": "x"}, X


@program(FLOW)
def recursion_over_a_tree():
    tree = {"a": X, "b": {"c": X + 1, "d": [X, {"e": X}]}}

    def total(t, depth=0):
        if isinstance(t, torch.Tensor):
            return t * depth
        items = t.values() if isinstance(t, dict) else t
        return sum(total(i, depth + 1) for i in items)

    def f(v):
        return total(tree) + v

    yield f, X
    tree["b"]["d"].append(X)
    yield X
    tree["b"]["c"] = {}
    yield X
    del tree["a"]
    yield X


@program(FLOW)
def finally_that_restores_state():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)
            self.log = []

        def forward(self, v, fail):
            old = self.drop.training
            self.drop.eval()
            try:
                out = self.drop(v)
                if fail:
                    raise RuntimeError("no")
                return out * 2
            except RuntimeError:
                self.log.append("failed")
                raise
            finally:
                self.drop.train(old)
                self.log.append("done")

    model = Model()
    yield model, X, False
    yield X, True
    yield Seen(t=model.drop.training, log=model.log)
    yield X, False
    model.drop.eval()
    yield X, True
    yield Seen(t=model.drop.training, log=model.log)


@program(FLOW)
def walrus_and_comprehension_scopes():
    k = 10

    def f(vs):
        total = 0
        kept = [y for v in vs if (y := v.sum()) is not None]
        total = sum(kept) + y + k
        return total, {i: k * t for i, k in enumerate((1, 2)) for t in kept}, [lambda j=j: j for j in range(2)][1]()

    yield f, [X, X + 1]
    k = 20
    yield [X]
    yield []


@program(FLOW)
def for_else_break_and_continue():
    stops = [2]

    def f(v):
        for i, row in enumerate(v):
            if i == 1:
                continue
            if i in stops:
                out = row * 10
                break
        else:
            out = v.sum(0)
        return out

    yield f, X
    stops[0] = 5
    yield X
    stops.append(0)
    yield X
    yield X[:0]


@program(FLOW)
def loops_with_changing_counts():
    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.n = 2
            self.lin = nn.Linear(4, 4)

        def forward(self, v):
            for i in range(self.n):
                v = self.lin(v) / (i + 1)
            return v

    model = Steps()
    for n in (2, 3, 0, 5, 1):
        model.n = n
        out = yield (model, X) if n == 2 else (X,)
        if n:
            out.sum().backward()
        yield Seen(m=model)


@program(FLOW)
def star_arguments_and_keywords():
    def inner(*args, scale=1.0, **kw):
        out = sum(args) * scale
        for k in sorted(kw):
            out = out + kw[k]
        return out, len(args), list(kw)

    options = {"scale": 2.0, "b": 1.0}
    args = [X]

    def f(v):
        return inner(v, *args, **options)

    yield f, X
    options["a"] = X
    yield X
    args.append(X)
    del options["scale"]
    yield X
    options["v"] = 1
    options["scale"] = X
    yield X


@program(FLOW)
def a_contextmanager_that_patches_an_attribute():
    lin = nn.Linear(4, 4)

    @contextlib.contextmanager
    def frozen(m):
        flags = [p.requires_grad for p in m.parameters()]
        m.requires_grad_(False)
        try:
            yield m
        finally:
            for p, r in zip(m.parameters(), flags, strict=True):
                p.requires_grad_(r)

    def f(v):
        with frozen(lin) as m:
            a = m(v)
        return a + lin(v), a.requires_grad

    out = yield f, X
    out[0].sum().backward()
    yield Seen(l=lin)
    lin.bias.requires_grad_(False)
    out = yield X
    out[0].sum().backward()
    yield Seen(l=lin, r=lin.bias.requires_grad)


# Exceptions.


@program(ERRORS)
def messages_of_asserts_and_raises():
    limit = 3

    def f(v):
        assert v.dim() == 2, f"expected 2 dims, got {v.dim()}"
        if v.shape[0] > limit:
            raise ValueError(f"too many rows: {v.shape[0]} > {limit}")
        return v * 2

    def told(v):
        try:
            return f(v)
        except (AssertionError, ValueError) as e:
            return str(e)

    yield told, X
    yield X[0]
    yield torch.ones(4, 4)
    limit = 10
    yield torch.ones(4, 4)
    limit = 1
    yield torch.ones(4, 4)


@program(ERRORS)
def a_raise_from_with_notes():
    class Failed(Exception):
        def __init__(self, code, rows):
            super().__init__(code, rows)
            self.code = code

    def f(v, i):
        try:
            return v[i]
        except IndexError as e:
            raise Failed(7, v.shape[0]) from e

    def told(v, i):
        try:
            return f(v, i)
        except Failed as e:
            return e.code, e.args, isinstance(e.__cause__, IndexError), e.__suppress_context__

    yield told, X, 1
    yield X, 5
    yield X[:1], 1
    yield X, -4
    yield X, 2


@program(ERRORS)
def state_left_by_a_failing_call():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 2)
            self.calls = 0
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, v):
            self.calls += 1
            self.seen += v.shape[0]
            return self.lin(v)

    model = Model()
    yield model, X
    yield torch.ones(3, 5)
    yield Seen(c=model.calls, s=model.seen)
    yield X
    yield torch.ones(3, 5)
    yield Seen(c=model.calls, s=model.seen)


@program(ERRORS)
def a_shape_error_caught_inside():
    def f(a, b):
        try:
            return a @ b
        except RuntimeError:
            return a @ b.mT

    yield f, X, X
    yield X, X.t()
    yield X, torch.ones(4, 3)
    yield X, torch.ones(5, 5)
    yield X, X


@program(ERRORS)
def errors_of_torch_by_kind():
    def f(kind, v):
        if kind == "index":
            return v[10]
        if kind == "type":
            return v + "a"
        if kind == "dtype":
            return v.long().softmax(0)
        if kind == "view":
            return v.t().view(-1)
        if kind == "key":
            return {}["missing"]
        if kind == "zero":
            return v // 0, 1 / 0
        if kind == "attr":
            return v.nothing
        return v

    for i, k in enumerate(["ok", "index", "type", "dtype", "view", "key", "zero", "attr", "ok"]):
        yield (f, k, X) if i == 0 else (k, X)


@program(ERRORS)
def a_written_input_before_an_error():
    def f(v, i):
        v.add_(1)
        v[0] = 5
        return v.sum() + v[i].sum()

    a = X.clone()
    yield f, a, 1
    yield Seen(a=a)
    yield a, 7
    yield Seen(a=a)
    yield a, 1
    yield a, 7
    yield Seen(a=a)


@program(ERRORS)
def a_list_filled_before_an_error():
    out = []

    def f(vs):
        for v in vs:
            out.append(v.reshape(2, -1).sum(1))
        return len(out)

    yield f, [torch.ones(4)]
    yield [torch.ones(4), torch.ones(5)]
    yield Seen(o=out)
    yield [torch.ones(4), torch.ones(4)]
    yield [torch.ones(4), torch.ones(5)]
    yield Seen(o=out)


@program(ERRORS)
def an_error_of_a_value():
    def f(v):
        if v.min() < 0:
            raise ArithmeticError("negative", v.shape[0])
        return v.sqrt()

    yield f, X.abs()
    yield X
    yield X + 2
    yield X - 5


@program(ERRORS)
def retries_until_it_works():
    left = [2]
    log = []

    def unreliable(v):
        if left[0] > 0:
            left[0] -= 1
            raise TimeoutError(left[0])
        return v * 2

    def f(v):
        for attempt in range(5):
            try:
                return unreliable(v), attempt
            except TimeoutError as e:
                log.append(e.args)
        return None

    yield f, X
    yield X
    left[0] = 3
    yield X
    left[0] = 9
    yield X
    yield Seen(l=log)


@program(ERRORS)
def exceptions_kept_and_raised_later():
    kept = []

    def f(v):
        if kept:
            raise kept.pop()
        out = v * 2
        if v.shape[0] == 1:
            kept.append(KeyError("later"))
        return out

    yield f, X
    yield X[:1]
    yield X
    yield X
    kept.append(OSError("now"))
    yield X
    yield Seen(n=len(kept))


# Caches.


@program(CACHES)
def keys_and_values_as_growing_lists():
    def f(v, cache):
        cache["k"].append(v)
        cache["v"].append(v * 2)
        k, w = torch.stack(cache["k"]), torch.stack(cache["v"])
        return (k @ v).softmax(0) @ w

    cache = {"k": [], "v": []}
    yield f, X[0], cache
    yield X[1], cache
    yield X[2], cache
    yield Seen(c=cache)
    yield X[0], {"k": [X[1]], "v": [X[2]]}


@program(CACHES)
def keys_concatenated_in_an_object():
    class Cache:
        def __init__(self):
            self.k = None
            self.seen = 0

        def update(self, k):
            self.k = k if self.k is None else torch.cat([self.k, k])
            self.seen += k.shape[0]
            return self.k

        def crop(self, n):
            self.k = self.k[:n]
            self.seen = n

    class Attn(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Linear(4, 4)

        def forward(self, v, cache=None):
            k = self.q(v)
            if cache is not None:
                k = cache.update(k)
            return (v @ k.mT).softmax(-1) @ k

    model, cache = Attn(), Cache()
    yield model, X, cache
    yield X[:1], cache
    yield X[:1], cache
    yield Seen(k=cache.k, n=cache.seen)
    cache.crop(2)
    yield X[:1], cache
    yield Seen(k=cache.k, n=cache.seen)
    yield X


@program(CACHES)
def a_static_cache_with_a_position():
    class Static(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("k", torch.zeros(8, 4))
            self.pos = 0
            self.register_buffer("at", torch.zeros((), dtype=torch.long))

        def forward(self, v):
            n = v.shape[0]
            self.k[self.pos : self.pos + n] = v
            self.k.index_copy_(0, self.at + torch.arange(n), v)
            self.pos += n
            self.at += n
            return self.k[: self.pos].sum(0)

    model = Static()
    yield model, X
    yield X[:1]
    yield X[:2]
    yield Seen(k=model.k, p=model.pos, a=model.at)
    model.pos = 0
    model.at.zero_()
    yield X
    yield X[:2]
    yield X  # over the end
    yield Seen(k=model.k, p=model.pos, a=model.at)


@program(CACHES)
def a_memo_by_shape_in_a_dict():
    memo = {}

    def f(v):
        key = (v.shape, v.dtype)
        if key not in memo:
            memo[key] = torch.arange(v.numel(), dtype=v.dtype).view(v.shape)
        return v + memo[key], len(memo)

    yield f, X
    yield X.double()
    yield X
    memo[(X.shape, X.dtype)].zero_()
    yield X
    memo.clear()
    yield X
    yield Seen(m=list(memo.values()))


@program(CACHES)
def a_memo_by_the_identity_of_an_argument():
    memo = {}

    def f(config, v):
        if id(config) not in memo:
            memo[id(config)] = config["scale"] * 2
        return v * memo[id(config)]

    a, b = {"scale": 2.0}, {"scale": 3.0}
    yield f, a, X
    yield b, X
    a["scale"] = 10.0
    yield a, X
    memo.clear()
    yield a, X


@program(CACHES)
def rotary_tables_made_once_and_extended():
    class Rotary(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.register_buffer("freq", 1.0 / (100 ** (torch.arange(0, dim, 2) / dim)))
            self.longest = 0
            self.cos = self.sin = None

        def forward(self, v):
            n = v.shape[-2]
            if n > self.longest or self.cos.dtype != v.dtype:
                self.longest = n
                angle = torch.outer(torch.arange(n).to(self.freq), self.freq)
                self.cos, self.sin = angle.cos().to(v.dtype), angle.sin().to(v.dtype)
            a, b = v.chunk(2, -1)
            c, s = self.cos[:n], self.sin[:n]
            return torch.cat([a * c - b * s, a * s + b * c], -1)

    model = Rotary(4)
    yield model, X
    yield torch.ones(6, 4)
    yield X.double()
    yield X
    model.freq.mul_(2)
    yield X
    yield torch.ones(7, 4)
    yield Seen(c=model.cos, n=model.longest)


@program(CACHES)
def a_sliding_window_of_the_last_values():
    class Window(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("past", torch.zeros(2, 4))

        def forward(self, v):
            full = torch.cat([self.past, v])
            self.past = full[-2:].detach()
            return full.unfold(0, 3, 1).mean(-1)

    model = Window()
    yield model, X
    yield X[:1]
    yield Seen(p=model.past)
    p = X.clone().requires_grad_()
    out = yield p
    out.sum().backward()
    yield Seen(p=p, past=model.past)
    model.past = torch.zeros(2, 4)
    yield X


@program(CACHES)
def a_least_recently_used_cache():
    from collections import OrderedDict

    class Cache(OrderedDict):
        def __init__(self, n):
            super().__init__()
            self.n = n

        def look(self, k, make):
            if k in self:
                self.move_to_end(k)
            else:
                self[k] = make()
                if len(self) > self.n:
                    self.popitem(last=False)
            return self[k]

    cache = Cache(2)

    def f(k, v):
        return cache.look(k, lambda: v * 2) + v

    yield f, "a", X
    yield "b", X + 1
    yield "a", X + 2
    yield "c", X
    yield Seen(k=list(cache))
    yield "a", X + 3
    yield "b", X + 3
    yield Seen(k=list(cache), v=list(cache.values()))


@program(CACHES)
def a_cache_of_results_with_gradients():
    cache = {}
    w = X.clone().requires_grad_()

    def f(v):
        if "h" not in cache:
            cache["h"] = (w * 2).sin()
        return cache["h"] * v

    out = yield f, X
    out.sum().backward(retain_graph=True)
    out = yield X
    out.sum().backward()
    yield Seen(w=w)
    cache.clear()
    out = yield X + 1
    out.sum().backward()
    yield Seen(w=w)


@program(CACHES)
def hidden_state_carried_and_cut():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.GRUCell(4, 4)
            self.h = None

        def reset(self):
            self.h = None

        def forward(self, v):
            if self.h is None:
                self.h = v.new_zeros(v.shape[0], 4)
            self.h = self.cell(v, self.h)
            return self.h

    model = Model()
    out = yield model, X
    out = yield X
    out.sum().backward()
    yield Seen(m=model)
    model.h = model.h.detach()
    out = yield X
    out.sum().backward()
    yield Seen(m=model)
    model.reset()
    yield X[:2]
    yield X  # another batch size
    yield Seen(h=model.h)


@program(CACHES)
def a_replay_buffer_of_transitions():
    buffer, keep = [], 3
    net = nn.Linear(4, 1)

    def f(v):
        buffer.append((v.detach(), float(v.shape[0])))
        if len(buffer) > keep:
            buffer.pop(0)
        states = torch.cat([s for s, _ in buffer])
        return F.mse_loss(net(states).mean(), torch.tensor(buffer[-1][1]))

    for i in range(5):
        if i == 3:
            keep = 1
        out = yield (f, X + i) if i == 0 else (X + i,)
        out.backward()
        yield Seen(n=len(buffer), net=net)
