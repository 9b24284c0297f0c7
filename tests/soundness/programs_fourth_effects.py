"""Programs of the fourth collection: effects that a call leaves behind, in objects, containers, generators and logs."""

from __future__ import annotations

import array
import collections
import contextlib
import functools
import heapq
import io
import itertools
import logging
import os
import random
import sys
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


CONTAINERS = "fourth: containers"


@program(CONTAINERS)
def a_heap_of_the_best_scores():
    heap = []

    def f(x, score):
        heapq.heappush(heap, (score, len(heap)))
        if len(heap) > 2:
            heapq.heappop(heap)
        return x * heap[0][0]

    yield f, X(), 0.5
    for s in (0.9, 0.1, 0.7, 0.7):
        yield X(), s
        yield Seen(heap=list(heap))


@program(CONTAINERS)
def the_least_recent_is_evicted():
    class Recent:
        def __init__(self, size):
            self.size, self.kept = size, collections.OrderedDict()

        def get(self, key, make):
            if key in self.kept:
                self.kept.move_to_end(key)
                return self.kept[key]
            if len(self.kept) >= self.size:
                self.kept.popitem(last=False)
            self.kept[key] = make()
            return self.kept[key]

    recent = Recent(2)

    def f(x):
        return x + recent.get(len(x), lambda: torch.arange(float(len(x))))

    yield f, torch.ones(2)
    for n in (3, 2, 4, 2, 3, 3):
        yield torch.ones(n)
        yield Seen(keys=list(recent.kept))


@program(CONTAINERS)
def a_ring_of_a_deque_is_averaged():
    ring = collections.deque(maxlen=3)

    def f(x):
        ring.append(x.mean())
        ring.rotate(1)
        return torch.stack(list(ring)).mean()

    yield f, X()
    for i in range(5):
        yield X(float(i))
        yield Seen(ring=list(ring))


@program(CONTAINERS)
def an_array_of_numpy_counts():
    counts = np.zeros(3)

    def f(x, i):
        counts[i] += 1
        return x * float(counts.sum())

    yield f, X(), 0
    yield X(), 1
    yield X(), 1
    yield Seen(counts=counts.tolist())
    counts[:] = 0
    yield X(), 2
    yield Seen(counts=counts.tolist())


@program(CONTAINERS)
def lists_are_sorted_deleted_and_doubled():
    items = [3, 1, 2]

    def f(x, what):
        if what == "sort":
            items.sort(reverse=True)
        elif what == "del":
            del items[0]
        elif what == "double":
            items.extend(items)
        elif what == "insert":
            items.insert(1, len(x))
        return x * items[0] + len(items)

    yield f, X(), "sort"
    for what in ("del", "double", "insert", "sort", "del", "none", "del"):
        yield X(), what
        yield Seen(items=items)


@program(CONTAINERS)
def a_bytearray_and_an_array_change():
    data, numbers = bytearray(b"abc"), array.array("d", [1.0, 2.0])

    def f(x):
        data[0] += 1
        numbers[1] *= 2
        return x * numbers[1] + data[0]

    yield f, X()
    yield X()
    yield Seen(data=bytes(data), numbers=list(numbers))
    data[0] = 0
    yield X()
    yield Seen(data=bytes(data), numbers=list(numbers))


@program(CONTAINERS)
def dicts_are_merged_and_emptied():
    config, defaults = {"a": 1.0}, {"a": 9.0, "b": 2.0}

    def f(x):
        nonlocal config
        merged = defaults | config
        config |= {"c": merged["a"] + len(config)}
        if len(config) > 2:
            config.popitem()
        return x * sum(merged.values())

    yield f, X()
    yield X()
    yield X()
    yield Seen(config=config)
    defaults["d"] = 1.0
    yield X()
    config.clear()
    yield X()
    yield Seen(config=config)


