"""Kernels of one's own without a GPU: declarations, packing, launches on a driver that writes them down, compiling.

What needs a GPU is in test_cuda_kernels_gpu.py.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import thunder
from thunder.extend.cuda import compile_cuda, cuda_kernel
from thunder.extend.signature import find_signature, parse_signature
from thunder.extend.toolkit import find_nvrtc

ROOT = Path(__file__).resolve().parent.parent

SOURCE = """// adds
extern "C" __global__ void __launch_bounds__(256) add(const float* x, const float* y, float* out, int64_t n) {
    int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x;
    if (i < n) out[i] = x[i] + y[i];
}
template <typename T> __global__ void scale(T* x, float factor, int n) {
    if (threadIdx.x < n) x[threadIdx.x] *= factor;
}
"""


# ---- declarations ----


@pytest.mark.parametrize(
    ("text", "types"),
    [
        ("const float* __restrict__ x, float *out, int64_t n", ["*float32", "*float32", "i64"]),
        ("const __nv_bfloat16* x, __half * y, double z, float const w", ["*bfloat16", "*float16", "f64", "f32"]),
        ("unsigned long long a, long unsigned int b, unsigned c, long int d", ["u64", "u64", "u32", "i64"]),
        ("short a, signed char b, unsigned char c, bool d, size_t e", ["i16", "i8", "u8", "bool", "u64"]),
        ("void* a, char* b, float4* c, const T* d, int v[], std::uint8_t* e", ["*", "*", "*", "*", "*int32", "*uint8"]),
        ("float* x /* in, out */, int n // how many", ["*float32", "i32"]),
        ("Pair<int, float>* p, int64_t* q", ["*", "*int64"]),
        ("void", []),
        ("", []),
    ],
)
def test_a_parameter_list_is_read(text, types):
    assert [p.type for p in parse_signature(text)] == types


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("float", "'float' of a kernel needs a type and a name"),
        ("float* x, int", "'int' of a kernel needs"),
        ("float** x", "parameter 'x' of a kernel is declared 'float\\*\\* x'"),
        ("float& x", "parameter 'x'"),
        ("half h", "parameter 'h' of a kernel is declared 'half h'; supported are pointers"),
        ("Shape s", "parameter 's'"),
        ("int n = 3", "declared 'int n = 3'|needs a type and a name"),
        ("int n, float n", "parameter 'n' of a kernel is declared twice"),
    ],
)
def test_a_parameter_that_cannot_be_passed_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_signature(text)


def test_the_parameter_list_is_found_in_the_source():
    assert find_signature(SOURCE, "add") == "const float* x, const float* y, float* out, int64_t n"
    assert find_signature(SOURCE, "scale<double>") == "T* x, float factor, int n"
    with pytest.raises(ValueError, match="no __global__ function 'sub'; it declares add, scale"):
        find_signature(SOURCE, "sub")


def test_a_signature_of_another_length_than_the_source_declares_is_refused():
    with pytest.raises(ValueError, match="the signature of 'add' has 1 parameters, the source declares 4"):
        cuda_kernel(SOURCE, "add", "float* x", grid=1)


@pytest.mark.parametrize("block", [0, 1025, (32, 33), (1, 1, 1, 1), (8, -1), ()])
def test_a_block_that_no_gpu_runs_is_refused_at_once(block):
    with pytest.raises(ValueError, match="block="):
        cuda_kernel(SOURCE, "add", grid=1, block=block)


def test_an_impossible_amount_of_shared_memory_and_a_missing_grid_are_refused():
    for shared in (-1, 2**32 + 16):
        with pytest.raises(ValueError, match=r"below 2\*\*31"):
            cuda_kernel(SOURCE, "add", grid=1, shared=shared)
    with pytest.raises(TypeError, match="cuda_kernel needs a grid"):
        cuda_kernel(SOURCE, "add")


def test_more_than_64_parameters_are_refused():
    with pytest.raises(ValueError, match="wide has 65 parameters; at most 64 are supported"):
        cuda_kernel("", "wide", ", ".join(f"int a{i}" for i in range(65)), grid=1)


# ---- launches, on a driver that writes them down ----

PRELUDE = """
import json, sys
import torch, thunder
from thunder import _C

