"""Tests of cancellation: work can be ended while running, not after."""

from __future__ import annotations

import os
import sys
import threading
import time

import psutil
import pytest

from luthier.processes import (
    Cancellable,
    Cancelled,
    KillHandle,
    cancellable,
    cancelled_by,
    run_cancellable,
)


def test_finished_work_is_not_killed() -> None:
    registered: list[Cancellable] = []
    kills: list[int] = []
    with cancelled_by(registered.append):
        running = cancellable(KillHandle(lambda: kills.append(1)))
    registered[0].close()
    assert kills == [1]
    running.finish()
    registered[0].close()
    assert kills == [1]


def test_cancelled_command_is_killed_with_its_children() -> None:
    program = "import subprocess; subprocess.run(['sleep', '60'])"
    before = {*psutil.Process().children(recursive=True)}
    started: list[psutil.Process] = []

    def cancel(work: Cancellable) -> None:
        def close() -> None:
            while len(started) < 2:
                started[:] = {*psutil.Process().children(recursive=True)} - before
                time.sleep(0.01)
            work.close()

        threading.Thread(target=close).start()

    with cancelled_by(cancel), pytest.raises(Cancelled):
        run_cancellable([sys.executable, "-c", program], 60, os.environ)
    assert psutil.wait_procs(started, 5)[1] == []
