"""Runs one judgement after the other in a child process, so that a crash or a hang costs one entry and not the run."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def isolated(
    items: Sequence[Item],
    judge: Callable[[Item], Result],
    lost: Callable[[Item, str], Result],
    timeout: float = 120.0,
) -> Iterator[Result]:
    """Yields `judge(item)` for each item, in order, computed in a forked child.

    A child serves until it dies; the item it died on becomes `lost(item, reason)` and a new child takes the next.

    Args:
        items: what to judge; reaches the child through fork, so it need not be picklable.
        judge: returns a picklable result.
        lost: makes the result for an item whose process died or took too long.
        timeout: seconds for one item.
    """
    context = multiprocessing.get_context("fork")
    position = 0
    while position < len(items):
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=_serve, args=(items, judge, position, sender), daemon=True)
        child.start()
        sender.close()
        while position < len(items):
            try:
                if receiver.poll(timeout):
                    yield receiver.recv()
                    position += 1
                    continue
                reason = f"no answer within {timeout:.0f} s"
            except EOFError:
                child.join()
                reason = f"the process died: {_death(child.exitcode)}"
            yield lost(items[position], reason)
            position += 1
            break
        child.kill()
        child.join()
        receiver.close()


def _serve(items: Sequence[Item], judge: Callable[[Item], Result], start: int, sender: Connection) -> None:
    for item in items[start:]:
        sender.send(judge(item))


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        return signal.Signals(-code).name
    return f"exit status {code}"
