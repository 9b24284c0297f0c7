"""Python state that a program changes: arguments, the module's own, variables and globals. As eager leaves it, at every
call."""

from __future__ import annotations

import collections
import copy
import dataclasses
import types

import pytest
import torch
from torch import nn

import thunder
from tests.harness.third_party import import_litgpt, import_litgpt_generate
from tests.jit_checks import assert_no_fakes, nothing_leaks  # noqa: F401


def x(scale: float = 1.0) -> torch.Tensor:
    return torch.arange(6.0).reshape(2, 3) * scale + 1


def same(a, b, path: str = "state") -> None:
    """Equal values, types and order, all the way down."""
    assert type(a) is type(b), f"{path}: {type(a)} and {type(b)}"
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, msg=lambda m: f"{path}: {m}")
    elif isinstance(a, dict):
        assert list(a) == list(b), f"{path}: {list(a)} and {list(b)}"
        for key in a:
            same(a[key], b[key], f"{path}[{key!r}]")
    elif isinstance(a, (list, tuple, collections.deque)):
        assert len(a) == len(b), f"{path}: {len(a)} and {len(b)} items"
        for i, (p, q) in enumerate(zip(a, b, strict=True)):
            same(p, q, f"{path}[{i}]")
    elif hasattr(a, "__dict__"):
        same(a.__dict__, b.__dict__, path)
    else:
        assert a == b, f"{path}: {a} and {b}"


@dataclasses.dataclass
class Cache:
    keys: torch.Tensor | None = None
    length: int = 0
    log: list = dataclasses.field(default_factory=list)


class Slotted:
    __slots__ = ("count", "last")

    def __init__(self):
        self.count = 0
        self.last = None


def append(a, box):
    box.append(a * 2)
    return a


def reorder(a, box):
    box.reverse()
    first = box.pop(0)
    box.extend([first * 2, a, 7, "text", [a + 1]])
    return first


def fill(a, box):
    box["new"] = a * 2
    box["old"] = box.pop("old") + 1
    box.pop("gone", None)
    box["nested"]["deep"].append(a)
    return box["old"]


def grow(a, cache):
    cache.keys = a if cache.keys is None else torch.cat([cache.keys, a])
    cache.length += a.shape[0]
    cache.log.append(cache.length)
    return cache.keys.sum(), cache


def count(a, cache):
    cache.count += 1
    cache.last = a * cache.count
    return cache.last


def remember(a, seen):
    seen.add(a.shape[0])
    seen.discard(0)
    return a * len(seen)


def shift(a, queue):
    queue.append(a)
    queue.popleft()
    return queue[0] + 1


def replace(a, box):
    box[0]["inner"] = Cache(a * 3, 2)
    box[1] = box[0]
    return box[0]["inner"].keys


CASES = [
    (append, list),
    (append, lambda: [x()]),
    (reorder, lambda: [x(), x(2), x(3)]),
    (fill, lambda: {"old": x(), "gone": 1, "nested": {"deep": [1]}}),
    (fill, lambda: collections.OrderedDict(old=x(), gone=1, nested={"deep": [1]})),
    (grow, Cache),
    (count, Slotted),
    (remember, lambda: {0, 1}),
    (shift, lambda: collections.deque([x(), x(2)])),
    (replace, lambda: [{"a": 1}, None]),
]


@pytest.mark.parametrize(("program", "make"), CASES, ids=lambda v: v.__name__ if hasattr(v, "__name__") else "")
def test_changes_of_an_argument(program, make):
    compiled = thunder.jit(program)
    for start in range(2):  # another object of the same form, then the same one again and again
        ours, eager = make(), make()
        for step in range(3):
            a = x(step + start + 1)
            same(compiled(a, ours), program(a, eager), "result")
            if not isinstance(ours, Slotted):
                same(ours, eager)
            else:
                same((ours.count, ours.last), (eager.count, eager.last))


def test_an_argument_is_the_same_object_afterwards():
    def program(a, cache):
        cache.log.append(a)
        return cache, cache.log

    compiled, cache = thunder.jit(program), Cache()
    log = cache.log
    out = compiled(x(), cache)
    assert out[0] is cache and out[1] is log and cache.log is log and len(log) == 1


def test_gradients_reach_what_was_put_into_an_argument():
    def program(a, box):
        box.append(a * 3)
        return a * 2

    compiled = thunder.jit(program)
    for _ in range(2):
        a, box = x().requires_grad_(), []
        compiled(a, box)
        box[0].sum().backward()
        torch.testing.assert_close(a.grad, torch.full_like(a, 3.0))


