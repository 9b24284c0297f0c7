"""Modules whose state changes between calls: buffers, flags, hooks, parametrizations, tied and frozen weights."""

from __future__ import annotations

import copy
import pickle

import torch
import torch.nn.functional as F
from torch import nn

from tests.soundness.harness import Seen, program

CATEGORY = "third: modules"


def x(*shape, seed=1):
    return torch.randn(*(shape or (4, 6)), generator=torch.Generator().manual_seed(seed))


def grads(model):
    return {n: p.grad for n, p in model.named_parameters()}


@program(CATEGORY)
def a_running_mean_kept_by_hand_in_a_buffer():
    class Running(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(6))
            self.register_buffer("count", torch.tensor(0))
            self.lin = nn.Linear(6, 3)

        def forward(self, v):
            if self.training:
                with torch.no_grad():
                    self.count += 1
                    self.mean.lerp_(v.mean(0), 1.0 / self.count.item())
            return self.lin(v - self.mean)

    model = Running()
    out = yield model, x()
    out.sum().backward()
    yield Seen(model=model)
    out = yield x(seed=2)
    out.square().sum().backward()
    yield Seen(model=model)
    model.eval()
    yield x(seed=3)
    yield Seen(model=model.state_dict())
    model.train()
    model.mean.zero_()
    model.count.zero_()
    yield x(seed=4)
    yield Seen(model=model.state_dict())


@program(CATEGORY)
def a_counter_that_switches_off_warmup_noise():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.steps = 0
            self.lin = nn.Linear(6, 6)

        def forward(self, v):
            self.steps += 1
            if self.training and self.steps <= 2:
                v = v + 0.1 * torch.randn_like(v)
            return self.lin(v), self.steps

    model = Noisy()
    yield model, x()
    yield x()
    yield x()
    model.steps = 0
    yield x()
    yield Seen(steps=model.steps, state=torch.get_rng_state())


@program(CATEGORY)
def batch_norm_with_momentum_changed_then_none():
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU())
    out = yield model, x()
    out.sum().backward()
    model[1].momentum = 0.5
    out = yield x(seed=2)
    out.sum().backward()
    yield Seen(model=model)
    model[1].momentum = None
    yield x(seed=3)
    yield x(seed=4)
    yield Seen(state=model.state_dict())
    model[1].reset_running_stats()
    model.eval()
    yield x(seed=5)
    model[1].track_running_stats = False
    model[1].running_mean = None
    model[1].running_var = None
    yield x(seed=5)


@program(CATEGORY)
def spectral_norm_in_train_then_eval():
    model = nn.Sequential(torch.nn.utils.parametrizations.spectral_norm(nn.Linear(6, 5)), nn.Tanh())
    out = yield model, x()
    out.sum().backward()
    yield Seen(model=model.state_dict(), g=grads(model))
    yield x(seed=2)
    yield Seen(model=model.state_dict())
    model.eval()
    yield x(seed=3)
    yield Seen(model=model.state_dict())
    with torch.no_grad():
        model[0].parametrizations.weight.original.mul_(2)
    yield x(seed=3)
    torch.nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    yield x(seed=3)


@program(CATEGORY)
def the_old_spectral_norm_hook():
    model = torch.nn.utils.spectral_norm(nn.Linear(6, 5), n_power_iterations=2)
    out = yield model, x()
    out.sum().backward()
    yield Seen(model=model.state_dict(), g=grads(model))
    model.eval()
    yield x(seed=2)
    model.train()
    yield x(seed=3)
    yield Seen(model=model.state_dict())
    torch.nn.utils.remove_spectral_norm(model)
    yield x(seed=3)


@program(CATEGORY)
def weight_norm_then_removed():
    model = torch.nn.utils.parametrizations.weight_norm(nn.Linear(6, 5))
    out = yield model, x()
    out.sum().backward()
    yield Seen(g=grads(model))
    with torch.no_grad():
        model.parametrizations.weight.original0.mul_(3)
    yield x()
    torch.nn.utils.parametrize.remove_parametrizations(model, "weight")
    out = yield x()
    out.sum().backward()
    yield Seen(g=grads(model))


@program(CATEGORY)
def a_parametrization_registered_after_the_first_call():
    class Symmetric(nn.Module):
        def forward(self, w):
            return w.triu() + w.triu(1).mT

    model = nn.Linear(6, 6)
    yield model, x()
    torch.nn.utils.parametrize.register_parametrization(model, "weight", Symmetric())
    out = yield x()
    out.sum().backward()
    yield Seen(g=grads(model))
    with torch.nn.utils.parametrize.cached():
        yield x()
        yield x(seed=2)
    yield x(seed=3)