@program(CONTAINERS)
def the_result_is_a_list_that_the_caller_changes():
    shared = [1.0]

    def f(x):
        fresh = [x * 2, [1, 2]]
        return fresh, shared, (x, shared)

    fresh, kept, _ = yield f, X()
    fresh[1].append(3)
    fresh.append(None)
    kept.append(2.0)
    fresh, kept, pair = yield X()
    yield Seen(same=kept is shared, again=pair[1] is shared, length=len(fresh[1]))
    fresh[0].add_(100)
    yield X()


@program(CONTAINERS)
def constants_are_made_anew_at_each_call():
    def f(n):
        return torch.zeros(n), torch.arange(n), torch.eye(2)

    a = yield f, 3
    a[0].add_(1)
    a[1].add_(1)
    a[2].zero_()
    yield 3
    yield 4
    yield 3


@program(CONTAINERS)
def who_is_returned():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))
            self.register_buffer("b", torch.ones(4))

        def forward(self, x):
            self.b.add_(1)
            return x, x.view(-1), self.b, self.weight, self.weight.detach()

    def who(out):
        held = zip(out[:4], (x, x, model.b, model.weight), strict=True)
        return [a is b for a, b in held], out[1].data_ptr() == x.data_ptr()

    model = Holder()
    x = X()
    out = yield model, x
    yield Seen(who=who(out))
    out = yield x
    yield Seen(who=who(out))
    with torch.no_grad():
        out = yield x
        out[4].mul_(3)
        out[1].mul_(2)
    yield Seen(x=x, weight=model.weight)


@program(CONTAINERS)
def a_closure_is_returned():
    def f(x):
        y = x * 2
        return lambda z: y + z

    def g(x):
        add = f(x)
        return add, add(1.0)

    add, _ = yield g, X()
    yield Seen(value=add(10.0))
    add, _ = yield X(5.0)
    yield Seen(value=add(10.0))


@program(CONTAINERS)
def iterators_and_views_are_returned():
    def f(x):
        d = {"a": x + 1, "b": x * 2}
        return list(d.items()), d.keys(), range(len(x)), slice(0, len(x)), x.shape, x.dtype

    yield f, X()
    yield torch.ones(2)


@program(CONTAINERS)
def a_lazy_map_is_returned():
    def f(x):
        return map(x.mul, range(2))

    out = yield f, X()
    yield Seen(values=list(out))
    out = yield X(3.0)
    yield Seen(values=list(out))


@program(CONTAINERS)
def a_module_made_in_the_call_is_returned():
    def f(x):
        torch.manual_seed(len(x))
        lin = nn.Linear(4, 2)
        return lin, lin(x)

    lin, y = yield f, X()
    y.sum().backward()
    yield Seen(grad=lin.weight.grad)
    lin, y = yield X(1.0)
    y.sum().backward()
    yield Seen(grad=lin.weight.grad)


@program(CONTAINERS)
def a_distribution_is_made_and_sampled():
    def f(mean, scale):
        d = torch.distributions.Normal(mean, scale)
        z = d.rsample()
        return z, d.log_prob(z).sum(), torch.distributions.kl_divergence(d, torch.distributions.Normal(0.0, 1.0)).sum()

    yield f, X(), torch.ones(4)
    yield X(1.0), torch.ones(4) * 2
    yield X(1.0), -torch.ones(4)  # refused by its constraints
    m = X(grad=True)
    _, lp, kl = yield m, torch.ones(4)
    (lp + kl).backward()
    yield Seen(grad=m.grad, then=torch.rand(2))


@program(EFFECTS)
def a_frozen_dataclass_is_replaced():
    import dataclasses

    @dataclasses.dataclass(frozen=True)
    class State:
        step: int
        mean: torch.Tensor

    holder = types.SimpleNamespace(state=State(0, torch.zeros(4)))

    def f(x):
        s = holder.state
        holder.state = dataclasses.replace(s, step=s.step + 1, mean=s.mean + (x - s.mean) / (s.step + 1))
        return holder.state.mean * 1, hash(holder.state.step)

    yield f, X()
    for i in range(3):
        yield X(float(i))
        yield Seen(step=holder.state.step, mean=holder.state.mean)


