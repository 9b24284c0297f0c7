"""Writes: in place, through views, to inputs, to ``out=``; and inputs that share storage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import thunder
from tests.jit_checks import (  # noqa: F401
    Pair,
    assert_call_same,
    assert_same,
    assert_served,
    check,
    no_grad,
    nothing_leaks,
)


def x(*shape: int) -> torch.Tensor:
    return torch.linspace(-1, 1, torch.Size(shape or (4, 3)).numel()).reshape(shape or (4, 3))


# ---- on intermediates ----


def add_in_place(a):
    b = a * 2
    b.add_(1)
    b += a
    b *= 3
    return b


def write_through_view(a):
    b = a * 2
    b[1].add_(5)
    b[:, 0] = -1
    b.t()[2].mul_(2)
    return b


def write_base_read_view(a):
    b = a * 2
    view = b[1:]
    b.add_(1)
    return view, b


def write_view_read_other_view(a):
    b = a * 2
    left, right = b.chunk(2)
    left.zero_()
    return right, left, b.view(-1)


def set_item_kinds(a):
    b = a.clone()
    b[0, 1] = 7
    b[1:3, ::2] = torch.tensor([9.0, 8.0])
    b[..., -1] = a[..., 0]
    b[torch.tensor([0, 3])] = 0.5
    b[a > 0.5] = -2
    return b


def masked_and_scattered(a):
    b = a.clone()
    b.masked_fill_(b > 0, 0.25)
    b.index_fill_(0, torch.tensor([1]), 3)
    b.scatter_(1, torch.zeros(4, 1, dtype=torch.long), 5.0)
    b.index_add_(0, torch.tensor([0, 0]), a[:2])
    b.index_put_((torch.tensor([0]), torch.tensor([2])), torch.tensor(4.0), accumulate=True)
    return b


def out_argument(a):
    b = torch.empty(4, 3)
    result = torch.mul(a, 2, out=b)
    torch.add(b, 1, out=b)
    return b, result


def out_argument_view(a):
    b = torch.zeros(4, 3)
    torch.mul(a[0], 2, out=b[1])
    return b


def out_tuple(a):
    values, indices = torch.empty(4), torch.empty(4, dtype=torch.long)
    torch.max(a, 1, out=(values, indices))
    return values, indices


def copy_and_fill(a):
    b = torch.empty_like(a)
    b.copy_(a)
    b[0].fill_(2)
    c = b.clone().zero_()
    return b, c


def inplace_activation(a):
    b = a + 1
    torch.relu_(b)
    nn.functional.dropout(b, 0.5, training=False, inplace=True)
    return nn.functional.leaky_relu(b, inplace=True), b


def swap_rows(a):
    b = a.clone()
    b[0], b[1] = b[1].clone(), b[0].clone()
    return b


def value_kept_before_write(a):
    b = a * 2
    kept = b.clone()
    view = b.view(-1)
    b.add_(10)
    return kept, view, b


def write_after_return_value_was_made(a):
    b = a * 2
    c = b + 1
    b.zero_()
    return c


def metadata_change_in_place(a):
    b = a.clone()
    b.t_()
    b.unsqueeze_(0)
    b.squeeze_()
    b.transpose_(0, 1)
    return b, b.shape


def loop_fills_a_buffer(a):
    out = torch.zeros(3, 4, 3)
    for i in range(3):
        out[i] = a * i
    return out


def cumulative_list(a):
    rows = list((a * 2).unbind(0))
    rows[1].add_(100)
    return torch.stack(rows), rows[1]


def complex_parts(a):
    c = torch.complex(a, a + 1)
    c.real.mul_(2)
    c.imag[0] = 9
    return c


INTERMEDIATES = [
    add_in_place,
    write_through_view,
    write_base_read_view,
    write_view_read_other_view,
    set_item_kinds,
    masked_and_scattered,
    out_argument,
    out_argument_view,
    out_tuple,
    copy_and_fill,
    inplace_activation,
    swap_rows,
    value_kept_before_write,
    write_after_return_value_was_made,
    metadata_change_in_place,
    loop_fills_a_buffer,
    cumulative_list,
    complex_parts,
]


@pytest.mark.parametrize("fn", INTERMEDIATES, ids=lambda f: f.__name__)
def test_write_to_an_intermediate(fn):
    check(fn, x())


def test_resize_is_refused_or_right():
    def f(a):
        b = a.clone()
        b.resize_(2, 3)
        return b

    compiled = thunder.jit(f)
    for _ in range(2):
        try:
            ours = compiled(x())
        except thunder.CaptureError as error:
            assert "resize" in str(error)
            continue
        assert_same(f(x()), ours)


def test_set_data_and_storage_swaps_are_refused():
    def swap(a):
        b = a.clone()
        b.data = a * 2
        return b

    def set_(a):
        b = a.clone()
        b.set_(a * 2)
        return b

    for f in (swap, set_):
        compiled = thunder.jit(f)
        for _ in range(2):
            try:
                ours = compiled(x())
            except thunder.CaptureError as error:
                assert "What to do" in str(error)
                continue
            assert_same(f(x()), ours)


def test_data_attribute_read_and_written():
    def f(a):
        b = a * 2
        b.data.add_(1)
        c = b.detach()
        c.mul_(2)
        return b, c

    check(f, x())


# ---- on inputs ----


def input_add(a):
    a.add_(1)
    return a * 2


def input_item(a):
    a[0] = 5
    return a.sum()


def input_view(a):
    a.diagonal()[1:].zero_()
    a.t()[0].add_(1)
    return a + 1


def input_returned(a):
    return a.mul_(2)


def input_only_written(a):
    a.fill_(3)


def input_written_then_read(a):
    before = a.clone()
    view = a[1:]
    a.add_(1)
    return before, view, a


def input_copy(a):
    a.copy_(a.flip(0))
    return a[0]


def input_out_argument(a):
    torch.exp(a, out=a)
    return a.sum()


@pytest.mark.parametrize(
    "fn",
    [
        input_add,
        input_item,
        input_view,
        input_returned,
        input_only_written,
        input_written_then_read,
        input_copy,
        input_out_argument,
    ],
    ids=lambda f: f.__name__,
)
def test_write_to_an_input_reaches_the_callers_tensor(fn):
    check(fn, x())
    check(fn, x(3, 4).t())


def test_input_returned_by_an_in_place_operation_is_the_callers_object():
    compiled = thunder.jit(lambda a: (a.add_(1), a))
    for _ in range(2):
        a = x()
        out = compiled(a)
        assert out[0] is a
        assert out[1] is a
        assert_same(x() + 1, a)


def test_version_of_a_written_input_is_raised():
    compiled = thunder.jit(lambda a: a.add_(1).mul(2))
    for _ in range(2):
        a = x()
        before = a._version
        compiled(a)
        assert a._version > before


def test_input_in_a_container_is_written():
    def f(box):
        box["a"][0].add_(1)
        return box["a"][0] * 2

    check(f, {"a": [x()]})


def test_write_to_a_non_contiguous_and_to_an_offset_input():
    f = lambda a: a.add_(1).sum()  # noqa: E731
    compiled = thunder.jit(f)
    for make in (lambda b: b[:, 1:], lambda b: b[1:], lambda b: b[::2], lambda b: b.t()):
        ours, eager = x(6, 6), x(6, 6)
        assert_same(f(make(eager)), compiled(make(ours)))
        assert_same(eager, ours)


def test_write_to_an_expanded_input_raises_as_eager():
    f = lambda a: a.add_(1)  # noqa: E731
    compiled = thunder.jit(f)
    with pytest.raises(RuntimeError, match="single memory location"):
        f(x(1, 3).expand(4, 3))
    with pytest.raises(RuntimeError, match="single memory location"):
        compiled(x(1, 3).expand(4, 3))
    assert_call_same(compiled, f, x())


# ---- inputs that share storage ----


def write_first_read_second(a, b):
    a.add_(1)
    return b * 2


def read_write_read(a, b):
    before = b * 1
    a.mul_(3)
    return before, b + 0, a.sum() + b


ALIASES = {
    "same view twice": lambda t: (t[:2], t[:2]),
    "overlapping rows": lambda t: (t[:3], t[1:4]),
    "disjoint rows": lambda t: (t[:2], t[2:4]),
    "base and view": lambda t: (t, t.view(-1)),
    "transposed": lambda t: (t, t.t()),
    "same object": lambda t: (t, t),
    "first row and all": lambda t: (t[:1], t),
    "all and last row": lambda t: (t, t[3:]),
}


@pytest.mark.parametrize("fn", [write_first_read_second, read_write_read], ids=lambda f: f.__name__)
@pytest.mark.parametrize("first", ["separate", "shared"])
@pytest.mark.parametrize("kind", ALIASES)
def test_overlapping_inputs_one_of_which_is_written(kind, first, fn):
    def pair_of(base: torch.Tensor, shared: bool) -> tuple[Any, Any]:
        a, b = ALIASES[kind](base)
        if shared:
            return a, b
        return a.clone().as_strided(a.shape, a.stride()), b.clone(memory_format=torch.preserve_format)

    compiled = thunder.jit(fn)
    order = (False, True, False, True) if first == "separate" else (True, False, True, False)
    for shared in order:
        eager, ours = x(4, 4), x(4, 4)
        assert_same(fn(*pair_of(eager, shared)), compiled(*pair_of(ours, shared)))
        assert_same(eager, ours)


@pytest.mark.parametrize("fn", [write_first_read_second, read_write_read], ids=lambda f: f.__name__)
def test_views_of_one_storage_that_overlap_in_another_way_at_each_call(fn):
    compiled = thunder.jit(fn)
    places = [(0, 0), (0, 1), (1, 0), (0, 2), (2, 0), (0, 5), (5, 0), (1, 2), (3, 3)]
    for i, j in [*places, *reversed(places)]:
        eager, ours = x(12), x(12)
        assert_same(fn(eager[i : i + 4], eager[j : j + 4]), compiled(ours[i : i + 4], ours[j : j + 4]))
        assert_same(eager, ours)


def test_part_and_whole_of_one_storage_at_changing_offsets():
    def f(whole, part):
        part.add_(1)
        return whole * 2

    compiled = thunder.jit(f)
    for i in (0, 3, 5, 0):
        eager, ours = x(12), x(12)
        assert_same(f(eager, eager[i : i + 2]), compiled(ours, ours[i : i + 2]))
        assert_same(eager, ours)


def test_input_that_shares_storage_with_a_parameter_that_is_written():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("total", x())

        def forward(self, a):
            self.total.add_(1)
            return a * 2

    eager, ours = Net(), Net()
    compiled = thunder.jit(ours)
    for make in (lambda m: x(), lambda m: m.total, lambda m: m.total[1:], lambda m: x()):
        assert_same(eager(make(eager)), compiled(make(ours)))
        assert_same(eager.total, ours.total)


def test_result_that_aliases_a_written_input_follows_later_writes():
    compiled = thunder.jit(lambda a: (a.add_(1)[1:], a.view(-1)))
    for _ in range(2):
        a = x()
        tail, flat = compiled(a)
        a.fill_(7)
        assert bool((tail == 7).all())
        assert bool((flat == 7).all())


# ---- on module state ----


def test_state_written_and_returned():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("state", torch.zeros(3))

        def forward(self, a):
            self.state.copy_(a[0])
            return self.state, self.state * 2

    net = Net()
    compiled = thunder.jit(net)
    for step in range(3):
        out = compiled(x() + step)
        assert out[0] is net.state
        assert_same((x() + step)[0], net.state)


def test_static_key_value_cache():
    class Cache(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("keys", torch.zeros(1, 8, 3))

        def forward(self, a, at):
            self.keys[:, at] = a
            return self.keys[:, : int(at[-1]) + 1] if isinstance(at, list) else self.keys.sum(1)

    p = Pair(Cache())
    for step in range(4):
        p.same(x(1, 1, 3) + step, torch.tensor([step]))
    p.served(misses=1, hits=3)
    p.same(x(1, 2, 3), [4, 5])


def test_tensor_in_a_closure_is_written():
    w, v = x(), x()

    def make(t):
        def f(a):
            t.add_(a)
            return t * 2

        return f

    compiled, eager = thunder.jit(make(w)), make(v)
    for _ in range(3):
        assert_same(eager(x()), compiled(x()))
        assert_same(v, w)


def test_write_to_an_array_argument_is_refused_and_the_array_is_as_before():
    numpy = pytest.importorskip("numpy")

    def f(a, out):
        out[0] = 5.0
        return a * 2

    compiled = thunder.jit(f)
    array = numpy.ones(3)
    with pytest.raises(thunder.CaptureError, match="array") as error:
        compiled(x(), array)
    assert array.tolist() == [1.0, 1.0, 1.0]
    assert "What to do" in str(error.value)


def test_two_buffers_that_share_storage():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            base = torch.zeros(6)
            self.register_buffer("low", base[:4])
            self.register_buffer("high", base[2:])

        def forward(self, a):
            self.low.add_(a)
            return self.high * 1

    p = Pair(Net())
    for _ in range(3):
        p.same(torch.ones(4))
