"""Writes small programs whose behaviour depends on sizes and ints in as many ways as Python and torch allow.

A program is a module with ``calls``, as the harness runs it: ``f(x, y, n)`` and 8 to 12 calls of it, with tensors of
other sizes and layouts and with other ints. After each call the arguments, the state and the layout of the results are
compared as well.
"""

from __future__ import annotations

import random

PRELUDE = '''\
import math
import types

import torch
from torch.nn import functional as F

from tests.soundness.harness import Seen

G = 1


def T(seed, a, b, form):
    """A matrix of a times b, laid out in one of several ways."""
    g = torch.Generator().manual_seed(seed)
    if form == "t":
        return torch.randn(b, a, generator=g).t()
    if form == "part":
        return torch.randn(a, 8, generator=g)[:, :b]
    if form == "step":
        return torch.randn(a, 2 * b, generator=g)[:, ::2]
    if form == "late":
        return torch.randn(a + 1, b, generator=g)[1:]
    if form == "wide":
        return torch.randn(1, b, generator=g).expand(a, b)
    return torch.randn(a, b, generator=g)


def layout(value):
    if isinstance(value, torch.Tensor):
        dense = all(size > 1 for size in value.shape)
        return (tuple(value.shape), value.stride() if dense else None, value.is_contiguous())
    if isinstance(value, (tuple, list)):
        return [layout(item) for item in value]
    if isinstance(value, dict):
        return {key: layout(item) for key, item in value.items()}
    return type(value).__name__


def rows(t):
    """Any result as a matrix."""
    return t.reshape(1, -1) if t.dim() < 2 else t.reshape(t.shape[0], -1)
'''

