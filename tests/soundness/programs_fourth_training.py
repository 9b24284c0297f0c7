"""Small programs that train: optimizers, accumulation, hooks of tensors, autograd functions, higher derivatives."""

from __future__ import annotations

import copy
import types

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import checkpoint

from tests.soundness.harness import Seen, program
from tests.soundness.programs_fourth_modules import rows
from tests.soundness.world import X, backward


def small():
    """A model with a nonlinearity."""
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))


# ---- loops ----


@program("fourth: training")
def optimizer_steps_and_schedule_between_calls():
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    def loss(x, y):
        return F.mse_loss(model(x), y)

    out = yield loss, rows(), torch.ones(3, 1)
    for i in range(3):
        optimizer.zero_grad(set_to_none=i != 1)
        out.backward()
        optimizer.step()
        schedule.step()
        yield Seen(model=model)
        out = yield rows(3 + i), torch.ones(3 + i, 1)


@program("fourth: training")
def group_of_parameters_unfrozen_later():
    model = small()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1, momentum=0.9)
    out = yield model, rows()
    backward(out)
    optimizer.step()
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.01})
    for _ in range(2):
        optimizer.zero_grad()
        out = yield rows(start=0.0)
        backward(out)
        optimizer.step()
        yield Seen(model=model)


@program("fourth: training")
def gradients_of_micro_batches_with_a_divisor():
    model = small()

    def loss(x, parts):
        return model(x).square().mean() / parts

    out = yield loss, rows(), 2
    out.backward()
    yield Seen(model=model)
    out = yield rows(start=1.0), 2
    out.backward()
    yield Seen(model=model)
    model.zero_grad(set_to_none=False)
    for i in range(3):
        out = yield rows(start=float(i)), 3
        out.backward()
    yield Seen(model=model)


@program("fourth: training")
def average_of_weights_evaluated_in_turn():
    model = small()
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    box = types.SimpleNamespace(model=model)

    def f(x):
        return box.model(x)

    out = yield f, rows()
    backward(out)
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(0.1 * p.grad)
    average.update_parameters(model)
    box.model = average
    yield rows()
    average.update_parameters(small())
    yield rows()
    box.model = average.module
    yield rows()
    box.model = model
    model.zero_grad()
    out = yield rows()
    backward(out)
    yield Seen(model=model, average=average)


@program("fourth: training")
def teacher_that_follows_inside_the_step():
    student = nn.Linear(4, 2)
    teacher = copy.deepcopy(student).requires_grad_(False)
    world = types.SimpleNamespace(momentum=0.9)

    def step(x):
        with torch.no_grad():
            for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
                t.mul_(world.momentum).add_(s, alpha=1 - world.momentum)
        return F.mse_loss(student(x), teacher(x + 1))

    for i in range(4):
        out = yield (step, rows()) if not i else rows(start=float(i))
        out.backward()
        with torch.no_grad():
            student.weight -= 0.1 * student.weight.grad
        world.momentum = 0.9 - i / 10
        yield Seen(student=student, teacher=teacher)


@program("fourth: training")
def whole_step_with_its_backward():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(x, y):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    yield step, rows(), torch.ones(3, 1)
    yield rows(), torch.zeros(3, 1)
    optimizer.param_groups[0]["lr"] = 0.01
    yield rows(), torch.zeros(3, 1)
    yield Seen(model=model)


@program("fourth: training")
def clipped_update_in_a_function_of_its_own():
    weights = [torch.ones(3), torch.arange(4.0)]
    moments = [torch.zeros(3), torch.zeros(4)]
    rates = {"lr": 0.1, "beta": 0.9, "clip": 1.0}

    @torch.no_grad()
    def update(*grads):
        norm = torch.stack([g.norm() for g in grads]).norm()
        scale = (rates["clip"] / (norm + 1e-6)).clamp(max=1.0)
        for w, m, g in zip(weights, moments, grads, strict=True):
            m.mul_(rates["beta"]).add_(g * scale)
            w.sub_(m, alpha=rates["lr"])
        return norm

    yield update, torch.ones(3), torch.ones(4)
    for i in range(4):
        rates["lr"] /= 2
        if i == 2:
            rates["clip"] = float("inf")
            weights[0] = torch.zeros(3)
        yield torch.ones(3) * i, torch.ones(4) / (i + 1)
        yield Seen(weights=weights, moments=moments)


@program("fourth: training")
def loss_weights_by_epoch():
    model = small()

    class Criterion(nn.Module):
        def __init__(self):
            super().__init__()
            self.epoch, self.weights = 0, {"fit": 1.0, "decay": 0.0}

        def forward(self, out, y):
            losses = {"fit": F.smooth_l1_loss(out, y), "decay": sum(p.square().sum() for p in model.parameters())}
            total = sum(self.weights[k] * v for k, v in losses.items() if self.weights[k])
            if self.epoch >= 2:
                total = total * 0.5
            return total, {k: v.detach() for k, v in losses.items()}

    criterion = Criterion()

    def f(x, y):
        return criterion(model(x), y)

    out = yield f, rows(), torch.ones(3, 1)
    out[0].backward()
    for epoch in range(1, 5):
        criterion.epoch = epoch
        criterion.weights["decay"] = 0.01 * epoch
        model.zero_grad()
        out = yield rows(), torch.ones(3, 1)
        out[0].backward()
        yield Seen(model=model)


