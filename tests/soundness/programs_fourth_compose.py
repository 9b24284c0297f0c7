"""Programs of the fourth collection: compiled callables beside what else PyTorch and Python compose."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import functools
import io
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

import thunder
from tests.soundness.harness import Seen, program
from tests.soundness.world import X

COMPOSE = "fourth: compose"
FUNC = "fourth: functional"


class Scaled(nn.Module):
    """A layer with a number beside its weights."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.lin, self.scale, self.calls = nn.Linear(4, 4), scale, 0

    def forward(self, x):
        self.calls += 1
        return self.lin(x) * self.scale


@program(COMPOSE)
def a_compiled_helper_inside_a_callable():
    state = {"scale": 2.0, "n": 0}

    def helper(x):
        state["n"] += 1
        return x * state["scale"]

    compiled = thunder.jit(helper)

    def f(x):
        return compiled(x) + compiled(x + 1)

    yield f, X()
    state["scale"] = 3.0
    yield X()
    yield Seen(state=state)
    y = yield X(grad=True)
    y.sum().backward()
    yield Seen(state=state)


@program(COMPOSE)
def a_compiled_submodule_in_a_module():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Scaled(), thunder.jit(Scaled(2.0))

        def forward(self, x):
            return self.second(self.first(x).relu())

    net = Net()
    y = yield net, X()
    y.sum().backward()
    net.second.scale = 5.0
    y = yield X(1.0)
    y.sum().backward()
    yield Seen(grads=[p.grad for p in net.parameters()], calls=(net.first.calls, net.second.calls))
    yield Seen(names=sorted(net.state_dict()))


@program(COMPOSE)
def a_submodule_is_replaced_by_a_compiled_one():
    net = nn.Sequential(Scaled(), nn.ReLU(), Scaled(3.0))
    yield net, X()
    net[2] = thunder.jit(net[2])
    yield X()
    net[2].scale = 0.5
    yield X()
    yield Seen(calls=net[0].calls)


@program(COMPOSE)
def a_copy_of_the_module_goes_its_own_way():
    model = Scaled()
    pair = [model, copy.deepcopy(model)]

    def f(x, i):
        return pair[i](x)

    yield f, X(), 0
    yield X(), 1
    with torch.no_grad():
        pair[1].lin.weight.add_(1)
    pair[1].scale = 7.0
    yield X(), 0
    yield X(), 1
    pair[0].load_state_dict(pair[1].state_dict())
    yield X(), 0
    yield Seen(calls=[m.calls for m in pair])


@program(COMPOSE)
def a_compiled_module_is_copied_and_pickled():
    model = Scaled()
    compiled = thunder.jit(model)

    def check(m, x):
        return torch.equal(m(x), m.lin(x) * m.scale), m.calls

    compiled(X())
    twin = copy.deepcopy(compiled)
    yield check, twin, X()
    twin.scale = 4.0
    yield twin, X()
    yield compiled, X()
    yield Seen(calls=(model.calls, compiled.calls, twin.calls), scales=(model.scale, twin.scale))
    assert torch.equal(twin(X()), twin.lin(X()) * 4.0)
    assert torch.equal(compiled(X()), model.lin(X()))
    twin.lin.weight.data.zero_()
    assert not torch.equal(compiled(X()), twin(X()))


@program(COMPOSE)
def a_state_dict_moves_between_compiled_and_plain():
    model = Scaled(2.0)
    compiled = thunder.jit(copy.deepcopy(model))
    before = compiled(X())
    assert torch.equal(before, model(X()))
    with torch.no_grad():
        model.lin.weight.mul_(-1)
    sink = io.BytesIO()
    torch.save(model.state_dict(), sink)
    sink.seek(0)
    compiled.load_state_dict(torch.load(sink))
    assert torch.equal(compiled(X()), model(X()))
    compiled.load_state_dict({k: v * 2 for k, v in model.state_dict().items()}, assign=True)
    assert torch.equal(compiled(X()), model(X()) * 2), (compiled(X()), model(X()) * 2)
    yield model, X()
    model.load_state_dict(compiled.state_dict(), assign=True)
    yield X()


