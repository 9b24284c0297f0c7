"""Compiled callables among threads, processes, interrupts, other compiled callables and torch.compile."""

from __future__ import annotations

import copy
import functools
import io
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import thunder
from tests.jit_checks import traces_left


@pytest.fixture(autouse=True)
def nothing_leaks():
    before = traces_left()
    yield
    assert traces_left() == before


def x(*shape: int, grad: bool = False) -> torch.Tensor:
    shape = shape or (4, 3)
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape).sub(2).requires_grad_(grad)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 2)).eval()


def in_threads(n: int, work: Callable[[int], None]) -> None:
    wrong: list[BaseException] = []

    def guarded(i: int) -> None:
        try:
            work(i)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(n)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if wrong:
        raise wrong[0]


@pytest.fixture
def short_turns():
    """The interpreter changes threads often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


# ---- threads ----


def test_eight_threads_make_a_thousand_calls_each(short_turns):
    model = net()
    compiled = thunder.jit(model)

    def work(i: int) -> None:
        with torch.no_grad():
            a = x() + i
            expected = model(a)
            for _ in range(1000):
                torch.testing.assert_close(compiled(a), expected)

    in_threads(8, work)


def test_eight_threads_train_one_module(short_turns):
    model = net()
    compiled = thunder.jit(model)

    def work(i: int) -> None:
        a = x() + i
        leaf = a.clone().requires_grad_()
        (expected,) = torch.autograd.grad(model(leaf).sum(), leaf)
        for _ in range(100):
            leaf = a.clone().requires_grad_()
            (grad,) = torch.autograd.grad(compiled(leaf).sum(), leaf)
            torch.testing.assert_close(grad, expected)

    in_threads(8, work)


def test_threads_call_while_others_force_captures(short_turns):
    model = net()
    compiled = thunder.jit(model, fallback="eager")
    stop = threading.Event()

    def disturb() -> None:
        n = 0
        while not stop.is_set():
            with torch.no_grad():
                n += 1
                compiled(x(1 + n % 90, 3))  # more shapes than a callable keeps
                if n % 40 == 0:
                    compiled._thunder_callable._reset()

    disturber = threading.Thread(target=disturb)
    disturber.start()

    def work(i: int) -> None:
        with torch.no_grad():
            a = x() + i
            expected = model(a)
            for _ in range(1000):
                torch.testing.assert_close(compiled(a), expected)

    try:
        in_threads(8, work)
    finally:
        stop.set()
        disturber.join()


def test_entry_is_dropped_while_it_runs():
    """A program that calls into Python drops the cache that it runs from."""
    seen = []

    @torch.library.custom_op("thunder_tests::drops", mutates_args=())
    def drops(a: torch.Tensor) -> torch.Tensor:
        seen.append(1)
        compiled._reset()
        return a + 1

    drops.register_fake(lambda a: torch.empty_like(a))
    compiled = thunder.jit(lambda a: drops(a * 2) * 3)
    with torch.no_grad():
        for _ in range(20):
            torch.testing.assert_close(compiled(x()), (x() * 2 + 1) * 3)
    assert len(seen) == 20


# ---- processes ----


def child_gives(value: float, work: Callable[[], float]) -> bool:
    """Fork: does ``work`` give the value in the child?"""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = int(abs(work() - value) > 1e-4)
        finally:
            os._exit(code)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork_after_use():
    model = net()
    compiled = thunder.jit(model)
    torch.set_num_threads(1)  # torch's own threads do not live on in a child, in eager neither
    with torch.no_grad():
        known, new = float(compiled(x()).sum()), float(model(x(7, 3)).sum())
        assert child_gives(known, lambda: float(compiled(x()).sum()))  # a hit
        assert child_gives(new, lambda: float(compiled(x(7, 3)).sum()))  # a capture
        assert child_gives(new, lambda: float(thunder.jit(model)(x(7, 3)).sum()))
        torch.testing.assert_close(compiled(x()), model(x()))


class Squares(Dataset):
    def __init__(self, call: Callable) -> None:
        self.call = call

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> torch.Tensor:
        with torch.no_grad():
            return self.call(torch.tensor([float(i)]))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("used", [True, False])
def test_workers_of_a_data_loader_call_a_compiled_function(used):
    compiled = thunder.jit(lambda a: a * a)
    if used:
        compiled(torch.ones(1))
    batches = DataLoader(Squares(compiled), batch_size=4, num_workers=2, timeout=60)
    assert torch.cat(list(batches)).flatten().tolist() == [i * i for i in range(8)]


# ---- interrupts ----


def test_interrupt_while_a_function_is_captured():
    world = {"interrupt": True, "count": 0}

    def f(a):
        b = a * 2
        world["count"] += 1
        if world["interrupt"]:
            raise KeyboardInterrupt
        return b + 1

    compiled = thunder.jit(f, fallback="eager")
    with pytest.raises(KeyboardInterrupt):
        compiled(x())
    assert not thunder._C.is_capturing()
    world["interrupt"] = False
    for _ in range(3):
        torch.testing.assert_close(compiled(x()), x() * 2 + 1)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, ValueError])
def test_exception_of_an_operator_in_python(kind):
    interrupt = [False]

    @torch.library.custom_op(f"thunder_tests::raises_{kind.__name__}", mutates_args=())
    def interrupts(a: torch.Tensor) -> torch.Tensor:
        if interrupt[0]:
            raise kind
        return a + 1

    interrupts.register_fake(lambda a: torch.empty_like(a))
    compiled = thunder.jit(lambda a: interrupts(a * 2) * 3)
    with torch.no_grad():
        compiled(x())
        for _ in range(3):
            interrupt[0] = True
            with pytest.raises(kind):
                compiled(x())
            interrupt[0] = False
            torch.testing.assert_close(compiled(x()), (x() * 2 + 1) * 3)


SIGNALS = """
import os, signal, threading, time, torch, thunder
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts it in the background has it ignored
model = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(100)])
a = torch.ones(2, 8)
expected = model(a)
caught, done, ready = 0, False, threading.Event()
def pester():
    n = 0
    while not done:
        ready.wait()
        time.sleep(0.0007 * (1 + n % 9))
        n += 1
        if ready.is_set() and not done:
            ready.clear()
            os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=pester, daemon=True).start()
