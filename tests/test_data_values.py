"""Values of tensors that steer a program: a program for each, right in values, gradients, writes and random numbers."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import thunder
from tests.jit_checks import nothing_leaks  # noqa: F401


def grid(*shape: int) -> torch.Tensor:
    shape = shape or (4, 5)
    return torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape) + 0.01


def run(fn, args, grad: bool):
    """Outputs, inputs afterwards, gradients and the random state after a call on copies of the arguments."""
    args = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    leaves = [a.requires_grad_() for a in args if grad and isinstance(a, torch.Tensor) and a.is_floating_point()]
    torch.manual_seed(3)
    out = fn(*args)
    drawn = torch.rand(2)
    tensors = [t for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, torch.Tensor)]
    grads = []
    if leaves and any(t.requires_grad for t in tensors):
        total = sum((t * t).sum() for t in tensors if t.requires_grad)
        grads = list(torch.autograd.grad(total, leaves, allow_unused=True))
    return out, [a.detach() if isinstance(a, torch.Tensor) else a for a in args], grads, drawn


def agrees(program, *calls, grad: bool = True, **options):
    """Compare every call with eager, in this order; returns the compiled callable."""
    compiled = thunder.jit(program, **options)
    for args in calls:
        torch.testing.assert_close(run(compiled, args, grad), run(program, args, grad), equal_nan=True)
    stats = thunder.compile_stats(compiled)
    assert stats.fallbacks == 0
    return compiled


def branch(x):
    if x.sum() > 0:
        return x * 2
    return x - 1


def item(x):
    n = int(x.abs().max().item() * 2)
    return x[:n] * n


def nested(x):
    if x.sum() > 0:
        if x.max() > 2:
            return x.exp()
        return x.sin()
    return x.cos() if x.min() < -2 else x.tanh()


def loop(x):
    while x.abs().sum() < 100:
        x = x * 2
    return x


def listed(x):
    return x * len(x[0].round().tolist()), x.round().tolist(), float(x.mean())


def masks(x):
    rows = x[:, 0] > 0
    return x[x > 0] * 2, x[rows], x[rows, 1], x[:, x[0] > 0], x.masked_select(x > 0.5), x[None, rows]


def places(x):
    return torch.nonzero(x > 0), torch.where(x > 0), torch.unique(x.detach().round()), torch.argwhere(x > 0.5)


def repeated(x):
    counts = (x[:, 0] > 0).long() + 1
    return torch.repeat_interleave(x, counts, dim=0), x.repeat_interleave(counts.sum()), torch.bincount(counts)


def sliced(x):
    n = (x[:, 0] > 0).sum()
    return x[:n], torch.narrow(x, 0, 0, n), torch.tensor_split(x, torch.stack([n, n + 1]))


def stored(x):
    y = x * 1
    y[x > 0] = y[x > 0] * 3
    y[y < -0.5] = 0.25
    return y


def experts(x):
    out = torch.zeros_like(x)
    choice = (x[:, 0] > 0).long()
    for number in range(3):
        rows = torch.where(choice == number)[0]
        if rows.numel():
            out = out.index_add(0, rows, x[rows] * (number + 1))
    return out


PROGRAMS = [branch, item, nested, loop, listed, masks, places, repeated, sliced, stored, experts]


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
def test_program_is_eagers_for_every_value(program, grad):
    x = grid()
    compiled = agrees(program, (x,), (-x,), (x * 3,), (x,), (-x * 3,), (-x,), (x,), grad=grad)
    assert thunder.cache_hits(compiled) >= 2


def test_a_known_value_is_served_without_a_capture():
    compiled = agrees(branch, (grid(),), (-grid(),), grad=False)
    for _ in range(3):
        for x in (grid(), -grid()):
            compiled(x)
    assert (thunder.cache_misses(compiled), thunder.cache_hits(compiled)) == (2, 6)


def test_the_trace_shows_what_is_expected():
    compiled = agrees(branch, (grid(),), grad=False)
    text = str(thunder.last_traces(compiled)[-1])
    assert "thunder._kernels.expect(0, torch.Tensor.__bool__, (t1,), {}, True)" in text
    assert "values" in thunder.compile_stats(compiled).entries[0]


def test_layers_that_are_dropped_at_random():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))

        def forward(self, x):
            for layer in self.layers:
                if torch.rand([]) < 0.5:
                    continue
                x = nn.functional.dropout(layer(x), 0.3)
            return x

    net = Net()
    compiled = thunder.jit(net)
    for seed in range(14):
        results = []
        for f in (net, compiled):
            torch.manual_seed(seed)
            net.zero_grad()
            out = f(grid())
            out.sum().backward() if out.requires_grad else None
            results.append((out.detach(), [p.grad for p in net.parameters()], torch.rand(3)))
        torch.testing.assert_close(*results)
    assert thunder.compile_stats(compiled).fallbacks == 0


def test_writes_before_a_value_happen_once():
    def program(x, y):
        x.add_(1)
        y[0] = 5.0
        v = x[1]
        v.mul_(2)
        if x.sum() > 5:
            x.mul_(2)
            return v + 1
        y.zero_()
        return x + 1

    x, y = grid(), grid()
    agrees(program, (x, y), (-x * 9, y), (x, y), (x * 0, y), (-x * 9, y), grad=False)


def test_writes_that_stay_where_they_are_are_taken_back():
    def program(x, state):
        torch._foreach_add_([state], 1.0)  # writes its argument as the program runs
        if x.sum() > 0:
            return x + state
        return x - state

    agrees(program, (grid(), grid()), (-grid(), grid()), (grid(), grid()), (-grid(), grid()), grad=False)


def test_batch_norm_counts_a_call_once():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(5)

        def forward(self, x):
            x = self.norm(x)
            return x * 2 if x[0, 0] > 0 else x

    ours, eager = Net(), Net()
    compiled = thunder.jit(ours)
    for x in (grid(), -grid(), grid() * 2, -grid() * 2):
        torch.testing.assert_close(compiled(x), eager(x))
        torch.testing.assert_close(dict(ours.named_buffers()), dict(eager.named_buffers()))


@pytest.mark.parametrize("grad", [False, True])
def test_statistics_are_updated_by_every_batch_norm_that_runs(grad):
    """Also where nobody uses its result, and twice where it runs twice on the same input."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(5)

        def forward(self, x):
            before = self.norm.running_mean * 1
            self.norm(x * 3)
            return self.norm(x) + self.norm(x), before, self.norm.running_mean * 1

    ours, eager = Net(), Net()
    compiled = thunder.jit(ours)
    with torch.set_grad_enabled(grad):
        for _ in range(3):
            torch.testing.assert_close(compiled(grid()), eager(grid()))
            torch.testing.assert_close(dict(ours.named_buffers()), dict(eager.named_buffers()))


