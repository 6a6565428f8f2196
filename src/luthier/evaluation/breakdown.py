"""Breakdown of a score: slices of the rows, confusion matrix, calibration and worst rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from luthier.data.shapes import of_shape
from luthier.data.shapes.texts import Entities, TaggedWords, entities
from luthier.evaluation.labels import single_labels
from luthier.evaluation.significance import (
    Interval,
    RowScores,
    Score,
    Statistic,
    share_interval,
    values,
)
from luthier.types import Row

MOST_SLICES = 30
"""Maximum number of slices of a kind. The smallest slices are merged."""
CONFIDENCE_BINS = 15
"""Number of bins of equal width, as in Guo et al. 2017."""
OTHERS = "all others"
NO_ENTITY = "no entity"
"""Kind of a span that is no entity of the row, or that the model did not find."""


@dataclass(frozen=True)
class Slice:
    """Some of the rows, and how they score."""

    by: str
    """Property that the rows share: ``label``, ``length``, ``language`` or a column."""
    value: str
    rows: int
    scores: dict[str, float]
    interval: Interval
    """Confidence interval of the first score."""
    stands_out: bool
    """True if the first score differs from the remaining rows beyond chance, with Bonferroni's
    correction for the number of slices."""

    def plain(self) -> dict[str, Any]:
        """Return the slice for JSON."""
        return {
            "by": self.by, "value": self.value, "rows": self.rows, "scores": self.scores,
            "interval": list(self.interval), "stands_out": self.stands_out,
        }  # fmt: skip


def slice_scores(scores: Mapping[str, Score], by: str, keys: Sequence[str]) -> list[Slice]:
    """Score the rows of each key, largest slice first.

    Args:
        scores: scores of the same rows; the first score decides :attr:`Slice.stands_out`.
        by: name of the property.
        keys: value of the property for each row.
    """
    counts = Counter(keys)
    largest = [name for name, _ in counts.most_common(MOST_SLICES)]
    if len(counts) > MOST_SLICES:
        largest = [*largest[:-1], OTHERS]
    names = np.array([key if key in {*largest} else OTHERS for key in keys], dtype=object)
    first = next(iter(scores.values()))
    # Of two sides, as each slice may be better or worse than the rest.
    border = NormalDist().inv_cdf(1 - 0.025 / max(1, len(largest)))
    found = []
    for name in largest:
        own, rest = (
            (each, first.subset(each))
            for each in (np.flatnonzero(names == name), np.flatnonzero(names != name))
        )
        apart = abs(own[1].value - rest[1].value)
        stands_out = bool(
            min(len(own[0]), len(rest[0])) > 1
            and all(_is_known(each) for _, each in (own, rest))
            and apart > border * np.hypot(own[1].error, rest[1].error)
        )
        own_scores = {each: score.subset(own[0]) for each, score in scores.items()}
        found.append(Slice(by, name, len(own[0]), values(own_scores), own[1].interval, stands_out))
    return found


def _is_known(score: Score) -> bool:
    """Return True if the score has at least one row with a denominator."""
    return bool(score.wholes_R.any()) if isinstance(score, RowScores) else True


def length_keys(lengths: ArrayLike) -> list[str]:
    """Return the third of each row by length: shortest, middle or longest."""
    length_R = np.asarray(lengths)
    low, high = np.quantile(length_R, [1 / 3, 2 / 3], method="lower")
    names = [f"at most {low:,}", f"{low + 1:,} to {high:,}", f"above {high:,}"]
    part_R = (length_R > low).astype(int) + (length_R > high)
    return [names[part] for part in part_R]


@dataclass(frozen=True)
class LabelCounts:
    """Confusion matrix of single labels, or of the kinds of entities."""

    labels: list[str]
    """Labels of rows and predictions, most frequent label of the rows first."""
    count_TA: NDArray[np.int64]
    """Number of rows, or entities, by true label and predicted label."""
    unit: str = "rows"
    """``rows`` or ``entities``."""

    @staticmethod
    def of(rows: Sequence[Row], answers: Sequence[Mapping[str, Any]]) -> LabelCounts | None:
        """Count rows with one label each, or entities; ``None`` for all other rows."""
        tagged = of_shape(TaggedWords, rows)
        pairs = (
            [(label, answer["label"]) for label, answer in single_labels(rows, answers)]
            if tagged is None
            else [
                pair
                for row, answer in zip(tagged, answers, strict=True)
                for pair in _entity_pairs(entities(row.tags or ()), entities(answer["tags"]))
            ]
        )
        if not pairs:
            return None
        wanted = Counter(truth for truth, _ in pairs)
        further = {answer for _, answer in pairs} - wanted.keys()
        labels = [*(name for name, _ in wanted.most_common()), *sorted(further)]
        place = {label: index for index, label in enumerate(labels)}
        count_TA = np.zeros((len(labels), len(labels)), np.int64)
        for truth, answer in pairs:
            count_TA[place[truth], place[answer]] += 1
        return LabelCounts(labels, count_TA, "rows" if tagged is None else "entities")

    def scores(self) -> dict[str, dict[str, Any]]:
        """Return rows, precision, recall and F1 of each label, with 95 % intervals; no precision for
        labels never predicted."""
        wanted_L, given_L = self.count_TA.sum(1), self.count_TA.sum(0)
        right_L = self.count_TA.diagonal()
        found = {}
        for place, name in enumerate(self.labels):
            if name == NO_ENTITY:
                continue
            right, given, wanted = (int(each[place]) for each in (right_L, given_L, wanted_L))
            scores: dict[str, Any] = {self.unit: wanted, "f1": 2 * right / (given + wanted)}
            for measure, whole in (("recall", wanted), ("precision", given)):
                if whole:
                    interval = share_interval(right, whole)
                    scores |= {measure: right / whole, f"{measure}_interval": interval}
            found[name] = scores
        return found

    def mistakes(self) -> list[tuple[str, str, int]]:
        """Return the true label, the predicted label and the count of each confusion, most frequent
        first."""
        found = [
            (self.labels[truth], self.labels[answer], int(self.count_TA[truth, answer]))
            for truth, answer in np.argwhere(self.count_TA)
            if truth != answer
        ]
        return sorted(found, key=lambda each: -each[2])


def _entity_pairs(wanted: Entities, given: Entities) -> Iterator[tuple[str, str]]:
    """Yield the true and the predicted kind of each span, :data:`NO_ENTITY` for none."""
    truths, answers = ({each[1:]: each[0] for each in side} for side in (wanted, given))
    for span in sorted(truths.keys() | answers.keys()):
        yield truths.get(span, NO_ENTITY), answers.get(span, NO_ENTITY)


@dataclass(frozen=True, eq=False)
class Calibration:
    """Accuracy as a function of the model's confidence (Guo et al. 2017)."""

    confidence_R: NDArray[np.float64]
    """Probability of the predicted label."""
    right_R: NDArray[np.bool_]

    @staticmethod
    def of(rows: Sequence[Row], answers: Sequence[Mapping[str, Any]]) -> Calibration | None:
        """Calibrate rows with one label each; ``None`` if the answers have no probabilities."""
        pairs = single_labels(rows, answers)
        both = [
            (float(answer["scores"][answer["label"]]), label == answer["label"])
            for label, answer in pairs
            if answer["label"] in answer.get("scores", ())
        ]
        if not both or len(both) < len(pairs):
            return None
        confidences, right = zip(*both, strict=True)
        return Calibration(np.array(confidences), np.array(right))

    def bins(self) -> list[dict[str, float]]:
        """Return rows, mean confidence and accuracy of each non-empty bin, lowest confidence first."""
        bin_R = np.minimum((self.confidence_R * CONFIDENCE_BINS).astype(int), CONFIDENCE_BINS - 1)
        return [
            {
                "rows": int(np.count_nonzero(own_R)),
                "confidence": float(self.confidence_R[own_R].mean()),
                "accuracy": float(self.right_R[own_R].mean()),
            }
            for own_R in (bin_R == place for place in np.unique(bin_R))
        ]

    @property
    def error(self) -> float:
        """The expected calibration error: how far both are apart, averaged over the rows."""
        gaps = (each["rows"] * abs(each["confidence"] - each["accuracy"]) for each in self.bins())
        return sum(gaps) / len(self.right_R)

    def score(self) -> Statistic:
        """The error as a score of the rows."""
        return Statistic.of(
            lambda row_K: Calibration(self.confidence_R[row_K], self.right_R[row_K]).error,
            len(self.right_R),
        )


def worst_rows(
    score: RowScores, certainty_R: ArrayLike | None = None, less_is_better: bool = False
) -> NDArray[np.int64]:
    """Return the indices of the rows with the lowest score, or with the highest error.

    Rows with equal scores are ordered by ``certainty_R``, confident mistakes first, and then by
    index. Correct rows and rows without a score are excluded.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        each_R = score.parts_R / score.wholes_R
    cost_R = each_R if less_is_better else -each_R
    least = 0.0 if less_is_better else -1.0 if score.is_share else -np.inf
    certain_R = np.zeros(len(cost_R)) if certainty_R is None else np.asarray(certainty_R)
    order_R = np.lexsort((-certain_R, -cost_R))
    return order_R[cost_R[order_R] > least]