@program(COMPOSE)
def torch_compile_around_a_compiled_callable():
    scale = [2.0]
    inner = thunder.jit(lambda x: x * scale[0])
    outer = torch.compile(lambda x: inner(x).sin() + 1, backend="eager")
    for value in (2.0, 3.0, -1.0):
        scale[0] = value
        assert torch.allclose(outer(X()), (X() * value).sin() + 1)
    yield lambda x: outer(x) * 2, X()
    scale[0] = 5.0
    yield X()


class Rows(Dataset):
    def __len__(self):
        return 5

    def __getitem__(self, i):
        return torch.arange(3.0) + i


@program(COMPOSE)
def a_loader_transforms_with_a_compiled_function():
    norm = thunder.jit(lambda x: (x - x.mean()) / x.std())
    norm(torch.arange(3.0))

    def collate(rows):
        return torch.stack([norm(r) for r in rows])

    seen = list(DataLoader(Rows(), batch_size=2, collate_fn=collate))
    plain = list(DataLoader(Rows(), batch_size=2, collate_fn=lambda rows: torch.stack(rows)))
    for a, b in zip(seen, plain, strict=True):
        assert torch.allclose(a, torch.stack([(r - r.mean()) / r.std() for r in b]))
    with DataLoaderWorkers():
        forked = list(DataLoader(Rows(), batch_size=2, collate_fn=collate, num_workers=1))
    assert all(torch.equal(a, b) for a, b in zip(seen, forked, strict=True))
    yield lambda x: collate([x, x + 1]), X()
    yield X(2.0)


class DataLoaderWorkers:
    """One thread while processes fork."""

    def __enter__(self):
        self.threads = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *error):
        torch.set_num_threads(self.threads)


@program(COMPOSE)
def a_fork_after_the_first_call():
    model = Scaled()
    compiled = thunder.jit(model)
    with torch.no_grad():
        expected = compiled(X()).tolist()
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                model.scale = 2.0
                got = (compiled(X()) / 2).tolist() == expected and compiled(torch.ones(2, 4)).shape == (2, 4)
                os.write(write, b"y" if got else b"n")
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert os.read(read, 1) == b"y"
        os.close(read)
        os.close(write)
        yield model, X()
        model.scale = 3.0
        yield X()


@program(COMPOSE)
def threads_call_at_once_with_other_shapes():
    weight = torch.randn(4)
    compiled = thunder.jit(lambda x: (x * weight).sum(-1))
    wrong = []

    def work(n):
        for i in range(20):
            x = torch.full((n, 4), float(i))
            if not torch.allclose(compiled(x), (x * weight).sum(-1)):
                wrong.append((n, i))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(1, 5)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong, wrong
    yield lambda x: compiled(x) + 1, X()


@program(COMPOSE)
def a_pool_is_used_inside():
    pool = ThreadPoolExecutor(2)

    def f(xs):
        return list(pool.map(lambda x: x * 2, xs))

    yield f, [X(), X(1.0)]
    yield [X(2.0), X(1.0), X()]
    pool.shutdown()


@program(COMPOSE)
def a_coroutine_awaits_a_compiled_step():
    model = Scaled()
    step = thunder.jit(model)

    async def serve(x, n):
        out = []
        for i in range(n):
            out.append(step(x + i))
            await asyncio.sleep(0)
        return out

    async def both(x):
        return await asyncio.gather(serve(x, 2), serve(x * 2, 3))

    def f(x):
        return asyncio.run(both(x))

    with torch.no_grad():
        yield f, X()
        model.scale = 2.0
        yield X()
        yield Seen(calls=model.calls)


@program(COMPOSE)
def a_context_variable_sets_the_scale():
    scale = contextvars.ContextVar("scale", default=1.0)

    def f(x):
        return x * scale.get()

    yield f, X()
    token = scale.set(3.0)
    yield X()
    scale.reset(token)
    yield X()


@program(COMPOSE)
def partials_of_partials_change_their_arguments():
    def f(x, a, b=1.0, *, c=0.0):
        return x * a + b - c

    options = {"c": 2.0}
    g = functools.partial(functools.partial(f, a=3.0), **options)
    yield g, X()
    g.keywords["c"] = 5.0
    yield X()
    g.keywords["b"] = X()
    yield X()


