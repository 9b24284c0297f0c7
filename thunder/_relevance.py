"""Which attributes and globals can matter to a program that ran: those whose names occur in the code that ran.

Code reads an attribute by a name in its ``co_names``, or by a string of its own given to ``getattr``. Where it may have
made the name up (``getattr(self, f"layer{i}")``, ``vars(self)``), every name can matter.
"""

from __future__ import annotations

import dis
import functools
from collections.abc import Iterable
from types import CodeType
from typing import Any

# What gives attributes without naming them.
_WHOLE = frozenset(
    ("__dict__", "vars", "dir", "__getattribute__", "__getstate__", "__reduce_ex__", "locals", "globals", "attrgetter")
)
_BY_STRING = frozenset(("getattr", "hasattr", "setattr", "delattr"))
# nn.Module's own look-up: its names are those that the caller's code mentions, or keys of dictionaries watched whole.
_LOOKS_UP = "torch/nn/modules/module.py"


def names(codes: Iterable[CodeType]) -> frozenset[str] | None:
    """Names that code mentions; ``None``: any name can matter."""
    found: set[str] = set()
    for code in codes:
        known = _names_of(code)
        if known is None:
            return None
        found |= known
    return frozenset(found)


@functools.lru_cache(maxsize=4096)
def _names_of(code: CodeType) -> frozenset[str] | None:
    mentioned = frozenset(code.co_names)
    looks_up = code.co_filename.replace("\\", "/").endswith(_LOOKS_UP)
    if not looks_up and (mentioned & _WHOLE or (mentioned & _BY_STRING and _makes_names(code))):
        return None
    return mentioned | frozenset(_strings(code.co_consts))


@functools.lru_cache(maxsize=4096)
def asks_types(code: CodeType) -> tuple[str, ...]:
    """Local variables whose type code compares, keeps or passes on: ``type(x) is Tensor``, ``x.__class__.__name__``.

    An attribute that a subclass inherits and ``type(x)(...)`` are no matter. "" stands for other expressions.
    """
    found = []
    ops = [i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "EXTENDED_ARG", "PUSH_NULL", "PRECALL")]
    for at, i in enumerate(ops):
        if i.argval == "type" and i.opname.startswith("LOAD_") and _is_no_attribute(ops, at):
            call = next((n for n in range(at + 1, len(ops)) if ops[n].opname.startswith("CALL")), at)
            if call > at and ops[call].arg == 1 and _looked_at(ops[call + 1 :]):
                found.append(ops[at + 1].argval if call == at + 2 and "FAST" in ops[at + 1].opname else "")
        elif i.opname == "LOAD_ATTR" and i.argval == "__class__" and _looked_at(ops[at + 1 :]):
            found.append(ops[at - 1].argval if at and "FAST" in ops[at - 1].opname else "")
    return tuple(name for name in dict.fromkeys(found) if not _is_caught(code, ops, name))


def _is_caught(code: CodeType, ops: list[dis.Instruction], name: str) -> bool:
    """Is it a variable that holds exceptions alone, of ``except ValueError as name``? None is put there at the end."""
    stores = [at for at, i in enumerate(ops) if i.opname == "STORE_FAST" and i.argval == name]
    match = [any(i.opname == "CHECK_EXC_MATCH" for i in ops[max(at - 3, 0) : at]) for at in stores]
    end = [ops[at - 1].opname == "LOAD_CONST" and ops[at - 1].argval is None for at in stores]
    arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return any(match) and name not in arguments and all(m or e for m, e in zip(match, end, strict=True))


def _is_no_attribute(ops: list[dis.Instruction], at: int) -> bool:
    """Is it the builtin that the instruction loads, and not ``x.device.type``?"""
    attribute = ops[at].opname in ("LOAD_ATTR", "LOAD_METHOD")
    return "FAST" not in ops[at].opname and (not attribute or ops[at - 1].argval == "builtins")


def _looked_at(following: list[dis.Instruction]) -> bool:
    """Is the class on top of the stack used for more than what it and its subclasses do alike?"""
    above, before = 0, ""  # how much lies on top of it; the instruction before
    for i in following:
        if i.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            if above == 0:
                return i.argval in ("__name__", "__qualname__", "__module__", "__mro__")
        elif i.opname.startswith("LOAD_"):
            above += 1
        elif i.opname.startswith("CALL"):
            arguments = 1 + (i.arg or 0) % 2 if i.opname == "CALL_FUNCTION_EX" else i.arg or 0
            if above < arguments:
                return True
            above -= arguments + (before == "GET_ITER" and not arguments)  # a generator expression takes its iterator
            if above == 0:  # it is what is called
                return False
        elif i.opname.startswith("BUILD_") and above >= (i.arg or 0):
            above += 1 - (i.arg or 0)
        else:
            left = above + dis.stack_effect(i.opcode, i.arg if i.opcode >= dis.HAVE_ARGUMENT else None)
            if above == 0 or left < 1:
                return i.opname != "POP_TOP"
            above = left
        before = i.opname
    return True


def _strings(constant: Any) -> Iterable[str]:
    if isinstance(constant, str):
        yield constant
    elif isinstance(constant, (tuple, frozenset)):
        for part in constant:
            yield from _strings(part)


def _makes_names(code: CodeType) -> bool:
    """Is ``getattr`` or the like used with anything but a constant for the name, or passed on?"""
    instructions = [i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "EXTENDED_ARG")]
    return any(
        i.argval in _BY_STRING and i.opname.startswith("LOAD_") and not _names_a_constant(instructions[at + 1 :])
        for at, i in enumerate(instructions)
    )


def _names_a_constant(following: list[dis.Instruction]) -> bool:
    """Do these instructions, after the one that loads the function, push an object, then a string, then call?"""
    depth, constant = 0, False  # of what is on the stack above the function; the second thing there is a string
    for instruction in following:
        name, argument = instruction.opname, instruction.arg
        if name == "PUSH_NULL":
            continue
        if name in ("PRECALL", "CALL", "CALL_KW", "CALL_FUNCTION") and depth == argument:
            return constant
        if "JUMP" in name or name.startswith(("RETURN", "STORE", "FOR_ITER")):
            return False
        before = depth
        depth += dis.stack_effect(instruction.opcode, argument if instruction.opcode >= dis.HAVE_ARGUMENT else None)
        if before == 1 and depth == 2:
            constant = name.startswith("LOAD_CONST") and isinstance(instruction.argval, str)
        elif depth <= 2:  # what stood there went into something
            constant = False
    return False
