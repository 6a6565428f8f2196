"""Tests of entities by characters: words and tags of a text, and wrong positions."""

from __future__ import annotations

from typing import Any

import pytest

from luthier.data.character_spans import are_spans, label_studio_spans, tag_words
from luthier.errors import RowRefused

TEXT = "Anna-based U.S. firms in  New York, (ex Rome)"
CITY = TEXT.index("New York")


def test_words_are_cut_at_punctuation_and_at_the_edges_of_entities() -> None:
    spans = [[CITY, CITY + 8, "place"], [0, 4, "first name"]]
    tagged = tag_words(TEXT, spans)
    assert [*zip(tagged["tokens"], tagged["tags"], strict=True)] == [
        ("Anna", "B-first_name"), ("-based", "O"), ("U.S.", "O"), ("firms", "O"), ("in", "O"),
        ("New", "B-place"), ("York", "I-place"), (",", "O"), ("(", "O"), ("ex", "O"),
        ("Rome", "O"), (")", "O"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "span",
    [
        [CITY - 1, CITY + 8, "place"],
        {"start": CITY, "end": CITY + 8, "labels": ["place"], "text": "New York"},
        {"id": 3, "start_offset": CITY, "end_offset": CITY + 8, "label": "place"},
    ],
)
def test_notations_of_a_span_give_the_same_tags(span: object) -> None:
    assert are_spans([span])
    assert tag_words(TEXT, [span, span]) == tag_words(TEXT, [[CITY, CITY + 8, "place"]])


def test_neighbours_of_one_kind_stay_two_entities() -> None:
    assert tag_words("東京大阪", [[0, 2, "x"], [2, 4, "x"]]) == {
        "tokens": ["東京", "大阪"],
        "tags": ["B-x", "B-x"],
    }


@pytest.mark.parametrize(
    ("spans", "rule"),
    [
        ([[0, 99, "x"]], "tags.span"),
        ([[-2, 3, "x"]], "tags.span"),
        ([[4, 4, "x"]], "tags.span"),
        ([[24, 26, "x"]], "tags.span"),
        ([{"start": 0, "label": "x"}], "tags.span"),
        ([{"start": 0, "end": 4, "label": "x", "text": "nna-"}], "tags.span"),
        ([[0, 4, "x"], [2, 10, "y"]], "tags.overlap"),
        ([[0, 4, "x"], [0, 4, "y"]], "tags.overlap"),
    ],
)
def test_wrong_positions_are_refused(spans: list[Any], rule: str) -> None:
    with pytest.raises(RowRefused) as caught:
        tag_words(TEXT, spans)
    assert caught.value.rule == rule


def test_the_first_annotation_that_was_not_cancelled_counts() -> None:
    value = {"start": 0, "end": 4, "labels": ["x"]}
    annotations: list[dict[str, Any]] = [
        {"was_cancelled": True, "result": []},
        {"result": [{"value": value}, {"value": {"choices": ["good"]}}, {"type": "relation"}]},
        {"result": []},
    ]
    task = {"data": {"title": TEXT}, "annotations": annotations}
    assert label_studio_spans(task) == (TEXT, [value])
    for wrong in ({**task, "annotations": annotations[:1]}, {**task, "data": {"a": "", "b": ""}}):
        with pytest.raises(RowRefused):
            label_studio_spans(wrong)
