"""Threads that repeat a task."""

from __future__ import annotations

import threading

import pytest

from luthier.server.periodic import PeriodicThread


def test_task_is_repeated_after_an_error(caplog: pytest.LogCaptureFixture) -> None:
    calls, enough = list[int](), threading.Event()

    def fail() -> None:
        calls.append(1)
        if len(calls) == 3:
            enough.set()
        raise OSError("no database")

    thread = PeriodicThread("t", fail, 0.001, "it failed")
    thread.start()
    assert enough.wait(20)
    thread.close()
    assert "it failed" in caplog.text and "no database" in caplog.text
    count = len(calls)
    assert thread.closed.wait(0) and len(calls) == count


def test_first_and_last_call() -> None:
    calls = list[str]()
    begun = threading.Event()

    def task() -> None:
        calls.append("call")
        begun.set()

    thread = PeriodicThread("t", task, 3600, "failed", first=0, once_more=True)
    thread.start()
    assert begun.wait(20)
    thread.close()
    assert calls == ["call", "call"]
    unused = PeriodicThread("t", task, 3600, "failed", once_more=True)
    unused.close()
    assert calls == ["call", "call"]
