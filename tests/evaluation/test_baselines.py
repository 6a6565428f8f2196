"""Baselines on rows with obvious answers."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from written_rows import row_of

from luthier.evaluation.baselines import (
    LINEAR_PROBE,
    SVM,
    TFIDF,
    Baseline,
    Comparison,
    FittedBaselines,
    States,
    fit_and_score,
    naive_bayes,
    svm_classes,
)
from luthier.evaluation.significance import RowScores
from luthier.objectives.by_shape import task_of
from luthier.tasks import CLASSIFICATION, GENERATION, TAGGING
from luthier.types import Example, Row

ALWAYS = math.inf


def row(**fields: object) -> Row:
    return row_of("rows.jsonl", 1, **fields)


def labelled(count: int) -> list[Row]:
    """Fish swim, birds fly; two of three rows are of fish."""
    texts = ("a fish may swim", "the fish can swim far", "one bird may fly")
    return [
        row(text=f"{texts[i % 3]} {i}", label=("fish", "fish", "bird")[i % 3]) for i in range(count)
    ]


def states_of(train: list[Row], held: list[Row], read: int | None = None) -> States:
    """Return states with the label as the direction, and some noise."""
    generator = torch.Generator().manual_seed(0)

    def made(rows: list[Row]) -> torch.Tensor:
        way_N = torch.tensor([1.0 if r.label == "fish" else -1.0 for r in rows])
        noise_NH = 0.1 * torch.randn(len(rows), 4, generator=generator)
        return noise_NH + way_N[:, None] * torch.tensor([1.0, 0, 0, 0])

    return States(made(train)[:read], made(held), read or len(train), 2.0)


def compared(train: list[Row], held: list[Row], states: States | None) -> Comparison:
    found = fit_and_score(task_of(held[0]), train, held, states, ALWAYS)
    assert found is not None
    return found.comparison


def scores(found: Comparison) -> dict[str, float]:
    return {each.name: each.score for each in found.baselines}


def test_baselines_of_rows_with_one_label() -> None:
    train, held = labelled(60), labelled(30)
    found = compared(train, held, states_of(train, held))
    assert scores(found) == {
        "always the most frequent label": pytest.approx(2 / 3),
        "naive Bayes on words": 1.0,
        "5 nearest rows of the base model": 1.0,
        "class centroids of the base model": 1.0,
        "logistic regression on the base model": 1.0,
        TFIDF: 1.0,
        SVM: 1.0,
    }
    assert (found.measure, found.rows, found.train_rows) == ("accuracy", 30, 60)
    # Baselines on states include the time to compute the states.
    assert all(each.seconds >= 2 for each in found.baselines if "base model" in each.name)
    assert [each.constant for each in found.baselines] == [1, 0, 0, 0, 0, 0, 0]


def test_support_vector_machine_on_words() -> None:
    texts = ["a cold sea", "the sea", "a warm stove", "the stove", "the old stove", "a stove"]
    class_N = np.array([0, 0, 1, 1, 1, 1])
    assert svm_classes(texts, class_N, ["my sea", "my stove"]).tolist() == [0, 1]


def test_baselines_without_states_are_left_out() -> None:
    found = compared(labelled(60), labelled(30), None)
    names = ["always the most frequent label", "naive Bayes on words", TFIDF, SVM]
    assert list(scores(found)) == names
    assert [name.split(" ")[0] for name in found.left_out] == ["5", "class", "logistic"]


def test_baseline_name_has_number_of_encoded_rows() -> None:
    train, held = labelled(60), labelled(30)
    found = scores(compared(train, held, states_of(train, held, read=40)))
    assert found["logistic regression on the base model (40 of 60 rows)"] == 1.0


def test_baselines_beyond_time_limit_are_left_out() -> None:
    train, held = labelled(60), labelled(30)
    times = iter([0.0, 0.0, *[9.0] * 5])
    fitted = fit_and_score(
        CLASSIFICATION, train, held, states_of(train, held), 5.0, clock=lambda: next(times)
    )
    assert fitted is not None
    found = fitted.comparison
    assert list(scores(found)) == ["always the most frequent label", "naive Bayes on words"]
    assert len(found.left_out) == 5
    assert fit_and_score(CLASSIFICATION, train, held, None, 0.0, clock=lambda: 1.0) is None


def test_rows_with_several_labels() -> None:
    several = {"fish": ("wet", "animal"), "bird": ("animal",)}
    train, held = (
        [row(text=r.text, label=several[str(r.label)]) for r in labelled(n)] for n in (60, 30)
    )
    found = scores(compared(train, held, states_of(labelled(60), labelled(30))))
    assert found["always the most frequent labels"] == pytest.approx(2 / 3)
    assert found["5 nearest rows of the base model"] == 1.0
    assert found["logistic regression on the base model"] == 1.0


@pytest.mark.parametrize("labels", [("fish",), ()])
def test_multi_label_rows_with_at_most_a_single_label(labels: tuple[str, ...]) -> None:
    train, held = (
        [row(text=r.text, label=labels if r.label == "fish" else ()) for r in labelled(n)]
        for n in (60, 30)
    )
    found = scores(compared(train, held, states_of(labelled(60), labelled(30))))
    assert found.pop("always the most frequent labels") == pytest.approx(2 / 3 if labels else 1)
    assert [*found.values()] == ([1.0, 1.0] if labels else [])


def test_texts_without_words_have_no_naive_bayes() -> None:
    train, held = ([replace(r, text="?") for r in labelled(n)] for n in (60, 30))
    found = scores(compared(train, held, states_of(labelled(60), labelled(30), read=1)))
    assert len(found) == 4


def test_ratings_are_compared_by_their_error() -> None:
    train, held = (
        [row(text=r.text, rating=4.0 if r.label == "fish" else 1.0) for r in labelled(n)]
        for n in (60, 30)
    )
    found = compared(train, held, states_of(labelled(60), labelled(30)))
    assert found.measure == "mean_absolute_error"
    assert scores(found)["always the median rating"] == pytest.approx(1.0)
    assert scores(found)["ridge regression on the base model"] < 0.3
    assert found.best is not None
    assert found.best.name == "ridge regression on the base model"


def test_words_have_the_tag_they_mostly_have() -> None:
    train = [row(tokens=("Rita", "sings"), tags=("B-person", "O"))] * 3
    train += [row(tokens=("Rita", "Street"), tags=("B-place", "I-place"))]
    held = [row(tokens=("Rita", "runs"), tags=("B-person", "O"))]
    found = compared(train, held, None)
    assert found.measure == "entity_f1"
    assert scores(found) == {"the most frequent tag of each word": 1.0}


def test_tagging_baselines_classify_word_states() -> None:
    train = [row(tokens=("Rita", "sings"), tags=("B-person", "O"))] * 4
    held = [row(tokens=("Ann", "runs"), tags=("B-person", "O")), row(tokens=("so",), tags=("O",))]
    ways = torch.tensor([[2.0, 0], [0, 2.0]])
    states = States(ways.repeat(3, 1), ways[[0, 1, 1]], 3)
    found = compared(train, held, states)
    assert scores(found) == {
        "the most frequent tag of each word": 0.0,
        "logistic regression on the base model (3 of 4 rows)": 1.0,
    }


def test_unsupported_rows_have_no_baselines() -> None:
    assert fit_and_score(GENERATION, [row(text="a")], [row(text="b")], None, ALWAYS) is None
    assert fit_and_score(CLASSIFICATION, [], labelled(3), None, ALWAYS) is None


def test_naive_bayes_falls_back_to_most_frequent_class() -> None:
    texts, classes = ["cold rain", "cold snow", "warm sun"], [0, 0, 1]
    assert naive_bayes(texts, classes, ["Cold!", "a warm sun", "unheard"]).tolist() == [0, 1, 0]


def test_truncated_row_is_not_comparable() -> None:
    words, tags = ("a", "b", "c"), ("O", "O", "O")
    whole, cut = (Example(np.arange(n), np.ones(n, np.float32), 0) for n in (3, 2))
    assert TAGGING.is_comparable(row(tokens=words, tags=tags), whole)
    assert not TAGGING.is_comparable(row(tokens=words, tags=tags), cut)
    assert not CLASSIFICATION.is_comparable(row(text="no label"), whole)


@pytest.mark.parametrize(
    ("measure", "tuned", "error", "said"),
    [
        ("accuracy", 0.9, 0.01, ""),
        ("accuracy", 0.9, 0.06, "may be as good"),
        ("accuracy", 0.8, 0.01, "is as good"),
        ("accuracy", 0.7, 0.06, "was better here"),
        ("accuracy", 0.7, 0.01, "is better"),
        ("mean_absolute_error", 0.9, 0.01, "is better"),
        ("mean_absolute_error", 0.7, 0.01, ""),
    ],
)
def test_verdict_reports_better_or_equal_baseline(
    measure: str, tuned: float, error: float, said: str
) -> None:
    made = [Baseline("bad", 0.1 if measure == "accuracy" else 2.0, {}, 0.1)]
    made.append(Baseline("naive Bayes", 0.8, {}, 0.1, error=error))
    verdict = Comparison(measure, 30, 60, made, tuned).judge()
    assert verdict.startswith(f"a simple baseline {said}: naive Bayes ") if said else not verdict
    assert (";" in verdict) is (said in ("may be as good", "was better here"))
    assert not Comparison(measure, 30, 60, made).judge()


@pytest.mark.parametrize("tuned", [0.5, 0.8, 1.0])
def test_few_rows_do_not_rank_baselines(tuned: float) -> None:
    found = Comparison("accuracy", 6, 54, [Baseline("naive Bayes", 0.8, {}, 0.1)], tuned)
    assert not found.loses
    assert found.judge().startswith("6 held-out rows are too few to rank")
    assert "naive" not in FittedBaselines(found, []).describe()


def test_tuned_model_is_compared_with_baselines_by_row() -> None:
    train, held = labelled(60), labelled(30)
    fitted = fit_and_score(CLASSIFICATION, train, held, states_of(train, held), ALWAYS)
    assert fitted is not None
    right = RowScores.of([each.label == "fish" for each in held])
    found = fitted.compare_with(right)
    assert found.tuned == pytest.approx(2 / 3)
    frequent, words = found.baselines[:2]
    # The constant baseline is right on the same rows, naive Bayes on ten more.
    assert frequent.error == pytest.approx((2 / 32 / 32) ** 0.5)
    assert words.error == pytest.approx(right.difference_error(RowScores.of([1] * 30)))
    assert found.verdict == found.judge()


def test_informative_baseline_beats_constant_baselines() -> None:
    constant = Baseline("always the most frequent label", 0.2, {}, 0.0, constant=True)
    answers = RowScores.of([1] * 6 + [0] * 24)

    def informed(right: int) -> Baseline | None:
        words = Baseline("naive Bayes", right / 30, {}, 0.0)
        made = Comparison("accuracy", 30, 270, [constant, words])
        scores = RowScores.of([0] * (30 - right) + [1] * right)
        return FittedBaselines(made, [answers, scores]).best_informative

    assert informed(8) is None
    best = informed(23)
    assert best is not None and best.name == "naive Bayes"
    ratings = [replace(constant, score=2.0), Baseline("ridge", 0.5, {}, 0.0)]
    errors = [RowScores.of([2.0] * 30, is_share=False), RowScores.of([0.5] * 30, is_share=False)]
    rated = FittedBaselines(Comparison("mean_absolute_error", 30, 270, ratings), errors)
    assert rated.best_informative == ratings[1]


def test_held_out_rows_with_equal_label_are_uninformative() -> None:
    made = [Baseline("always the most frequent label", 1.0, {}, 0.0, constant=True)]
    found = Comparison("accuracy", 40, 400, made, 1.0)
    assert found.judge().startswith("all 40 held-out rows have the same label")
    assert found.uninformative


@pytest.mark.parametrize(
    ("tuned", "rows", "uninformative"),
    [(0.5, 200, True), (0.9, 200, False), (0.62, 20, False), (0.55, 20, True)],
)
def test_model_no_better_than_constant_is_uninformative(
    tuned: float, rows: int, uninformative: bool
) -> None:
    made = [Baseline("always the most frequent label", 0.6, {}, 0.0, constant=True, error=0.05)]
    made.append(Baseline("naive Bayes", 0.1, {}, 0.0, error=0.05))
    assert Comparison("accuracy", rows, 400, made, tuned).uninformative is uninformative


def test_better_baseline_has_options_that_keep_it() -> None:
    words = Baseline(TFIDF, 0.9, {}, 0.1, error=0.02)
    probe = Baseline(LINEAR_PROBE, 0.8, {}, 0.1, error=0.02)
    found = Comparison("accuracy", 100, 500, [words, probe], 0.7)
    assert found.kept_by == "--base tfidf"
    assert "feature_extraction" in replace(found, baselines=[probe]).kept_by
    assert not replace(found, tuned=0.88).kept_by
