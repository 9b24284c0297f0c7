"""Sizes that change from call to call: one program for all of them, where what the code does with sizes is followed."""

from __future__ import annotations

import decimal
import enum
import fractions
import functools
import gc
import json
import math
import threading
import types
import warnings
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import thunder
from tests.jit_checks import assert_captured_at_most, nothing_leaks, run_alone  # noqa: F401

SIZES = (4, 5, 6, 7, 9, 8, 16, 5, 1, 2, 3, 12, 0, 17, 33)


def calls(function, make, sizes=SIZES, **options):
    """How often it was captured; each call's result, or its error, is compared with eager's."""
    compiled = thunder.jit(function, **options)
    for size in sizes:
        inputs = make(size)
        try:
            want = function(*inputs)
        except Exception as error:
            with pytest.raises(type(error)):
                compiled(*inputs)
            continue
        got = compiled(*inputs)
        torch.testing.assert_close(
            got, want, equal_nan=True, rtol=0 if _exact(want) else None, atol=0 if _exact(want) else None
        )
        assert _types(got) == _types(want)
    return thunder.cache_misses(compiled)


def _exact(result):
    return isinstance(result, torch.Tensor) and not result.is_floating_point()


def _types(result):
    if isinstance(result, (tuple, list)):
        return type(result), [_types(item) for item in result]
    return type(result)


def rows(n):
    return (torch.randn(n, 3),)


def batch(n):
    return (torch.randn(2, n, 8),)


# ---- programs that hold for any sizes: two captures, and one for sizes 0 and 1 each ----


