"""Scores of labels against scikit-learn and seqeval, and by hand."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sklearn import metrics

from luthier.data.shapes.texts import LabelledText, RatedText, RawText, TaggedWords, entities
from luthier.errors import DataError
from luthier.evaluation.labels import label_remarks
from luthier.evaluation.long_rows import FittingRows
from luthier.evaluation.significance import values
from luthier.tasks import CLASSIFICATION, RATING, TAGGING
from luthier.types import Row


def test_accuracy_and_f1_are_scikit_learn_s() -> None:
    draw = random.Random(0)
    truth = [draw.choice("abcd") for _ in range(200)]
    given = [t if draw.random() < 0.6 else draw.choice("abcde") for t in truth]
    rows = [LabelledText("f", n, text="x", label=t) for n, t in enumerate(truth)]
    found = values(CLASSIFICATION.scores(rows, [{"label": g} for g in given]))
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(truth, given))
    macro = metrics.f1_score(truth, given, average="macro", zero_division=0)
    assert found["macro_f1"] == pytest.approx(macro)


def test_macro_f1_of_subset_uses_labels_of_subset() -> None:
    rows = [LabelledText("f", n, text="x", label=t) for n, t in enumerate("aabc")]
    macro = CLASSIFICATION.scores(rows, [{"label": g} for g in "abbd"])["macro_f1"]
    assert macro.value == pytest.approx((2 / 3 + 2 / 3 + 0 + 0) / 4)
    assert macro.subset(np.array([0, 1, 1])).value == pytest.approx((1 / 2 + 0) / 2)


def test_several_labels_a_row() -> None:
    rows = [
        LabelledText("f", 1, text="x", label=("a", "b")),
        LabelledText("f", 2, text="y", label=()),
    ]
    found = values(CLASSIFICATION.scores(rows, [{"label": ["a"]}, {"label": []}]))
    assert found["accuracy"] == 0.5
    assert found["micro_f1"] == pytest.approx(2 / 3)
    assert found["macro_f1"] == pytest.approx(0.5)


def test_entities_are_seqeval_s() -> None:
    sequence = pytest.importorskip("seqeval.metrics.sequence_labeling")
    draw = random.Random(1)
    tags = ["O", "B-a", "I-a", "B-b", "I-b"]
    truth = [[draw.choice(tags) for _ in range(draw.randint(1, 12))] for _ in range(100)]
    given = [[t if draw.random() < 0.7 else draw.choice(tags) for t in row] for row in truth]
    rows = [TaggedWords("f", n, tokens=("w",) * len(t), tags=tuple(t)) for n, t in enumerate(truth)]
    found = values(TAGGING.scores(rows, [{"tags": g} for g in given]))
    assert found["entity_f1"] == pytest.approx(sequence.f1_score(truth, given))
    assert found["entity_precision"] == pytest.approx(sequence.precision_score(truth, given))
    assert found["entity_recall"] == pytest.approx(sequence.recall_score(truth, given))


def test_kinds_without_answers_are_named() -> None:
    truth = [("B-a", "B-b"), ("B-c", "O")]
    rows: list[Row] = [
        TaggedWords("f", n, tokens=("w", "w"), tags=tags) for n, tags in enumerate(truth)
    ]
    reader: Any = SimpleNamespace(objective=SimpleNamespace(labels=("O", "B-a", "B-b")))
    answers = [{"tags": ["B-a", "O"]}, {"tags": ["O", "O"]}]
    unknown, missed = TAGGING.evaluate(reader, FittingRows(rows, []), [answers]).remarks
    assert "c (1)" in unknown and "b (1)" in missed


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        (["O", "O"], set()),
        (["B-a"], {("a", 0, 0)}),
        (["B-a", "I-a", "O", "B-b"], {("a", 0, 1), ("b", 3, 3)}),
        (["B-a", "B-a"], {("a", 0, 0), ("a", 1, 1)}),
        (["I-a", "I-a"], {("a", 0, 1)}),
        (["B-a", "I-b"], {("a", 0, 0), ("b", 1, 1)}),
        (["B-a", "I-b", "I-a"], {("a", 0, 0), ("b", 1, 1), ("a", 2, 2)}),
        (["B-a-b", "I-a-b"], {("a-b", 0, 1)}),
    ],
)
def test_entities_of_tags(tags: list[str], expected: set[tuple[str, int, int]]) -> None:
    assert entities(tags) == expected


def test_ratings() -> None:
    rows = [RatedText("f", n, text="x", rating=float(n)) for n in range(4)]
    found = values(RATING.scores(rows, [{"rating": 2.0 * n + 1} for n in range(4)]))
    assert found["mean_absolute_error"] == pytest.approx(2.5)
    assert found["pearson"] == pytest.approx(1.0)
    assert "pearson" not in RATING.scores(rows, [{"rating": 1.0}] * 4)


def test_rows_without_the_truth_are_refused() -> None:
    with pytest.raises(DataError):
        CLASSIFICATION.scores([RawText("f", 3, text="x")], [{"label": "a"}])


def test_remarks_name_unknown_labels_and_mistakes() -> None:
    truth = ["a", "a", "a", "b", "c", "c"]
    given = ["a", "b", "b", "b", "a", "b"]
    rows = [LabelledText("f", n, text="x", label=t) for n, t in enumerate(truth)]
    scores_of = {"a": 0.5, "b": 0.5}
    found = label_remarks(rows, [{"label": g, "scores": scores_of} for g in given])
    unknown, mistakes = found
    assert unknown.startswith("2 of the rows") and unknown.endswith(": c")
    assert mistakes.endswith(": b instead of a (2 of 3)")
    # Several labels a row have no single mistake.
    several = [LabelledText("f", 0, text="x", label=("a", "b"))]
    assert label_remarks(several, [{"label": ["a"]}]) == []
