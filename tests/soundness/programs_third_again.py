"""What the other programs of this kind came across, from other sides: functions with a backward, methods of objects in
C, functions put in others' places, results and arrays that share memory."""

from __future__ import annotations

import bisect
import collections
import functools
import heapq
import operator
import types
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tests.soundness.harness import Seen, program

CATEGORY = "third: again"

X = torch.linspace(-2, 2, 12).reshape(3, 4)


def leaf(scale=1.0):
    return (X * scale).clone().requires_grad_()


@program(CATEGORY)
def a_backward_that_reads_an_object_in_ctx():
    settings = types.SimpleNamespace(limit=1.0)

    class Clip(torch.autograd.Function):
        @staticmethod
        def forward(ctx, v, s):
            ctx.limit = s.limit
            ctx.mark_non_differentiable()
            return v.clone()

        @staticmethod
        def backward(ctx, g):
            return g.clamp(-ctx.limit, ctx.limit), None

    p = leaf()
    out = yield lambda v: (Clip.apply(v, settings) * v.detach() * 3).sum(), p
    out.backward()
    yield Seen(p=p)
    settings.limit = 0.5
    out = yield p
    out.backward()
    yield Seen(p=p)


@program(CATEGORY)
def a_forward_that_counts_and_setup_context():
    class Scaled(torch.autograd.Function):
        count = 0

        @staticmethod
        def forward(v, k):
            Scaled.count += 1
            return v * k, v.sum()

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.k = inputs[1]
            ctx.save_for_backward(output[0])

        @staticmethod
        def backward(ctx, g, s):
            (out,) = ctx.saved_tensors
            return g * ctx.k + s * out, None

    def f(v, k):
        a, b = Scaled.apply(v, k)
        return a.sum() + b * Scaled.count

    p = leaf()
    out = yield f, p, 2.0
    out.backward()
    yield Seen(p=p, n=Scaled.count)
    out = yield p, 2.0
    out.backward()
    yield Seen(p=p, n=Scaled.count)
    yield X, 2.0
    yield Seen(n=Scaled.count)


@program(CATEGORY)
def a_backward_with_a_random_mask():
    class Noisy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, v):
            return v * 1

        @staticmethod
        def backward(ctx, g):
            return g * (torch.rand_like(g) > 0.5)

    p = leaf()
    for i in range(3):
        out = yield (lambda v: Noisy.apply(v).sum(), p) if i == 0 else (p,)
        r = torch.rand(1)
        out.backward()
        yield Seen(p=p, r=r, s=torch.rand(1))


@program(CATEGORY)
def backward_hooks_that_count_on_modules_and_tensors():
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    norms, calls = [], collections.Counter()
    model[0].weight.register_hook(lambda g: norms.append(g.norm().item()))
    model[2].register_full_backward_pre_hook(lambda m, g: calls.update(["pre"]))
    for i in range(3):
        out = yield (model, X + i) if i == 0 else (X + i,)
        yield Seen(n=norms, c=dict(calls))
        out.sum().backward()
        yield Seen(n=norms, c=dict(calls), m=model)


@program(CATEGORY)
def post_accumulate_hooks_step_the_optimizer():
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    opts = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

    def step(p):
        opts[p].step()
        opts[p].zero_grad()

    handles = [p.register_post_accumulate_grad_hook(step) for p in model.parameters()]
    for i in range(3):
        out = yield (model, X) if i == 0 else (X,)
        out.square().sum().backward()
        yield Seen(m=model)
        if i == 1:
            handles[0].remove()


@program(CATEGORY)
def bound_methods_of_containers_as_variables():
    table, order, seen = {"scale": 2.0}, collections.deque(maxlen=3), set()
    look, push, note = table.get, order.append, seen.add

    def f(v, k):
        push(k)
        note(k)
        return v * look("scale", 0.0) + look(k, 1.0), len(order), sorted(seen)

    yield f, X, "a"
    table["scale"] = 3.0
    yield X, "b"
    table["a"] = 10.0
    yield X, "a"
    order.clear()
    del table["scale"]
    yield X, "c"
    yield Seen(o=order, s=seen)


@program(CATEGORY)
def methods_of_tensors_as_variables():
    w = X.clone()
    times, add = w.mul, w.add_

    def f(v):
        out = times(v)
        add(1)
        return out

    yield f, X
    yield Seen(w=w)
    yield X
    w.zero_()
    yield X
    yield Seen(w=w)


@program(CATEGORY)
def a_heap_and_a_sorted_list_of_scores():
    heap, scores = [], []

    def f(v, name):
        heapq.heappush(heap, (v.shape[0], name))
        bisect.insort(scores, v.shape[1])
        if len(heap) > 2:
            heapq.heappop(heap)
        return v * heap[0][0], list(scores)

    yield f, X, "a"
    yield X.t(), "b"
    yield X[:1], "c"
    yield Seen(h=heap, s=scores)
    heap.clear()
    yield X, "d"
    yield Seen(h=heap, s=scores)


@program(CATEGORY)
def getters_of_the_operator_module():
    config = types.SimpleNamespace(scale=2.0, inner=types.SimpleNamespace(shift=1.0))
    get = operator.attrgetter("scale", "inner.shift")
    second = operator.itemgetter(1)
    items = [1.0, 2.0]

    def f(v):
        scale, shift = get(config)
        return v * scale + shift + second(items)

    yield f, X
    config.inner.shift = 5.0
    yield X
    items[1] = 7.0
    yield X
    config.inner = types.SimpleNamespace(shift=-1.0)
    yield X


