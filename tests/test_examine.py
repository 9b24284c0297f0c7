"""`thunder.examine`, `thunder.explain`, `thunder.bisect`."""

from __future__ import annotations

import importlib
import json
import time
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import thunder
from tests.models import QUICK, zoo
from tests.test_executors import Interpreter, blocks
from thunder import extend
from thunder.examine import examine


def quiet(fn, *args, **kwargs):
    return examine(fn, *args, show=False, **kwargs)


def test_both_spellings_print_and_return_a_report(capsys):
    model, x = blocks(1), torch.randn(2, 16)
    first = thunder.examine(model)(x)
    text = capsys.readouterr().out
    second = examine(model, x)
    assert capsys.readouterr().out
    assert first.right and second.right and first.verdict == second.verdict
    assert "Operations" in text and "torch.nn.functional.gelu" in text and "Compared" in text
    assert "\x1b[" not in text  # no terminal, no colour
    assert "\x1b[32m" in first.to_text(colour=True)


def test_operations_are_counted_with_who_runs_them_and_the_users_lines():
    executor = extend.OperatorExecutor("examined")
    executor.register_implementation(F.gelu, fn=F.gelu)
    executor.register_implementation(F.layer_norm, fn=F.layer_norm, checker=lambda *a, **k: "not today")
    with torch.no_grad():
        report = quiet(blocks(3), torch.randn(2, 16), executors=[executor])
    rows = {o.name: o for o in report.operations}
    assert (rows["torch.nn.functional.gelu"].count, rows["torch.nn.functional.gelu"].executor) == (3, "examined")
    assert rows["torch.nn.functional.linear"].count == 6 and rows["torch.nn.functional.linear"].executor == "torch"
    assert rows["torch.nn.functional.layer_norm"].declines == (("examined", "not today"),)
    assert rows["torch.nn.functional.gelu"].lines[0].startswith("test_executors.py:")


def test_backward_operations_are_listed_too():
    report = quiet(blocks(1), torch.randn(2, 16))
    kinds = {o.kind for o in report.operations}
    assert kinds == {"forward", "backward"}
    assert {c.name for c in report.comparisons} >= {"output 0", "gradient of 0.up.weight"}


def test_what_is_not_supported_is_listed_with_the_users_line_and_an_alternative():
    def program(x):
        y = x + x.data_ptr()
        if y.numpy().sum() > 0:
            y = y + 1
        return y.to_sparse(), f"{y}"

    report = quiet(program, torch.randn(5).abs())
    first = program.__code__.co_firstlineno
    assert not report.supported and not report.right
    found = {(u.construct.rpartition(".")[2].partition("(")[0], u.place.rpartition("/")[2]) for u in report.unsupported}
    for name, line in (("data_ptr", 1), ("numpy", 2), ("__format__", 4)):
        assert (name, f"test_examine.py:{first + line}") in found
    assert all(u.reason and u.alternative for u in report.unsupported)
    assert [u.certain for u in report.unsupported] == [True, False, False]


