"""Small programs of modules whose parameters, buffers, hooks, modes and parts change between calls."""

from __future__ import annotations

import collections
import copy
import types

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from tests.soundness.harness import Seen, program
from tests.soundness.world import backward


def rows(n=3, width=4, start=-2.0, grad=False):
    """A batch of different numbers."""
    return (torch.arange(float(n * width)).reshape(n, width) / 3 + start).requires_grad_(grad)


# ---- parameters and buffers ----


@program("fourth: modules")
def bias_dropped_and_given_back():
    layer = nn.Linear(4, 2)
    yield layer, rows()
    kept = layer.bias
    layer.bias = None
    yield rows()
    layer.bias = kept
    with torch.no_grad():
        kept.add_(1)
    out = yield rows()
    backward(out)
    yield Seen(layer=layer)


@program("fourth: modules")
def weight_whose_data_gets_another_width():
    layer = nn.Linear(4, 2, bias=False)
    yield layer, rows()
    layer.weight.data = torch.ones(2, 6)
    out = yield rows(width=6)
    backward(out)
    yield Seen(weight=layer.weight)
    layer.weight.data = torch.ones(5, 6, dtype=torch.float64)
    layer.weight.grad = None
    yield rows(width=6).double()
    yield rows(width=6)


@program("fourth: modules")
def head_swapped_for_another_number_of_classes():
    model = nn.Sequential(collections.OrderedDict(body=nn.Linear(4, 4), act=nn.ReLU(), head=nn.Linear(4, 2)))
    yield model, rows()
    model.head = nn.Linear(4, 3)
    yield rows()
    model.body.requires_grad_(False)
    out = yield rows()
    backward(out)
    yield Seen(model=model)
    model.head = nn.Identity()
    yield rows()


@program("fourth: modules")
def weights_tied_after_the_first_step():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 4)
            self.out = nn.Linear(4, 7, bias=False)

        def forward(self, tokens):
            return self.out(self.embed(tokens))

    model = Tied()
    tokens = torch.tensor([[1, 2, 6], [0, 0, 3]])
    out = yield model, tokens
    backward(out)
    yield Seen(model=model)
    model.out.weight = model.embed.weight
    model.zero_grad()
    out = yield tokens
    backward(out)
    yield Seen(model=model)
    model.out.weight = nn.Parameter(model.embed.weight.detach().clone())
    model.zero_grad()
    out = yield tokens
    backward(out)
    yield Seen(model=model)


@program("fourth: modules")
def state_dict_assigned_instead_of_copied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    other = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    yield model, rows()
    model.load_state_dict(other.state_dict(), assign=True)
    yield rows().double()
    with torch.no_grad():
        other[0].weight.zero_()
    yield rows().double()
    yield Seen(state=model.state_dict())


@program("fourth: modules")
def buffer_registered_over_an_attribute():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", None)

        def forward(self, x):
            return x if self.mask is None else x.masked_fill(self.mask, 0.0)

    model = Masked()
    yield model, rows()
    model.register_buffer("mask", torch.tensor([True, False, False, True]))
    yield rows()
    model.mask = ~model.mask
    yield rows()
    model.mask.fill_(True)
    yield rows()
    model.mask = None
    yield rows()
    model.register_buffer("mask", torch.tensor([False, True, False, False]), persistent=False)
    yield rows()
    del model.mask
    yield rows()


@program("fourth: modules")
def running_mean_kept_by_the_module_itself():
    class Running(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(4), persistent=False)
            self.momentum, self.seen = 0.5, 0

        def forward(self, x):
            if self.training:
                with torch.no_grad():
                    self.mean.lerp_(x.mean(0), self.momentum)
                self.seen += 1
            return x - self.mean

    model = Running()
    yield model, rows()
    model.momentum = 0.25
    yield rows(start=3.0)
    yield Seen(model=model)
    model.eval()
    yield rows()
    model.train()
    model.momentum = 0.125
    yield rows(5)
    yield Seen(model=model)


