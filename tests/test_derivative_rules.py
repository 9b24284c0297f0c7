"""Every derivative rule of the catalogue, compared with eager PyTorch and with the derivative taken from its autograd.

The programs are entries of `op_db` in float64, and below what those lack: properties, aliases, indexing. Each runs
three times: with a first gradient, with fresh values and one that is not contiguous, and with the catalogue's rules
left out. A rule may decline some samples; one that declines all of them is not tested, and the test says so.

    THUNDER_LONG=1 python -m pytest tests/test_derivative_rules.py      all samples
"""

from __future__ import annotations

import collections
import itertools
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import thunder._C as _C
import torch
from torch.nn import functional as F
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_utils import set_rng_seed
from torch.testing._internal.opinfo.core import OpInfo

import thunder
from tests.harness.compare import clone, differences, gradients_differ
from tests.harness.judge_op_grad import _leaves as leaves
from tests.harness.judge_op_grad import differentiable, tensors_in
from tests.test_meta_rules import CATALOG, dotted, spellings

LONG = bool(int(os.environ.get("THUNDER_LONG", "0")))
SAMPLES = 1000 if LONG else 8  # of each entry and spelling, spread over what there is
RULES = {op["name"]: op for op in _C.catalog() if op["grad"]}
NEVER_NOTED = {
    "detach",  # its rule says that there is no gradient
    "as_strided_scatter",  # stands for a write through a view: tests/test_train_semantics.py
    "positive",  # is gone before: it returns its input
}

