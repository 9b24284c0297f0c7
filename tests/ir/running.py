"""Executes a printed trace with torch and checks every annotation against the tensor that it describes.

Checked at each statement: dtype, device type, shape, strides, storage offset, who shares storage with whom, and that
nothing changes but what the statement declares to write.
"""

from __future__ import annotations

import ast
import builtins
import math
import operator
import re
from typing import Any

import torch

DTYPES = {
    "b8": torch.bool,
    "u8": torch.uint8,
    "i8": torch.int8,
    "i16": torch.int16,
    "i32": torch.int32,
    "i64": torch.int64,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f32": torch.float32,
    "f64": torch.float64,
    "c64": torch.complex64,
    "c128": torch.complex128,
}
TYPE = re.compile(r"(\w+)(?::(\d+))? (\w+)\[([\d, ]*)\](?:\{([\d, ]*)\})?( grad)?$")


class Facts:
    """What an annotation says."""

    def __init__(self, text: str) -> None:
        parts = [part.strip() for part in text.split(";")]
        self.type = parts[0]
        self.alias = self.offset = 0
        self.writes: list[str] = []
        for part in parts:
            word, _, rest = part.partition(" ")
            if word in ("alias", "offset"):
                setattr(self, word, int(rest))
            elif word == "writes":
                self.writes = [name.strip() for name in rest.split(",")]
        match = TYPE.match(self.type)
        self.is_tensor = match is not None
        if match:
            self.dtype = DTYPES[match[3]]
            self.shape = tuple(int(n) for n in match[4].split(",") if n.strip())
            strides = match[5]
            self.strides = tuple(int(n) for n in strides.split(",") if n.strip()) if strides else row_major(self.shape)


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous tensor as the text form defines them."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def fill(facts: Facts, size: int) -> torch.Tensor:
    """A storage of `size` elements: indices stay small, floats are away from zero, booleans are mixed."""
    index = torch.arange(size)
    if facts.dtype == torch.bool:
        return index % 3 == 0
    if not (facts.dtype.is_floating_point or facts.dtype.is_complex):
        return (index % 2 + 1).to(facts.dtype)
    return (torch.sin(index * 0.7 + 0.3) * 2 + 0.1).to(facts.dtype)


def make_inputs(function: ast.FunctionDef, shift: int) -> dict[str, Any]:
    """Inputs as annotated, but `shift` elements further on in their storages.

    Those of one alias group share a storage, which has room behind its last element.
    """
    facts = {arg.arg: Facts(arg.annotation.value) for arg in function.args.args}
    need: dict[Any, int] = {}
    for name, f in facts.items():
        if f.is_tensor:
            last = sum((n - 1) * s for n, s in zip(f.shape, f.strides, strict=True) if n > 0)
            key = f.alias or name
            need[key] = max(need.get(key, 0), f.offset + last + 8 + shift)
    storages = {}
    values: dict[str, Any] = {}
    for name, f in facts.items():
        if f.is_tensor:
            key = f.alias or name
            if key not in storages:
                storages[key] = torch.cat((fill(f, shift), fill(f, need[key] - shift)))
            values[name] = storages[key].as_strided(f.shape, f.strides, f.offset + shift)
        else:
            values[name] = {"int": 3, "float": 0.5, "bool": True, "object": object()}[f.type]
    return values