@program(CATEGORY)
def tensor_methods_patched():
    old, k = torch.Tensor.relu, 2.0
    torch.Tensor.relu = lambda self: self * k
    try:
        yield lambda v: v.relu(), X
        k = 3.0
        yield X
        torch.Tensor.relu = old
        yield X
    finally:
        torch.Tensor.relu = old


@program(CATEGORY)
def a_new_method_on_tensors():
    k = 2.0

    def scaled(self):
        return self * k

    torch.Tensor.third_scaled = scaled
    try:
        yield lambda v: v.third_scaled(), X
        k = 3.0
        yield X
        torch.Tensor.third_scaled = lambda self: self
        yield X
    finally:
        del torch.Tensor.third_scaled
    yield X


@program(CATEGORY)
def a_forward_of_a_torch_class_patched():
    old, k = nn.Linear.forward, 2.0
    lin = nn.Linear(4, 3)
    try:
        yield lin, X
        nn.Linear.forward = lambda self, v: old(self, v) * k
        yield X
        k = 3.0
        out = yield X
        out.sum().backward()
        yield Seen(lin=lin)
    finally:
        nn.Linear.forward = old
    yield X


@program(CATEGORY)
def mocks_in_place_of_functions():
    with mock.patch.object(F, "gelu", side_effect=lambda v: v * 2) as m:
        yield lambda v: F.gelu(v), X
        yield Seen(n=m.call_count)
        m.side_effect = lambda v: v * 3
        yield X
        yield Seen(n=m.call_count)
    yield X


@program(CATEGORY)
def an_activation_registry_of_partials():
    registry = {"leaky": functools.partial(F.leaky_relu, negative_slope=0.1), "relu": F.relu}

    class Model(nn.Module):
        def __init__(self, act):
            super().__init__()
            self.act = registry[act]
            self.name = act

        def forward(self, v):
            return self.act(v) + registry[self.name](v)

    model = Model("leaky")
    yield model, X
    registry["leaky"] = functools.partial(F.leaky_relu, negative_slope=0.5)
    yield X
    model.name = "relu"
    yield X
    model.act.keywords["negative_slope"] = 0.9
    yield X


@program(CATEGORY)
def a_sequence_and_its_last_step():
    rnn = nn.GRU(4, 4)

    def f(v):
        out, _ = rnn(v)
        return out, out[-1], out.mean(0)

    out = yield f, X
    (out[0].sum() + out[1].square().sum()).backward()
    yield Seen(r=rnn)
    out = yield X + 1
    (out[1].sum() * out[2].sum()).backward()
    yield Seen(r=rnn)
    with torch.no_grad():
        yield X


@program(CATEGORY)
def hidden_states_collected_as_views():
    model = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])

    class Output(dict):
        pass

    def f(v):
        states = [v]
        for layer in model:
            v = layer(v).relu()
            states.append(v)
        return Output(last=v, pooled=v[0], states=tuple(states), flat=v.view(-1))

    out = yield f, X
    (out["last"].sum() + out["pooled"].exp().sum() + out["flat"][::2].sum() + out["states"][1].sum()).backward()
    yield Seen(m=model)
    p = leaf()
    out = yield p
    out["flat"].square().sum().backward()
    yield Seen(m=model, p=p)


@program(CATEGORY)
def arrays_and_tensors_in_a_replay_memory():
    class Memory:
        def __init__(self):
            self.rewards = np.zeros(4, dtype=np.float32)
            self.states = torch.zeros(4, 4)
            self.at = 0

        def push(self, state, reward):
            self.states[self.at] = state
            self.rewards[self.at] = reward
            self.at = (self.at + 1) % 4

    memory = Memory()

    def f(v, r):
        memory.push(v.mean(0), r)
        return memory.states.sum(0) * torch.from_numpy(memory.rewards).sum()

    yield f, X, 1.0
    yield X + 1, 2.0
    yield Seen(s=memory.states, r=memory.rewards.tolist(), at=memory.at)
    memory.rewards[:] = 1
    yield X, 3.0
    yield Seen(s=memory.states, r=memory.rewards.tolist(), at=memory.at)


@program(CATEGORY)
def a_tensor_that_is_the_memory_of_a_bytearray():
    raw = bytearray(16)
    t = torch.frombuffer(raw, dtype=torch.float32)

    def f(v):
        t.copy_(v[0])
        return t * 2, sum(raw) > 0

    yield f, X
    raw[:] = bytes(16)
    yield X
    yield X * 0
    yield Seen(t=t, raw=list(raw))


@program(CATEGORY)
def an_array_and_its_tensor_as_arguments():
    a = np.zeros(4, dtype=np.float32)
    t = torch.from_numpy(a)

    def f(arr, ten, v):
        ten.add_(v[2])
        return ten * float(arr[3])

    yield f, a, t, X
    yield a, t, X
    yield Seen(a=a.tolist(), t=t)
    a[:] = 0
    yield a, t, X


@program(CATEGORY)
def a_views_base_kept_in_state_and_written():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 4)
            self.kept = None

        def forward(self, v):
            h = self.lin(v)
            self.kept = h
            return h[0]

    model = Model()
    out = yield model, X
    (out.sum() + model.kept.square().sum()).backward()
    yield Seen(m=model.lin)
    with torch.no_grad():
        out = yield X
        model.kept.zero_()
    yield Seen(o=out)


@program(CATEGORY)
def writes_to_results_without_gradients():
    def f(v):
        a = v * 2
        return a, a[1:], a.view(-1)

    out = yield f, X
    out[1].fill_(7)
    out[2][0] = -1
    yield Seen(out=out)
    with torch.no_grad():
        out = yield leaf()
        out[0].zero_()
        yield Seen(out=out)
    out = yield leaf().detach()
    out[0].add_(1)
    yield Seen(out=out)
