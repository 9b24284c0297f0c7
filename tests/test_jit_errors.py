"""Bad input: a clear error that names the user's line, nothing left behind, and the callable works afterwards."""

from __future__ import annotations

import inspect
import logging
import pickle
import sys
import warnings

import pytest
import torch
from torch import nn

import thunder
from tests.jit_checks import (  # noqa: F401
    assert_call_same,
    assert_no_fakes,
    assert_same,
    assert_served,
    no_grad,
    nothing_leaks,
    traces_left,
)


def x(*shape: int) -> torch.Tensor:
    return torch.linspace(-1, 1, torch.Size(shape or (4, 3)).numel()).reshape(shape or (4, 3))


def line_of(function, marker: str) -> int:
    """The number of the source line of `function` that holds `marker`."""
    lines, first = inspect.getsourcelines(function)
    return first + next(i for i, line in enumerate(lines) if marker in line)


def fails(compiled, *args, **kwargs) -> BaseException:
    """Call, which must raise; and the call must leave every mode, flag and the random state as before."""
    before, rng = traces_left(), torch.get_rng_state()
    with pytest.raises(Exception) as error:
        compiled(*args, **kwargs)
    assert traces_left() == before
    assert torch.equal(rng, torch.get_rng_state())
    return error.value


def assert_names_line(error: BaseException, function, marker: str) -> None:
    """The error's text (or a note on it, or its traceback) leads to the user's line."""
    line = line_of(function, marker)
    text = str(error) + "".join(getattr(error, "__notes__", []))
    frames = []
    trace = error.__traceback__
    while trace:
        frames.append((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
        trace = trace.tb_next
    assert (__file__, line) in frames or f"{line}" in text, f"line {line} is not in: {text}"


# ---- what torch itself refuses ----


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, a, scale=1.0):
        b = self.layer(a)  # the layer
        return b * scale


@pytest.mark.parametrize("warm", [False, True], ids=["first call", "after a good call"])
@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (lambda: x(4, 5), "shapes cannot be multiplied|size mismatch|reduction dim"),
        (lambda: x(4, 3).double(), "dtype"),
        (lambda: torch.ones(4, 3, dtype=torch.long), "dtype|Long"),
        (lambda: x(4, 3).to("meta"), "meta"),
        (lambda: torch.empty(0), "size|shape|dim"),
    ],
    ids=["shape", "dtype", "integer", "device", "empty"],
)
def test_wrong_tensor_raises_with_the_users_line_and_the_module_still_works(bad, match, warm):
    net = Net().eval()
    compiled = thunder.jit(net)
    if warm:
        assert_call_same(compiled, net, x())
    for _ in range(2):
        error = fails(compiled, bad())
        assert isinstance(error, RuntimeError)
        assert_names_line(error, Net.forward, "# the layer")
        import re

        assert re.search(match, str(error)), str(error)
        assert_no_fakes(net)
    assert_call_same(compiled, net, x())


def test_error_type_is_eagers():
    cases = [
        (lambda a: a[10], IndexError),
        (lambda a: a.view(99), RuntimeError),
        (lambda a: a.sum(5), IndexError),
        (lambda a: torch.cat([]), (RuntimeError, ValueError)),
        (lambda a: a.no_such_attribute, AttributeError),
        (lambda a: torch.relu(a, 1, 2), TypeError),
        (lambda a: a + "text", TypeError),
        (lambda a: nn.functional.dropout(a, 2.0), ValueError),
        (lambda a: a.to("no_such_device"), RuntimeError),
        (lambda a: torch.zeros(-1), RuntimeError),
    ]
    for fn, kind in cases:
        with pytest.raises(kind):
            fn(x())
        assert isinstance(fails(thunder.jit(fn), x()), kind)


def test_error_at_run_time_carries_a_note_with_the_users_line():
    def f(a, i):
        b = a * 2
        return b[i] + 1  # out of range

    compiled = thunder.jit(f)
    assert_call_same(compiled, f, x(), torch.tensor([0]))
    error = fails(compiled, x(), torch.tensor([99]))
    assert isinstance(error, IndexError)
    assert_names_line(error, f, "# out of range")
    assert_call_same(compiled, f, x(), torch.tensor([1]))