Program = Callable[..., Any]


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Numbers apart from each other and from zero, so that no kink or tie is hit."""
    order = torch.randperm(torch.Size(shape).numel()).reshape(shape)
    return ((order + 1.3) / 7 * (1 - 2 * (order % 2))).to(dtype).requires_grad_()


INDEX = torch.tensor([[0, 2], [1, 1]])
CLASSES = torch.tensor([1, 0, 2])

# By operator of the catalogue: a program and its arguments, for what op_db does not call or calls otherwise.
CASES: dict[str, list[tuple[Program, tuple[Any, ...]]]] = {
    "getitem": [
        (lambda x: x[1], (leaf(3, 4),)),
        (lambda x: x[..., 1:3], (leaf(3, 4),)),
        (lambda x: x[:, None, ::2, -1], (leaf(3, 4, 2),)),
        (lambda x: x[-2:, 0], (leaf(3, 4),)),
        (lambda x: x[1:1], (leaf(3, 4),)),
        (lambda x, i: x[i], (leaf(3, 4), INDEX)),
        (lambda x, i: x[:, i], (leaf(2, 3), INDEX)),
        (lambda x, i: x[i, i], (leaf(3, 3, 2), INDEX)),
    ],
    "to": [(lambda x: x.to(torch.float32), (leaf(3, 4),)), (lambda x: x.to("cpu", copy=True), (leaf(3, 4),))],
    "to_float": [(lambda x: x.float(), (leaf(3, 4),))],
    "to_half": [(lambda x: x.half(), (leaf(3, 4),))],
    "to_bfloat16": [(lambda x: x.bfloat16(), (leaf(3, 4),))],
    "to_double": [(lambda x: x.double(), (leaf(3, 4, dtype=torch.float32),))],
    "type_as": [(lambda x, y: x.type_as(y), (leaf(3, 4), leaf(2, dtype=torch.float32)))],
    "contiguous": [(lambda x: x.t().contiguous(), (leaf(3, 4),))],
    "Tensor.where": [(lambda x, y: x.where(x > 0, y), (leaf(3, 4), leaf(4)))],
    "embedding": [(lambda w, i: torch.embedding(w, i, 1), (leaf(4, 3), INDEX))],
    "dropout": [(lambda x: torch.dropout(x, 0.3, True), (leaf(3, 4),))],
    "functional.dropout": [(lambda x: F.dropout(x, 0.3), (leaf(3, 4),))],
    "matmul": [(lambda x, y: x @ y, (leaf(2, 3, 4), leaf(4, 5)))],
    "selu": [(lambda x: torch.selu(x), (leaf(3, 4),))],
    "relu": [(lambda x: torch.relu(x), (leaf(3, 4),))],
    "T": [(lambda x: x.T * 2, (leaf(3, 4),))],
    "pow": [(lambda x: x**3, (leaf(3, 4),)), (lambda x: torch.pow(x.exp(), -0.5), (leaf(3, 4),))],
    "nll_loss": [(lambda x, t: F.nll_loss(x, t), (leaf(3, 4), CLASSES))],
    "clamp": [(lambda x: torch.clamp(x, -0.4, 0.6), (leaf(3, 4),)), (lambda x: x.clamp(max=0.5), (leaf(3, 4),))],
    "clamp_min": [(lambda x: torch.clamp_min(x, 0), (leaf(3, 4),))],
    "clamp_max": [(lambda x: x.clamp_max(0.5), (leaf(3, 4),))],
    "layer_norm": [(lambda x, w: torch.layer_norm(x, (4,), w, None), (leaf(3, 4), leaf(4)))],
    "group_norm": [(lambda x, w, b: torch.group_norm(x, 2, w, b), (leaf(3, 4, 5), leaf(4), leaf(4)))],
    "cross_entropy": [
        (lambda x, t: F.cross_entropy(x, t), (leaf(3, 4), CLASSES)),
        (lambda x, t: F.cross_entropy(x, t, ignore_index=0, reduction="sum"), (leaf(3, 4), CLASSES)),
        (lambda x, t, w: F.cross_entropy(x, t, w), (leaf(3, 4), CLASSES, torch.rand(4).double())),
    ],
    "binary_cross_entropy_with_logits": [
        (lambda x, t: F.binary_cross_entropy_with_logits(x, t), (leaf(3, 4), torch.rand(3, 4).double()))
    ],
    "scaled_dot_product_attention": [
        (
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
            (leaf(2, 3, 4, 8), leaf(2, 3, 5, 8), leaf(2, 3, 5, 8)),
        ),
        (
            lambda q, k, m: F.scaled_dot_product_attention(q, k, k, attn_mask=m, scale=0.3),
            (leaf(2, 3, 4, 8), leaf(2, 3, 5, 8), torch.ones(4, 5, dtype=torch.bool).tril()),
        ),
        (
            lambda q: F.scaled_dot_product_attention(*[q.transpose(1, 2)] * 3, is_causal=True),
            (leaf(2, 5, 3, 8),),
        ),
    ],
}  # fmt: skip


def rules_called(op: OpInfo) -> set[str]:
    """The catalogued operators with a rule that the entry may stand for."""
    names = {CATALOG[dotted(f)]["name"] for f in spellings(op) if dotted(f) in CATALOG}
    last = op.name.removeprefix("nn.functional.")
    names |= {op["name"] for name, op in CATALOG.items() if name.rpartition(".")[2] == last}
    return names & RULES.keys()


def programs(op: OpInfo) -> Iterator[tuple[Program, list[tuple[Any, ...]]]]:
    """Samples of an entry under each of its spellings, with two sets of values."""
    for spelling in spellings(op):
        if dotted(spelling) in CATALOG and CATALOG[dotted(spelling)]["effects"] & 32:
            continue
        lists = []
        for seed in (0, 1):
            set_rng_seed(seed)
            lists.append(op.sample_inputs("cpu", torch.float64, requires_grad=True, set_seed=False))
        pairs = list(itertools.islice(zip(*lists, strict=False), 1000 if LONG else 40))
        for first, second in pairs[:: -(-len(pairs) // SAMPLES) or 1]:
            yield (
                lambda x, args, kwargs, f=spelling: f(x, *args, **kwargs),
                [leaves((s.input, s.args, s.kwargs)) for s in (first, second)],
            )


class Refused(Exception):
    """Eager does not run the program, or there is nothing to differentiate."""


def step(function: Program, arguments: Any, seed: int, strided: bool) -> tuple[Any, tuple[torch.Tensor | None, ...]]:
    """Outputs and gradients; the incoming gradients are every second number of a larger tensor where asked."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    outputs = function(*arguments)
    chosen = [t for t in tensors_in(outputs) if t.requires_grad]
    wrt = [t for t in tensors_in(arguments) if t.requires_grad]
    if not chosen or not wrt:
        raise Refused
    incoming = []
    for t in chosen:
        g = torch.randn(*t.shape, 2, dtype=torch.float64, generator=generator).to(t.dtype)[..., 0]
        incoming.append(g if strided else g.contiguous())
    return outputs, torch.autograd.grad(chosen, wrt, incoming, allow_unused=True)


def alone(arguments: tuple[Any, ...], wanted: int) -> tuple[Any, ...]:
    """The tensors that require a gradient, made to stop doing so but for one."""
    for i, t in enumerate([t for t in tensors_in(arguments) if t.requires_grad]):
        t.requires_grad_(i == wanted)
    return arguments


