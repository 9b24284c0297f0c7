"""State that hides in containers, slots, generators, files and classes; and what is different from other programs."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime
import enum
import functools
import itertools
import os
import pathlib
import random
import tempfile
import threading
import time
import types
import uuid

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from tests.soundness.harness import Seen, program
from tests.soundness.world import X, backward


def M(rows: int = 3, start: float = 0.0) -> torch.Tensor:
    """Rows of four numbers."""
    return (torch.arange(rows * 4.0) * 0.37 + start).sin().reshape(rows, 4)


def linear(out: int = 4) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, out)


# ---- ordered dictionaries: a list of keys beside the table ----


@program("containers")
def forward_hook_that_removes_itself():
    model, ran = linear(), []

    def hook(module, args, out):
        ran.append(1)
        handle.remove()
        return out + 100

    handle = model.register_forward_hook(hook)
    yield model, M()
    yield Seen(hooks=list(model._forward_hooks.values()), ran=ran)
    yield M()
    yield Seen(hooks=list(model._forward_hooks.values()), ran=ran)


@program("containers")
def ordered_dictionary_that_drops_its_oldest():
    kept = collections.OrderedDict()

    def f(x, key):
        if key in kept:
            kept.move_to_end(key)
        else:
            kept[key] = x * 2
            if len(kept) > 2:
                kept.popitem(last=False)
        return x + sum(kept.values())

    yield f, X(), "a"
    for key in "bacab":
        yield X(len(kept)), key
        yield Seen(keys=list(kept), values=list(kept.values()))


# ---- deques and slots ----


@program("containers")
def deque_of_the_last_results():
    window = collections.deque(maxlen=2)

    def f(x):
        window.append(x * 1)
        return sum(window)

    yield f, X()
    for i in range(4):
        yield X(i)
        yield Seen(window=list(window), maxlen=window.maxlen)
    window.rotate(1)
    window.appendleft(torch.ones(4))
    yield X(9)
    yield Seen(window=list(window))


@program("containers")
def deque_as_a_queue_of_numbers():
    queue = collections.deque([1.0, 2.0, 3.0])
    yield lambda x: x * queue.popleft(), X()
    yield X()
    queue.append(7.0)
    yield X()
    yield X()
    yield Seen(queue=list(queue))
    yield X()  # of nothing


@program("classes")
def slots_written_by_the_function():
    @dataclasses.dataclass(slots=True)
    class Running:
        mean: torch.Tensor | None = None
        count: int = 0

    r = Running()

    def f(x):
        r.count += 1
        r.mean = x * 1 if r.mean is None else r.mean + (x - r.mean) / r.count
        return r.mean * 2

    yield f, X()
    for i in range(3):
        yield X(i)
        yield Seen(r=r)
    r.mean, r.count = None, 0
    yield X()
    yield Seen(r=r)


@program("classes")
def slot_deleted_by_the_function():
    class Once:
        __slots__ = ("first",)

    once = Once()
    once.first = 3.0

    def f(x):
        if hasattr(once, "first"):
            x = x * once.first
            del once.first
        return x

    yield f, X()
    yield Seen(there=hasattr(once, "first"))
    yield X()
    once.first = 5.0
    yield X()
    yield Seen(there=hasattr(once, "first"))


# ---- classes that come with arguments ----


@program("classes")
def operator_of_an_arguments_class_replaced():
    class Vector:
        def __init__(self, t):
            self.t = t

        def __neg__(self):
            return Vector(-self.t)

        def doubled(self):
            return self.t * 2

    def f(v):
        return (-v).t, v.doubled()

    yield f, Vector(X())
    Vector.__neg__ = lambda self: self
    yield (Vector(X()),)
    Vector.doubled = lambda self: self.t * 20
    yield (Vector(X()),)


@program("classes")
def method_of_a_named_tuples_class_replaced():
    class Pair(collections.namedtuple("Pair", "a b")):
        def joined(self):
            return self.a + self.b

    class Table(dict):
        def total(self):
            return sum(self.values())

    def f(pair, table):
        return pair.joined() + table.total()

    yield f, Pair(X(), X(1)), Table(a=X())
    Pair.joined = lambda self: self.a - self.b
    yield Pair(X(), X(1)), Table(a=X())
    Table.total = lambda self: 0
    yield Pair(X(), X(1)), Table(a=X())


@program("classes")
def method_of_an_enum_argument_replaced():
    class Mode(enum.IntEnum):
        UP = 1
        DOWN = 2

        def sign(self):
            return 1.0 if self is Mode.UP else -1.0

    yield lambda x, mode: x * mode.sign(), X(), Mode.UP
    yield X(), Mode.DOWN
    Mode.sign = lambda self: 5.0
    yield X(), Mode.UP


# ---- partials, threads, generators of numbers ----


@program("globals")
def partial_given_other_parts():
    def base(x, k, j=1):
        return x * k + j

    g = functools.partial(base, k=2.0)
    yield lambda x: g(x), X()
    g.keywords["k"] = 3.0
    yield X()
    g.__setstate__((base, (), {"k": 4.0, "j": 2}, {}))
    yield X()
    g.__setstate__((lambda x, k: x - k, (), {"k": 4.0}, {}))
    yield X()


@program("globals")
def attribute_of_a_partial():
    g = functools.partial(torch.mul, other=2.0)
    g.scale = 2.0
    yield lambda x: g(x) * g.scale, X()
    g.scale = 3.0
    yield X()


@program("globals")
def thread_local_setting():
    local = threading.local()
    local.scale = 2.0

    def f(x):
        return x * getattr(local, "scale", -1.0)

    def elsewhere(call):
        found = []
        thread = threading.Thread(target=lambda: found.append(call(X())))
        thread.start()
        thread.join()
        return found[0]

    yield lambda x, away=False: elsewhere(f) if away else f(x), X()
    local.scale = 3.0
    yield X()
    del local.scale
    yield X()


@program("impure")
def numpy_generator_of_ones_own():
    generator, old = np.random.default_rng(0), np.random.RandomState(0)
    yield lambda x: x * float(generator.normal()) + float(old.uniform()), X()
    yield X()
    yield X()
    yield Seen(after=float(generator.random()), old=float(old.uniform()))


@program("impure")
def numpy_generator_that_is_an_argument():
    generator = np.random.default_rng(0)
    yield lambda x, g: x * float(g.random()), X(), generator
    yield X(), generator


@program("impure")
def numpy_generator_that_nobody_draws_from():
    generator = np.random.default_rng(0)
    holder = types.SimpleNamespace(generator=generator, scale=2.0)
    yield lambda x: x * holder.scale, X()
    yield X()
    yield Seen(after=float(generator.random()))


@program("impure")
def python_generator_of_ones_own():
    generator = random.Random(0)
    yield lambda x: x * generator.random(), X()
    yield X()
    generator.seed(0)
    yield X()


# ---- clocks, files ----


@program("impure")
def time_of_day_from_datetime():
    deadline = types.SimpleNamespace(at=0.0)
    yield lambda x: x + (datetime.datetime.now().timestamp() > deadline.at), X()
    deadline.at = time.time() + 0.1
    yield X()
    time.sleep(0.15)
    yield X()


@program("impure")
def file_that_a_library_reads():
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "scale"
        path.write_text("2")
        yield lambda x: x * float(path.read_text()), X()
        path.write_text("3")
        yield X()


@program("impure")
def file_that_is_there_or_not():
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "flag")
        yield lambda x: x + 1 if os.path.exists(path) else x - 1, X()
        pathlib.Path(path).touch()
        yield X()
        os.remove(path)
        yield X()


@program("impure")
def folder_that_the_process_is_in():
    before = os.getcwd()
    try:
        yield lambda x: x + (os.getcwd() == "/"), X()
        os.chdir("/")
        yield X()
    finally:
        os.chdir(before)


@program("impure")
def line_after_line_of_an_open_file():
    with tempfile.TemporaryFile("w+") as file:
        file.write("1\n2\n3\n")
        file.seek(0)
        yield lambda x: x * float(file.readline()), X()
        yield X()
        yield X()


@program("impure")
def bytes_from_the_operating_system():
    drawn = []

    def f(x):
        drawn.append(uuid.uuid4().int)
        return x + 1

    yield f, X()
    yield X()
    yield X()
    yield Seen(different=len(set(drawn)))


# ---- numbers ----


@program("numbers")
def attribute_written_as_it_stood_while_sizes_change():
    s = types.SimpleNamespace(rate=0.5)

    def f(x):
        s.rate = 3.0
        return x * 2

    yield f, M(4)
    for rows in (5, 6, 7):
        yield M(rows)
        yield Seen(s=s)
        s.rate = float(rows)
    yield M(8)
    yield Seen(s=s)


@program("numbers")
def size_kept_as_a_float_while_sizes_change():
    s = types.SimpleNamespace(rate=0.5)

    def f(x):
        s.rate = float(x.size(-1))
        return x * 2

    yield f, torch.ones(4, 0)
    for rows, columns in ((5, 0), (8, 6), (9, 0), (7, 6), (10, 0)):
        yield torch.ones(rows, columns)
        yield Seen(s=s)


# ---- what was right, too ----


@program("modules")
def pruned_and_then_made_permanent():
    model = linear()
    yield model, M()
    prune.l1_unstructured(model, "weight", amount=0.5)
    out = yield M()
    yield Seen(error=backward(out), grads=[p.grad for p in model.parameters()])
    with torch.no_grad():
        model.weight_orig.mul_(2)
    yield M()
    prune.remove(model, "weight")
    yield M()


@program("modules")
def spectral_norm_with_its_state_compared():
    model = parametrizations.spectral_norm(linear(3))
    yield model, M()
    yield M()
    yield Seen(state=dict(model.state_dict()))
    model.eval()
    yield M()
    model.train()
    yield M()
    yield Seen(state=dict(model.state_dict()))


@program("modules")
def optimizer_inside_a_hook_of_the_gradient():
    model = linear()
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

    def step(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    out = yield model, M()
    yield Seen(error=backward(out), weights=list(model.parameters()))
    out = yield M()
    yield Seen(error=backward(out), weights=list(model.parameters()))


@program("modules")
def parameter_of_the_module_that_is_the_argument():
    model = linear()
    yield model, M(4)
    yield model.weight
    yield model.weight.detach()
    yield M(4)


@program("modules")
def buffers_that_overlap():
    base = torch.ones(8)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("a", base[:4])
            self.register_buffer("b", base[2:6])

        def forward(self, x):
            self.a.add_(1)
            return x + self.b

    model = Net()
    yield model, X()
    yield X()
    model.b = base[2:6].clone()
    yield X()
    model.a = model.b
    yield X()
    yield Seen(base=base, state=dict(model.state_dict()))


@program("modules")
def attributes_looked_up_in_the_wrapped_module():
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.inner, name)

        def forward(self, x):
            return self.inner(x) * self.gain

    inner = linear()
    inner.gain = 2.0
    model = Wrapper(inner)
    yield model, M()
    inner.gain = 3.0
    yield M()
    model.gain = 4.0
    yield M()
    del model.gain
    yield M()
    del inner.gain
    yield M()


@program("globals")
def numbers_that_are_equal_but_of_other_types():
    config = {"k": 1}
    yield lambda x: x * config["k"], torch.arange(4)
    for k in (1.0, True, 1, -0.0, 0.0, 0, False):
        config["k"] = k
        yield torch.arange(4)


@program("globals")
def cell_emptied():
    def make():
        k = 2.0
        return lambda x: x * k

    f = make()
    yield lambda x: f(x), X()
    f.__closure__[0].cell_contents = torch.ones(4) * 3
    yield X()
    f.__closure__[0].cell_contents.mul_(2)
    yield X()
    del f.__closure__[0].cell_contents
    yield X()


@program("globals")
def wrapper_that_counts_its_calls():
    def counted(fn):
        @functools.wraps(fn)
        def wrapper(*args):
            wrapper.calls += 1
            return fn(*args) * wrapper.calls

        wrapper.calls = 0
        return wrapper

    f = counted(lambda x: x + 1)
    yield f, X()
    yield X()
    f.calls = 10
    yield X()
    yield Seen(calls=f.calls)


@program("containers")
def results_of_former_calls_changed_by_the_caller():
    def f(x):
        return {"a": [x * 2], "b": (x, [1, 2])}

    first = yield f, X()
    first["a"].append(1)
    first["b"][1].append(3)
    second = yield X()
    second["b"][1].clear()
    yield X()


@program("containers")
def accumulated_chain_map():
    defaults, own = {"k": 3.0, "j": 1.0}, {"k": 2.0}
    both = collections.ChainMap(own, defaults)

    def f(x):
        both["n"] = both.get("n", 0) + 1
        return x * both["k"] + both["j"] * both["n"]

    yield f, X()
    del own["k"]
    yield X()
    both.maps.insert(0, {"k": 10.0})
    yield X()
    yield Seen(maps=both.maps)


@program("errors")
def error_that_a_context_manager_swallows():
    log = []

    @contextlib.contextmanager
    def noting(name):
        log.append(name)
        try:
            yield
        except ValueError as error:
            log.append(str(error))
        finally:
            log.append("out")

    def f(x, bad):
        with noting("in"):
            x = x + 1
            if bad:
                raise ValueError("bad")
            x = x * 2
        return x

    yield f, X(), False
    yield X(), True
    yield X(), False
    yield Seen(log=log)


@program("errors")
def kernel_that_fails_after_writes():
    state = {"n": 0}

    def f(x, i):
        x.add_(1)
        state["n"] += 1
        y = x[i]
        state["n"] += 10
        return y

    yield f, X(), torch.tensor([1])
    x = X()
    yield x, torch.tensor([7])
    yield Seen(x=x, state=state)
    yield X(), torch.tensor([2])
    yield Seen(state=state)


@program("values")
def newtons_method_until_it_has_converged():
    def f(x):
        y, steps = torch.ones_like(x), -1
        for i in range(50):
            z = 0.5 * (y + x / y)
            if torch.allclose(z, y):
                steps = i
                break
            y = z
        return y, steps

    yield f, X(2.0)
    yield X(50.0)
    yield X(2.0)


@program("values")
def patience_over_losses():
    class Patience:
        def __init__(self):
            self.best, self.bad = float("inf"), 0

        def __call__(self, loss):
            value = loss.item()
            self.best, self.bad = (value, 0) if value < self.best else (self.best, self.bad + 1)
            return self.bad >= 2, loss * self.best

    patience = Patience()
    yield patience, torch.tensor(3.0)
    for loss in (2.0, 2.5, 2.5, 1.0):
        yield torch.tensor(loss)
        yield Seen(patience=patience)


@program("tensors")
def buffers_that_change_places():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("a", torch.zeros(4))
            self.register_buffer("b", torch.ones(4))

        def forward(self, x):
            self.a, self.b = self.b, self.a
            return x + self.a

    model = Net()
    yield model, X()
    for _ in range(3):
        yield X()
        yield Seen(state=dict(model.state_dict()))


@program("tensors")
def graph_that_goes_on_over_calls():
    w, state = torch.ones(4, requires_grad=True), {"h": None}

    def f(x):
        state["h"] = x * w if state["h"] is None else state["h"] * w + x
        return state["h"].detach().clone()

    yield f, X()
    yield X()
    yield X()
    yield Seen(error=backward(state["h"]), grad=w.grad)
    state["h"] = None
    yield X()


@program("iterators")
def sent_to_a_generator_inside():
    class Scaler:
        scale = 2.0

        def running(self, x):
            sent = yield x
            while sent is not None:
                sent = yield x * sent * self.scale

    scaler = Scaler()

    def f(x):
        g = scaler.running(x)
        out = next(g) + g.send(3.0) + g.send(2.0)
        g.close()
        return out + sum(itertools.accumulate([1, 2, 3]))

    yield f, X()
    scaler.scale = 5.0
    yield X()