def test_error_at_run_time_leaves_earlier_writes_as_eager_does():
    def f(a, i):
        a.add_(1)
        return a[i]

    compiled = thunder.jit(f)
    assert_call_same(compiled, f, x(), torch.tensor([0]))
    eager, ours = x(), x()
    with pytest.raises(IndexError):
        f(eager, torch.tensor([99]))
    fails(compiled, ours, torch.tensor([99]))
    assert_same(eager, ours)


@pytest.mark.parametrize(
    ("args", "kwargs", "match"),
    [
        ((), {}, "missing"),
        ((1, 2, 3), {}, "positional argument"),
        ((), {"wrong": 1}, "wrong"),
        ((1,), {"a": 2}, "multiple values"),
    ],
    ids=["too few", "too many", "unknown name", "twice"],
)
def test_wrong_arguments_raise_pythons_own_error(args, kwargs, match):
    def f(a, b=1):
        return a + b

    for compiled in (thunder.jit(f), thunder.jit(Net())):
        error = fails(compiled, *args, **kwargs)
        assert isinstance(error, TypeError)
    with pytest.raises(TypeError, match=match):
        thunder.jit(f)(*args, **kwargs)


# ---- tensors that cannot be captured ----


class Tagged(torch.Tensor):
    pass


class Counting(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


class Dispatching(torch.Tensor):
    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError("not in this test")


UNSUPPORTED = {
    "subclass": lambda: x().as_subclass(Tagged),
    "subclass with torch_function": lambda: x().as_subclass(Counting),
    "subclass with torch_dispatch": lambda: Dispatching(x()),
    "sparse coo": lambda: torch.eye(3).to_sparse(),
    "sparse csr": lambda: torch.eye(3).to_sparse_csr(),
    "nested": lambda: torch.nested.nested_tensor([x(2, 3), x(1, 3)]),
    "jagged": lambda: torch.nested.nested_tensor([x(2, 3), x(1, 3)], layout=torch.jagged),
    "quantized": lambda: torch.quantize_per_tensor(x(), 0.1, 0, torch.qint8),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", ["argument", "container", "closure", "module"])
@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_unsupported_tensor_is_refused_by_name(kind, place):
    bad = UNSUPPORTED[kind]()

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.bad = bad

        def forward(self, a, use):
            return a + 1 if not use else self.bad * 2

    holder = Holder()
    compiled = {
        "argument": lambda: thunder.jit(lambda a, use: a * 2),
        "container": lambda: thunder.jit(lambda a, use: (a["k"][0] if isinstance(a, dict) else a) * 2),
        "closure": lambda: thunder.jit(lambda a, use: (bad if use else a) * 2),
        "module": lambda: thunder.jit(holder),
    }[place]()
    argument = {"argument": bad, "container": {"k": [bad]}, "closure": x(), "module": x()}[place]
    for _ in range(2):
        error = fails(compiled, argument, True)
        assert isinstance(error, thunder.CaptureError), repr(error)
        words = {"sparse coo": "sparse", "sparse csr": "sparse", "nested": "nested", "jagged": "nested|subclass|Nested"}
        want = words.get(kind, kind.split()[0]).split("|")
        assert any(word in str(error) for word in want), str(error)
        assert "What to do" in str(error)
    assert torch.equal(compiled(x(), False), x() + 1 if place == "module" else x() * 2)


# ---- what is no callable of tensors ----


def generator(a):
    yield a + 1


async def coroutine(a):
    return a + 1


async def async_generator(a):
    yield a + 1


class GeneratorModule(nn.Module):
    def forward(self, a):
        yield a


class CoroutineModule(nn.Module):
    async def forward(self, a):
        return a


@pytest.mark.parametrize(
    ("target", "match"),
    [
        (generator, "generator function generator.*list instead"),
        (async_generator, "generator function"),
        (coroutine, "coroutine function coroutine"),
        (GeneratorModule(), "generator"),
        (CoroutineModule(), "coroutine"),
        (nn.Linear, r"class Linear.*instance.*thunder.jit\(Linear\(\.\.\.\)\)"),
        (3, "callables and modules, not int"),
        ("text", "not str"),
        (torch.ones(2), "not Tensor"),
    ],
    ids=lambda v: "" if isinstance(v, str) else getattr(v, "__name__", type(v).__name__),
)
def test_wrong_target_is_refused_when_compiling(target, match):
    with pytest.raises(TypeError, match=match):
        thunder.jit(target)


def test_generator_returned_by_a_plain_function_is_refused():
    compiled = thunder.jit(lambda a: (row * 2 for row in a))
    error = fails(compiled, x())
    assert "generator" in str(error)


def test_coroutine_returned_by_a_plain_function_is_refused():
    compiled = thunder.jit(lambda a: coroutine(a))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        error = fails(compiled, x())
    assert "coroutine" in str(error)


def test_compiled_by_torch_is_refused_with_what_to_write():
    inner = nn.Linear(3, 3)
    inplace = nn.Linear(3, 3)
    inplace.compile()
    targets = [
        torch.compile(lambda a: a + 1),
        torch.compile(nn.Linear(3, 3)),
        nn.Sequential(nn.ReLU(), torch.compile(inner)),
        inplace,
        nn.Sequential(nn.Linear(3, 3), inplace),
    ]
    for target in targets:
        with pytest.raises(TypeError, match=r"torch\.compile.*thunder\.jit\("):
            thunder.jit(target)


def test_method_of_a_module_compiled_by_torch_is_refused():
    compiled = torch.compile(nn.Linear(3, 3))
    with pytest.raises(TypeError, match=r"torch\.compile"):
        thunder.jit(compiled.forward)


def test_partial_of_a_function_compiled_by_torch_is_refused():
    import functools

    with pytest.raises(TypeError, match=r"torch\.compile"):
        thunder.jit(functools.partial(torch.compile(lambda a, b: a + b), b=1))


def test_compiled_twice_is_refused():
    for once in (thunder.jit(lambda a: a), thunder.jit(nn.Linear(3, 3))):
        with pytest.raises(TypeError, match="compiled already"):
            thunder.jit(once)


# ---- options ----


def test_unknown_option_names_the_nearest():
    with pytest.raises(TypeError, match=r"'cahce'; did you mean 'cache'"):
        thunder.jit(lambda a: a, cahce="no caching")
    with pytest.raises(TypeError, match="known options are executors"):
        thunder.jit(lambda a: a, zzz=1)
    with pytest.raises(TypeError, match="executors"):
        thunder.jit(lambda a: a, executor=["torch"])


def test_bad_option_values_name_the_known_ones():
    with pytest.raises(ValueError, match=r"'constant values'.*'no caching'.*'same input'.*not 'never'"):
        thunder.jit(lambda a: a, cache="never")
    with pytest.raises(ValueError, match=r"'dynamo'.*'eager'.*'error'.*not 'inductor'"):
        thunder.jit(lambda a: a, fallback="inductor")
    with pytest.raises((TypeError, ValueError), match="cache"):
        thunder.jit(lambda a: a, cache=["no caching"])
    with pytest.raises(LookupError, match=r"'torhc'.*'torch'"):
        thunder.jit(lambda a: a, executors=["torhc"])
    with pytest.raises(TypeError, match="executors must be names"):
        thunder.jit(lambda a: a, executors=[3])
    with pytest.raises(TypeError, match="executors"):
        thunder.jit(lambda a: a, executors="torch")
    with pytest.raises(TypeError, match=r"transforms must be thunder\.Transform objects, not object"):
        thunder.jit(lambda a: a, transforms=[object()])
    with pytest.raises(TypeError, match=r"write NvtxRanges\(\)"):
        thunder.jit(lambda a: a, transforms=[thunder.transforms.NvtxRanges])
    with pytest.raises(TypeError, match=r"write transforms=\[LoRA\(r=8"):
        thunder.jit(lambda a: a, transforms=thunder.transforms.LoRA())


def test_decorator_with_a_bad_option_raises_at_the_decorator():
    with pytest.raises(ValueError, match="cache"):

        @thunder.jit(cache="never")
        def f(a):
            return a


# ---- programs that depend on data ----


def to_numpy(a):
    return a.numpy().sum()  # here


def branch_by_numpy(a):
    if a.numpy().sum() > 0:  # here
        return a
    return -a


def formatted(a):
    return a, f"{a}"  # here


def printed(a):
    print(a)  # here
    return a


def memory(a):
    return a, a.data_ptr()  # here


def sparse(a):
    return a.to_sparse()  # here


DATA = [to_numpy, branch_by_numpy, formatted, printed, memory, sparse]


@pytest.mark.parametrize("fn", DATA, ids=lambda f: f.__name__)
def test_data_dependence_names_file_line_construct_reason_and_fix(fn):
    compiled = thunder.jit(fn)
    for _ in range(2):
        error = fails(compiled, x())
        assert isinstance(error, thunder.CaptureError), repr(error)
        assert error.file == __file__
        assert error.line == line_of(fn, "# here")
        assert error.function == fn.__name__
        assert "torch" in error.construct or error.construct in ("print", "an operation with a sparse result")
        assert error.reason
        assert error.fix
        for part in (error.file, str(error.line), error.construct, error.reason, error.fix):
            assert part in str(error)


def test_line_in_a_module_is_the_line_in_its_forward():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, a):
            b = self.layer(a)
            if b.numpy().sum() > 0:  # here
                return b
            return -b

    net = Branch()
    error = fails(thunder.jit(net), x())
    assert isinstance(error, thunder.CaptureError)
    assert (error.file, error.line) == (__file__, line_of(Branch.forward, "# here"))


def test_line_is_the_users_when_torchs_own_python_asks_for_data():
    def f(a):
        return torch.nn.utils.rnn.pack_padded_sequence(a, a[:, 0, 0].long())  # here

    error = fails(thunder.jit(f), x(4, 3, 2))
    if isinstance(error, thunder.CaptureError):
        assert (error.file, error.line) == (__file__, line_of(f, "# here"))


def test_swallowed_capture_error_is_raised_at_the_end():
    def f(a):
        try:
            if a.numpy().sum() > 0:  # here
                return a * 2
        except:  # noqa: E722
            pass
        return a * 3

    error = fails(thunder.jit(f), x())
    assert isinstance(error, thunder.CaptureError)
    assert error.line == line_of(f, "# here")


def test_swallowed_capture_error_wins_over_a_later_error():
    def f(a):
        try:
            a.numpy()  # here
        except Exception:
            raise ValueError("user's own") from None

    error = fails(thunder.jit(f), x())
    assert isinstance(error, thunder.CaptureError)
    assert error.line == line_of(f, "# here")


def test_capture_error_can_be_pickled_and_is_a_thunder_error():
    error = fails(thunder.jit(branch_by_numpy), x())
    assert isinstance(error, thunder.ThunderError)
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error)
    assert (copy.line, copy.construct) == (error.line, error.construct)


