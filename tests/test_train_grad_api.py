"""torch.autograd.grad, second derivatives, torch.func around and inside, thunder.grad and thunder.value_and_grad."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import thunder
from tests.jit_checks import assert_same, nothing_leaks  # noqa: F401
from tests.train_checks import (
    Cube,
    assert_compiled,
    assert_gradients_same,
    assert_refused_clearly,
    assert_same_error,
    check_training,
    compare_runs,
    leaf,
    weighted_sum,
    weights_like,
    x,
)

pytestmark = pytest.mark.filterwarnings("ignore::thunder.ThunderWarning")


def mlp(out: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, out))


# ---- torch.autograd.grad ----


def test_grad_with_grad_outputs():
    def run(fn, call):
        a, b = leaf(), leaf()
        outs = fn(a, b)
        return torch.autograd.grad(outs, (a, b), [weights_like(o) + call for o in outs])

    assert_compiled(compare_runs(lambda a, b: (a * b, a.sin()), run))


def test_grad_with_allow_unused():
    def run(fn, call):
        a, b = leaf(), leaf()
        return [g is None for g in torch.autograd.grad(fn(a, b).sum(), (a, b), allow_unused=True)]

    assert_compiled(compare_runs(lambda a, b: a * a, run))


def test_grad_of_an_unused_input_raises_as_in_eager():
    f = lambda a, b: a * a  # noqa: E731
    compiled = thunder.jit(f)

    def attempt(fn):
        a, b = leaf(), leaf()
        torch.autograd.grad(fn(a, b).sum(), (a, b))

    for _ in range(2):
        assert_same_error(lambda: attempt(f), lambda: attempt(compiled), "not have been used")


def test_grad_with_materialize_grads():
    def run(fn, call):
        a, b = leaf(), leaf()
        return torch.autograd.grad(fn(a, b).sum(), (a, b), allow_unused=True, materialize_grads=True)

    assert_compiled(compare_runs(lambda a, b: a * a, run))


def test_two_backward_calls_with_retain_graph():
    def run(fn, call):
        a = leaf()
        out = fn(a).sum()
        out.backward(retain_graph=True)
        first = a.grad.clone()
        out.backward()
        return first, a.grad

    assert_compiled(compare_runs(lambda a: (a * a).exp(), run))


def test_second_backward_without_retain_graph_raises_as_in_eager():
    f = lambda a: (a * a).exp().sum()  # noqa: E731
    compiled = thunder.jit(f)

    def attempt(fn):
        out = fn(leaf())
        out.backward()
        out.backward()

    for _ in range(2):
        assert_same_error(lambda: attempt(f), lambda: attempt(compiled), "second time")
    assert_compiled(compiled)


def test_one_output_after_the_other_with_retain_graph():
    def run(fn, call):
        a = leaf()
        first, second = fn(a)
        return (
            torch.autograd.grad(first.sum(), a, retain_graph=True),
            torch.autograd.grad(second.sum(), a, retain_graph=True),
            torch.autograd.grad((first * second).sum(), a),
        )

    assert_compiled(compare_runs(lambda a: (a.exp(), a.sin() * a), run))


def test_outputs_of_separate_graphs_can_go_one_after_the_other_without_retain_graph():
    """Eager allows it, because nothing is shared; the issue accepts a clear error of a joint backward."""
    f = lambda a, b: (a.exp(), b.sin())  # noqa: E731
    compiled = thunder.jit(f)
    for _ in range(2):
        a, b = leaf(), leaf()
        first, second = compiled(a, b)
        first.sum().backward()
        try:
            second.sum().backward()
        except RuntimeError as error:
            assert "retain_graph" in str(error)
            continue
        assert_gradients_same([a.detach().exp(), b.detach().cos()], [a.grad, b.grad])


def test_backward_with_inputs_fills_only_those():
    def run(fn, call):
        a, b = leaf(), leaf()
        fn(a, b).sum().backward(inputs=[a])
        return a.grad, b.grad is None

    assert_compiled(compare_runs(lambda a, b: a * b, run))


def test_grad_of_an_intermediate_input():
    def run(fn, call):
        a = leaf()
        b = a * 2
        return torch.autograd.grad(fn(b).sum(), b)

    assert_compiled(compare_runs(lambda b: b.exp(), run))


def test_batched_gradients():
    def run(fn, call):
        a = leaf(3)
        out = fn(a)
        return torch.autograd.grad(out, a, torch.eye(3), is_grads_batched=True)

    compiled = thunder.jit(lambda a: a.exp() * a.sum())
    try:
        compare_runs(lambda a: a.exp() * a.sum(), run)
    except (RuntimeError, thunder.ThunderError) as error:
        assert_refused_clearly(error)
    del compiled


def test_jacobian_and_hessian_of_autograd_functional():
    f = lambda a: (a.exp() * a.sum()).sum()  # noqa: E731
    compiled = thunder.jit(f)
    a = x(3)
    assert_gradients_same(
        [torch.autograd.functional.jacobian(f, a), torch.autograd.functional.hessian(f, a)],
        [torch.autograd.functional.jacobian(compiled, a), torch.autograd.functional.hessian(compiled, a)],
    )
    assert_compiled(compiled, misses=None)


# ---- second derivatives ----


def test_double_backward():
    def run(fn, call):
        a = leaf()
        (g,) = torch.autograd.grad(fn(a).sum(), a, create_graph=True)
        return g, torch.autograd.grad((g * weights_like(g)).sum(), a)

    assert_compiled(compare_runs(lambda a: a**3 * a.sin(), run))


def test_third_derivative():
    def run(fn, call):
        a = leaf()
        (g,) = torch.autograd.grad(fn(a).sum(), a, create_graph=True)
        (gg,) = torch.autograd.grad(g.sum(), a, create_graph=True)
        return g, gg, torch.autograd.grad(gg.sum(), a)

    assert_compiled(compare_runs(lambda a: a**4 + a.sin(), run))


def test_gradient_penalty_trains_the_parameters():
    def run(module, call):
        module.zero_grad()
        a = (x() + call).requires_grad_()
        out = module(a)
        (g,) = torch.autograd.grad(out.sum(), a, create_graph=True)
        loss = out.mean() + (g.norm(dim=1) - 1).square().mean()
        loss.backward()
        return loss, [p.grad for p in parameters(module)]

    assert_compiled(compare_runs(mlp(), run))


def parameters(module):
    return list(module.parameters())


def test_gradient_penalty_over_training_steps():
    def run(module, call):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
        losses = []
        for step in range(4):
            optimizer.zero_grad()
            a = (x() + step).requires_grad_()
            (g,) = torch.autograd.grad(module(a).sum(), a, create_graph=True)
            loss = (g.square().sum(1) - 1).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss)
        return losses

    assert_compiled(compare_runs(mlp(), run, calls=1))


def test_hessian_vector_product():
    def run(fn, call):
        a, v = leaf(), x() + call
        (g,) = torch.autograd.grad(fn(a), a, create_graph=True)
        return torch.autograd.grad((g * v).sum(), a)

    assert_compiled(compare_runs(lambda a: (a**3).sum() * a.sin().sum(), run))


def test_hessian_vector_product_of_parameters():
    def run(module, call):
        loss = module(x() + call).square().mean()
        grads = torch.autograd.grad(loss, parameters(module), create_graph=True)
        return torch.autograd.grad(sum((g * weights_like(g)).sum() for g in grads), parameters(module))

    assert_compiled(compare_runs(mlp(), run))


def test_forces_trained_through_energies():
    class Energy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, positions):
            distances = (positions[:, None] - positions[None]).square().sum(-1, keepdim=True) + 0.1
            return self.net(distances.expand(-1, -1, 3)).sum()

    def run(module, call):
        module.zero_grad()
        positions = (x(4, 3) + call).requires_grad_()
        energy = module(positions)
        (forces,) = torch.autograd.grad(-energy, positions, create_graph=True)
        loss = F.mse_loss(forces, x(4, 3)) + energy.square()
        loss.backward()
        return energy, forces, loss, [p.grad if p.grad is not None else 0 for p in parameters(module)]

    assert_compiled(compare_runs(Energy(), run))


def test_create_graph_through_backward_call():
    def run(fn, call):
        a = leaf()
        fn(a).sum().backward(create_graph=True)
        g = a.grad
        a.grad = None
        (gg,) = torch.autograd.grad(g.sum(), a)
        return g.detach(), gg

    with pytest.warns(UserWarning, match="create_graph"):
        assert_compiled(compare_runs(lambda a: a**3, run))


def test_second_derivative_with_respect_to_the_incoming_gradient():
    def run(fn, call):
        a, v = leaf(), leaf()
        (g,) = torch.autograd.grad(fn(a), a, v, create_graph=True)
        return torch.autograd.grad(g.sum(), v)  # the double-vjp trick: a Jacobian-vector product

    assert_compiled(compare_runs(lambda a: a.sin() * a, run))


def test_first_derivative_without_create_graph_cannot_be_differentiated():
    compiled = thunder.jit(lambda a: (a**3).sum())
    for _ in range(2):
        a = leaf()
        (g,) = torch.autograd.grad(compiled(a), a)
        assert not g.requires_grad
    assert_compiled(compiled)


def test_double_backward_of_an_autograd_function():
    def run(fn, call):
        a = leaf()
        (g,) = torch.autograd.grad(fn(a).sum(), a, create_graph=True)
        return torch.autograd.grad(g.sum(), a)

    assert_compiled(compare_runs(lambda a: Cube.apply(a) * a, run))


def test_once_differentiable_raises_in_the_second_backward_as_in_eager():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a):
            ctx.save_for_backward(a)
            return a**3

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            (a,) = ctx.saved_tensors
            return grad * 3 * a**2

    f = lambda a: Once.apply(a)  # noqa: E731
    compiled = thunder.jit(f)

    def attempt(fn):
        a = leaf()
        (g,) = torch.autograd.grad(fn(a), a, leaf(), create_graph=True)
        g.sum().backward()

    for _ in range(2):
        assert_same_error(lambda: attempt(f), lambda: attempt(compiled), "once_differentiable")


def test_once_differentiable_leaves_no_second_derivative_as_in_eager():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, b):
            ctx.save_for_backward(a)
            return a**3, b * 2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad, other):
            (a,) = ctx.saved_tensors
            return grad * 3 * a**2, other

    def run(fn, call):
        a = leaf()
        (g,) = torch.autograd.grad(fn(a).sum(), a, create_graph=True)
        return g.detach(), torch.autograd.grad(g.sum(), a)

    assert_compiled(compare_runs(lambda a: Once.apply(a, a)[0] + a.exp() + a.sin().square(), run))


def test_create_graph_after_a_write_to_an_input_raises_clearly():
    def f(buffer, a):
        buffer.mul_(2)
        return (a * a * buffer).sum()

    a = leaf()
    loss = thunder.jit(f)(torch.ones(3), a)
    with pytest.raises(RuntimeError, match="as it was"):
        torch.autograd.grad(loss, a, create_graph=True)


def test_create_graph_updates_the_statistics_of_batch_norm_once():
    torch.manual_seed(0)
    eager = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3)).double()
    twin = copy.deepcopy(eager)
    for module, owner in ((eager, eager), (thunder.jit(twin), twin)):
        a = leaf(dtype=torch.float64)
        (g,) = torch.autograd.grad(module(a).pow(3).sum(), a, create_graph=True)
        g.square().sum().backward()
        owner.found = [a.grad, *(p.grad for p in owner.parameters()), *owner.buffers()]
    torch.testing.assert_close(twin.found, eager.found)


def test_gradgradcheck():
    compiled = thunder.jit(lambda a, w: (a @ w).tanh())
    assert torch.autograd.gradgradcheck(compiled, (leaf(2, 3, dtype=torch.float64), leaf(3, 2, dtype=torch.float64)))
    assert_compiled(compiled, misses=None)


# ---- torch.func applied to a compiled callable: eager's result or a clear error ----

CUBE = lambda a: (a**3).sum()  # noqa: E731

TRANSFORMS = {
    "grad": lambda f, a: torch.func.grad(f)(a),
    "grad_of_grad": lambda f, a: torch.func.grad(lambda b: torch.func.grad(f)(b).sum())(a),
    "vjp": lambda f, a: torch.func.vjp(f, a)[1](torch.ones(())),
    "jvp": lambda f, a: torch.func.jvp(f, (a,), (torch.ones_like(a),)),
    "vmap": lambda f, a: torch.func.vmap(f)(a),
    "vmap_of_grad": lambda f, a: torch.func.vmap(torch.func.grad(f))(a),
    "jacrev": lambda f, a: torch.func.jacrev(f)(a),
    "jacfwd": lambda f, a: torch.func.jacfwd(f)(a),
    "hessian": lambda f, a: torch.func.hessian(f)(a),
    "linearize": lambda f, a: torch.func.linearize(f, a)[1](torch.ones_like(a)),
    "functionalize": lambda f, a: torch.func.functionalize(f)(a),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_transform_of_a_compiled_function(name, warm):
    compiled = thunder.jit(CUBE)
    if warm:
        compiled(x()), compiled(leaf()).backward()
    for call in range(2):
        expected = TRANSFORMS[name](CUBE, x() + call)
        try:
            got = TRANSFORMS[name](compiled, x() + call)
        except thunder.ThunderError as error:
            assert_refused_clearly(error)
        else:
            assert_same(expected, got)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transform_inside_a_compiled_function(name):
    def f(a):
        return TRANSFORMS[name](CUBE, a)

    compiled = thunder.jit(f)
    for call in range(2):
        expected = f(x() + call)
        try:
            got = compiled(x() + call)
        except thunder.ThunderError as error:
            assert_refused_clearly(error)
        else:
            assert_same(expected, got)


@pytest.mark.parametrize("name", ["grad", "vmap", "jvp", "vmap_of_grad"])
def test_transform_inside_a_compiled_function_that_is_differentiated(name):
    check_training(lambda a: TRANSFORMS[name](CUBE, a), leaf(), allow_refusal=True)


def test_functional_call_of_a_compiled_module():
    eager = mlp()
    compiled = thunder.jit(mlp())
    state = {k: (v.detach() + 0.5).requires_grad_() for k, v in eager.named_parameters()}
    for call in range(2):
        expected = torch.func.functional_call(eager, state, (x() + call,))
        try:
            got = torch.func.functional_call(compiled, state, (x() + call,))
        except thunder.ThunderError as error:
            assert_refused_clearly(error)
            continue
        assert_same(expected, got)
        assert_gradients_same(
            torch.autograd.grad(weighted_sum(expected), list(state.values())),
            torch.autograd.grad(weighted_sum(got), list(state.values())),
        )


def test_per_sample_gradients_with_functional_call_inside():
    net = mlp()
    state = {k: v.detach() for k, v in net.named_parameters()}

    def loss(parameters, a):
        return torch.func.functional_call(net, parameters, (a,)).square().sum()

    def f(parameters, batch):
        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, batch)

    compiled = thunder.jit(f)
    for call in range(2):
        expected = f(state, x() + call)
        try:
            got = compiled(state, x() + call)
        except thunder.ThunderError as error:
            assert_refused_clearly(error)
        else:
            assert_gradients_same(list(expected.values()), list(got.values()))


def test_forward_mode_dual_numbers():
    compiled = thunder.jit(CUBE)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x(), torch.ones(4, 3))
        expected = torch.autograd.forward_ad.unpack_dual(CUBE(dual))
        try:
            got = torch.autograd.forward_ad.unpack_dual(compiled(dual))
        except thunder.ThunderError as error:
            assert_refused_clearly(error)
        else:
            assert got.tangent is not None, "the tangent is silently missing"
            assert_same(tuple(expected), tuple(got))


# ---- thunder.grad, thunder.value_and_grad ----


def test_thunder_grad_of_a_function():
    g = thunder.grad(lambda a, b: (a * b.sin()).sum())
    for call in range(2):
        a, b = x() + call, x()
        assert_gradients_same([b.sin()], [g(a, b)])
        assert not g(a, b).requires_grad
    assert_compiled(g)


def test_thunder_value_and_grad_of_a_function():
    f = lambda a, b: (a * b.sin()).sum()  # noqa: E731
    both = thunder.value_and_grad(f, argnums=1)
    for call in range(2):
        a, b = x() + call, x()
        expected_grad, expected = torch.func.grad_and_value(f, argnums=1)(a, b)
        value, gradient = both(a, b)
        assert_same(expected, value)
        assert_gradients_same([expected_grad], [gradient])
    assert_compiled(both)


@pytest.mark.parametrize("argnums", [(0,), (0, 1), (1, 0), (-1, 0), [1]])
def test_thunder_grad_with_several_argnums(argnums):
    f = lambda a, b: (a.exp() * b.sin()).sum()  # noqa: E731
    expected = torch.func.grad(f, argnums=tuple(argnums))(x(), x() + 1)
    got = thunder.grad(f, argnums=argnums)(x(), x() + 1)
    assert isinstance(got, tuple)
    assert_gradients_same(expected, got)


def test_thunder_grad_of_containers_keeps_their_structure():
    f = lambda p, a: ((a @ p["w"][0]) * p["b"]).sum()  # noqa: E731
    p = {"w": [x(3, 2)], "b": x(2)}
    expected, got = torch.func.grad(f)(p, x()), thunder.grad(f)(p, x())
    assert set(got) == {"w", "b"}
    assert_gradients_same([expected["w"][0], expected["b"]], [got["w"][0], got["b"]])


def test_thunder_grad_with_aux():
    f = lambda a: ((a * a).sum(), {"twice": a * 2})  # noqa: E731
    gradient, aux = thunder.grad(f, has_aux=True)(x())
    assert_gradients_same([2 * x(), 2 * x()], [gradient, aux["twice"]])
    (value, aux), gradient = thunder.value_and_grad(f, has_aux=True)(x())
    assert_gradients_same([(x() * x()).sum(), 2 * x(), 2 * x()], [value, aux["twice"], gradient])
    assert not value.requires_grad
    assert not aux["twice"].requires_grad


def test_thunder_grad_touches_no_grad_attribute():
    w = leaf()
    gradient = thunder.grad(lambda a: (a * w).sum())(w)
    assert_gradients_same([w.detach() * 1], [gradient.detach()])  # the closure's w is a constant
    assert w.grad is None
    assert w.requires_grad


def test_thunder_grad_under_no_grad():
    with torch.no_grad():
        gradient = thunder.grad(CUBE)(leaf())
    assert_gradients_same([3 * x() ** 2], [gradient])
    assert not gradient.requires_grad


def test_thunder_grad_of_grad():
    second = thunder.grad(lambda a: thunder.grad(CUBE)(a).sum())
    eager = torch.func.grad(lambda a: torch.func.grad(CUBE)(a).sum())(x())
    try:
        got = second(x())
    except thunder.ThunderError as error:
        assert_refused_clearly(error)
    else:
        assert_gradients_same([eager], [got])


def test_thunder_grad_can_be_differentiated_by_autograd():
    g = thunder.grad(CUBE)
    a = leaf()
    g(a).sum().backward()
    assert_gradients_same([6 * x()], [a.grad])


def test_thunder_grad_of_what_is_not_used_is_zero():
    assert_gradients_same([torch.zeros(4, 3)], [thunder.grad(lambda a, b: b.sum())(x(), x())])
    assert_gradients_same([torch.zeros(4, 3)], [thunder.grad(lambda a: a.detach().sum())(x())])


def test_thunder_grad_of_a_module_with_respect_to_its_input():
    net = mlp()

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, a):
            return self.net(a).sum()

    g = thunder.grad(Loss())
    a = leaf()
    Loss()(a).backward()
    net.zero_grad()
    assert_gradients_same([a.grad], [g(x())])
    assert all(p.grad is None for p in net.parameters())


def test_thunder_grad_of_something_compiled_already():
    compiled = thunder.jit(CUBE)
    assert_gradients_same([3 * x() ** 2], [thunder.grad(compiled)(x())])
    assert thunder.compile_stats(compiled).calls == 1
    with pytest.raises(TypeError, match="compiled already"):
        thunder.grad(compiled, cache="no caching")


def test_thunder_grad_passes_keyword_arguments_and_options_on():
    g = thunder.grad(lambda a, scale: (a * scale).sum(), cache="no caching")
    assert_gradients_same([torch.full((4, 3), 3.0)], [g(x(), scale=3.0)])
    assert thunder.cache_option(g) == "no caching"


def test_thunder_grad_of_complex_arguments():
    f = lambda z: (z * z.conj()).real.sum()  # noqa: E731
    z = torch.complex(x(), x() + 1)
    assert_gradients_same([torch.func.grad(f)(z)], [thunder.grad(f)(z)])


def test_thunder_grad_keeps_the_name():
    def energy(a):
        """What it costs."""
        return a.sum()

    assert thunder.grad(energy).__name__ == "energy"
    assert thunder.value_and_grad(energy).__doc__ == "What it costs."


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: thunder.grad(CUBE, argnums="a"), TypeError, "argnums must be an int"),
        (lambda: thunder.grad(CUBE, argnums=1.0), TypeError, "argnums must be an int"),
        (lambda: thunder.grad(CUBE, argnums=True), TypeError, "argnums must be an int"),
        (lambda: thunder.grad(CUBE, argnums=()), ValueError, "argnums is empty"),
        (lambda: thunder.grad(CUBE, argnums=(0, 0)), ValueError, "twice"),
        (lambda: thunder.grad(lambda a, b: a.sum(), argnums=(0, -2))(x(), x()), ValueError, "twice"),
        (lambda: thunder.grad(CUBE, argnums=1)(x()), ValueError, "the call has 1 positional argument;"),
        (lambda: thunder.grad(lambda a: a)(x()), TypeError, r"shape \(\).*not one of shape \(4, 3\)"),
        (lambda: thunder.grad(lambda a: a[0, 0] > 0)(x()), TypeError, "torch.bool"),
        (lambda: thunder.grad(lambda a: (a.sum(), a))(x()), TypeError, "has_aux=True"),
        (lambda: thunder.grad(lambda a: a.sum(), has_aux=True)(x()), TypeError, r"must return \(value, aux\)"),
        (lambda: thunder.grad(CUBE)(3.0), TypeError, "holds a float"),
        (lambda: thunder.grad(CUBE)(torch.arange(3)), TypeError, "torch.int64"),
        (lambda: thunder.grad(lambda a: 1.0)([]), TypeError, "holds no tensor"),
        (lambda: thunder.grad(CUBE, nonsense=1), TypeError, "unknown option"),
    ],
)  # fmt: skip
def test_thunder_grad_explains_misuse(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_thunder_grad_in_inference_mode_is_explained():
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference mode"):
        thunder.grad(CUBE)(torch.ones(2))
