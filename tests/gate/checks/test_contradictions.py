"""Rows with equal input and different targets, in each shape."""

from __future__ import annotations

from typing import Any

import pytest

from luthier.data.rows import Checker
from luthier.gate.checks.contradictions import Contradictions
from luthier.gate.report import Report
from luthier.gate.scan import inspect_rows


def report(*records: dict[str, Any], limit: int = 1 << 20) -> Report:
    problems: list[Any] = []
    checker = Checker("f", problems)
    rows = [checker.row(line, record) for line, record in enumerate(records, 1)]
    assert not problems
    return inspect_rows({"train": [row for row in rows if row]}, [Contradictions(limit)])


def lines(found: Report) -> dict[str, list[list[int]]]:
    return {
        rule: [[each.place.line, *(other.line for other in each.others)] for each in places]
        for rule, places in found.findings.examples.items()
    }


@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_labels_tags_and_ratings(limit: int) -> None:
    found = report(
        {"text": "a b", "label": "x"},
        {"text": "A  b!", "label": "y"},
        {"text": "a b", "label": "x"},
        {"text": "c", "label": ["x", "y"]},
        {"text": "c", "label": ["y", "x"]},
        limit=limit,
    )
    assert lines(found) == {"label.contradiction": [[1, 2, 3]]}
    assert found.findings.examples["label.contradiction"][0].message.startswith(
        "one text has 2 labels"
    )
    assert found.summaries["contradictions"] == {"label.contradiction": {"inputs": 1, "rows": 3}}
    tags = report(
        {"tokens": ["Rita", "sings"], "tags": ["B-person", "O"]},
        {"tokens": ["Rita", "sings"], "tags": ["O", "O"]},
    )
    ratings = report(
        {"text": "a", "rating": 1}, {"text": "a", "rating": 2.5}, {"text": "b", "rating": 1}
    )
    assert lines(tags) == lines(ratings) == {"label.contradiction": [[1, 2]]}


def test_several_completions_are_a_note() -> None:
    found = report(
        {"prompt": "hello", "completion": "hi"},
        {"prompt": "Hello", "completion": "good day"},
        {"prompt": "bye", "completion": "bye"},
        {"prompt": "bye", "completion": "bye"},
    )
    assert lines(found) == {"answer.several": [[1, 2]]}
    assert found.findings.exit_code == 0
    assert lines(report({"text": "a"}, {"text": "a"})) == {}


def test_rows_with_a_common_reply_agree() -> None:
    found = report(
        {"prompt": "hello", "completion": ["hi", "good day"]},
        {"prompt": "hello", "completion": "good day"},
        {"prompt": "bye", "completion": ["bye", "see you"]},
        {"prompt": "bye", "completion": "farewell"},
    )
    assert lines(found) == {"answer.several": [[3, 4]]}


def test_opposite_preferences_are_contradictions() -> None:
    found = report(
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": "b", "rejected": "a"},
        {"prompt": "p", "chosen": "a", "rejected": "c"},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
    )
    assert lines(found) == {"preference.contradiction": [[1, 2]]}
    thumbs = report(
        {"prompt": "p", "completion": "a", "label": True},
        {"prompt": "p", "completion": "a", "label": False},
        {"prompt": "p", "completion": "b", "label": False},
    )
    assert lines(thumbs) == {"label.contradiction": [[1, 2]]}


@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_passage_both_positive_and_negative_for_same_query(limit: int) -> None:
    found = report(
        {"query": "a?", "positive": "one", "negatives": ["two", "three"]},
        {"query": "b?", "positive": "two", "negatives": ["one"]},
        {"query": "A", "positive": "Three.", "negatives": ["four"]},
        {"query": "c?", "positive": "x"},
        limit=limit,
    )
    assert lines(found)["pair.contradiction"] == [[3, 1]]
