"""Random torch programs full of views and writes: thunder-opt must not change what they do.

Each program is built by running it: an operation is drawn, executed, and recorded with the types, alias groups and
offsets that torch really gave. Then the recorded trace and what the passes leave of it are executed on equal inputs and
compared.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ir.running import DTYPES, Run, assert_same, row_major, storage

ROOT = Path(__file__).resolve().parents[2]
SHORT = {dtype: text for text, dtype in DTYPES.items()}
PROGRAMS = int(os.environ.get("THUNDER_RANDOM_PROGRAMS", "150"))
PASSES = [
    None,
    "functionalize",
    "functionalize,cse,dce",
    "noop,cse",
    "cse,dce,lifetime",
    "lifetime,functionalize,noop,fold,cse,dce,lifetime",
    "dce",
]


def find_tool() -> str | None:
    """The thunder-opt that was built last, or the installed one."""
    built = [ROOT / "build" / kind / "thunder-opt" for kind in ("core", "sanitize")]
    found = [str(p) for p in built if p.exists()] + [shutil.which("thunder-opt", path=str(Path(sys.executable).parent))]
    return os.environ.get("THUNDER_OPT") or next((p for p in found if p), None)


TOOL = find_tool()


class Maker:
    """Builds one program."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.values: dict[str, torch.Tensor] = {}
        self.keep: list[torch.Tensor] = []  # keeps storages alive, so that their addresses stay distinct
        self.aliases: dict[int, int] = {}
        self.lines: list[str] = []
        self.calls: list[tuple[str, Callable[[], Any]]] = []
        torch.manual_seed(seed)

    # -- texts

    def literal(self, value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return next(name for name, v in reversed(self.values.items()) if v is value)
        if isinstance(value, slice):
            return f"slice({value.start}, {value.stop}, {value.step})"
        if isinstance(value, tuple):
            inside = ", ".join(self.literal(v) for v in value)
            return f"({inside},)" if len(value) == 1 else f"({inside})"
        return "..." if value is Ellipsis else str(value) if isinstance(value, torch.dtype) else repr(value)

    def alias(self, value: torch.Tensor) -> int:
        return self.aliases.setdefault(storage(value), len(self.aliases) + 1)

    def note(self, value: torch.Tensor) -> str:
        shape, strides = tuple(value.shape), value.stride()
        text = f"cpu {SHORT[value.dtype]}[{', '.join(map(str, shape))}]"
        if strides != row_major(shape):
            text += "{" + ", ".join(map(str, strides)) + "}"
        text += f"; alias {self.alias(value)}"
        return text + (f"; offset {value.storage_offset()}" if value.storage_offset() else "")

    # -- operations

    def name(self, value: torch.Tensor) -> str:
        name = f"t{len(self.keep)}"
        self.keep.append(value)
        self.values[name] = value
        return name

    def call(self, callee: str, function: Callable[..., Any], *args: Any, write: int | str = "", **kwargs: Any) -> None:
        """Runs and records; an operation that torch refuses is forgotten."""
        text = ", ".join([self.literal(a) for a in args] + [f"{k}={self.literal(v)}" for k, v in kwargs.items()])
        target = kwargs["out"] if write == "out" else args[0] if write else None
        effect = f"; writes {self.literal(target)}" if target is not None else ""
        try:
            result = function(*args, **kwargs)
        except (RuntimeError, IndexError, ValueError, TypeError):
            return
        if result is None:
            self.lines.append(f'_: "{effect[2:]}" = {callee}({text})')
        elif isinstance(result, torch.Tensor):
            self.lines.append(f'{self.name(result)}: "{self.note(result)}{effect}" = {callee}({text})')
        else:
            names = [self.name(r) for r in result]
            self.lines += [f'{n}: "{self.note(r)}"' for n, r in zip(names, result, strict=True)]
            self.lines.append(", ".join(names) + ("," if len(names) == 1 else "") + f" = {callee}({text})")

    def pick(self) -> torch.Tensor:
        names = list(self.values)
        return self.values[self.rng.choice(names[-8:] if self.rng.random() < 0.7 else names)]

    def pick_like(self, other: torch.Tensor) -> Any:
        """Something that broadcasts with `other`: often one of its own relatives, sometimes a number."""
        fitting = [v for v in self.values.values() if v.dtype != torch.bool and self.broadcasts(v, other)]
        return self.rng.choice(fitting) if fitting and self.rng.random() < 0.7 else self.rng.choice([1, 0.5, 2, -1.5])

    @staticmethod
    def broadcasts(a: torch.Tensor, b: torch.Tensor) -> bool:
        pairs = zip(reversed(a.shape), reversed(b.shape), strict=False)
        return a.dim() <= b.dim() and all(n in (1, m) for n, m in pairs)

    def index(self, x: torch.Tensor) -> Any:
        entries: list[Any] = []
        for size in x.shape[: self.rng.randint(0, x.dim())]:
            start, step = self.rng.randint(-size - 1, size), self.rng.choice([None, 1, 2])
            choices = [slice(None, None, step), slice(start, None, step), slice(None, start, None), slice(0, 1, None)]
            entries.append(self.rng.randrange(size) if size and self.rng.random() < 0.4 else self.rng.choice(choices))
            if self.rng.random() < 0.1:
                entries.append(None)
        if self.rng.random() < 0.2:
            entries.append(...)
        return entries[0] if len(entries) == 1 and self.rng.random() < 0.5 else tuple(entries)

    def view(self) -> None:
        x = self.pick()
        dtype = self.rng.choice([torch.float32, torch.float64])
        dims = [self.rng.randrange(x.dim()) for _ in range(2)] if x.dim() else [0, 0]
        self.rng.choice(
            [
                lambda: self.call("torch.Tensor.__getitem__", torch.Tensor.__getitem__, x, self.index(x)),
                lambda: self.call("torch.transpose", torch.transpose, x, *dims),
                lambda: self.call("torch.Tensor.view", torch.Tensor.view, x, (-1,)),
                lambda: self.call("torch.unsqueeze", torch.unsqueeze, x, dims[0]),
                lambda: self.call("torch.Tensor.expand", torch.Tensor.expand, x, (2, *x.shape)),
                lambda: self.call("torch.chunk", torch.chunk, x, 2, dims[0]),
                lambda: self.call("torch.diagonal", torch.diagonal, x),
                lambda: self.call("torch.flatten", torch.flatten, x),
                lambda: self.call("torch.Tensor.view_as", torch.Tensor.view_as, x, x),
                lambda: self.call("torch.Tensor.contiguous", torch.Tensor.contiguous, x),
                lambda: self.call("torch.Tensor.to", torch.Tensor.to, x, dtype),
            ]
        )()

    def pure(self) -> None:
        x = self.pick()
        unary = self.rng.choice(["sin", "tanh", "neg", "clone", "relu"])
        self.rng.choice(
            [
                lambda: self.call(f"torch.{unary}", getattr(torch, unary), x),
                lambda: self.call("torch.add", torch.add, x, self.pick_like(x)),
                lambda: self.call("torch.mul", torch.mul, x, self.pick_like(x)),
                lambda: self.call("torch.gt", torch.gt, x, 0),
                lambda: self.call("torch.zeros", torch.zeros, (2, 3)),
                lambda: self.call("torch.sum", torch.sum, x, 0),
            ]
        )()

    def write(self) -> None:
        x = self.pick()
        other = self.pick_like(x)
        unary = self.rng.choice(["sin_", "tanh_", "neg_", "zero_", "abs_"])
        binary = self.rng.choice(["add_", "sub_", "mul_", "__iadd__", "__imul__"])
        masks = [v for v in self.values.values() if v.dtype == torch.bool and v.shape == x.shape]
        self.rng.choice(
            [
                lambda: self.call(f"torch.Tensor.{unary}", getattr(torch.Tensor, unary), x, write=1),
                lambda: self.call(f"torch.Tensor.{binary}", getattr(torch.Tensor, binary), x, other, write=1),
                lambda: self.call("torch.Tensor.copy_", torch.Tensor.copy_, x, other, write=1),
                lambda: self.call("torch.Tensor.fill_", torch.Tensor.fill_, x, self.rng.choice([1, 0.25]), write=1),
                lambda: self.setitem(x),
                lambda: self.setitem(x),
                lambda: masks and self.set_by_mask(x, masks[-1]),
                lambda: self.call("torch.nn.functional.relu", torch.nn.functional.relu, x, inplace=True, write=1),
                lambda: self.call("torch.mul", torch.mul, x, 0.5, out=x, write="out"),
                lambda: (
                    self.call("torch.Tensor.masked_fill_", torch.Tensor.masked_fill_, x, x > 100, 0.5, write=1)
                    if False
                    else None
                ),
            ]
        )()

    def setitem(self, x: torch.Tensor) -> None:
        index = self.index(x)
        value = self.pick_like(x[index])
        self.call("torch.Tensor.__setitem__", torch.Tensor.__setitem__, x, index, value, write=1)

    def set_by_mask(self, x: torch.Tensor, mask: torch.Tensor) -> None:
        self.call("torch.Tensor.__setitem__", torch.Tensor.__setitem__, x, mask, 0.5, write=1)

    def make(self) -> str:
        inputs = []
        for name, shape in (("x", (4, 6)), ("y", (2, 3, 2)), ("z", (6,)), ("n", ())):
            dtype = torch.int64 if name == "n" else torch.float32
            inputs.append(f'{name}: "cpu {SHORT[dtype]}[{", ".join(map(str, shape))}]; alias {len(inputs) + 1}"')
        header = f"def computation({', '.join(inputs)}):\n"
        self.values = dict(Run(header + "    return None\n").inputs)
        self.keep += list(self.values.values())
        for value in self.values.values():
            self.alias(value)
        with torch.no_grad():
            for _ in range(self.rng.randint(3, 14)):
                self.rng.choices([self.view, self.pure, self.write], [3, 2, 4])[0]()
        names = self.rng.sample(list(self.values), min(len(self.values), self.rng.randint(0, 5)))
        result = "".join(name + ", " for name in names)
        return header + "".join(f"    {line}\n" for line in self.lines) + f"    return ({result.rstrip()})\n"


def optimise(text: str, passes: str | None) -> str:
    """The trace after the passes, by thunder-opt."""
    arguments = [TOOL, "-", "--verify"] + ([] if passes is None else ["--passes", passes])
    done = subprocess.run(arguments, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stderr}\n{text}"
    return done.stdout


@pytest.mark.skipif(TOOL is None, reason="thunder-opt is not built")
@pytest.mark.parametrize("seed", range(PROGRAMS))
def test_passes_keep_what_a_random_program_does(seed: int) -> None:
    source = Maker(seed).make()
    optimised = optimise(source, PASSES[seed % len(PASSES)])
    print(source, optimised, sep="\n")
    shift = seed % 3  # the same program serves inputs that start elsewhere in their storages
    assert_same(Run(source, shift).run(), Run(optimised, shift).run())


@pytest.mark.skipif(TOOL is None, reason="thunder-opt is not built")
def test_random_programs_are_functionalized_nearly_always() -> None:
    """The comparison above would say nothing if the pass left everything as it was."""
    before = after = 0
    for seed in range(60):
        lines = Maker(seed).make()
        before += lines.count("writes")
        left = optimise(lines, "functionalize").splitlines()
        after += sum("writes" in line and "copy_" not in line for line in left)
    assert after < before / 10
