"""Unwritable output paths are errors before the work starts, in every command."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from command_line import MODEL, ROWS, Answer, jsonl

from luthier.errors import RecipeError
from luthier.files import check_creatable, new_file

COMMANDS = {
    "inspect": ["inspect", "rows.jsonl", "--html", "TARGET"],
    "convert": ["convert", "rows.jsonl", "TARGET", "--format", "jsonl"],
    "clean": ["clean", "rows.jsonl", "TARGET", "--normalize"],
    "split": ["split", "rows.jsonl", "--output", "TARGET"],
    "launch": ["launch", "rows.jsonl", "--on", "slurm", "--output", "TARGET"],
    "advise": ["advise", "rows.jsonl", "--recipe", "TARGET"],
    "generate": ["generate", MODEL, "--input", "rows.jsonl", "--output", "TARGET"],
    "evaluate": ["evaluate", MODEL, "rows.jsonl", "--output", "TARGET"],
    "certificate": ["models", "certificate", MODEL, "--card", "TARGET"],
    "export": ["models", "export", MODEL, "TARGET"],
    "import": ["import", "openai", "export", "TARGET"],
}
TARGETS = (
    "/proc/x/y.jsonl",
    "/proc/y.jsonl",
    "rows.jsonl/y.jsonl",
    f"{'n' * 300}.jsonl",
    "full.jsonl",
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "rows.jsonl", *ROWS)
    (tmp_path / "export").mkdir()
    (tmp_path / "full.jsonl").mkdir()
    (tmp_path / "full.jsonl" / "file").write_text("mine")
    return tmp_path


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.parametrize(
    ("command", "target"),
    [(name, TARGETS[(n + k) % 5]) for n, name in enumerate(COMMANDS) for k in (0, 2)],
)
def test_invalid_output_path_is_rejected(
    home: Path, folder: Path, command: str, target: str
) -> None:
    refusal = Answer(
        *(target if each == "TARGET" else each for each in COMMANDS[command])
    ).refused()
    if target == "full.jsonl":
        assert "full.jsonl" in refusal
    else:
        assert target in refusal
    assert {path.name for path in folder.iterdir()} == {
        "rows.jsonl",
        "export",
        "full.jsonl",
    }
    assert (folder / "full.jsonl" / "file").read_text() == "mine"


@pytest.mark.parametrize("command", sorted({*COMMANDS} - {"generate", "launch"}))
def test_file_writing_commands_reject_stdout(home: Path, folder: Path, command: str) -> None:
    Answer(*("-" if each == "TARGET" else each for each in COMMANDS[command])).refused()
    assert not (folder / "-").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_output_in_read_only_folder_is_rejected(
    home: Path, folder: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = os.access

    def no_right(path: str | Path, mode: int) -> bool:
        return Path(path) != folder / "full.jsonl" and access(path, mode)

    monkeypatch.setattr(os, "access", no_right)
    target = "full.jsonl/new.jsonl"
    refusal = Answer(
        *(target if each == "TARGET" else each for each in COMMANDS[command])
    ).refused()
    assert f"{target} cannot be written" in refusal


def test_missing_input_file_error_passes_through_new_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), new_file(tmp_path / "new"):
        (tmp_path / "none").read_bytes()


def test_creatable_paths_include_links_and_devices(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for path in (tmp_path / "a" / "b", tmp_path, tmp_path / "link", Path("/dev/null")):
        check_creatable(path)
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(RecipeError) as refused:
        check_creatable(tmp_path / "circle")
    assert refused.value.rule == "file.unwritable"
    assert {path.name for path in tmp_path.iterdir()} == {"link", "circle"}


@pytest.mark.parametrize("command", ["predict", "generate"])
def test_table_as_output_is_rejected(command: str, luthier_home: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "text": "a"}\n')
    target = tmp_path / "answers.CSV"
    refused = Answer(command, "tiny", "--input", str(rows), "--output", str(target)).refused()
    assert "answers.jsonl" in refused
    assert not target.exists()
