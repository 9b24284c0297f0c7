"""Programs of the fourth collection: effects that a call leaves behind, in objects, containers, generators and logs."""

from __future__ import annotations

import collections
import contextlib
import functools
import io
import itertools
import logging
import os
import random
import tempfile
import threading
import time
import types
import warnings
import weakref
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tests.soundness.harness import Seen, program
from tests.soundness.world import X

EFFECTS = "fourth: effects"


@program(EFFECTS)
def a_running_statistic_is_kept_by_hand():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(3))
            self.register_buffer("seen", torch.tensor(0))

        def forward(self, x):
            if self.training:
                self.seen += 1
                with torch.no_grad():
                    self.mean.lerp_(x.mean(0), 1 / float(self.seen))
            return x - self.mean

    model = Normed()
    x = torch.arange(6.0).view(2, 3)
    for i in range(4):
        yield (model, x) if i == 0 else x + i
        yield Seen(state=model.state_dict())
    model.eval()
    yield x * 5
    yield Seen(state=model.state_dict())


@program(EFFECTS)
def a_buffer_is_registered_at_the_first_forward():
    class Positions(nn.Module):
        def forward(self, x):
            if not hasattr(self, "table"):
                self.register_buffer("table", torch.linspace(0, 1, x.shape[-1]))
            return x + self.table

    model = Positions()
    yield model, X()
    yield Seen(names=sorted(model.state_dict()), table=model.table)
    model.table.mul_(2)
    yield X()
    del model.table
    yield torch.ones(6)
    yield Seen(names=sorted(model.state_dict()), table=model.table)


@program(EFFECTS)
def a_parameter_is_made_lazily():
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = None

        def forward(self, x):
            if self.weight is None:
                self.weight = nn.Parameter(torch.full((x.shape[-1],), 0.5))
            return (x * self.weight).sum()

    model = Lazy()
    loss = yield model, X()
    loss.backward()
    yield Seen(weight=model.weight, names=[n for n, _ in model.named_parameters()])
    loss = yield X(2.0)
    loss.backward()
    yield Seen(weight=model.weight)
    model.weight.grad = None
    loss = yield X()
    loss.backward()
    yield Seen(weight=model.weight)


@program(EFFECTS)
def a_recorder_appends_activations_through_hooks():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    store = collections.defaultdict(list)
    handles = [
        layer.register_forward_hook(lambda m, a, out, name=name: store[name].append(out.detach().mean().clone()))
        for name, layer in model.named_children()
    ]
    yield model, X()
    yield Seen(store=dict(store))
    yield X(1.0)
    yield Seen(store=dict(store))
    handles[1].remove()
    yield X(2.0)
    yield Seen(store=dict(store))
    store.clear()
    yield X(2.0)
    yield Seen(store=dict(store))


@program(EFFECTS)
def an_observer_keeps_minimum_and_maximum():
    class Observer(nn.Module):
        def __init__(self):
            super().__init__()
            self.low, self.high = float("inf"), float("-inf")
            self.enabled = True

        def forward(self, x):
            if self.enabled:
                self.low = min(self.low, x.min().item())
                self.high = max(self.high, x.max().item())
            scale = (self.high - self.low) / 255
            return torch.round((x - self.low) / scale) * scale + self.low

    model = Observer()
    yield model, X()
    for x in (X(3.0), X(-9.0), X()):
        yield x
        yield Seen(low=model.low, high=model.high)
    model.enabled = False
    yield X(20.0)
    yield Seen(low=model.low, high=model.high)


@program(EFFECTS)
def a_counter_of_python_sets_the_rate():
    class Warm(nn.Module):
        def __init__(self):
            super().__init__()
            self.step = 0

        def forward(self, x):
            self.step += 1
            rate = min(1.0, self.step / 4)
            return x * rate

    model = Warm()
    yield model, X()
    for _ in range(5):
        yield X()
        yield Seen(step=model.step)
    model.step = 0
    yield X()


@program(EFFECTS)
def counts_per_shape_in_a_counter():
    counts = collections.Counter()

    def f(x):
        counts[tuple(x.shape)] += 1
        return x * counts[tuple(x.shape)]

    yield f, X()
    for n in (4, 2, 4, 2, 2, 5):
        yield torch.ones(n)
        yield Seen(counts=dict(counts))


@program(EFFECTS)
def a_list_argument_grows_and_is_read_back():
    def f(x, history):
        history.append(x.mean())
        if len(history) > 2:
            history.pop(0)
        return torch.stack(history).sum()

    history = []
    yield f, X(), history
    for i in range(4):
        yield X(float(i)), history
        yield Seen(history=history)
    other = [torch.tensor(100.0)]
    yield X(), other
    yield Seen(history=history, other=other)


