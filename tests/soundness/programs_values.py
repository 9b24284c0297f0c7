"""Arguments, tensor metadata and aliasing, writes and views, data dependence, randomness, modes, impurity."""

from __future__ import annotations

import contextlib
import math
import os
import random
import time

import torch
from torch import nn

from tests.soundness.harness import program


def X() -> torch.Tensor:
    return torch.arange(4.0) - 1.5


# ---- arguments ----


@program("arguments")
def float_zero_and_minus_zero():
    yield lambda x, s: torch.copysign(x, torch.tensor(s)), X(), 0.0
    yield X(), -0.0


@program("arguments")
def float_nan():
    yield lambda x, s: x * s, X(), float("nan")
    yield X(), 1.0
    yield X(), float("nan")


@program("arguments")
def int_and_bool_are_not_the_same():
    yield lambda x, s: x * s if isinstance(s, bool) else x - s, X(), 1
    yield X(), True
    yield X(), 1.0


@program("arguments")
def strings_and_none():
    yield lambda x, mode: x + 1 if mode == "up" else x - 1 if mode else x, X(), "up"
    yield X(), "down"
    yield X(), None


@program("arguments")
def nested_structures():
    yield lambda t: t["a"][0] * t["b"]["c"] + len(t["a"]), {"a": [X()], "b": {"c": 2.0}}
    yield {"a": [X(), X()], "b": {"c": 2.0}}
    yield {"a": [X()], "b": {"c": 3.0}}


@program("arguments")
def keyword_order():
    yield lambda d: next(iter(d)) == "a", {"a": 1, "b": 2}
    yield {"b": 2, "a": 1}


@program("arguments")
def slices_and_ellipsis():
    yield lambda x, s: x[s], X(), slice(0, 2)
    yield X(), slice(1, 3)


# ---- metadata and aliasing ----


@program("metadata")
def shape_changes():
    yield lambda x: x * x.shape[0], X()
    yield torch.ones(3)
    yield torch.ones(2, 2)


@program("metadata")
def dtype_changes():
    yield lambda x: x / 2, X()
    yield torch.arange(4)
    yield X().double()


@program("metadata")
def strides_change():
    yield lambda x: x.view(-1) if x.is_contiguous() else x.t().contiguous().view(-1), torch.arange(6.0).view(2, 3)
    yield torch.arange(6.0).view(3, 2).t()


@program("metadata")
def requires_grad_of_an_argument():
    yield lambda x: x * 2 if x.requires_grad else x * 3, X()
    yield X().requires_grad_()


@program("metadata")
def the_same_tensor_twice():
    def f(a, b):
        a.add_(1)
        return a * b

    yield f, X(), X()
    x = X()
    yield x, x


@program("metadata")
def overlapping_views_as_arguments():
    def f(a, b):
        a.mul_(2)
        return a + b

    yield f, X(), X()
    base = torch.arange(6.0)
    yield base[:4], base[2:]
    yield X(), X()


@program("metadata")
def an_argument_that_is_a_parameter():
    model = nn.Linear(4, 4)

    def f(w):
        with torch.no_grad():
            w.add_(1)
        return model(torch.ones(4))

    yield f, torch.zeros(4, 4)
    yield model.weight


@program("metadata")
def identity_of_arguments():
    x = X()
    yield lambda a, b: a + 1 if a is b else a - 1, x, x
    yield X(), X()


# ---- writes and views ----


@program("writes")
def write_to_an_argument():
    def f(x):
        x.add_(1)
        return x * 2

    x = X()
    yield f, x
    yield x
    yield x


@program("writes")
def write_through_a_view():
    def f(x):
        x[1:3].mul_(10)
        return x + 0

    x = X()
    yield f, x
    yield x


@program("writes")
def write_to_a_closed_over_tensor():
    state = torch.zeros(4)

    def f(x):
        state.add_(x)
        return state * 1

    yield f, X()
    yield X()
    yield X()


@program("writes")
def result_is_a_view_of_an_argument():
    x = X()
    out = yield lambda x: x[1:3], x
    out.fill_(7.0)
    yield x
    x.zero_()
    yield x


@program("writes")
def result_is_an_argument():
    x = X()
    out = yield lambda x: x, x
    yield out


@program("writes")
def write_then_branch_on_metadata():
    def f(x):
        y = x * 2
        y.resize_(2) if y.numel() > 100 else None
        y[0] = 5
        return y

    yield f, X()
    yield X()


