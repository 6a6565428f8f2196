"""Tests of JSON files whose only object has many rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.data.files import parsing
from luthier.data.files.nested import unfold
from luthier.data.files.read import read_records
from luthier.data.rows import RowReader, load_rows
from luthier.errors import Problem

ROWS = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
ANSWERS = [{"text": "Ghent", "answer_start": 3}]
SQUAD = {
    "version": "2.0",
    "data": [
        {
            "title": "Hubs",
            "paragraphs": [
                {
                    "context": "In Ghent.",
                    "qas": [
                        {"id": "1", "question": "Where?", "answers": ANSWERS},
                        {
                            "id": "2",
                            "question": "When?",
                            "answers": [],
                            "plausible_answers": ANSWERS,
                        },
                    ],
                }
            ],
        },
        {"paragraphs": [{"qas": [{"question": "Who?", "id": "3"}], "context": "Rita."}]},
    ],
}


def read(path: Path, document: object, indent: int | None = None) -> list[dict[str, Any]]:
    path.write_text(json.dumps(document, indent=indent))
    problems: list[Problem] = []
    records = [*read_records(path, problems)]
    assert problems == [] and [line for line, _ in records] == [*range(1, len(records) + 1)]
    return [record for _, record in records]


@pytest.mark.parametrize(
    ("name", "indent"), [("a.json", None), ("a.json", 1), ("a", 1), ("a", None), ("a.jsonl", None)]
)
@pytest.mark.parametrize(
    "document",
    [
        {"text": {"0": "a", "1": "b"}, "label": {"0": "x", "1": "y"}},
        {"label": {"7": "x", "3": "y"}, "text": {"7": "a", "3": "b"}},
        {"0": ROWS[0], "1": ROWS[1]},
        {"columns": ["text", "label"], "index": [0, 1], "data": [["a", "x"], ["b", "y"]]},
        {"schema": {"fields": []}, "data": ROWS},
        {"text": ["a", "b"], "label": ["x", "y"]},
        {"train": ROWS},
        {"test": ROWS},
        {"examples": ROWS, "license": "CC0"},
    ],
)
def test_rows_inside_an_object(
    tmp_path: Path, document: object, name: str, indent: int | None
) -> None:
    assert read(tmp_path / name, document, indent) == ROWS


def test_squad(tmp_path: Path) -> None:
    first, second, third = read(tmp_path / "train-v2.0.json", SQUAD)
    assert first == {
        "id": "1",
        "title": "Hubs",
        "context": "In Ghent.",
        "question": "Where?",
        "answers": ANSWERS,
    }
    assert (second["answers"], third["answers"]) == ([], [])
    assert "plausible_answers" not in second
    rows = load_rows(tmp_path / "train-v2.0.json")
    assert [row.targets() for row in rows] == [("Ghent",), ("",), ("",)]


def test_only_training_rows_of_several_splits(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"test": ROWS[:1], "train": ROWS, "dev": ROWS[1:]}))
    reader = RowReader(path)
    assert [row.record() for row in reader.read_all()] == ROWS
    assert [warning.rule for warning in reader.warnings] == ["file.splits"]


def test_splits_without_training_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"test": ROWS[:1], "validation": ROWS}))
    problems: list[Problem] = []
    assert [*read_records(path, problems)] == []
    assert [problem.rule for problem in problems] == ["file.directory"]


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"text": "a", "label": ["x", "y"]},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"tokens": ["Rita", "sings"], "tags": ["B-person", "O"]},
        {"chosen": {"role": "assistant"}, "rejected": {"role": "assistant"}},
        {"prompt": ["so", "or"], "choices": ["a", "b"], "answer": 1},
        {"text": "a", "data": [{"page": 1}]},
    ],
)
def test_single_row_is_not_unfolded(row: dict[str, object]) -> None:
    assert unfold(row, "", None) is None


def test_file_longer_than_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parsing, "MAX_LINE_BYTES", 1000)
    rows = [{"text": f"row {number}", "label": "x"} for number in range(100)]
    assert read(tmp_path / "a.json", {"train": rows}) == rows


def test_paragraph_without_questions(tmp_path: Path) -> None:
    asked = {"context": "A b", "qas": [{"question": "?", "answers": []}]}
    paragraphs = [{"context": "C", "qas": []}, asked]
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]}))
    assert len(list(RowReader(path))) == 1