class State(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen, self.named, self.kinds = [], {}, set()
        self.last = None
        self.counter = types.SimpleNamespace(calls=0, where={"deep": [0]})
        self.temporary = 1

    def forward(self, a):
        self.seen.append(a.mean())
        self.named["a"] = {"of": a * 2, "shape": tuple(a.shape)}
        self.kinds.add(a.dtype)
        self.last = [a + 1, (a + 2, None)]
        self.counter.calls += 1
        self.counter.where["deep"][0] += 2
        self.fresh = {"activation": a}
        if hasattr(self, "temporary"):
            del self.temporary
        return a * self.counter.calls + len(self.seen)


def test_state_of_a_module():
    ours, eager = State(), State()
    compiled = thunder.jit(ours)
    for step in range(5):
        same(compiled(x(step)), eager(x(step)), "result")
        same({k: v for k, v in vars(ours).items() if not k.startswith("_")},
             {k: v for k, v in vars(eager).items() if not k.startswith("_")})  # fmt: skip
    assert_no_fakes(ours)
    assert thunder.compile_stats(compiled).fallbacks == 0


def test_state_that_stays_the_same_is_compiled_once():
    class Keep(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = {}

        def forward(self, a):
            self.last["activation"] = [a * 2]
            return a

    net = Keep()
    compiled = thunder.jit(net)
    for step in range(4):
        compiled(x(step))
        torch.testing.assert_close(net.last["activation"][0], x(step) * 2)
    assert thunder.cache_misses(compiled) <= 2


TOTAL = 0
KEPT: list = []


def test_variables_and_globals():
    def make():
        count, tensors = 0, []

        def program(a):
            nonlocal count
            global TOTAL
            count += 1
            TOTAL += 2
            tensors.append(a * count)
            KEPT.append(count)
            return a * count + TOTAL

        return program, lambda: (count, list(tensors))

    global TOTAL
    results = []
    for wrap in (thunder.jit, lambda f: f):
        TOTAL = 0
        KEPT.clear()
        program, state = make()
        fn = wrap(program)
        outs = [fn(x(step)) for step in range(4)]
        results.append((outs, state(), TOTAL, list(KEPT)))
    same(*results)


# ---- caches of language models ----


def llama(layers: int = 2):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": layers}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()


def decode(model, cache, tokens: int) -> list[int]:
    current, position, out = torch.tensor([[1, 2, 3, 4]]), torch.arange(4), []
    with torch.no_grad():
        for _ in range(tokens):
            result = model(input_ids=current, past_key_values=cache, use_cache=True, cache_position=position)
            assert result.past_key_values is cache
            current, position = result.logits[:, -1:].argmax(-1), position[-1:] + 1
            out.append(current.item())
    return out


@pytest.mark.filterwarnings("ignore::thunder.ThunderWarning")  # every length is a program
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_decoding_with_a_cache_of_transformers(kind):
    pytest.importorskip("transformers")
    from transformers import DynamicCache, StaticCache

    model = llama()
    make = {
        "dynamic": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=80),
    }[kind]
    compiled, ours, eager = thunder.jit(model), make(), make()
    assert decode(compiled, ours, 64) == decode(model, eager, 64)
    for mine, theirs in zip(ours.layers, eager.layers, strict=True):
        same(mine, theirs)
    if kind == "static":
        assert thunder.cache_misses(compiled) == 2
    assert thunder.compile_stats(compiled).fallbacks == 0


LITGPT = {
    "pythia-14m": {"n_layer": 2, "block_size": 128},
    "Llama-3.2-1B": {"n_layer": 2, "n_embd": 64, "n_head": 4, "n_query_groups": 2, "head_size": 16, "block_size": 128},
    "Gemma-2-2b": {"n_layer": 2, "n_embd": 64, "n_head": 4, "n_query_groups": 2, "head_size": 16, "block_size": 128},
}


@pytest.mark.parametrize("name", LITGPT)
def test_generate_of_litgpt(name):
    """Its own `generate`, greedy and sampling, with the cache that it writes to and the length that it counts up."""
    litgpt, generate = import_litgpt(), import_litgpt_generate().generate
    torch.manual_seed(0)
    small = {"intermediate_size": 96, "vocab_size": 96, "padded_vocab_size": 96, **LITGPT[name]}
    config = litgpt.Config.from_name(name, **small)
    models = [litgpt.GPT(config).eval()]
    models.append(copy.deepcopy(models[0]))
    compiled = thunder.jit(models[1])
    tokens = []
    for fn, model in zip((models[0], compiled), models, strict=True):
        model.set_kv_cache(batch_size=1)
        torch.manual_seed(0)
        tokens.append([generate(fn, torch.arange(4), 64, temperature=t, top_k=5) for t in (0.0, 0.8)])
    same(tokens[0], tokens[1])
    same(dict(models[0].named_buffers()), dict(models[1].named_buffers()))
    assert thunder.compile_stats(compiled).fallbacks == 0
    if name != "Gemma-2-2b":  # whose sliding windows ask for the value of a tensor
        assert thunder.cache_misses(compiled) == 3