class Run:
    """Executes a trace statement by statement and checks what each one says about itself."""

    def __init__(self, text: str, shift: int = 0) -> None:
        self.function = ast.parse(text).body[-1]
        self.shift = shift
        self.names: dict[str, Any] = {"torch": torch, "operator": operator, "builtins": builtins, "math": math}
        self.names |= {"print": lambda *a: None, "open_file": lambda name: object()}
        self.inputs = make_inputs(self.function, shift)
        self.names |= self.inputs
        self.facts: dict[str, Facts] = {a.arg: Facts(a.annotation.value) for a in self.function.args.args}
        self.result: Any = None

    def run(self) -> Run:
        """Executes the body; returns itself."""
        torch.manual_seed(0)
        pending: list[ast.AnnAssign] = []
        with torch.no_grad():
            for statement in self.function.body:
                if isinstance(statement, ast.AnnAssign) and statement.value is None:
                    pending.append(statement)
                else:
                    self.step(statement, pending)
                    pending = []
        return self

    def step(self, statement: ast.stmt, pending: list[ast.AnnAssign]) -> None:
        if isinstance(statement, ast.Return):
            self.result = eval(compile(ast.Expression(statement.value), "trace", "eval"), self.names)
            return
        notes = [*pending, statement] if isinstance(statement, ast.AnnAssign) else pending
        before = {name: v._version for name, v in self.tensors().items()}
        exec(compile(ast.Module([statement], []), "trace", "exec"), self.names)
        if isinstance(statement, ast.Delete):
            return
        said = {note.target.id: Facts(note.annotation.value) for note in notes}
        written = {name for facts in said.values() for name in facts.writes}
        self.facts |= {name: facts for name, facts in said.items() if name != "_"}
        for name, facts in said.items():
            if name != "_":
                self.check(name, facts)
        for name, version in before.items():
            value = self.names.get(name)
            shared = any(self.share(name, other) for other in written)
            if isinstance(value, torch.Tensor) and not shared:
                assert value._version == version, f"{name} was written by line {statement.lineno}"

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: v for name, v in self.names.items() if isinstance(v, torch.Tensor) and name != "_"}

    def tensor_inputs(self) -> list[str]:
        return [name for name, value in self.inputs.items() if isinstance(value, torch.Tensor)]

    def share(self, a: str, b: str) -> bool:
        return a == b or (self.facts[a].alias != 0 and self.facts[a].alias == self.facts[b].alias)

    def check(self, name: str, facts: Facts) -> None:
        value = self.names[name]
        assert isinstance(value, torch.Tensor) == facts.is_tensor, name
        if not facts.is_tensor:
            assert facts.type == "object" or type(value).__name__ == facts.type, name
            return
        assert value.dtype == facts.dtype and tuple(value.shape) == facts.shape, name
        assert value.stride() == facts.strides, (name, value.stride(), facts.strides)
        of_input = any(self.share(name, x) or storage(value) == storage(self.inputs[x]) for x in self.tensor_inputs())
        copied = value.storage_offset() - facts.offset == self.shift  # as_strided_scatter keeps its input's offset
        assert value.storage_offset() == facts.offset + (self.shift if of_input or copied else 0), name
        for other, tensor in self.tensors().items():
            same = tensor.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
            if value.numel() and tensor.numel():
                assert same == self.share(name, other), f"{name} and {other}: storage shared: {same}"

    def leaves(self) -> list[Any]:
        """The values in the result, then the inputs."""
        found: list[Any] = []

        def walk(value: Any) -> None:
            if isinstance(value, (tuple, list)):
                for item in value:
                    walk(item)
            elif isinstance(value, dict):
                walk(list(value.items()))
            else:
                found.append(value)

        walk(self.result)
        return found + list(self.inputs.values())


def same_contents(a: Any, b: Any) -> bool:
    """Equal up to rounding, and of the same dtype, shape and strides."""
    if not isinstance(a, torch.Tensor):
        return type(a) is type(b) and (a == b or a != a or type(a) is object)
    if a.dtype != b.dtype or a.shape != b.shape or a.stride() != b.stride():
        return False
    return torch.allclose(a.resolve_conj(), b.resolve_conj(), rtol=1e-6, atol=1e-6, equal_nan=True)


def storage(value: torch.Tensor) -> int:
    """A number that two tensors have in common when they share storage."""
    return value.untyped_storage().data_ptr()


def assert_same(source: Run, expected: Run) -> None:
    """Results and inputs agree in contents, in who is who, and in who shares storage with whom."""
    before, after = source.leaves(), expected.leaves()
    assert len(before) == len(after)
    for i, (a, b) in enumerate(zip(before, after, strict=True)):
        assert same_contents(a, b), f"result or input {i}:\n{a}\n{b}"
        for j in range(i):
            if isinstance(a, torch.Tensor) and isinstance(before[j], torch.Tensor):
                assert (a is before[j]) == (b is after[j]), f"identity of {j} and {i}"
                if a.numel() and before[j].numel():
                    shared = storage(a) == storage(before[j])
                    assert shared == (storage(b) == storage(after[j])), f"storage of {j} and {i}"
