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
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

import thunder
from tests.soundness.harness import Seen, program
from tests.soundness.snapshot import difference, snapshot
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


AROUND = "fourth: around a compiled callable"


def agree(make, drive):
    """Drive a callable and a compiled one of its make: the same comes out."""
    torch.manual_seed(0)
    expected = snapshot(drive(make()))
    torch.manual_seed(0)
    found = difference(expected, snapshot(drive(thunder.jit(make()))), single=True)
    assert not found, found
    return make()


@program(AROUND)
def attributes_are_set_on_the_compiled_module():
    def drive(m):
        out = [m(X())]
        m.scale = 3.0
        m.new = torch.ones(2)
        out.append(m(X()))
        m.lin = nn.Linear(4, 2)
        m.eval()
        out += [m(X()), m.training, m.lin.training, hasattr(m, "new"), m.calls, sorted(m.state_dict())]
        del m.new
        out += [hasattr(m, "new"), isinstance(m, nn.Module)]
        m.lin.weight.requires_grad_(False)
        out += [m(X()), [n for n, p in m.named_parameters() if p.requires_grad]]
        return out

    yield agree(Scaled, drive), X()


@program(AROUND)
def hooks_are_put_on_the_compiled_module():
    def drive(m):
        seen, out = [], []
        out.append(m(X()))
        first = m.register_forward_pre_hook(lambda m, a: (a[0] * 2,))
        out.append(m(X()))
        second = m.register_forward_hook(lambda m, a, y: seen.append(y.detach().clone()) or y + 1)
        out.append(m(X()))
        m.lin.register_forward_hook(lambda m, a, y: y.relu())
        out.append(m(X()))
        first.remove()
        out.append(m(X()))
        second.remove()
        m.register_full_backward_hook(lambda m, gi, go: seen.append(go[0].clone()))
        y = m(X(grad=True))
        y.sum().backward()
        return [*out, y, seen, m.lin.weight.grad]

    yield agree(Scaled, drive), X()


@program(AROUND)
def a_sequence_is_indexed_and_cut():
    def make():
        return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))

    def drive(m):
        out = [m(X()), len(m), type(m[1]).__name__, m[:2](X()), [type(c).__name__ for c in m]]
        m[1] = nn.Tanh()
        out.append(m(X()))
        m.append(nn.Softmax(-1))
        out.append(m(X()))
        del m[0]
        out += [m(X()), len(m)]
        m.insert(0, nn.Dropout(0.5))
        return [*out, m(X()), m.eval()(X())]

    yield agree(make, drive), X()


@program(AROUND)
def other_methods_of_the_module_are_called():
    class Auto(nn.Module):
        def __init__(self):
            super().__init__()
            self.enc, self.dec = nn.Linear(4, 2), nn.Linear(2, 4)
            self.log = []

        def encode(self, x):
            self.log.append("e")
            return self.enc(x)

        def forward(self, x):
            return self.dec(self.encode(x))

        @torch.no_grad()
        def sample(self, n):
            return self.dec(torch.randn(n, 2))

    def drive(m):
        out = [m(X()), m.encode(X()), m.sample(2), m.log]
        m.encode = lambda x: torch.zeros(2)
        return [*out, m(X()), m.log]

    yield agree(Auto, drive), X()


@program(AROUND)
def it_is_moved_converted_and_applied():
    def drive(m):
        out = [m(X())]
        m.double()
        out.append(m(X().double()))
        m.to(torch.bfloat16)
        out.append(m(X().to(torch.bfloat16)).dtype == torch.bfloat16)
        m.float()
        m.apply(lambda s: nn.init.ones_(s.weight) if isinstance(s, nn.Linear) else None)
        out.append(m(X()))
        m.lin.weight.data.fill_(2)
        out.append(m(X()))
        m.zero_grad()
        m.requires_grad_(False)
        return [*out, m(X()), m.calls]

    yield agree(Scaled, drive), X()