@program(COMPOSE)
def no_grad_as_a_decorator_and_inside():
    lin = nn.Linear(4, 4)

    @torch.no_grad()
    def target(x):
        return lin(x).detach() + 1

    def f(x):
        with torch.set_grad_enabled(x.shape[0] == 4):
            y = lin(x)
        return ((y - target(x)) ** 2).mean(), torch.is_grad_enabled()

    loss, _ = yield f, X()
    loss.backward()
    yield Seen(grad=lin.weight.grad)
    yield torch.ones(2, 4)
    with torch.inference_mode():
        yield X()
    loss, _ = yield X(3.0)
    loss.backward()
    yield Seen(grad=lin.weight.grad)


@program(COMPOSE)
def checkpoints_inside_with_dropout():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            return x + self.drop(self.b(self.a(x).relu()))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(2))
            self.ckpt = True

        def forward(self, x):
            for b in self.blocks:
                x = checkpoint(b, x, use_reentrant=False) if self.ckpt and self.training else b(x)
            return x.square().sum()

    net = Net()
    loss = yield net, X()
    loss.backward()
    yield Seen(grads=[p.grad for p in net.parameters()], then=torch.rand(2))
    net.ckpt = False
    loss = yield X()
    loss.backward()
    yield Seen(grads=[p.grad for p in net.parameters()])
    net.ckpt = True
    net.eval()
    yield X()


@program(COMPOSE)
def a_checkpoint_around_a_compiled_block():
    block = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    compiled = thunder.jit(block)

    def f(x, how):
        torch.manual_seed(3)
        run = compiled if how == "compiled" else block
        return checkpoint(run, x, use_reentrant=False).sum()

    grads = []
    for how in ("plain", "compiled", "compiled"):
        block.zero_grad()
        f(X(grad=True), how).backward()
        grads.append(block[0].weight.grad.clone())
    assert torch.allclose(grads[0], grads[1]) and torch.allclose(grads[0], grads[2])
    x = X(grad=True)
    y = yield f, x, "plain"
    y.backward()
    yield Seen(grad=x.grad)


@program(COMPOSE)
def replicas_with_shared_weights():
    def replicate(model, n):
        copies = []
        for _ in range(n):
            twin = copy.copy(model)
            twin._modules = {k: copy.copy(m) for k, m in model._modules.items()}
            copies.append(twin)
        return copies

    model = Scaled()

    def f(x):
        parts = x.chunk(2)
        return torch.cat([m(p) for m, p in zip(replicate(model, len(parts)), parts, strict=True)])

    y = yield f, torch.ones(3, 4)
    y.sum().backward()
    yield Seen(grad=model.lin.weight.grad, calls=model.calls)
    model.scale = 4.0
    yield torch.ones(3, 4)
    yield torch.ones(1, 4)


@program(COMPOSE)
def the_users_decorator_logs_and_wraps():
    calls = []

    def traced(name=None):
        def wrap(g):
            @functools.wraps(g)
            def inner(self, *args, **kwargs):
                calls.append(name or g.__name__)
                out = g(self, *args, **kwargs)
                return out if self.keep else out.detach()

            return inner

        return wrap

    class Net(nn.Module):
        keep = True

        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 4)

        @traced()
        def hidden(self, x):
            return self.lin(x)

        @traced("all")
        def forward(self, x):
            return self.hidden(x) * 2

        @staticmethod
        def helper(x):
            return x

    net = Net()
    y = yield net, X()
    y.sum().backward()
    net.keep = False
    yield X()
    yield Seen(calls=calls, grad=net.lin.weight.grad)
    net.keep = True
    net.hidden = lambda x: x + 100
    yield X()
    yield Seen(calls=calls)


@program(FUNC)
def functional_call_with_other_weights():
    model = Scaled(2.0)

    def f(params, x):
        return torch.func.functional_call(model, params, (x,))

    params = {n: p.detach().clone() for n, p in model.named_parameters()}
    yield f, params, X()
    params["lin.weight"] = torch.eye(4)
    yield params, X()
    yield {"lin.bias": torch.ones(4)}, X()
    yield Seen(calls=model.calls, weight=model.lin.weight)
    y = yield {k: v.requires_grad_() for k, v in params.items()}, X()
    y.sum().backward()
    yield Seen(grad=params["lin.bias"].grad, own=model.lin.bias.grad)


@program(FUNC)
def gradients_per_sample_by_vmap():
    model = nn.Linear(3, 1)
    params = dict(model.named_parameters())

    def loss(p, x, y):
        return F.mse_loss(torch.func.functional_call(model, p, (x,)), y)

    def f(xs, ys):
        p = {k: v.detach() for k, v in params.items()}
        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(p, xs, ys)

    yield f, torch.randn(4, 3), torch.randn(4, 1)
    with torch.no_grad():
        model.weight.mul_(2)
    yield torch.randn(4, 3), torch.randn(4, 1)
    yield torch.randn(2, 3), torch.randn(2, 1)


