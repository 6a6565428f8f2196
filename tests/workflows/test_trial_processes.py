"""Processes of a search with scripted work: end, restart and reports."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from luthier.engine.metrics import Reporter
from luthier.errors import Interrupted, LuthierError
from luthier.recipe import Recipe
from luthier.workflows.child_processes import STARTS, Resources
from luthier.workflows.trial_processes import (
    BEST,
    OUTCOME,
    TrialRunner,
    run_best,
)

RECIPE = Recipe.parse({"base": "x", "name": "x", "data": {"train": "rows.jsonl"}})
KILL = "os.kill(os.getpid(), 9)"
END = f"open('{OUTCOME}', 'w').write('{{}}')"
WAIT = "sys.stdin.read(); open('stopped', 'w')"


class Scripted(TrialRunner):
    """Runs a scripted action after each start."""

    def __init__(self, work: Path, *starts: str) -> None:
        work.mkdir(parents=True)
        self.starts, self.work = starts, work

    def resources(self, recipe: Recipe) -> Resources:
        assert recipe == RECIPE
        return Resources(7)

    def command(self, process: Sequence[str], resources: Resources, errors: Path) -> list[str]:
        assert list(process[-2:]) == [str(self.work.parent), BEST] and resources.cores == 7
        lines = [
            "import os, sys",
            f"os.chdir({str(self.work)!r})",
            "open('starts', 'a').write('.')",
        ]
        lines += [f"starts = {self.starts!r}", "exec(starts[os.path.getsize('starts') - 1])"]
        return [sys.executable, "-c", "\n".join(lines)]

    @property
    def started(self) -> int:
        return (self.work / "starts").stat().st_size


class Heard(Reporter):
    """Stores all reports."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def note(self, text: str) -> None:
        self.calls.append(text)

    def settings(self, defaults: Sequence[tuple[str, Any, str]]) -> None:
        self.calls.append([tuple(each) for each in defaults])

    def metrics(self, line: Any, steps: int) -> None:
        self.calls.append((line, steps))


def test_killed_process_is_restarted(tmp_path: Path) -> None:
    runner, heard = Scripted(tmp_path / BEST, KILL, KILL, END), Heard()
    run_best(tmp_path, RECIPE, runner, heard)
    assert runner.started == 3
    assert len(heard.calls) == 2 and all("signal 9" in note for note in heard.calls)
    run_best(tmp_path, RECIPE, runner, heard)  # a finished process is not repeated
    assert runner.started == 3


def test_repeatedly_killed_process_is_abandoned(tmp_path: Path) -> None:
    runner = Scripted(tmp_path / BEST, *[KILL] * (STARTS + 1))
    with pytest.raises(LuthierError):
        run_best(tmp_path, RECIPE, runner, Reporter())
    assert runner.started == STARTS


def test_failed_process_is_not_restarted(tmp_path: Path) -> None:
    runner = Scripted(tmp_path / BEST, "sys.exit('no such thing')", END)
    with pytest.raises(LuthierError):
        run_best(tmp_path, RECIPE, runner, Reporter())
    assert runner.started == 1


def test_stop_waits_for_end_of_process(tmp_path: Path) -> None:
    runner = Scripted(tmp_path / BEST, WAIT)

    def stop() -> None:
        while not (tmp_path / BEST / "starts").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted):
        run_best(tmp_path, RECIPE, runner, Reporter())
    thread.join()
    assert (tmp_path / BEST / "stopped").exists()
    assert signal.getsignal(signal.SIGTERM) is before


def test_reports_of_process_reach_reporter(tmp_path: Path) -> None:
    reports = [
        ["note", ["begun"]],
        ["settings", [[["training.epochs", 3, "few rows"]]]],
        ["metrics", [{"step": 1, "loss": 0.5}, 8]],
    ]
    lines = "".join(json.dumps(each) + "\n" for each in reports)
    half = len(lines) - 20  # only complete lines are passed on
    script = (
        f"import time; file = open('reports.jsonl', 'a'); text = {lines!r}; "
        f"file.write(text[:{half}]); file.flush(); time.sleep(1); file.write(text[{half}:]); "
        f"file.close(); {END}"
    )
    heard = Heard()
    run_best(tmp_path, RECIPE, Scripted(tmp_path / BEST, script), heard)
    chosen = [("training.epochs", 3, "few rows")]
    assert heard.calls == ["begun", chosen, ({"step": 1, "loss": 0.5}, 8)]
