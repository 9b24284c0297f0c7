"""A crash, an exit or a hang of one judgement leaves the others standing."""

from __future__ import annotations

import os
import signal
import time

from tests.harness.isolated import isolated


def judge(item: str) -> str:
    if item == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if item == "exit":
        os._exit(3)
    if item == "hang":
        time.sleep(60)
    return item.upper()


def test_each_item_gets_its_result_in_order():
    items = ["a", "crash", "b", "exit", "hang", "c"]
    got = list(isolated(items, judge, lambda item, reason: f"{item}: {reason}", timeout=1.0))
    assert got == [
        "A",
        "crash: the process died: SIGKILL",
        "B",
        "exit: the process died: exit status 3",
        "hang: no answer within 1 s",
        "C",
    ]
