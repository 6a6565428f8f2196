"""Forwarding of reports between processes: once and in order."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from luthier.engine.metrics import Reporter
from luthier.engine.report_file import ReportFile, ReportReader, forward_reports


class Heard(Reporter):
    """Reporter with all calls. Raises on a special note."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def note(self, text: str) -> None:
        self.calls.append(text)
        if text == "break":
            raise BrokenPipeError("nobody reads")

    def metrics(self, line: Mapping[str, Any], steps: int) -> None:
        self.calls.append((line, steps))


def test_each_call_is_a_line_without_single_rows(tmp_path: Path) -> None:
    file = ReportFile(tmp_path / "reports.jsonl")
    file.stage("Training")
    file.note("a note")
    file.nothing_to_resume("base:x")
    file.settings([("training.epochs", 3, "few rows")])
    file.progress(1, 2, "rows")
    file.metrics({"step": 1, "rows": {"accuracy": "…"}}, 8)
    lines = [json.loads(line) for line in file.path.read_text().splitlines()]
    assert lines == [
        ["stage", ["Training"]],
        ["note", ["a note"]],
        ["nothing_to_resume", ["base:x"]],
        ["settings", [[["training.epochs", 3, "few rows"]]]],
        ["progress", [1, 2, "rows"]],
        ["metrics", [{"step": 1}, 8]],
    ]


def test_complete_line_is_reported_once(tmp_path: Path) -> None:
    path, heard = tmp_path / "reports.jsonl", Heard()
    reader = ReportReader(path)
    reader.forward(heard)  # the file does not exist yet
    file = ReportFile(path)
    file.note("one")
    with path.open("a") as unfinished:
        unfinished.write('["note", ["t')
    reader.forward(heard)
    reader.forward(heard)
    with path.open("a") as rest:
        rest.write('wo"]]\n')
    file.metrics({"loss": 0.5}, 8)
    reader.forward(heard)
    assert heard.calls == ["one", "two", ({"loss": 0.5}, 8)]
    reader.remove()
    assert not [*tmp_path.iterdir()]


def test_broken_reporter_does_not_stop_run(tmp_path: Path) -> None:
    path, heard = tmp_path / "reports.jsonl", Heard()

    def run() -> None:
        file = ReportFile(path)
        file.note("break")
        file.note("after")

    def follow() -> None:
        with forward_reports(path, heard):
            thread = threading.Thread(target=run, daemon=True)
            thread.start()
            thread.join(30)
            assert not thread.is_alive()

    with pytest.raises(BrokenPipeError):
        follow()
    assert heard.calls == ["break"]