def attention(x):
    b, t, c = x.shape
    q = x.view(b, t, 2, c // 2).transpose(1, 2)
    places = torch.arange(t)
    scores = (q @ q.transpose(-1, -2)).masked_fill(places[None, :] > places[:, None], float("-inf"))
    return (scores.softmax(-1) @ q).transpose(1, 2).reshape(b, t, c)


def padded(x):
    return F.pad(x, (0, 0, 0, 3)), torch.cat([x.new_zeros(x.shape[0], 2), x], 1)


def last_rows(x):
    return x[:, -2:], x[:, : x.shape[1] - 1], x.flatten(), x.reshape(x.shape[2], -1), x[:, ::2]


def sizes_returned(x):
    return x.shape, x.size(1) * 2 + 1, [x.numel(), -x.size(1)], {"n": x.shape[1] // 2, "m": (x.shape[1] + 1) % 3}


def written_copy(x):
    y = x.clone()
    y[:, 0] = 1
    y += x.shape[1]
    y.mul_(2)
    return y


def expanded(x):
    return x[:, :1].expand(2, x.shape[1], 8) + x, torch.ones(x.shape[1], x.shape[1]).tril(), x.sum(1, keepdim=True)


def clipped(x):
    return x[:, : min(x.shape[1], 6)].sum(1), x[:, max(0, x.shape[1] - 4) :].mean()


def constants_of_sizes(x):
    return torch.arange(x.shape[1]) * 2 + torch.zeros(x.shape[1]), torch.full((x.shape[1],), x.shape[1] + 1)


@pytest.mark.parametrize(
    "function", [attention, padded, last_rows, sizes_returned, written_copy, expanded, constants_of_sizes]
)
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad_mode"])
def test_one_program_serves_any_sizes(function, grad):
    make = rows if function is padded else batch
    with torch.set_grad_enabled(grad):
        assert calls(function, make, (4, 5, 6, 7, 9, 33, 2, 4, 8)) == 2
        assert calls(function, make) <= 4


def test_without_following_each_size_has_a_program_of_its_own():
    assert calls(attention, batch, (4, 5, 6, 7), dynamic=False) == 4


def test_two_sizes_change_at_once():
    def function(x, y):
        return x @ y, x.shape[0] * y.shape[1]

    def make(pair):
        return torch.randn(pair[0], 4), torch.randn(4, pair[1])

    assert calls(function, make, [(2, 3), (3, 5), (4, 4), (7, 2), (5, 9)]) == 2


def test_the_trace_says_where_sizes_come_from_and_runs_as_text():
    compiled = thunder.jit(attention)
    compiled(*batch(4))
    compiled(*batch(5))
    trace = thunder.last_traces(compiled)[-1]
    assert "thunder._kernels.extent(a0, 1, 0)" in str(trace)
    names = trace.namespace()
    exec(str(trace), names)
    x = batch(5)[0]
    torch.testing.assert_close(names["computation"](x), attention(x))


# ---- decisions by sizes hold for those that decide alike ----


def steered(x):
    n = x.shape[0]
    if n > 6:
        return x * 2
    return x + n


def loops(x):
    total = x.sum(0)
    for i in range(x.shape[0]):
        total = total + i * x[i]
    return total


def iterates(x):
    return sum(row * i for i, row in enumerate(x)) + len(x)


def chunks(x):
    parts = x.chunk(4)
    return [p.sum() for p in parts], len(parts)


def to_a_multiple(x):
    missing = (4 - x.shape[0] % 4) % 4
    if missing:
        x = F.pad(x, (0, 0, 0, missing))
    return x.view(-1, 4, 3).sum(1)


def looks_up(x):
    return x * [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0][min(x.shape[0], 9)]


def slices_a_list(x):
    return x * sum([0.5, 1.5, 2.5, 3.5, 4.5, 5.5][: x.shape[0]])


def keyed(x):
    return x * {4: 1.0, 5: 2.0}.get(x.shape[0], 3.0)


def in_a_set(x):
    return x + 1 if x.shape[0] in {4, 6, 9} else x


def in_a_tuple(x):
    return x + 1 if x.shape[0] in (4, 6, 9) else x


def text_of(x):
    return x * len(f"{x.shape[0]:b}") + len(str(x.shape)) + len("%d" % x.shape[0])  # noqa: UP031


def by_float(x):
    return x / x.shape[0] * (x.shape[0] * 0.5) + math.sqrt(x.shape[0]) + x.shape[0] ** 0.5 + x.shape[0] / 3


def by_int(x):
    n = x.shape[0]
    return x * (n // 2) + n % 3 + divmod(n, 4)[1] + n**2 + (n & 3) + (n << 1) + abs(-n) + round(n) + int(n)


def by_numpy(x):
    return x + torch.from_numpy(np.arange(x.shape[0], dtype=np.float32))[:, None] + float(np.sqrt(x.shape[0]))


def type_of(x):
    return x + 1 if type(x.shape[0]) is int else x - 1


def of_class(x):
    return x + 1 if isinstance(x.shape[0], int) and not isinstance(x.shape[0], bool) else x - 1


def truth_of(x):
    return x + 1 if x.shape[0] and x.numel() and x.shape[0] != 7 else x * 2


def chained(x):
    return x + 1 if 4 < x.shape[0] <= 8 else x * 2


def whole_shape(x):
    return x + 1 if x.shape == (5, 3) else x + 2 if x.size() == torch.Size([7, 3]) else x


def sorted_shape(x):
    return x * sum(x.shape) + max(x.shape) - min(x.shape) + sorted(x.shape)[0] + math.prod(x.shape)


def size_methods(x):
    return x * x.shape.numel() + x.shape.count(3) + x.shape.index(3)


def as_json(x):
    return x * len(json.dumps({"n": list(x.shape)}))


def pooled(x):
    y = F.avg_pool1d(x.t()[None], 2)
    return y.view(y.shape[1], y.shape[2]) / y.shape[-1]


def halved(x):
    y = x[: x.shape[0] // 2]
    return y.sum(0) * y.shape[0] + x[y.shape[0] :].shape[0]


def at_eight(x):
    return x[:8].sum(0) * x[:8].shape[0]


def splits(x):
    a, b = x.split([x.shape[0] - 2, 2])
    return a.sum(0) + b.sum(0)


def unbinds(x):
    return torch.stack(x.unbind(0)[::-1])


def swallows(x):
    try:
        table = {x.shape[0]: 1.0}
    except Exception:
        table = {}
    return x * table.get(x.shape[0], 0.0)


def complex_number(x):
    return x * complex(x.shape[0]).real + float(x.shape[0])


def in_size(x):
    return x.new_zeros(torch.Size([x.shape[0], 2])), torch.Size((x.shape[0],)) + x.shape[1:]


def by_dim(x):
    return x.sum(x.dim() - 1) + x.ndim * x.size(dim=0) + x.size(-2)


def strided(x):
    return x + x.stride(1) + x.t().contiguous().stride(0) + x.is_contiguous()


def contiguous_or_not(x):
    y, z, w = x[:, :2], x[: x.shape[0] - 4].t(), x[:4]
    return x + y.is_contiguous() + 2 * z.is_contiguous() + 4 * w.is_contiguous() + 8 * x.t().is_contiguous()


def bytes_of(x):
    return x + x.nbytes + x.element_size()


def broadcasts(x):
    return torch.broadcast_shapes(x.shape, (1, 3)), x.expand_as(torch.zeros(x.shape))


def meshes(x):
    a, b = torch.meshgrid(torch.arange(x.shape[0]), torch.arange(2), indexing="ij")
    return a + b


def einsums(x):
    return torch.einsum("ij,kj->ik", x, x), torch.outer(x[:, 0], x[:, 1])


def nonzero_count(x):
    return (x > 0).nonzero().shape[0] + x.shape[0]


def asks_a_value(x):
    return x + 1 if x.shape[0] > 3 and x.sum() > 0 else x - x.shape[0]


STEERED = [
    steered, loops, iterates, chunks, to_a_multiple, looks_up, slices_a_list, keyed, in_a_set, in_a_tuple, text_of,
    by_float, by_int, by_numpy, type_of, of_class, truth_of, chained, whole_shape, sorted_shape, size_methods, as_json,
    pooled, halved, at_eight, splits, unbinds, swallows, complex_number, in_size, by_dim, strided, bytes_of, broadcasts,
    contiguous_or_not, meshes, einsums, nonzero_count, asks_a_value, clipped,
]  # fmt: skip


@pytest.mark.parametrize("function", STEERED, ids=lambda f: f.__name__)
@pytest.mark.parametrize("order", [1, -1, 7], ids=["up", "down", "mixed"])
def test_decisions_by_sizes(function, order):
    make = batch if function is clipped else rows
    sizes = SIZES if order == 1 else SIZES[::-1] if order == -1 else [SIZES[i * 7 % len(SIZES)] for i in range(15)]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", thunder.ThunderWarning)
        calls(function, make, (*sizes, *sizes[:4]), fallback="eager")


def test_a_decision_is_followed_on_both_sides():
    assert calls(steered, rows, (4, 5, 6, 3, 7, 8, 9, 10, 2, 5)) == 4


# ---- arguments ----


def test_inputs_laid_out_otherwise():
    def function(x):
        return x.reshape(-1)[: x.shape[0]], x.contiguous().view(-1), x.t() @ x

    compiled = thunder.jit(function)
    layouts = [lambda n: torch.randn(n, 4), lambda n: torch.randn(4, n).t(), lambda n: torch.randn(n, 8)[:, ::2]]
    for n in (3, 5, 6, 7):
        for layout in layouts:
            x = layout(n)
            torch.testing.assert_close(compiled(x), function(x))
    assert thunder.cache_misses(compiled) <= 7


def test_sizes_that_were_the_same_come_apart():
    def function(x, y):
        return x + y if x.shape == y.shape else x.sum() + y.sum()

    def make(pair):
        return torch.randn(pair[0]), torch.randn(pair[1])

    calls(function, make, [(4, 4), (5, 5), (6, 6), (6, 7), (7, 6), (8, 1), (1, 8), (9, 9)])


def test_broadcasting_that_one_size_makes():
    def function(x, y):
        return x + y, torch.cat([x, y * x])

    def make(pair):
        return torch.randn(pair[0]), torch.randn(pair[1])

    calls(function, make, [(4, 4), (5, 5), (6, 6), (6, 1), (1, 6), (7, 7), (3, 4)])


def test_arguments_that_share_memory():
    def function(x, y):
        y.add_(1)
        return x * 2, x.shape[0]

    compiled = thunder.jit(function)
    for n in (4, 5, 6, 7):
        a, b = torch.zeros(n), torch.zeros(n)
        assert compiled(a, a)[0].tolist() == function(b, b)[0].tolist()
        assert a.tolist() == b.tolist()


def test_a_kernel_that_fails_for_some_sizes_raises_as_eager_does():
    compiled = thunder.jit(lambda x, w: x @ w + x.shape[0])
    for n in (3, 4, 5, 6):
        compiled(torch.randn(n, n), torch.randn(n, 2))
    with pytest.raises(RuntimeError):
        compiled(torch.randn(6, 7), torch.randn(6, 2))
    assert compiled(torch.randn(9, 9), torch.randn(9, 2)).shape == (9, 2)


# ---- ints among the arguments ----


def scaled(x, n):
    return x * n + n**2 - n % 3, n + 1


def rolled(x, n):
    return torch.roll(x, n, 0), x[n % x.shape[0]], x[:, : n % 3 + 1]


def counted(x, n):
    return x + (1 if n == 0 else n)


def along(x, n):
    return x.sum(n % 2), x.softmax(n % 2)


def repeated(x, n):
    for _ in range(n % 4):
        x = x * 2
    return x


def made(x, n):
    return torch.arange(n, n + 4) * 2, torch.eye(n % 5 + 1), x.new_full((n % 3, 2), n)


def as_float(x, n):
    return x * (n * 0.5) + float(n) / 3


def of_dict(x, n):
    return x * {"n": n}["n"] + [n, n + 1][1]


@pytest.mark.parametrize(
    "function", [scaled, rolled, counted, along, repeated, made, as_float, of_dict], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("values", [range(12), (3, 7, 7, 0, -2, 11, True, False, 1, 0, 10**15, 3)], ids=["up", "any"])
def test_ints(function, values):
    with torch.no_grad():
        calls(function, lambda n: (torch.randn(5, 3), n), tuple(values))


def test_an_int_that_only_computes_needs_two_captures():
    assert calls(of_dict, lambda n: (torch.ones(3), n), range(1, 40)) == 2
    assert calls(rolled, lambda n: (torch.ones(6, 3), n), range(30)) == 2


def test_the_place_of_a_token():
    table = torch.randn(64, 8)

    def step(tokens, start):
        n = tokens.shape[1]
        places = table[start : start + n]
        mask = torch.full((n, n + start), float("-inf")).triu(start + 1) if n > 1 else None
        return (tokens + places) * 2, mask

    calls(step, lambda p: (torch.randn(2, p[0], 8), p[1]), [(4, 0), (1, 4), (1, 5), (1, 6), (3, 7), (5, 10), (1, 15)])
    assert calls(step, lambda p: (torch.randn(2, 1, 8), p), range(4, 40)) == 2


def test_dynamic_true_does_not_free_what_ints_decide():
    calls(counted, lambda n: (torch.ones(3), n), (3, 4, 5, 0, 1, 0, 7), dynamic=True)


# ---- state ----


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.place = nn.Parameter(torch.randn(40, 8))
        self.register_buffer("mask", torch.ones(40, 40, dtype=torch.bool).tril())
        self.lengths = []

    def forward(self, x):
        t = x.shape[1]
        self.lengths.append(t)
        return (x + self.place[:t]).masked_fill(~self.mask[:t, :t].any(-1, keepdim=True), 0.0)


def test_sizes_written_to_state():
    module, twin = Table(), Table()
    twin.load_state_dict(module.state_dict())
    compiled = thunder.jit(module)
    with torch.no_grad():
        for n in (4, 5, 6, 9, 7, 5, 12):
            x = batch(n)[0]
            torch.testing.assert_close(compiled(x), twin(x))
            assert module.lengths == twin.lengths
            assert all(type(n) is int for n in module.lengths)


def test_sizes_as_keys_of_a_cache():
    @functools.lru_cache
    def table(n):
        return torch.arange(n) * 2

    memo = {}

    def function(x):
        n = x.shape[0]
        if n not in memo:
            memo[n] = n * 2
        return x + table(n)[:, None] + memo[n]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", thunder.ThunderWarning)
        calls(function, rows, (4, 5, 6, 5, 7, 4))
    assert all(type(key) is int and type(value) is int for key, value in memo.items())
    assert type(table(6)) is torch.Tensor


def test_a_growing_cache():
    def step(x, cache):
        keys = torch.cat([cache["keys"], x], 1)
        cache["keys"] = keys
        cache["length"] = keys.shape[1]
        return (x @ keys.transpose(1, 2)).softmax(-1) @ keys

    compiled = thunder.jit(step)
    ours, theirs = ({"keys": torch.ones(2, 3, 8), "length": 3} for _ in range(2))
    with torch.no_grad():
        for _ in range(40):
            x = torch.randn(2, 1, 8)
            torch.testing.assert_close(compiled(x, ours), step(x, theirs))
            torch.testing.assert_close(ours, theirs)
    assert thunder.cache_misses(compiled) == 2


def test_a_growing_cache_without_a_number_of_its_own():
    def step(x, cache):
        cache[0] = torch.cat([cache[0], x], 1)
        return (x @ cache[0].transpose(1, 2)).softmax(-1) @ cache[0]

    compiled = thunder.jit(step)
    ours, theirs = ([torch.ones(2, 3, 8)] for _ in range(2))
    with torch.no_grad():
        for _ in range(40):
            x = torch.randn(2, 1, 8)
            torch.testing.assert_close(compiled(x, ours), step(x, theirs))
            torch.testing.assert_close(ours, theirs)
    assert thunder.cache_misses(compiled) == 2


# ---- models ----


def test_a_convolutional_net_on_images_of_any_size():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(32, 5),
    ).eval()  # fmt: skip
    with torch.no_grad():
        assert calls(net, lambda n: (torch.randn(2, 3, n, n + 3),), (8, 10, 12, 9, 16, 31)) == 2


def test_a_transformer_on_sequences_of_any_length():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    with torch.no_grad():
        calls(net, lambda n: (torch.randn(2, n, 16),), (4, 5, 6, 7, 12))


def test_llama_decodes_growing_lengths_with_three_captures():
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()

    def decode(run, steps):
        cache, ids, tokens = transformers.DynamicCache(config=config), torch.arange(5)[None], []
        with torch.no_grad():
            for _ in range(steps):
                ids = run(ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
                tokens.append(ids.item())
        return tokens, [layer.keys for layer in cache.layers]

    compiled = thunder.jit(model)
    tokens, keys = decode(compiled, 64)
    want, theirs = decode(model, 64)
    assert tokens == want
    torch.testing.assert_close(keys, theirs)
    assert thunder.cache_misses(compiled) <= 4


# ---- options and surroundings ----


def test_sizes_that_recur_get_a_program_of_their_own():
    compiled = thunder.jit(attention)
    for n in (4, 5, 6, 7):
        compiled(*batch(n))
    assert thunder.cache_misses(compiled) == 2
    assert [entry["any_sizes"] for entry in thunder.compile_stats(compiled).entries] == [True, False]
    for _ in range(40):
        for n in (6, 7):
            x = batch(n)[0]
            torch.testing.assert_close(compiled(x), attention(x))
    wanted = 4 if thunder._C.torch_abi()["handles"] else 2  # no program has kernels of our own without them
    assert thunder.cache_misses(compiled) == wanted
    for n in range(8, 60):  # not for those that come once
        compiled(*batch(n))
    assert thunder.cache_misses(compiled) == wanted


def test_dynamic_true_takes_the_callers_word():
    def function(x):
        if x.shape[0] > 6:  # the caller says that this decides nothing
            return x * 2.0
        return x * 2.0

    assert calls(function, rows, (4, 5, 6, 7, 9, 33), dynamic=True) == 2
    assert calls(function, rows, (4, 5, 6, 7, 9, 33)) > 2


def test_dynamic_true_is_checked_against_the_former_capture():
    assert calls(loops, rows, (4, 5, 4, 5), dynamic=True) == 2  # not the same program: one each


def test_dynamic_true_says_where_it_is_without_effect():
    executors = ["torchcompile", *thunder.get_always_executors()]
    with pytest.warns(thunder.ThunderWarning, match="dynamic=True is without effect"):
        thunder.jit(attention, executors=executors, dynamic=True)


def test_unknown_values_of_the_option_are_refused():
    with pytest.raises(ValueError, match="dynamic must be None, True or False, not 'yes'"):
        thunder.jit(attention, dynamic="yes")


def test_training_has_a_program_for_each_size():
    weight = torch.randn(8, 8, requires_grad=True)

    def function(x):
        return (x @ weight).sum() * x.shape[1]

    compiled = thunder.jit(function)
    for n in (4, 5, 6, 7):
        x = batch(n)[0]
        want = torch.autograd.grad(function(x), weight)[0]
        torch.testing.assert_close(torch.autograd.grad(compiled(x), weight)[0], want)
    assert thunder.cache_misses(compiled) == 4


def test_random_numbers_are_those_of_eager():
    def function(x):
        return x + torch.rand(x.shape[0], 1)

    compiled = thunder.jit(function)
    for n in (4, 5, 6, 7):
        x = rows(n)[0]
        torch.manual_seed(n)
        want = function(x)
        torch.manual_seed(n)
        assert torch.equal(compiled(x), want)


def test_under_autocast():
    net = nn.Linear(8, 8)

    def function(x):
        return net(x) * x.shape[1]

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        calls(function, batch, (4, 5, 6, 7, 9))


class Cached(nn.Module):
    """Keys are written to a buffer, at the places that a tensor names, and read up to an int that grows."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(8, 8)
        self.register_buffer("keys", torch.zeros(2, 64, 8))

    def forward(self, x, places, until):
        self.keys.index_copy_(1, places, self.project(x))
        keys = self.keys[:, :until]
        return (x @ keys.transpose(1, 2)).softmax(-1) @ keys, keys.shape[1]


def decode_cached(run, module, first=4):
    results, place = [], torch.arange(first)
    torch.manual_seed(1)
    x = torch.randn(2, first, 8)
    for _ in range(20):
        results.append(run(x, place, int(place[-1]) + 1))
        x, place = torch.randn(2, 1, 8), place[-1:] + 1
    return results, module.keys.clone()


def test_writes_to_a_cache_and_an_int_that_grows():
    module = Cached()
    twin = Cached()
    twin.load_state_dict(module.state_dict())
    compiled = thunder.jit(module)
    with torch.no_grad():
        for first in (4, 6, 9):
            torch.testing.assert_close(decode_cached(compiled, module, first), decode_cached(twin, twin, first))
    assert thunder.cache_misses(compiled) <= 5


def test_what_does_not_fit_is_found_before_anything_is_written():
    def function(x, y):
        x.add_(1)
        z = (y + y.shape[0])[:4]
        return x * 2 if z.shape[0] == 4 else x * 3

    compiled = thunder.jit(function)
    for n in (5, 6, 7, 3, 4, 2, 9, 8):
        ours, theirs = torch.ones(3), torch.ones(3)
        y = torch.randn(n)
        torch.testing.assert_close(compiled(ours, y), function(theirs, y))
        assert torch.equal(ours, theirs)


def test_dropout_on_batches_of_any_size():
    net = nn.Sequential(nn.Linear(3, 16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 2))
    compiled = thunder.jit(net)
    with torch.no_grad():
        for n in (4, 5, 6, 7, 9):
            x = rows(n)[0]
            torch.manual_seed(n)
            want = net(x)
            torch.manual_seed(n)
            torch.testing.assert_close(compiled(x), want)
    assert thunder.cache_misses(compiled) == 2


def test_in_inference_mode():
    with torch.inference_mode():
        assert calls(attention, batch, (4, 5, 6, 7, 9)) == 2


def test_threads_with_sizes_of_their_own():
    compiled = thunder.jit(attention)
    for n in (4, 5):
        compiled(*batch(n))
    wrong = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for i in range(200):
            x = torch.randn(2, 2 + (i * seed) % 13, 8, generator=generator)
            try:
                torch.testing.assert_close(compiled(x), attention(x))
            except Exception as error:
                wrong.append((x.shape, error))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_size_that_outlives_its_capture_is_as_good_as_an_int():
    kept = []

    class Holder:
        pass

    def function(x):
        holder = Holder()
        holder.n = x.shape[0]
        kept[:] = [holder.n]
        return x * holder.n

    calls(function, rows, (4, 5, 6))
    assert kept == [6]
    assert type(kept[0]) is int


def test_dtypes_and_ranks_still_have_programs_of_their_own():
    compiled = thunder.jit(lambda x: x * x.shape[0])
    for x in (torch.ones(3), torch.ones(4), torch.ones(5, dtype=torch.int64), torch.ones(6, 1), torch.ones(7)):
        assert torch.equal(compiled(x), x * x.shape[0])
    assert thunder.cache_misses(compiled) == 4


# ---- ints that the callable reads of its surroundings ----


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(3, 3)
        self.calls = 0
        self.length = 0

    def forward(self, x):
        self.calls += 1
        self.length = x.shape[0]
        return self.project(x) * self.calls + self.length


def test_a_counter_and_a_length_that_a_module_keeps():
    module = Counting().double()
    twin = Counting().double()
    twin.load_state_dict(module.state_dict())
    compiled = thunder.jit(module)
    with torch.no_grad():
        for i in range(40):
            x = rows(2 + i % 9)[0].double()
            torch.testing.assert_close(compiled(x), twin(x))
            assert (module.calls, module.length) == (twin.calls, twin.length)
            assert type(module.calls) is int
            assert type(module.length) is int
            if i == 20:
                module.calls = twin.calls = 1000
    assert_captured_at_most(compiled, 3)


@pytest.mark.parametrize(
    "use",
    [
        lambda self, x: x * self.step,
        lambda self, x: x if self.step > 4 else x + self.step,
        lambda self, x: x[: self.step % 3 + 1],
        lambda self, x: sum([x] * (self.step % 3 + 1)),
        lambda self, x: x * 0.5**self.step,
        lambda self, x: (x * len(str(self.step)), self.step),
        lambda self, x: x + {3: 1.0}.get(self.step, 2.0),
    ],
)
def test_an_int_attribute_that_changes(use):
    class Stepping(nn.Module):
        def __init__(self):
            super().__init__()
            self.step = 1

        def forward(self, x):
            return use(self, x)

    module, twin = Stepping(), Stepping()
    compiled = thunder.jit(module, fallback="eager")
    for step in (1, 2, 3, 4, 5, 6, 3, 0, -1, True, 2.0, 7, 10**14, 8):
        module.step = twin.step = step
        x = torch.randn(4, 3)
        try:
            want = twin(x)
        except Exception as error:
            with pytest.raises(type(error)):
                compiled(x)
            continue
        torch.testing.assert_close(compiled(x), want, rtol=0, atol=0)


def test_ints_are_followed_where_no_other_thread_is():
    run_alone(
        "tests/test_dynamic_sizes.py::test_a_counter_and_a_length_that_a_module_keeps",
        "tests/test_dynamic_sizes.py::test_ints_of_globals_and_enclosing_functions",
        "tests/test_recompile.py::test_numbers_beside_a_training_step",
        "tests/test_changing_numbers.py::test_a_training_step_that_counts",
    )


EPOCH = 0


def test_ints_of_globals_and_enclosing_functions():
    global EPOCH
    seen = 0

    def program(x):
        nonlocal seen
        seen += 2
        return x * EPOCH + seen

    compiled = thunder.jit(program)
    for EPOCH in range(20):
        before = seen
        got, after = compiled(torch.ones(3)), seen
        assert after == before + 2
        assert torch.equal(got, torch.ones(3) * EPOCH + after)
    assert_captured_at_most(compiled, 3)


# ---- found by the generator and by thought ----


def ints(*values, shape=(4,)):
    return lambda: [(torch.randn(*shape), value) for value in values]


def alike(function, inputs, **options):
    """As eager does, call by call: results, errors, what is written to arguments. How often it was captured."""
    compiled = thunder.jit(function, **{"fallback": "eager"} | options)
    for given in inputs:
        ours, theirs = ([a.clone() if isinstance(a, torch.Tensor) else a for a in given] for _ in range(2))
        try:
            want = function(*theirs)
        except Exception as error:
            with pytest.raises(type(error)):
                compiled(*ours)
        else:
            got = compiled(*ours)
            torch.testing.assert_close(got, want)
            assert _types(got) == _types(want)
            assert _strides(got) == _strides(want)
        torch.testing.assert_close(ours, theirs)
    return thunder.cache_misses(compiled)


def _strides(result):
    if isinstance(result, (tuple, list)):
        return [_strides(item) for item in result]
    return result.stride() if isinstance(result, torch.Tensor) and min(result.shape, default=2) > 1 else None


class Number(enum.IntEnum):
    SIX = 6


class Whole(int):
    pass


def of_another_class(x):
    n = x.shape[0]
    return x + (n == Number.SIX) + 2 * (Number.SIX == n) + 4 * (n in (Whole(5),)) + 8 * (n > Whole(6)) + (n + Whole(1))  # noqa: SIM300


def beside_numpy(x):
    n = x.shape[0]
    return x + bool(n == np.int64(6)) + bool(np.int64(5) > n), (n * np.ones(2)).sum(), np.prod(x.shape)


def beside_fractions(x):
    n = x.shape[0]
    return x + (n == fractions.Fraction(6)) + (decimal.Decimal(6) == n) + complex(n).real + n * 1j.imag


def parts_of_an_int(x):
    n = x.shape[0]
    return x + n.real + n.imag + n.numerator + n.denominator + n.bit_count() + hasattr(n, "real"), n.numerator


def beyond_64_bits(x):
    n = x.shape[0]
    return x + (n < 2**70) + min(n, 10**30) + n % 2**70, n * 2**62 * 0


def dims_of_a_squeezed_part(x):
    y = x[: x.shape[0] - 1].squeeze()
    return y * y.dim(), y.ndim, len(y.shape)


@pytest.mark.parametrize(
    "function",
    [of_another_class, beside_numpy, beside_fractions, parts_of_an_int, beyond_64_bits, dims_of_a_squeezed_part],
    ids=lambda f: f.__name__,
)
def test_ints_of_every_kind(function):
    alike(function, [rows(n) for n in (4, 5, 6, 7, 2, 3, 9, 4, 16)])


@pytest.mark.parametrize(
    "function",
    [lambda x, n: -n, lambda x, n: abs(n), lambda x, n: n // -1, lambda x, n: n % -1, lambda x, n: n * n - n],
    ids=["neg", "abs", "floordiv", "mod", "mul"],
)
def test_the_largest_ints(function):
    alike(function, ints(3, 4, -(2**63), 5, 2**63 - 1, 1 - 2**63, 2**63, 2**70, -(2**64), 6)())


def test_results_whose_dtype_a_size_decides():
    def function(x, z):
        y = x + z[: z.shape[0] - 1].squeeze()  # a tensor of no dimensions does not promote
        return y, y * (2 if y.dtype == torch.float32 else 3)

    alike(function, [(torch.randn(n - 1), torch.randn(n, dtype=torch.float64)) for n in (4, 5, 6, 2, 3)])


def dead_index(x, y, n):
    x[5]
    return x + 1


def dead_view(x, y, n):
    x.view(-1, 2)
    return x + 1


def dead_sum(x, y, n):
    x + y
    return x.sum()


def dead_write(x, y, n):
    x.clone()[n] = 1
    return x + 1


def dead_reduction(x, y, n):
    x.sum(n)
    return x + 1


@pytest.mark.parametrize(
    "function", [dead_index, dead_view, dead_sum, dead_write, dead_reduction], ids=lambda f: f.__name__
)
def test_what_nobody_uses_raises_all_the_same(function):
    sizes = [(8, 8, 0), (10, 10, -1), (12, 12, 0), (6, 7, 0), (5, 5, 3), (4, 4, 0), (14, 14, 9), (8, 2, 0)]
    alike(function, [(torch.randn(a), torch.randn(b), n) for a, b, n in sizes])


def written_if_contiguous(x, n):
    x.contiguous().add_(1)
    return x.shape[0]


def written_if_flat(x, n):
    before = x.sum()
    y = x.reshape(-1)
    y.add_(1)
    z = y[: x.shape[1]]
    return (z if z.shape[0] + n > 12 else z * 2), before, x.sum()


def written_part_of_a_copy(x, n):
    t = x.clone()
    t[:, :n].reshape(-1).add_(1)
    t[:, :3].contiguous().mul_(2)
    return t


@pytest.mark.parametrize(
    "function", [written_if_contiguous, written_if_flat, written_part_of_a_copy], ids=lambda f: f.__name__
)
def test_writes_to_what_is_a_view_for_some_sizes(function):
    compiled = thunder.jit(function)
    for n, k in ((5, 1), (6, 2), (7, 3), (8, 1), (8, 9), (4, 2), (3, 3), (8, 8)):
        ours, theirs = torch.ones(4, 8), torch.ones(4, 8)
        torch.testing.assert_close(compiled(ours[:, :n], k), function(theirs[:, :n], k))
        assert torch.equal(ours, theirs)


def test_what_is_contiguous_for_some_sizes():
    def function(x, n):
        y = x[:, :n].contiguous()
        return y, x[:, :n].contiguous().t(), x[:, :n].reshape(-1)

    pairs = ((8, 100), (9, 101), (7, 5), (5, 9), (6, 6), (4, 2), (10, 3), (11, 200))
    assert alike(function, [(torch.randn(3, a), n) for a, n in pairs]) <= 5


def test_a_part_that_was_empty_before():
    def function(x):
        y = x[9:]
        return y.sum() + 1, y * 2

    alike(function, [(torch.ones(n, 3, dtype=torch.uint8),) for n in (4, 5, 7, 12, 9, 10)])


@pytest.mark.parametrize(
    ("make", "look"),
    [
        (lambda n: functools.partial(torch.zeros, n), lambda kept: (kept().shape, type(kept.args[0]))),
        (lambda n: lambda: n, lambda kept: (kept(), type(kept()))),
        (lambda n: lambda k=n: k, lambda kept: (kept(), type(kept()))),
        (lambda n: np.array([n, 1]), lambda kept: (kept.dtype, kept.tolist())),
        (lambda n: ValueError(n), lambda kept: (kept.args, type(kept.args[0]))),
        (lambda n: types.MappingProxyType({"n": n}), lambda kept: type(kept["n"])),
        (lambda n: [n].append, lambda kept: type(kept.__self__[0])),
        (lambda n: property(lambda self: n), lambda kept: type(kept.fget(None))),
    ],
    ids=["partial", "closure", "default", "array", "exception", "proxy", "method", "property"],
)
def test_a_size_kept_in_an_object_is_an_int(make, look):
    ours, theirs = types.SimpleNamespace(), types.SimpleNamespace()

    def program(holder):
        def function(x):
            holder.kept = make(x.shape[0])
            return x * 2

        return function

    compiled, eager = thunder.jit(program(ours), fallback="eager"), program(theirs)
    for n in (4, 5, 6, 7, 5, 9):
        compiled(*rows(n))
        eager(*rows(n))
        assert repr(look(ours.kept)) == repr(look(theirs.kept))


def test_a_number_is_written_where_the_same_one_was():
    ours, theirs = (types.SimpleNamespace(length=2, rate=0.5) for _ in range(2))

    def program(state):
        def function(x, n):
            state.rate = n / 8
            state.length = n
            return x * len(str(n))

        return function

    compiled, eager = thunder.jit(program(ours), fallback="eager"), program(theirs)
    for n in (6, 12, 6, 12, 7, 8, 7, 6, 6, 12):
        compiled(torch.ones(2), n)
        eager(torch.ones(2), n)
        assert ours == theirs


def test_programs_for_any_sizes_go_away_with_their_callable():
    def live():
        gc.collect()
        return sum(type(o).__name__ in ("Extent", "Sizes") for o in gc.get_objects())

    before = live()
    compiled = thunder.jit(attention)
    for n in (4, 5, 6, 7):
        compiled(*batch(n))
    assert live() == before
    watch = weakref.ref(compiled)
    del compiled
    gc.collect()
    assert watch() is None


def test_a_kernel_that_fails_after_writes_to_state():
    ours, theirs = types.SimpleNamespace(count=0), types.SimpleNamespace(count=0)

    def program(state):
        def function(x, i):
            state.count += 1
            y = x[:, i]
            x.mul_(2)
            return y

        return function

    compiled, eager = thunder.jit(program(ours)), program(theirs)
    for n, i in ((4, 1), (5, 2), (6, 3), (6, 7), (7, 7), (4, 3), (4, -5), (9, 8)):
        x, twin = torch.ones(2, n), torch.ones(2, n)
        try:
            want = eager(twin, i)
        except IndexError:
            with pytest.raises(IndexError):
                compiled(x, i)
        else:
            assert torch.equal(compiled(x, i), want)
        assert torch.equal(x, twin)
        assert ours == theirs


def test_an_error_in_the_first_run_that_the_code_catches():
    def function(x, i):
        try:
            y = torch.zeros(x.shape[0], x.shape[1]).scatter(1, torch.zeros(x.shape[0], 1, dtype=torch.long), i)
        except RuntimeError:
            y = x
        return x + y.shape[0]

    alike(function, [(torch.ones(n, m), i) for n, m, i in ((3, 6, 5), (4, 6, 5), (8, 0, 10), (9, 0, 11), (5, 6, 3))])


def test_a_size_in_a_cycle_that_nobody_holds_is_no_obstacle():
    def function(x):
        cycle = [x.shape[0]]
        cycle.append(cycle)
        return x * cycle[0]

    assert calls(function, rows, (4, 5, 6, 7, 9)) == 2


def test_other_threads_find_ints_where_ints_are_followed():
    class Stepping(nn.Module):
        def __init__(self):
            super().__init__()
            self.step = 1

        def forward(self, x):
            return x * self.step + torch.zeros(self.step % 4 + 1).sum()

    modules, wrong, done = [Stepping() for _ in range(20)], [], threading.Event()
    now = modules[0]

    def look():
        while not done.is_set():
            step = now.step
            if type(step) is not int:
                wrong.append(step)

    thread = threading.Thread(target=look)
    thread.start()
    with torch.no_grad():
        for now in modules:
            compiled = thunder.jit(now)
            for now.step in (1, 2, 3, 4, 5):
                assert torch.equal(compiled(torch.ones(2)), torch.ones(2) * now.step)
    done.set()
    thread.join()
    assert not wrong
