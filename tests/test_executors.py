"""Executors: registration, selection, regions, and what happens to a kernel that is wrong."""

from __future__ import annotations

import gc
import inspect
import math
import operator
import re
import warnings
import weakref
from concurrent.futures import Future

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import thunder
from tests import replaced_functions
from tests.replaced_functions import scaled
from thunder import extend
from thunder.extend import build


class Interpreter(extend.FusionExecutor):
    """Runs the text of a region; what is built is counted."""

    def __init__(self, name: str = "interpreter", **options) -> None:
        super().__init__(name, **options)
        self.regions: list[thunder.Trace] = []

    def fuse(self, region):
        self.regions.append(region.trace)
        names = region.trace.namespace()
        exec(str(region.trace), names)
        return names["region"]


class Block(nn.Module):
    """A residual block with a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def blocks(count: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(count)))


def check(model, arguments, executors, **options):
    """Two calls and two training steps against eager; the compiled model."""
    compiled = thunder.jit(model, executors=executors, **options)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(*arguments), model(*arguments))
    for _ in range(2):
        gradients = []
        for call in (compiled, model):
            model.zero_grad(set_to_none=True)
            call(*arguments).square().mean().backward()
            gradients.append([p.grad for p in model.parameters()])
        torch.testing.assert_close(*gradients)
    return compiled


def units(compiled) -> list:
    compiled = getattr(compiled, "_thunder_callable", compiled)
    return [region for _, region, _ in compiled._thunder_claims.units]


def only_warning(call) -> str:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        call()
    messages = [str(w.message) for w in seen if issubclass(w.category, thunder.ThunderWarning)]
    assert len(messages) == 1, messages
    return messages[0]


# ---- lists and names ----


@pytest.fixture
def registered():
    executor = extend.register_executor(extend.OperatorExecutor("mine_for_tests"))
    yield executor
    if executor in extend.get_all_executors():
        extend.deregister_executor(executor)


def test_registered_executor_is_found_by_name(registered):
    assert thunder.extend.get_executor("mine_for_tests") is registered
    assert registered in thunder.get_all_executors()
    compiled = thunder.jit(lambda x: x, executors=["mine_for_tests"])
    assert thunder.last_compile_options(compiled)["executors"][0] is registered
    extend.deregister_executor("mine_for_tests")
    with pytest.raises(LookupError, match="known are 'torch', 'python'"):
        extend.get_executor("mine_for_tests")


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(LookupError, match=r"no executor is called 'torchcompil'.*Did you mean 'torchcompile'"):
        thunder.jit(lambda x: x, executors=["torchcompil"])


def test_default_and_always_lists(registered):
    before = extend.get_default_executors(), extend.get_always_executors()
    try:
        extend.add_default_executor(registered)
        assert extend.get_default_executors()[0] is registered
        assert extend.resolve_executors(None)[0] is registered
        extend.remove_default_executor(registered)
        assert registered not in extend.resolve_executors(None)
        extend.add_always_executor("mine_for_tests")
        assert extend.resolve_executors(["python"])[1] is registered
        extend.remove_always_executor(registered)
        extend.set_default_executors(["python"])
        assert extend.get_default_executors() == (extend.python_executor,)
        extend.set_always_executors(["python"])
        assert extend.get_always_executors() == (extend.python_executor, extend.pytorch_executor)
    finally:
        extend.set_default_executors(before[0])
        extend.set_always_executors(before[1])
    assert (extend.get_default_executors(), extend.get_always_executors()) == before


def test_lists_are_joined_without_repetition():
    joined = extend.add_executor_lists(["python"], None, ["torch", "python"])
    assert [e.name for e in joined] == ["python", "torch"]


def test_an_executor_that_is_replaced_leaves_the_lists(registered):
    try:
        extend.add_default_executor(registered)
        other = extend.register_executor(extend.OperatorExecutor("mine_for_tests"))
        assert extend.get_default_executors()[0] is other
        with pytest.raises(LookupError, match="is not registered"):
            extend.deregister_executor(registered)
        extend.deregister_executor(other)
        assert not extend.get_default_executors()
    finally:
        extend.set_default_executors([])


def test_built_in_executors_stay():
    with pytest.raises(ValueError, match="built in"):
        extend.deregister_executor("torch")
    with pytest.raises(ValueError, match="built in"):
        extend.register_executor(extend.OperatorExecutor("torch"))
    with pytest.raises(ValueError, match="cannot be removed"):
        extend.remove_always_executor("torch")


def test_what_is_no_executor_is_refused():
    with pytest.raises(TypeError, match="must be a list"):
        thunder.jit(lambda x: x, executors="torch")
    with pytest.raises(TypeError, match="must be a list"):
        thunder.jit(lambda x: x, executors=extend.pytorch_executor)
    with pytest.raises(TypeError, match="not int"):
        thunder.jit(lambda x: x, executors=[3])
    with pytest.raises(TypeError, match="is a str, not NoneType"):
        extend.get_executor(None)
    with pytest.raises(ValueError, match="identifier"):
        extend.OperatorExecutor("not a name")


# ---- single operations ----


def test_implementation_runs_every_spelling_of_its_operator():
    calls = []

    def add(a, b, alpha=1):
        calls.append(1)
        return torch.sub(a, b, alpha=-alpha)

    executor = extend.OperatorExecutor("adder")
    executor.register_implementation(torch.add, fn=add)
    x, y = torch.randn(3), torch.randn(3)

    def program(x, y):
        return torch.add(x, y) * 1, (x + y) * 2, x.add(y) * 3

    compiled = thunder.jit(program, executors=[executor], verify="off")
    torch.testing.assert_close(compiled(x, y), program(x, y))
    assert calls


def test_every_spelling_of_an_operator_of_torch_library_is_meant():
    @torch.library.custom_op("tests_of_executors::spelled", mutates_args=())
    def spelled(x: Tensor, factor: float) -> Tensor:
        return x * factor

    spelled.register_fake(lambda x, factor: torch.empty_like(x))
    packet = torch.ops.tests_of_executors.spelled
    x = torch.randn(3)

    def program(x):
        return spelled(x, 2.0), packet(x, 3.0), packet.default(x, 4.0), torch.ops.aten.sin(x)

    for op in (spelled, packet, packet.default, "torch.ops.tests_of_executors.spelled.default"):
        executor = extend.OperatorExecutor("spells")
        executor.register_implementation(op, fn=lambda x, factor: x * factor)
        executor.register_implementation(torch.sin, fn=torch.sin)
        compiled = thunder.jit(program, executors=[executor])
        for _ in range(2):
            torch.testing.assert_close(compiled(x), program(x))
        assert [u.state for u in units(compiled)] == ["trusted"] * 4


def test_trace_names_who_runs_what():
    executor = extend.OperatorExecutor("softly")
    executor.register_implementation(F.gelu, fn=F.gelu)
    compiled = check(blocks(), (torch.randn(4, 16),), [executor])
    text = str(thunder.last_traces(compiled)[-1])
    assert len(re.findall(r"= softly_gelu_\d+\(", text)) == 3 and "functional.gelu" not in text
    names = thunder.last_traces(compiled)[-1].namespace()
    unit = next(value for name, value in names.items() if name.startswith("softly"))
    assert unit.state == "trusted" and unit.executor is executor and "torch.nn.functional.gelu" in str(unit.trace)


def test_first_executor_in_the_list_has_priority():
    seen = []
    executors = []
    for name in ("first", "second"):
        executor = extend.OperatorExecutor(name)
        executor.register_implementation(F.relu, fn=lambda x, inplace=False, n=name: (seen.append(n), F.relu(x))[1])
        executors.append(executor)
    x = torch.randn(3)
    thunder.jit(F.relu, executors=executors)(x)
    assert set(seen) == {"first"}
    seen.clear()
    thunder.jit(lambda x: F.relu(x), executors=executors[::-1])(x)
    assert set(seen) == {"second"}


def test_executors_after_torch_are_never_asked():
    executor = extend.OperatorExecutor("late")
    executor.register_implementation(F.relu, fn=lambda x, inplace=False: pytest.fail("it ran"))
    compiled = thunder.jit(lambda x: F.relu(x), executors=["torch", executor])
    compiled(torch.randn(3))


def test_checker_declines_with_its_reason():
    asked = []

    def small(x, approximate="none"):
        asked.append((type(x).__name__, tuple(x.shape), x.dtype, x.device.type, x.stride()))
        return (x.shape[-1] < 8, "too wide")

    executor = extend.OperatorExecutor("narrow")
    executor.register_implementation(F.gelu, fn=F.gelu, checker=small)
    compiled = thunder.jit(lambda x: F.gelu(x), executors=[executor])
    compiled(torch.randn(2, 4))
    assert units(compiled)[0].state == "trusted"
    compiled(torch.randn(2, 16))
    assert len(units(compiled)) == 1
    assert asked[1][1:] == ((2, 16), torch.float32, "cpu", (16, 1))
    claims = compiled._thunder_claims
    assert claims.declines["narrow", "torch.nn.functional.gelu", "too wide"] == 1


ANSWERS = {
    "true": (True, None),
    "one": (1, None),
    "pair yes": ((True, "unheard"), None),
    "single yes": ((True,), None),
    "none": (None, "says no"),
    "zero": (0, "says no"),
    "no text": ("", "says no"),
    "text": ("why not", "why not"),
    "pair no": ((False, "why not"), "why not"),
    "single no": ((False,), "says no"),
    "empty pair": ((), "says no"),
}


@pytest.mark.parametrize("kind", ANSWERS)
@pytest.mark.parametrize("asked", ["checker", "wants"])
def test_answers_of_checkers_and_of_wants(asked, kind):
    answer, reason = ANSWERS[kind]
    if asked == "checker":
        executor = extend.OperatorExecutor("answers")
        executor.register_implementation(torch.sin, fn=torch.sin, checker=lambda x: answer)
    else:
        executor = Interpreter("answers")
        executor.register_supported(torch.sin)
        executor.wants = lambda region: answer
    compiled = thunder.jit(lambda x: torch.sin(x), executors=[executor])
    compiled(torch.randn(2))
    reasons = [why for _, _, why in compiled._thunder_claims.declines]
    assert len(units(compiled)) == (reason is None)
    assert not reasons if reason is None else reason in reasons[0]


def test_error_in_a_checker_reaches_the_user_and_says_whose_it_is():
    executor = extend.OperatorExecutor("broken_checker")
    executor.register_implementation(F.gelu, fn=F.gelu, checker=lambda x: x.no_such_thing)
    with pytest.raises(AttributeError, match="no_such_thing") as raised:
        thunder.jit(lambda x: F.gelu(x), executors=[executor])(torch.randn(2))
    assert "executor 'broken_checker' was asked: its checker for torch.nn.functional.gelu" in raised.value.__notes__


def test_checker_that_looks_at_data_is_told_so():
    executor = extend.OperatorExecutor("curious")
    executor.register_implementation(F.gelu, fn=F.gelu, checker=lambda x: bool((x > 0).all()))
    with pytest.raises(RuntimeError, match=r"'curious': its checker for .*gelu uses values of tensors"):
        thunder.jit(lambda x: F.gelu(x), executors=[executor])(torch.randn(2))


def test_what_is_registered_later_is_known_to_later_programs():
    executor = extend.OperatorExecutor("learns")
    compiled = thunder.jit(lambda x: F.relu(x), executors=[executor])
    compiled(torch.randn(2))
    executor.register_implementation(F.relu, fn=lambda x, inplace=False: x.clamp(min=0))
    for x in (torch.randn(3), torch.randn(3, 1)):
        for _ in range(2):
            torch.testing.assert_close(compiled(x), F.relu(x))
    assert [u.state for u in units(compiled)] == ["trusted", "trusted"]


def test_an_executor_may_be_deregistered_while_it_is_used(registered):
    registered.register_implementation(F.relu, fn=lambda x, inplace=False: x.clamp(min=0))
    compiled = thunder.jit(lambda x: F.relu(x), executors=["mine_for_tests"])
    compiled(torch.randn(3))
    extend.deregister_executor(registered)
    for x in (torch.randn(3), torch.randn(3, 1)):
        torch.testing.assert_close(compiled(x), F.relu(x))
    assert [u.state for u in units(compiled)] == ["trusted", "trusted"]


def test_python_executor_runs_numpy():
    def numpy_tanh(x):
        import numpy

        return torch.from_numpy(numpy.tanh(x.detach().numpy()))

    python = extend.get_executor("python")
    python.register_implementation(torch.tanh, fn=numpy_tanh, checker=lambda x: x.device.type == "cpu")
    try:
        compiled = check(nn.Sequential(nn.Linear(3, 3), nn.Tanh()), (torch.randn(2, 3),), ["python"])
        assert {u.state for u in units(compiled)} == {"trusted"}
    finally:
        python._table.clear()


def test_single_op_executor():
    executor = extend.single_op_executor("one", F.silu, lambda x, inplace=False: x * torch.sigmoid(x))
    compiled = check(nn.Sequential(nn.Linear(3, 3), nn.SiLU()), (torch.randn(2, 3),), [executor])
    assert re.search(r"= one_silu_\d+\(", str(thunder.last_traces(compiled)[-1]))


def test_execution_transform_and_bad_registrations():
    executor = extend.OperatorExecutor("rules")
    executor.register_implementation(
        F.softplus, execution_transform=lambda x, beta=1.0, threshold=20.0: torch.log1p(torch.exp(x))
    )
    compiled = thunder.jit(lambda x: F.softplus(x), executors=[executor])
    x = torch.randn(5)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), F.softplus(x))
    assert units(compiled)[0].state == "trusted"
    with pytest.raises(TypeError, match="takes one of"):
        executor.register_implementation(F.relu)
    with pytest.raises(TypeError, match="takes one of"):
        executor.register_implementation(F.relu, F.relu, fn=F.relu)
    with pytest.raises(TypeError, match="callable"):
        executor.register_implementation(F.relu, fn=3)
    for option in ("checker", "grad_transform", "inference", "training"):
        with pytest.raises(TypeError, match=f"{option} is callable, not int"):
            executor.register_implementation(F.relu, fn=F.relu, **{option: 3})
    with pytest.raises(ValueError, match="no importable name"):
        executor.register_implementation(lambda x: x, fn=F.relu)


def test_random_and_writing_operations_are_claimed_by_nobody():
    executor = extend.OperatorExecutor("greedy")
    executor.register_implementation(F.dropout, fn=lambda *a, **k: pytest.fail("it ran"))
    compiled = thunder.jit(lambda x: F.dropout(x, 0.5, True), executors=[executor])
    torch.manual_seed(0)
    ours = compiled(torch.ones(20))
    torch.manual_seed(0)
    assert torch.equal(ours, F.dropout(torch.ones(20), 0.5, True))


# ---- operators of the user ----


def test_operator_in_fewer_than_thirty_lines():
    @extend.op(name="scaled_silu_for_tests")
    def scaled_silu(x: Tensor, scale: float) -> Tensor:
        return F.silu(x * scale)

    @scaled_silu.meta
    def _(x, scale):
        return torch.empty_like(x)

    @scaled_silu.backward
    def _(ctx, grad):
        x, scale = ctx.inputs
        s = torch.sigmoid(x * scale)
        return grad * scale * (s * (1 + x * scale * (1 - s)))

    scaled_silu.check(torch.randn(4, requires_grad=True), 2.0)

    def program(x):
        return scaled_silu(x * 2, 3.0).sum()

    compiled = thunder.jit(program)
    for _ in range(2):
        x = torch.randn(5, dtype=torch.float64, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        compiled(x).backward()
        F.silu(y * 2 * 3.0).sum().backward()
        torch.testing.assert_close(x.grad, y.grad)
    assert "torch.ops.thunder_user.scaled_silu_for_tests.default" in str(thunder.last_traces(compiled)[0])
    assert thunder.compile_stats(compiled).fallbacks == 0


def test_operator_that_writes_says_so():
    @extend.op(name="fill_for_tests", mutates=["x"])
    def fill(x: Tensor, value: float) -> None:
        x.fill_(value)

    fill.meta(lambda x, value: None)

    def program(x):
        y = x * 1
        fill(y, 3.0)
        return y + 1

    compiled = thunder.jit(program)
    torch.testing.assert_close(compiled(torch.zeros(3)), torch.full((3,), 4.0))
    with pytest.raises(TypeError, match="no backward"):
        fill.backward(lambda ctx: None)


@pytest.mark.parametrize(
    ("fn", "meta", "backward", "message"),
    [
        (lambda x: x * 2, lambda x: x.new_empty(3), None, r"shape torch.Size\(\[2\]\).*\[3\]"),
        (lambda x: x.double(), lambda x: torch.empty_like(x), None, "dtype torch.float64.*torch.float32"),
        (lambda x: (x.zero_(), x * 2)[1], lambda x: torch.empty_like(x), None, "writes to 'x': say mutates"),
        (lambda x: x, lambda x: torch.empty_like(x), None, "returns 'x' or a view of it"),
        (lambda x: x * 2, lambda x: torch.empty_like(x), lambda ctx, g: g, "does not agree with numerical"),
        (lambda x: x * 2, lambda x: torch.empty_like(x), lambda ctx, g: (g, g), "gave 2 gradients for 1 tensor"),
    ],
)
def test_check_finds_what_is_wrong_with_an_operator(fn, meta, backward, message):
    names = iter(range(1000))
    name = f"wrong_for_tests_{abs(hash(message)) % 10**8}_{next(names)}"
    executor = extend.OperatorExecutor("checks")
    operator = executor.register_operator(name, meta=meta, fn=lambda x: fn(x), backward=backward)
    x = torch.ones(2) if backward is None else torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match=message):
        operator.check(x)


WRONG_OPERATORS = {
    "shape": (lambda x: x * 2, lambda x: x.new_empty(3), None, r"shape torch.Size\(\[2\]\).*\[3\]"),
    "dtype": (lambda x: x.double(), torch.empty_like, None, "dtype torch.float64.*torch.float32"),
    "strides": (lambda x: torch.ones(2, 3).t(), lambda x: x.new_empty(3, 2), None, "strides"),
    "writes": (lambda x: (x.zero_(), x * 2)[1], torch.empty_like, None, "writes to 'x': say mutates"),
    "view": (lambda x: x.view(2), torch.empty_like, None, "returns 'x' or a view of it"),
    "gradient": (lambda x: x * 2, torch.empty_like, lambda ctx, g: g, "does not agree with numerical"),
    "gradients": (lambda x: x * 2, torch.empty_like, lambda ctx, g: (g, g), "gave 2 gradients for 1 tensor"),
}


def wrong_operator(kind: str, name: str, **options):
    fn, meta, backward, message = WRONG_OPERATORS[kind]

    def function(x: Tensor) -> Tensor:
        return fn(x)

    def rules():
        operator.meta(lambda x: meta(x))
        if backward is not None:
            operator.backward(backward)

    operator = extend.op(function, name=f"wrong_{kind}_{name}", **options)
    return operator, rules, message


@pytest.mark.parametrize("kind", WRONG_OPERATORS)
@pytest.mark.parametrize("given", ["tuple", "list", "function"])
def test_wrong_operator_is_found_at_its_registration(kind, given):
    one = (torch.ones(2),)
    example = {"tuple": one, "list": [one], "function": lambda: one}[given]
    _, rules, message = wrong_operator(kind, f"with_a_{given}", example=example)
    with pytest.raises(ValueError, match=message):
        rules()


@pytest.mark.parametrize("kind", [k for k in WRONG_OPERATORS if "gradient" not in k])
def test_wrong_operator_without_an_example_is_found_when_it_first_runs(kind):
    operator, rules, message = wrong_operator(kind, "at_its_first_run")
    rules()
    compiled = thunder.jit(lambda x: operator(x * 1) + 1)
    with pytest.raises(ValueError, match=message):
        compiled(torch.ones(2))


def test_right_operator_is_checked_once():
    ran = []

    def doubled(x: Tensor) -> Tensor:
        ran.append(x)
        return x * 2

    operator = extend.op(doubled, name="doubled_for_tests", example=lambda: (torch.tensor([1.0, float("nan")]),))
    operator.meta(lambda x: torch.empty_like(x))
    at_registration = len(ran)
    operator.backward(lambda ctx, g: g * 2, check=False)
    assert at_registration == len(ran) > 0
    compiled = thunder.jit(lambda x: operator(x * 1) + 1)
    for n in range(1, 4):
        torch.testing.assert_close(compiled(torch.ones(2)), torch.full((2,), 3.0))
        assert len(ran) == at_registration + n


def test_operator_of_a_list_of_tensors_with_its_derivative():
    def weighted(xs: list[Tensor], weights: list[float], bias: Tensor | None = None, *, times: int = 1) -> Tensor:
        total = sum(x * w for x, w in zip(xs, weights, strict=True)) * times
        return total if bias is None else total + bias

    operator = extend.op(weighted, name="weighted_for_tests")
    operator.meta(lambda xs, weights, bias=None, *, times=1: torch.empty_like(xs[0]))

    @operator.backward
    def _(ctx, grad):
        _, weights, bias, times = ctx.inputs
        found = [grad * w * times if i else None for i, w in enumerate(weights)]
        return (found,) if bias is None else (found, grad)

    def program(a, b, bias):
        return operator([a.detach(), a * b], [0.5, 2.0], bias, times=3).sum()

    def plainly(a, b, bias):
        return weighted([a.detach(), a * b], [0.5, 2.0], bias, times=3).sum()

    a, b, bias = (torch.randn(3, requires_grad=True) for _ in range(3))
    compiled = thunder.jit(program)
    for given in (bias, None):
        wanted = [t for t in (a, b, given) if t is not None]
        for call in (program, compiled, compiled):
            ours, theirs = (torch.autograd.grad(f(a, b, given), wanted) for f in (call, plainly))
            torch.testing.assert_close(ours, theirs)
    assert thunder.compile_stats(compiled).fallbacks == 0
    with pytest.raises(ValueError, match="does not agree with numerical"):
        operator.check([torch.ones(2), torch.ones(2)], [1.0, 2.0])


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda xs: (xs[0] * 2, xs[1].zero_())[0], "writes to 'xs'"),
        (lambda xs: xs[1], "returns 'xs' or a view of it"),
    ],
)
def test_lists_of_tensors_are_checked_too(fn, message):
    def function(xs: list[Tensor]) -> Tensor:
        return fn(xs)

    operator = extend.op(function, name="lists_for_tests")
    operator.meta(lambda xs: torch.empty_like(xs[0]))
    with pytest.raises(ValueError, match=message):
        operator.check([torch.ones(2), torch.ones(2)])


def test_operators_of_one_name_are_two_operators():
    def make(factor):
        @extend.op
        def scaled_for_tests(x: Tensor) -> Tensor:
            return x * factor

        scaled_for_tests.meta(lambda x: torch.empty_like(x))
        return scaled_for_tests

    twice, thrice = make(2), make(3)
    compiled = [thunder.jit(lambda x, f=f: f(x * 1)) for f in (twice, thrice)]
    for _ in range(2):
        for call, factor in zip(compiled, (2.0, 3.0), strict=True):
            assert torch.equal(call(torch.ones(2)), torch.full((2,), factor))
    executor = extend.OperatorExecutor("one_name")
    executor.register_operator("f", fn=lambda x: x * 2, like=torch.neg)
    with pytest.raises(ValueError, match="has an operator 'f' already"):
        executor.register_operator("f", fn=lambda x: x * 2, like=torch.neg)
    other = extend.OperatorExecutor("one_name").register_operator("f", fn=lambda x: x * 3, like=torch.neg)
    assert torch.equal(other._overload(torch.ones(1)), torch.full((1,), 3.0))


def _cost(call, *arguments, **keywords) -> float:
    """Microseconds."""
    import timeit

    return min(timeit.repeat(lambda: call(*arguments, **keywords), number=2000, repeat=9)) / 2000 * 1e6


def test_operator_costs_little_where_nothing_is_differentiated():
    kept = torch.ones(3)

    def bare(x: Tensor, s: float, ys: list[Tensor]) -> Tensor:
        return kept

    operator = extend.op(bare, name="costs_for_tests")
    x, y = torch.ones(3), nn.Parameter(torch.ones(3))
    assert _cost(operator, x, 2.0, [x]) - _cost(bare, x, 2.0, [x]) <= 2.0
    with torch.no_grad():
        assert _cost(operator, y, s=2.0, ys=[x]) - _cost(bare, y, s=2.0, ys=[x]) <= 2.0


def test_operator_is_found_by_whoever_takes_part():
    ran = []

    def doubled(x: Tensor, others: list[Tensor]) -> Tensor:
        ran.append(tuple(x.shape))
        return torch.from_numpy(x.detach().numpy() * 2)

    operator = extend.op(doubled, name="found_for_tests")
    operator.meta(lambda x, others: torch.empty_like(x))
    operator.backward(lambda ctx, grad: (grad * 2, None) if ctx.inputs[1] else grad * 2)
    x = torch.randn(3, 4)
    assert operator(x.to("meta"), []).is_meta and not ran
    alone = extend.op(lambda x: doubled(x, []), name="alone_for_tests")  # torch has no loops for lists of tensors
    alone.meta(lambda x: torch.empty_like(x))
    torch.testing.assert_close(torch.vmap(alone)(x), x * 2)
    assert set(ran) == {(4,)}
    for others in ([], [x]):
        y = x.clone().requires_grad_()
        operator(y, others).sum().backward()
        assert torch.equal(y.grad, torch.full_like(x, 2))
    needs = x.clone().requires_grad_()
    assert operator(x, [needs]).requires_grad
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watch():
        operator(x, others=[])
    assert operator._overload in seen


def test_operator_in_forward_mode_is_what_it_does():
    def squared(x: Tensor) -> Tensor:
        return x * x

    operator = extend.op(squared, name="squared_for_tests")
    operator.meta(lambda x: torch.empty_like(x))
    operator.backward(lambda ctx, grad: grad * 2 * ctx.inputs[0])
    x = torch.randn(3)
    _, tangent = torch.func.jvp(operator, (x,), (torch.ones(3),))
    torch.testing.assert_close(tangent, 2 * x)
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda x: operator(x).sum())(x)
    torch.testing.assert_close(thunder.grad(lambda x: operator(x).sum())(x), 2 * x)


def test_signature_that_torch_library_refuses_is_a_type_error():
    def keyword_tensor(x: Tensor, *, y: Tensor) -> Tensor:
        return x + y

    with pytest.raises(TypeError, match="kwarg-only Tensor"):
        extend.op(keyword_tensor)


def test_operator_with_a_derivative_takes_the_place_of_torchs():
    executor = extend.OperatorExecutor("derives")
    ran = []

    def gelu(x: Tensor, approximate: str = "none") -> Tensor:
        ran.append(1)
        return F.gelu(x)

    def backward(ctx, grad):
        return torch.ops.aten.gelu_backward(grad, ctx.inputs[0])

    operator = executor.register_operator("gelu", like=F.gelu, fn=gelu, backward=backward)
    executor.register_implementation(F.gelu, operator, checker=lambda x, approximate="none": approximate == "none")
    compiled = check(blocks(), (torch.randn(4, 16),), [executor])
    assert ran and re.search(r"= derives_gelu_\d+\(", str(thunder.last_traces(compiled)[-1]))
    assert thunder.compile_stats(compiled).fallbacks == 0


# ---- regions ----


def _fast_scaled(x: Tensor, power: int = 1, *, shift: float = 0.0) -> Tensor:
    return x.pow(power).mul(3.0).add(shift)


def _executor_for_scaled(name, fn=_fast_scaled, **options):
    executor = extend.OperatorExecutor(name)
    executor.register_operator("scaled", like=scaled, fn=fn, replaces=scaled, **options)
    return executor


def test_operator_takes_the_place_of_a_python_function():
    def program(x):
        return scaled(x, 2, shift=1.0) + replaced_functions.scaled(x)

    x = torch.randn(3)
    executor = _executor_for_scaled("replaces")
    compiled, plain = thunder.jit(program, executors=[executor]), thunder.jit(program)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), 3 * x**2 + 1 + 3 * x)
        torch.testing.assert_close(plain(x), 3 * x**2 + 1 + 3 * x)
    text = str(thunder.last_traces(compiled)[-1])
    assert len(re.findall(r"replaces_scaled_\d+\(", text)) == 2
    assert [u.state for u in units(compiled)] == ["trusted"] * 2
    assert "scaled" not in str(thunder.last_traces(plain)[-1]).replace("functions.py", "")
    y = x.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(compiled(y).sum(), y)[0], 6 * x + 3)
    assert thunder.compile_stats(compiled).fallbacks == 0
    assert any("has no backward" in reason for _, _, reason in compiled._thunder_claims.declines)


def test_function_with_an_operator_in_its_place_is_else_what_it_was(monkeypatch):
    before = inspect.signature(scaled)
    _executor_for_scaled("replaces_too")
    assert inspect.signature(scaled) == before and scaled is replaced_functions.scaled
    compiled, x = thunder.jit(lambda x: scaled(x, shift=1.0)), torch.randn(3)
    assert torch.equal(scaled(x), 3 * x)
    assert torch.equal(torch.compile(lambda x: scaled(x) + 1, backend="eager", fullgraph=True)(x), 3 * x + 1)
    for scale in (3.0, 4.0):
        monkeypatch.setattr(replaced_functions, "SCALE", scale)
        torch.testing.assert_close(compiled(x), scale * x + 1)
    extend.OperatorExecutor("replaces_times").register_operator(
        "times", like=replaced_functions.thrice, fn=lambda x: x * 3, replaces=replaced_functions.thrice
    )
    assert torch.equal(replaced_functions.thrice(x), 3 * x)  # it has a variable of its own
    with pytest.raises(ValueError, match="no importable name"):
        extend.OperatorExecutor("local").register_operator("f", like=torch.neg, fn=lambda x: -x, replaces=lambda x: -x)


@pytest.mark.parametrize("function", [math.sin, len, np.sin, nn.ReLU, operator.add], ids=str)
def test_what_no_trace_names_cannot_be_replaced(function):
    executor = extend.OperatorExecutor("names")
    with pytest.raises(ValueError, match=r"no operation of torch, so no trace names it|has no importable name"):
        executor.register_operator("f", like=torch.neg, fn=lambda x: -x, replaces=function)
    with pytest.raises(ValueError, match=r"no trace names it|has no importable name"):
        executor.register_implementation(replaced_functions.thrice, fn=lambda x: x)
    executor.register_operator("f", like=torch.neg, fn=lambda x: -x)  # nothing was left behind


def test_functions_of_torch_in_c_have_names():
    for function in (torch.linalg.norm, torch.special.erf, torch.fft.fft, torch.Tensor.add, F.gelu, torch.ops.aten.add):
        assert extend.executor.operator_key(function)


def test_hints_that_a_function_lacks_are_those_of_what_it_is_like():
    def like(x: Tensor, factor: float, names: list[int]) -> tuple[Tensor, Tensor]:
        return x * factor, x

    for i, given in enumerate(({"like": like}, {"meta": like})):
        executor = extend.OperatorExecutor(f"hints_{i}")
        operator = executor.register_operator("f", fn=lambda x, factor, names: (x * factor, x + 0), **given)
        compiled = thunder.jit(lambda x, f=operator: f(x, 2.0, [1, 2])[0])
        assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 2.0))
    with pytest.raises(TypeError, match="has no signature"):
        extend.OperatorExecutor("hints").register_operator("f", like=torch.neg, fn=torch.neg)


@pytest.mark.parametrize("kind", ["forward", "gradient"])
def test_wrong_operator_in_the_place_of_a_function_is_left_out(kind):
    def wrong(x: Tensor, power: int = 1, *, shift: float = 0.0) -> Tensor:
        return x * 7

    def backward(ctx, grad):
        return grad * (3.0 if kind == "forward" else 1.0)

    executor = _executor_for_scaled(f"replaces_{kind}", wrong if kind == "forward" else _fast_scaled, backward=backward)
    compiled = thunder.jit(lambda x: scaled(x) + 1, executors=[executor])

    def calls():
        for _ in range(3):
            x = torch.linspace(1, 2, 4).requires_grad_()
            y = compiled(x)
            torch.testing.assert_close(y, 3 * x + 1)
            torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], torch.full((4,), 3.0))

    text = only_warning(calls)
    assert ("its result" if kind == "forward" else "its gradient for input 0") in text


def test_wrong_forward_of_an_operator_with_a_derivative_is_found():
    executor = extend.OperatorExecutor("wrong_forward")

    def gelu(x: Tensor, approximate: str = "none") -> Tensor:
        return F.relu(x)

    operator = executor.register_operator(
        "gelu", like=F.gelu, fn=gelu, backward=lambda ctx, g: torch.ops.aten.gelu_backward(g, ctx.inputs[0])
    )
    executor.register_implementation(F.gelu, op=operator)
    compiled, x = thunder.jit(lambda x: F.gelu(x), executors=[executor]), torch.randn(5, requires_grad=True)
    text = only_warning(lambda: [torch.testing.assert_close(compiled(x), F.gelu(x)) for _ in range(3)])
    assert "its result is off by" in text


def test_region_gets_its_inputs_as_the_trace_lays_them_out():
    calls = []

    @torch.library.custom_op("tests_of_executors::changes_its_strides", mutates_args=())
    def changes(x: Tensor) -> Tensor:
        calls.append(1)
        return x.clone() if len(calls) < 4 else x.t().clone(memory_format=torch.contiguous_format).t()

    changes.register_fake(lambda x: torch.empty_like(x))

    class Exact(Interpreter):
        def fuse(self, region):
            run = super().fuse(region)

            def only_contiguous(*tensors):
                assert all(t.is_contiguous() for t in tensors)
                return run(*tensors)

            return only_contiguous

    executor = Exact("exact_inputs")
    executor.register_supported(F.relu)
    executor.register_supported(torch.mul)
    compiled = thunder.jit(
        lambda x: F.relu(torch.ops.tests_of_executors.changes_its_strides(x)) * 2, executors=[executor]
    )
    x = torch.linspace(-1, 1, 12).reshape(3, 4)
    for _ in range(8):
        torch.testing.assert_close(compiled(x), F.relu(x) * 2)
    ((_, unit, _),) = compiled._thunder_claims.units
    assert unit.state == "trusted" and unit.reference_runs == 1


def test_equal_regions_are_built_once():
    executor = Interpreter()
    executor.support_all(but=[F.linear])
    with torch.no_grad():
        compiled = thunder.jit(blocks(6), executors=[executor])
        compiled(torch.randn(4, 16))
    assert len(executor.regions) == 4  # the first norm, gelu, residual with norm, the last residual
    assert len(units(compiled)) == 13
    check(blocks(6), (torch.randn(4, 16),), [executor])


@pytest.mark.parametrize("background", [False, True])
def test_a_region_ends_with_its_program(background):
    executor = Interpreter("forgets", background=background)
    executor.support_all()
    compiled = thunder.jit(lambda x: x.sin() * 2, executors=[executor])
    compiled(torch.randn(3))
    extend.wait_for_builds()
    (region,) = map(weakref.ref, units(compiled))
    del compiled
    gc.collect()
    assert region() is None
    again = thunder.jit(lambda x: x.sin() * 2, executors=[executor])
    again(torch.randn(3))
    assert len(executor.regions) == 1 and len(units(again)) == 1


def test_regions_are_convex():
    """What lies between two operations of a region belongs to it, or they are two regions."""
    executor = Interpreter()
    for op in (torch.sin, torch.add, torch.mul):
        executor.register_supported(op)

    def program(x):
        a = torch.sin(x)
        b = torch.cos(a)  # nobody's
        return torch.add(a, b), torch.mul(a, 2), torch.sin(torch.mul(b, a))

    compiled = thunder.jit(program, executors=[executor])
    x = torch.randn(4)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), program(x))
    calls = [region.operations() for region in executor.regions]
    assert sorted(map(len, calls)) == [2, 3], calls


def test_regions_keep_the_order_of_writes_and_random_numbers():
    executor = Interpreter()
    executor.support_all()
    buffer = torch.zeros(4)

    def program(x, y):
        a = x * 2
        y[:2] = a[:2]
        b = torch.rand(4) + y
        y.add_(b)
        c = torch.rand(4) * y
        return a + b, c, y * 3

    compiled = thunder.jit(program, executors=[executor])
    for _ in range(3):
        x, y, z = torch.randn(4), buffer.clone(), buffer.clone()
        torch.manual_seed(1)
        ours = compiled(x, y)
        torch.manual_seed(1)
        torch.testing.assert_close(ours, program(x, z))
        torch.testing.assert_close(y, z)


def test_region_that_cannot_be_built_is_reported_once_and_runs_on_torch():
    class Failing(extend.FusionExecutor):
        def fuse(self, region):
            raise RuntimeError("no code for this")

    executor = Failing("failing")
    executor.support_all(but=[F.linear])
    model, x = blocks(1), torch.randn(4, 16)
    compiled = thunder.jit(model, executors=[executor])
    with torch.no_grad(), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            torch.testing.assert_close(compiled(x), model(x))
    texts = [str(w.message) for w in seen]
    assert len(texts) == 3 and all("RuntimeError: no code for this" in t for t in texts)  # three different regions


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("kind", ["nothing", "exit", "cancelled"])
def test_a_build_that_gives_nothing_to_call_is_reported_and_the_next_is_built(kind, background):
    class Empty(Interpreter):
        def fuse(self, region):
            if "sin" not in str(region.trace):
                return super().fuse(region)
            if kind == "exit" and background:
                raise SystemExit
            future = Future()
            future.cancel()
            return None if kind != "cancelled" else future

    executor = Empty("gives_nothing", background=background)
    executor.support_all(but=[F.linear])
    x, w = torch.randn(4, 4), torch.randn(4, 4)

    def program(x, w):
        return F.linear(x.sin() * 2, w).cos() + 1

    compiled = thunder.jit(program, executors=[executor])
    message = {"nothing": "fuse() gave NoneType", "exit": "SystemExit" if background else "NoneType"}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            torch.testing.assert_close(compiled(x, w), program(x, w))
            assert extend.wait_for_builds(30)
    texts = [str(w.message) for w in seen if issubclass(w.category, thunder.ThunderWarning)]
    assert background or len(texts) == 1, texts  # those of other threads are not recorded on every Python
    assert all(message.get(kind, "CancelledError") in text for text in texts)
    states = sorted(u.state for u in units(compiled))
    assert states == (["refused", "trusted"] if background else ["trusted"])


def test_an_interrupted_build_is_begun_anew():
    class Interrupted(Interpreter):
        def fuse(self, region):
            if not self.regions:
                self.regions.append(region.trace)
                raise KeyboardInterrupt
            return super().fuse(region)

    executor = Interrupted("interrupted")
    executor.support_all()
    compiled = thunder.jit(lambda x: x.sin() * 2, executors=[executor])
    x = torch.randn(3)
    with pytest.raises(KeyboardInterrupt):
        compiled(x)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), x.sin() * 2)
    assert [u.state for u in units(compiled)] == ["trusted"]


def test_background_builds_are_swapped_in():
    executor = Interpreter("slow_builder", background=True)
    executor.support_all(but=[F.linear])
    model, x = blocks(2), torch.randn(4, 16)
    compiled = thunder.jit(model, executors=[executor])
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
        assert {u.state for u in units(compiled)} == {"building"}
        assert extend.wait_for_builds(60)
        assert {u.state for u in units(compiled)} == {"new"}
        torch.testing.assert_close(compiled(x), model(x))
        assert {u.state for u in units(compiled)} == {"trusted"}
        torch.testing.assert_close(compiled(x), model(x))


def test_blocking_tier_builds_before_the_first_run():
    executor = Interpreter("slow_builder_2", background=True)
    executor.support_all(but=[F.linear])
    compiled = thunder.jit(blocks(2), executors=[executor], tier="block")
    with torch.no_grad():
        compiled(torch.randn(4, 16))
    assert {u.state for u in units(compiled)} == {"trusted"}


def test_a_long_build_is_announced(monkeypatch, capfd):
    class Slow(Interpreter):
        def fuse(self, region):
            import time

            time.sleep(0.3)
            return super().fuse(region)

    monkeypatch.setattr(build, "_PATIENCE", 0.05)
    executor = Slow("sleepy")
    executor.support_all()
    thunder.jit(lambda x: x.sin() + 1, executors=[executor], tier="block")(torch.randn(3))
    assert "thunder: sleepy builds a region" in capfd.readouterr().err


def test_fuel_bounds_how_many_units_are_claimed():
    executor = extend.OperatorExecutor("fuelled")
    executor.register_implementation(F.gelu, fn=F.gelu)
    compiled = thunder.jit(blocks(5), executors=[executor], fuel=2)
    with torch.no_grad():
        compiled(torch.randn(4, 16))
    assert len(units(compiled)) == 2
    with pytest.raises(ValueError, match="fuel"):
        thunder.jit(blocks(), fuel=-1)


def test_what_nobody_takes_is_taken_apart_and_offered_again():
    executor = extend.OperatorExecutor("pieces", decompose=True)
    executor.register_implementation(torch.rsqrt, fn=torch.rsqrt)
    compiled = check(blocks(2), (torch.randn(4, 16),), [executor])
    with torch.no_grad():
        compiled(torch.randn(4, 16))
    text = str(thunder.last_traces(compiled)[-1])
    assert len(re.findall(r"= pieces_rsqrt_\d+\(", text)) == 2 and "layer_norm" not in text
    assert "torch.nn.functional.gelu" in text  # none of its pieces is taken
    whole = extend.OperatorExecutor("whole")
    whole.register_implementation(torch.rsqrt, fn=torch.rsqrt)
    assert "layer_norm" in str(thunder.last_traces(check(blocks(2), (torch.randn(4, 16),), [whole]))[-1])


# ---- wrong kernels ----

WRONG = {
    "numbers": (lambda x, approximate="none": F.relu(x), "is off by"),
    "dtype": (lambda x, approximate="none": F.gelu(x).double(), "has dtype torch.float64 where torch gives"),
    "shape": (lambda x, approximate="none": F.gelu(x)[..., :1], "has shape"),
    "strides": (lambda x, approximate="none": F.gelu(x).t().contiguous().t(), "has strides"),
    "writes": (lambda x, approximate="none": (F.gelu(x), x.zero_())[0], "wrote to its input 0"),
    "nan": (lambda x, approximate="none": F.gelu(x) / 0 * 0, "NaN"),
    "error": (lambda x, approximate="none": 1 / 0, "raised ZeroDivisionError"),
    "no tensor": (lambda x, approximate="none": 3.0, "is a float and no tensor"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_kernel_is_reported_and_replaced(kind):
    fn, message = WRONG[kind]
    executor = extend.OperatorExecutor("wrong")
    executor.register_implementation(F.gelu, fn=fn)
    model, x = nn.Sequential(nn.Linear(4, 6), nn.GELU()), torch.randn(3, 4)
    compiled = thunder.jit(model, executors=[executor])

    def calls():
        with torch.no_grad():
            for _ in range(3):
                torch.testing.assert_close(compiled(x), model(x))

    text = only_warning(calls)
    assert message in text and "executor 'wrong'" in text and "torch.nn.functional.gelu" in text
    assert units(compiled)[0].state == "refused" and message in units(compiled)[0].reason


def _to_both(body):
    class Sharing(extend.FusionExecutor):
        def fuse(self, region):
            return lambda *tensors: body(*tensors)

    executor = Sharing("sharing")
    for op in (F.relu, torch.mul, torch.sin, torch.Tensor.view, torch.chunk):
        executor.register_supported(op)
    return executor


MEMORY = {
    "an input": (lambda x: F.relu(x) * 1, lambda x: [x], "its result is in the memory of its input 0"),
    "a view of an input": (lambda x: F.relu(x) * 1, lambda x: [x.view(12).view(3, 4)], "in the memory of its input 0"),
    "a copy of a view": (lambda x: x.view(12), lambda x: [x.clone().view(12)], "torch's is a view of its input 0"),
    "another result": (lambda x: (x.sin() * 1, x.sin() * 1.0), lambda x: [x.sin()] * 2, "in the memory of result 0"),
    "parts of one buffer": (
        lambda x: (x.sin() * 1, x.sin() * 1.0),
        lambda x: torch.stack([x.sin()] * 2).unbind(),
        None,
    ),
    "a view as in torch": (lambda x: (x.view(12), x.view(12) * 2), lambda x: [x.view(12), x.view(12) * 2], None),
    "views of one tensor": (lambda x: (x * 2).view(2, 6).chunk(2), lambda x: (x * 2).view(2, 6).chunk(2), None),
    "an empty tensor": (lambda x: F.relu(x[:0]) * 1, lambda x: [x], None),
}


@pytest.mark.parametrize("kind", MEMORY)
def test_memory_of_results_is_compared(kind):
    program, body, message = MEMORY[kind]
    compiled = thunder.jit(program, executors=[_to_both(body)])
    x = torch.rand(3, 4)
    seen = []
    for _ in range(3):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.testing.assert_close(compiled(x), program(x))
        seen += caught
    assert [u.state for u in units(compiled)] == ["trusted" if message is None else "refused"]
    assert (message is None and not seen) or message in str(seen[0].message)


def test_a_result_that_nobody_uses():
    executor = extend.OperatorExecutor("unused_result")

    def two(x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2, x * 3

    operator = executor.register_operator("two", fn=two, meta=lambda x: (torch.empty_like(x), torch.empty_like(x)))
    compiled = thunder.jit(lambda x: operator(x)[0] + 1, executors=[executor])
    x = torch.randn(3)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), x * 2 + 1)
    assert units(compiled)[0].state == "trusted"


def test_an_operator_hands_its_backward_what_its_caller_does_not_get():
    executor = extend.OperatorExecutor("saving")

    def loss(input: Tensor) -> tuple[Tensor, Tensor]:
        e = input.exp()
        return e.sum(-1).log(), e

    backward = executor.register_operator(
        "loss_backward", fn=lambda g, e: g[:, None] * e / e.sum(-1, keepdim=True), meta=lambda g, e: torch.empty_like(e)
    )
    operator = executor.register_operator(
        "loss",
        fn=loss,
        meta=lambda input: (input.new_empty(input.shape[:1]), torch.empty_like(input)),
        backward=lambda ctx, g, _: backward(g, ctx.outputs[1]),
        saves=1,
    )
    row_sums = extend.op(lambda input: torch.logsumexp(input, -1), name="row_sums_for_tests")
    row_sums.meta(lambda input: input.new_empty(input.shape[:1]))
    row_sums.backward(lambda ctx, g: g[:, None] * torch.softmax(ctx.inputs[0], -1))
    executor.register_implementation(row_sums, operator)
    compiled = thunder.jit(lambda x: row_sums(x * 2) * 3, executors=[executor])
    for _ in range(2):
        x = torch.randn(4, 5, requires_grad=True)
        ours, theirs = compiled(x), torch.logsumexp(x * 2, -1) * 3
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(*(torch.autograd.grad(o.sum(), x) for o in (ours, theirs)))
    assert {u.state for u in units(compiled)} == {"trusted"} and len(units(compiled)) == 2
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), theirs)


def test_wrong_backward_kernel_is_reported_and_replaced():
    executor = extend.OperatorExecutor("wrong_backward")
    executor.register_implementation("torch.ops.aten.gelu_backward.default", fn=lambda g, x, approximate="none": g * 2)
    text = only_warning(lambda: check(nn.Sequential(nn.Linear(4, 6), nn.GELU()), (torch.randn(3, 4),), [executor]))
    assert "gelu_backward" in text


def test_wrong_gradient_of_an_operator_is_reported_and_the_operator_left_out():
    executor = extend.OperatorExecutor("wrong_gradient")

    def gelu(x: Tensor, approximate: str = "none") -> Tensor:
        return F.gelu(x)

    operator = executor.register_operator("gelu", like=F.gelu, fn=gelu, backward=lambda ctx, g: g * 2)
    executor.register_implementation(F.gelu, operator)
    compiled = None

    def run():
        nonlocal compiled
        compiled = check(blocks(), (torch.randn(4, 16),), [executor])

    text = only_warning(run)
    assert "its gradient for input 0 is off by" in text
    assert "torch.nn.functional.gelu" in str(thunder.last_traces(compiled)[-1])


def test_wrong_region_is_reported_once_for_all_equal_ones():
    class Wrong(Interpreter):
        def fuse(self, region):
            right = super().fuse(region)
            return lambda *args: tuple(t * 1.5 for t in right(*args))

    executor = Wrong("wrong_region")
    for op in (F.gelu, torch.mul):
        executor.register_supported(op)
    text = only_warning(lambda: check(blocks(4), (torch.randn(4, 16),), [executor]) and None)
    assert "is off by" in text


def test_verification_can_be_switched_off_or_always_on():
    ran = []

    def sometimes(x, approximate="none"):
        ran.append(1)
        return F.gelu(x) if len(ran) < 3 else F.relu(x)

    executor = extend.OperatorExecutor("sometimes")
    executor.register_implementation(F.gelu, fn=sometimes)
    x = torch.randn(8)
    always = thunder.jit(lambda x: F.gelu(x), executors=[executor], verify="always")
    text = only_warning(lambda: [torch.testing.assert_close(always(x), F.gelu(x)) for _ in range(4)])
    assert "is off by" in text
    off = thunder.jit(lambda x: F.gelu(x), executors=[executor], verify="off")
    assert torch.equal(off(x), F.relu(x))
    with pytest.raises(ValueError, match="verify must be one of"):
        thunder.jit(lambda x: x, verify="maybe")


def test_strides_that_change_later_reach_nobody():
    """What comes after a unit reads its results with the strides that the trace states."""
    ran = []

    def moody(x, approximate="none"):
        ran.append(1)
        y = F.gelu(x)
        return y if len(ran) <= 2 else y.t().contiguous().t()

    executor = extend.OperatorExecutor("moody")
    executor.register_implementation(F.gelu, fn=moody)

    def program(x):
        return F.gelu(x).view(-1)[1:5] * 2, F.gelu(x * 2)

    compiled = thunder.jit(program, executors=[executor])
    for _ in range(3):
        x = torch.randn(3, 4)
        for ours, theirs in zip(compiled(x), program(x), strict=True):
            torch.testing.assert_close(ours, theirs)
            assert ours.stride() == theirs.stride()
    assert len(ran) == 6


def test_another_shape_later_is_an_error():
    ran = []

    def moody(x, approximate="none"):
        ran.append(1)
        return F.gelu(x) if len(ran) < 2 else F.gelu(x)[:1]

    executor = extend.OperatorExecutor("shrinking")
    executor.register_implementation(F.gelu, fn=moody)
    compiled = thunder.jit(lambda x: F.gelu(x), executors=[executor])
    compiled(torch.randn(3, 4))
    with pytest.raises(RuntimeError, match=r"shrinking.*another shape"):
        compiled(torch.randn(3, 4))


def test_small_differences_of_rounding_are_no_fault():
    executor = extend.OperatorExecutor("rounds")
    executor.register_implementation(F.gelu, fn=lambda x, approximate="none": F.gelu(x.double()).float())
    compiled = thunder.jit(lambda x: F.gelu(x), executors=[executor])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(torch.randn(100))
    assert units(compiled)[0].state == "trusted"


def test_an_operator_may_be_declined_in_training_alone():
    executor = extend.OperatorExecutor("half")
    operator = executor.register_operator(
        "gelu_for_training", like=F.gelu, fn=_plain_gelu, backward=lambda ctx, grad: grad * 0
    )
    executor.register_implementation(F.gelu, operator, training=lambda x, approximate="none": "not in training")
    compiled = thunder.jit(lambda x: F.gelu(x), executors=[executor])
    x = torch.randn(5, requires_grad=True)
    (ours,) = torch.autograd.grad(compiled(x).sum(), x)
    (theirs,) = torch.autograd.grad(F.gelu(x).sum(), x)
    torch.testing.assert_close(ours, theirs)
    assert any(reason == "not in training" for _, _, reason in compiled._thunder_claims.declines)
    with torch.no_grad():
        compiled(x)
    assert units(compiled)[-1].state == "trusted"


def _plain_gelu(x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    return F.gelu(x, approximate=approximate)


@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_float64_decides_where_a_program_says_other_dtypes(factor):
    """A region that rounds once where torch rounds twice is far from torch, in float32, and nearer to the truth."""

    class RoundsOnce(extend.FusionExecutor):
        def fuse(self, region):
            return lambda x, y: [x.float() * y.float() * factor]

    executor = RoundsOnce("rounds_once")
    executor.register_supported(torch.mul)
    executor.register_supported(torch.Tensor.to)
    compiled = thunder.jit(lambda x, y: (x * y).to(torch.float32), executors=[executor])
    inputs = [torch.rand(1000, dtype=torch.bfloat16) + 1 for _ in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if factor > 1 else "error")
        compiled(*inputs)
    assert units(compiled)[0].state == ("trusted" if factor == 1 else "refused")


def test_inputs_whose_elements_share_memory_are_compared_too():
    executor = extend.OperatorExecutor("expanded")
    executor.register_implementation(F.gelu, fn=lambda x, approximate="none": F.gelu(x))
    x = torch.randn(3, 1).expand(3, 4)
    compiled = thunder.jit(lambda x: F.gelu(x), executors=[executor])
    for _ in range(2):
        torch.testing.assert_close(compiled(x), F.gelu(x))
    assert units(compiled)[0].state == "trusted"


def test_a_call_of_an_operator_tells_autograd_what_it_writes():
    """A kernel writes past torch: the version of its argument is what a backward would look at."""

    @thunder.extend.op(name="doubled_in_place", mutates=["x", "more"])
    def doubled_(by: float, x: torch.Tensor, more: list[torch.Tensor]) -> None:
        for t in (x, *more):
            t.data.mul_(by)

    w, a, b = torch.ones(2, requires_grad=True), torch.ones(2), torch.ones(2)
    for call in (lambda: doubled_(2.0, a, [b]), lambda: doubled_(2.0, more=[b], x=a)):
        out = (w * a).sum() + (w * b).sum()
        before = a._version, b._version
        call()
        assert (a._version, b._version) == tuple(v + 1 for v in before)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward()