def test_callable_works_after_a_data_dependent_call():
    def f(a, use):
        return a[a.numpy() > 0] if use else a * 2

    compiled = thunder.jit(f)
    fails(compiled, x(), True)
    assert_call_same(compiled, f, x(), False)
    fails(compiled, x(), True)
    assert_call_same(compiled, f, x(), False)


def test_fallback_eager_warns_once_and_gives_eagers_result():
    compiled = thunder.jit(branch_by_numpy, fallback="eager")
    with pytest.warns(thunder.ThunderWarning, match="branch_by_numpy: runs eager.*What to do") as caught:
        for step in range(4):
            assert_same(branch_by_numpy(x() + step), compiled(x() + step))
    assert len(caught) == 1
    assert thunder.compile_stats(compiled).fallbacks == 4


def test_fallback_eager_still_raises_the_users_own_errors():
    compiled = thunder.jit(lambda a: a.view(99), fallback="eager")
    assert isinstance(fails(compiled, x()), RuntimeError)


def test_fallback_eager_compiles_what_it_can():
    def f(a, use):
        return a[a.numpy() > 0] if use else a * 2

    compiled = thunder.jit(f, fallback="eager")
    with pytest.warns(thunder.ThunderWarning):
        assert_same(f(x(), True), compiled(x(), True))
    assert_same(f(x(), False), compiled(x(), False))
    assert_same(f(x(), False), compiled(x(), False))
    assert thunder.cache_hits(compiled) == 1