# ---- what backward passes may do ----


@program("fourth: training")
def two_losses_of_one_call_backward_apart():
    model = small()

    def f(x):
        h = model[0](x)
        return h.sum(), model[2](h.tanh()).mean()

    out = yield f, rows()
    out[0].backward(retain_graph=True)
    out[1].backward(retain_graph=True)
    yield Seen(model=model)
    out[1].backward()
    yield Seen(model=model)
    out = yield rows(grad=True)
    (out[0] * out[1]).backward()
    yield Seen(model=model)


@program("fourth: training")
def gradient_penalty():
    critic = small()
    x = rows(grad=True)
    out = yield critic, x
    for _ in range(2):
        (g,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        ((g.norm(dim=1) - 1) ** 2).mean().backward()
        yield Seen(critic=critic, x=x)
        with torch.no_grad():
            critic[0].weight.mul_(1.5)
        out = yield x


@program("fourth: training")
def hessian_vector_product_through_a_call():
    w = torch.arange(1.0, 5).requires_grad_()
    scale = types.SimpleNamespace(value=1.0)

    def f(x):
        return (w.pow(3) * x).sum() * scale.value

    out = yield f, X()
    (g,) = torch.autograd.grad(out, w, create_graph=True)
    (h,) = torch.autograd.grad(g, w, torch.ones(4))
    yield Seen(g=g, h=h)
    scale.value = 2.0
    out = yield X(1.0, grad=True)
    (g,) = torch.autograd.grad(out, w, create_graph=True)
    g.square().sum().backward()
    yield Seen(g=g, w=w)


@program("fourth: training")
def gradient_only_of_inputs_asked_for():
    model = small()
    x = rows(grad=True)
    out = yield model, x
    yield Seen(g=torch.autograd.grad(out.sum(), [model[0].weight, x]))
    yield Seen(model=model, x=x)
    out = yield x
    out.sum().backward(inputs=[model[2].bias])
    yield Seen(model=model, x=x)
    out = yield x.detach()
    yield Seen(g=torch.autograd.grad(out.mean(), list(model.parameters()), allow_unused=True))


@program("fourth: training")
def gradients_of_inputs_that_do_not_matter():
    def f(a, b, c=None):
        return a * 2 + (b.detach() if c is None else b * c.detach())

    a, b, c = X(grad=True), X(1.0, grad=True), X(2.0, grad=True)
    out = yield f, a, b
    backward(out)
    yield Seen(a=a, b=b)
    out = yield a, b, c
    backward(out)
    yield Seen(a=a, b=b, c=c)
    out = yield a.detach(), b.detach(), c
    yield Seen(a=a, c=c)
    out = yield a, a, a
    backward(out)
    yield Seen(a=a)


@program("fourth: training")
def retained_gradient_of_a_result():
    model = small()
    out = yield lambda x: (model[0](x), model(x)), rows()
    out[0].retain_grad()
    (out[0].square().sum() + out[1].sum()).backward()
    yield Seen(grad=out[0].grad, model=model)
    out = yield rows(5)
    kept = []
    out[1].register_hook(lambda g: kept.append(g) or g * 10)
    out[1].sum().backward()
    yield Seen(kept=kept, model=model)


@program("fourth: training")
def hook_on_an_activation_inside():
    scale = types.SimpleNamespace(value=2.0)

    def f(x):
        h = x * 3
        if h.requires_grad:
            h.register_hook(lambda g: g * scale.value)
        return h.exp()

    x = X(grad=True)
    out = yield f, x
    backward(out)
    yield Seen(x=x)
    scale.value = -1.0
    out = yield x
    backward(out)
    yield Seen(x=x)
    yield X()


@program("fourth: training")
def leaf_that_is_made_inside():
    def f(x, train):
        prompt = torch.zeros(4, requires_grad=train)
        return x + prompt, prompt

    out = yield f, X(), True
    backward(out[0])
    yield Seen(prompt=out[1])
    out = yield X(), False
    yield Seen(prompt=out[1])
    out = yield X(1.0), True
    backward(out[0] * 2)
    yield Seen(prompt=out[1])


@program("fourth: training")
def detached_copy_and_branch():
    def f(x):
        y = x.sigmoid()
        z = y.detach()
        z.mul_(2)  # y shares its memory
        return y, z.requires_grad_()

    x = X(grad=True)
    out = yield f, x
    yield Seen(same=out[0].data_ptr() == out[1].data_ptr())
    backward(out[1].sum())
    yield Seen(leaf=out[1].is_leaf, grad=out[1].grad)
    yield X()


# ---- autograd functions and checkpoints ----


class Straight(torch.autograd.Function):
    """Rounds; the gradient passes where the input is not large."""

    limit = 1.0

    @staticmethod
    def forward(ctx, x, bits):
        ctx.save_for_backward(x)
        ctx.bits = bits
        return torch.round(x * 2**bits) / 2**bits

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (x.abs() <= Straight.limit) * ctx.bits, None


@program("fourth: training")
def straight_through_with_other_bits():
    x = torch.linspace(-2, 2, 4).requires_grad_()
    out = yield lambda x, bits: Straight.apply(x.sin() * 2, bits), x, 1
    backward(out)
    yield Seen(x=x)
    for bits in (2, 3, 4):
        x.grad = None
        out = yield x, bits
        backward(out)
        yield Seen(x=x)
    Straight.limit = 0.25
    try:
        out = yield x, 2
        backward(out)
        yield Seen(x=x)
        yield x.detach(), 2
    finally:
        Straight.limit = 1.0


@program("fourth: training")
def reversed_gradient_with_a_growing_factor():
    class Reverse(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, factor):
            ctx.factor = factor
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            return -ctx.factor * grad, None

    class Domain(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head, self.factor = nn.Linear(4, 3), nn.Linear(3, 2), 0.0

        def forward(self, x):
            return self.head(Reverse.apply(self.body(x), self.factor))

    model = Domain()
    for i in range(4):
        model.factor = i / 3
        model.zero_grad()
        out = yield (model, rows()) if not i else rows()
        backward(out)
        yield Seen(model=model)


@program("fourth: training")
def function_with_setup_context_and_several_results():
    class MinMax(torch.autograd.Function):
        @staticmethod
        def forward(x, dim):
            low, high = x.min(dim), x.max(dim)
            return low.values, high.values, high.indices

        @staticmethod
        def setup_context(ctx, inputs, output):
            x, ctx.dim = inputs
            ctx.mark_non_differentiable(output[2])
            ctx.set_materialize_grads(False)
            ctx.shape = x.shape
            ctx.save_for_backward(output[2])

        @staticmethod
        def backward(ctx, low, high, _):
            (index,) = ctx.saved_tensors
            if high is None:
                return None, None
            grad = high.new_zeros(ctx.shape)
            return grad.scatter(ctx.dim, index.unsqueeze(ctx.dim), high.unsqueeze(ctx.dim)), None

    x = rows(grad=True)
    out = yield lambda x, dim=0: MinMax.apply(x, dim), x
    out[1].sum().backward()
    yield Seen(x=x)
    out = yield x, 1
    out[0].sum().backward()
    yield Seen(x=x)
    out = yield x, 1
    (out[0].sum() + out[1].prod()).backward()
    yield Seen(x=x)


@program("fourth: training")
def checkpointing_switched_on():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.GELU()) for _ in range(2))
            self.checkpointing = False

        def forward(self, x):
            for block in self.blocks:
                if self.checkpointing and self.training:
                    x = checkpoint.checkpoint(block, x, use_reentrant=False)
                else:
                    x = block(x)
            return x

    model = Net()
    out = yield model, rows()
    backward(out)
    yield Seen(model=model)
    model.checkpointing = True
    out = yield rows()
    backward(out)
    yield Seen(model=model, after=torch.rand(2))
    model.eval()
    out = yield rows()
    backward(out)
    yield Seen(model=model)


