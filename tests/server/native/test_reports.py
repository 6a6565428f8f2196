"""Inputs of estimates and inspections, without server paths in the results."""

from __future__ import annotations

import json
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from both_databases import new_database
from native_client import native_client, native_context
from stored_objects import put_objects

from luthier.server.jobs import data
from luthier.server.native import reports

ROW = json.dumps({"prompt": "a", "completion": "b"}) + "\n"


def ask(folder: Path, path: str, body: dict[str, Any]) -> Any:
    """Return the response of the native API to a request with files in ``folder``."""
    database = new_database()
    files = {file.name: file.read_bytes() for file in folder.glob("*.*")}
    put_objects(database, "111111111111", files)
    try:
        return native_client(native_context(database), "111111111111").post(path, json=body)
    finally:
        database.close()


@pytest.mark.parametrize("named", [{}, {"base": "smollm2-135m-instruct"}])
def test_inspection_passes_base_if_given(
    luthier_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: dict[str, str]
) -> None:
    luthier_home.mkdir(exist_ok=True)
    (tmp_path / "rows.jsonl").write_text(ROW)
    commands: list[list[str]] = []

    def answer(command: list[str], *options: Any) -> Any:
        commands.append(command)
        report = json.dumps({"verdict": "passed", "base": "a-base"})
        return subprocess.CompletedProcess(command, 0, report, "")

    monkeypatch.setattr(reports, "run_cancellable", answer)
    answered = ask(tmp_path, "/api/v1/inspections", {"training": "s3://rows/rows.jsonl", **named})
    assert answered.json()["report"]["base"] == "a-base"
    assert ("--base" in commands[0]) is bool(named)


def test_columns_of_an_inspection_reach_the_checks(
    luthier_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    luthier_home.mkdir(exist_ok=True)
    (tmp_path / "rows.csv").write_text("utterance,intent\na,b\n")
    commands: list[list[str]] = []

    def answer(command: list[str], *options: Any) -> Any:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, json.dumps({"verdict": "passed"}), "")

    monkeypatch.setattr(reports, "run_cancellable", answer)
    columns = {"text": "utterance", "label": "intent"}
    ask(tmp_path, "/api/v1/inspections", {"training": "s3://rows/rows.csv", "columns": columns})
    (command,) = commands
    options = [command[at + 1] for at, each in enumerate(command) if each == "--map"]
    assert options == ["text=utterance", "label=intent"]


@pytest.mark.parametrize(("name", "line"), [("a.jsonl", ROW), ("a.csv", 'text,"two\nlines"\n')])
def test_first_lines_of_a_large_file_are_whole(
    luthier_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, line: str
) -> None:
    luthier_home.mkdir(exist_ok=True)
    (tmp_path / name).write_text(line * 90)
    monkeypatch.setattr(data, "FIRST_BYTES", 1000)
    checked: list[str] = []

    def answer(command: list[str], *options: Any) -> Any:
        rows = next(each for each in command if each.endswith(name))
        checked.append(Path(rows).read_text())
        return subprocess.CompletedProcess(command, 0, json.dumps({"verdict": "passed"}), "")

    monkeypatch.setattr(reports, "run_cancellable", answer)
    body = {"training": f"s3://rows/{name}", "first_lines": True}
    complete = [ask(tmp_path, "/api/v1/inspections", body).json()["complete"]]
    (tmp_path / name).write_text(line * 9)
    complete.append(ask(tmp_path, "/api/v1/inspections", body).json()["complete"])
    assert checked == [line * (1000 // len(line)), line * 9]
    assert complete == [False, True]


def test_preview_of_columns(luthier_home: Path, tmp_path: Path) -> None:
    luthier_home.mkdir(exist_ok=True)
    (tmp_path / "rows.csv").write_text("utterance,intent,day\nhello\tyou,greet,mon\n" * 3)
    body: dict[str, Any] = {"training": "s3://rows/rows.csv"}
    shown = ask(tmp_path, "/api/v1/previews", body).json()
    assert [each["name"] for each in shown["columns"]] == ["utterance", "intent", "day"]
    assert {"text", "label", "prompt", "completion"} <= {*shown["keys"]}
    assert "utterance" in shown["problem"] and "form" not in shown
    body["columns"] = {"text": "utterance", "label": "intent", "day": ""}
    shown = ask(tmp_path, "/api/v1/previews", body).json()
    assert "problem" not in shown and "label" in shown["form"]


def test_estimate_reads_all_validation_files_and_hides_paths(
    luthier_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    luthier_home.mkdir(exist_ok=True)
    names = ("rows", "held", "also")
    for name in names:
        (tmp_path / f"{name}.jsonl").write_text(ROW)
    training, *validation = [f"s3://rows/{name}.jsonl" for name in names]
    seen: list[str] = []

    def refuse(command: list[str], *options: Any) -> Any:
        recipe = Path(next(each for each in command if each.endswith("recipe.toml")))
        held = Path(tomllib.loads(recipe.read_text())["data"]["validation"])
        files = sorted(held.rglob("*.jsonl"))
        seen.extend(file.name for file in files)
        result = "\n".join(f"{each} is wrong" for each in (*files, held))
        answer = json.dumps({"error": {"message": result}})
        return subprocess.CompletedProcess(command, 2, answer, "what is on the terminal")

    monkeypatch.setattr(reports, "run_cancellable", refuse)
    body = {"training": training, "validation": validation}
    refused = ask(tmp_path, "/api/v1/estimates", body)
    assert sorted(seen) == ["also.jsonl", "held.jsonl"]
    held, also = validation
    assert refused.json()["error"]["message"].splitlines() == [
        f"{held} is wrong",
        f"{also} is wrong",
        f"{held}, {also} is wrong",
    ]