@program(AROUND)
def it_is_a_decorator_of_a_method():
    def make_class(wrap):
        class Model:
            bias = 1.0

            def __init__(self, scale):
                self.scale, self.n = scale, 0

            @wrap
            def step(self, x, *, more=0.0):
                self.n += 1
                return x * self.scale + self.bias + more

            @staticmethod
            @wrap
            def fixed(x):
                return x - 1

            @classmethod
            def of_class(cls, x):
                return x * cls.bias

        return Model

    def drive(wrap):
        model = make_class(wrap)
        a, b = model(2.0), model(3.0)
        out = [a.step(X()), b.step(X()), a.step(X(), more=1.0), model.fixed(X()), a.fixed(X())]
        model.bias = 5.0
        out += [a.step(X()), wrap(model.of_class)(X())]
        b.bias = -1.0
        return [*out, b.step(X()), model.step(a, X()), a.n, b.n]

    expected = snapshot(drive(lambda f: f))
    found = difference(expected, snapshot(drive(thunder.jit)), single=True)
    assert not found, found
    yield make_class(lambda f: f)(2.0).step, X()


@program(AROUND)
def one_optimizer_for_plain_and_compiled():
    def drive(m):
        opt = torch.optim.AdamW(m.parameters(), lr=0.1)
        out = []
        for i in range(4):
            opt.zero_grad(set_to_none=i % 2 == 0)
            loss = m(X(float(i))).square().sum()
            loss.backward()
            nn.utils.clip_grad_norm_(m.parameters(), 1.0)
            opt.step()
            out.append(loss.detach())
        opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
        return [*out, m.state_dict()]

    yield agree(Scaled, drive), X()