@program("fourth: modules")
def running_mean_that_is_assigned():
    class Running(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(4))

        def forward(self, x):
            old = self.mean
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            return x - old

    model = Running()
    first = model.mean
    yield model, rows()
    second = model.mean
    yield rows(start=1.0)
    first.fill_(7.0)
    second.fill_(8.0)
    yield rows()
    yield Seen(model=model, first=first, second=second)


@program("fourth: modules")
def batch_norm_in_all_its_settings():
    norm = nn.BatchNorm1d(4)
    yield norm, rows()
    norm.momentum = None
    yield rows(start=1.0)
    yield rows(5)
    yield Seen(norm=norm)
    norm.track_running_stats = False
    yield rows()
    norm.eval()
    yield rows()
    norm.running_mean = norm.running_var = None
    yield rows()
    yield Seen(norm=norm)


@program("fourth: modules")
def frozen_batch_norm_in_a_model_that_trains():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)

        def train(self, mode=True):
            super().train(mode)
            if self.frozen:
                self.norm.eval()
            return self

        frozen = False

        def forward(self, x):
            return self.norm(self.conv(x)).relu().mean((2, 3))

    model, x = Net(), torch.arange(50.0).reshape(2, 1, 5, 5).cos()
    out = yield model, x
    backward(out)
    Net.frozen = True
    model.train()
    out = yield x
    backward(out)
    yield Seen(model=model)
    model.norm.weight.requires_grad_(False)
    model.zero_grad()
    out = yield x
    backward(out)
    yield Seen(model=model)
    Net.frozen = False
    model.train()
    yield x
    yield Seen(model=model)


@program("fourth: modules")
def half_of_a_model_in_another_dtype():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            h = self.a(x)
            return self.b(h.to(self.b.weight.dtype)).to(x.dtype)

    model = Net()
    yield model, rows()
    model.b.double()
    out = yield rows()
    backward(out)
    yield Seen(model=model)
    model.to(torch.bfloat16)
    model.zero_grad()
    yield rows().bfloat16()
    model.float()
    yield rows()


# ---- containers of modules ----


@program("fourth: modules")
def layers_inserted_and_deleted():
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            for i, layer in enumerate(self.layers):
                x = x + layer(x) * (i + 1)
            return x

    model = Stack()
    yield model, rows()
    del model.layers[0]
    yield rows()
    model.layers.insert(1, nn.Tanh())
    yield rows()
    model.layers = nn.ModuleList(reversed(list(model.layers)))
    yield rows()
    model.layers[-1] = model.layers[0]
    yield rows()
    model.layers.extend([nn.Sigmoid()])
    yield rows()


@program("fourth: modules")
def heads_of_a_module_dict_chosen_by_name():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = nn.ModuleDict({"a": nn.Linear(4, 1), "b": nn.Linear(4, 2)})
            self.active = ["a"]

        def forward(self, x):
            return {name: self.heads[name](x) for name in self.active}

    model = Heads()
    yield model, rows()
    model.active.append("b")
    yield rows()
    model.heads["c"] = nn.Linear(4, 3)
    model.active = ("c", "a")
    yield rows()
    model.heads.pop("a")
    yield rows()
    model.active = []
    yield rows()
    model.heads.update({"a": nn.Identity()})
    model.active = sorted(model.heads)
    yield rows()


