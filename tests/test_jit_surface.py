"""What ``thunder.*`` tells about a compiled callable; cache options; threads; memory."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
import weakref

import pytest
import torch
from torch import nn

import thunder
from tests.jit_checks import (  # noqa: F401
    assert_call_same,
    assert_same,
    assert_served,
    no_grad,
    nothing_leaks,
)


def x(*shape: int) -> torch.Tensor:
    return torch.linspace(-1, 1, torch.Size(shape or (4, 3)).numel()).reshape(shape or (4, 3))


# ---- traces ----


def chain(a):
    return torch.relu(a * 2 + 1).sum(0)


def several(a, b):
    c, d = (a @ b.t()).chunk(2)
    e = torch.max(c, dim=1)
    return {"c": c, "pair": (d, e.values)}, e.indices


def writes(a):
    b = a.clone()
    b[0].mul_(3)
    b[:, 1] = 0.5
    a.add_(1)
    return b, b.t()


def numbers(a):
    return (
        a.clamp(min=-0.5, max=float("inf")) * complex(0, 1),
        a.to(torch.float64),
        torch.full((2,), -0.0),
        a[..., None],
    )


def random_ones(a):
    return torch.nn.functional.dropout(a, 0.5) + torch.rand(4, 3)


def constants(a):
    return a + torch.tensor([1.0, 2.0, 3.0]), torch.arange(3)


PROGRAMS = [(chain, 1), (several, 2), (writes, 1), (numbers, 1), (random_ones, 1), (constants, 1)]
ids = [fn.__name__ for fn, _ in PROGRAMS]


def has_opaque(trace: thunder.Trace) -> bool:
    return len(trace.namespace()) > 1


@pytest.mark.parametrize(("fn", "n"), PROGRAMS, ids=ids)
def test_every_stage_prints_and_parses_back(fn, n):
    compiled = thunder.jit(fn)
    compiled(*[x() for _ in range(n)])
    traces = thunder.last_traces(compiled)
    assert isinstance(traces, list)
    assert traces
    for trace in traces:
        text = str(trace)
        assert "def computation(" in text
        assert repr(trace).startswith("<thunder trace computation")
        if not has_opaque(trace):
            again = thunder.Trace(text)
            assert again == trace
            assert hash(again) == hash(trace)
            assert str(thunder.Trace(str(again))) == str(again)
            assert (again != trace) is False


@pytest.mark.parametrize(("fn", "n"), PROGRAMS, ids=ids)
def test_printed_trace_executed_as_python_gives_the_traces_result(fn, n):
    compiled = thunder.jit(fn)
    torch.manual_seed(0)
    compiled(*[x() for _ in range(n)])
    torch.manual_seed(0)
    eager_args = [x() for _ in range(n)]
    expected = torch.utils._pytree.tree_leaves(fn(*eager_args))
    for trace in thunder.last_traces(compiled):
        namespace = trace.namespace()
        exec(str(trace), namespace)
        torch.manual_seed(0)
        args = [x() for _ in range(n)]
        result = namespace["computation"](*args)
        assert_same(expected, list(result) if isinstance(result, tuple) else [result])
        assert_same(eager_args, args)


def test_trace_of_a_module_takes_inputs_then_names_parameters():
    net = nn.Linear(3, 2)
    compiled = thunder.jit(net)
    compiled(x())
    text = str(thunder.last_traces(compiled)[0])
    assert "weight" in text
    assert "bias" in text
    assert "torch.nn.functional.linear" in text


def test_trace_lines_name_the_users_source():
    compiled = thunder.jit(chain)
    compiled(x())
    assert "# test_jit_surface.py:" in str(thunder.last_traces(compiled)[0])


def test_traces_before_the_first_call_raise_what_to_do():
    with pytest.raises(RuntimeError, match="call the function first"):
        thunder.last_traces(thunder.jit(chain))


def test_last_traces_are_those_of_the_program_used_last():
    compiled = thunder.jit(lambda a: a * 2)
    compiled(x())
    compiled(x(5))
    assert "f32[5]" in str(thunder.last_traces(compiled)[0])
    compiled(x())
    assert "f32[4, 3]" in str(thunder.last_traces(compiled)[0])


def test_traces_outlive_the_compiled_callable():
    compiled = thunder.jit(chain)
    compiled(x())
    traces = thunder.last_traces(compiled)
    del compiled
    gc.collect()
    assert "torch.relu" in str(traces[0])


def test_trace_from_bad_text_points_at_the_place():
    for text in ("", "def f(:", "def computation(a: 3):\n    return a\n", "nonsense"):
        with pytest.raises((SyntaxError, ValueError), match=r"line \d+|."):
            thunder.Trace(text)
    with pytest.raises(TypeError):
        thunder.Trace(3)


def test_operations_of_a_trace():
    compiled = thunder.jit(chain)
    compiled(x())
    assert "torch.relu" in thunder.last_traces(compiled)[0].operations()


# ---- counters and options ----


def test_cache_counters():
    compiled = thunder.jit(lambda a, k: a * k)
    assert (thunder.cache_hits(compiled), thunder.cache_misses(compiled)) == (0, 0)
    for k in (1, 1, 2, 1):
        compiled(x(), k)
    assert (thunder.cache_hits(compiled), thunder.cache_misses(compiled)) == (2, 2)


def test_compile_stats():
    compiled = thunder.jit(chain)
    for _ in range(3):
        compiled(x())
    stats = thunder.compile_stats(compiled)
    assert (stats.calls, stats.cache_hits, stats.cache_misses, stats.fallbacks) == (3, 2, 1, 0)
    assert "cache_hits=2" in repr(stats)
    (entry,) = stats.entries
    assert entry["hits"] == 2
    assert entry["capture_ms"] > 0
    assert entry["operations"] >= 4
    before = stats.calls
    compiled(x())
    assert stats.calls == before


def test_cache_option_and_compile_options():
    compiled = thunder.jit(chain)
    assert thunder.cache_option(compiled) == "constant values"
    options = thunder.last_compile_options(compiled)
    assert options["fallback"] == "error"
    assert options["executors"] == thunder.get_always_executors()
    options["cache"] = "changed"
    assert thunder.cache_option(compiled) == "constant values"


@pytest.mark.parametrize(
    "question",
    [
        thunder.cache_hits,
        thunder.cache_misses,
        thunder.cache_option,
        thunder.compile_stats,
        thunder.last_traces,
        thunder.last_compile_options,
    ],
    ids=lambda f: f.__name__,
)
def test_questions_about_something_not_compiled_say_so(question):
    for other in (chain, nn.Linear(3, 2), 3):
        with pytest.raises(TypeError, match=r"not something that thunder\.jit returned"):
            question(other)
    module = thunder.jit(nn.Linear(3, 2))
    module(x())
    question(module)


def test_no_caching_compiles_at_every_call():
    compiled = thunder.jit(lambda a: a * 2, cache="no caching")
    for _ in range(3):
        assert_same(x() * 2, compiled(x()))
    assert_served(compiled, misses=3, hits=0)
    assert "torch.Tensor.mul" in str(thunder.last_traces(compiled)[0])


def test_same_input_compiles_once_and_checks_arguments_only():
    net = nn.Linear(3, 2)
    compiled = thunder.jit(net, cache="same input")
    assert_same(net(x()), compiled(x()))
    net.weight.mul_(2)
    assert_same(net(x()), compiled(x()))
    assert_served(compiled, misses=1, hits=1)


def test_same_input_with_other_arguments_is_never_wrong():
    f = lambda a, k: a.reshape(-1) * k  # noqa: E731
    compiled = thunder.jit(f, cache="same input")
    for args in ((x(), 2), (x(2, 6), 2), (x(), 3), (x().double(), 2)):
        try:
            ours = compiled(*args)
        except (RuntimeError, TypeError, ValueError):
            continue
        assert_same(f(*args), ours)
    with pytest.raises(TypeError):
        compiled(x(), 2, 3)
    with pytest.raises(TypeError):
        compiled(x())


# ---- executors ----


def test_executors_are_found_by_name():
    assert thunder.get_executor("torch") is thunder.pytorch_executor
    assert thunder.pytorch_executor in thunder.get_all_executors()
    assert thunder.pytorch_executor in thunder.get_always_executors()
    assert {e.name for e in thunder.get_all_executors()} >= {"torch", "python"}
    assert all(e in thunder.get_all_executors() for e in thunder.get_default_executors())
    assert thunder.pytorch_executor.name == "torch"
    assert thunder.pytorch_executor.version == torch.__version__


def test_unknown_executor_lists_the_known_and_the_nearest():
    with pytest.raises(LookupError, match=r"'torhc'.*'torch'.*'python'.*Did you mean 'torch'"):
        thunder.get_executor("torhc")


def test_executors_by_name_and_by_object():
    for executors in (["torch"], [thunder.pytorch_executor], (), ["python", "torch"]):
        compiled = thunder.jit(chain, executors=executors)
        assert_same(chain(x()), compiled(x()))
        assert thunder.pytorch_executor in thunder.last_compile_options(compiled)["executors"]


def test_public_names_exist():
    for name in thunder.__all__:
        assert getattr(thunder, name) is not None


# ---- threads ----


def run_threads(count: int, work) -> None:
    errors: list[BaseException] = []
    start = threading.Barrier(count)

    def body(index: int) -> None:
        try:
            start.wait()
            with torch.no_grad():
                work(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=body, args=(i,)) for i in range(count)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    if errors:
        raise errors[0]


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 2)).eval()


def test_four_threads_call_one_compiled_module():
    net = model()
    compiled = thunder.jit(net)
    compiled(x())

    def work(index: int) -> None:
        a = x() + index
        expected = net(a)
        for _ in range(200):
            assert_same(expected, compiled(a))

    run_threads(4, work)
    assert thunder.cache_misses(compiled) == 1


def test_four_threads_make_the_first_call_together():
    for _ in range(5):
        net = model()
        compiled = thunder.jit(net)

        def work(index: int, net=net, compiled=compiled) -> None:
            a = x() + index
            expected = net(a)
            for _ in range(5):
                assert_same(expected, compiled(a))

        run_threads(4, work)


def test_threads_with_different_shapes_compile_side_by_side():
    net = model()
    compiled = thunder.jit(net)

    def work(index: int) -> None:
        for n in range(1, 20):
            a = x(n + index, 3)
            assert_same(net(a), compiled(a))

    run_threads(4, work)


def test_threads_with_different_callables_compile_side_by_side():
    def work(index: int) -> None:
        for n in range(5):
            f = lambda a, n=n: torch.relu(a) * (index + n) + torch.rand(1) * 0  # noqa: E731
            compiled = thunder.jit(f)
            assert_same(f(x()), compiled(x()))
            assert_same(f(x()), compiled(x()))

    run_threads(4, work)


def test_numbers_that_another_thread_draws_during_a_capture_are_no_seed():
    stop = threading.Event()

    def draw() -> None:
        while not stop.is_set():
            torch.rand(1)

    def f(a):
        for _ in range(20):
            a = a + torch.rand(3)
        return a

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    other = threading.Thread(target=draw)
    other.start()
    try:
        for _ in range(10):
            compiled = thunder.jit(f, fallback="error")
            compiled(x())
            assert "rng_state" not in str(thunder.last_traces(compiled)[-1])
    finally:
        stop.set()
        other.join()
        sys.setswitchinterval(interval)
    assert not torch.equal(compiled(x()), compiled(x()))


def test_a_program_seeds_while_another_thread_runs():
    def f(a):
        torch.manual_seed(3)
        return a + torch.rand(3)

    stop = threading.Event()
    other = threading.Thread(target=stop.wait)
    other.start()
    try:
        compiled = thunder.jit(f, fallback="error")
        assert_same(f(x()), compiled(x()))
        assert_same(f(x()), compiled(x()))
    finally:
        stop.set()
        other.join()


@pytest.mark.parametrize("seeded", [False, True])
def test_random_numbers_that_another_thread_draws_meanwhile_are_no_seed(seeded):
    def fn(a):
        if seeded:
            torch.manual_seed(7)
        first = torch.rand(3)
        if not ask.acquire(blocking=False):  # in the first call
            ask.release()
            answer.acquire()
        else:
            ask.release()
        return a + first, torch.rand(3)

    def draw():
        ask.acquire()
        torch.rand(5)
        ask.release()
        answer.release()

    ask, answer = threading.Lock(), threading.Lock()
    ask.acquire(), answer.acquire()
    thread = threading.Thread(target=draw)
    thread.start()
    compiled = thunder.jit(fn)
    compiled(x())
    thread.join()
    assert not ask.locked()
    sets = str(thunder.last_traces(compiled)[0]).count("torch.set_rng_state(")
    assert sets == (1 if seeded else 0)
    if not seeded:
        torch.manual_seed(3)
        expected = [t for _ in range(2) for t in fn(x())]
        torch.manual_seed(3)
        assert_same(expected, [t for _ in range(2) for t in compiled(x())])


def test_eager_code_in_another_thread_is_undisturbed_by_a_capture():
    stop = threading.Event()
    wrong: list[BaseException] = []
    buffer_net = nn.BatchNorm1d(3).train()

    def eager() -> None:
        with torch.no_grad():
            while not stop.is_set():
                try:
                    out = torch.relu(x()) + torch.tensor([1.0, 2.0, 3.0])
                    assert type(out) is torch.Tensor
                    assert bool((out >= 1).all())
                except BaseException as error:
                    wrong.append(error)
                    return

    thread = threading.Thread(target=eager)
    thread.start()
    for n in range(2, 12):
        compiled = thunder.jit(nn.Sequential(buffer_net, nn.Linear(3, 3)))
        compiled(x(n, 3))
    stop.set()
    thread.join()
    assert not wrong, wrong[0]


def test_threads_in_different_modes():
    compiled = thunder.jit(lambda a: a @ a.t())

    def work(index: int) -> None:
        for _ in range(50):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bool(index % 2)):
                assert compiled(x()).dtype == (torch.bfloat16 if index % 2 else torch.float32)

    run_threads(4, work)


# ---- memory ----


def gone(reference: weakref.ref) -> bool:
    gc.collect()
    return reference() is None


def test_deleted_function_is_freed_with_its_closure():
    w = x()
    reference = weakref.ref(w)

    def make(t):
        return lambda a: a + t

    compiled = thunder.jit(make(w))
    compiled(x())
    compiled(x())
    handle = weakref.ref(compiled)
    del w
    assert not gone(reference)
    del compiled
    assert gone(handle)
    assert gone(reference)


def test_deleted_module_is_freed_with_its_parameters():
    net = model()
    compiled = thunder.jit(net)
    compiled(x())
    references = [weakref.ref(net), weakref.ref(compiled), *[weakref.ref(p) for p in net.parameters()]]
    del net, compiled
    assert all(gone(r) for r in references)


def test_module_that_holds_its_own_compilation_is_freed():
    net = model()
    object.__setattr__(net, "fast", thunder.jit(net))
    net.fast(x())
    references = [weakref.ref(net), *[weakref.ref(p) for p in net.parameters()]]
    del net
    assert all(gone(r) for r in references)


def test_function_whose_closure_holds_its_own_compilation_is_freed():
    class Marker:
        pass

    marker = Marker()
    reference = weakref.ref(marker)
    box = []

    def f(a, keep=marker):
        return a + len(box)

    box.append(thunder.jit(f))
    box[0](x())
    del f, marker
    box = None
    assert gone(reference)


def test_result_is_freed_when_the_caller_drops_it():
    compiled = thunder.jit(lambda a: (a * 2, [a + 1]))
    for _ in range(2):
        out = compiled(x())
        references = [weakref.ref(out[0]), weakref.ref(out[1][0])]
        del out
        assert all(r() is None for r in references)


def test_arguments_are_not_kept_alive():
    class Box:
        def __init__(self, value):
            self.value = value

    compiled = thunder.jit(lambda a, box: a * box.value)
    for _ in range(2):
        a, box = x(), Box(x())
        references = [weakref.ref(a), weakref.ref(box), weakref.ref(box.value)]
        compiled(a, box)
        del a, box
        assert all(gone(r) for r in references)


def test_failed_capture_keeps_nothing_alive():
    def f(a):
        b = a * 2
        return a[b > 0]

    compiled = thunder.jit(f)
    a = x()
    reference = weakref.ref(a)
    with contextlib.suppress(thunder.CaptureError):
        compiled(a)
    del a
    assert gone(reference)


def test_no_fakes_survive_a_capture():
    from torch._subclasses.fake_tensor import FakeTensor

    gc.collect()
    before = sum(isinstance(o, FakeTensor) for o in gc.get_objects())
    compiled = thunder.jit(model())
    compiled(x())
    compiled(x(2, 3))
    gc.collect()
    assert sum(isinstance(o, FakeTensor) for o in gc.get_objects()) == before


def test_intermediates_are_freed_during_the_call():
    live = []

    def f(a):
        b = a * 2
        c = b + 1
        return c.sum()

    compiled = thunder.jit(f)
    compiled(x())
    gc.collect()
    live = sum(isinstance(o, torch.Tensor) for o in gc.get_objects())
    for _ in range(20):
        compiled(x())
    gc.collect()
    assert sum(isinstance(o, torch.Tensor) for o in gc.get_objects()) <= live
