"""Grad modes, autocast, backward passes inside, hooks, checkpoints, training loops, composition."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import thunder
from tests.soundness.harness import Seen, program

MODES = "third: grad modes and autocast"
COMPOSED = "third: composition"

X = torch.linspace(-2, 2, 12).reshape(3, 4)


def leaf(scale=1.0):
    return (X * scale).clone().requires_grad_()


def layers(*sizes):
    g = torch.Generator().manual_seed(7)
    model = nn.Sequential()
    for a, b in itertools.pairwise(sizes):
        model.append(nn.Linear(a, b))
        model.append(nn.Tanh())
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.3)
    return model


@program(MODES)
def grad_enabled_inside_no_grad():
    def f(v):
        with torch.no_grad():
            a = v * 2
            with torch.enable_grad():
                b = v * 3
            c = a + b
        return a, b, c, torch.is_grad_enabled()

    p = leaf()
    out = yield f, p
    out[1].sum().backward()
    yield Seen(p=p)
    with torch.no_grad():
        out = yield p
    out[1].sum().backward()
    yield Seen(p=p)
    with torch.inference_mode():
        yield p
    yield X


@program(MODES)
def inference_mode_around_and_inside():
    def f(v, inside):
        with torch.inference_mode(inside):
            a = v * 2
        return a, a.is_inference(), a.requires_grad, torch.is_inference_mode_enabled()

    p = leaf()
    yield f, p, True
    yield p, False
    with torch.inference_mode():
        made = X * 1
        yield p, False
    yield made, False
    yield made, True
    yield p, True


@program(MODES)
def set_grad_enabled_by_a_flag():
    def f(v, train):
        with torch.set_grad_enabled(train):
            h = v.sin()
        torch.set_grad_enabled(True)
        return h * 2, h.requires_grad

    p = leaf()
    out = yield f, p, True
    out[0].sum().backward()
    yield Seen(p=p)
    yield p, False
    with torch.no_grad():
        yield p, False
        yield Seen(g=torch.is_grad_enabled())
    torch.set_grad_enabled(True)
    yield p, True


@program(MODES)
def autocast_around_and_inside_again():
    lin = nn.Linear(4, 3)

    def f(v, inside):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            h = lin(v)
        return h, h.dtype, torch.is_autocast_enabled("cpu")

    out = yield f, X, True
    out[0].sum().backward()
    yield Seen(lin=lin)
    yield X, False
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yield X, False
        yield X, True
    yield X, True
    with torch.autocast("cpu", dtype=torch.float16):
        yield X, True


@program(MODES)
def checkpointed_blocks():
    model = layers(4, 6, 4)
    on = True

    def f(v):
        h = checkpoint(model, v, use_reentrant=False) if on else model(v)
        return F.dropout(h, 0.5).sum()

    p = leaf()
    out = yield f, p
    out.backward()
    yield Seen(p=p, model=model)
    out = yield p
    out.backward()
    yield Seen(p=p, model=model)
    on = False
    out = yield p
    out.backward()
    yield Seen(p=p, model=model)


@program(MODES)
def checkpoint_with_dropout_inside():
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 2), nn.Dropout(0.2))

    def f(v):
        return checkpoint_sequential(model, 2, v, use_reentrant=False).square().sum()

    p = leaf()
    out = yield f, p
    out.backward()
    yield Seen(p=p, model=model, r=torch.rand(2))
    out = yield p
    out.backward()
    yield Seen(p=p, model=model, r=torch.rand(2))


@program(MODES)
def a_gradient_penalty():
    model = layers(4, 6, 1)

    def f(v):
        v = v.detach().requires_grad_()
        out = model(v).sum()
        (g,) = torch.autograd.grad(out, v, create_graph=True)
        return out + (g.norm(dim=-1) - 1).square().mean()

    out = yield f, X
    out.backward()
    yield Seen(model=model)
    with torch.no_grad():
        model[0].weight.mul_(2)
    out = yield X * 2
    out.backward()
    yield Seen(model=model)
    with torch.no_grad():
        yield X  # an error: nothing to differentiate


@program(MODES)
def a_custom_function_with_state():
    class Clip(torch.autograd.Function):
        limit = 0.5
        calls = 0

        @staticmethod
        def forward(ctx, v, k):
            ctx.save_for_backward(v)
            ctx.k = k
            return v * k

        @staticmethod
        def backward(ctx, g):
            Clip.calls += 1
            (v,) = ctx.saved_tensors
            return (g * ctx.k + v).clamp(-Clip.limit, Clip.limit), None

    def f(v, k):
        return Clip.apply(v * 1, k).sum()

    p = leaf()
    out = yield f, p, 2.0
    out.backward()
    yield Seen(p=p, c=Clip.calls)
    Clip.limit = 5.0
    out = yield p, 2.0
    out.backward()
    yield Seen(p=p, c=Clip.calls)
    out = yield p, -1.0
    out.backward()
    yield Seen(p=p, c=Clip.calls)


@program(MODES)
def a_backward_that_prints_and_keeps_its_gradients():
    kept, total = [], torch.zeros(())

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, v):
            return v * 2

        @staticmethod
        def backward(ctx, g):
            kept.append(g.sum())
            total.add_(g.abs().sum())
            return g * 3

    p = leaf()
    out = yield lambda v: Watched.apply(v).sum(), p
    yield Seen(n=len(kept), total=total)
    out.backward()
    yield Seen(p=p, kept=kept, total=total)
    out = yield p
    kept.clear()
    out.backward()
    yield Seen(p=p, kept=kept, total=total)


@program(MODES)
def a_backward_that_writes_to_a_tensor_outside():
    total = torch.zeros(())

    class Summed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, v):
            return v * 2

        @staticmethod
        def backward(ctx, g):
            total.add_(g.abs().sum())
            return g * 3

    p = leaf()
    for i in range(3):
        out = yield (lambda v: Summed.apply(v).sum(), p) if i == 0 else (p,)
        out.backward()
        yield Seen(p=p, total=total)


@program(MODES)
def straight_through_and_gradient_reversal():
    class Reverse(torch.autograd.Function):
        @staticmethod
        def forward(ctx, v, lam):
            ctx.lam = lam
            return v.view_as(v)

        @staticmethod
        def backward(ctx, g):
            return -ctx.lam * g, None

    lam = 1.0

    def f(v):
        q = v + (v.round() - v).detach()
        return (Reverse.apply(q, lam) * v).sum()

    p = leaf()
    out = yield f, p
    out.backward()
    yield Seen(p=p)
    lam = 0.25
    out = yield p
    out.backward()
    yield Seen(p=p)
    yield X


@program(MODES)
def backward_twice_through_one_result():
    def f(v):
        return (v.exp() * v).sum()

    p = leaf()
    out = yield f, p
    out.backward(retain_graph=True)
    out.backward()
    yield Seen(p=p)
    error = ""
    try:
        out.backward()
    except RuntimeError as e:
        error = type(e).__name__
    yield Seen(p=p, told=error)
    out = yield p
    (g,) = torch.autograd.grad(out, p, create_graph=True)
    g.square().sum().backward()
    yield Seen(p=p)
    out = yield p
    yield Seen(h=torch.autograd.grad(out, p, grad_outputs=torch.tensor(3.0)))


@program(MODES)
def tensor_hooks_inside_and_outside():
    seen = []
    factor = 2.0

    def f(v):
        h = v * 3
        if h.requires_grad:
            h.register_hook(lambda g: seen.append(float(g.sum())) or g * factor)
        return h.sin().sum()

    p = leaf()
    out = yield f, p
    out.backward()
    yield Seen(p=p, seen=seen)
    factor = -1.0
    handle = p.register_hook(lambda g: g + 1)
    out = yield p
    out.backward()
    yield Seen(p=p, seen=seen)
    handle.remove()
    out = yield p
    out.backward()
    yield Seen(p=p, seen=seen)


@program(MODES)
def a_loss_detached_by_a_flag_on_self():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = layers(4, 4), layers(4, 2)
            self.detach = False

        def forward(self, v):
            h = self.body(v)
            return self.head(h.detach() if self.detach else h)

    model = Model()
    out = yield model, X
    out.sum().backward()
    yield Seen(m=model)
    model.detach = True
    model.zero_grad()
    out = yield X
    out.sum().backward()
    yield Seen(m=model)
    model.body.requires_grad_(False)
    model.detach = False
    out = yield leaf()
    out.sum().backward()
    yield Seen(m=model)


@program(MODES)
def anomaly_and_saved_tensor_hooks():
    packed = []

    def f(v):
        return (v.sin() * v.exp()).sum()

    p = leaf()
    out = yield f, p
    out.backward()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t.clone(), lambda t: t):
        out = yield p
    out.backward()
    yield Seen(p=p, any=bool(packed))
    with torch.autograd.detect_anomaly(check_nan=True):
        out = yield p
        out.backward()
    yield Seen(p=p)


@program(MODES)
def partial_gradients_and_unused_inputs():
    def f(a, b, use):
        return (a.sin() + b if use else a.sin() + b.detach()).sum()

    p, q = leaf(), leaf(2)
    out = yield f, p, q, True
    out.backward(inputs=[p])
    yield Seen(p=p, q=q)
    out = yield p, q, False
    yield Seen(g=torch.autograd.grad(out, (p, q), allow_unused=True))
    out = yield p, q, True
    out.backward(inputs=[q])
    yield Seen(p=p, q=q)


@program(MODES)
def matmul_precision_and_deterministic_flags():
    def f(v):
        a = torch.get_float32_matmul_precision()
        return v @ v.mT, a, torch.are_deterministic_algorithms_enabled(), torch.get_num_threads() > 0

    yield f, X
    torch.set_float32_matmul_precision("high")
    try:
        yield X
    finally:
        torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(True)
    try:
        yield X
    finally:
        torch.use_deterministic_algorithms(False)
    yield X


# Composition.


@program(COMPOSED)
def a_sequential_with_a_jitted_part():
    body = layers(4, 6, 6)
    model = nn.Sequential(thunder.jit(body), nn.Linear(6, 2))
    out = yield model, X
    out.sum().backward()
    yield Seen(b=[p.grad for p in body.parameters()])
    with torch.no_grad():
        body[0].weight.zero_()
    out = yield X
    out.sum().backward()
    yield Seen(b=[p.grad for p in body.parameters()])
    body[1] = nn.ReLU()
    yield X


@program(COMPOSED)
def a_jitted_helper_inside():
    scale = 2.0

    @thunder.jit
    def helper(v):
        return v * scale

    def f(v):
        return helper(v) + helper(v + 1)

    p = leaf()
    out = yield f, p
    out.sum().backward()
    yield Seen(p=p)
    scale = 3.0
    out = yield p
    out.sum().backward()
    yield Seen(p=p)
    yield X


@program(COMPOSED)
def per_sample_gradients_with_vmap():
    model = layers(4, 3, 1)

    def f(v):
        params = {k: p.detach() for k, p in model.named_parameters()}

        def loss(params, row):
            return torch.func.functional_call(model, params, (row[None],)).square().sum()

        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, v)

    yield f, X
    yield X + 1
    with torch.no_grad():
        model[0].weight.mul_(2)
    yield X
    model[1] = nn.ReLU()
    yield X


@program(COMPOSED)
def functional_calls_with_other_weights():
    model = layers(4, 3)

    def f(params, v):
        return torch.func.functional_call(model, params, (v,))

    w = {k: p.detach().clone().requires_grad_() for k, p in model.named_parameters()}
    out = yield f, w, X
    out.sum().backward()
    yield Seen(w=w, m=model)
    half = {"0.weight": w["0.weight"]}
    out = yield half, X
    out.sum().backward()
    yield Seen(w=w, m=model)
    yield {"0.weight": torch.zeros(5, 4), "0.bias": torch.ones(5)}, X
    model[1] = nn.Identity()
    yield w, X


@program(COMPOSED)
def jacobians_and_hessian_products():
    k = 2.0

    def f(v):
        g = lambda t: (t**3).sum() * k  # noqa: E731
        return torch.func.jacrev(torch.sin)(v[0]), torch.func.hessian(g)(v[0]), torch.func.jvp(g, (v,), (v,))[1]

    yield f, X
    k = 3.0
    yield X
    yield X + 1


@program(COMPOSED)
def a_training_step_with_adam_and_a_schedule():
    model = layers(4, 6, 1)
    opt = torch.optim.Adam(model.parameters(), lr=0.1)
    sched = torch.optim.lr_scheduler.StepLR(opt, 2, gamma=0.5)
    for i in range(4):
        loss = (yield (model, X + i) if i == 0 else (X + i,)).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        sched.step()
        yield Seen(m=model.state_dict(), lr=opt.param_groups[0]["lr"])


@program(COMPOSED)
def a_whole_step_compiled():
    model = layers(4, 6, 1)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step(v):
        opt.zero_grad()
        loss = model(v).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        opt.step()
        return loss.detach()

    yield step, X
    yield X + 1
    yield Seen(m=model)
    opt.param_groups[0]["lr"] = 0.01
    yield X
    yield Seen(m=model, s=opt.state_dict())
    model[2].requires_grad_(False)
    yield X
    yield Seen(m=model)


@program(COMPOSED)
def gradients_accumulated_over_micro_batches():
    model = layers(4, 6, 1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    opt = torch.optim.AdamW(model.parameters(), lr=0.01)
    first = True
    for i in range(4):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=i % 2 == 1):
            out = yield (model, X + i) if first else (X + i,)
        first = False
        scaler.scale(out.float().square().mean() / 2).backward()
        if i % 2:
            scaler.unscale_(opt)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(opt)
            scaler.update()
            opt.zero_grad(set_to_none=i == 1)
            yield Seen(norm=norm)
        yield Seen(m=model)


@program(COMPOSED)
def an_average_of_weights_next_to_the_model():
    model = layers(4, 3)
    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))

    def f(v):
        return model(v), ema(v)

    out = yield f, X
    for _ in range(2):
        out[0].sum().backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
        ema.update_parameters(model)
        out = yield X
        yield Seen(e=ema.state_dict())
    yield X


@program(COMPOSED)
def batches_of_a_data_loader():
    from torch.utils.data import DataLoader, TensorDataset

    model = layers(4, 2)
    loader = DataLoader(TensorDataset(torch.randn(7, 4), torch.arange(7)), batch_size=3)

    def epoch(scale):
        total = 0.0
        for batch, label in loader:
            total += float(model(batch * scale).sum()) + int(label[0])
        return total

    yield epoch, 1.0
    yield (2.0,)
    loader.dataset.tensors[0].zero_()
    yield (2.0,)


@program(COMPOSED)
def a_jitted_module_copied():
    model = layers(4, 3)
    compiled = thunder.jit(model)

    def f(v):
        return compiled(v)

    yield f, X
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model[0].weight.zero_()
    yield X
    compiled = thunder.jit(twin)
    yield X
    yield Seen(same=list(twin.state_dict()))


@program(COMPOSED)
def functions_composed_by_reduce_and_decorators():
    log = []

    def logged(g):
        @functools.wraps(g)
        def inner(*a, **k):
            log.append(g.__name__)
            return g(*a, **k)

        return inner

    @logged
    def double(v, k=2):
        return v * k

    @logged
    def shift(v):
        return v + 1

    stages = [double, shift]

    def f(v):
        return functools.reduce(lambda acc, g: g(acc), stages, v)

    yield f, X
    yield Seen(log=log)
    stages.append(double)
    yield X
    yield Seen(log=log)
    stages[0] = functools.partial(double, k=-1)
    yield X
    yield Seen(log=log)


@program(COMPOSED)
def an_exit_stack_of_modes():
    modes = [torch.no_grad]

    def f(v):
        with contextlib.ExitStack() as stack:
            for m in modes:
                stack.enter_context(m())
            out = v * 2
        return out, out.requires_grad

    p = leaf()
    yield f, p
    modes.append(torch.enable_grad)
    out = yield p
    out[0].sum().backward()
    yield Seen(p=p)
    modes.clear()
    out = yield p
    out[0].sum().backward()
    yield Seen(p=p)


@program(COMPOSED)
def lstm_and_attention_modules():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(4, 4, batch_first=True, num_layers=2, dropout=0.3)
            self.att = nn.MultiheadAttention(4, 2, batch_first=True, dropout=0.1)
            self.state = None

        def forward(self, v):
            h, self.state = self.rnn(v, self.state)
            self.state = tuple(s.detach() for s in self.state)
            return self.att(h, h, h, need_weights=True)

    model = Model()
    out = yield model, X[None]
    out[0].sum().backward()
    yield Seen(m=model)
    yield X[None]
    model.eval()
    yield X[None]
    model.state = None
    yield X[None].expand(2, 3, 4)
    yield Seen(s=model.state)