@program(EFFECTS)
def metrics_are_put_into_a_dict_of_the_caller():
    def f(batch, metrics):
        loss = (batch["x"] ** 2).mean()
        metrics["loss"] = loss.detach()
        metrics.setdefault("count", 0)
        metrics["count"] += len(batch["x"])
        metrics.update(top=batch["x"].max())
        return loss

    metrics = {}
    yield f, {"x": X()}, metrics
    yield Seen(metrics=metrics)
    yield {"x": torch.ones(7)}, metrics
    yield Seen(metrics=metrics)
    metrics.pop("count")
    yield {"x": torch.ones(7)}, metrics
    yield Seen(metrics=metrics)


@program(EFFECTS)
def keys_of_a_set_are_discarded_in_the_call():
    names = {"a", "b", "c"}

    def f(x, drop):
        names.discard(drop)
        return x * len(names)

    yield f, X(), "a"
    yield Seen(names=names)
    yield X(), "a"
    yield X(), "z"
    names.add("q")
    yield X(), "b"
    yield Seen(names=names)


@program(EFFECTS)
def prints_the_loss_every_other_call():
    class Trainer:
        def __init__(self):
            self.calls = 0

        def __call__(self, x):
            loss = x.square().sum()
            if self.calls % 2 == 0:
                print(f"step {self.calls}: {loss.item():.2f}")
            self.calls += 1
            return loss

    trainer = Trainer()
    yield trainer, X()
    for i in range(4):
        yield X(float(i))
    yield Seen(calls=trainer.calls)


@program(EFFECTS)
def what_is_printed_goes_to_a_buffer_of_the_caller():
    sink = io.StringIO()

    def f(x):
        print("sum", float(x.sum()), file=sink)
        return x + 1

    yield f, X()
    yield X(1.0)
    yield Seen(text=sink.getvalue())


@program(EFFECTS)
def a_handler_collects_log_records():
    log = logging.getLogger("fourth.effects")
    log.setLevel(logging.INFO)
    log.propagate = False
    records = []

    class Collects(logging.Handler):
        def emit(self, record):
            records.append(record.getMessage())

    log.handlers[:] = [Collects()]
    seen = []

    def f(x):
        seen.append(x.shape[0])
        return x * 2

    yield f, X()
    log.info("between %d", len(seen))
    yield X()
    yield Seen(records=records, seen=seen)


@program(EFFECTS)
def augmentation_draws_from_the_random_module():
    random.seed(7)

    def f(x):
        if random.random() < 0.5:
            x = x.flip(0)
        return x + random.randint(0, 3)

    yield f, X()
    for _ in range(5):
        yield X()
    yield Seen(then=random.random())


@program(EFFECTS)
def a_generator_of_numpy_belongs_to_the_module():
    class Jitter(nn.Module):
        def __init__(self):
            super().__init__()
            self.rng = np.random.default_rng(0)

        def forward(self, x):
            return x * float(self.rng.uniform(0.5, 1.5))

    model = Jitter()
    yield model, X()
    for _ in range(3):
        yield X()
    yield Seen(then=float(model.rng.uniform()))


@program(EFFECTS)
def numpy_shuffles_an_index_of_the_caller():
    np.random.seed(3)
    order = np.arange(4)

    def f(x):
        np.random.shuffle(order)
        return x[torch.tensor(order.tolist())]

    yield f, X()
    for _ in range(3):
        yield X()
        yield Seen(order=order.tolist())


@program(EFFECTS)
def the_seed_is_set_in_the_call():
    def f(x, seed):
        torch.manual_seed(seed)
        return x + torch.rand(4)

    yield f, X(), 1
    yield X(), 2
    yield X(), 1
    yield Seen(then=torch.rand(2))


@program(EFFECTS)
def the_state_of_the_generator_is_kept_around_a_part():
    def f(x):
        with torch.random.fork_rng():
            torch.manual_seed(5)
            noise = torch.randn(4)
        return x + noise + torch.randn(4)

    yield f, X()
    yield X()
    yield Seen(then=torch.randn(2))


@program(EFFECTS)
def a_generator_object_of_torch_is_reseeded_between_calls():
    g = torch.Generator().manual_seed(1)

    def f(x):
        return x + torch.rand(4, generator=g)

    yield f, X()
    yield X()
    g.manual_seed(1)
    yield X()
    yield Seen(state=g.get_state())


@program(EFFECTS)
def the_clock_decides_nothing_but_is_kept():
    class Timed(nn.Module):
        def __init__(self):
            super().__init__()
            self.times = []

        def forward(self, x):
            start = time.perf_counter()
            y = x * 2
            self.times.append(time.perf_counter() - start)
            return y

    model = Timed()
    yield model, X()
    yield X(1.0)
    yield X(2.0)
    yield Seen(n=len(model.times), distinct=len(set(model.times)) == 3)