@program("fourth: modules")
def parameter_list_and_dict_that_grow():
    class Prompts(nn.Module):
        def __init__(self):
            super().__init__()
            self.prompts = nn.ParameterList([torch.ones(4)])
            self.scales = nn.ParameterDict({"x": torch.tensor(2.0)})

        def forward(self, x):
            for prompt in self.prompts:
                x = torch.cat([x, prompt[None]])
            for key, scale in self.scales.items():
                x = x * scale + len(key)
            return x

    model = Prompts()
    out = yield model, rows()
    backward(out)
    model.prompts.append(torch.zeros(4))
    out = yield rows()
    backward(out)
    yield Seen(model=model)
    model.scales["longer"] = nn.Parameter(torch.tensor(0.5))
    out = yield rows()
    backward(out)
    yield Seen(model=model)
    del model.scales["x"]
    model.prompts[0] = nn.Parameter(torch.full((4,), 3.0), requires_grad=False)
    yield rows()


@program("fourth: modules")
def sequential_that_is_sliced_and_appended():
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU())

    def f(x, depth=None):
        return model[:depth](x)

    yield f, rows()
    model.append(nn.LayerNorm(4))
    yield rows()
    yield rows(), -1
    model[2] = nn.LayerNorm(4, eps=0.5)
    yield rows()
    model[2].eps = 5.0
    yield rows()
    model.pop(0)
    yield rows()


@program("fourth: modules")
def layer_dropped_by_a_probability_attribute():
    class Drop(nn.Module):
        def __init__(self):
            super().__init__()
            self.p, self.drop, self.layer = 0.0, nn.Dropout(0.5), nn.Linear(4, 4)

        def forward(self, x):
            if self.p > 0 and self.training:
                return x
            return self.drop(self.layer(x))

    model = Drop()
    yield model, rows()
    model.drop.p = 0.9
    yield rows()
    model.p = 0.3
    yield rows()
    model.eval()
    yield rows()
    model.drop.train()
    yield rows()
    model.drop.p = 0.0
    yield rows()


# ---- hooks ----


@program("fourth: modules")
def features_collected_by_hooks():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    features = {}

    def keep(name):
        def hook(module, args, output):
            features[name] = output.detach()

        return hook

    handles = [m.register_forward_hook(keep(n)) for n, m in model.named_children()]
    yield model, rows()
    yield Seen(features=features)
    handles[0].remove()
    features.clear()
    yield rows(start=1.0)
    yield Seen(features=features)
    handles.append(model.register_forward_pre_hook(lambda m, args: (args[0] * 2,)))
    yield rows()
    yield Seen(features=features)
    for handle in handles:
        handle.remove()
    yield rows()


@program("fourth: modules")
def steering_vector_added_by_a_hook():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    steer = types.SimpleNamespace(vector=torch.ones(4), strength=1.0)
    handle = model[0].register_forward_hook(lambda m, args, out: out + steer.strength * steer.vector)
    yield model, rows()
    steer.strength = -2.0
    yield rows()
    steer.vector.mul_(3)
    yield rows()
    steer.vector = torch.zeros(4)
    yield rows()
    handle.remove()
    yield rows()


@program("fourth: modules")
def hooks_with_keyword_arguments_and_always_called():
    class Attend(nn.Module):
        def forward(self, x, *, mask=None, scale=1.0):
            return x * scale if mask is None else (x * scale).masked_fill(mask, 0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend = Attend()

        def forward(self, x, mask=None):
            return self.attend(x, mask=mask)

    model, log = Net(), []
    change = {"scale": 3.0}
    model.attend.register_forward_pre_hook(lambda m, a, k: (a, k | change), with_kwargs=True)
    model.attend.register_forward_hook(
        lambda m, a, k, out: log.append((sorted(k), out.shape)), with_kwargs=True, always_call=True
    )
    yield model, rows()
    yield rows(), torch.tensor([True, False, False, False])
    change["scale"] = 4.0
    yield rows(5)
    yield Seen(log=log)
    change["factor"] = 1
    yield rows()
    yield Seen(log=log)


@program("fourth: modules")
def global_hooks_come_and_go():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    seen = []
    yield model, rows()
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: seen.append(type(m).__name__))
    try:
        yield rows()
        yield rows()
    finally:
        handle.remove()
    yield Seen(seen=seen)
    yield rows()
    handle = nn.modules.module.register_module_forward_pre_hook(lambda m, args: (args[0] + 1,))
    try:
        yield rows()
    finally:
        handle.remove()
    yield rows()
    yield Seen(seen=seen)