@program(EFFECTS)
def slots_are_written():
    class Point:
        __slots__ = ("n", "x")

        def __init__(self):
            self.n, self.x = 0, None

    p = Point()

    def f(x):
        if p.x is not None:
            x = x + p.x
        p.x, p.n = x, p.n + 1
        return x * p.n

    yield f, X()
    yield X()
    yield X()
    yield Seen(n=p.n, x=p.x)
    p.x = None
    yield X()
    yield Seen(n=p.n, x=p.x)


@program(EFFECTS)
def an_overridden_setattr_counts():
    class Tracked:
        def __init__(self):
            object.__setattr__(self, "log", [])

        def __setattr__(self, name, value):
            self.log.append(name)
            object.__setattr__(self, name, value)

        def __getattr__(self, name):
            if name.startswith("_"):
                raise AttributeError(name)
            self.log.append("?" + name)
            return 1.0

    t = Tracked()

    def f(x):
        y = x * t.scale
        t.scale = t.scale + 1
        return y

    yield f, X()
    yield X()
    yield Seen(log=t.log, scale=t.scale)
    del t.scale
    yield X()
    yield Seen(log=t.log)


@program(EFFECTS)
def a_dict_that_fills_what_is_missing():
    class Table(dict):
        def __missing__(self, key):
            self[key] = torch.full((4,), float(len(self)))
            return self[key]

    table = Table()

    def f(x, key):
        return x + table[key]

    yield f, X(), "a"
    yield X(), "b"
    yield X(), "a"
    yield X(), "c"
    yield Seen(table=dict(table))
    del table["a"]
    yield X(), "a"
    yield Seen(table=dict(table))


@program(EFFECTS)
def a_finalizer_counts_what_died():
    died = []

    class Guard:
        def __init__(self, name):
            self.name = name

        def __del__(self):
            died.append(self.name)

    def f(x):
        guard = Guard(len(x))
        y = x * guard.name
        del guard
        return y + len(died)

    yield f, X()
    yield X()
    yield torch.ones(2)
    yield Seen(died=died)


@program(EFFECTS)
def thread_locals_hold_the_depth():
    local = threading.local()
    local.depth = 0

    def f(x):
        local.depth += 1
        try:
            if local.depth < 3:
                return f(x) * 2
            return x + local.depth
        finally:
            local.depth -= 1

    yield f, X()
    yield X()
    local.depth = 1
    yield X()
    yield Seen(depth=local.depth)


@program(EFFECTS)
def a_class_counts_its_instances():
    class Node:
        count = 0
        registry = []

        def __init__(self, value):
            type(self).count += 1
            self.index = Node.count
            Node.registry.append(self)
            self.value = value

    def f(x):
        a, b = Node(x), Node(x * 2)
        return a.value * a.index + b.value * b.index

    yield f, X()
    yield X()
    yield X()
    yield Seen(count=Node.count, values=[n.value for n in Node.registry], index=[n.index for n in Node.registry])


@program(EFFECTS)
def weights_are_clipped_in_the_forward():
    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 2)
            with torch.no_grad():
                self.lin.weight.mul_(10)

        def forward(self, x):
            for p in self.parameters():
                p.data.clamp_(-0.1, 0.1)
            return self.lin(x).sum()

    model = Critic()
    loss = yield model, X()
    loss.backward()
    yield Seen(grad=model.lin.weight.grad, weight=model.lin.weight)
    with torch.no_grad():
        model.lin.weight.add_(1)
    loss = yield X()
    loss.backward()
    yield Seen(grad=model.lin.weight.grad, weight=model.lin.weight)