@program("writes")
def out_argument():
    out = torch.empty(4)
    yield lambda x: torch.add(x, 1, out=out), X()
    yield X() * 2


@program("writes")
def cache_list_of_tensors_grows():
    cache = []

    def f(x):
        cache.append(x * 2)
        return torch.cat(cache)

    yield f, X()
    yield X()
    yield X()


# ---- data dependence ----


@program("data")
def branch_on_a_sum():
    yield lambda x: x + 1 if x.sum() > 0 else x - 1, X()
    yield -X() + 5
    yield -X() - 5


@program("data")
def loop_until_a_value():
    def f(x):
        while x.abs().max() < 10:
            x = x * 2
        return x

    yield f, X()
    yield X() * 100


@program("data")
def item_as_a_factor():
    yield lambda x: x * x.max().item(), X()
    yield X() + 3


@program("data")
def boolean_mask():
    yield lambda x: x[x > 0], X()
    yield X() + 3
    yield X() - 30


@program("data")
def nonzero_and_where():
    yield lambda x: (x.nonzero(), torch.where(x > 0)), X()
    yield X() + 3


@program("data")
def unique_values():
    yield lambda x: torch.unique(x.round()), X()
    yield torch.zeros(4)


@program("data")
def to_list():
    yield lambda x: x + len([v for v in x.tolist() if v > 0]), X()
    yield X() + 3


@program("data")
def int_of_a_tensor_as_a_size():
    yield lambda x, n: x[: int(n)] * 2, X(), torch.tensor(2)
    yield X(), torch.tensor(3)


@program("data")
def experts_chosen_by_value():
    experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def f(x):
        return experts[int(x.argmax()) % 3](x)

    yield f, X()
    yield X().flip(0)


@program("data")
def python_max_of_tensors():
    yield lambda x: max(x[0], x[1], key=lambda t: t.item()), X()
    yield X().flip(0)


@program("data")
def assert_on_a_value():
    def f(x):
        assert x.sum() < 100
        return x + 1

    yield f, X()
    yield X() + 1000


@program("data")
def formatted_value():
    yield lambda x: f"{x.sum().item():.2f}", X()
    yield X() + 1


# ---- randomness ----


@program("random")
def dropout_masks():
    yield lambda x: torch.dropout(x, 0.5, True), torch.ones(20)
    yield torch.ones(20)


@program("random")
def randn_like_and_seed():
    def f(x):
        torch.manual_seed(3)
        return x + torch.randn_like(x)

    yield f, X()
    yield X()


@program("random")
def numbers_of_pythons_random():
    random.seed(0)
    yield lambda x: x * random.random(), X()
    yield X()
    yield X()


@program("random")
def numbers_of_numpys_random():
    import numpy as np

    np.random.seed(0)
    yield lambda x: x * float(np.random.rand()), X()
    yield X()


@program("random")
def layers_dropped_at_random():
    layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def f(x):
        for layer in layers:
            if torch.rand(()) > 0.5:
                x = layer(x)
        return x

    yield f, X()
    yield X()
    yield X()


@program("random")
def shuffled_by_pythons_random():
    random.seed(1)

    def f(x):
        order = [0, 1, 2, 3]
        random.shuffle(order)
        return x[order]

    yield f, X()
    yield X()


# ---- modes ----


@program("modes")
def no_grad_around_the_call():
    w = torch.ones(4, requires_grad=True)
    f = torch.no_grad()(lambda x: x * w)
    yield lambda x: x * w, X()
    yield X()
    del f


