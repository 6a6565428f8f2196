"""Slices, labels, certainty and the worst rows: against scikit-learn and by hand."""

from __future__ import annotations

import random

import numpy as np
import pytest
from sklearn import metrics

from luthier.data.shapes.texts import LabelledText, TaggedWords
from luthier.evaluation import breakdown
from luthier.evaluation.breakdown import (
    NO_ENTITY,
    OTHERS,
    Calibration,
    LabelCounts,
    length_keys,
    slice_scores,
    worst_rows,
)
from luthier.evaluation.evaluate import Evaluation
from luthier.evaluation.labels import label_remarks
from luthier.evaluation.significance import RowScores
from luthier.tasks import CLASSIFICATION


def labelled(truth: list[str]) -> list[LabelledText]:
    return [LabelledText("f", n, text="x", label=each) for n, each in enumerate(truth, 1)]


def test_label_counts_match_scikit_learn() -> None:
    draw = random.Random(0)
    truth = [draw.choice("abcd") for _ in range(200)]
    given = [each if draw.random() < 0.6 else draw.choice("abce") for each in truth]
    counts = LabelCounts.of(labelled(truth), [{"label": each} for each in given])
    assert counts is not None
    expected = metrics.confusion_matrix(truth, given, labels=counts.labels)
    assert counts.count_TA.tolist() == expected.tolist()
    precision, recall, f1, rows = metrics.precision_recall_fscore_support(
        truth, given, labels=counts.labels, zero_division=0
    )
    for place, (name, found) in enumerate(counts.scores().items()):
        assert found["f1"] == pytest.approx(f1[place]) and found["rows"] == rows[place]
        assert found.get("recall", 0) == pytest.approx(recall[place])
        assert found.get("precision", 0) == pytest.approx(precision[place])
        assert ("recall" in found) == (name in truth) and ("precision" in found) == (name in given)
    assert sum(rows for _, _, rows in counts.mistakes()) == sum(map(str.__ne__, truth, given))
    several = [LabelledText("f", 1, text="x", label=("a", "b"))]
    assert LabelCounts.of(several, [{"label": ["a"]}]) is None
    # A multi-label model on single-label rows.
    answers = [{"label": ["a"], "scores": {"a": 0.9}}]
    assert LabelCounts.of(labelled(["a"]), answers) is None
    assert Calibration.of(labelled(["a"]), answers) is None
    assert label_remarks(labelled(["a"]), answers) == []
    none = CLASSIFICATION.scores([LabelledText("f", 1, text="x", label=())], [{"label": []}])
    assert list(none) == ["accuracy"] and none["accuracy"].value == 1


def test_slices_add_up_and_stand_out_beyond_chance() -> None:
    truth = ["a"] * 300 + ["b"] * 100
    given = ["a"] * 290 + ["b"] * 10 + ["b"] * 60 + ["a"] * 40
    found = CLASSIFICATION.scores(labelled(truth), [{"label": each} for each in given])
    parts = slice_scores(found, "label", truth)
    assert [(each.value, each.rows) for each in parts] == [("a", 300), ("b", 100)]
    assert [each.scores["accuracy"] for each in parts] == pytest.approx([290 / 300, 0.6])
    # The F1 of a slice counts the slice's rows only: label b, and label a where predicted.
    assert parts[1].scores["macro_f1"] == pytest.approx((2 * 60 / 160 + 0) / 2)
    assert all(each.stands_out for each in parts)
    assert parts[0].interval[0] < 290 / 300 < parts[0].interval[1]
    even = slice_scores(found, "row", ["odd", "even"] * 200)
    assert not any(each.stands_out for each in even)


def test_slice_without_score_does_not_stand_out() -> None:
    said = RowScores.of([-2.0] * 20 + [0.0] * 20, [1] * 20 + [0] * 20, is_share=False)
    parts = slice_scores({"logp": said}, "column", ["up"] * 20 + ["down"] * 20)
    assert [each.stands_out for each in parts] == [False, False]