@program(AROUND)
def an_averaged_model_of_a_compiled_one():
    def drive(m):
        ema = torch.optim.swa_utils.AveragedModel(m, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
        out = []
        for i in range(3):
            with torch.no_grad():
                m.lin.weight.add_(i)
            ema.update_parameters(m)
            out += [m(X()), ema(X())]
        return [*out, int(ema.n_averaged)]

    yield agree(Scaled, drive), X()


@program(AROUND)
def parametrizations_come_and_go():
    class Symmetric(nn.Module):
        def forward(self, w):
            return w.triu() + w.triu(1).transpose(-1, -2)

    def drive(m):
        out = [m(X())]
        nn.utils.parametrize.register_parametrization(m.lin, "weight", Symmetric())
        y = m(X())
        y.sum().backward()
        out += [y, m.lin.parametrizations.weight.original.grad]
        with nn.utils.parametrize.cached():
            out += [m(X()), m(X())]
        nn.utils.parametrize.remove_parametrizations(m.lin, "weight")
        return [*out, m(X()), sorted(m.state_dict())]

    yield agree(Scaled, drive), X()


@program(AROUND)
def weights_are_pruned_under_it():
    from torch.nn.utils import prune

    def drive(m):
        out = [m(X())]
        prune.l1_unstructured(m.lin, "weight", amount=0.5)
        out.append(m(X()))
        with torch.no_grad():
            m.lin.weight_orig.mul_(2)
        out.append(m(X()))
        prune.remove(m.lin, "weight")
        return [*out, m(X()), sorted(m.state_dict())]

    yield agree(Scaled, drive), X()


@program(AROUND)
def gradients_in_every_way_around_it():
    def make():
        w = torch.arange(4.0).requires_grad_()

        def f(x):
            return (x * w).tanh(), (x**2 * w).sum()

        f.w = w
        return f

    def drive(f):
        x = X(grad=True)
        w = getattr(f, "w", None)
        a, b = f(x)
        out = [torch.autograd.grad(b, x, retain_graph=True)[0], torch.autograd.grad(a.sum() + b, x)[0]]
        _, b = f(x)
        (g,) = torch.autograd.grad(b, x, create_graph=True)
        out.append(torch.autograd.grad(g.sum(), x)[0])
        a, b = f(x)
        a.register_hook(lambda g: g * 2)
        (a.sum() + b).backward(inputs=[x])
        out += [x.grad.clone(), w.grad if w is not None else None]
        with torch.autograd.graph.save_on_cpu():
            a, _ = f(x)
        a.sum().backward()
        out.append(x.grad)
        torch.autograd.gradcheck(lambda x: f(x)[0], (X().double().requires_grad_(),))
        return out

    yield agree(make, drive), X()


@program(AROUND)
def modes_of_torch_around_it():
    from torch.overrides import TorchFunctionMode
    from torch.utils.flop_counter import FlopCounterMode

    class Names(TorchFunctionMode):
        def __init__(self):
            super().__init__()
            self.n = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.n += 1
            return func(*args, **(kwargs or {}))

    def drive(m):
        out = [m(X())]
        with FlopCounterMode(display=False) as flops:
            out.append(m(torch.ones(2, 4)))
        with Names() as names:
            out.append(m(X()))
        with torch.autograd.set_detect_anomaly(True):
            y = m(X(grad=True))
            y.sum().backward()
        return [*out, flops.get_total_flops() > 0, names.n > 0, m.lin.weight.grad, m.calls]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = agree(Scaled, drive)
    yield model, X()


@program(AROUND)
def a_default_device_and_dtype_are_set():
    def make():
        return lambda n: torch.zeros(n) + torch.arange(n) * torch.tensor(1.5)

    def drive(f):
        out = [f(3)]
        torch.set_default_device("meta")
        try:
            out.append(f(3).device.type)
        finally:
            torch.set_default_device(None)
        torch.set_default_dtype(torch.float64)
        try:
            out.append(f(3))
        finally:
            torch.set_default_dtype(torch.float32)
        with torch.device("meta"):
            out.append(f(3).device.type)
        return [*out, f(3)]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = agree(make, drive)
    yield made, 3


@program(AROUND)
def two_compiled_ones_of_a_module_are_held_weakly():
    model = Scaled()
    once = thunder.jit(model)
    twice = thunder.jit(model)
    a, b = once(X()), twice(X())
    assert torch.equal(a, b)
    ref, table = weakref.ref(once), {once: 1, twice: 2}
    assert ref() is once and table[once] == 1
    model.scale = 4.0
    assert torch.equal(twice(X()), model(X())) and torch.equal(once(X()), model(X()))
    yield lambda x: (once(x), twice(x)), X()
    yield Seen(calls=model.calls)


@program(AROUND)
def exported_traced_and_made_into_a_graph():
    from torch.fx.experimental.proxy_tensor import make_fx

    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval().requires_grad_(False)
    compiled = thunder.jit(model)
    compiled(X())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = make_fx(lambda x: compiled(x))(X())
        traced = torch.jit.trace(lambda x: compiled(x) + x, X())
    for x in (X(), X(2.0)):
        assert torch.allclose(graph(x), model(x)), "make_fx"
        assert torch.allclose(traced(x), model(x) + x), "jit.trace"
    yield lambda x: graph(x) + compiled(x), X()
    yield X(2.0)


@program(AROUND)
def forward_mode_around_and_inside():
    import torch.autograd.forward_ad as fwd

    def f(x, t):
        with fwd.dual_level():
            y = (fwd.make_dual(x, t) ** 2).sin()
            value, tangent = fwd.unpack_dual(y)
        return value, tangent

    compiled = thunder.jit(lambda x: (x**2).sin())
    with warnings.catch_warnings(), fwd.dual_level():
        warnings.simplefilter("ignore")
        y = compiled(fwd.make_dual(X(), torch.ones(4)))
        tangent = fwd.unpack_dual(y).tangent
    assert tangent is not None and torch.allclose(tangent, (X() ** 2).cos() * 2 * X())
    yield f, X(), torch.ones(4)
    yield X(1.0), X()


@program(AROUND)
def reentrant_checkpoint_around_and_a_second_backward():
    def drive(m):
        x = X(grad=True)
        y = checkpoint(m, x, use_reentrant=True)
        y.sum().backward()
        z = m(x)
        z.sum().backward(retain_graph=True)
        z.square().sum().backward()
        return [y, z, x.grad, m.lin.weight.grad, m.calls]

    yield agree(Scaled, drive), X()


@program(AROUND)
def backward_runs_in_another_thread():
    def drive(m):
        x = X(grad=True)
        y = m(x).sum()
        t = threading.Thread(target=y.backward)
        t.start()
        t.join()
        return [y, x.grad, m.lin.weight.grad]

    yield agree(Scaled, drive), X()


@program(AROUND)
def nested_three_levels_with_shared_state():
    log = []
    state = {"k": 1.0}

    @thunder.jit
    def low(x):
        log.append("low")
        return x * state["k"]

    @thunder.jit
    def middle(x):
        log.append("middle")
        return low(x) + low(x + 1)

    def top(x):
        log.append("top")
        y = middle(x)
        state["k"] += 1
        return y + low(x)

    yield top, X()
    yield Seen(log=log, state=state)
    yield X()
    yield X(2.0)
    yield Seen(log=log, state=state)


@program(AROUND)
def an_inner_compiled_one_that_falls_back():
    said = []

    @functools.partial(thunder.jit, fallback="eager")
    def inner(x):
        said.append(x.numpy().sum())
        return x + float(said[-1])

    def outer(x):
        return inner(x) * 2

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield outer, X()
        yield X(2.0)
        yield Seen(said=[float(s) for s in said])


@program(AROUND)
def a_callable_object_with_equality_of_its_own():
    class Op:
        def __init__(self, k):
            self.k = k

        def __eq__(self, other):
            return isinstance(other, Op)

        def __hash__(self):
            return 0

        def __call__(self, x):
            return x * self.k

    ops = [Op(2.0), Op(3.0)]

    def f(x, op):
        return op(x)

    yield f, X(), ops[0]
    yield X(), ops[1]
    ops[0].k = 7.0
    yield X(), ops[0]


class Tagged(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(out, cls):
            out.tag = "+".join(getattr(a, "tag", "") for a in args if isinstance(a, Tagged))
        return out


@program(AROUND)
def dispatch_through_torch_function_of_the_users():
    def f(a, b):
        c = a + b
        return c * 2, getattr(c, "tag", None), type(c).__name__

    a, b = X().as_subclass(Tagged), X(1.0).as_subclass(Tagged)
    a.tag, b.tag = "a", "b"
    yield f, a, b
    b.tag = "z"
    yield a, b
    yield X(), b


@program(FUNC)
def vmap_with_random_and_a_branch_on_shape():
    def one(x):
        return x * torch.rand(()) if x.shape[0] > 2 else x

    def f(xs):
        return torch.func.vmap(one, randomness="different")(xs), torch.func.vmap(one, randomness="same")(xs)

    yield f, torch.ones(3, 4)
    yield torch.ones(3, 2)
    yield torch.ones(2, 4)
    yield Seen(then=torch.rand(1))


@program(FUNC)
def a_meta_step_with_functional_weights():
    model = nn.Linear(4, 1)

    def inner_loss(params, x):
        return torch.func.functional_call(model, params, (x,)).square().mean()

    def f(x, lr):
        params = dict(model.named_parameters())
        grads = torch.func.grad(inner_loss)(params, x)
        fast = {k: p - lr * grads[k] for k, p in params.items()}
        return inner_loss(fast, x * 2)

    loss = yield f, torch.randn(3, 4), 0.1
    loss.backward()
    yield Seen(grad=model.weight.grad)
    loss = yield torch.randn(3, 4), 0.5
    loss.backward()
    yield Seen(grad=model.weight.grad)


@program(FUNC)
def a_linearization_and_a_vjp_are_returned():
    def f(x):
        y, pull = torch.func.vjp(lambda x: x.sin() * x, x)
        return y, pull(torch.ones_like(y))[0]

    yield f, X()
    yield X(1.0)
    x = X(grad=True)
    _, g = yield x
    g.sum().backward()
    yield Seen(grad=x.grad)


@program(FUNC)
def dropout_inside_a_gradient():
    def f(x):
        return torch.func.grad(lambda r: torch.dropout(r, 0.5, True).sum())(x)

    yield f, torch.ones(8)
    yield torch.ones(8)
    yield Seen(then=torch.rand(1))
    yield torch.ones(8)


@program(FUNC)
def permutations_and_dropout_by_sample():
    def one(x):
        return torch.dropout(x[torch.randperm(4)], 0.5, True)

    def f(xs):
        return torch.func.vmap(one, randomness="different")(xs)

    yield f, torch.arange(12.0).view(3, 4)
    for _ in range(3):
        yield torch.arange(12.0).view(3, 4)
    yield Seen(then=torch.rand(1))
