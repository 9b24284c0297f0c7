"""The conformance suite: right executors pass, wrong ones are found, and what is declined never counts as right."""

from __future__ import annotations

import json
import sys
import textwrap
import threading
import time

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from thunder import conformance, extend
from thunder.__main__ import main


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    return F.gelu(x, approximate=approximate)


def executor_with(fn, op=F.gelu, **options) -> extend.OperatorExecutor:
    executor = extend.OperatorExecutor("under_test")
    executor.register_implementation(op, fn=fn, **options)
    return executor


def report_on(executor, ops=r"^nn\.functional\.gelu$", samples=1) -> conformance.Report:
    return conformance.run(executor, ops=ops, samples=samples)


def failures(report, key="gelu") -> str:
    assert not report.passed
    return "\n".join(report.rows[key].failures)


def test_right_executor_passes():
    report = report_on(executor_with(gelu), samples=2)
    row = report.rows["gelu"]
    assert report.passed and row.claimed == row.right > 20 and not row.declined
    assert report.never_claimed == [] and report.entries == 1
    assert "1 operators in 1 entries" in str(report)


def test_right_executor_of_regions_passes():
    class Interpreter(extend.FusionExecutor):
        def fuse(self, region):
            names = region.trace.namespace()
            exec(str(region.trace), names)
            return names["region"]

    executor = Interpreter("regions_under_test")
    executor.support_all()
    report = report_on(executor)
    assert report.passed and report.rows["gelu"].right and report.rows["aten.gelu_backward"].right
    assert "mul" not in report.rows  # the operation behind it is not under test


