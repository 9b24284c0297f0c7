"""Triton kernels, compiled by Triton and launched from C."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from thunder import _C
from thunder._errors import KernelCompileError

Extent = int | Sequence[int]

_ELEMENTS = {
    "bool": "i1",
    "float16": "fp16",
    "bfloat16": "bf16",
    "float32": "fp32",
    "float64": "fp64",
    "float8_e4m3fn": "fp8e4nv",
    "float8_e4m3fnuz": "fp8e4b8",
    "float8_e5m2": "fp8e5",
    "float8_e5m2fnuz": "fp8e5b16",
    **{f"int{n}": f"i{n}" for n in (8, 16, 32, 64)},
    **{f"uint{n}": f"u{n}" for n in (8, 16, 32, 64)},
}
"""torch's dtypes by Triton's names."""

_DECLARED = {"i1": "bool", "u1": "bool", "fp32": "f32", "fp64": "f64"}
_DECLARED |= {f"{sign}{n}": f"{sign}{n}" for sign in "iu" for n in (8, 16, 32, 64)}
"""Types that an annotation fixes, by the codes of thunder._C."""

_IF_ONE, _IF_ALIGNED = 1, 2


def _constants(fn: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Compile-time arguments by name; takes them out of `given`."""
    constants = {}
    for p in fn.params:
        if p.name in given:
            constants[p.name] = given.pop(p.name)
        elif p.is_constexpr:
            if p.default is inspect.Parameter.empty:
                raise TypeError(f"{fn.__name__} needs a value for its constexpr parameter {p.name!r}")
            constants[p.name] = p.default
    return constants


def _parameter(fn: Any, p: Any) -> tuple[str, str, str, int]:
    """What thunder._C has to know of one run-time parameter."""
    fixed = p.annotation_type
    special = 0 if p.do_not_specialize else _IF_ONE | (0 if p.do_not_specialize_on_alignment else _IF_ALIGNED)
    if not fixed:
        return p.name, "any", "auto", special
    if fixed.startswith("*") or fixed not in _DECLARED:
        raise TypeError(
            f"parameter {p.name!r} of {fn.__name__} is annotated {fixed}; supported are {', '.join(_DECLARED)}"
        )
    return p.name, fixed, _DECLARED[fixed], 0 if _DECLARED[fixed][0] in "fb" else special


def compile_triton(
    fn: Any, key: Sequence[tuple[str, str]], constants: Mapping[str, Any], options: Mapping[str, Any], arch: int
) -> tuple[Any, int]:
    """Compiles a ``@triton.jit`` function; needs no GPU.

    Args:
        fn: the function.
        key: for each run-time parameter its type ("*float32", "i32", "none"; "" where its annotation says it), and what
            its value is like: "1", "D" for divisible by 16, or "".
        constants: values of the other parameters.
        options: Triton's: num_warps, num_stages, ...
        arch: compute capability as 10 * major + minor.

    Returns:
        Triton's compiled kernel, and the mask of the run-time parameters that its code takes.

    Raises:
        KernelCompileError: Triton refuses the function.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import ASTSource, make_backend

    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    signature: dict[str, str] = {}
    values: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    passed, runtime = 0, iter(enumerate(key))
    for at, p in enumerate(fn.params):
        if p.name in constants:
            signature[p.name], values[at,] = "constexpr", constants[p.name]
            continue
        i, (kind, value) = next(runtime)
        if kind == "none" or value == "1":
            signature[p.name], values[at,] = "constexpr", None if kind == "none" else 1
            continue
        star = "*k" if p.is_const else "*"
        signature[p.name] = star + _ELEMENTS[kind[1:]] if kind.startswith("*") else kind or p.annotation_type
        if value:
            attributes[at,] = backend.parse_attr(value)
        passed |= 1 << i
    try:
        source = ASTSource(fn, signature, values, attributes)
        return triton.compile(source, target=target, options=dict(options)), passed
    except triton.CompilationError as error:
        raise KernelCompileError(fn.__name__, str(error)) from error


def _launchable(name: str, metadata: Any) -> None:
    if getattr(metadata, "num_ctas", 1) != 1:
        raise ValueError(f"{name}: num_ctas={metadata.num_ctas}; clusters of blocks are not supported")
    for option in ("launch_cooperative_grid", "launch_pdl"):
        if getattr(metadata, option, False):
            raise ValueError(f"{name}: {option} is not supported")


def triton_kernel(
    fn: Any,
    grid: Extent | Callable[[dict[str, Any]], Extent],
    *,
    num_warps: int = 4,
    num_stages: int | None = None,
    **constexprs: Any,
) -> _C.CudaKernel:
    """A callable that launches a ``@triton.jit`` function with C's launch costs instead of Triton's.

    Triton compiles it once for each combination of dtypes, device, pointers and integers divisible by 16, and integers
    that are 1, as Triton itself would; ``do_not_specialize`` and annotations such as ``n: tl.int64`` count. A call
    takes the parameters that are not bound here, by position or by name, and returns None without waiting.

    Args:
        fn: the function; for an autotuned one, its ``fn`` and the constants that were found best.
        grid: one to three sizes, or a function of one dict that holds every argument and constant by name, as in
            Triton. An empty grid launches nothing.
        num_warps: warps of a block.
        num_stages: of software pipelining; None: Triton's default.
        constexprs: values of parameters, and further options of Triton's (``maxnreg``).

    Raises:
        TypeError: `fn` is no ``@triton.jit`` function, a constexpr lacks its value, or a name is neither a parameter
            nor an option.
        ImportError: Triton is not installed.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import JITFunction

    if not isinstance(fn, JITFunction):
        raise TypeError(f"triton_kernel takes a @triton.jit function, not {type(fn).__name__}")
    constants = _constants(fn, constexprs)
    known = vars(make_backend(GPUTarget("cuda", 90, 32)).parse_options({}))
    for option in constexprs:
        if option not in known:
            raise TypeError(f"{fn.__name__} has no parameter {option!r}, and Triton no such option")
    options = {"num_warps": num_warps, **constexprs}
    if num_stages is not None:
        options["num_stages"] = num_stages
    runtime = [p for p in fn.params if p.name not in constants]

    def build(device: int, key: Sequence[tuple[str, str]]) -> tuple:
        compiled, passed = compile_triton(fn, key, constants, options, _C.cuda_arch(device))
        meta = compiled.metadata
        _launchable(fn.__name__, meta)
        hidden = [getattr(meta, f"{use}_scratch_size", None) for use in ("global", "profile")]
        scratch = tuple(size for size in hidden if size is not None)
        return compiled.asm["cubin"], meta.name, 32 * meta.num_warps, meta.shared, passed, scratch

    defaults = [p.default for p in runtime if p.default is not inspect.Parameter.empty]
    kernel = _C.CudaKernel(
        fn.__name__, tuple(_parameter(fn, p) for p in runtime), grid, build, meta=constants, defaults=tuple(defaults)
    )
    kernel.__doc__ = fn.__doc__
    return kernel