@program(EFFECTS)
def two_buffers_swap_roles():
    class Swap(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("now", torch.zeros(4))
            self.register_buffer("old", torch.ones(4))

        def forward(self, x):
            self.now, self.old = self.old, self.now
            self.now.add_(x)
            return self.now - self.old

    model = Swap()
    first = model.now
    yield model, X()
    yield X()
    yield X()
    yield Seen(now=model.now, old=model.old, same=model.old is first)


@program(EFFECTS)
def spectral_norm_iterates_its_vectors():
    torch.manual_seed(0)
    model = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3))
    y = yield model, X()
    y.sum().backward()
    yield Seen(state=model.state_dict(), grad=model.parametrizations.weight.original.grad)
    yield X(1.0)
    yield Seen(state=model.state_dict())
    model.eval()
    yield X(1.0)
    yield Seen(state=model.state_dict())


@program(EFFECTS)
def an_optimizer_of_the_users_keeps_moments():
    class Adam:
        def __init__(self, params):
            self.params, self.state, self.t = list(params), {}, 0

        @torch.no_grad()
        def step(self, lr):
            self.t += 1
            for i, p in enumerate(self.params):
                if p.grad is None:
                    continue
                m, v = self.state.setdefault(i, (torch.zeros_like(p), torch.zeros_like(p)))
                m.mul_(0.9).add_(p.grad, alpha=0.1)
                v.mul_(0.99).addcmul_(p.grad, p.grad, value=0.01)
                p.addcdiv_(m / (1 - 0.9**self.t), (v / (1 - 0.99**self.t)).sqrt().add_(1e-8), value=-lr)
            return self.t

    params = [nn.Parameter(X()), nn.Parameter(X(1.0)), nn.Parameter(X(2.0))]
    optimizer = Adam(params)
    params[0].grad = X()
    yield optimizer.step, 0.1
    for i in range(4):
        params[i % 2].grad = X(float(i))
        yield (0.1 / (i + 1),)
        yield Seen(params=params, state=optimizer.state)
    params[0].grad = None
    yield (0.1,)
    yield Seen(params=params, t=optimizer.t)


@program(EFFECTS)
def standard_output_is_written_directly():
    def f(x):
        sys.stdout.write(f"{len(x)}\n")
        return x * 2

    yield f, X()
    yield X()


@program(EFFECTS)
def a_generator_of_its_own_of_random():
    rng = random.Random(5)

    def f(x):
        order = list(range(len(x)))
        rng.shuffle(order)
        return x[order], rng.choice([1.0, 2.0])

    yield f, X()
    yield X()
    yield torch.ones(2)
    yield Seen(then=rng.random())


@program(EFFECTS)
def noise_is_added_only_in_training_and_by_a_schedule():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.step, self.level = 0, 1.0

        def forward(self, x):
            if self.training and self.level > 0.2:
                x = x + torch.randn_like(x) * self.level
                self.level *= 0.5
            self.step += 1
            return x

    model = Noisy()
    yield model, X()
    for _ in range(4):
        yield X()
        yield Seen(step=model.step, level=model.level)
    model.eval()
    yield X()
    yield Seen(step=model.step, then=torch.rand(2))


@program(EFFECTS)
def many_values_go_past_the_limit_with_effects():
    log, counts = [], collections.Counter()

    def f(x):
        log.append(x.sum().item())
        counts["even" if log[-1] % 2 == 0 else "odd"] += 1
        return x * log[-1] + torch.rand(1)

    yield f, torch.ones(2)
    for i in range(20):
        yield torch.ones(2) * i
        yield Seen(log=log, counts=dict(counts))


@program(EFFECTS)
def many_shapes_with_a_counter_a_buffer_and_chance():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))
            self.sizes, self.steps = [], 0

        def forward(self, x):
            self.seen += x.shape[0]
            self.sizes.append(x.shape[0])
            self.steps += 1
            x = torch.dropout(x, 0.5, self.training)
            return x * self.steps + self.seen

    net = Net()
    yield net, torch.ones(2, 3)
    for n in (3, 4, 5, 1, 6, 0, 7, 3, 8, 9, 2, 10):
        yield torch.ones(n, 3)
        yield Seen(seen=net.seen, sizes=net.sizes, steps=net.steps, then=torch.rand(1))
