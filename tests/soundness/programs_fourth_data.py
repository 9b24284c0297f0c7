"""Programs of the fourth collection: values of tensors that steer Python, and shapes that change."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from tests.soundness.harness import Seen, program
from tests.soundness.world import X

DATA = "fourth: data"
SHAPES = "fourth: shapes"


def numbers(*shape, start=0.0):
    """Counts up from ``start``, in that shape."""
    return torch.arange(start, start + math.prod(shape)).view(shape)


@program(DATA)
def a_gradient_is_clipped_by_its_norm():
    def f(g, limit):
        norm = g.norm()
        if norm > limit:
            g = g * (limit / norm)
        return g, norm.item()

    yield f, X(), 1.0
    yield X() * 0.1, 1.0
    yield X() * 0.1, 0.1
    yield X() * 7, 1.0


@program(DATA)
def a_step_that_overflowed_is_skipped():
    class Scaler:
        def __init__(self):
            self.scale, self.good = 8.0, 0

        def step(self, p, g):
            g = g / self.scale
            if not torch.isfinite(g).all():
                self.scale, self.good = self.scale / 2, 0
                return False
            p.sub_(g)
            self.good += 1
            if self.good == 2:
                self.scale, self.good = self.scale * 2, 0
            return True

    scaler, p = Scaler(), torch.zeros(4)
    bad = torch.tensor([1.0, float("inf"), 0.0, 0.0])
    yield scaler.step, p, X()
    for g in (X(1.0), bad, X(), X(), bad, X(2.0)):
        yield p, g
        yield Seen(p=p, scale=scaler.scale, good=scaler.good)


@program(DATA)
def layers_are_dropped_by_chance():
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

        def forward(self, x):
            used = 0
            for layer in self.layers:
                if self.training and torch.rand(()) < 0.5:
                    continue
                x = layer(x)
                used += 1
            return x.sum(), used

    model = Stack()
    loss, _ = yield model, X()
    if loss.requires_grad:
        loss.backward()
    yield Seen(grads=[p.grad for p in model.parameters()])
    for _ in range(5):
        loss, _ = yield X()
        if loss.requires_grad:
            loss.backward()
        yield Seen(grads=[p.grad for p in model.parameters()])
    model.eval()
    yield X()


@program(DATA)
def experts_take_the_tokens_that_chose_them():
    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(4, 3)
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            weights, chosen = torch.topk(self.gate(x).softmax(-1), 2)
            out = torch.zeros_like(x)
            for i, expert in enumerate(self.experts):
                rows, slot = torch.where(chosen == i)
                if rows.numel() == 0:
                    continue
                out.index_add_(0, rows, expert(x[rows]) * weights[rows, slot, None])
            return out

    torch.manual_seed(1)
    model = Mixture()
    for i in range(4):
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(i))
        y = yield (model, x) if i == 0 else x
        y.square().sum().backward()
        yield Seen(grads=[p.grad for p in model.parameters()])


@program(DATA)
def a_beam_is_searched():
    table = torch.randn(5, 5, generator=torch.Generator().manual_seed(3)).log_softmax(-1)

    def search(start, width, steps):
        beams = [(0.0, [start])]
        for _ in range(steps):
            found = []
            for score, path in beams:
                top = table[path[-1]].topk(width)
                for value, index in zip(top.values.tolist(), top.indices.tolist(), strict=True):
                    found.append((score + value, [*path, index]))
            beams = sorted(found, key=lambda b: -b[0])[:width]
        return beams

    yield search, 0, 2, 3
    yield 1, 2, 3
    yield 0, 3, 2
    table.copy_(table.flip(1).clone())
    yield 0, 2, 3


@program(DATA)
def a_classifier_leaves_early():
    class Early(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
            self.exits = [0, 0, 0]

        def forward(self, x):
            for i, layer in enumerate(self.layers):
                x = layer(x).tanh()
                confident = x.softmax(-1).max()
                if confident.item() > 0.4 or i == 2:
                    self.exits[i] += 1
                    return x, i

    model = Early()
    yield model, X()
    for i in range(4):
        y, _ = yield X(float(i)) * 3
        y.sum().backward()
        yield Seen(exits=model.exits, grads=[p.grad for p in model.parameters()])


@program(DATA)
def a_nucleus_is_sampled():
    def sample(logits, p):
        probs, index = logits.softmax(-1).sort(descending=True)
        keep = probs.cumsum(-1) - probs < p
        probs = probs[keep] / probs[keep].sum()
        return index[keep][torch.multinomial(probs, 1)].item(), int(keep.sum())

    torch.manual_seed(2)
    yield sample, X(), 0.9
    for i in range(5):
        yield torch.randn(4), 0.5 + i / 10
    yield Seen(then=torch.rand(1))


@program(DATA)
def boxes_are_suppressed():
    def nms(boxes, scores, limit):
        order = scores.argsort(descending=True)
        keep = []
        while order.numel() > 0:
            i = order[0]
            keep.append(i.item())
            rest = order[1:]
            low = torch.maximum(boxes[i, 0], boxes[rest, 0])
            high = torch.minimum(boxes[i, 1], boxes[rest, 1])
            over = (high - low).clamp(min=0)
            union = (boxes[i, 1] - boxes[i, 0]) + (boxes[rest, 1] - boxes[rest, 0]) - over
            order = rest[over / union <= limit]
        return keep

    g = torch.Generator().manual_seed(0)
    for i in range(5):
        low = torch.rand(4 + i % 2, generator=g)
        boxes = torch.stack([low, low + 0.3], 1)
        scores = torch.rand(4 + i % 2, generator=g)
        yield (nms, boxes, scores, 0.3) if i == 0 else (boxes, scores, 0.3)


@program(DATA)
def a_batch_is_cut_to_its_longest():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(2, 3, batch_first=True)

        def forward(self, x, lengths):
            longest = int(lengths.max())
            packed = nn.utils.rnn.pack_padded_sequence(
                x[:, :longest], lengths.tolist(), batch_first=True, enforce_sorted=False
            )
            out, _ = self.rnn(packed)
            out, _ = nn.utils.rnn.pad_packed_sequence(out, batch_first=True)
            return out

    model = Encoder()
    x = numbers(3, 5, 2) / 10
    y = yield model, x, torch.tensor([2, 4, 1])
    y.sum().backward()
    yield Seen(grads=[p.grad for p in model.parameters()])
    y = yield x, torch.tensor([5, 1, 3])
    y.sum().backward()
    yield Seen(grads=[p.grad for p in model.parameters()])
    yield x, torch.tensor([2, 4, 1])


@program(DATA)
def rows_are_bucketed_by_label():
    def f(x, labels):
        return {int(c): x[labels == c].mean(0) for c in labels.unique()}

    x = numbers(4, 2)
    yield f, x, torch.tensor([0, 1, 0, 1])
    yield x, torch.tensor([2, 2, 2, 2])
    yield x + 1, torch.tensor([0, 1, 1, 3])
    yield x + 1, torch.tensor([1, 0, 1, 0])


@program(DATA)
def hard_examples_alone_count():
    def f(x, target):
        losses = F.mse_loss(x, target, reduction="none")
        hard = losses > losses.mean()
        return losses[hard].mean() if hard.any() else losses.mean()

    for i in range(4):
        x = (X() * (i != 2)).requires_grad_()
        loss = yield (f, x, torch.ones(4) * (i - 1)) if i == 0 else (x, torch.ones(4) * (i - 1))
        loss.backward()
        yield Seen(grad=x.grad)


@program(DATA)
def an_assertion_on_values_fails_at_the_second_call():
    def f(x):
        assert (x >= 0).all(), f"negative: {x.min().item()}"
        return x.sqrt()

    yield f, torch.ones(4)
    yield torch.ones(4) * 2
    yield -torch.ones(4)
    yield torch.ones(4)
    yield torch.tensor([1.0, float("nan"), 1.0, 1.0])


@program(DATA)
def newton_iterates_until_it_converges():
    def root(a):
        x, steps = a.clone(), 0
        while (x * x - a).abs().max() > 1e-3:
            x = (x + a / x) / 2
            steps += 1
        return x, steps

    yield root, torch.tensor([2.0, 3.0])
    yield torch.tensor([100.0, 3.0])
    yield torch.tensor([1.0, 1.0])
    a = torch.tensor([5.0, 6.0], requires_grad=True)
    y, _ = yield a
    y.sum().backward()
    yield Seen(grad=a.grad)


@program(DATA)
def the_index_of_a_tensor_picks_a_layer():
    layers = [nn.Linear(4, 2), nn.Linear(4, 3), nn.Identity()]

    def f(x, which):
        return layers[which](x)

    yield f, X(), torch.tensor(0)
    yield X(), torch.tensor(2)
    yield X(), torch.tensor(1)
    yield X(), torch.tensor(0)
    yield X(), torch.tensor(3)


@program(DATA)
def a_tensor_bounds_a_range():
    def f(x, n):
        for i in range(n):
            x = x + i
        return x

    yield f, X(), torch.tensor(3)
    yield X(), torch.tensor(0)
    yield X(), torch.tensor(5)
    yield X(), 2


@program(DATA)
def a_loop_goes_over_the_rows_of_a_tensor():
    def f(rows):
        best = None
        for row in rows:
            if best is None or row.sum() > best.sum():
                best = row
        return best * 2

    yield f, numbers(3, 2)
    yield numbers(3, 2).flip(0)
    yield numbers(5, 2)
    yield numbers(0, 2)


@program(DATA)
def the_keys_of_a_dict_come_from_a_tensor():
    table = {0: 1.0, 1: 2.0, 2: 4.0}

    def f(x, ids):
        return torch.stack([x * table[i] for i in ids.tolist()])

    yield f, X(), torch.tensor([0, 1])
    yield X(), torch.tensor([2, 1])
    table[2] = -1.0
    yield X(), torch.tensor([2, 1])
    yield X(), torch.tensor([3, 1])
    yield X(), torch.tensor([0, 1])


@program(DATA)
def a_straight_through_step_with_a_branch():
    def f(x):
        hard = (x > 0).float()
        if hard.sum() == 0:
            hard = torch.ones_like(x)
        return hard + x - x.detach()

    for start in (-1.5, -9.0, 3.0, -1.5):
        x = X(start, grad=True)
        y = yield (f, x) if start == -1.5 and x.requires_grad and not hasattr(f, "begun") else x
        f.begun = True
        (y * y).sum().backward()
        yield Seen(grad=x.grad)


@program(DATA)
def a_histogram_by_hand():
    def f(x):
        counts = [0] * 3
        for v in x.tolist():
            counts[min(2, max(0, int(v)))] += 1
        return torch.tensor(counts), x.max().item() if x.numel() else None

    yield f, X()
    yield X(1.0)
    yield torch.empty(0)


@program(DATA)
def patience_runs_out():
    class Stopper:
        def __init__(self):
            self.best, self.bad = math.inf, 0

        def __call__(self, loss):
            if loss < self.best:
                self.best, self.bad = loss, 0
            else:
                self.bad += 1
            return self.bad >= 2

    stopper = Stopper()
    yield stopper, torch.tensor(3.0)
    for v in (2.0, 2.5, 2.2, 1.0):
        yield torch.tensor(v)
        yield Seen(best=stopper.best, bad=stopper.bad)


@program(DATA)
def equal_tensors_take_the_short_way():
    def f(a, b):
        if torch.equal(a, b):
            return a
        if torch.allclose(a, b, atol=0.5):
            return (a + b) / 2
        return a - b

    yield f, X(), X()
    yield X(), X() + 0.1
    yield X(), X() + 9
    same = X(2.0)
    yield same, same
    yield X(), torch.ones(2)


@program(DATA)
def padding_is_stripped_by_a_mask():
    def f(tokens, pad):
        mask = tokens != pad
        rows = [row[keep] for row, keep in zip(tokens, mask, strict=True)]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1), mask.sum(1).tolist()

    yield f, torch.tensor([[1, 2, 0], [3, 0, 0]]), 0
    yield torch.tensor([[1, 2, 5], [3, 0, 0]]), 0
    yield torch.tensor([[1, 2, 5], [3, 0, 0]]), 3
    yield torch.tensor([[0, 0, 0], [3, 0, 0]]), 0


@program(DATA)
def a_masked_write_then_a_branch_on_it():
    def f(x):
        y = x.clone()
        y[y < 0] = 0
        if y.sum() > 3:
            y /= y.sum()
        return y, bool((y == 0).any())

    yield f, X()
    yield X(0.5)
    yield X(-9.0)
    yield X(9.0)


@program(SHAPES)
def the_last_batch_is_smaller():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    data = torch.randn(10, 4)
    for epoch in range(2):
        for i in range(0, 10, 4):
            x = data[i : i + 4]
            y = yield (model, x) if epoch == i == 0 else x
            y.square().mean().backward()
            yield Seen(state=model.state_dict(), grads=[p.grad for p in model.parameters()])
    yield data[:1]  # batch norm refuses


@program(SHAPES)
def a_size_of_one_broadcasts():
    def f(x, mask):
        return (x.masked_fill(mask, 0.0)).sum(0), x.shape[0] * mask.shape[0]

    yield f, numbers(3, 4), torch.ones(3, 4) > 0
    yield numbers(3, 4), torch.tensor([[True, False, True, False]])
    yield numbers(1, 4), torch.tensor([[True, False, True, False]])
    yield numbers(3, 4), torch.zeros(1, 1) > 0
    yield numbers(5, 4), torch.ones(5, 1) > 0
    yield numbers(5, 4), torch.ones(4, 1) > 0  # does not broadcast


@program(SHAPES)
def an_empty_batch_arrives():
    lin = nn.Linear(3, 2)

    def f(x):
        y = lin(x)
        if len(x) == 0:
            return y.sum() * 0
        return y.mean()

    loss = yield f, numbers(2, 3)
    loss.backward()
    loss = yield numbers(0, 3)
    loss.backward()
    yield Seen(grad=lin.weight.grad)
    loss = yield numbers(1, 3)
    loss.backward()
    yield Seen(grad=lin.weight.grad)


@program(SHAPES)
def patches_are_cut_with_padding_to_a_multiple():
    def f(image, size):
        h, w = image.shape[-2:]
        image = F.pad(image, (0, -w % size, 0, -h % size))
        b, c, h, w = image.shape
        return image.view(b, c, h // size, size, w // size, size).permute(0, 2, 4, 1, 3, 5).flatten(3)

    yield f, numbers(1, 1, 4, 4), 2
    yield numbers(1, 1, 5, 4), 2
    yield numbers(1, 1, 5, 7), 2
    yield numbers(1, 1, 5, 7), 3
    yield numbers(2, 1, 6, 6), 3


@program(SHAPES)
def a_window_slides_over_what_there_is():
    def f(x, window, hop):
        frames = []
        for start in range(0, max(1, x.shape[-1] - window + 1), hop):
            frame = x[start : start + window]
            if frame.shape[0] < window:
                frame = F.pad(frame, (0, window - frame.shape[0]))
            frames.append(frame)
        return torch.stack(frames)

    yield f, numbers(8), 4, 2
    yield numbers(9), 4, 2
    yield numbers(3), 4, 2
    yield numbers(12), 4, 3
    yield numbers(12), 5, 3


@program(SHAPES)
def heads_are_split_by_a_number_of_the_config():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = 2
            self.qkv = nn.Linear(8, 24)

        def forward(self, x):
            b, t, c = x.shape
            q, k, v = (z.view(b, t, self.heads, c // self.heads).transpose(1, 2) for z in self.qkv(x).split(c, -1))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=t > 1)
            return y.transpose(1, 2).reshape(b, t, c)

    model = Attention()
    yield model, numbers(1, 3, 8) / 24
    with torch.no_grad():
        yield numbers(2, 5, 8) / 80
        yield numbers(2, 6, 8) / 80
        yield numbers(2, 1, 8) / 80
        model.heads = 4
        yield numbers(2, 6, 8) / 80
        yield numbers(3, 7, 8) / 80
    y = yield numbers(3, 7, 8) / 80
    y.sum().backward()
    yield Seen(grad=model.qkv.weight.grad)


@program(SHAPES)
def relative_positions_are_computed_from_sizes():
    bias = nn.Embedding(9, 2)

    def f(q, k):
        i, j = torch.arange(q.shape[0]), torch.arange(k.shape[0])
        distance = (j[None] - i[:, None]).clamp(-4, 4) + 4
        return (q @ k.T) / math.sqrt(q.shape[1]) + bias(distance).mean(-1)

    with torch.no_grad():
        yield f, numbers(3, 2), numbers(4, 2)
        yield numbers(5, 2), numbers(4, 2)
        yield numbers(5, 2), numbers(9, 2)
        yield numbers(1, 2), numbers(9, 2)
        yield numbers(7, 3), numbers(2, 3)
    y = yield numbers(5, 2), numbers(9, 2)
    y.sum().backward()
    yield Seen(grad=bias.weight.grad)


@program(SHAPES)
def an_int_argument_rolls_and_cuts():
    def f(x, k):
        return torch.roll(x, k)[: max(1, k)], x.unfold(0, 2, k + 1), x.sum() / (k + 1)

    for k in (1, 2, 3, 0, 5, 2):
        yield (f, numbers(8), k) if k == 1 else (numbers(8), k)


@program(SHAPES)
def a_convolution_meets_other_images():
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(2), nn.Flatten())

    def f(x):
        y = net(x)
        scale = x.shape[-1] / x.shape[-2]
        return y * scale

    with torch.no_grad():
        yield f, numbers(1, 1, 8, 8) / 64
        yield numbers(2, 1, 8, 12) / 64
        yield numbers(1, 1, 9, 7) / 64
        yield numbers(3, 1, 12, 8) / 64
    y = yield numbers(2, 1, 6, 8) / 64
    y.sum().backward()
    yield Seen(grad=net[0].weight.grad)


@program(SHAPES)
def a_ragged_list_of_tensors_is_joined():
    def f(parts):
        sizes = [p.shape[0] for p in parts]
        joined = torch.cat(parts)
        offsets = [sum(sizes[:i]) for i in range(len(sizes))]
        return joined * len(parts), offsets, max(sizes) - min(sizes)

    yield f, [numbers(2), numbers(3)]
    yield [numbers(4), numbers(3)]
    yield [numbers(4), numbers(3), numbers(1)]
    yield [numbers(5), numbers(6)]
    yield [numbers(0), numbers(6)]


@program(SHAPES)
def the_shape_is_compared_with_the_last_ones():
    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.shape, self.grid = None, None

        def forward(self, x):
            if self.shape != x.shape:
                self.shape = x.shape
                self.grid = torch.linspace(-1, 1, x.numel()).view(x.shape)
            return x + self.grid

    model = Cached()
    yield model, X()
    yield torch.ones(4)
    yield torch.ones(2, 3)
    yield torch.ones(2, 3)
    yield torch.ones(4)
    yield Seen(shape=tuple(model.shape), grid=model.grid)


ALIASES = "fourth: aliases"


@program(DATA)
def pythons_max_and_sorted_over_tensors():
    def f(xs):
        best = max(xs, key=lambda t: t.norm())
        order = sorted(range(len(xs)), key=lambda i: xs[i].sum().item())
        return best * 2, order, min(t.max() for t in xs)

    yield f, [X(), X(2.0), X(-4.0)]
    yield [X(9.0), X(2.0), X(-4.0)]
    yield [X(9.0), X(2.0), X(-40.0)]
    yield [X(0.0)]
    yield []


@program(DATA)
def a_tensor_in_a_list_of_tensors():
    def f(x, xs):
        return x.sum() in [y.sum() for y in xs], 3 in x, x + 1

    yield f, X(0.0), [X(), X(0.0)]
    yield X(0.0), [X()]
    yield X(1.5), [X(1.5)]
    yield X(3.0), [X(3.0)]


@program(DATA)
def a_number_of_a_tensor_is_kept_and_used_at_the_next_call():
    class Norm:
        last = 1.0

        def __call__(self, x):
            y = x / self.last
            self.last = float(x.abs().max())
            return y

    norm = Norm()
    yield norm, X()
    for i in range(5):
        yield X(float(i))
        yield Seen(last=norm.last)
    norm.last = 2.0
    yield X()


@program(DATA)
def sections_are_split_by_lengths_of_a_tensor():
    def f(x, lengths):
        parts = x.split(lengths.tolist())
        return torch.stack([p.sum() for p in parts]), x.repeat_interleave(torch.ones(len(x), dtype=torch.long) * 2)

    yield f, numbers(6), torch.tensor([2, 4])
    yield numbers(6), torch.tensor([3, 3])
    yield numbers(6), torch.tensor([1, 2, 3])
    yield numbers(6), torch.tensor([1, 2])  # do not add up
    x = numbers(6).requires_grad_()
    y, _ = yield x, torch.tensor([5, 1])
    y.prod().backward()
    yield Seen(grad=x.grad)


@program(DATA)
def math_functions_of_values():
    def f(x):
        n = math.ceil(x.abs().max()) + round(x.sum().item(), 1)
        return x * math.exp(-n) + math.floor(x[0]), n, f"{x.mean().item():.3f}", divmod(int(x[-1]), 2)

    yield f, X()
    yield X(1.25)
    yield X(-3.0)
    yield torch.tensor([float("nan"), 1.0])


@program(DATA)
def numpy_takes_over_for_a_moment():
    def f(x):
        a = x.detach().numpy()
        best = int(a.argmax())
        return x[best] * 2, float(a.std())

    yield f, X()
    yield X().flip(0)
    yield X(3.0)


@program(DATA)
def a_quantile_decides_what_is_pruned():
    class Pruned(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 4)
            self.register_buffer("mask", torch.ones(4, 4))
            self.rate = 0.5

        def prune(self):
            k = int(self.rate * self.lin.weight.numel())
            limit = self.lin.weight.detach().abs().flatten().kthvalue(max(1, k)).values
            self.mask = (self.lin.weight.detach().abs() > limit).float()

        def forward(self, x):
            if self.mask.sum() > 8:
                self.prune()
            return F.linear(x, self.lin.weight * self.mask, self.lin.bias)

    model = Pruned()
    y = yield model, X()
    y.sum().backward()
    yield Seen(mask=model.mask, grad=model.lin.weight.grad)
    yield X(1.0)
    model.mask = torch.ones(4, 4)
    model.rate = 0.9
    y = yield X(1.0)
    y.sum().backward()
    yield Seen(mask=model.mask, grad=model.lin.weight.grad)


@program(DATA)
def scheduled_sampling_flips_a_coin_per_step():
    cell, head = nn.GRUCell(3, 4), nn.Linear(4, 3)

    def f(xs, p):
        h, out, x = torch.zeros(1, 4), [], xs[0]
        for t in range(1, len(xs)):
            h = cell(x, h)
            y = head(h)
            out.append(y)
            x = xs[t] if torch.rand(1).item() < p else y.detach()
        return torch.cat(out).square().sum()

    xs = torch.randn(4, 1, 3)
    for i, p in enumerate((0.5, 0.5, 1.0, 0.0)):
        loss = yield (f, xs, p) if i == 0 else (xs, p)
        loss.backward()
        yield Seen(grad=cell.weight_ih.grad, head=head.weight.grad, then=torch.rand(1))


@program(DATA)
def targets_that_are_ignored_shorten_the_loss():
    def f(logits, target):
        keep = target != -100
        if not keep.any():
            return logits.sum() * 0.0
        return F.cross_entropy(logits[keep], target[keep])

    torch.manual_seed(0)
    for i, t in enumerate(([1, -100, 0], [2, 1, 0], [-100, -100, -100], [-100, 1, -100])):
        logits = torch.randn(3, 3, requires_grad=True)
        loss = yield (f, logits, torch.tensor(t)) if i == 0 else (logits, torch.tensor(t))
        loss.backward()
        yield Seen(grad=logits.grad)


@program(DATA)
def a_connected_component_is_flooded():
    def f(grid, start):
        seen = torch.zeros_like(grid, dtype=torch.bool)
        stack = [start]
        while stack:
            i, j = stack.pop()
            if not (0 <= i < grid.shape[0] and 0 <= j < grid.shape[1]) or seen[i, j] or grid[i, j] == 0:
                continue
            seen[i, j] = True
            stack += [(i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)]
        return seen, int(seen.sum())

    yield f, torch.tensor([[1, 1], [0, 1]]), (0, 0)
    yield torch.tensor([[1, 0], [0, 1]]), (0, 0)
    yield torch.tensor([[1, 0], [0, 1]]), (1, 1)
    yield torch.tensor([[0, 0], [0, 1]]), (0, 1)


@program(DATA)
def matching_by_hungarian_like_greed():
    def f(cost):
        pairs, cost = [], cost.clone()
        for _ in range(min(cost.shape)):
            at = int(cost.argmin())
            i, j = divmod(at, cost.shape[1])
            pairs.append((i, j))
            cost[i], cost[:, j] = float("inf"), float("inf")
        return pairs, cost

    g = torch.Generator().manual_seed(2)
    yield f, torch.rand(2, 3, generator=g)
    for shape in ((2, 3), (3, 2), (1, 4), (2, 2)):
        yield torch.rand(*shape, generator=g)


@program(DATA)
def more_than_sixteen_branches_in_training():
    lin = nn.Linear(4, 4)

    def f(x):
        n = int(x.sum())
        return (lin(x) * n).sum() if n % 3 else lin(x).relu().sum()

    for i in range(20):
        loss = yield (f, X()) if i == 0 else X(float(i))
        loss.backward()
    yield Seen(grad=lin.weight.grad)


@program(DATA)
def a_view_of_values_then_a_write_by_mask():
    def f(x):
        y = x.view(2, -1)
        rows = (y.sum(1) > 0).nonzero().flatten()
        y[rows] *= 2
        for r in rows.tolist():
            y[r, 0] = -1
        return y, len(rows)

    x = X(0.5)
    yield f, x
    yield Seen(x=x)
    for start in (-2.0, -9.0, 1.0):
        x = X(start)
        yield x
        yield Seen(x=x)


@program(DATA)
def a_float_of_the_graph_then_a_gradient():
    def f(x, w):
        scale = w.norm().item()
        loss = (x * w).sum() / scale
        if loss.item() > 1:
            loss = loss.log()
        return loss

    for i in range(4):
        w = X(float(i) - 1, grad=True)
        loss = yield (f, X(1.0), w) if i == 0 else (X(1.0), w)
        loss.backward()
        yield Seen(grad=w.grad)


@program(DATA)
def bits_of_an_int_tensor_choose_the_blocks():
    blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def f(x, gates):
        for i, block in enumerate(blocks):
            if (gates >> i) & 1:
                x = block(x)
        return x.sum()

    for i, g in enumerate((5, 2, 0, 7, 5)):
        loss = yield (f, X(), torch.tensor(g)) if i == 0 else (X(), torch.tensor(g))
        if loss.requires_grad:
            loss.backward()
        yield Seen(grads=[b.weight.grad for b in blocks])


@program(DATA)
def a_tensor_indexes_a_slice_and_a_string():
    names = ["a", "b", "c"]

    def f(x, start, stop):
        return x[start:stop], names[start], "x" * stop, x[..., :stop].sum(), tuple(range(start, stop))

    yield f, X(), torch.tensor(0), torch.tensor(2)
    yield X(), torch.tensor(1), torch.tensor(3)
    yield X(), torch.tensor(2), torch.tensor(2)
    yield X(), 1, 4


# ---- what shares memory, strides, and what tensors say of themselves ----


@program(ALIASES)
def the_same_tensor_twice_is_written():
    def f(a, b):
        a.add_(1)
        return a * b

    x = X()
    yield f, X(), X()
    yield x, x
    yield Seen(x=x)
    yield x, x[:]
    yield Seen(x=x)
    yield x.view(2, 2), x.view(2, 2).t()
    yield Seen(x=x)


@program(ALIASES)
def windows_overlap_when_written():
    def f(a, b):
        a.copy_(b * 2)
        b.mul_(-1)
        return a + b

    x = numbers(6)
    yield f, x[:3], x[3:]
    yield Seen(x=x)
    yield x[:4], x[2:]
    yield Seen(x=x)
    yield x[:3], x[3:]
    yield Seen(x=x)


@program(ALIASES)
def is_and_data_ptr_of_arguments():
    def f(q, k, v):
        if q is k and k is v:
            return q * 3
        if k is v:
            return q + k * 2
        return q + k + v

    x, y = X(), X(1.0)
    yield f, x, x, x
    yield x, y, y
    yield x, y, x
    yield y, y, y
    yield x, x.view(-1), x


@program(ALIASES)
def contiguity_and_strides_decide():
    def f(x):
        if not x.is_contiguous():
            return x.contiguous().view(-1) * 2, x.stride()
        return x.view(-1), x.stride()

    yield f, numbers(2, 3)
    yield numbers(3, 2).t()
    yield numbers(2, 3, start=1)
    yield numbers(2, 6)[:, ::2]
    yield numbers(1, 3).expand(2, 3)
    yield numbers(4, 2).t()


@program(ALIASES)
def layouts_come_back_as_they_were():
    def f(x):
        y = F.relu(x)
        z = x + x.mean()
        return y, z, (y.stride(), z.stride(), torch.empty_like(x).stride(), (x * 2).stride())

    yield f, numbers(1, 2, 3, 4)
    y, z, _ = yield numbers(1, 2, 3, 4).contiguous(memory_format=torch.channels_last)
    yield Seen(s=(y.stride(), z.stride()))
    y, z, _ = yield numbers(4, 3, 2, 1).permute(3, 2, 1, 0)
    yield Seen(s=(y.stride(), z.stride()))


@program(ALIASES)
def what_requires_grad_steers():
    def f(x, w):
        if w.requires_grad:
            return (x * w).sum(), w.is_leaf, x.grad_fn is None
        return (x + w).sum(), w.is_leaf, x.grad_fn is None

    yield f, X(), X()
    loss, *_ = yield X(), X(grad=True)
    loss.backward()
    loss, *_ = yield X(grad=True) * 2, X(grad=True)
    loss.backward()
    loss, *_ = yield X(grad=True) * 2, X(grad=True) * 1
    loss.backward()
    with torch.no_grad():
        yield X(grad=True) * 2, X(grad=True)
    yield X(grad=True), X()


@program(ALIASES)
def dtypes_and_the_default_dtype():
    def f(x):
        scale = torch.tensor(0.5)
        return x * scale, x + 1.5, torch.zeros(2), torch.finfo(x.dtype).eps if x.is_floating_point() else 0, x / 2

    yield f, X()
    yield X().double()
    yield X().to(torch.bfloat16)
    yield torch.arange(4)
    torch.set_default_dtype(torch.float64)
    try:
        yield X()
        yield torch.arange(4)
    finally:
        torch.set_default_dtype(torch.float32)
    yield torch.arange(4)
    yield torch.tensor([True, False])


@program(ALIASES)
def detach_shares_and_clone_does_not():
    def f(x):
        a, b = x.detach(), x.clone()
        a[0] = 7
        return b, x * 2, a

    x = X()
    a = (yield f, x)[2]
    a[1] = 9
    yield Seen(x=x)
    a = (yield x)[2]
    a[2] = 11
    yield Seen(x=x)


@program(ALIASES)
def data_of_a_parameter_is_exchanged():
    lin = nn.Linear(4, 2)
    yield lin, X()
    lin.weight.data = torch.ones(2, 4)
    yield X()
    lin.weight.data = torch.ones(2, 4) * 2
    lin.bias.data = torch.zeros(2)
    y = yield X()
    y.sum().backward()
    yield Seen(grad=lin.weight.grad)
    lin.weight.data = lin.weight.data.t().contiguous().t()
    yield X()
    lin.half()
    lin.float()
    yield X()
    lin.weight.requires_grad_(False)
    yield X()


@program(ALIASES)
def tied_weights_are_untied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.embed(ids)).logsumexp(-1).sum()

    model = Tied()
    loss = yield model, torch.tensor([1, 2])
    loss.backward()
    yield Seen(grad=model.embed.weight.grad)
    model.head.weight = nn.Parameter(model.embed.weight.detach().clone() * 2)
    model.zero_grad()
    loss = yield torch.tensor([1, 2])
    loss.backward()
    yield Seen(grads=[model.embed.weight.grad, model.head.weight.grad])
    model.embed.weight = model.head.weight
    model.zero_grad()
    loss = yield torch.tensor([0, 2])
    loss.backward()
    yield Seen(grads=[p.grad for p in model.parameters()])


@program(SHAPES)
def shape_arithmetic_that_depends_on_parity():
    def f(x):
        n = x.shape[-1]
        half = n // 2
        if n % 2:
            mid, x = x[half], torch.cat([x[:half], x[half + 1 :]])
        else:
            mid = x.new_zeros(())
        return x[:half] * x[half:].flip(0), mid, (n + 3) & ~3, n**2 - half

    for n in (4, 5, 6, 7, 1, 2, 9, 8, 0, 11):
        yield (f, numbers(n)) if n == 4 else numbers(n)


@program(SHAPES)
def two_sizes_that_happen_to_be_equal():
    def f(a, b):
        if a.shape[0] == b.shape[0]:
            return (a[:, None] * b[None]).sum(0)
        return a.sum() + b

    yield f, numbers(3), numbers(3)
    yield numbers(4), numbers(4)
    yield numbers(5), numbers(4)
    yield numbers(4), numbers(5)
    yield numbers(6), numbers(6)
    yield numbers(2), numbers(1)


@program(SHAPES)
def a_square_matrix_need_not_be():
    def f(x, y):
        return x @ y, x.shape[0] * y.shape[1], torch.eye(x.shape[0], y.shape[1]) + 1

    yield f, numbers(3, 3), numbers(3, 3)
    yield numbers(4, 4), numbers(4, 4)
    yield numbers(2, 5), numbers(5, 3)
    yield numbers(5, 5), numbers(5, 5)
    yield numbers(5, 2), numbers(3, 5)  # does not fit


@program(SHAPES)
def reshape_with_minus_one_and_remainders():
    def f(x, groups):
        n = x.numel() - x.numel() % groups
        return x.flatten()[:n].reshape(groups, -1).mean(1), x.reshape(-1, x.shape[-1]).shape

    yield f, numbers(2, 6), 3
    yield numbers(3, 5), 3
    yield numbers(3, 5), 4
    yield numbers(4, 5), 4
    yield numbers(1, 2), 4  # an empty mean
    yield numbers(4, 7), 4


@program(SHAPES)
def running_a_long_sequence_in_chunks():
    lin = nn.Linear(2, 2)

    def f(x, size):
        out = []
        for i in range(0, x.shape[0], size):
            chunk = x[i : i + size]
            out.append(lin(chunk) if chunk.shape[0] == size else lin(chunk) * 0)
        return torch.cat(out)

    with torch.no_grad():
        for n, size in ((4, 2), (5, 2), (6, 2), (7, 3), (8, 3), (1, 3)):
            yield (f, numbers(n, 2), size) if n == 4 else (numbers(n, 2), size)


@program(SHAPES)
def rank_changes_with_the_input():
    def f(x):
        unbatched = x.dim() == 1
        if unbatched:
            x = x[None]
        y = F.layer_norm(x, x.shape[-1:])
        return y[0] if unbatched else y

    yield f, numbers(4)
    yield numbers(2, 4)
    yield numbers(2, 3, 4)
    yield numbers(5)
    yield numbers(3, 5)
    yield torch.tensor(1.0)  # has no dimension


@program(SHAPES)
def a_size_enters_the_result_as_a_float():
    def f(x):
        n = float(x.shape[0])
        return x / n, n * 0.5, math.log2(n) if n else 0.0, torch.full((len(x),), n), len(x) / len(x.shape)

    for n in (4, 5, 6, 7, 8, 0, 1):
        yield (f, numbers(n)) if n == 4 else numbers(n)


@program(SHAPES)
def interpolation_by_the_size_of_another():
    def f(x, y):
        up = F.interpolate(x, size=y.shape[-2:], mode="bilinear", align_corners=False)
        return torch.cat([up, y], 1), F.interpolate(x, scale_factor=2)

    with torch.no_grad():
        yield f, numbers(1, 1, 2, 2), numbers(1, 2, 4, 4)
        yield numbers(1, 1, 2, 3), numbers(1, 2, 5, 4)
        yield numbers(2, 1, 3, 3), numbers(2, 2, 6, 7)
    x = numbers(1, 1, 3, 2).requires_grad_()
    y, z = yield x, numbers(1, 1, 4, 4)
    (y.sum() + z.sum()).backward()
    yield Seen(grad=x.grad)