def kernel(types, grid=1, block=32, shared=0, entry="k", scratch=(), passed=-1, meta=None, defaults=(), special=0):
    sizes = {"*": 8, "b": 1, "a": 8}
    def size(t):
        return sizes.get(t[0]) or int(t[1:]) // 8
    given = [t for i, t in enumerate(types) if passed >> i & 1]
    image = " ".join(str(size(t)) for t in given + ["*"] * len(scratch)).encode()
    def build(device, key):
        builds.append((device, key))
        mask = (1 << len(types)) - 1 if passed < 0 else passed
        return image, entry, block, shared, mask, scratch
    builds = []
    params = tuple((f"p{i}", t, t, special) for i, t in enumerate(types))
    k = _C.CudaKernel("k", params, grid, build, meta=meta, defaults=defaults, device="cpu")
    k.builds = builds
    return k

def error(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    return "none"

x = torch.ones(8)
"""


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    """A function: a script after PRELUDE -> (what it printed, the launches)."""
    cc = shutil.which("cc") or shutil.which("gcc")
    if not cc:
        pytest.skip("no C compiler to build the driver's stand-in")
    folder = tmp_path_factory.mktemp("stub")
    library = folder / "libcuda_stub.so"
    subprocess.run([cc, "-shared", "-fPIC", "-o", library, ROOT / "tests/c/cuda_stub.c"], check=True)

    def run(script, **env):
        log = folder / "log"
        log.write_text("")
        done = subprocess.run(
            [sys.executable, "-c", PRELUDE + script],
            env={**os.environ, "THUNDER_CUDA_DRIVER": str(library), "STUB_LOG": str(log), **env},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines(), log.read_text().splitlines()

    return run


def test_arguments_arrive_as_declared(stub):
    printed, launches = stub("""
k = kernel(["*float32", "i8", "u16", "i32", "i64", "u64", "f32", "f64", "bool", "*"])
k(x, -2, 65535, -3, -4, 2**64 - 1, 1.5, -0.25, True, None)
print(f"{x.data_ptr():016x}")
""")
    cells = "fe ffff fffffffd fffffffffffffffc ffffffffffffffff 3fc00000 bfd0000000000000 01 0000000000000000"
    assert launches == [f"launch 1,1,1 32,1,1 0 {printed[0]} {cells}"]


def test_a_view_starts_at_its_own_data(stub):
    printed, launches = stub('k = kernel(["*"])\nk(x[3:])\nprint(f"{x.data_ptr() + 12:016x}")')
    assert launches[0].endswith(printed[0])


def test_arguments_may_be_named_and_have_defaults(stub):
    printed, launches = stub("""
k = kernel(["*", "i32", "i32"], defaults=(7,))
k(x, p1=5)
k(p2=1, p0=x, p1=2)
print(error(k, x)); print(error(k, x, 1, 2, 3)); print(error(k, x, 1, p1=2)); print(error(k, x, q=2))
""")
    assert [line.split()[-2:] for line in launches] == [["00000005", "00000007"], ["00000002", "00000001"]]
    assert printed == [
        "TypeError: k lacks an argument for parameter 2, 'p1'",
        "TypeError: k takes 3 arguments, not 4",
        "TypeError: k got two values for parameter 'p1'",
        "TypeError: k has no parameter 'q'",
    ]


def test_an_argument_that_does_not_fit_is_named(stub):
    printed, launches = stub("""
k = kernel(["*float32", "i32", "u8", "f32", "bool"])
good = [x, 1, 1, 1.0, True]
for at, bad in [(0, x.double()), (0, 3), (1, 2**31), (1, 1.5), (1, x), (2, -1), (2, 256), (3, "s"), (4, 1),
                (0, x.to("meta"))]:
    print(error(k, *[bad if i == at else a for i, a in enumerate(good)]))
print(error(kernel(["i32"]), 1))
""")
    assert printed == [
        "TypeError: k: parameter 'p0' (*float32): a tensor of float32 is expected, not float64",
        "TypeError: k: parameter 'p0' (*float32): a tensor is expected, not int",
        "OverflowError: k: parameter 'p1' (i32): 2147483648 does not fit",
        "TypeError: k: parameter 'p1' (i32): an int is expected, not float",
        "TypeError: k: parameter 'p1' (i32): a number is expected, not a tensor",
        "OverflowError: k: parameter 'p2' (u8): -1 does not fit",
        "OverflowError: k: parameter 'p2' (u8): 256 does not fit",
        "TypeError: k: parameter 'p3' (f32): a float is expected, not str",
        "TypeError: k: parameter 'p4' (bool): a bool is expected, not int",
        "ValueError: k: parameter 'p0' (*float32): the tensor is on meta, and the kernel runs on CPU tensors",
        "TypeError: k: no tensor says on which device to run",
    ]
    assert launches == []


def test_the_grid_follows_the_arguments(stub):
    printed, launches = stub("""
kernel(["*", "i32"], grid=lambda x, n: (n, 2))(x, 5)
kernel(["*", "i32"], grid=lambda x, n: n)(x, 6)
kernel(["*", "i32"], grid=(1, 2, 3))(x, 6)
kernel(["*", "i32"], grid=lambda meta: (meta["p1"] // meta["B"],), meta={"B": 4})(x, 32)
kernel(["*", "i32"], grid=lambda x, n: (n, 0))(x, 5)
for bad in [(1, 65536), (1, 2, 3, 4), (-1,), (), "x", None, (2**31,)]:
    print(error(kernel(["*"], grid=lambda x: bad), x))
""")
    assert [line.split()[1] for line in launches] == ["5,2,1", "6,1,1", "1,2,3", "8,1,1"]
    assert printed[:4] == [
        "ValueError: size 1 of the grid is 65536; it may be 0 to 65535",
        "ValueError: a grid has 1 to 3 sizes, not 4",
        "ValueError: size 0 of the grid is -1; it may be 0 to 2147483647",
        "ValueError: a grid has 1 to 3 sizes, not 0",
    ]
    assert all(line.startswith(("TypeError", "ValueError")) for line in printed)


def test_a_kernel_is_built_once_and_what_its_build_raises_comes_through(stub):
    printed, launches = stub("""
k = kernel(["*float32", "i64"], block=(8, 4))
for n in (1, 2, 16): k(x, n)
print(k.builds, k)
def broken(device, key): raise KeyError("no")
print(error(_C.CudaKernel("k", (("p", "t", "*", 0),), 1, broken, device="cpu"), x))
""")
    assert printed[0] == "[(0, (('', ''), ('', '')))] <thunder GPU kernel k: 2 parameters, 1 built>"
    assert printed[1] == "KeyError: 'no'"
    assert len(launches) == 3 and all(" 8,4,1 " in line for line in launches)


def test_code_that_depends_on_values_is_built_for_each_kind_of_value(stub):
    printed, launches = stub("""
k = kernel(["auto", "auto"], special=3)
a = torch.ones(64)
assert a.data_ptr() % 16 == 0
for x, y in [(a, 32), (a, 48), (a[1:], 1), (a.half(), 2**40 + 1), (a, None), (a, 1.5), (a, True), (a, 2**63),
             (a, 2**31), (a, a.to(torch.int8)[1:])]:
    k(x, y)
for _, key in k.builds: print(key)
""")
    assert printed == [
        "(('*float32', 'D'), ('i32', 'D'))",
        "(('*float32', ''), ('i32', '1'))",
        "(('*float16', 'D'), ('i64', ''))",
        "(('*float32', 'D'), ('none', ''))",
        "(('*float32', 'D'), ('fp32', ''))",
        "(('*float32', 'D'), ('u1', ''))",
        "(('*float32', 'D'), ('u64', 'D'))",
        "(('*float32', 'D'), ('i64', 'D'))",
        "(('*float32', 'D'), ('*int8', ''))",
    ]
    assert len(launches) == 10


def test_parameters_that_became_constants_are_left_out_and_hidden_ones_are_null(stub):
    _, launches = stub('kernel(["*", "i32"], passed=0b10, scratch=(0, 0))(x, 9)')
    assert launches == ["launch 1,1,1 32,1,1 0 00000009 0000000000000000 0000000000000000"]


def test_big_shared_memory_is_asked_for(stub):
    printed, launches = stub("""
kernel(["*"], shared=48 * 1024)(x)
kernel(["*"], shared=100_000)(x)
print(error(kernel(["*"], shared=300_000), x))
print(error(kernel(["*"], block=(32, 64)), x))
""")
    assert [line.split()[:3] for line in launches[1:2]] == [["attribute", "8", "100000"]]
    assert [line.split()[3] for line in (launches[0], launches[2])] == ["49152", "100000"]
    assert printed[0] == "RuntimeError: k: 300000 bytes of shared memory: the device has 232448 a block"
    assert printed[1] == "ValueError: k: a block of 2048 threads; it may have 1 to 1024"


def test_what_the_driver_reports_is_raised(stub):
    printed, _ = stub("""
print(error(kernel(["*"], grid=13), x))
print(error(kernel(["*"], entry="absent"), x))
""")
    assert printed == [
        "RuntimeError: k: launching the kernel: CUDA_ERROR_LAUNCH_FAILED (unspecified failure)",
        "RuntimeError: k: no function absent in the code: CUDA_ERROR_NOT_FOUND (?)",
    ]


def test_a_machine_without_a_device_is_told_so(stub):
    script = 'print(error(kernel(["*"]), x))'
    printed, _ = stub(script, STUB_NO_DEVICE="1")
    assert printed == ["RuntimeError: no CUDA driver: starting the CUDA driver: CUDA_ERROR_NO_DEVICE (?)"]
    printed, _ = stub(script, THUNDER_CUDA_DRIVER="/nowhere/libcuda.so")
    assert printed[0].startswith("RuntimeError: no CUDA driver: cannot open /nowhere/libcuda.so")


def test_the_road_without_torch_abi_packs_the_same(stub):
    script = 'kernel(["*float32", "i32"])(x, 3)\nprint(f"{x.data_ptr():016x}")\nprint(error(kernel(["*int8"]), x))'
    printed, launches = stub(script, THUNDER_TORCH_ABI="0")
    assert launches[0].endswith(f"{printed[0]} 00000003")
    assert printed[1] == "TypeError: k: parameter 'p0' (*int8): a tensor of int8 is expected, not float32"


def test_a_kernel_inside_a_captured_function_is_refused(stub):
    printed, launches = stub("""
k = kernel(["*"])
def f(a):
    k(a)
    return a
print(error(thunder.jit(f, fallback='error'), x))
""")
    assert "torch.library.custom_op" in printed[0]
    assert launches == []


def test_importing_thunder_opens_no_library_of_cudas():
    script = """
import sys, torch
def seen():
    maps = open("/proc/self/maps").read()
    return [name for name in ("libcuda.so", "libnvrtc.so") if name in maps] + ["triton"] * ("triton" in sys.modules)
before = seen()
import thunder
print(before == seen(), before, seen())
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.startswith("True"), run.stdout


# ---- compiling CUDA C ----


def _nvrtc_reason() -> str | None:
    try:
        find_nvrtc()
    except RuntimeError as error:
        return str(error)
    return None


needs_nvrtc = pytest.mark.skipif(_nvrtc_reason() is not None, reason="no NVRTC on this machine")


@needs_nvrtc
def test_a_source_becomes_a_cubin_and_templates_are_instantiated(tmp_path, monkeypatch):
    monkeypatch.setenv("THUNDER_CACHE_DIR", str(tmp_path))
    image, entry = compile_cuda(SOURCE, "add", arch=90)
    assert image.startswith(b"\x7fELF") and entry == "add"
    _, entry = compile_cuda(SOURCE, "scale<double>", arch=90)
    assert entry != "scale" and "scale" in entry


@needs_nvrtc
def test_a_gpu_newer_than_the_compiler_gets_ptx(tmp_path, monkeypatch):
    monkeypatch.setenv("THUNDER_CACHE_DIR", str(tmp_path))
    image, _ = compile_cuda(SOURCE, "add", arch=990)
    assert b".entry add" in image


@needs_nvrtc
def test_a_broken_source_names_its_line():
    with pytest.raises(
        thunder.extend.KernelCompileError, match=r"kernel 'add' does not compile, line 4:\n.*z\[i\]"
    ) as e:
        compile_cuda(SOURCE.replace("y[i]", "z[i]"), "add", arch=90)
    assert e.value.line == 4 and 'identifier "z" is undefined' in e.value.log
    assert isinstance(e.value, thunder.ThunderError)


@needs_nvrtc
def test_images_are_kept_on_disk_by_all_that_decides_them(tmp_path, monkeypatch):
    monkeypatch.setenv("THUNDER_CACHE_DIR", str(tmp_path / "new" / "folder"))

    def cached(source=SOURCE, options=(), arch=90):
        return bool(thunder._C.cuda_compile(find_nvrtc(), source, "add", options, arch, None)[2])

    assert [cached(), cached()] == [False, True]
    assert not cached(arch=80)
    assert not cached(options=("--use_fast_math",))
    assert not cached(source=SOURCE + " ")
    assert cached(options=("--use_fast_math",))
    header = SOURCE.replace("// adds", '#if 0\n#include "mine.h"\n#endif')
    assert [cached(header), cached(header)] == [False, False], "the text of mine.h is not in the key"
    assert len(list((tmp_path / "new" / "folder").iterdir())) == 4


@needs_nvrtc
def test_a_folder_that_cannot_be_written_only_costs_time(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("THUNDER_CACHE_DIR", str(tmp_path / "file"))
    assert compile_cuda(SOURCE, "add", arch=90)[0].startswith(b"\x7fELF")


def test_the_search_for_nvrtc_says_where_it_looked(monkeypatch):
    from thunder.extend import toolkit

    monkeypatch.delenv("THUNDER_NVRTC", raising=False)
    monkeypatch.setattr(toolkit, "_roots", lambda: iter([Path("/nowhere")]))
    monkeypatch.setattr(toolkit.torch.version, "cuda", None)
    with pytest.raises(RuntimeError, match=r"no libnvrtc\.so is in /nowhere: install nvidia-cuda-nvrtc"):
        find_nvrtc()


# ---- compiling Triton ----

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@needs_triton
def test_triton_compiles_for_what_the_key_says(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from thunder.executors.triton import kernels
    from thunder.extend.triton import compile_triton

    floats, halves = ("*float32", "D"), ("*bfloat16", "D")
    key = [halves, ("none", ""), halves, floats, ("i32", "D"), ("fp32", ""), ("i32", "1")]
    compiled, passed = compile_triton(kernels._rms_norm_forward, key, {"BLOCK": 1024}, {"num_warps": 2}, 90)
    assert compiled.asm["cubin"].startswith(b"\x7fELF")
    assert compiled.metadata.num_warps == 2
    assert passed == 0b0111101, "None and 1 are constants of the code"


@needs_triton
@pytest.mark.parametrize("name", ["cross_entropy_forward", "cross_entropy_backward", "rms_norm_backward", "sum_rows"])
def test_our_kernels_compile_without_a_gpu(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from thunder.executors.triton import kernels
    from thunder.extend.triton import compile_triton

    f, h, n, i = ("*float32", "D"), ("*float16", "D"), ("*int64", "D"), ("i32", "D")
    key, constants = {
        "cross_entropy_forward": ([h, n, f, f, i, i, i, i], {"BLOCK": 1024}),
        "cross_entropy_backward": ([h, h, n, f, f, h, i, i, i, i, i], {"BLOCK": 1024, "MEAN": True}),
        "rms_norm_backward": ([h, h, h, f, h, f, i, i, i], {"BLOCK": 1024}),
        "sum_rows": ([f, h, i, i], {"ROWS": 64, "COLUMNS": 32}),
    }[name]
    compiled, _ = compile_triton(getattr(kernels, f"_{name}"), key, constants, {"num_warps": 4}, 90)
    assert compiled.metadata.name == f"_{name}"


@needs_triton
def test_triton_kernels_bind_constants_and_refuse_unknown_names():
    from tests.triton_case import scaled
    from thunder.extend import triton_kernel

    kernel = triton_kernel(scaled, lambda meta: meta["n"] // meta["BLOCK"], num_warps=2, BLOCK=64)
    assert repr(kernel) == "<thunder GPU kernel scaled: 5 parameters, 0 built>"
    with pytest.raises(TypeError, match="scaled needs a value for its constexpr parameter 'BLOCK'"):
        triton_kernel(scaled, 1)
    with pytest.raises(TypeError, match="scaled has no parameter 'BLOK', and Triton no such option"):
        triton_kernel(scaled, 1, BLOCK=64, BLOK=32)
    with pytest.raises(TypeError, match=r"takes a @triton\.jit function, not function"):
        triton_kernel(lambda: 0, 1)
    with pytest.raises(TypeError, match="scaled lacks an argument for parameter 2, 'out'"):
        kernel(None)


@needs_triton
def test_a_triton_function_that_does_not_compile_says_where():
    from tests.triton_case import broken
    from thunder.extend.triton import compile_triton

    with pytest.raises(thunder.extend.KernelCompileError, match="undefined_name"):
        compile_triton(broken, [("*float32", "D")], {}, {}, 90)


def test_our_kernels_say_why_they_cannot_serve():
    import torch

    from thunder.executors.triton import cross_entropy_supported, rms_norm_supported, support

    x, labels = torch.randn(4, 8), torch.zeros(4, dtype=torch.int64)
    for answer in (cross_entropy_supported(x, labels), rms_norm_supported(x, (8,))):
        assert not answer[0]
        assert answer[1] in ("Triton is not installed", "input is on cpu, not on a CUDA device")
    assert [support.power_of_two(n) for n in (1, 5, 8)] == [1, 8, 8]
    assert [support.warps_of_row(n) for n in (1, 1024, 65536)] == [1, 2, 16]
