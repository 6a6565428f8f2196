"""What a run that goes on must be asked for again, and who works on it."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from luthier.engine import runs
from luthier.engine.dataset import NAMED_MEDIA
from luthier.engine.runs import Run, same_request
from luthier.errors import RunConflict


@pytest.mark.parametrize("named", [False, True])
def test_changed_images_are_named(tmp_path: Path, named: bool) -> None:
    """The command was the same, so to repeat it would change nothing."""
    table = tmp_path / "rows.csv"
    for path, modified in ((table, 100), (tmp_path / "1.png", 100), (tmp_path / "2.png", 300)):
        path.write_bytes(b"")
        os.utime(path, (modified, modified))
    source = NAMED_MEDIA if named else str(tmp_path)
    same = {str(table): "0"} if named else {}
    old, new = ({"recipe": {"base": "b"}, "data": {**same, source: each}} for each in "12")
    with pytest.raises(RunConflict) as caught:
        same_request(old, new, "b:shapes", asked_at=200)
    message = str(caught.value)
    assert f"its data changed after it began: {source} (newer than the run: " in message
    assert f"{tmp_path / '2.png'})" in message and "1.png" not in message
    assert "begin anew, under another name" in message and "first command" not in message
    with pytest.raises(RunConflict) as refused:
        same_request(old, {**new, "recipe": {"base": "c"}}, "b:shapes")
    assert refused.value.rule == "run.changed"


def test_who_looks_whether_a_run_is_worked_on_is_not_taken_for_a_worker(
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