@program(CATEGORY)
def pruning_a_layer_between_calls():
    import torch.nn.utils.prune as prune

    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    yield model, x()
    prune.l1_unstructured(model[0], "weight", amount=0.4)
    out = yield x()
    out.sum().backward()
    yield Seen(g=grads(model))
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    yield x()
    prune.remove(model[0], "weight")
    yield x()


@program(CATEGORY)
def hooks_that_come_and_go():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    kept = []
    yield model, x()
    first = model[0].register_forward_hook(lambda m, a, out: kept.append(out.detach()))
    yield x()
    second = model[1].register_forward_hook(lambda m, a, out: out * 2)
    yield x()
    yield Seen(kept=kept)
    first.remove()
    third = model.register_forward_pre_hook(lambda m, a: (a[0] + 1,))
    yield x()
    yield Seen(kept=kept)
    second.remove()
    third.remove()
    yield x()


@program(CATEGORY)
def a_full_backward_hook_that_scales_gradients():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    seen = []
    out = yield model, x()
    out.sum().backward()

    def hook(m, gin, gout):
        seen.append(gout[0].clone())
        return (gin[0] * 0.5,) if gin[0] is not None else None

    handle = model[2].register_full_backward_hook(hook)
    out = yield x()
    out.sum().backward()
    yield Seen(g=grads(model), seen=seen)
    out = yield x(seed=2)
    out.square().sum().backward()
    yield Seen(g=grads(model), seen=seen)
    handle.remove()
    out = yield x()
    out.sum().backward()
    yield Seen(g=grads(model), seen=seen)


@program(CATEGORY)
def a_global_module_hook():
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh())
    names = []
    yield model, x()
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, o: names.append(type(m).__name__))
    yield x()
    yield Seen(names=names)
    handle.remove()
    yield x()
    yield Seen(names=names)


@program(CATEGORY)
def a_submodule_replaced_and_one_appended():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    yield model, x()
    model[1] = nn.Tanh()
    yield x()
    model.append(nn.Linear(6, 2))
    out = yield x()
    out.sum().backward()
    yield Seen(g=grads(model))
    del model[1]
    yield x()
    model[0].forward = lambda v: v * 2
    yield x()


@program(CATEGORY)
def layers_frozen_and_thawed():
    model = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 2))
    out = yield model, x()
    out.sum().backward()
    yield Seen(g=grads(model))
    model.zero_grad()
    model[0].requires_grad_(False)
    out = yield x()
    out.sum().backward()
    yield Seen(g=grads(model), rg=out.requires_grad)
    model.requires_grad_(False)
    out = yield x()
    yield Seen(rg=out.requires_grad, fn=out.grad_fn is None)
    model[2].bias.requires_grad_(True)
    out = yield x()
    out.sum().backward()
    yield Seen(g=grads(model))


@program(CATEGORY)
def the_dtype_of_a_model_changed():
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    yield model, x()
    model.double()
    out = yield x().double()
    out.sum().backward()
    yield Seen(g=grads(model))
    yield x()  # float into double: an error
    model.zero_grad()
    model.to(torch.bfloat16)
    yield x().bfloat16()
    model.float()
    yield x()


@program(CATEGORY)
def state_loaded_between_calls():
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    saved = copy.deepcopy(model.state_dict())
    out = yield model, x()
    out.sum().backward()
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(p.grad)
    yield x()
    model.load_state_dict(saved)
    yield x()
    model.load_state_dict({k: v * 2 for k, v in saved.items()}, assign=True)
    out = yield x()
    yield Seen(state=model.state_dict())


@program(CATEGORY)
def tied_weights_untied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 6)
            self.head = nn.Linear(6, 10, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, i):
            return self.head(self.embed(i).tanh())

    model = Tied()
    i = torch.tensor([[1, 2, 3], [4, 5, 9]])
    out = yield model, i
    out.sum().backward()
    yield Seen(g=grads(model))
    model.head.weight = nn.Parameter(model.embed.weight.detach().clone())
    model.zero_grad()
    out = yield i
    out.sum().backward()
    yield Seen(g=grads(model))
    model.embed.weight = model.head.weight
    model.zero_grad()
    out = yield i
    out.sum().backward()
    yield Seen(g=grads(model))


