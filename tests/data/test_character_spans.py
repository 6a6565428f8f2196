"""Tests of entities by characters: words and tags of a text, and wrong positions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.data.character_spans import are_spans, label_studio_spans, tag_words
from luthier.data.prompts import InputChecker
from luthier.data.rows import RowReader, load_rows
from luthier.data.shapes.texts import RawText, TaggedWords
from luthier.errors import DataError, RowRefused
from luthier.objectives.token_classification import TokenClassification

TEXT = "Anna-based U.S. firms in  New York, (ex Rome)"
CITY = TEXT.index("New York")


def test_words_are_split_at_punctuation() -> None:
    spans = [[CITY, CITY + 8, "place"], [0, 4, "first name"]]
    tagged = tag_words(TEXT, spans)
    assert [*zip(tagged.tokens, tagged.tags, strict=True)] == [
        ("Anna-based", "B-first_name"), ("U.S.", "O"), ("firms", "O"), ("in", "O"),
        ("New", "B-place"), ("York", "I-place"), (",", "O"), ("(", "O"), ("ex", "O"),
        ("Rome", "O"), (")", "O"),
    ]  # fmt: skip
    assert (tagged.entities, tagged.cut) == (2, ["Anna"])


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
    tagged = tag_words("東京大阪 A-B", [[0, 2, "x"], [2, 4, "x"], [5, 6, "y"], [7, 8, "z"]])
    assert tagged.tokens == ["東", "京", "大", "阪", "A-B"]
    assert tagged.tags == ["B-x", "I-x", "B-x", "I-x", "B-y"]
    assert tagged.cut == ["A", "B"]


@pytest.mark.parametrize(
    ("spans", "rule"),
    [
        ([[0, 99, "x"]], "tags.span"),
        ([[-2, 3, "x"]], "tags.span"),
        ([[4, 4, "x"]], "tags.span"),
        ([[24, 26, "x"]], "tags.span"),
        ([{"start": 0, "end": 4, "label": "x", "text": "nna-"}], "tags.span"),
        ([[0, 4, "x"], [2, 10, "y"]], "tags.overlap"),
        ([[0, 4, "x"], [0, 4, "y"]], "tags.overlap"),
        ([{"start": 0, "end": 4, "labels": ["x", "y"]}], "tags.overlap"),
    ],
)
def test_wrong_positions_are_refused(spans: list[Any], rule: str) -> None:
    with pytest.raises(RowRefused) as caught:
        tag_words(TEXT, spans)
    assert caught.value.rule == rule


def task(*annotations: dict[str, Any], **data: str) -> dict[str, Any]:
    return {"data": data or {"title": TEXT, "source": "web"}, "annotations": [*annotations]}


def test_annotations_that_agree_or_are_true_count() -> None:
    value = {"start": 0, "end": 4, "labels": ["x"]}
    full = {"result": [{"value": value}, {"value": {"choices": ["good"]}}, {"type": "relation"}]}
    cancelled, empty = {"was_cancelled": True, "result": []}, {"result": []}
    for done in ([cancelled, full, full], [empty, {**full, "ground_truth": True}]):
        assert label_studio_spans(task(*done)) == (TEXT, [value])
    for wrong, rule in (
        (task(cancelled), "field.missing"),
        (task(full, title=""), "field.missing"),
        (task(full, empty), "tags.annotators"),
    ):
        with pytest.raises(RowRefused) as caught:
            label_studio_spans(wrong)
        assert caught.value.rule == rule


def test_entities_inside_words_are_counted_in_a_warning(tmp_path: Path) -> None:
    rows = [{"text": "Rita Ora sings", "label": [[at, at + 8, "x"]]} for at in (0, 1)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"text": "no", "label": []}]))
    reader = RowReader(file)
    assert [row.record()["tags"] for row in reader.read_all()] == [["B-x", "I-x", "O"]] * 2 + [
        ["O"]
    ]
    (cut,) = [each for each in reader.warnings if each.rule == "tags.cut"]
    assert cut.location.line == 2


@pytest.mark.parametrize(
    "span",
    [
        [0, 4, ""], ["0", 4, "x"], [0, 4], {"start": 0, "label": "x"}, {"start": 0, "end": 4},
        {"start": 0, "end": 4, "label": None}, {"start": 0, "end": 4, "label": {"name": "x"}},
        {"start": 0, "end": 4, "labels": []}, {"start": None, "start_offset": 0, "label": "x"}, 3,
    ],
)  # fmt: skip
def test_values_that_are_no_spans(span: object) -> None:
    assert not are_spans([span])


def test_the_text_of_a_task_has_its_entities() -> None:
    value = {"start": 0, "end": 4, "text": "Rita", "labels": ["x"]}
    made = task(
        {"result": [{"value": value}, "odd"]}, body="Rita sings", url="https://long.example/1"
    )
    assert label_studio_spans(made)[0] == "Rita sings"


@pytest.mark.parametrize(
    ("record", "keys"),
    [
        ({"text": "good", "label": "pos", "entities": []}, {"text", "label"}),
        ({"text": "good", "rating": 3, "spans": []}, {"text", "rating"}),
    ],
)
def test_entities_next_to_another_target_are_not_read(
    tmp_path: Path, record: dict[str, Any], keys: set[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(record) + "\n")
    ((row),) = RowReader(file).read_all()
    assert row.record().keys() == keys


def test_a_text_without_the_key_has_no_entities(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    value = {"start": 0, "end": 4, "text": "Rita", "labels": ["x"]}
    file.write_text(json.dumps({"text": "Rita", "label": [value]}) + '\n{"text": "none"}\n')
    assert [row.record()["tags"] for row in RowReader(file).read_all()] == [["B-x"], ["O"]]


@pytest.mark.parametrize("key", ["label", "ner"])
def test_a_first_text_without_the_key_names_the_setting(tmp_path: Path, key: str) -> None:
    value = {"start": 0, "end": 4, "text": "Rita", "labels": ["x"]}
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "none"}\n' + json.dumps({"text": "Rita", key: [value]}) + "\n")
    with pytest.raises(DataError) as caught:
        load_rows(file)
    assert f"data.columns.entities={key}" in caught.value.problems[0].advice
    rows = RowReader(file, {"entities": key}).read_all()
    assert [row.record()["tags"] for row in rows] == [["O"], ["B-x"]]


def test_regions_of_html_are_refused() -> None:
    with pytest.raises(RowRefused):
        label_studio_spans(
            task({"result": [{"value": {"start": "/p[1]", "hypertextlabels": ["x"]}}]})
        )


def test_words_of_predictions_are_those_of_training() -> None:
    for text, span in (("Who is Rita?", [7, 11, "x"]), ("東京大阪", [0, 2, "x"])):
        tagged = tag_words(text, [span])
        row = TaggedWords("a", 1, tuple(tagged.tokens), tuple(tagged.tags))
        objective = TokenClassification().fit([row], None)  # type: ignore[arg-type]
        words = objective._words(RawText("a", 1, text))
        assert [word for word, *_ in words] == tagged.tokens


def test_inputs_with_further_data_are_unchanged() -> None:
    row = InputChecker("rows.jsonl", []).row(
        1, {"prompt": "Hi", "completion": "c", "data": {"n": "x"}}
    )
    assert row is not None and row.inputs()[0] != "x"


def test_inputs_need_no_right_entities() -> None:
    wrong: dict[str, Any] = {"text": TEXT, "entities": [[0, 99, "x"]]}
    assert row_of_input(wrong) == row_of_input(task(title=TEXT)) == TEXT


def row_of_input(record: dict[str, Any]) -> str:
    row = InputChecker("rows.jsonl", []).row(1, record)
    assert isinstance(row, RawText)
    return row.text