@program("fourth: modules")
def backward_hooks_that_scale_and_record():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    norms, config = [], types.SimpleNamespace(scale=1.0)

    def hook(module, grad_input, grad_output):
        norms.append(grad_output[0].norm())
        return (grad_input[0] * 2,)

    handle = model[1].register_full_backward_hook(hook)
    out = yield model, rows()
    backward(out)
    yield Seen(model=model, norms=norms)
    out = yield rows(start=0.5)
    backward(out)
    yield Seen(model=model, norms=norms)
    handle.remove()
    model.zero_grad()
    out = yield rows()
    backward(out)
    yield Seen(model=model, norms=norms, config=config)


@program("fourth: modules")
def hook_on_a_parameter_between_calls():
    model = nn.Linear(4, 2)
    out = yield model, rows()
    backward(out)
    handle = model.weight.register_hook(lambda g: g.clamp(-0.5, 0.5))
    model.zero_grad()
    out = yield rows()
    backward(out)
    yield Seen(model=model)
    handle.remove()
    steps = []
    model.weight.register_post_accumulate_grad_hook(lambda p: steps.append(p.grad.sum()))
    out = yield rows()
    backward(out)
    yield Seen(model=model, steps=steps)


# ---- parametrizations ----


@program("fourth: modules")
def weight_norm_put_on_and_removed():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    yield model, rows()
    parametrizations.weight_norm(model[0])
    out = yield model.requires_grad_(), rows()
    backward(out)
    yield Seen(grads=[p.grad for p in model.parameters()])
    with torch.no_grad():
        model[0].parametrizations.weight.original0.mul_(2)
    yield rows()
    parametrize.remove_parametrizations(model[0], "weight")
    yield rows()


@program("fourth: modules")
def spectral_norm_iterates_in_training_only():
    layer = parametrizations.spectral_norm(nn.Linear(4, 3))
    yield layer, rows()
    yield rows()
    yield Seen(layer=dict(layer.named_buffers()))
    layer.eval()
    yield rows()
    yield Seen(layer=dict(layer.named_buffers()))
    layer.train()
    out = yield rows()
    backward(out)
    yield Seen(buffers=dict(layer.named_buffers()), parameters=dict(layer.named_parameters()))


@program("fourth: modules")
def own_parametrizations_stacked():
    class Symmetric(nn.Module):
        def forward(self, w):
            return w.triu() + w.triu(1).T

    class Scaled(nn.Module):
        factor = 1.0

        def forward(self, w):
            return w * self.factor

    layer = nn.Linear(4, 4)
    yield layer, rows()
    parametrize.register_parametrization(layer, "weight", Symmetric())
    yield rows()
    scaled = Scaled()
    parametrize.register_parametrization(layer, "weight", scaled)
    yield rows()
    scaled.factor = 0.5
    out = yield rows()
    backward(out)
    yield Seen(grads=[p.grad for p in layer.parameters()])
    layer.requires_grad_(False)
    yield rows()


@program("fourth: modules")
def parametrization_cached_over_a_call():
    layer = parametrizations.orthogonal(nn.Linear(4, 4))

    def f(x):
        with parametrize.cached():
            return layer(layer(x))

    yield f, rows()
    with torch.no_grad():
        layer.parametrizations.weight.original.add_(torch.ones(4, 4).tril())
    yield rows()


@program("fourth: modules")
def pruned_then_made_permanent():
    layer = nn.Linear(4, 3)
    yield layer, rows()
    prune.l1_unstructured(layer, "weight", amount=4)
    out = yield rows()
    backward(out)
    yield Seen(grad=layer.weight_orig.grad)
    layer.weight_mask[0].zero_()
    yield rows()
    prune.random_unstructured(layer, "bias", amount=1)
    yield rows()
    prune.remove(layer, "weight")
    yield rows()


