"""Tests of columns that no shape reads: severity by name, content and shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from written_rows import write

from luthier.data.rows import RowReader

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
TEXT: dict[str, Any] = {"text": "A text about tyres"}
CORPUS: dict[str, Any] = {"text": "A long text about tyres. " * 20}
PAIR: dict[str, Any] = {"prompt": "Hi", "completion": "Hello"}
CHAT: dict[str, Any] = {"messages": TURNS}


def rules(folder: Path, row: dict[str, Any], columns: dict[str, str] | None = None) -> set[str]:
    """Return the rules for sixteen rows; callable values make the value of each row."""
    rows = [{k: v(n) if callable(v) else v for k, v in row.items()} for n in range(16)]
    reader = RowReader(write(folder, *rows), columns)
    assert len(list(reader)) == 16 and not reader.problems
    return {each.rule.removeprefix("column.") for each in reader.warnings}


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        (TEXT | {"intent": lambda n: f"class {n}"}, "unread"),
        (TEXT | {"userIntent": lambda n: f"class {n}"}, "unread"),
        (TEXT | {"lable": lambda n: f"class {n}"}, "unread"),
        (TEXT | {"gold_label": lambda n: f"class {n}"}, "unread"),
        (TEXT | {"categories": ["a", "b"]}, "unread"),
        (TEXT | {"summary": lambda n: f"Text {n}"}, "unread"),
        (PAIR | {"thumbs_up": lambda n: n % 2 == 0}, "unread"),
        (TEXT | {"department": lambda n: "ab"[n % 2]}, "unread"),
        (CORPUS | {"department": lambda n: "ab"[n % 2]}, "category"),
        (CORPUS | {"toxic": lambda n: n % 2}, "unread"),
        (CORPUS | {"intent": lambda n: f"class {n}"}, "unread"),
        (TEXT | {"tldr": lambda n: f"Text {n}"}, "unread"),
        (TEXT | {"antwort": lambda n: f"A long reply of the shop {n}. " * 3}, "unread"),
        (TEXT | {"description": lambda n: f"A long text about {n}. " * 3}, "ignored"),
        (TEXT | {"department": lambda n: f"name {n}"}, "ignored"),
        (TEXT | {"photo": lambda n: f"{n}.jpg"}, "unread"),
        (TEXT | {"attachment": lambda n: f"{n}.png"}, "unread"),
        (TEXT | {"start": 4}, "unread"),
        (TEXT | {"source": lambda n: "ab"[n % 2]}, "ignored"),
        (TEXT | {"created_at": "2026-11-28"}, "ignored"),
        (TEXT | {"doc_id": lambda n: n % 2}, "ignored"),
        ({"prompt": "Hi", "topic": lambda n: "ab"[n % 2]}, "unread"),
        (TEXT | {"label": "a", "department": lambda n: "ab"[n % 2]}, "ignored"),
        (TEXT | {"label": "a", "images": ["a.jpg"]}, "unread"),
        (PAIR | {"category": lambda n: "ab"[n % 2]}, "category"),
        (PAIR | {"section": lambda n: "ab"[n % 2]}, "category"),
        (PAIR | {"useful": lambda n: n % 2 == 0}, "category"),
        (PAIR | {"answer": lambda n: f"Text {n}"}, "unread"),
        (CHAT | {"verdict": lambda n: ("good", "bad")[n % 2]}, "category"),
        (CHAT | {"score": 0.5}, "unread"),
        (CHAT | {"timestamp": 5}, "ignored"),
        ({"anchor": "a", "positive": "b", "split": "x"}, "ignored"),
        ({"anchor": "a", "positive": "b", "same": lambda n: ("yes", "no")[n % 2]}, "category"),
        ({"image-ref": "a.jpg", "caption": "x", "bbox": [1, 2]}, "unread"),
    ],
)
def test_severity_of_an_ignored_column(folder: Path, row: dict[str, Any], rule: str) -> None:
    (folder / "a.jpg").write_bytes(b"")
    assert rules(folder, row) == {rule}


@pytest.mark.parametrize("empty", [None, "", []])
def test_column_without_values_is_no_finding(folder: Path, empty: object) -> None:
    assert rules(folder, TEXT | {"intent": empty}) == set()


def test_ignored_column_is_no_finding(folder: Path) -> None:
    assert rules(folder, TEXT | {"intent": "a"}, {"intent": ""}) == set()


def test_unread_key_of_turn_is_classified_by_name(folder: Path) -> None:
    thought = [TURNS[0], TURNS[1] | {"thought": "Greet"}]
    assert rules(folder, {"messages": thought}) == {"unread"}
    assert rules(folder, {"messages": [TURNS[0] | {"mood": "calm"}, TURNS[1]]}) == {"ignored"}


@pytest.mark.parametrize(
    ("row", "advice"),
    [
        (TEXT | {"intent": "a"}, "`data.columns.label=intent`"),
        (TEXT | {"rating": "a"}, "`data.columns.intent=`"),
        (TEXT | {"stars": lambda n: n / 7}, "`data.columns.rating=stars`"),
        (TEXT | {"summary": lambda n: f"Text {n}"}, "`data.columns.completion=summary`"),
        (TEXT | {"language_score": lambda n: n / 7}, "`data.columns.rating=language_score`"),
        ({"prompt": "Hi", "topic": "a"}, "`data.columns.completion=topic`"),
    ],
)
def test_advice_names_the_settings(folder: Path, row: dict[str, Any], advice: str) -> None:
    if "rating" in row:  # a mapped key is named as in the file
        row, columns = TEXT | {"intent": lambda n: "ab"[n % 2]}, {"lable": "intent"}
    else:
        columns = {}
    rows = [{k: v(n) if callable(v) else v for k, v in row.items()} for n in range(16)]
    reader = RowReader(write(folder, *rows), columns)
    assert list(reader)
    assert advice in reader.warnings[0].advice


def test_column_of_late_rows_is_a_finding(folder: Path) -> None:
    rows = [TEXT | ({"intent": "a"} if n > 1_200 else {}) for n in range(1_300)]
    reader = RowReader(write(folder, *rows))
    assert len(list(reader)) == 1_300
    assert {each.rule for each in reader.warnings} == {"column.unread"}


def test_address_is_a_note(folder: Path) -> None:
    assert rules(folder, PAIR | {"target_url": "https://host/a"}) == {"ignored"}


def test_values_are_counted_beyond_the_first_rows(folder: Path) -> None:
    rows = [TEXT | {"kind": "a" if n < 1500 else "b"} for n in range(3000)]
    reader = RowReader(write(folder, *rows))
    assert list(reader)
    assert [each.rule for each in reader.warnings] == ["column.unread"]


def test_corpus_of_laws_with_columns_of_origin(folder: Path) -> None:
    row = CORPUS | {"statute": lambda n: f"Act {n % 3}", "clause": lambda n: str(n), "kind": "law"}
    assert rules(folder, row) == {"category", "ignored"}
