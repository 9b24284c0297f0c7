"""The conformance suite in a process of its own, which is started again behind a case that it does not survive."""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

_MOST_CRASHES = 5  # in one entry: then its other cases are left out
_START = "import json, sys; c = json.load(sys.stdin); sys.path[:] = c['path']; from thunder import {}; {}.serve(c)"
_START_SECONDS = 300.0  # torch and op_db are imported


# ---- the child ----


def serve(config: dict[str, Any]) -> None:
    """Judges what ``config`` says and writes what the suite tells, one line of JSON each."""
    from thunder import conformance

    out = os.fdopen(config["pipe"], "w", encoding="utf-8")

    def tell(*event: Any) -> None:
        out.write(json.dumps(event) + "\n")
        out.flush()  # the parent must have it before what comes next can crash

    try:
        if config["module"]:
            importlib.import_module(config["module"])
        executor, chosen = conformance.find(config["executor"], config["ops"])
    except (LookupError, ImportError) as error:
        tell("refused", str(error.args[0] if error.args else error))
        return
    tell("ready", conformance.known_operators(executor, config["ops"]))
    suite = conformance.Suite(executor, config["samples"], tell)
    start, threads = config["start"], config["threads"]
    warnings.simplefilter("ignore")
    for number in range(config["position"], len(chosen)):
        entry = chosen[number]
        tell("at", number, conformance.entry_name(entry))
        if start or suite.concerns(entry):
            suite.judge(entry, start, threads)
        start, threads = 0, None
    tell("end")


# ---- the parent ----


class _Child:
    """One process and what it has told last."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._reader, writer = os.pipe()
        module = __name__.rpartition(".")[2]
        command = [sys.executable, "-c", _START.format(module, module)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=(writer,))
        os.close(writer)
        with self._process.stdin as stdin:
            stdin.write(json.dumps({**config, "path": sys.path, "pipe": writer}).encode())
        self.hung = False

    def events(self, timeout: float) -> Iterator[list[Any]]:
        """What it tells, until it ends, dies, or says nothing for ``timeout`` seconds."""
        rest, wait = b"", max(timeout, _START_SECONDS)
        while True:
            if not select.select([self._reader], [], [], wait)[0]:
                self.hung = True
                self._process.kill()
                return
            part = os.read(self._reader, 1 << 16)
            if not part:
                return
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                yield json.loads(line)
            wait = timeout

    def end(self, timeout: float) -> str:
        """Waits for it; how it died."""
        os.close(self._reader)
        code = self._process.wait()
        if self.hung:
            return f"it did not answer within {timeout:.0f} s"
        if code >= 0:
            return f"the process ended with status {code}"
        try:
            return f"the process died of {signal.Signals(-code).name}"
        except ValueError:
            return f"the process died of signal {-code}"


class _Progress:
    """Where a child is, so that the next one can go on behind it."""

    def __init__(self) -> None:
        self.position = self.start = self.crashes = 0
        self.threads: int | None = None
        self.entry = self.case = ""
        self.takes: set[str] = set()
        self.ready = self.ended = self.judging = False

    def hear(self, what: str, *of: Any) -> None:
        if what == "at":
            if of[0] != self.position or not self.entry:
                self.start, self.crashes, self.threads = 0, 0, None
            self.position, self.entry = of
            self.case, self.takes, self.judging = "the first cases of all, without the executor", set(), False
        elif what == "case":
            self.start, self.case = of
            self.takes, self.judging = set(), True
        elif what == "takes":
            self.takes.update(of[0])
        elif what == "threads":
            (self.threads,) = of
        elif what == "ready":
            self.ready = True
        elif what == "end":
            self.ended = True

    def crash(self, reason: str) -> tuple[list[str], str]:
        """The operators and the line of a row for it; moves on behind it."""
        keys, line = sorted(self.takes) or [self.entry], f"{self.case}: {reason}"
        if not self.takes:
            line += "; nothing was claimed yet"
        self.start += 1
        self.crashes += 1
        if not self.judging or self.crashes >= _MOST_CRASHES:
            if self.judging:
                line += "; the other cases of this entry are left out"
            self.position, self.entry, self.start, self.threads = self.position + 1, "", 0, None
        return keys, line


def run_apart(
    executor: str,
    *,
    module: str | None = None,
    ops: str = "",
    samples: int = 3,
    timeout: float = 300.0,
    progress: Callable[[str], None] | None = None,
) -> Any:
    """Judge an executor by its name in another process: a crash and a hang are rows of the report.

    Args:
        executor, ops, samples, progress: as for ``thunder.conformance.run``.
        module: imported there first; it registers the executor.
        timeout: seconds that one case may take.

    Raises:
        LookupError: as ``thunder.conformance.run``, or the module cannot be imported.
        RuntimeError: the process died before it had begun.
    """
    from thunder import conformance

    table, at, known = conformance.Table(), _Progress(), []
    fixed = {"executor": executor, "module": module, "ops": ops, "samples": samples}
    while not at.ended:
        at.ready = False
        child = _Child({**fixed, "position": at.position, "start": at.start, "threads": at.threads})
        for what, *of in child.events(timeout):
            if what == "refused":
                child.end(timeout)
                raise LookupError(of[0])
            if what == "ready":
                (known,) = of
            at.hear(what, *of)
            table.hear(what, *of)
            if what == "entry" and progress:
                progress(of[0])
        reason = child.end(timeout)
        if not at.ready:
            raise RuntimeError(f"the conformance suite could not start: {reason}")
        if not at.ended:
            table.hear("count", "crashed", *at.crash(reason))
    return table.report(executor, known)