def test_an_operator_that_returns_nothing_runs_at_every_call():
    calls = []

    @torch.library.custom_op("thunder_test_values::count", mutates_args=())
    def count(x: torch.Tensor) -> None:
        calls.append(float(x.sum()))

    @count.register_fake
    def _(x):
        return None

    def program(x):
        count(x * 2)
        return x + 1

    compiled = thunder.jit(program)
    for number in (1, 2, 3):
        compiled(torch.ones(2) * number)
    assert calls == [4.0, 8.0, 12.0]


def test_a_failed_assertion_raises_and_later_calls_are_right():
    def program(x):
        assert x.sum() > 0, "not positive"
        if x.max() > 100:
            raise ValueError("too large")
        return x * 2

    compiled = agrees(program, (grid(),))
    for bad, kind, text in ((-grid(), AssertionError, "not positive"), (grid() * 200, ValueError, "too large")):
        with pytest.raises(kind, match=text):
            compiled(bad)
    torch.testing.assert_close(compiled(grid()), grid() * 2)


def test_values_of_parameters_and_buffers():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(5))
            self.register_buffer("step", torch.zeros((), dtype=torch.long))

        def forward(self, x):
            self.step += 1
            scale = 0.5 if self.step.item() > 2 else 1.0
            return x * self.weight * scale if self.weight.sum() > 0 else -x

    ours, eager = Net(), Net()
    compiled = thunder.jit(ours)
    for number in range(5):
        torch.testing.assert_close(compiled(grid()), eager(grid()))
        torch.testing.assert_close(ours.step, eager.step)
        if number == 3:
            with torch.no_grad():
                ours.weight.neg_(), eager.weight.neg_()


def test_bits_of_floats_count():
    def program(x):
        v = x.max().item()
        return x + (1 if str(v).startswith("-") else 2), v

    compiled = thunder.jit(program)
    for value in (0.0, -0.0, float("nan"), 0.0, -0.0):
        ours, eager = compiled(torch.tensor([value])), program(torch.tensor([value]))
        torch.testing.assert_close(ours, eager, equal_nan=True)
        assert str(ours[1]) == str(eager[1])
    assert thunder.cache_misses(compiled) == 3


def test_ever_new_values_take_the_fallback_with_one_warning_that_names_the_line():
    def program(x):
        return x + x.sum().item()  # here

    compiled = thunder.jit(program, fallback="eager", branch_limit=3)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for i in range(8):
            torch.testing.assert_close(compiled(grid() * i), program(grid() * i))
    (warning,) = seen
    line = program.__code__.co_firstlineno + 1
    assert f"test_data_values.py:{line}" in str(warning.message) and "branch_limit" in str(warning.message)
    stats = thunder.compile_stats(compiled)
    assert stats.fallbacks == 5 and len(stats.entries) == 3
    strict = thunder.jit(program, fallback="error", branch_limit=2)
    strict(grid()), strict(grid() * 2)
    with pytest.raises(thunder.CaptureError, match="more than 2 different values"):
        strict(grid() * 3)


def test_other_arguments_have_values_of_their_own():
    compiled = thunder.jit(branch, branch_limit=2)
    for shape in ((2, 3), (4, 5), (7,)):
        for sign in (1, -1, 1):
            x = torch.ones(shape) * sign
            torch.testing.assert_close(compiled(x), branch(x))
    assert thunder.cache_misses(compiled) == 6 and thunder.compile_stats(compiled).fallbacks == 0


