"""Scores of predicted labels, ratings and tags.

Entities are counted as in CoNLL-2003 (Tjong Kim Sang & De Meulder 2003) and seqeval: kind, first
and last word must be correct. An I- tag without a preceding tag starts an entity.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.data.shapes import of_shape
from luthier.data.shapes.base import Labelled
from luthier.data.shapes.questions import AnsweredQuestion
from luthier.data.shapes.texts import RatedText, TaggedWords
from luthier.errors import DataError, Problem
from luthier.evaluation.significance import RowScores, Score, Statistic
from luthier.formatting import one_line
from luthier.graders.similarity import squad_words
from luthier.types import Row

SHOWN = 5
"""Number of labels, or pairs of confused labels, in a remark."""


def scores(rows: Sequence[Row], answers: Sequence[Mapping[str, Any]]) -> dict[str, Score]:
    """Score predictions against the labels of ``rows``. Scores range from 0 to 1, except errors.

    Models are compared by the first score.
    """
    if not rows:
        return {}
    missing = [row for row in rows if not row.annotated]
    if missing:
        fix = "Write rows of text and label, text and rating, or tokens and tags."
        message = "the row has no target."
        raise DataError([Problem("row.no_label", message, fix, row.location) for row in missing])
    if rated := of_shape(RatedText, rows):
        return _ratings([(r.rating, a["rating"]) for r, a in zip(rated, answers, strict=True)])
    if asked := of_shape(AnsweredQuestion, rows):
        return _answers([(row.answers, a["answer"]) for row, a in zip(asked, answers, strict=True)])
    if tagged := of_shape(TaggedWords, rows):
        return _entities([(r.tags or (), a["tags"]) for r, a in zip(tagged, answers, strict=True)])
    return _labels(
        [(frozenset(row.classes()), _set(a["label"])) for row, a in zip(rows, answers, strict=True)]
    )


def row_scores(rows: Sequence[Row], answers: Sequence[Mapping[str, Any]]) -> RowScores:
    """Return the first score of :func:`scores`."""
    found = next(iter(scores(rows, answers).values()))
    assert isinstance(found, RowScores)
    return found


def tag_scores(pairs: Iterable[tuple[Sequence[str], Sequence[str]]]) -> RowScores:
    """Return the entity F1 of pairs of predicted and true tags."""
    each = [(entities(given), entities(wanted)) for given, wanted in pairs]
    right = [len(given & wanted) for given, wanted in each]
    return RowScores.of(right, [(len(given) + len(wanted)) / 2 for given, wanted in each])


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


def _labels(pairs: Sequence[tuple[frozenset[str], frozenset[str]]]) -> dict[str, Score]:
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


def _ratings(pairs: Sequence[tuple[float, float]]) -> dict[str, Score]:
    """Mean absolute error, and Pearson's correlation where both sides vary."""
    truth_R, answer_R = np.array(pairs, dtype=np.float64).T

    def correlation(row_K: NDArray[np.int64]) -> float:
        one_K, other_K = truth_R[row_K], answer_R[row_K]
        if one_K.min() == one_K.max() or other_K.min() == other_K.max():
            return math.nan
        return float(np.corrcoef(one_K, other_K)[0, 1])

    found: dict[str, Score] = {
        "mean_absolute_error": RowScores.of(abs(truth_R - answer_R), is_share=False)
    }
    pearson = Statistic.of(correlation, len(pairs), is_share=False)
    return found if math.isnan(pearson.value) else found | {"pearson": pearson}


def _entities(pairs: Sequence[tuple[Sequence[str], Sequence[str]]]) -> dict[str, Score]:
    """Precision, recall and F1 over all entities, and the share of words with the right tag."""
    each = [(entities(answer), entities(truth)) for truth, answer in pairs]
    right = [len(given & wanted) for given, wanted in each]
    same = [sum(a == b for a, b in zip(truth, answer, strict=True)) for truth, answer in pairs]
    return {
        "entity_f1": tag_scores((answer, truth) for truth, answer in pairs),
        "entity_precision": RowScores.of(right, [len(given) for given, _ in each]),
        "entity_recall": RowScores.of(right, [len(wanted) for _, wanted in each]),
        "word_accuracy": RowScores.of(same, [len(truth) for truth, _ in pairs]),
    }


def _answers(pairs: Sequence[tuple[Sequence[str], str]]) -> dict[str, Score]:
    """Compare each answer with the best correct answer, as SQuAD's evaluation script does.

    Rajpurkar et al. 2016, section 6.1. Without a correct answer, only the empty answer is right.
    """
    words = [
        (squad_words(given), [squad_words(t) for t in truth] or [[]]) for truth, given in pairs
    ]
    return {
        "answer_f1": RowScores.of(
            [max(_word_f1(given, truth) for truth in truths) for given, truths in words]
        ),
        "exact_match": RowScores.of([given in truths for given, truths in words]),
    }


def _word_f1(given: Sequence[str], truth: Sequence[str]) -> float:
    if not given or not truth:
        return float(given == truth)
    common = (Counter(given) & Counter(truth)).total()
    return 2 * common / (len(given) + len(truth))


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Kind, first word and last word of each entity in a row of BIO tags."""
    found = set()
    kind, start = "", 0
    for index, tag in enumerate([*tags, "O"]):
        edge, _, name = tag.partition("-")
        if kind and not (edge == "I" and name == kind):
            found.add((kind, start, index - 1))
            kind = ""
        if edge != "O" and not kind:
            kind, start = name, index
    return found
