"""Requests of resumed runs, and locks of run folders."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from luthier.engine import runs
from luthier.engine.runs import Run, same_request
from luthier.errors import RunConflict


def test_changed_data_and_changed_settings_are_named() -> None:
    old, new = ({"recipe": {"base": "b"}, "data": {"rows.csv": each}} for each in "12")
    same_request(old, old, "b:shapes")
    with pytest.raises(RunConflict, match=r"rows\.csv"):
        same_request(old, new, "b:shapes")
    with pytest.raises(RunConflict, match=r"recipe\.base") as refused:
        same_request(old, {**new, "recipe": {"base": "c"}}, "b:shapes")
    assert refused.value.rule == "run.changed"


def test_check_for_a_worker_does_not_count_as_worker(
    luthier_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run("tiny-llama", "x")
    assert not run.is_worked_on() and not run.folder.exists()
    with run.lock():
        assert run.is_worked_on()
        with pytest.raises(RunConflict) as refused:
            run.lock().__enter__()
        assert refused.value.rule == "run.in_use"
    look = os.open(run.folder / ".lock", os.O_RDONLY)
    fcntl.flock(look, fcntl.LOCK_SH)  # as a process does that looks at this moment
    assert not run.is_worked_on()
    tries: list[float] = []

    def end_look(seconds: float) -> None:
        tries.append(seconds)
        os.close(look)

    monkeypatch.setattr(runs.time, "sleep", end_look)
    with run.lock():
        assert run.is_worked_on() and len(tries) == 1