WRONG = {
    "strides": (lambda x: x.as_strided(x.shape, torch.empty(x.shape).stride()), "strided"),
    "layout": (lambda x: x * 1.5 if x.ndim > 1 and x.mT.is_contiguous() and not x.is_contiguous() else x, "transposed"),
    "stride 0": (lambda x: x * 2 if 0 in x.stride() and x.numel() > 1 else x, "expanded"),
    "empty": (lambda x: x if x.numel() else x.new_empty((1, *x.shape[1:])), "empty"),
    "no dimension": (lambda x: x if x.ndim else x.reshape(1), "zero-dimensional"),
    "dtype": (lambda x: x.float() if x.dtype == torch.float64 else x, "float64 sample 0"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_kernel_is_found_where_it_is_wrong(kind):
    spoil, where = WRONG[kind]
    text = failures(report_on(executor_with(lambda x, approximate="none": F.gelu(spoil(x)))))
    assert text and all(where in line or kind == "strides" for line in text.splitlines()), text
    assert where in text


def test_kernel_that_raises_is_found():
    def fn(x, approximate="none"):
        return F.gelu(x.view(-1)).view(x.shape)

    text = failures(report_on(executor_with(fn)))
    assert "raised: nn.functional.gelu, float32 sample 0 transposed: RuntimeError: view size" in text


def test_wrong_gradient_of_an_operator_is_found():
    executor = extend.OperatorExecutor("wrong_gradient_under_test")

    def forward(x: Tensor, approximate: str = "none") -> Tensor:
        return F.gelu(x)

    operator = executor.register_operator("gelu", like=F.gelu, fn=forward, backward=lambda ctx, g: g * 0.5)
    executor.register_implementation(F.gelu, operator, checker=lambda x, approximate="none": approximate == "none")
    report = report_on(executor)
    text = "\n".join(line for row in report.rows.values() for line in row.failures)
    assert not report.passed and "with gradients: gradient 0 is off by" in text


def test_wrong_backward_kernel_is_found_and_the_right_forward_is_not_blamed():
    executor = executor_with(gelu)
    executor.register_implementation("torch.ops.aten.gelu_backward.default", fn=lambda g, x, approximate="none": g * 2)
    report = report_on(executor)
    assert "gradient 0 is off by" in failures(report, "aten.gelu_backward")
    assert report.rows["gelu"].wrong == 0


def test_kernel_that_is_not_safe_for_threads_is_found():
    kept: dict[tuple, Tensor] = {}

    def fn(x, approximate="none"):
        kept[x.shape] = x
        time.sleep(0.0005)
        return F.gelu(kept[x.shape])

    text = failures(report_on(executor_with(fn)))
    assert all("threads at once" in line for line in text.splitlines()), text


def test_threads_call_what_is_claimed():
    kept: dict[tuple, Tensor] = {}

    def fn(x, approximate="none"):
        kept[x.shape] = x
        time.sleep(0.0005)
        return F.gelu(kept[x.shape])

    def checker(x, approximate="none"):
        return x.dtype == torch.float64

    text = failures(report_on(executor_with(fn, checker=checker)))
    assert "float64 sample 0 from 4 threads at once" in text


def test_a_lock_makes_it_safe():
    lock, kept = threading.Lock(), {}

    def fn(x, approximate="none"):
        with lock:
            kept[0] = x
            time.sleep(0.0002)
            return F.gelu(kept[0])

    assert report_on(executor_with(fn)).passed


def test_constant_of_the_first_call_is_found():
    seen: dict[tuple, Tensor] = {}

    def fn(x, approximate="none"):
        return seen.setdefault((x.shape, x.stride(), x.dtype), F.gelu(x)).clone()

    assert "(second call)" in failures(report_on(executor_with(fn)))


def test_result_in_the_memory_of_an_argument_is_found():
    def fn(x, inplace=False):
        return x.clamp(min=0) if (x < 0).any() else x

    report = report_on(executor_with(fn, F.relu), r"^nn\.functional\.relu$")
    assert "is memory of argument 0 where eager's has memory of its own" in failures(report, "functional.relu")


def test_argument_that_is_written_to_is_found():
    def fn(x, approximate="none"):
        result = F.gelu(x)
        if x.numel() and 0 not in x.stride():
            x.add_(1)
        return result

    assert "argument 0 is not afterwards" in failures(report_on(executor_with(fn)))


def test_declined_sample_is_no_pass():
    def checker(x, approximate="none"):
        return (False, "only in winter")

    report = report_on(executor_with(gelu, checker=checker))
    row = report.rows["gelu"]
    assert not report.passed and row.right == 0 and row.declined > 10
    assert report.never_claimed == ["gelu"]
    assert "never claimed: only in winter" in str(report) and "nothing was tested" in str(report)


def test_operator_is_declined_in_part():
    report = report_on(executor_with(gelu, checker=lambda x, approximate="none": (x.ndim > 0, "no dimension")))
    row = report.rows["gelu"]
    assert report.passed and row.declined >= 2 and row.reasons["no dimension"] == row.declined


def test_region_that_cannot_be_built_is_a_failure():
    class Failing(extend.FusionExecutor):
        def fuse(self, region):
            raise RuntimeError("no code for this")

    executor = Failing("failing_under_test")
    executor.register_supported(F.gelu)
    assert "raised" in failures(report_on(executor)) and "no code for this" in failures(report_on(executor))


def test_unknown_entries_and_executors_are_explained(capsys):
    with pytest.raises(LookupError, match="no entry of op_db"):
        conformance.run(executor_with(gelu), ops="no such operation")
    assert main(["conformance", "torch"]) == 2
    assert "claims no operator" in capsys.readouterr().err
    assert main(["conformance", "no_such_executor"]) == 2
    assert "no executor is called 'no_such_executor'" in capsys.readouterr().err


PLANTED = """
    import ctypes, os, time
    import torch
    from thunder import extend

    def planted(name, op, fn):
        extend.register_executor(extend.OperatorExecutor(name)).register_implementation(op, fn=fn)

    gelu, silu = torch.nn.functional.gelu, torch.nn.functional.silu
    planted("planted", gelu, lambda x, approximate="none": x * 1)
    planted("planted_right", silu, lambda x, inplace=False: x * torch.sigmoid(x))

    def crashes(x, approximate="none"):
        if x.dtype == torch.float64:
            ctypes.string_at(0)
        if x.dtype == torch.bfloat16:
            os._exit(7)
        if x.dtype == torch.float16:
            time.sleep(600)
        return gelu(x, approximate=approximate)

    def always(x, approximate="none"):
        os.abort()

    planted("planted_crashes", gelu, crashes)
    planted("planted_always", gelu, always)
"""


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """Runs the command on an executor of a module that is imported in the child alone; gives status and report."""
    (tmp_path / "planted_executors.py").write_text(textwrap.dedent(PLANTED))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def command(name: str, *options: str, ops: str = r"^nn\.functional\.gelu$") -> tuple[int, dict]:
        report = tmp_path / "report.json"
        fixed = ["--import", "planted_executors", "--samples", "1", "--json", str(report)]
        status = main(["conformance", name, "--ops", ops, *fixed, *options])
        return status, json.loads(report.read_text())

    yield command
    assert "planted_executors" not in sys.modules


def test_command(planted, capsys):
    status, written = planted("planted")
    assert status == 1 and "is off by" in capsys.readouterr().out
    alone = report_on(executor_with(lambda x, approximate="none": x * 1)).as_dict()
    assert written["operators"]["gelu"].pop("failures") and alone["operators"]["gelu"].pop("failures")
    assert written["operators"] == alone["operators"] and written["operators"]["gelu"]["wrong"]
    status, written = planted("planted_right", "--quiet", ops=r"functional\.silu$")
    captured = capsys.readouterr()
    assert status == 0 and written["passed"] and "0 wrong, 0 raised, 0 crashed" in captured.out
    assert captured.err == ""


def test_crashes_are_rows_and_the_other_cases_are_judged(planted, capsys):
    status, written = planted("planted_crashes", "--timeout", "20")
    row = written["operators"]["gelu"]
    assert status == 1 and not written["passed"] and written["entries"] == 1
    assert row["crashed"] == 4 and row["right"] == 13 and not row["wrong"] and not row["raised"]
    died = "crashed: nn.functional.gelu, float64 sample 0{}: the process died of SIGSEGV"
    assert row["failures"] == [
        died.format(""),
        died.format(" with gradients"),
        "crashed: nn.functional.gelu, bfloat16 sample 0: the process ended with status 7",
        "crashed: nn.functional.gelu, float16 sample 0: it did not answer within 20 s",
    ]
    assert "died of SIGSEGV" in capsys.readouterr().out


def test_executor_that_crashes_always_is_given_up(planted, monkeypatch):
    monkeypatch.setattr("thunder._conformance_child._MOST_CRASHES", 2)
    _, written = planted("planted_always")
    row = written["operators"]["gelu"]
    assert row["crashed"] == 2 and not row["right"]
    assert "died of SIGABRT; the other cases of this entry are left out" in row["failures"][-1]


def test_crash_while_the_module_is_imported_is_explained(tmp_path, monkeypatch):
    (tmp_path / "planted_crash_at_import.py").write_text("import os; os.abort()\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match="could not start: the process died of SIGABRT"):
        main(["conformance", "torchcompile", "--import", "planted_crash_at_import", "--ops", "^mm$"])
