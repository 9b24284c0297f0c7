"""What cannot be captured whole runs under torch.compile, with thunder as its backend and one warning."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from torch import nn

import thunder
from tests.test_executors import blocks


@pytest.fixture(autouse=True)
def default_fallback(monkeypatch, captures_must_succeed):
    monkeypatch.setattr("thunder._api.DEFAULT_FALLBACK", "dynamo")
    torch._dynamo.reset()


def branch(x):
    if x.sum() > 0:
        return x * 2 + 1
    return x - 1


def by_array(x):
    return x * 2 if x.numpy().sum() > 0 else x - 1


def warned(call) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", thunder.ThunderWarning)
        call()
    return [str(w.message) for w in seen if issubclass(w.category, thunder.ThunderWarning)]


def test_branches_by_value_are_right_on_every_call_with_one_warning():
    compiled = thunder.jit(branch, branch_limit=0)
    inputs = [torch.ones(3), -torch.ones(3), torch.ones(3) * 2]
    texts = warned(lambda: [torch.testing.assert_close(compiled(x), branch(x)) for x in inputs])
    assert len(texts) == 1
    assert "runs under torch.compile, in parts" in texts[0] and "test_dynamo.py" in texts[0]
    assert thunder.compile_stats(compiled).fallbacks == 3
    assert thunder.last_compile_options(compiled)["fallback"] == "dynamo"


@pytest.mark.parametrize(
    "program",
    [
        lambda x: x * x.sum().item(),
        lambda x: x[x > 0] * 2,
        lambda x: x.nonzero().float() + 1,
        lambda x: torch.unique(x.round()) * 2,
        lambda x: torch.stack([t * i for i, t in enumerate(x)]) + len(x.tolist()),
    ],
    ids=["item", "mask", "nonzero", "unique", "tolist"],
)
@pytest.mark.filterwarnings("ignore::thunder.ThunderWarning")
def test_data_dependent_programs_are_right(program):
    compiled = thunder.jit(program)
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(6)
        torch.testing.assert_close(compiled(x), program(x))


@pytest.mark.filterwarnings("ignore::thunder.ThunderWarning")
def test_modules_train_through_it():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = blocks(3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            x = self.first(x)
            return self.second(x) if x.mean() > 0 else self.third(x)

    torch.manual_seed(0)
    model = Routed()
    compiled = thunder.jit(model)
    for sign in (1, -1, 1):
        x = torch.randn(4, 16) + 3 * sign
        gradients = []
        for call in (compiled, model):
            model.zero_grad()
            call(x).square().mean().backward()
            gradients.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert model.calls == 6


@pytest.mark.filterwarnings("ignore::thunder.ThunderWarning")
def test_effects_that_cannot_be_replayed_happen():
    seen = []

    def program(x):
        seen.append(float(x.sum()))
        return x + 1

    compiled = thunder.jit(program)
    for i in range(3):
        compiled(torch.full((2,), float(i)))
    assert seen == [0.0, 2.0, 4.0]


def test_backend_of_torch_compile():
    made = []

    def backend(graph, inputs):
        made.append(thunder.dynamo.backend(graph, inputs))
        return made[-1]

    model = blocks(2)
    compiled = torch.compile(model, backend=backend)
    x = torch.randn(4, 16)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), model(x))
    assert made and all(thunder.compile_stats(part).fallbacks == 0 for part in made)
    with_options = functools.partial(thunder.dynamo.backend, executors=["torch"])
    torch.testing.assert_close(torch.compile(model, backend=with_options)(x), model(x))


def test_graph_breaks_leave_compiled_parts():
    graphs = []

    def backend(graph, inputs):
        graphs.append(thunder.dynamo.backend(graph, inputs))
        return graphs[-1]

    compiled = torch.compile(branch, backend=backend)
    compiled(torch.ones(3)), compiled(-torch.ones(3))
    assert len(graphs) == 3 and all(thunder.compile_stats(g).fallbacks == 0 for g in graphs)


def test_error_and_eager_are_there():
    with pytest.raises(thunder.CaptureError):
        thunder.jit(by_array, fallback="error")(torch.ones(3))
    compiled = thunder.jit(by_array, fallback="eager")
    (text,) = warned(lambda: torch.testing.assert_close(compiled(torch.ones(3)), by_array(torch.ones(3))))
    assert "runs eager" in text


def test_errors_of_the_program_stay_errors():
    with pytest.raises(RuntimeError, match="shape"):
        thunder.jit(lambda x: x.view(99))(torch.ones(3))
