"""Building regions: now, or by a worker in the background while torch runs them."""

from __future__ import annotations

import atexit
import collections
import contextlib
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any

_PATIENCE = 1.0  # seconds before a line says what takes so long
_DELAY = 0.5  # seconds without a new build before the worker begins: it shares the interpreter with the call


class Build:
    """One build of all the regions that are equal.

    Attributes:
        region: the first of them; None once it is built.
        implementation: what came of it; None while it goes on and where it failed.
        error: what it raised, or None.
        seconds: how long it took.
        done: a ``threading.Event``.
    """

    def __init__(self, executor: Any, region: Any) -> None:
        self.executor = executor
        self.region = region
        self.implementation: Callable | None = None
        self.error: BaseException | None = None
        self.seconds = 0.0
        self.done = threading.Event()
        self.waiting: list[Callable[[Build], None]] = []

    def run(self) -> None:
        """Build, and tell everybody who waits; of what compilers still work on, a later thread does that."""
        self._start = time.perf_counter()
        try:
            made = self.executor.fuse(self.region)
        except BaseException as error:
            self._end(None, error)
            if not isinstance(error, Exception):
                raise
        else:
            if isinstance(made, Future):
                made.add_done_callback(self._compiled)
            else:
                self._end(made, None)

    def _compiled(self, made: Future) -> None:
        try:
            result = made.result()
        except BaseException as error:
            self._end(None, error)
        else:
            self._end(result, None)

    def _end(self, implementation: Any, error: BaseException | None) -> None:
        if error is None and not callable(implementation):
            error = TypeError(f"fuse() gave {type(implementation).__name__}: it gives what runs the region, a callable")
        self.implementation, self.error = (implementation if error is None else None), error
        self.seconds = time.perf_counter() - self._start
        self.region = None  # its program may end; what was built stays
        self.done.set()
        waiting, self.waiting = self.waiting, []
        for tell in waiting:
            tell(self)

    def then(self, tell: Callable[[Build], None]) -> None:
        """Call ``tell(build)`` when it is done, at once if it is."""
        if self.done.is_set():
            tell(self)
        else:
            self.waiting.append(tell)
            if self.done.is_set() and tell in self.waiting:
                self.waiting.remove(tell)
                tell(self)


class Worker:
    """A thread that builds what is queued, one after the other, and ends when nothing is left to build or compile."""

    def __init__(self) -> None:
        self._queue: collections.deque[Build] = collections.deque()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stopped = False
        self._newest = 0.0  # when the last build was queued
        self._wanted = threading.Event()  # somebody waits

    def submit(self, build: Build) -> None:
        """Queue a build."""
        with self._lock:
            self._queue.append(build)
            self._newest = time.monotonic()
            if self._thread is None and not self._stopped:
                self._thread = threading.Thread(target=self._work, name="thunder-build", daemon=True)
                self._thread.start()

    def _settle(self) -> None:
        """Wait until no call has queued anything for a while, or somebody waits for the builds."""
        while not self._stopped:
            left = self._newest + _DELAY - time.monotonic()
            if left <= 0 or self._wanted.wait(left):
                return

    def _work(self) -> None:
        self._settle()
        start, said, built = time.monotonic(), False, 0
        compiling: list[Build] = []
        while True:
            while compiling and not self._queue and not self._stopped:
                compiling.pop().done.wait()
            with self._lock:
                if not self._queue or self._stopped:
                    self._thread = None
                    if said and not self._stopped:
                        progress(f"{built} regions built in {time.monotonic() - start:.0f} s")
                    return
                build = self._queue.popleft()
                left = len(self._queue)
            if not said and time.monotonic() - start > _PATIENCE:
                said = True
                progress(f"{build.executor.name} builds regions in the background: {built} done, {left + 1} to go")
            try:
                build.run()
            except BaseException:  # its regions were told, or nobody can be: the next ones are built all the same
                traceback.print_exc()
            compiling.append(build)
            built += 1

    def drop(self) -> None:
        """Forget what is queued and wait for the build in progress: the interpreter ends."""
        with self._lock:
            self._stopped = True
            self._wanted.set()
            self._queue.clear()
            thread = self._thread
        if thread is not None:
            thread.join(timeout=60)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing is queued or being built; whether that came true."""
        end = None if timeout is None else time.monotonic() + timeout
        self._wanted.set()
        try:
            while True:
                with self._lock:
                    thread = self._thread
                if thread is None:
                    return True
                thread.join(None if end is None else max(0.0, end - time.monotonic()))
                if end is not None and thread.is_alive():
                    return False
        finally:
            self._wanted.clear()


worker = Worker()
atexit.register(worker.drop)


def progress(text: str) -> None:
    """One line to the user, on stderr."""
    print(f"thunder: {text}", file=sys.stderr, flush=True)


def wait_for_builds(timeout: float | None = None) -> bool:
    """Wait for everything that is built in the background; the calls after that run it.

    Args:
        timeout: in seconds; None waits as long as it takes.

    Returns:
        whether everything is built.
    """
    return worker.wait(timeout)


def start(executor: Any, region: Any, *, block: bool) -> Build:
    """The build of a region: that of an equal one if there was one, else a new one. If ``block`` only compilers that
    run beside us may still work on it: see ``finish``."""
    key = region.trace
    build = executor._built.get(key)
    if build is None:
        build = executor._built[key] = Build(executor, region)
        if block or not executor.background:
            with _patience(f"{executor.name} builds a region ..."):
                _run_here(build, key)
        else:
            worker.submit(build)
    return build


def _run_here(build: Build, key: Any) -> None:
    try:
        build.run()
    except BaseException:  # the user's interrupt says nothing of the region
        build.executor._built.pop(key, None)
        raise


def finish(builds: Iterable[Build]) -> None:
    """Wait until all are done."""
    left = [build for build in builds if not build.done.is_set()]
    if left:
        with _patience(f"{left[0].executor.name} waits for the compilation of {len(left)} regions ..."):
            for build in left:
                build.done.wait()


@contextlib.contextmanager
def _patience(text: str) -> Iterator[None]:
    """Say what takes so long."""
    timer = threading.Timer(_PATIENCE, progress, (text,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def installer(region: Any, install: Callable[[Any, Build], None]) -> Callable[[Build], None]:
    """What a build calls when it is done: nothing if the region is gone by then."""
    where = weakref.ref(region)

    def tell(build: Build) -> None:
        found = where()
        if found is not None:
            install(found, build)

    return tell
