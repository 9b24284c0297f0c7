"""Executors in C: examples/executor_c is built and run, and libraries that are none are refused."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import thunder
from tests.test_executors import blocks, check, units
from thunder.extend.native import load_folder

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "examples" / "executor_c" / "softly.c"


def build(source: Path, to: Path, *flags: str) -> Path:
    command = [sysconfig.get_config_var("CC").split()[0], "-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared"]
    command += ["-fPIC", f"-I{ROOT / 'include'}", *flags, str(source), "-lm", "-o", str(to)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return to


@pytest.fixture(scope="module")
def softly(tmp_path_factory):
    return thunder.extend.load_executor(build(SOURCE, tmp_path_factory.mktemp("executor") / "softly.so"))


def test_it_runs_an_operator_of_torch(softly):
    compiled = check(blocks(), (torch.randn(4, 16),), [softly])
    assert len(re.findall(r"= softly_gelu_\d+\(", str(thunder.last_traces(compiled)[-1]))) == 3
    assert {u.state for u in units(compiled)} == {"trusted"}
    assert thunder.get_executor("softly") is softly and softly.version == "1.0"


def test_it_says_why_it_declines(softly):
    def program(x, y):
        return nn.functional.gelu(x, approximate="tanh") + nn.functional.gelu(y)

    compiled = thunder.jit(program, executors=[softly])
    x, y = torch.randn(3, 4), torch.randn(4, 3).t()
    torch.testing.assert_close(compiled(x, y), nn.functional.gelu(x, approximate="tanh") + nn.functional.gelu(y))
    reasons = {reason for _, _, reason in compiled._thunder_claims.declines}
    assert reasons == {"it has no tanh approximation", "the elements do not lie one after the other"}
    assert units(compiled) == []


def test_new_operator_with_its_derivative(softly):
    silu = softly.operators["scaled_silu"]

    def program(x):
        return silu(x * 2, 3.0).square().sum()

    def reference(x):
        return nn.functional.silu(x * 2 * 3.0).square().sum()

    compiled = thunder.jit(program, executors=[softly])
    for call in (program, compiled, compiled):
        x = torch.randn(5, 7, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        loss = call(x)
        loss.backward()
        expected = reference(y)
        expected.backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(x.grad, y.grad)
    text = str(thunder.last_traces(compiled)[-1]) + str(thunder.last_backward_traces(compiled)[-1])
    assert "softly_scaled_silu_0(" in text and "softly_scaled_silu_backward_0(" in text
    assert thunder.compile_stats(compiled).fallbacks == 0


def test_error_of_a_kernel_names_the_users_line(softly):
    silu = softly.operators["scaled_silu"]
    compiled = thunder.jit(lambda x: silu(x, float("inf")), executors=[softly], verify="off")
    with pytest.raises(RuntimeError, match="scaled_silu: the scale is inf") as caught:
        compiled(torch.randn(3))
    assert "test_executor_c.py" in caught.value.__notes__[0]


def test_empty_and_zero_dimensional_tensors(softly):
    compiled = thunder.jit(lambda x: nn.functional.gelu(x), executors=[softly])
    for x in (torch.randn(0, 3), torch.randn(()), torch.randn(1)):
        torch.testing.assert_close(compiled(x), nn.functional.gelu(x))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int nothing;", "exports no function thunder_executor"),
        ("const th_executor *thunder_executor(void) { return 0; }", "its function returned NULL"),
        (
            "const th_executor *thunder_executor(void) { static th_executor e = {.abi = 99}; return &e; }",
            "built for version 99 of the executor ABI, this is version 1",
        ),
        (
            "const th_executor *thunder_executor(void) { static th_executor e = {.abi = TH_EXECUTOR_ABI, .size = 8}; "
            "return &e; }",
            "its structs have 8 and 0 bytes where",
        ),
        (
            'static const th_x_operator o[] = {{.name = "gelu"}};\n'
            "const th_executor *thunder_executor(void) {\n"
            '    static th_executor e = {TH_EXECUTOR_ABI, sizeof e, "n", "1", o, 1, sizeof *o};\n'
            "    return &e; }",
            "an operator has no name or no execute function",
        ),
    ],
)
def test_libraries_that_are_no_executors_are_refused(tmp_path, text, message):
    source = tmp_path / "other.c"
    source.write_text(f'#include "thunder/executor.h"\n{text}\n')
    library = build(source, tmp_path / "other.so", "-Wno-missing-field-initializers")
    with pytest.raises(ImportError, match=message):
        thunder.extend.load_executor(library)


def test_a_library_is_loaded_once(softly, tmp_path):
    thunder.extend.deregister_executor(softly)
    assert thunder.extend.load_executor(softly.path) is softly is thunder.get_executor("softly")
    with pytest.raises(ImportError, match=r"thunder_softly::\w+ is there already, of another executor"):
        thunder.extend.load_executor(build(SOURCE, tmp_path / "other.so"))


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.warns(thunder.ThunderWarning, match="there is no folder"):
        assert load_folder(tmp_path / "nowhere") == []


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(ImportError, match=r"nowhere\.so"):
        thunder.extend.load_executor(tmp_path / "nowhere.so")


def test_executors_are_found_in_the_folder_of_the_environment(tmp_path):
    build(SOURCE, tmp_path / "softly.so")
    (tmp_path / "broken.so").write_text("no library")
    code = (
        "import warnings; warnings.simplefilter('always')\n"
        "import thunder; print(thunder.get_executor('softly').version)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "THUNDER_EXECUTORS": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert run.stdout.strip() == "1.0"
    assert "THUNDER_EXECUTORS" in run.stderr and "broken.so" in run.stderr


def test_wrong_kernel_in_c_is_reported_and_replaced(tmp_path):
    text = SOURCE.read_text().replace("0.5f * x[i]", "0.6f * x[i]").replace('"softly"', '"wrongly"')
    source = tmp_path / "wrongly.c"
    source.write_text(text.replace("scaled_silu", "scaled_silu_2"))
    wrongly = thunder.extend.load_executor(build(source, tmp_path / "wrongly.so"))
    compiled, x = thunder.jit(lambda x: nn.functional.gelu(x), executors=[wrongly]), torch.randn(9)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            torch.testing.assert_close(compiled(x), nn.functional.gelu(x))
    assert len(seen) == 1 and "executor 'wrongly': its result is off by" in str(seen[0].message)
