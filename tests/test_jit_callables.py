"""Every kind of callable that ``thunder.jit`` takes, and every way to write it."""

from __future__ import annotations

import functools

import pytest
import torch

import thunder
from tests.jit_checks import (  # noqa: F401
    assert_call_same,
    assert_same,
    assert_served,
    check,
    no_grad,
    nothing_leaks,
)


def x(n: int = 3) -> torch.Tensor:
    return torch.arange(n, dtype=torch.float32) - 1


# ---- kinds ----


def test_lambda():
    check(lambda a: a * 2, x())


def test_function_that_calls_functions():
    def inner(a, k):
        return a * k

    def middle(a):
        return inner(a, k=3) + inner(a, 2)

    check(lambda a: middle(a) - 1, x())


def test_closure_over_a_number():
    def make(scale):
        def f(a):
            return a * scale

        return f

    check(make(2.5), x())
    check(make(-1), x())


def test_closure_over_a_tensor_sees_its_writes():
    w = x()
    f = lambda a: a + w  # noqa: E731
    compiled = thunder.jit(f)
    assert_same(f(x()), compiled(x()))
    w.mul_(5)
    assert_same(f(x()), compiled(x()))


def test_recursive_function():
    def power(a, n):
        return a if n == 1 else a * power(a, n - 1)

    check(power, x(), 5)


def test_partial():
    def f(a, b, c=1.0):
        return a * b + c

    check(functools.partial(f, b=3.0), x())
    check(functools.partial(f, c=4.0), x(), 2)
    check(functools.partial(f, x()), 2)


def test_partial_of_a_module():
    net = torch.nn.Bilinear(3, 3, 2)
    check(functools.partial(net, torch.ones(4, 3)), torch.ones(4, 3) * 2)


def test_callable_object():
    class Scale:
        def __init__(self, by):
            self.by = by

        def __call__(self, a):
            return a * self.by

    check(Scale(3), x())


def test_callable_object_whose_attribute_changes():
    class Scale:
        def __init__(self, by):
            self.by = by

        def __call__(self, a):
            return a * self.by

    f = Scale(3)
    compiled = thunder.jit(f)
    assert_same(f(x()), compiled(x()))
    f.by = 4
    assert_same(f(x()), compiled(x()))


class Counter:
    factor = 2

    def __init__(self):
        self.by = 3

    def method(self, a):
        return a * self.by

    @classmethod
    def of_class(cls, a):
        return a * cls.factor

    @staticmethod
    def static(a):
        return a * 5


def test_bound_method():
    check(Counter().method, x())


def test_class_method():
    check(Counter.of_class, x())
    check(Counter().of_class, x())


def test_static_method():
    check(Counter.static, x())


def test_unbound_method_with_the_object_as_an_argument():
    check(Counter.method, Counter(), x())


def test_bound_method_of_a_module_sees_its_parameters():
    class Net(torch.nn.Linear):
        def other(self, a):
            return self(a) * 2 + self.bias

    net = Net(3, 2)
    compiled = thunder.jit(net.other)
    assert_same(net.other(torch.ones(4, 3)), compiled(torch.ones(4, 3)))
    net.weight = torch.nn.Parameter(net.weight * 3)
    assert_same(net.other(torch.ones(4, 3)), compiled(torch.ones(4, 3)))


def test_builtin_torch_functions():
    check(torch.add, x(), x())
    check(torch.nn.functional.gelu, x())
    check(torch.Tensor.sin, x())
    check(torch.ops.aten.mul.Tensor, x(), x())


def test_scripted_function():
    @torch.jit.script
    def f(a, b: float):
        return torch.relu(a) * b

    check(f, x(), 2.0)


def test_wrapped_function():
    def twice(fn):
        @functools.wraps(fn)
        def wrapper(*args, **kwargs):
            return fn(*args, **kwargs) * 2

        return wrapper

    @twice
    def f(a, *, b=1):
        return a + b

    check(f, x())
    check(f, x(), b=4)


def test_function_under_no_grad_decorator():
    @torch.no_grad()
    def f(a):
        return a * 2

    check(f, x())


def test_lru_cached_helper():
    @functools.lru_cache
    def shape_of(n):
        return (n, 1)

    check(lambda a: a.reshape(shape_of(3)), x())


def test_local_function_with_nonlocal_tensor():
    def f(a):
        total = a

        def add(b):
            nonlocal total
            total = total + b

        for i in range(3):
            add(a * i)
        return total

    check(f, x())


# ---- ways to write it ----


def test_decorator_without_arguments():
    @thunder.jit
    def f(a):
        """Adds one."""
        return a + 1

    assert f.__name__ == "f"
    assert f.__doc__ == "Adds one."
    assert f.__wrapped__(x()).equal(f(x()))
    assert_served(f, misses=1, hits=0)


def test_decorator_with_arguments():
    @thunder.jit(cache="no caching")
    def f(a):
        return a + 1

    assert torch.equal(f(x()), x() + 1)
    assert thunder.cache_option(f) == "no caching"


