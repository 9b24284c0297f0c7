"""Programs whose unused results are errors: eager raises where only the kernel finds out, and so must the program."""

from __future__ import annotations

import types

import torch
from torch.nn import functional as F

from tests.soundness.harness import Seen, program
from tests.soundness.world import X

FAR = torch.tensor([0, 9])
NEAR = torch.tensor([0, 1])
# What is computed of x and i and thrown away, then an x and an i for which it raises, where that is not X() and FAR.
UNUSED = {
    "index": (lambda x, i: x[i],),
    "gather": (lambda x, i: x.gather(0, i),),
    "index_select": (lambda x, i: x.index_select(0, i),),
    "take": (lambda x, i: x.take(i),),
    "put": (lambda x, i: x.put(i, x[:2]),),
    "embedding": (lambda x, i: F.embedding(i, x.view(2, 2)),),
    "one_hot": (lambda x, i: F.one_hot(i, 3),),
    "bincount": (lambda x, i: torch.bincount(i), X(), -FAR),
    "cross_entropy": (lambda x, i: F.cross_entropy(x.view(2, 2), i),),
    "write_by_index": (lambda x, i: torch.zeros(3).index_add_(0, i, x[:2]),),
    "item_assignment": (lambda x, i: torch.zeros(3).__setitem__(i, 1.0),),
    "scatter": (lambda x, i: torch.zeros(3).scatter_(0, i, x[:2]),),
    "division_by_zero": (lambda x, i: NEAR // i, X(), FAR * 0),
    "remainder_by_zero": (lambda x, i: NEAR % i, X(), FAR * 0),
    "cholesky": (lambda x, i: torch.linalg.cholesky(x.view(2, 2)), -torch.tensor([1.0, 0.0, 0.0, 1.0]), NEAR),
    "inverse": (lambda x, i: torch.linalg.inv(x.view(2, 2)), torch.zeros(4), NEAR),
    "multinomial": (lambda x, i: torch.multinomial(x, 2), -X(), NEAR),
    "dtype_without_kernel": (lambda x, i: torch.relu(x), X() > 0, NEAR),
    "chain": (lambda x, i: x[i].sin().exp(),),
}


def add(name: str, compute, bad_x=None, bad_i=FAR) -> None:
    def calls():
        def f(x, i):
            compute(x, i)
            return x + 1

        good = torch.tensor([1.0, 0.5, 0.5, 1.0])
        yield f, good.clone(), NEAR
        yield X() if bad_x is None else bad_x, bad_i
        yield good.clone(), NEAR
        if bad_x is None or bad_x.is_floating_point():
            yield (X() if bad_x is None else bad_x).clone().requires_grad_(), bad_i
            yield good.clone().requires_grad_(), NEAR

    calls.__name__ = f"unused_result_of_{name}_raises"
    program("errors")(calls)


for name, case in UNUSED.items():
    add(name, *case)


@program("errors")
def unused_index_out_of_range_at_another_size():
    def f(x, i):
        x[i]
        return x.sum()

    with torch.no_grad():
        for n in (4, 6, 8):
            first = n == 4
            yield (f, torch.ones(n), torch.tensor([n - 1])) if first else (torch.ones(n), torch.tensor([n - 1]))
        yield torch.ones(9), torch.tensor([9])
        yield torch.ones(3), torch.tensor([-4])


@program("errors")
def unused_write_that_the_next_one_covers():
    def f(x, i):
        t = torch.zeros(4)
        t[i] = x[:2]
        t.zero_()
        return t + x

    yield f, X(), NEAR
    yield X(), FAR


@program("errors")
def kernel_that_fails_where_the_code_catches_it():
    def f(x, i):
        try:
            x[i]
            y = x.float() + x[i].sum()
        except (IndexError, NotImplementedError):
            y = x - 1
        return y

    yield f, X(), NEAR
    yield X(), FAR
    yield X(), NEAR
    yield X(grad=True), FAR


@program("errors")
def state_written_before_a_kernel_fails_after_a_value():
    world = types.SimpleNamespace(count=0)

    def f(x, i):
        world.count += 1
        if x.sum() > 0:
            world.count += 1
            return x[i]
        return x

    yield f, X(), NEAR
    yield X(), FAR
    yield Seen(world=world)
    yield -X(), FAR
    yield X(), FAR
    yield Seen(world=world)


@program("errors")
def state_written_before_the_first_call_fails_after_a_value():
    world = types.SimpleNamespace(count=0)

    def f(x):
        world.count += 1
        x = x.nonzero() * 3
        return torch.lerp(x, x * 2, 3)

    yield f, X()
    yield Seen(world=world)
    yield X()
    yield Seen(world=world)


@program("errors")
def input_written_between_two_writes_of_which_one_fails():
    """The compiled program writes one of them where it stands: it is half done when the kernel fails."""

    def f(x, y, source):
        x[x < 0] = 0
        torch.mul(x, 2, out=y)
        x.index_add_(0, torch.tensor([1, 1]), source)
        return x

    for source in (torch.ones(2), torch.ones(2).long(), torch.ones(2)):
        x, y = torch.arange(4) - 1, torch.full((4,), 0.5)
        yield (f, x, y, source)
        yield Seen(x=x, y=y)