end = time.monotonic() + 2
while time.monotonic() < end:
    try:
        ready.set()
        compiled = thunder.jit(model)
        for _ in range(20):
            compiled(a)
    except KeyboardInterrupt:
        caught += 1
done = True
try:
    ready.clear(); time.sleep(0.05)
except KeyboardInterrupt:
    pass
assert not thunder._C.is_capturing() and torch._C._len_torch_function_stack() == 0 and torch.is_grad_enabled()
assert torch.equal(thunder.jit(model, fallback="error")(a), expected) or torch.allclose(compiled(a), expected)
y = thunder.jit(model, fallback="error")(a)
torch.testing.assert_close(y, expected)
print("caught", caught)
"""


def test_interrupts_at_any_time_leave_all_usable():
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SIGNALS)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) > 5


# ---- exceptions ----


class Level(nn.Module):
    def __init__(self, inner: nn.Module | None) -> None:
        super().__init__()
        self.inner, self.calls, self.fail = inner, 0, True

    def forward(self, a):
        self.calls += 1
        try:
            if self.inner is None:
                if self.fail:
                    raise KeyError("deepest")
                return a * 2
            return self.inner(a) + 1
        except KeyError as error:
            raise ValueError("on the way") from error


def test_nested_exceptions_in_forward():
    def build() -> Level:
        return Level(Level(Level(None)))

    def run(model: Level, call: Callable) -> list:
        seen = []
        for fail in (True, True, False, True, False):
            model.inner.inner.fail = fail
            try:
                seen.append(call(x()).tolist())
            except ValueError as error:
                seen.append((str(error), repr(error.__cause__), model.calls, model.inner.inner.calls))
        return seen

    eager, ours = build(), build()
    assert run(eager, eager) == run(ours, thunder.jit(ours, fallback="eager"))


# ---- compiled in compiled ----


def test_compiled_function_that_calls_itself_with_gradients():
    @thunder.jit
    def power(a, n):
        return a if n == 0 else power(a, n - 1) * a.sin()

    a = x(grad=True)
    power(a, 4).sum().backward()
    b = x(grad=True)
    (b * b.sin() ** 4).sum().backward()
    torch.testing.assert_close(a.grad, b.grad)


def both_ways(make: Callable[[], nn.Module], wrap: Callable[[nn.Module], Callable]) -> None:
    """Outputs, gradients of inputs and parameters, over two calls and a change of mode, against the plain module."""
    plain, ours = make(), make()
    call = wrap(ours)
    for step in range(4):
        if step == 2:
            plain.train(), ours.train()
        a, b = x(grad=True), x(grad=True)
        expected, got = plain(a), call(b)
        torch.testing.assert_close(got, expected)
        expected.sum().backward()
        got.sum().backward()
        torch.testing.assert_close(b.grad, a.grad)
        for p, q in zip(plain.parameters(), ours.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad)


def compile_part(model: nn.Module, jit: Callable = thunder.jit) -> nn.Module:
    model[0] = jit(model[0])
    return model


def pair() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Sequential(nn.Linear(3, 5), nn.Tanh()), nn.BatchNorm1d(5), nn.Linear(5, 2)).eval()


WAYS = {
    "in an eager module": compile_part,
    "in a compiled module": lambda m: thunder.jit(compile_part(m)),
    "in a compiled function": lambda m: thunder.jit(functools.partial(lambda part, a: part(a), compile_part(m))),
    "a function in torch.compile": lambda m: torch.compile(
        functools.partial(lambda f, a: f(a) * 1, thunder.jit(lambda a: m(a) + 0)), backend="aot_eager"
    ),
    "in torch.compile": lambda m: torch.compile(compile_part(m), backend="aot_eager"),
    "a module that torch.compile has a part of": lambda m: compile_part(
        m, lambda part: torch.compile(part, backend="aot_eager")
    ),
}


@pytest.mark.parametrize("way", sorted(WAYS))
def test_compiled_submodule(way):
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        both_ways(pair, WAYS[way])


def test_compiled_part_follows_the_state_of_the_whole():
    model = pair()
    outer = thunder.jit(compile_part(model))
    with torch.no_grad():
        before = outer(x())
        next(model[0].parameters()).add_(1)
        after = outer(x())
        assert not torch.allclose(before, after)
        torch.testing.assert_close(after, model(x()))


# ---- copies ----


class Holder(nn.Module):
    """An eager module with a compiled part."""

    def __init__(self) -> None:
        super().__init__()
        self.part = thunder.jit(nn.Linear(3, 3))
        self.scale = 2.0

    def forward(self, a):
        return self.part(a) * self.scale


@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copy_of_a_module_that_holds_a_compiled_one(how, used):
    model = Holder()
    expected = model(x()).detach() if used else None
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    expected = model(x()).detach() if expected is None else expected
    torch.testing.assert_close(other(x()).detach(), expected)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    torch.testing.assert_close(model(x()).detach(), expected)  # no shared parameters
    assert not torch.allclose(other(x()).detach(), expected)
    other(x(grad=True)).sum().backward()
    assert all(p.grad is not None for p in other.parameters())
    assert all(p.grad is None for p in model.parameters())