@program(CATEGORY)
def a_parameter_swapped_through_data():
    model = nn.Linear(6, 3)
    out = yield model, x()
    out.sum().backward()
    model.weight.data = torch.ones(3, 6)
    yield x()
    model.weight.data[0] = 5.0
    yield x()
    model.bias.data = torch.arange(3.0).expand(3)
    out = yield x()
    out.sum().backward()
    yield Seen(g=grads(model))
    model.weight.data = torch.ones(6, 3).t()
    yield x()


@program(CATEGORY)
def a_bias_set_to_none():
    model = nn.Linear(6, 3)
    yield model, x()
    model.bias = None
    yield x()
    model.register_parameter("bias", nn.Parameter(torch.ones(3)))
    out = yield x()
    out.sum().backward()
    yield Seen(g=grads(model))
    del model.bias
    yield x()


@program(CATEGORY)
def a_lazy_module_on_its_first_calls():
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(2))
    out = yield model, x()
    out.sum().backward()
    yield Seen(g=grads(model), kinds=[type(m).__name__ for m in model])
    yield x(seed=2)
    yield x(3, 6)


@program(CATEGORY)
def a_buffer_replaced_by_a_longer_one():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.arange(4.0)[:, None] * torch.ones(6), persistent=False)

        def forward(self, v):
            if v.shape[0] > self.table.shape[0]:
                self.table = torch.arange(float(v.shape[0]))[:, None] * torch.ones(v.shape[1])
            return v + self.table[: v.shape[0]]

    model = Positions()
    yield model, x()
    yield x(7, 6)
    yield Seen(t=model.table)
    yield x(5, 6)
    model.table.zero_()
    yield x(3, 6)
    yield x(9, 6)
    yield Seen(t=model.table)


@program(CATEGORY)
def a_module_list_iterated_in_an_order_kept_in_state():
    class Ordered(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Tanh(), nn.LayerNorm(6)])
            self.order = [0, 1, 2]

        def forward(self, v):
            for i in self.order:
                v = self.layers[i](v)
            return v

    model = Ordered()
    yield model, x()
    model.order.reverse()
    out = yield x()
    out.sum().backward()
    yield Seen(g=grads(model))
    model.order = [*model.order, 1]
    yield x()
    model.layers.insert(0, nn.Sigmoid())
    yield x()


@program(CATEGORY)
def a_moving_average_teacher_inside():
    class Byol(nn.Module):
        def __init__(self):
            super().__init__()
            self.student = nn.Linear(6, 4)
            self.teacher = copy.deepcopy(self.student).requires_grad_(False)
            self.decay = 0.5

        @torch.no_grad()
        def update(self):
            for s, t in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
                t.mul_(self.decay).add_(s, alpha=1 - self.decay)

        def forward(self, v):
            self.update()
            return F.mse_loss(self.student(v), self.teacher(v + 0.1))

    model = Byol()
    loss = yield model, x()
    loss.backward()
    yield Seen(g=grads(model), s=model.state_dict())
    with torch.no_grad():
        for p in model.student.parameters():
            p -= 0.1 * p.grad
    model.decay = 0.9
    loss = yield x(seed=2)
    loss.backward()
    yield Seen(g=grads(model), s=model.state_dict())
    yield x(seed=3)


@program(CATEGORY)
def a_module_deepcopied_and_pickled_between_calls():
    model = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5), nn.BatchNorm1d(4))
    yield model, x()
    twin = copy.deepcopy(model)
    yield Seen(twin=twin(x()))
    again = pickle.loads(pickle.dumps(model))
    again.eval()
    yield Seen(again=again(x()))
    yield x()
    yield Seen(a=model.state_dict(), b=twin.state_dict(), c=again.state_dict())


@program(CATEGORY)
def running_output_recorded_on_self():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(6, 6)
            self.last = None
            self.history = []

        def forward(self, v):
            h = self.lin(v)
            if self.last is not None and self.last.shape == h.shape:
                h = h + self.last
            self.last = h.detach()
            self.history.append(tuple(h.shape))
            return h.relu()

    model = Keeps()
    yield model, x()
    yield x()
    yield Seen(last=model.last, history=model.history)
    yield x(2, 6)
    yield Seen(last=model.last, history=model.history)
    model.last = None
    yield x(2, 6)
    yield Seen(last=model.last, history=model.history)