@pytest.mark.slow
def test_random_slices_rarely_stand_out() -> None:
    draw = np.random.default_rng(0)
    wrong = 0
    for _ in range(200):
        score = {"accuracy": RowScores.of(draw.random(400) < 0.8)}
        keys = [str(each) for each in draw.integers(10, size=400)]
        wrong += any(each.stands_out for each in slice_scores(score, "column", keys))
    assert wrong <= 20  # 10 are expected


def test_small_slices_are_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breakdown, "MOST_SLICES", 3)
    found = slice_scores({"s": RowScores.of([1, 0, 1, 1, 0, 0])}, "k", list("aabbcd"))
    assert [(each.value, each.rows, each.scores["s"]) for each in found] == [
        ("a", 2, 0.5),
        ("b", 2, 1.0),
        (OTHERS, 2, 0.0),
    ]


def test_thirds_by_length() -> None:
    keys = length_keys([5, 1, 3, 100, 2, 7])
    assert keys == ["3 to 5", "at most 2", "3 to 5", "above 5", "at most 2", "above 5"]
    assert length_keys([4, 4, 4]) == ["at most 4"] * 3


def test_calibration_error_matches_formula() -> None:
    draw = np.random.default_rng(0)
    confidence = draw.uniform(0.3, 1.0, 500)
    right = draw.random(500) < confidence - 0.2
    error = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence >= low) & (confidence < low + 1 / 15)
        if inside.any():
            error += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    rows = labelled(["a"] * 500)
    answers = [
        {"label": "a" if each else "b", "scores": {"a": sure, "b": sure}}
        for each, sure in zip(right, confidence, strict=True)
    ]
    found = Calibration.of(rows, answers)
    assert found is not None and found.error == pytest.approx(error)
    assert sum(each["rows"] for each in found.bins()) == 500
    assert found.score().value == pytest.approx(error) and 0 < found.score().error < 0.05
    assert Calibration.of(rows[:1], [{"label": "a"}]) is None


def test_worst_rows_are_sorted_by_score_and_confidence() -> None:
    right = RowScores.of([1, 0, 1, 0, 0])
    assert worst_rows(right).tolist() == [1, 3, 4]
    assert worst_rows(right, [0.9, 0.2, 0.9, 0.8, 0.5]).tolist() == [3, 4, 1]
    errors = RowScores.of([0.5, 3.0, 0.0], is_share=False)
    assert worst_rows(errors, less_is_better=True).tolist() == [1, 0]
    # A reward has no best value: all measured rows are sorted by reward.
    rewards = RowScores.of([0.5, 3.0, -2.0, 0.0], [1, 1, 1, 0], is_share=False)
    assert worst_rows(rewards).tolist() == [2, 0, 1]
    found = Evaluation({"reward": rewards}, [*labelled(["a"] * 4)], records=[{}] * 4)
    assert found.worst(2) == [2, 0]
    found = Evaluation({"mean_absolute_error": errors}, [*labelled(["a"] * 3)], records=[{}] * 3)
    assert found.worst(2) == [1, 0]
    # A row without entities and without predicted entities is not wrong.
    assert worst_rows(RowScores.of([0, 1, 0], [0, 2, 2])).tolist() == [2, 1]


def test_kinds_of_entities_are_counted_by_span() -> None:
    words = ("Anna", "Lee", "met", "Bo", "in", "Rome")
    truth = ("B-per", "I-per", "O", "B-per", "O", "B-loc")
    given = ["B-per", "I-per", "O", "B-loc", "B-loc", "O"]
    rows = [TaggedWords("f", 1, tokens=words, tags=truth)]
    counts = LabelCounts.of(rows, [{"tags": given}])
    assert counts is not None and counts.unit == "entities"
    found = counts.scores()
    assert list(found) == ["per", "loc"]
    assert (found["per"]["entities"], found["per"]["recall"], found["per"]["precision"]) == (
        2,
        0.5,
        1,
    )
    assert (found["loc"]["recall"], found["loc"]["precision"]) == (0, 0)
    assert sorted(counts.mistakes()) == [
        ("loc", NO_ENTITY, 1), (NO_ENTITY, "loc", 1), ("per", "loc", 1),
    ]  # fmt: skip