def test_an_effect_of_its_own_before_a_value_is_refused():
    calls = []

    @torch.library.custom_op("thunder_test_values::tell", mutates_args=())
    def tell(x: torch.Tensor) -> None:
        calls.append(float(x.sum()))

    @tell.register_fake
    def _(x):
        return None

    def program(x):
        tell(x)
        return x * 2 if x.sum() > 0 else x  # here

    with pytest.raises(thunder.CaptureError, match="would happen again"):
        thunder.jit(program)(grid())


def test_operators_without_a_shape_function_are_run_to_find_out():
    @torch.library.custom_op("thunder_test_values::halve", mutates_args=())
    def halve(x: torch.Tensor) -> torch.Tensor:
        return x[::2].clone()

    def program(x):
        return halve(x) + 1

    compiled = agrees(program, (grid(),), (grid() * 2,), (grid(6, 2),), grad=False)
    assert thunder.cache_misses(compiled) == 2


def test_a_mask_of_another_shape_raises_as_in_eager():
    def program(x, mask):
        return x[mask]

    for mask in (torch.ones(3, 5, dtype=torch.bool), torch.ones(4, 5, 1, dtype=torch.bool)):
        with pytest.raises(IndexError) as eager:
            program(grid(), mask)
        with pytest.raises(IndexError) as ours:
            thunder.jit(program)(grid(), mask)
        assert str(eager.value).split(" at ")[0] == str(ours.value).split(" at ")[0]


def test_under_autocast_and_inference_mode():
    def program(x):
        y = x @ x.t()
        return y * 2 if y.sum() > 0 else y[y > 0]

    compiled = thunder.jit(program)
    for x in (grid(), -grid(), grid() * 0):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(compiled(x), program(x))
        with torch.inference_mode():
            torch.testing.assert_close(compiled(x), program(x))


def test_inside_a_compiled_region():
    executors = [thunder.extend.get_executor("torchcompile"), *thunder.get_always_executors()]

    def program(x):
        y = torch.relu(x.sin() * 2) + 1
        if y.sum() > 22:
            return y.cos() * 3 + x
        return (y + 1).tanh() - x

    compiled = agrees(program, (grid(),), (-grid(),), (grid() + 1,), (grid(),), executors=executors, tier="block")
    assert "torchcompile" in str(thunder.last_traces(compiled)[-1])


@pytest.mark.parametrize("fallback", ["dynamo", "eager"])
def test_threads_meet_different_values(fallback):
    import threading

    compiled = thunder.jit(branch, fallback=fallback)
    compiled(grid()), compiled(-grid())
    wrong = []

    def work(sign):
        for _ in range(300):
            x = grid() * sign
            if not torch.equal(compiled(x), branch(x)):
                wrong.append(sign)

    threads = [threading.Thread(target=work, args=(s,)) for s in (1, -1, 2, -2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_what_comes_before_a_known_value_runs_once(grad):
    runs = []

    @torch.library.custom_op(f"thunder_test_values::slow_{grad}", mutates_args=())
    def slow(x: torch.Tensor) -> torch.Tensor:
        runs.append(1)
        return x.sin()

    @slow.register_fake
    def _(x):
        return torch.empty_like(x)

    slow.register_autograd(
        lambda ctx, g: g * ctx.saved_tensors[0].cos(),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )

    def program(x, y):
        a, b = slow(x), slow(y)
        both = a + b
        z = slow(both)
        if z.sum() > 0:
            if a.max() > 0.5:
                return b * 2, both * 1, z.reshape(-1) * 3
            return z * 2 + a
        return z - 1, x * y

    def gradients(fn, args):
        given = [a.clone().requires_grad_(grad) for a in args]
        results = fn(*given)
        if not grad:
            return results
        total = sum(r.sum() * (i + 1) for i, r in enumerate(results if isinstance(results, tuple) else (results,)))
        return results, torch.autograd.grad(total, given)

    compiled = thunder.jit(program)
    calls = [(grid() + 2, grid() + 2), (-grid() - 2, -grid() - 2), (grid() * 0 + 0.1, grid() * 0 + 0.1)]
    with torch.set_grad_enabled(grad):
        for args in (*calls, *calls, *calls):
            gradients(compiled, args)  # what one program has let go of and another one needs is kept from then on
        for args in (calls[0], calls[1], calls[2], calls[1], calls[0], calls[2], calls[2]):
            runs.clear()
            found = gradients(compiled, args)
            assert len(runs) == 3
            torch.testing.assert_close(found, gradients(program, args))
    assert thunder.cache_misses(compiled) == 3


@pytest.mark.parametrize("operands", [{"tensor1": 2.0, "tensor2": 4.0}, {}])
def test_numbers_in_tensors_beside_operands_by_name(operands):
    def f(x, value):
        named = {name: torch.full_like(x, number) for name, number in operands.items()}
        return torch.addcdiv(x, **named, value=value) if named else torch.addcdiv(x, x + 1, x + 2, value=value)

    x, value = torch.ones(3), torch.tensor(0.5)
    torch.testing.assert_close(thunder.jit(f)(x, value), f(x, value), rtol=0, atol=0)
