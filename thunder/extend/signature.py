"""Parameters of CUDA C kernels, read from their declaration."""

from __future__ import annotations

import re
from dataclasses import dataclass

SCALARS = {
    "bool": "bool",
    "char": "i8",
    "signed char": "i8",
    "unsigned char": "u8",
    "short": "i16",
    "unsigned short": "u16",
    "int": "i32",
    "unsigned": "u32",
    "long": "i64",
    "unsigned long": "u64",
    "long long": "i64",
    "unsigned long long": "u64",
    "size_t": "u64",
    "ptrdiff_t": "i64",
    "float": "f32",
    "double": "f64",
    **{f"int{n}_t": f"i{n}" for n in (8, 16, 32, 64)},
    **{f"uint{n}_t": f"u{n}" for n in (8, 16, 32, 64)},
}
"""What a number may be declared as, and the code that thunder._C knows it by."""

_INTEGERS = {"i": "int", "u": "uint"}
_ELEMENTS = {
    **{name: f"{_INTEGERS[code[0]]}{code[1:]}" for name, code in SCALARS.items() if code[0] in _INTEGERS},
    "bool": "bool",
    "float": "float32",
    "double": "float64",
    "half": "float16",
    "__half": "float16",
    "__nv_bfloat16": "bfloat16",
    "nv_bfloat16": "bfloat16",
    "__nv_fp8_e4m3": "float8_e4m3fn",
    "__nv_fp8_e5m2": "float8_e5m2",
}
del _ELEMENTS["char"]  # bytes of anything

_NOISE = re.compile(r"\b(const|volatile|__restrict__|__restrict|restrict|__grid_constant__|struct|std::)(?=\W|\b)")
_ATTRIBUTE = re.compile(r"__(?:launch_bounds|cluster_dims|maxnreg)__\s*\([^)]*\)")
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)


@dataclass(frozen=True)
class Parameter:
    """One parameter: its name, its declaration as written, and the code of its type ("*float32", "i64", ...)."""

    name: str
    declared: str
    type: str


def _split(text: str) -> list[str]:
    """At the commas that are in no brackets."""
    parts, depth, start = [], 0, 0
    for at, c in enumerate(text):
        depth += (c in "<([{") - (c in ">)]}")
        if c == "," and depth == 0:
            parts.append(text[start:at])
            start = at + 1
    return [*parts, text[start:]]


def _words(declared: str) -> str:
    words = re.sub(r"\bint\b(?=.*\b(long|short|unsigned)\b)|(?<=\w )\bint\b", " ", declared).split()
    if "unsigned" in words:  # may stand anywhere: long unsigned
        words = ["unsigned", *(w for w in words if w != "unsigned")]
    if words[:1] == ["signed"] and words[1:] != ["char"]:
        words = words[1:] or ["int"]
    return " ".join(words)


def _parameter(text: str) -> Parameter:
    declared = " ".join(text.split())
    plain = _NOISE.sub(" ", declared)
    pointers = plain.count("*") + len(re.findall(r"\[\s*\w*\s*\]", plain))
    plain = re.sub(r"\[\s*\w*\s*\]|\*", " ", plain).strip()
    found = re.fullmatch(r"(.*[\s>])(\w+)", plain, re.DOTALL)
    if not found or not re.match(r"[A-Za-z_]", found[2]) or found[2] in SCALARS:
        raise ValueError(f"parameter {declared!r} of a kernel needs a type and a name")
    kind, name = _words(found[1]), found[2]
    if "=" in declared or "&" in declared or pointers > 1 or (not pointers and kind not in SCALARS):
        raise ValueError(
            f"parameter {name!r} of a kernel is declared {declared!r}; supported are pointers to numbers, and by value "
            f"{', '.join(SCALARS)}"
        )
    return Parameter(
        name, declared.removesuffix(name).strip(), f"*{_ELEMENTS.get(kind, '')}" if pointers else SCALARS[kind]
    )


def parse_signature(text: str) -> tuple[Parameter, ...]:
    """Parameters of a list like ``"const float* x, float* out, int64_t n"``.

    Raises:
        ValueError: a parameter has no name, or a type that cannot be passed.
    """
    text = _COMMENT.sub(" ", text).strip()
    if text in ("", "void"):
        return ()
    parameters = tuple(_parameter(part) for part in _split(text))
    names = [p.name for p in parameters]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"parameter {twice[0]!r} of a kernel is declared twice")
    return parameters


def find_signature(source: str, name: str) -> str:
    """The parameter list of the ``__global__`` function of that name.

    Raises:
        ValueError: the source declares none; the message lists those that it declares.
    """
    plain = _ATTRIBUTE.sub(" ", _COMMENT.sub(" ", source))
    base = name.split("<")[0].split("::")[-1].strip()
    kernels: dict[str, str] = {}
    for found in re.finditer(r"__global__[^;{}()]*?\b(\w+)\s*\(", plain):
        depth, end = 1, found.end()
        while depth and end < len(plain):
            depth += (plain[end] == "(") - (plain[end] == ")")
            end += 1
        kernels.setdefault(found[1], plain[found.end() : end - 1])
    if base not in kernels:
        known = f"; it declares {', '.join(kernels)}" if kernels else ""
        raise ValueError(f"the source has no __global__ function {base!r}{known}")
    return kernels[base]