def test_fallback_does_not_run_side_effects_twice():
    calls = []

    def f(a):
        calls.append(1)
        return a[a.numpy() > 0]

    compiled = thunder.jit(f, fallback="eager")
    with pytest.warns(thunder.ThunderWarning):
        compiled(x())
    first = len(calls)
    compiled(x())
    assert len(calls) - first == 1, "a call that is known to fall back must not be captured again"


# ---- exceptions of the user's code ----


class Custom(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__(a, b)
        self.b = b


@pytest.mark.parametrize("warm", [False, True])
def test_exception_of_user_code_propagates_unchanged(warm):
    raised = Custom(1, 2)

    def f(a, bad):
        b = a * 2
        if bad:
            raise raised  # here
        return b

    compiled = thunder.jit(f)
    if warm:
        compiled(x(), False)
    for _ in range(2):
        error = fails(compiled, x(), True)
        assert error is raised
        assert_names_line(error, f, "# here")
    assert torch.equal(compiled(x(), False), x() * 2)


def test_assertion_error_and_its_message_propagate():
    def f(a):
        assert a.dim() == 3, f"want 3 dims, got {a.dim()}"
        return a

    compiled = thunder.jit(f)
    with pytest.raises(AssertionError, match="want 3 dims, got 2"):
        compiled(x())
    assert torch.equal(compiled(x(1, 2, 3)), x(1, 2, 3))


@pytest.mark.parametrize(
    "kind", [KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, RecursionError, StopIteration]
)
def test_base_exceptions_propagate_and_leave_no_mode_behind(kind):
    def f(a, bad):
        if bad:
            raise kind("stop")
        return a + 1

    net = nn.Identity()
    net.register_forward_hook(lambda m, args, out: (_ for _ in ()).throw(kind("stop")) if out.dim() == 3 else out)
    for compiled, bad, good in (
        (thunder.jit(f), (x(), True), (x(), False)),
        (thunder.jit(net), (x(1, 2, 3),), (x(),)),
    ):
        before = traces_left()
        with pytest.raises((kind, RuntimeError) if kind is StopIteration else kind):
            compiled(*bad)
        assert traces_left() == before
        compiled(*good)


def test_endless_recursion_is_a_recursion_error():
    def f(a):
        return f(a + 1)

    compiled = thunder.jit(f)
    before = traces_left()
    with pytest.raises(RecursionError):
        compiled(x())
    assert traces_left() == before


def test_failure_inside_autocast_and_grad_mode_blocks_restores_them():
    def f(a):
        with torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            return a[a.numpy() > 0]

    error = fails(thunder.jit(f), x())
    assert isinstance(error, thunder.CaptureError)


def test_failure_while_a_mode_is_switched_by_hand_restores_it():
    def f(a):
        torch.set_grad_enabled(True)
        return a[a.numpy() > 0]

    error = fails(thunder.jit(f), x())
    assert isinstance(error, thunder.CaptureError)


def test_failure_restores_the_random_state():
    def f(a):
        b = torch.rand(3) + torch.tensor([1.0, 2.0, 3.0])
        torch.rand(2)
        return a[a.numpy() > 0] + b.sum()

    torch.manual_seed(1)
    fails(thunder.jit(f), x())


def test_error_inside_nested_capture_clears_both():
    inner = thunder.jit(branch_by_numpy)
    outer = thunder.jit(lambda a: inner(a) + 1)
    error = fails(outer, x())
    assert isinstance(error, thunder.CaptureError)
    assert error.function == "branch_by_numpy"


def test_error_inside_vmap_inside_capture_leaves_nothing():
    compiled = thunder.jit(lambda a: torch.vmap(lambda row: row[row > 0])(a))
    fails(compiled, x())
    assert torch._C._functorch.maybe_get_level(x()) == -1
    assert torch._C._functorch.peek_interpreter_stack() is None


def test_warnings_of_user_code_are_not_swallowed():
    def f(a):
        warnings.warn("careful", UserWarning, stacklevel=1)
        return a + 1

    with pytest.warns(UserWarning, match="careful"):
        thunder.jit(f)(x())


@pytest.mark.parametrize("width", [3, 7])
def test_nothing_is_logged_when_torch_cannot_tell_a_shape(capfd, width):
    """Seven columns reach torch's own kernel for tensors without data, which logs what it raises."""
    compiled = thunder.jit(lambda a: a.sum(0) @ torch.ones(7, 7) if width == 7 else a @ a)
    handler = logging.StreamHandler(sys.stderr)
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    logger.addHandler(handler)
    try:
        fails(compiled, x())
    finally:
        logger.removeHandler(handler)
    out, err = capfd.readouterr()
    assert out == ""
    assert err == ""
