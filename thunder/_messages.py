"""Messages that a program gives to ``warnings`` and ``logging``: heard at its capture, given again at each call.

While a program is captured nothing is shown. A message becomes an effect of the program, which asks the filters, levels
and handlers of its own time. What has been captured may still run in eager instead, so that hearing leaves no trace:
the places where Python notes which warnings it has shown are as they were.
"""

from __future__ import annotations

import dis
import functools
import logging
import sys
import threading
import warnings
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import torch

from thunder._origin import THUNDER, TORCH, installed

_MEMO = type(functools.lru_cache(len))


class Warned:
    """A call shows the warning as ``warnings.warn`` would in its place."""

    def __init__(self, shown: warnings.WarningMessage, namespace: dict[str, Any]) -> None:
        self.message, self.category, self.source = shown.message, shown.category, shown.source
        self.file, self.line = shown.filename, shown.lineno
        self.module = namespace.get("__name__") or "<string>"
        self.registry = namespace.setdefault("__warningregistry__", {})

    def __call__(self) -> None:
        warnings.warn_explicit(
            self.message, self.category, self.file, self.line, self.module, self.registry, None, self.source
        )

    def unsay(self) -> None:
        """Make it one that was not shown yet."""
        text = str(self.message)
        for line in (self.line, 0):
            self.registry.pop((text, self.category, line), None)
        getattr(warnings, "onceregistry", {}).pop((text, self.category), None)


class Logged:
    """A call gives the logger a record like that of the capture, of its own time."""

    def __init__(self, logger: logging.Logger, record: logging.LogRecord) -> None:
        self.logger, self.record = logger, record
        plain = logging.makeLogRecord({}).__dict__
        self.extra = {name: value for name, value in record.__dict__.items() if name not in plain}

    def __call__(self) -> None:
        r = self.record
        if self.logger.isEnabledFor(r.levelno):
            now = self.logger.makeRecord(
                *(r.name, r.levelno, r.pathname, r.lineno, r.msg, r.args, None, r.funcName, None, r.stack_info)
            )
            now.__dict__.update(self.extra)
            self.logger.handle(now)


class Listener:
    """In the places of ``warnings._showwarnmsg`` and ``logging.Logger.handle`` until :meth:`stop`, on this thread.

    ``recorder.hears`` says what is the program's own at that moment: bit 0 what it logs; bit 1 a warning, which
    ``warnings.warn`` gives and not a kernel of torch's; bit 2 that a backward pass gives it, which no call can repeat.
    """

    def __init__(self, recorder: Any) -> None:
        self.heard: list[Warned | Logged] = []
        self._recorder, self._shown_by = recorder, _shown_by()
        thread, show, handle = threading.get_ident(), warnings._showwarnmsg, logging.Logger.handle  # type: ignore[attr-defined]
        self._before = show, handle

        def on_warning(shown: warnings.WarningMessage) -> None:
            hears = recorder.hears if threading.get_ident() == thread else 0
            if not hears & 2 or not self._hear_warning(shown):
                show(shown)
            elif hears & 4:
                self._refuse("a backward pass gives it")

        def on_record(logger: logging.Logger, record: logging.LogRecord) -> None:
            hears = recorder.hears if threading.get_ident() == thread else 0
            if not hears & 1 or not self._hear_record(logger, record):
                handle(logger, record)
            elif hears & 4:
                self._refuse("a backward pass gives it")

        warnings._showwarnmsg = on_warning  # type: ignore[attr-defined]
        logging.Logger.handle = on_record  # type: ignore[method-assign]

    def stop(self) -> None:
        """Put back what was there."""
        warnings._showwarnmsg, logging.Logger.handle = self._before  # type: ignore[attr-defined, method-assign]

    def _refuse(self, why: str) -> None:
        self._recorder.refuse("a message of logging or warnings", f"{why}, and later calls would not give it again")

    def _hear_warning(self, shown: warnings.WarningMessage) -> bool:
        place: FrameType | None = sys._getframe(2)
        if _is_said_once(place) or _shown_by() != self._shown_by:  # then the program itself catches warnings
            return False
        while place and (place.f_code.co_filename, place.f_lineno) != (shown.filename, shown.lineno):
            place = place.f_back
        warned = Warned(shown, place.f_globals if place else {})
        warned.unsay()
        if any(isinstance(part, torch.Tensor) for part in getattr(shown.message, "args", ())):
            self._refuse("it holds a tensor")
        self.heard.append(warned)
        return True

    def _hear_record(self, logger: logging.Logger, record: logging.LogRecord) -> bool:
        place = _outside_logging(sys._getframe(2))
        if _is_ours(place) or _is_said_once(place):
            return False
        record.getMessage()  # so that what it is made of counts as looked at, or ends the capture
        if record.exc_info:
            self._refuse("it shows an exception")
        self.heard.append(Logged(logger, record))
        return True


ASKS_LEVEL = logging.Logger.isEnabledFor.__code__


def asked(place: FrameType, arguments: dict[str, Any]) -> Callable[[], bool] | None:
    """What to ask at each call in place of ``logger.isEnabledFor(level)``; ``None``: no code of the program's asks."""
    logger, level = arguments["self"], arguments["level"]
    return None if _is_ours(_outside_logging(place)) else _enabled(logger, level)


@functools.lru_cache(maxsize=256)
def _enabled(logger: logging.Logger, level: int) -> Callable[[], bool]:
    return functools.partial(logger.isEnabledFor, level)


def _shown_by() -> tuple[Any, ...]:
    """What warnings come to: ``catch_warnings`` puts other things there."""
    context = getattr(warnings, "_get_context", lambda: None)()  # of Python 3.14
    return warnings.showwarning, warnings._showwarnmsg_impl, getattr(context, "log", None)  # type: ignore[attr-defined]


def _outside_logging(place: FrameType | None) -> FrameType | None:
    while place and place.f_globals.get("__name__", "").partition(".")[0] == "logging":
        place = place.f_back
    return place


def _is_ours(place: FrameType | None) -> bool:
    """torch's or ours: a message about the capture, and not of the program."""
    return place is not None and place.f_code.co_filename.startswith((TORCH, THUNDER))


def _is_said_once(place: FrameType | None) -> bool:
    """Whether functions on the way remember that they have said it: it is said now, and calls do not say it again."""
    for _ in range(4):
        if place is None:
            break
        if _is_memoized(place) or (installed(place.f_code.co_filename) and _writes_globals(place.f_code)):
            return True
        place = place.f_back
    return False


def _is_memoized(place: FrameType) -> bool:
    code = place.f_code
    owners = (place.f_globals.get(code.co_name), getattr(type(place.f_locals.get("self")), code.co_name, None))
    return any(isinstance(o, _MEMO) and getattr(o.__wrapped__, "__code__", None) is code for o in owners)


@functools.lru_cache(maxsize=256)
def _writes_globals(code: CodeType) -> bool:
    return any(i.opname == "STORE_GLOBAL" for i in dis.get_instructions(code))