@program(EFFECTS)
def an_environment_variable_is_read():
    os.environ["FOURTH_SCALE"] = "2"

    def f(x):
        return x * float(os.environ.get("FOURTH_SCALE", "1"))

    yield f, X()
    os.environ["FOURTH_SCALE"] = "3"
    yield X()
    del os.environ["FOURTH_SCALE"]
    yield X()


@program(EFFECTS)
def a_file_is_appended_to():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.txt"

        def f(x):
            with open(path, "a") as out:
                out.write(f"{x.shape[0]}\n")
            return x + 1

        yield f, X()
        yield X()
        yield torch.ones(2)
        yield Seen(text=path.read_text())


@program(EFFECTS)
def a_nonlocal_moving_average():
    def make():
        average = torch.zeros(4)
        calls = 0

        def f(x):
            nonlocal average, calls
            calls += 1
            average = 0.9 * average + 0.1 * x
            return average / (1 - 0.9**calls)

        return f

    f = make()
    yield f, X()
    for i in range(3):
        yield X(float(i))
    yield Seen(cells=[c.cell_contents for c in f.__closure__ if not callable(c.cell_contents)])


TOTAL = 0


@program(EFFECTS)
def a_global_is_written_and_read_by_a_helper():
    global TOTAL
    TOTAL = 0

    def helper():
        return TOTAL * 10

    def f(x):
        global TOTAL
        TOTAL += x.shape[0]
        return x + helper()

    yield f, X()
    yield Seen(total=TOTAL)
    yield torch.ones(2)
    TOTAL = -1
    yield X()
    yield Seen(total=TOTAL)


@program(EFFECTS)
def an_iterator_is_consumed_across_calls():
    scales = iter([1.0, 2.0, 3.0])

    def f(x):
        return x * next(scales)

    yield f, X()
    yield X()
    yield X()
    yield X()  # StopIteration


@program(EFFECTS)
def a_cycle_of_layers_goes_round():
    layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
    turn = itertools.cycle(layers)

    def f(x):
        return next(turn)(x)

    yield f, X()
    yield X()
    yield X()
    yield Seen(same=next(turn) is layers[1])


@program(EFFECTS)
def a_count_of_itertools_names_the_results():
    ids = itertools.count(10)

    def f(x):
        return {f"out{next(ids)}": x + 1}

    yield f, X()
    yield X()
    yield X()
    yield Seen(n=next(ids))


@program(EFFECTS)
def a_generator_that_holds_a_tensor_is_sent_values():
    def averager():
        total, n = torch.zeros(4), 0
        value = yield total
        while True:
            total, n = total + value, n + 1
            value = yield total / n

    running = averager()
    next(running)

    def f(x):
        return running.send(x) + 1

    yield f, X()
    yield X(2.0)
    yield X(4.0)


@program(EFFECTS)
def a_memo_by_decorator_of_the_user():
    def memoize(f):
        cache = {}

        @functools.wraps(f)
        def inner(n):
            if n not in cache:
                cache[n] = f(n)
            return cache[n]

        inner.cache = cache
        return inner

    made = []

    @memoize
    def mask(n):
        made.append(n)
        return torch.ones(n, n).tril()

    def f(x):
        return mask(x.shape[0]) @ x

    yield f, torch.ones(3, 2)
    yield Seen(made=made, kept=mask.cache)
    for n in (3, 5, 3, 5, 4):
        yield torch.ones(n, 2)
        yield Seen(made=made, kept=mask.cache)
    mask.cache.clear()
    yield torch.ones(3, 2)
    yield Seen(made=made)


@program(EFFECTS)
def a_cached_property_is_computed_once():
    class Config:
        def __init__(self, n):
            self.n = n
            self.computed = 0

        @functools.cached_property
        def table(self):
            self.computed += 1
            return torch.arange(float(self.n))

    config = Config(4)

    def f(x):
        return x + config.table

    yield f, X()
    yield X()
    yield Seen(computed=config.computed, names=sorted(vars(config)))
    del config.table
    config.n = 1
    yield X()
    yield Seen(computed=config.computed)


@program(EFFECTS)
def a_weak_reference_dies():
    class Owner:
        scale = 3.0

    owner = Owner()
    ref = weakref.ref(owner)

    def f(x):
        held = ref()
        return x if held is None else x * held.scale

    yield f, X()
    owner.scale = 4.0
    yield X()
    del owner
    yield X()