# ---- lazy modules, copies, functional calls ----


@program("fourth: modules")
def lazy_layers_get_their_shapes():
    model = nn.Sequential(nn.LazyLinear(3), nn.ReLU(), nn.LazyBatchNorm1d())
    out = yield model, rows()
    yield rows(5)
    backward(out)
    yield Seen(state=model.state_dict(), kinds=[type(m).__name__ for m in model])
    model.eval()
    yield rows()


@program("fourth: modules")
def copied_model_stays_behind():
    model = nn.Linear(4, 2)
    box = types.SimpleNamespace(teacher=copy.deepcopy(model))

    def f(x):
        with torch.no_grad():
            target = box.teacher(x)
        return F.mse_loss(model(x), target)

    yield f, rows()
    with torch.no_grad():
        model.weight.add_(1)
    out = yield rows()
    backward(out)
    yield Seen(model=model, teacher=box.teacher)
    box.teacher = copy.deepcopy(model)
    yield rows()
    box.teacher.bias = None
    yield rows()


@program("fourth: modules")
def functional_call_with_another_set_of_weights():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    other = {k: torch.ones_like(v) for k, v in model.named_parameters()}

    def f(weights, x):
        return torch.func.functional_call(model, weights, (x,))

    yield f, other, rows()
    yield {"0.weight": torch.zeros(4, 4)}, rows()
    yield {}, rows()
    model[1] = nn.Identity()
    yield {"0.weight": torch.eye(4), "0.bias": torch.ones(4)}, rows()
    yield {"1.weight": torch.eye(4)}, rows()


@program("fourth: modules")
def adapter_merged_into_its_weight():
    class Lora(nn.Module):
        def __init__(self, base, rank=2):
            super().__init__()
            self.base = base.requires_grad_(False)
            self.down = nn.Parameter(torch.ones(rank, 4) * 0.1)
            self.up = nn.Parameter(torch.ones(2, rank))
            self.merged, self.scaling = False, 2.0

        def forward(self, x):
            out = self.base(x)
            return out if self.merged else out + x @ self.down.T @ self.up.T * self.scaling

    model = Lora(nn.Linear(4, 2))
    out = yield model, rows()
    backward(out)
    yield Seen(model=model)
    model.scaling = 0.5
    yield rows()
    model.base.weight.data += model.up.detach() @ model.down.detach() * model.scaling
    model.merged = True
    yield rows()
    model.base.requires_grad_(True)
    out = yield rows()
    backward(out)
    yield Seen(model=model)


@program("fourth: modules")
def parameters_walked_inside_forward():
    class Penalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.power = nn.Linear(4, 2), 2

        def forward(self, x):
            penalty = sum(p.abs().pow(self.power).sum() for n, p in self.named_parameters() if p.requires_grad)
            return self.layer(x).sum() + penalty

    model = Penalised()
    out = yield model, rows()
    backward(out)
    model.layer.bias.requires_grad_(False)
    out = yield rows()
    backward(out)
    yield Seen(model=model)
    model.extra = nn.Parameter(torch.ones(3))
    model.power = 1
    out = yield rows()
    backward(out)
    yield Seen(model=model)


@program("fourth: modules")
def module_found_by_its_class():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.0), nn.Linear(4, 4))

        def forward(self, x):
            found = [m for m in self.modules() if isinstance(m, nn.Linear)]
            for m in found:
                x = m(x)
            return x, len(found), next(self.parameters()).dtype

    model = Net()
    yield model, rows()
    model.parts[1] = nn.Linear(4, 4)
    yield rows()
    model.double()
    yield rows().double()
    model.parts[0].forward = lambda x: x * 2
    yield rows().double()
    del model.parts[0].forward
    yield rows().double()
