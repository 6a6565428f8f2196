"""The page of an evaluation: all is there, and nothing from the data acts."""

from __future__ import annotations

import re
from dataclasses import replace

from luthier.data.shapes.texts import LabelledText, RatedText, TaggedWords
from luthier.evaluation.breakdown import Calibration, slice_scores
from luthier.evaluation.evaluate import Evaluation
from luthier.evaluation.report_page import MOST_CELLS, mark_entities, page, part_tables
from luthier.tasks import CLASSIFICATION, RATING, TAGGING

EVIL = '<script>alert("x")</script>'


def evaluated(labels: list[str]) -> Evaluation:
    rows = [LabelledText("d/f.jsonl", n, text=f"t{n} {EVIL}", label=labels[n % len(labels)])
            for n in range(1, 101)]  # fmt: skip
    answers = [
        {"label": row.label if n % 5 else labels[0], "scores": dict.fromkeys(labels, 0.7)}
        for n, row in enumerate(rows)
    ]
    records = [
        {"text": r.text, "expected": r.label, **a} for r, a in zip(rows, answers, strict=True)
    ]
    calibration = Calibration.of(rows, answers)
    assert calibration is not None
    found = dict(CLASSIFICATION.scores(rows, answers)) | {
        "expected_calibration_error": calibration.score()
    }
    parts = slice_scores(found, "label", [str(row.label) for row in rows])
    return Evaluation(found, [*rows], records=records, remarks=[EVIL], slices=parts)


def test_all_is_there_and_escaped() -> None:
    found = evaluated(["yes", EVIL, "maybe"])
    html = page(found, f"base:{EVIL}", "f.jsonl")
    assert EVIL not in html and "&lt;script&gt;" in html
    assert not re.search(r"<script|\son\w+=|\sstyle=|https?://", html)
    for heading in (
        "Scores",
        "By label",
        "Labels",
        "Most frequent mistakes",
        "Calibration",
        "Worst answers",
    ):
        assert heading in html
    assert "f.jsonl:" in html and "d/f.jsonl:" in html
    accuracy = found.scores["accuracy"]
    assert f"{accuracy:.4f}" in html and html.rstrip().endswith("</html>")


def test_a_column_named_like_a_heading_keeps_its_values() -> None:
    found = evaluated(["yes", "no"])
    parts = [replace(each, by="rows") for each in found.slices]
    (table,) = part_tables(replace(found, slices=parts))
    first = [value for value, _ in table.rows[0]]
    assert first[:2] == [parts[0].value, f"{parts[0].rows}"] and len(first) == len(table.columns)


def test_many_labels_have_no_matrix_but_their_mistakes() -> None:
    html = page(evaluated([f"label{n}" for n in range(MOST_CELLS + 1)]), "m", "d")
    assert "Confusion matrix" not in html and "Most frequent mistakes" in html


def test_page_leaves_empty_sections_out() -> None:
    rows = [RatedText("f", n, text="x", rating=float(n + n // 2)) for n in (1, 2, 3)]
    answers = [{"rating": 1.0}] * 3
    found = Evaluation(RATING.scores(rows, answers), [*rows], records=answers)
    html = page(replace(found, dropped=2), "m", "d")
    assert "2 left out" in html and "mean absolute error" in html
    for absent in ("Slices", "Confusion matrix", "Calibration"):
        assert absent not in html
    assert re.findall(r"f:\d", html) == ["f:3", "f:3", "f:2", "f:2"]  # a tooltip and a cell each


def test_entities_of_the_worst_rows_are_marked() -> None:
    words, truth = ("Anna", "met", "Bo", EVIL), ("B-per", "O", "B-per", "O")
    answer = {"tags": ["B-per", "B-per", "O", "O"]}
    assert mark_entities(words, answer["tags"], truth) == [
        ("Anna", "right", "per"), ("met", "invented", "per"), ("Bo", "missed", "per"), (EVIL, "", ""),
    ]  # fmt: skip
    assert mark_entities(words, answer["tags"])[1] == ("met", "right", "per")
    rows = [TaggedWords("f", 1, tokens=words, tags=truth)]
    html = page(Evaluation(TAGGING.scores(rows, [answer]), [*rows], records=[answer]), "m", "d")
    assert EVIL not in html
    assert [re.search(rf'<mark class="{mark}"', html) is not None
            for mark in ("right", "missed", "invented")] == [True] * 3  # fmt: skip


def test_pictures_of_the_worst_images() -> None:
    found = evaluated(["yes", "no"])
    worst = found.worst(1)[0]
    html = page(replace(found, pictures={worst: "data:image/png;base64,AA=="}), "m", "d")
    assert html.count("<img") == 1