# Of a matrix t, other matrices a and b, ints i and j.
MATRICES = """
{t} * {i}
{t} + {i}
{i} - {t}
{t} / ({i} or 1)
{t}.abs() ** ({i} % 3)
{t}[: {i}]
{t}[{i} :]
{t}[:, : {i}]
{t}[:, -{i} :]
{t}[:: 1 + {i} % 3]
{t}[{i} % 3 : {j}]
rows({t}[{i}])
{t}.t()
{t}.t().contiguous()
{t}.contiguous()
{t}.clone()
{t} + {a}
{t} * {a}[:1]
{t} @ {a}
{t} @ {a}.t()
{t}.view(-1, {t}.shape[0])
{t}.view({t}.shape[1], -1)
{t}.reshape(-1, {i} % 3 + 1)
{t}.reshape({i}, -1)
{t}.flatten()[None]
{t}.flatten()[: {i}].reshape(1, -1)
{t}.unflatten(1, (-1, {i} % 2 + 1)).sum(-1)
{t}[:1].expand({i} % 5, -1)
{t}[:, :1].expand(-1, {i} % 9)
{t}[:1].expand_as({a})
{t}.repeat({i} % 3, 2)
{t}.narrow(0, {i} % {t}.shape[0], 1)
{t}.narrow(1, 0, {i})
F.pad({t}, ({i} % 3, 0, 0, {j} % 2))
F.pad({t}, (0, {i} % 7 - 2))
{t}.roll({i}, 0)
{t}.roll({i}, {j} % 2)
{t}.tril({i} - 2)
{t}.triu({i})
{t}.masked_fill(torch.arange({t}.shape[0])[:, None] > {i}, 0.5)
{t}.masked_fill(torch.arange({t}.shape[1]) < {i}, float(-1))
{t}.sum({i} % 2, keepdim=True)
rows({t}.mean({i} % 2))
rows({t}.sum() * {i})
{t}.softmax({i} % 2)
{t}.cumsum({i} % 2)
{t}.sort(0)[0]
{t}.topk(min({i} % 4, {t}.shape[0]), 0)[0]
{t}.gather(0, torch.arange({t}.shape[0]).flip(0)[:, None].expand({t}.shape[0], {t}.shape[1]))
torch.zeros({t}.shape[0], {t}.shape[1]).scatter(1, torch.zeros({t}.shape[0], 1, dtype=torch.long), {i})
{t}.index_select(0, torch.arange({t}.shape[0] // 2))
{t}[torch.arange(min({i} % 3, {t}.shape[0]))]
{t}[torch.arange({t}.shape[0]) % {i} == 0]
{t}.index_add(0, torch.arange({t}.shape[0]), {t})
{t}.unfold(0, {i} % 2 + 1, 1)[..., 0]
{t}.squeeze().reshape(1, -1)
rows({t}.squeeze({i} % 2) * {t}.squeeze({i} % 2).dim())
rows({t}[: {i}].squeeze() * {t}[: {i}].squeeze().ndim)
{t}[None].squeeze(0)
torch.stack({t}.unbind(0)[: {i} % 3 + 1])
torch.stack([row * k for k, row in enumerate({t})])
torch.cat({t}.chunk(2), 1)
{t}.chunk(3)[{i} % 2]
{t}.split(2)[-1]
{t}.split([{t}.shape[0] - {i} % 2, {i} % 2])[0]
{t}.tensor_split(2)[{i} % 2]
torch.cat([{t}, {a}])
torch.cat([{t}, {a}], 1)
torch.cat([{t}, {t}[: {i}]])
torch.cat([{t}.new_zeros({t}.shape[0], {i} % 3), {t}], 1)
{t} + torch.arange({t}.shape[1])
{t} * torch.arange({i}, {i} + {t}.shape[1])
{t} + torch.full(({t}.shape[1],), {i})
{t} - torch.zeros({a}.shape)
{t} + torch.eye({t}.shape[0], {t}.shape[1])
{t}.new_full(({i} % 3, 2), {j})
torch.ones({i} % 5, {t}.shape[1])
torch.linspace(0, {i}, {t}.shape[1])[None]
torch.einsum("ij,kj->ik", {t}, {a})
torch.einsum("ij->ji", {t}) * {i}
torch.outer({t}[:, 0], {t}[0])
torch.where({t} > 0, {t}, {i})
torch.where(torch.tensor({i}) > 2, {t}, -{t})
torch.clamp({t}, -{i}, {j})
torch.add({t}, {t}, alpha={i})
torch.lerp({t}, {t} * 2, {i})
F.max_pool1d({t}[None], 2)[0]
F.avg_pool1d({t}[None], {i} % 2 + 1)[0]
F.adaptive_avg_pool1d({t}[None], {i} % 3 + 1)[0]
F.interpolate({t}[None], size={i} % 4 + 1)[0]
F.conv1d({t}[:1][None], torch.ones(2, 1, {i} % 2 + 1), padding={j} % 2)[0]
F.layer_norm({t}, ({t}.shape[1],))
F.linear({t}, torch.ones({i} % 3 + 1, {t}.shape[1]))
F.dropout({t}, 0.5, True)
F.dropout({t}, 0.5, False)
F.one_hot(torch.arange({t}.shape[0]) % 3, 3) * {i}
torch.rand({t}.shape[0], 2)
torch.atleast_2d({t}.max(0)[0])
{t} * {t}.is_contiguous() + {t}.stride(0) * {t}.stride(1)
{t}[:, : {i}].contiguous() * {t}[:, : {i}].is_contiguous()
{t} + sum({t}.shape) + max({t}.shape) + math.prod({t}.shape)
{t} * [0.5, 1.5, 2.5][{i} % 3]
{t} * {i} / ({t}.shape[0] or 1)
{t} * 0.5**{i}
{t} * len(str({i}))
{t} * {{4: 1.0, 5: 2.0}}.get({i}, 3.0)
{t}.to(torch.float64).to(torch.float32)
{t}.float()
rows({t}.nonzero()) * {i}
s.buffer[: {t}.shape[0]].sum() * {t}
s.buffer[:, : {i}]
""".strip().splitlines()

