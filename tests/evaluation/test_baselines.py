"""Simple baselines, on rows whose right answers are plain to see."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from luthier.evaluation.baselines import (
    Baseline,
    Comparison,
    States,
    compare,
    is_comparable,
    naive_bayes,
)
from luthier.types import Example, Row

ALWAYS = math.inf


def row(**fields: object) -> Row:
    return Row("rows.jsonl", 1, **fields)  # type: ignore[arg-type]


def labelled(count: int) -> list[Row]:
    """Fish swim, birds fly; two of three rows are of fish."""
    texts = ("a fish may swim", "the fish can swim far", "one bird may fly")
    return [
        row(text=f"{texts[i % 3]} {i}", label=("fish", "fish", "bird")[i % 3]) for i in range(count)
    ]


def states_of(train: list[Row], held: list[Row], read: int | None = None) -> States:
    """The label is the direction, beside some noise."""
    generator = torch.Generator().manual_seed(0)

    def made(rows: list[Row]) -> torch.Tensor:
        way_N = torch.tensor([1.0 if r.label == "fish" else -1.0 for r in rows])
        noise_NH = 0.1 * torch.randn(len(rows), 4, generator=generator)
        return noise_NH + way_N[:, None] * torch.tensor([1.0, 0, 0, 0])

    return States(made(train)[:read], made(held), 2.0)


def scores(found: Comparison | None) -> dict[str, float]:
    assert found is not None
    return {each.name: each.score for each in found.baselines}


def test_rows_with_one_label_have_five_baselines() -> None:
    train, held = labelled(60), labelled(30)
    found = compare(train, held, states_of(train, held), ALWAYS)
    assert scores(found) == {
        "always the most frequent label": pytest.approx(2 / 3),
        "naive Bayes on words": 1.0,
        "5 nearest rows of the base model": 1.0,
        "class centroids of the base model": 1.0,
        "logistic regression on the base model": 1.0,
    }
    assert found is not None
    assert (found.measure, found.rows, found.train_rows) == ("accuracy", 30, 60)
    # Whatever reads states also pays for them.
    assert [each.seconds >= 2 for each in found.baselines] == [False, False, True, True, True]
    assert [each.constant for each in found.baselines] == [True, False, False, False, False]


def test_without_states_only_words_are_read() -> None:
    found = compare(labelled(60), labelled(30), None, ALWAYS)
    assert list(scores(found)) == ["always the most frequent label", "naive Bayes on words"]


def test_states_of_a_part_of_the_rows_are_said_to_be_so() -> None:
    train, held = labelled(60), labelled(30)
    found = scores(compare(train, held, states_of(train, held, read=40), ALWAYS))
    assert found["logistic regression on the base model (40 of 60 rows)"] == 1.0


def test_what_there_is_no_time_for_is_named() -> None:
    train, held = labelled(60), labelled(30)
    times = iter([0.0, 0.0, 9.0, 9.0, 9.0])
    found = compare(train, held, states_of(train, held), 5.0, clock=lambda: next(times))
    assert list(scores(found)) == ["always the most frequent label", "naive Bayes on words"]
    assert found is not None
    assert len(found.left_out) == 3
    assert compare(train, held, None, 0.0, clock=lambda: 1.0) is None


def test_rows_with_several_labels() -> None:
    several = {"fish": ("wet", "animal"), "bird": ("animal",)}
    train, held = (
        [row(text=r.text, label=several[str(r.label)]) for r in labelled(n)] for n in (60, 30)
    )
    found = scores(compare(train, held, states_of(labelled(60), labelled(30)), ALWAYS))
    assert found["always the most frequent labels"] == pytest.approx(2 / 3)
    assert found["logistic regression on the base model"] == 1.0


def test_ratings_are_compared_by_their_error() -> None:
    train, held = (
        [row(text=r.text, rating=4.0 if r.label == "fish" else 1.0) for r in labelled(n)]
        for n in (60, 30)
    )
    found = compare(train, held, states_of(labelled(60), labelled(30)), ALWAYS)
    assert found is not None
    assert found.measure == "mean_absolute_error"
    assert scores(found)["always the median rating"] == pytest.approx(1.0)
    assert scores(found)["ridge regression on the base model"] < 0.3
    assert found.best is not None
    assert found.best.name == "ridge regression on the base model"


def test_words_have_the_tag_they_mostly_have() -> None:
    train = [row(tokens=("Rita", "sings"), tags=("B-person", "O"))] * 3
    train += [row(tokens=("Rita", "Street"), tags=("B-place", "I-place"))]
    held = [row(tokens=("Rita", "runs"), tags=("B-person", "O"))]
    found = compare(train, held, None, ALWAYS)
    assert found is not None
    assert found.measure == "entity_f1"
    assert scores(found) == {"the most frequent tag of each word": 1.0}


def test_rows_of_other_shapes_have_none() -> None:
    assert compare([row(text="a")], [row(text="b")], None, ALWAYS) is None
    assert compare([], labelled(3), None, ALWAYS) is None


def test_naive_bayes_weighs_words_by_class_and_falls_back_to_the_frequent_one() -> None:
    texts, classes = ["cold rain", "cold snow", "warm sun"], [0, 0, 1]
    assert naive_bayes(texts, classes, 2, ["Cold!", "a warm sun", "unheard"]) == [0, 1, 0]


def test_a_row_that_was_cut_is_not_compared() -> None:
    words, tags = ("a", "b", "c"), ("O", "O", "O")
    whole, cut = (Example(np.arange(n), np.ones(n, np.float32), 0) for n in (3, 2))
    assert is_comparable(row(tokens=words, tags=tags), whole)
    assert not is_comparable(row(tokens=words, tags=tags), cut)
    assert not is_comparable(row(text="no label"), whole)


@pytest.mark.parametrize(
    ("measure", "tuned", "said"),
    [
        ("accuracy", 0.9, ""),
        ("accuracy", 0.8, "does as well"),
        ("accuracy", 0.7, "does better"),
        ("mean_absolute_error", 0.9, "does better"),
        ("mean_absolute_error", 0.7, ""),
    ],
)
def test_a_baseline_that_wins_is_said_to(measure: str, tuned: float, said: str) -> None:
    made = [Baseline("bad", 0.1 if measure == "accuracy" else 2.0, {}, 0.1)]
    made.append(Baseline("naive Bayes", 0.8, {}, 0.1))
    verdict = Comparison(measure, 30, 60, made, tuned).verdict
    assert (said in verdict) if said else not verdict
    assert not said or verdict.startswith("naive Bayes")
    assert ("too few to tell" in verdict) is ((measure, tuned) == ("accuracy", 0.7))
    many = Comparison(measure, 3000, 60, made, tuned)
    assert "too few" not in many.verdict
    assert not Comparison(measure, 30, 60, made).verdict