@program("modes")
def autocast_inside():
    w = torch.eye(4)

    def f(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x.view(1, 4) @ w

    yield f, X()
    yield X()


@program("modes")
def grad_mode_is_asked():
    yield lambda x: x + 1 if torch.is_grad_enabled() else x - 1, X()
    with torch.no_grad():
        yield X()
    yield X()


@program("modes")
def default_dtype_changes():
    try:
        yield lambda x: x + torch.ones(4), X()
        torch.set_default_dtype(torch.float64)
        yield X()
    finally:
        torch.set_default_dtype(torch.float32)


@program("modes")
def detect_the_training_flag():
    model = nn.Dropout(0.5)
    yield lambda x: model(x) if model.training else x, X()
    model.eval()
    yield X()


# ---- impurity ----


@program("impurity")
def prints():
    def f(x):
        print("called", x.shape[0])
        return x + 1

    yield f, X()
    yield X()
    yield X()


@program("impurity")
def prints_a_value():
    def f(x):
        print(float(x.sum()))
        return x + 1

    yield f, X()
    yield X() + 1


@program("impurity")
def prints_in_a_submodule():
    class Loud(nn.Module):
        def forward(self, x):
            print("inner")
            return x * 2

    yield nn.Sequential(nn.ReLU(), Loud()), X()
    yield X()


@program("impurity")
def reads_the_environment():
    os.environ["THUNDER_SOUNDNESS"] = "2"
    yield lambda x: x * float(os.environ["THUNDER_SOUNDNESS"]), X()
    os.environ["THUNDER_SOUNDNESS"] = "3"
    yield X()
    del os.environ["THUNDER_SOUNDNESS"]


@program("impurity")
def reads_the_clock():
    start = time.perf_counter()

    def f(x):
        return x + (1 if time.perf_counter() - start > 3.0 else 0)

    yield f, X()
    time.sleep(3.2)
    yield X()


@program("impurity")
def reads_a_file(tmp="/tmp/thunder_soundness_file"):
    def write(text):
        with open(tmp, "w") as f:
            f.write(text)

    def f(x):
        with open(tmp) as file:
            return x * float(file.read())

    write("2")
    yield f, X()
    write("3")
    yield X()
    os.remove(tmp)


@program("impurity")
def iterator_that_moves_on():
    numbers = iter([1.0, 2.0, 3.0])
    yield lambda x: x * next(numbers), X()
    yield X()
    yield X()


@program("impurity")
def generator_that_moves_on():
    def count():
        n = 0
        while True:
            n += 1
            yield n

    counter = count()
    yield lambda x: x * next(counter), X()
    yield X()


@program("impurity")
def attribute_written_from_a_value():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = 0.0

        def forward(self, x):
            y = x + self.last
            self.last = float(x.sum())
            return y

    yield Net(), X()
    yield X() + 1
    yield X()


@program("impurity")
def global_written():
    box = {"n": 0}

    def f(x):
        box["n"] += 2
        return x * box["n"]

    yield f, X()
    yield X()


# ---- control flow and exceptions ----


@program("exceptions")
def caught_inside():
    def f(x):
        try:
            return x.view(99)
        except RuntimeError:
            return x * 2

    yield f, X()
    yield X() + 1


@program("exceptions")
def raised_by_a_branch():
    def f(x, flag):
        if flag:
            raise ValueError("flag")
        return x + 1

    yield f, X(), False
    yield X(), True
    yield X(), False


@program("exceptions")
def finally_runs():
    log = []

    def f(x):
        try:
            return x * 2
        finally:
            log.append(1)

    yield f, X()
    yield X()


@program("exceptions")
def suppressed_inside():
    def f(x):
        with contextlib.suppress(ZeroDivisionError):
            x = x * (1 / 0)
        return x + math.pi

    yield f, X()
    yield X()


@program("exceptions")
def recursion():
    def power(x, n):
        return x if n == 0 else power(x, n - 1) * 2

    yield lambda x: power(x, 5), X()
    yield X()


@program("exceptions")
def shape_error_then_success():
    model = nn.Linear(4, 2)
    yield model, torch.ones(3)
    yield torch.ones(4)


# ---- composition ----


@program("composition")
def compiled_inside_eager_module():
    import thunder

    inner = thunder.jit(nn.Linear(4, 4))
    yield lambda x: inner(x) + inner(x * 2), X()
    yield X() + 1


@program("composition")
def generator_functions_inside():
    def parts(x):
        for i in range(3):
            yield x * i

    yield lambda x: sum(parts(x)), X()
    yield X() + 1


class TenTimes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 20


ten_times = TenTimes.apply


@program("composition")
def autograd_function_bound_outside():
    x = X().requires_grad_()
    out = yield lambda x: ten_times(x) * 1, x
    yield torch.autograd.grad(out.sum(), x)[0]


@program("composition")
def vmap_inside():
    yield lambda x: torch.vmap(lambda t: t * 2 + 1)(x), X()
    yield X() + 1


@program("composition")
def grad_inside():
    yield lambda x: torch.func.grad(lambda t: (t**2).sum())(x), X()
    yield X() + 1


@program("composition")
def checkpoint_inside():
    from torch.utils.checkpoint import checkpoint

    model = nn.Linear(4, 4)
    yield lambda x: checkpoint(model, x, use_reentrant=False), X().requires_grad_()
    yield (X() + 1).requires_grad_()