@program(FUNC)
def a_jacobian_and_a_directional_derivative_inside():
    weight = torch.randn(3, 3)

    def net(x):
        return (weight @ x).tanh()

    def f(x, v):
        value, push = torch.func.jvp(net, (x,), (v,))
        return value, push, torch.func.jacrev(net)(x) @ v - push

    yield f, torch.randn(3), torch.randn(3)
    weight.mul_(2)
    yield torch.randn(3), torch.randn(3)


@program(FUNC)
def transforms_around_a_compiled_callable():
    model = Scaled(2.0)
    compiled = thunder.jit(model)
    weight, bias = model.lin.weight.detach(), model.lin.bias.detach()
    x = torch.randn(3, 4)
    assert torch.allclose(torch.func.vmap(compiled)(x), (x @ weight.T + bias) * 2)
    model.scale = 3.0
    assert torch.allclose(torch.func.grad(lambda x: compiled(x).sum())(X()), weight.sum(0) * 3)
    assert torch.allclose(torch.func.jacfwd(compiled)(X()), weight * 3)
    yield lambda x: model(x), X()
    yield Seen(calls=model.calls > 3)


@program(FUNC)
def autograd_functional_around_it():
    def f(x):
        return (x**3).sum()

    compiled = thunder.jit(f)
    x = X()
    assert torch.allclose(torch.autograd.functional.hessian(compiled, x), torch.diag(6 * x))
    assert torch.allclose(torch.autograd.functional.jacobian(compiled, x), 3 * x**2)
    _, vjp = torch.autograd.functional.vjp(compiled, x, torch.tensor(2.0))
    assert torch.allclose(vjp, 6 * x**2)

    def g(x):
        return torch.autograd.functional.jacobian(lambda y: y**2, x)

    yield g, X()
    yield X(2.0)


@program(FUNC)
def a_penalty_on_gradients_inside():
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))

    def f(x):
        x = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        return ((g.norm() - 1) ** 2).sum()

    loss = yield f, X()
    loss.backward()
    yield Seen(grads=[p.grad for p in net.parameters()])
    loss = yield X(2.0)
    loss.backward()
    yield Seen(grads=[p.grad for p in net.parameters()])


@program(FUNC)
def an_ensemble_by_stacked_state():
    models = [nn.Linear(3, 2) for _ in range(3)]

    def f(x):
        params, buffers = torch.func.stack_module_state(models)

        def one(p, b, x):
            return torch.func.functional_call(models[0], (p, b), (x,))

        return torch.func.vmap(one, in_dims=(0, 0, None))(params, buffers, x)

    yield f, torch.ones(2, 3)
    with torch.no_grad():
        models[1].weight.zero_()
    yield torch.ones(2, 3)
    models.pop()
    yield torch.ones(2, 3)


@program(COMPOSE)
def a_compiled_module_within_a_compiled_module_in_eval():
    class Tower(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.lin = nn.BatchNorm1d(4), nn.Linear(4, 4)

        def forward(self, x):
            return self.lin(self.norm(x))

    inner = thunder.jit(Tower())
    net = nn.ModuleDict({"inner": inner, "head": nn.Linear(4, 1)})

    def f(x):
        return net["head"](net["inner"](x))

    y = yield f, torch.randn(3, 4)
    y.sum().backward()
    yield Seen(mean=inner.norm.running_mean, training=inner.training)
    net.eval()
    yield torch.randn(3, 4)
    yield Seen(mean=inner.norm.running_mean, training=[m.training for m in net.modules()])
    net.train()
    yield torch.randn(3, 4)
    yield Seen(mean=inner.norm.running_mean)


@program(COMPOSE)
def an_object_is_pickled_and_comes_back():
    model = nn.Linear(4, 4)
    world = {"model": model}

    def f(x):
        return world["model"](x)

    yield f, X()
    world["model"] = pickle.loads(pickle.dumps(model))
    yield X()
    with torch.no_grad():
        model.weight.zero_()
    yield X()
    with torch.no_grad():
        world["model"].weight.zero_()
    yield X()