def test_decorated_method_in_a_class_body():
    class Net:
        def __init__(self, by):
            self.by = by

        @thunder.jit
        def run(self, a, b=1.0):
            return a * self.by + b

    first, second = Net(2.0), Net(3.0)
    for _ in range(2):
        assert torch.equal(first.run(x()), x() * 2 + 1)
        assert torch.equal(second.run(x(), b=0.0), x() * 3)
        assert torch.equal(Net.run(first, x()), x() * 2 + 1)


def test_decorated_method_of_an_object_with_tensors():
    class Net:
        def __init__(self, w):
            self.w = w

        @thunder.jit
        def run(self, a):
            return a * self.w

    one, two = Net(x() + 1), Net(x() + 5)
    for _ in range(2):
        assert torch.equal(one.run(x()), x() * one.w)
        assert torch.equal(two.run(x()), x() * two.w)
    one.w = x() * 7
    assert torch.equal(one.run(x()), x() * one.w)


def test_decorated_static_and_class_methods():
    class Net:
        factor = 3

        @staticmethod
        @thunder.jit
        def static(a):
            return a * 2

        @classmethod
        @thunder.jit
        def of_class(cls, a):
            return a * cls.factor

    for _ in range(2):
        assert torch.equal(Net.static(x()), x() * 2)
        assert torch.equal(Net().static(x()), x() * 2)
        assert torch.equal(Net.of_class(x()), x() * 3)


def test_decorated_forward_of_a_module():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(x(), requires_grad=False)

        @thunder.jit
        def forward(self, a):
            return a * self.weight

    net = Net()
    for _ in range(2):
        assert torch.equal(net(x()), x() * net.weight)
    net.weight = torch.nn.Parameter(x() + 4, requires_grad=False)
    assert torch.equal(net(x()), x() * net.weight)


def test_two_compilations_of_one_function_are_independent():
    def f(a):
        return a + 1

    one, two = thunder.jit(f), thunder.jit(f)
    one(x())
    assert_served(one, misses=1, hits=0)
    assert_served(two, misses=0, hits=0)


def test_compiled_function_inside_compiled_function():
    @thunder.jit
    def inner(a):
        return a * 3

    check(lambda a: inner(a) + 1, x())
    assert torch.equal(inner(x()), x() * 3)


def test_compiled_module_inside_compiled_function():
    net = torch.nn.Linear(3, 2)
    inner = thunder.jit(net)
    check(lambda a: inner(a) + 1, torch.ones(4, 3))


def test_compiled_function_that_calls_itself():
    @thunder.jit
    def power(a, n):
        return a if n == 1 else a * power(a, n - 1)

    for n in (1, 4, 2, 4):
        assert torch.equal(power(x(), n), x() ** n)


def test_compiled_function_called_from_eager_recursion():
    @thunder.jit
    def step(a):
        return a * 2

    def walk(a, n):
        return a if n == 0 else walk(step(a), n - 1)

    assert torch.equal(walk(x(), 10), x() * 1024)
    assert_served(step, misses=1, hits=9)


def test_compiled_function_called_inside_a_custom_function_of_another():
    inner = thunder.jit(lambda a: a.sin())

    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a):
            return inner(a) * 2

        @staticmethod
        def backward(ctx, g):
            return g

    check(lambda a: Op.apply(a) + 1, x())


def test_global_number_that_changes_gives_the_present_value():
    scope = {"scale": 2.0}
    exec("def f(a):\n    return a * scale\n", scope)
    compiled = thunder.jit(scope["f"])
    assert torch.equal(compiled(x()), x() * 2)
    scope["scale"] = 3.0
    assert torch.equal(compiled(x()), x() * 3)


def test_closure_number_that_changes_gives_the_present_value():
    scale = 2.0

    def f(a):
        return a * scale

    compiled = thunder.jit(f)
    assert torch.equal(compiled(x()), x() * 2)
    scale = 3.0
    assert torch.equal(compiled(x()), x() * 3)


def test_module_in_a_closure_that_changes_mode_gives_the_present_result():
    net = torch.nn.Dropout(0.5).train()
    f = lambda a: net(a)  # noqa: E731
    compiled = thunder.jit(f)
    assert_call_same(compiled, f, x(50))
    net.eval()
    assert_call_same(compiled, f, x(50))


def test_module_in_a_closure_whose_parameter_is_replaced_gives_the_present_result():
    net = torch.nn.Linear(3, 2)
    f = lambda a: net(a)  # noqa: E731
    compiled = thunder.jit(f)
    assert_call_same(compiled, f, torch.ones(4, 3))
    net.weight = torch.nn.Parameter(torch.ones(2, 3))
    assert_call_same(compiled, f, torch.ones(4, 3))


@pytest.mark.parametrize("wrong", [(1, 2, 3), ()])
def test_wrong_number_of_arguments_is_pythons_own_error(wrong):
    compiled = thunder.jit(lambda a, b: a + b)
    with pytest.raises(TypeError, match="positional argument"):
        compiled(*wrong)
    assert torch.equal(compiled(x(), x()), x() + x())