def test_a_program_that_would_run_in_eager_is_not_called_supported():
    class Dirty(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.mark_dirty(x)
            return x.mul_(2)

        @staticmethod
        def backward(ctx, g):
            return g * 2

    report = quiet(lambda x: Dirty.apply(x * 1), torch.randn(3, requires_grad=True))
    assert not report.supported and "eager" in report.verdict


def test_errors_of_eager_are_told_as_such():
    report = quiet(lambda x: x @ x, torch.randn(2, 3))
    assert not report.supported and report.verdict.startswith("eager itself raises RuntimeError")


def test_wrong_results_are_found_and_float64_says_who_is_nearer(monkeypatch):
    report = quiet(blocks(1).double(), torch.randn(2, 16, dtype=torch.float64))
    assert report.right and {c.nearer for c in report.comparisons} <= {"same", "thunder", "eager"}
    executor = extend.OperatorExecutor("off_by_a_bit")
    executor.register_implementation(F.gelu, fn=lambda x, approximate="none": F.gelu(x) + 1e-2)
    monkeypatch.setattr("thunder._verify.judge", lambda *a: True)
    report = quiet(blocks(1), torch.randn(2, 16), executors=[executor])
    wrong = [c for c in report.comparisons if not c.right]
    assert report.supported and not report.right and wrong and all(c.nearer == "eager" for c in wrong)
    assert "different from eager in output 0" in report.verdict


def test_the_model_stays_as_it_is():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    quiet(model, torch.randn(4, 3))
    torch.set_rng_state(state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_random_numbers_are_those_of_eager():
    assert quiet(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).train(), torch.randn(4, 3)).right


def test_report_is_saved_as_a_page_and_as_json(tmp_path):
    report = quiet(blocks(1), torch.randn(2, 16))
    report.save(tmp_path / "x.html")
    report.save(tmp_path / "x.json")
    report.save(tmp_path / "x.txt")
    page = (tmp_path / "x.html").read_text()
    assert "<table>" in page and "torch.nn.functional.gelu" in page
    data = json.loads((tmp_path / "x.json").read_text())
    assert data["right"] and data["comparisons"][0]["nearer"]
    assert (tmp_path / "x.txt").read_text() == str(report)


def test_what_torch_compile_touched_is_refused():
    with pytest.raises(TypeError, match=r"torch\.compile"):
        thunder.examine(torch.compile(blocks(1)))


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", QUICK)
def test_verdict_agrees_with_what_jit_does(name, train):
    model, inputs = zoo()[name].build()
    model.train(train)
    arguments = inputs(0)
    with torch.set_grad_enabled(train), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = quiet(model, **arguments)
        compiled = thunder.jit(model)
        torch.manual_seed(0)
        try:
            compiled(**arguments)
            ran = thunder.compile_stats(compiled).fallbacks == 0
        except thunder.CaptureError:
            ran = False
    assert report.supported == ran, report.verdict
    assert report.right == ran, str(report)


@pytest.mark.parametrize(("off", "right"), [(2**-23, True), (2**-18, False)])
def test_what_is_rounding_alone_may_differ_by_rounding(off, right):
    """Eager is exact by chance: its error is known from inputs that differ in the last bit."""

    def tripled(x, by):
        return torch.mul(x, by) * (1 + off)

    def program(x):
        return torch.mul(x, 3.0) - x - x - x + 1e-12

    executor = extend.single_op_executor("tripled", torch.mul, tripled)
    report = examine(program, torch.tensor([1.0, 2.0, 4.0, 8.0]), executors=[executor], show=False)
    (found,) = report.comparisons
    assert found.eager_error < 1e-18 and found.error > 1e-6 and found.right == right == report.right


def test_users_line_is_found_in_a_folder_called_like_a_library(tmp_path, monkeypatch):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "asks_for_values.py").write_text(
        "def fn(x):\n    y = x.data_ptr()\n    return x + y + x.data_ptr()\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "torch")
    fn = importlib.import_module("asks_for_values").fn
    assert "asks_for_values.py:3" in str(quiet(fn, torch.ones(2)))


# ---- explain ----


def test_explain_tells_programs_units_and_declines():
    executor = Interpreter("explained")
    executor.support_all(but=[F.linear])
    executor._table["torch.nn.functional.linear"] = None
    model, x = blocks(2), torch.randn(4, 16)
    compiled = thunder.jit(model, executors=[executor])
    with torch.no_grad():
        for _ in range(4):
            compiled(x)
    told = thunder.explain(compiled)
    assert (told.calls, told.captures, told.fallbacks) == (4, 1, 0)
    unit = told.units[0]
    assert unit.state == "trusted" and unit.runs == 4 and unit.reference_runs == 1 and unit.milliseconds > 0
    assert unit.result_bytes == 4 * 16 * 4
    text = str(told)
    assert "4 calls, 1 captures" in text and "explained: " in text and "ms a run" in text
    with pytest.raises(TypeError):
        thunder.explain(model)


def test_explain_tells_the_time_on_the_device():
    def slow(x, approximate="none"):
        deadline = time.process_time() + 0.004
        while time.process_time() < deadline:
            pass
        return F.gelu(x)

    executor = thunder.extend.single_op_executor("slow", F.gelu, slow)
    compiled, x = thunder.jit(F.gelu, executors=[executor]), torch.randn(4, 16)
    times = []
    for _ in range(24):
        compiled(x)
        times.append(thunder.explain(compiled).units[0].device_milliseconds)
    assert times[:2] == [None, None]  # compared with torch, then warmed up
    assert times[2] > 3.9 and times[-1] == times[-2] > 3.9  # enough of them were timed
    told = thunder.explain(compiled)
    assert told.units[0].device == "cpu" and "ms on cpu)" in str(told)


def test_stopwatch_that_fails_is_no_harm():
    executor = thunder.extend.single_op_executor("timed", F.gelu, lambda x, approximate="none": F.gelu(x))
    compiled, x = thunder.jit(F.gelu, executors=[executor]), torch.randn(4, 16)
    compiled(x)
    ((_, unit, _),) = compiled._thunder_claims.units
    unit.stopwatch = object()
    torch.testing.assert_close(compiled(x), F.gelu(x))
    assert unit.stopwatch is None and unit.state == "trusted"


# ---- bisect ----


def test_bisect_names_the_guilty_unit():
    def sometimes(x, approximate="none"):
        return F.relu(x) if abs(x[0, 0] - marked) < 1e-5 else F.gelu(x)

    executor = extend.OperatorExecutor("guilty")
    executor.register_implementation(F.gelu, fn=sometimes)
    model, x = blocks(6), torch.randn(4, 16)
    inputs = []
    handles = [b.up.register_forward_hook(lambda m, a, o: inputs.append(o[0, 0].item())) for b in model]
    with torch.no_grad():
        model(x)
        for h in handles:
            h.remove()
        marked = inputs[4]
        found = thunder.bisect(model, x, executors=[executor])
    assert found.unit == "guilty_gelu_4" and found.executor == "guilty" and found.tried <= 6
    assert "torch.nn.functional.gelu" in str(found.trace) and "output 0 differs" in str(found)


def test_bisect_of_what_is_right_finds_nothing():
    executor = extend.OperatorExecutor("innocent")
    executor.register_implementation(F.gelu, fn=F.gelu)
    found = thunder.bisect(blocks(2), torch.randn(4, 16), executors=[executor])
    assert found.unit is None and "nothing differs" in str(found)
