"""Scores of predicted labels."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.data.shapes.base import Labelled
from luthier.evaluation.significance import RowScores, Score, Statistic
from luthier.formatting import one_line
from luthier.types import Row

SHOWN = 5
"""Number of labels, or pairs of confused labels, in a remark."""


def single_labels(
    rows: Sequence[Row], answers: Sequence[Mapping[str, Any]]
) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the label and the prediction of each row; empty unless all rows have exactly one
    label."""
    pairs = [
        (row.labels[0], answer)
        for row, answer in zip(rows, answers, strict=True)
        if isinstance(row, Labelled) and row.has_one_label and isinstance(answer.get("label"), str)
    ]
    return pairs if len(pairs) == len(rows) else []


def certainty(answer: Mapping[str, Any]) -> float:
    """Return the margin between the two most likely labels; with several labels, the smallest
    distance of a probability from 0.5.

    Rows with the least margin teach a classifier most (margin sampling, Scheffer et al. 2001,
    doi:10.1007/3-540-44816-0_31).
    """
    probabilities: list[float] = sorted(answer["scores"].values())
    if not isinstance(answer["label"], str):
        return min(abs(each - 0.5) for each in probabilities)
    return probabilities[-1] - probabilities[-2]


def label_remarks(rows: Sequence[Row], answers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return remarks about single labels: uncertainty and frequent mistakes.

    The remarks name the labels of the rows that the model cannot predict, and the labels that the
    model confuses most often.
    """
    pairs = [(label, answer["label"]) for label, answer in single_labels(rows, answers)]
    if not pairs:
        return []
    remarks = []
    wanted = Counter(truth for truth, _ in pairs)
    unknown = [name for name in wanted if name not in answers[0].get("scores", wanted)]
    if unknown:
        count = sum(wanted[name] for name in unknown)
        some = ", ".join(map(one_line, unknown[:SHOWN])) + (", …" if len(unknown) > SHOWN else "")
        have = "has a label" if count == 1 else "have labels"
        remarks.append(f"{count:,} of the rows {have} outside the training labels: {some}")
    wrong = Counter(pair for pair in pairs if pair[0] != pair[1] and pair[0] not in unknown)
    if wrong:
        most = [
            f"{one_line(answer)} instead of {one_line(truth)} ({count:,} of {wanted[truth]:,})"
            for (truth, answer), count in wrong.most_common(SHOWN)
        ]
        remarks.append(f"most frequent errors: {', '.join(most)}")
    return remarks


def _set(label: str | Iterable[str]) -> frozenset[str]:
    return frozenset([label] if isinstance(label, str) else label)


def label_scores(rows: Sequence[Row], answers: Sequence[Mapping[str, Any]]) -> dict[str, Score]:
    """Return the scores of one label, or several labels, per row."""
    pairs = zip(rows, answers, strict=True)
    return _label_scores(
        [(frozenset(row.classes()), _set(answer["label"])) for row, answer in pairs]
    )


def _label_scores(pairs: Sequence[tuple[frozenset[str], frozenset[str]]]) -> dict[str, Score]:
    """Accuracy (all labels of a row right) and F1, over classes alike and over all labels alike."""
    sizes = [(len(truth & answer), (len(truth) + len(answer)) / 2) for truth, answer in pairs]
    right, mean_size = zip(*sizes, strict=True)
    found: dict[str, Score] = {
        "accuracy": RowScores.of([truth == answer for truth, answer in pairs]),
        "macro_f1": _macro_f1(pairs),
        "micro_f1": RowScores.of(right, mean_size),
    }
    if not sum(mean_size):  # no row has a class, and no answer gives one
        del found["macro_f1"], found["micro_f1"]
    return found


def _macro_f1(pairs: Sequence[tuple[frozenset[str], frozenset[str]]]) -> Statistic:
    """Return the mean F1 over all classes of rows and predictions."""
    from sklearn.metrics import f1_score
    from sklearn.preprocessing import MultiLabelBinarizer

    names = sorted({name for truth, answer in pairs for name in truth | answer})
    # scikit-learn accepts no sparse single column; a class without rows does not count.
    binarizer = MultiLabelBinarizer(classes=[*names, None], sparse_output=True)
    truth_RC, answer_RC = (binarizer.fit_transform(sets) for sets in zip(*pairs, strict=True))

    def measure(row_K: NDArray[np.int64]) -> float:
        given = truth_RC[row_K], answer_RC[row_K]
        return float(f1_score(*given, average="macro", zero_division=math.nan))

    return Statistic.of(measure, len(pairs))
