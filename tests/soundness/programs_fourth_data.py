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
