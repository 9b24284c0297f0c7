"""What a program gives to `logging` and `warnings` comes at every call, as in eager, and at no other time."""

from __future__ import annotations

import functools
import io
import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import thunder

X = torch.linspace(-1, 1, 6).reshape(2, 3)


class Heard(logging.Handler):
    """Keeps what comes."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[tuple[Any, ...]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append((record.levelname, record.getMessage(), record.funcName, record.lineno, record.exc_text))


@pytest.fixture
def logger():
    logger = logging.getLogger("tests.messages")
    logger.propagate = False
    logger.heard = Heard()
    logger.addHandler(logger.heard)
    yield logger
    logger.removeHandler(logger.heard)


def said(logger: logging.Logger, calls: Callable[[Callable], Any], f: Callable) -> tuple[list, list, Any]:
    logger.setLevel(logging.INFO)
    del logger.heard.records[:]
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        results = calls(f)
    texts = [
        (str(w.message), w.category, w.filename, w.lineno)
        for w in shown
        if not issubclass(w.category, thunder.ThunderWarning) and "_dynamo" not in w.filename
    ]
    return list(logger.heard.records), texts, results


def same(logger: logging.Logger, calls: Callable[[Callable], Any], f: Callable, fallbacks: bool = False) -> Any:
    compiled = thunder.jit(f, fallback="eager" if fallbacks else "error")
    expected = said(logger, calls, f)
    assert expected[0] or expected[1]
    assert said(logger, calls, compiled) == expected
    assert bool(thunder.compile_stats(compiled).fallbacks) == fallbacks
    return compiled


def test_messages_come_at_every_call(logger):
    def f(x, n=2):
        logger.info("shape %s, n %d", tuple(x.shape), n)
        warnings.warn(f"careful with {n}", FutureWarning, stacklevel=1)
        return (x * n).sum().item()

    compiled = same(logger, lambda f: [f(x, n) for n in (2, 2, 3) for x in (X, X[:1], X)], f)
    assert thunder.cache_hits(compiled) > 0


def test_the_level_is_asked_at_every_call(logger):
    def f(x):
        logger.debug("in detail")
        if logger.isEnabledFor(logging.DEBUG):
            return x * 2
        return x

    def calls(f):
        results = []
        for level in (logging.INFO, logging.DEBUG, logging.DEBUG, logging.INFO):
            logger.setLevel(level)
            results += f(X).tolist()
        return results

    same(logger, calls, f)


def test_filters_and_registries_of_warnings_are_those_of_the_call(logger):
    def f(x):
        warnings.warn("once is enough", stacklevel=1)
        return x + 1

    def calls(f):
        for action in ("default", "ignore", "default", "always", "always"):
            warnings.simplefilter(action)
            f(X)
            f(X)
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="once is enough"):
            f(X)

    same(logger, calls, f)


def test_the_callers_line_is_named(logger):
    def helper(x):
        warnings.warn("here", stacklevel=2)
        logger.info("there", stacklevel=2, extra={"kind": "helper"})
        return x * 2

    def f(x):
        return helper(x) + 1

    same(logger, lambda f: [f(X) for _ in range(3)] and None, f)


def test_a_message_that_is_memoized_comes_once(logger):
    @functools.lru_cache(None)
    def warn_once(text):
        logger.warning(text)

    def f(x):
        warn_once("old")
        return x * 2

    def calls(f):
        warn_once.cache_clear()
        return [f(X).tolist() for _ in range(3)]

    same(logger, calls, f, fallbacks=True)


def test_a_librarys_memoized_message_comes_once(logger, tmp_path, monkeypatch):
    (tmp_path / "librarys_messages.py").write_text(
        "import functools\n"
        "@functools.lru_cache(None)\n"
        "def warn_once(logger, text):\n"
        "    logger.warning(text)\n"
        "_said = False\n"
        "def say_first(logger, text):\n"
        "    global _said\n"
        "    if not _said:\n"
        "        _said = True\n"
        "        logger.warning(text)\n"
    )
    info = tmp_path / "librarys_messages-1.0.dist-info"
    info.mkdir()
    (info / "RECORD").write_text("librarys_messages.py,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import librarys_messages

    def f(x):
        librarys_messages.warn_once(logger, "old")
        librarys_messages.say_first(logger, "older")
        return x * 2

    def calls(f):
        librarys_messages.warn_once.cache_clear()
        librarys_messages._said = False
        return [f(X).tolist() for _ in range(3)]

    same(logger, calls, f)


def test_messages_with_tensors_or_exceptions_end_the_capture(logger):
    def tensor(x):
        logger.info("x is %s", x)
        return x.tolist()

    def caught(x):
        try:
            raise KeyError("missing")
        except KeyError:
            logger.exception("caught")
        return x.tolist()

    same(logger, lambda f: [f(X), f(X + 1)], tensor, fallbacks=True)
    line = caught.__code__.co_firstlineno + 4
    with pytest.raises(thunder.CaptureError, match=rf"test_messages.py:{line}.*it shows an exception"):
        thunder.jit(caught, fallback="error")(X)
    same(logger, lambda f: f(X), caught, fallbacks=True)


def test_messages_of_an_autograd_function(logger):
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            logger.info("forward")
            warnings.warn("forward", stacklevel=1)
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    class Loud(Double):
        @staticmethod
        def backward(ctx, grad):
            logger.info("backward")
            return grad * 2

    def calls(f):
        grads = []
        for _ in range(3):
            x = X.clone().requires_grad_()
            f(x).sum().backward()
            grads.append(x.grad.tolist())
        return grads

    same(logger, calls, lambda x: Double.apply(x) * x)
    same(logger, calls, lambda x: Loud.apply(x) * x, fallbacks=True)


def test_a_refused_capture_says_nothing(logger):
    def f(x):
        warnings.warn("before", stacklevel=1)
        logger.info("before")
        print(end="")
        return (x + 1).tolist()

    def calls(f):
        warnings.simplefilter("default")
        return [f(X), f(X)]

    same(logger, calls, f, fallbacks=True)


def test_what_raises_says_what_it_said(logger):
    def f(x):
        logger.info("before %s", x.shape)
        if x.shape[0] == 2:
            raise ValueError("two")
        return x.tolist()

    def calls(f):
        for _ in range(2):
            with pytest.raises(ValueError, match="two"):
                f(X)
        return f(X[:1])

    expected = said(logger, calls, f)
    assert said(logger, calls, thunder.jit(f)) == expected


def test_other_threads_speak_during_a_capture(logger):
    import threading

    def f(x):
        worker = threading.Thread(target=lambda: (logger.info("worker"), warnings.warn("worker", stacklevel=1)))
        worker.start()
        worker.join()
        return x.tolist()

    heard = said(logger, lambda f: f(X), thunder.jit(f, fallback="eager"))
    assert [r[1] for r in heard[0]] == ["worker"] and [w[0] for w in heard[1]] == ["worker"]


def test_everything_is_put_back(logger):
    show, handle = warnings._showwarnmsg, logging.Logger.handle
    thunder.jit(lambda x: x + 1)(X)
    with pytest.raises(RuntimeError):
        thunder.jit(lambda x: x @ x)(X)
    assert (warnings._showwarnmsg, logging.Logger.handle) == (show, handle)


def test_a_package_that_writes_to_a_stream_counts(tmp_path, monkeypatch):
    (tmp_path / "librarys_bar.py").write_text("def show(out):\n    out.write('|')\n")
    info = tmp_path / "librarys_bar-1.0.dist-info"
    info.mkdir()
    (info / "RECORD").write_text("librarys_bar.py,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import librarys_bar

    def f(x):
        librarys_bar.show(sys.stdout)
        return x + 1

    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    compiled = thunder.jit(f, fallback="eager")
    with pytest.warns(thunder.ThunderWarning, match="StringIO"):
        for _ in range(3):
            compiled(X)
    assert out.getvalue() == "|||"
    sys.modules.pop("librarys_bar")


def test_a_program_that_catches_its_own_warnings(logger):
    def f(x):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warnings.warn("inside", stacklevel=1)
        warnings.warn(f"outside, after {len(caught)}", stacklevel=1)
        return x.shape[0] + len(caught)

    same(logger, lambda f: [f(X), f(X)], f)
