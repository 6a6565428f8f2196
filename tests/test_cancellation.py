"""Tests of cancellation: work can be ended while running, not after."""

from __future__ import annotations

from luthier.processes import Cancellable, KillHandle, cancellable, cancelled_by


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