class Judge:
    """What was wrong, and which operators' rules were used."""

    def __init__(self) -> None:
        self.wrong: list[str] = []
        self.used: collections.Counter[str] = collections.Counter()
        self.derived: collections.Counter[str] = collections.Counter()

    def run(self, label: str, program: Program, arguments: list[tuple[Any, ...]]) -> None:
        """Compares a program with eager under two sets of values, then without the rules."""
        compiled = thunder.jit(program)
        for seed, each in enumerate(arguments):
            ours = clone(each)
            try:
                expected = step(program, clone(each), seed, strided=seed == 1)
            except Exception:  # eager's own
                return
            self.compare(label, expected, lambda c=compiled, a=ours, s=seed: step(c, a, s, strided=s == 1))
        stats = thunder.compile_stats(compiled).entries
        for entry in stats:
            self.derived.update(entry["derived_rules"])
        if not stats or not stats[0]["catalogue_rules"]:
            return
        self.note(compiled)
        self.run_parts(label, program, arguments[0])
        was = _C.derived_only(True)
        try:
            plain = thunder.jit(program)
            expected = step(plain, clone(arguments[0]), 0, strided=False)
        finally:
            _C.derived_only(was)
        assert not thunder.compile_stats(plain).entries[0]["catalogue_rules"]
        self.compare(f"{label} and its derived rule", expected, lambda: step(compiled, clone(arguments[0]), 0, False))

    def run_parts(self, label: str, program: Program, arguments: tuple[Any, ...]) -> None:
        """Again with each tensor alone requiring a gradient, where several do: rules leave out what nobody wants."""
        count = sum(t.requires_grad for t in tensors_in(arguments))
        for wanted in range(count if count > 1 else 0):
            each, ours = (alone(clone(arguments), wanted) for _ in range(2))
            try:
                expected = step(program, each, 0, strided=False)
            except Exception:  # eager's own: there is no gradient for this one, or the others must require one
                continue
            self.compare(
                f"{label}, tensor {wanted} alone", expected, lambda a=ours: step(thunder.jit(program), a, 0, False)
            )

    def compare(self, label: str, expected: Any, run: Callable[[], Any]) -> None:
        """Notes what is different."""
        try:
            outputs, gradients = run()
        except thunder.CaptureError:  # the shape depends on values
            return
        except Exception as error:
            self.wrong.append(f"{label}: {type(error).__name__}: {error}")
            return
        found = differences(expected[0], outputs, strides=True)
        found += [f"gradient {line}" for line in gradients_differ(expected[1], gradients)]
        self.wrong += [f"{label}: {line}" for line in found[:1]]

    def note(self, compiled: Program) -> None:
        """Which operators of the captured program had no derived rule."""
        stats = thunder.compile_stats(compiled).entries[0]
        derived = set(stats["derived_rules"])
        for line in str(thunder.last_traces(compiled)[0]).splitlines():
            name = line.partition(" = ")[2].partition("(")[0] or line.strip().partition("(")[0]
            if name in CATALOG and name not in derived:
                self.used[CATALOG[name]["name"]] += 1


@pytest.fixture(scope="module")
def judge() -> Judge:
    """All programs, once."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    judge = Judge()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for op in op_db:
            if not differentiable(op) or not rules_called(op):
                continue
            for program, arguments in programs(op):
                judge.run(op.name, program, arguments)
        for name, cases in CASES.items():
            for program, arguments in cases:
                judge.run(name, program, [arguments, clone(arguments)])
                single = tuple(
                    a.detach().float().requires_grad_(a.requires_grad) if a.dtype == torch.float64 else a
                    for a in arguments
                )
                judge.run(f"{name} float32", program, [single, clone(single)])
    torch.set_num_threads(threads)
    return judge


def test_no_rule_contradicts_eager(judge):
    assert not judge.wrong, "\n".join(judge.wrong[:40])


def test_every_rule_is_used(judge):
    assert sorted(RULES.keys() - judge.used.keys() - NEVER_NOTED) == []


def test_declined_calls_are_derived(judge):
    assert judge.derived  # label smoothing, tensors as limits of clamp: nobody may take those for granted
    assert sum(judge.used.values()) > 2 * sum(judge.derived[name] for name in judge.derived if name in CATALOG)


def test_a_step_without_derived_rules_says_so():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU(), torch.nn.LayerNorm(4))
    compiled = thunder.jit(model)
    compiled(torch.randn(2, 4)).sum().backward()
    entry = thunder.compile_stats(compiled).entries[0]
    assert entry["derived_rules"] == () and entry["catalogue_rules"] == 3


def test_what_has_no_rule_is_counted_by_name():
    compiled = thunder.jit(lambda x: torch.atan(x) * 2)
    compiled(torch.randn(3, requires_grad=True)).sum().backward()
    entry = thunder.compile_stats(compiled).entries[0]
    assert entry["derived_rules"] == ("torch.atan",) and entry["catalogue_rules"] == 1