STATEMENTS = """
{w} = {t}.clone(); {w}[{i} % 3 :] = {j}
{w} = {t}.clone(); {w}[:, 0] += {i}
{w} = {t}.clone(); {w}[{i}] = 1
{w} = {t}.clone(); {w}.add_({i}); {w}.view(-1)[:: 2] = 0
{w} = {t}.clone(); {w}[:, : {i}].reshape(-1).mul_(2)
{w} = {t}.clone(); {w}[: {i}].contiguous().add_(1)
{w} = {t}.clone(); {w}[{i} % 2 :] = {a}[{i} % 2 :]
{w} = {t} * 2; {w}.copy_({a})
{w} = torch.zeros({i} % 4, {t}.shape[1]); {w}[: {t}.shape[0]] = {t}[: {i} % 4]
{w} = {t} + 0; {w}.t()[0] = {i}
{w} = {t} + 0; {w}.squeeze_(0)
{t}.add_({i})
{t}[: {i}].mul_(2)
{t}[{i} % 2 :, 0] = {j}
{t}.view(-1)[: {i}].add_(1)
{t}.reshape(-1)[: {i}].add_(1)
{t}.contiguous().mul_(2)
{t}.t()[0] += 1
{t} += {a}
s.buffer.add_({i})
s.buffer[: {t}.shape[0]] += 1
s.buffer[{i} % 8] = {t}.shape[1]
s.count += 1
s.count += {i}
s.count = {i}
s.length = {i}
s.rate = s.rate * 0.5
s.rate = float({i})
s.rate = {i}
s.shape = {t}.shape
s.items["n"] = {i}
s.items[{i} % 3] = {j}
s.items.setdefault("k", {i})
s.list.append({i})
s.list[:] = [{i}, {j}]
s.list[{i} % 2] = {j}
s.pair = ({i}, [{j}])
s.kept = {t} * 2
s.cache = torch.cat([s.cache, {t}.reshape(-1)[:1]])
s.cache = torch.cat([s.cache, {t}.new_zeros({i} % 2)])
s.cache = s.cache[-{i} % 5 :]
s.seen.add({i} % 4)
s.make = lambda: {i}
G += 1
G = {i}
c += {i} % 3
{k} = {i}
{k}, {w} = {i}, {t} * {j}
{k} = [{i}, {j}, 2].index({j})
{k} = len([v for v in range({i} % 5) if v < {j}])
""".strip().splitlines()

INTS = """
{t}.shape[0]
{t}.shape[1]
{t}.size(-1)
{t}.size(dim=0)
{t}.numel()
{t}.dim()
{t}[{c}:].shape[0]
{t}[:, : {c}].shape[1]
n
n
s.count
s.length
s.items["n"]
s.list[0]
len(s.list)
s.cache.shape[0]
G
c
{c}
""".strip().splitlines()

COMPUTED = """
({i} + {j})
({i} - {j})
({i} * {j})
({i} // ({j} or 1))
({i} % ({j} or 2))
divmod({i}, 3)[1]
(-{i})
abs({i} - {j})
min({i}, {j})
max({i}, {j}, 1)
sum(({i}, {j}))
sorted([{i}, {j}, 3])[1]
({i} ** 2 % 7)
round({i})
round({i} / 2)
int({i} * 0.5)
int(float({i}))
({i} if {cond} else {j})
({i} or {j})
({i} and {j})
({i} > {j})
({i} & 3)
({i} % 9 << 1)
math.isqrt(abs({i}))
math.ceil({i} / 3)
pow({i}, 2, 5)
[{i}, {j}, 1][{j} % 3]
(~{i} % 4)
""".strip().splitlines()

CONDITIONS = """
{i} > {j}
{i} == {j}
{i} != 4
{i} <= {j} + 1
1 < {i} <= {j}
{i} in (2, 4, 6)
{i} in {{3: 0, 5: 1}}
{i} in range(2, {j})
not {i} % 2
{i} and {j} > 2
{i} > 3 or {j} < 2
{t}.shape == {a}.shape
{t}.shape[1:] == (3,)
{t}.is_contiguous()
isinstance({i}, int)
type({i}) is int
isinstance({i}, bool)
{t}.numel() > s.rate * 8
bool({i} & 1)
str({i}) > "5"
""".strip().splitlines()