@program(EFFECTS)
def callbacks_are_added_between_calls():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.callbacks = []
            self.lin = nn.Linear(4, 4)

        def forward(self, x):
            y = self.lin(x)
            for callback in self.callbacks:
                y = callback(self, y)
            return y

    model = Model()
    seen = []
    yield model, X()
    model.callbacks.append(lambda m, y: y * 2)
    yield X()
    model.callbacks.insert(0, lambda m, y: seen.append(y.shape) or y + 1)
    yield X()
    yield X()
    yield Seen(seen=[tuple(s) for s in seen])
    model.callbacks.clear()
    yield X()


@program(EFFECTS)
def a_warning_is_given_once_by_a_flag():
    class Old(nn.Module):
        warned = False

        def forward(self, x):
            if not Old.warned:
                warnings.warn("deprecated", DeprecationWarning, stacklevel=1)
                Old.warned = True
            return x + 1

    model = Old()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield model, X()
        yield X()
        yield Seen(warned=Old.warned)
        Old.warned = False
        yield X()
        yield Seen(warned=Old.warned)


@program(EFFECTS)
def a_timer_as_a_context_manager_counts():
    class Timer:
        totals: dict = {}

        def __init__(self, name):
            self.name = name

        def __enter__(self):
            return self

        def __exit__(self, *error):
            Timer.totals[self.name] = Timer.totals.get(self.name, 0) + 1

    Timer.totals.clear()

    def f(x):
        with Timer("outer"):
            y = x + 1
            with Timer("inner"):
                y = y * 2
        return y

    yield f, X()
    yield X()
    yield X(3.0)
    yield Seen(totals=Timer.totals)


@program(EFFECTS)
def the_profilers_range_is_plain():
    def f(x):
        with torch.profiler.record_function("forward"):
            y = x.sin()
        return y + 1

    yield f, X()
    yield X(1.0)


@program(EFFECTS)
def an_exponential_average_of_the_weights():
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 4)
            self.shadow = {n: p.detach().clone() for n, p in self.lin.named_parameters()}

        @torch.no_grad()
        def update(self):
            for n, p in self.lin.named_parameters():
                self.shadow[n].mul_(0.5).add_(p, alpha=0.5)

        def forward(self, x):
            if self.training:
                self.update()
            return self.lin(x)

    model = Mean()
    yield model, X()
    with torch.no_grad():
        model.lin.weight.mul_(3)
    y = yield X()
    y.sum().backward()
    yield Seen(shadow=model.shadow, grad=model.lin.weight.grad)
    model.shadow["bias"] = torch.zeros(4)
    yield X()
    yield Seen(shadow=model.shadow)


@program(EFFECTS)
def two_names_of_one_list_are_written():
    config = types.SimpleNamespace(log=[])
    alias = config.log

    def f(x):
        config.log.append(x.sum())
        alias.append(2 * x.sum())
        return x + len(config.log)

    yield f, X()
    yield X()
    yield Seen(log=config.log, same=config.log is alias)
    config.log = []
    yield X()
    yield Seen(log=config.log, alias=alias)


@program(EFFECTS)
def a_slice_of_a_list_is_replaced():
    window = [torch.zeros(()) for _ in range(3)]

    def f(x):
        window[:-1] = window[1:]
        window[-1] = x.sum()
        return sum(window)

    yield f, X()
    for i in range(4):
        yield X(float(i))
        yield Seen(window=window)


@program(EFFECTS)
def an_exit_stack_calls_back():
    done = []

    def f(x, names):
        with contextlib.ExitStack() as stack:
            for name in names:
                stack.callback(done.append, name)
            y = x * len(done)
        return y + len(done)

    yield f, X(), ("a", "b")
    yield X(), ("a", "b")
    yield X(), ("c",)
    yield Seen(done=done)


@program(EFFECTS)
def a_lock_guards_a_counter():
    lock = threading.Lock()
    state = {"n": 0}

    def f(x):
        with lock:
            state["n"] += 1
            n = state["n"]
        return x + n

    yield f, X()
    yield X()
    yield X()
    yield Seen(state=state, free=lock.acquire(blocking=False))


@program(EFFECTS)
def a_descriptor_counts_its_reads():
    class Counted:
        def __set_name__(self, owner, name):
            self.name = "_" + name

        def __get__(self, obj, owner=None):
            obj.reads = getattr(obj, "reads", 0) + 1
            return getattr(obj, self.name)

        def __set__(self, obj, value):
            obj.writes = getattr(obj, "writes", 0) + 1
            setattr(obj, self.name, value)

    class Config:
        scale = Counted()

    config = Config()
    config.scale = 2.0

    def f(x):
        config.scale = config.scale + 1
        return x * config.scale

    yield f, X()
    yield X()
    yield Seen(reads=config.reads, writes=config.writes, scale=config._scale)
    config.scale = 0.5
    yield X()
    yield Seen(reads=config.reads, writes=config.writes, scale=config._scale)