@program("fourth: training")
def gradients_of_each_sample_with_vmap():
    model = nn.Linear(4, 1)
    weights = dict(model.named_parameters())

    def loss(w, x, y):
        return (torch.func.functional_call(model, w, (x,)) - y).square().sum()

    def f(x, y):
        plain = {k: v.detach() for k, v in weights.items()}
        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(plain, x, y)

    yield f, rows(), torch.ones(3, 1)
    with torch.no_grad():
        model.bias.add_(1)
    yield rows(), torch.ones(3, 1)
    weights = {k: torch.zeros_like(v) for k, v in weights.items()}
    yield rows(5), torch.ones(5, 1)


@program("fourth: training")
def contrastive_queue():
    class Moco(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Linear(4, 3)
            self.register_buffer("queue", F.normalize(torch.arange(18.0).reshape(3, 6).cos(), dim=0))
            self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))
            self.temperature = 0.5

        def forward(self, x):
            q = F.normalize(self.encoder(x), dim=1)
            logits = q @ self.queue.clone().detach() / self.temperature
            with torch.no_grad():
                at, n = int(self.pointer), q.shape[0]
                self.queue[:, at : at + n] = q.T
                self.pointer[0] = (at + n) % 6
            return logits.logsumexp(1).mean()

    model = Moco()
    for i in range(5):
        out = yield (model, rows()) if not i else rows(start=float(i))
        backward(out)
        yield Seen(model=model)
        model.temperature *= 0.9


@program("fourth: training")
def gradient_scaling_by_hand():
    model = small().to(torch.float64)
    scale = torch.tensor(8.0)

    def f(x):
        return model(x).float().square().mean() * scale

    out = yield f, rows().double()
    out.backward()
    for p in model.parameters():
        p.grad /= scale
    yield Seen(model=model)
    scale.mul_(2)
    out = yield rows().double()
    out.backward()
    yield Seen(model=model)
    scale = 3.0
    out = yield rows().double()
    out.backward()
    yield Seen(model=model)