RESULTS = ["{t}", "{t}", "{i}", "{t}.shape", "[{t}, {i}]", '{{"t": {t}, "i": {i}}}', "({i}, {t}.size(1))", "s.count"]
FORMS = ["", "", "", "", "t", "part", "step", "late", "wide"]


class Writer:
    """One program, of the choices that a generator makes."""

    def __init__(self, choices: random.Random) -> None:
        self.choices = choices
        self.depth = choices.choice([0.1, 0.4])
        looks = choices.random() < 0.4  # otherwise nothing that fixes a size, so that one program serves many
        self.computed = COMPUTED if looks else [text for text in COMPUTED if not fixes(text)]
        self.conditions = CONDITIONS if looks else [text for text in CONDITIONS if not fixes(text)]
        self.templates = MATRICES if looks else [text for text in MATRICES if not fixes(text)]
        self.matrices = ["x", "y"]
        self.ints: list[str] = []
        self.names = 0
        self.lines: list[str] = []

    def pick(self, items: list[str]) -> str:
        return self.choices.choice(items)

    def name(self) -> str:
        self.names += 1
        return f"v{self.names}"

    def number(self, depth: int = 2) -> str:
        if self.ints and self.choices.random() < 0.2:
            return self.pick(self.ints)
        if depth and self.choices.random() < self.depth:
            return self.pick(self.computed).format(
                i=self.number(depth - 1), j=self.number(depth - 1), cond=self.condition(depth - 1)
            )
        return self.pick(INTS).format(t=self.matrix(), c=self.choices.randrange(6))

    def condition(self, depth: int = 1) -> str:
        return self.pick(self.conditions).format(
            t=self.matrix(), a=self.matrix(), i=self.number(depth - 1 if depth else 0), j=self.number(0)
        )

    def matrix(self) -> str:
        return self.pick([*self.matrices[-4:], "x"])

    def statement(self, indent: str, depth: int = 2) -> None:
        kind = self.choices.random()
        parts = {"t": self.matrix(), "a": self.matrix(), "i": self.number(), "j": self.number(1)}
        if depth and kind < 0.08:
            self.lines.append(f"{indent}if {self.condition()}:")
            self.block(indent + "    ", depth - 1)
            if self.choices.random() < 0.5:
                self.lines.append(f"{indent}else:")
                self.block(indent + "    ", depth - 1)
        elif depth and kind < 0.1:
            self.lines.append(f"{indent}for {self.name()} in range({self.number(1)} % 3):")
            self.block(indent + "    ", depth - 1)
        elif depth and kind < 0.12:
            self.lines.append(f"{indent}match {self.number()}:")
            for case in ("2", "int(q) if q > 4", "_"):
                self.lines.append(f"{indent}    case {case}:")
                self.block(indent + "        ", depth - 1)
        elif depth and kind < 0.13:
            k = self.name()
            self.lines.append(f"{indent}{k} = {self.number(1)} % 4")
            self.lines.append(f"{indent}while {k} > 0:")
            self.lines.append(f"{indent}    {k} -= 1")
            self.block(indent + "    ", depth - 1)
        elif depth and kind < 0.16:
            self.lines.append(f"{indent}try:")
            self.block(indent + "    ", depth - 1)
            self.lines.append(f"{indent}except (RuntimeError, IndexError, ValueError):")
            self.block(indent + "    ", depth - 1)
        elif kind < 0.18:
            self.lines.append(f"{indent}if {self.condition()}:")
            self.lines.append(f"{indent}    raise ValueError({parts['i']})")
        elif kind < 0.21:
            self.lines.append(f"{indent}{self.pick(self.templates).format(**parts)}")
        elif kind < 0.42:
            text, w, k = self.pick(STATEMENTS), self.name(), self.name()
            self.lines.append(indent + text.format(w=w, k=k, **parts))
            top = indent == "    "  # what a branch makes may not be there later
            if top and "{w}" in text:
                self.matrices.append(w)
            if top and "{k}" in text:
                self.ints.append(k)
        else:
            w = self.name() if indent == "    " else self.pick([m for m in self.matrices if m not in "xy"] or ["x"])
            self.lines.append(f"{indent}{w} = {self.pick(self.templates).format(**parts)}")
            if w not in self.matrices:
                self.matrices.append(w)

    def block(self, indent: str, depth: int) -> None:
        for _ in range(self.choices.randint(1, 2)):
            self.statement(indent, depth)

    def sizes(self) -> list[tuple[int, int, int]]:
        """Sizes and the int of each call: some go on changing, some change for a while or never."""
        count, plan = self.choices.randint(8, 12), []
        changes = [self.choices.choice(["up", "any", "rare", "never"]) for _ in range(3)]
        now = [self.choices.randint(2, 6) for _ in range(3)]
        for call in range(count):
            plan.append((now[0], now[1], now[2]))
            for place, change in enumerate(changes):
                if change == "up":
                    now[place] += 1
                elif change == "any" or (change == "rare" and call % 4 == 3):
                    now[place] = self.choice_of_size(place)
        return plan

    def choice_of_size(self, place: int) -> int:
        large = [2, 3, 4, 5, 6, 7, 8, 9, 1, 0]
        return self.choices.choice([*large, -1, -3, 12] if place == 2 else large)

    def calls(self) -> list[str]:
        lines, form = [], self.pick(FORMS)
        other = self.pick(["same", "same", "free", "row", "itself", "view", "column"])
        for seed, (a, b, n) in enumerate(self.sizes()):
            if self.choices.random() < 0.1:
                form = self.pick(FORMS)
            if self.choices.random() < 0.1:
                other = self.pick(["same", "free", "row", "itself", "view", "column"])
            lines.append(f"    x = T({seed}, {a}, {b}, {form!r})")
            c, d = {"same": (a, b), "row": (1, b), "column": (a, 1)}.get(other, (b, n % 7))
            y = {"itself": "x", "view": f"x[: {max(n, 0)}]"}.get(other, f"T({seed} + 100, {c}, {d}, '')")
            lines.append(f"    y = {y}")
            if self.choices.random() < 0.06:
                value = self.pick(["7", "0", "True", "2.5", "1000", "-5", "None"])
                lines.append(f"    s.{self.pick(['count', 'length', 'rate'])} = {value if value != 'None' else '1'}")
            number = self.pick(["True", "False", "2.0", "1000", str(n)]) if self.choices.random() < 0.05 else n
            lines.append(f"    r = yield {'f, ' if seed == 0 else ''}x, y, {number}")
            lines.append("    yield Seen(x=x, y=y, s=s, G=G, form=layout(r), made=s.make())")
        return lines

    def program(self) -> str:
        for _ in range(self.choices.randint(1, 6)):
            self.statement("    ")
        results = []
        for _ in range(self.choices.randint(1, 4)):
            results.append(self.pick(RESULTS).format(t=self.matrix(), i=self.number(1)))
        body = "\n".join(self.lines)
        state = (
            "types.SimpleNamespace(count=0, length=2, rate=0.5, shape=None, items={'n': 1}, list=[1, 2], pair=None,"
            " kept=None, cache=torch.ones(2), buffer=torch.ones(8, 8), seen=set(), make=lambda: 0)"
        )
        return (
            f"{PRELUDE}\n\ndef calls():\n    s = {state}\n    c = 1\n\n    def f(x, y, n):\n        nonlocal c\n"
            f"        global G\n{indented(body)}\n        return {', '.join(results)}\n\n"
            + "\n".join(self.calls())
            + "\n"
        )


def fixes(text: str) -> bool:
    """Whether it looks at a size in a way that cannot be followed."""
    words = ("divmod", "round", "int(", "float(", "**", "& ", "<<", "~", "isqrt", "ceil", "pow", "][", "type(", "str(")
    return any(
        word in text for word in (*words, "range(", "bool(", "{{", "rate", "enumerate", "unbind", "chunk", "len(")
    )


def indented(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines())
