"""Scores of models that read: how often their labels, ratings and tags are those of the data.

Entities are counted as in CoNLL-2003 (Tjong Kim Sang & De Meulder 2003): right only with the right
kind, first and last word; an I- tag that continues nothing begins an entity. The same numbers as
scikit-learn's and seqeval's, without their 0.5 s of imports.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from luthier.data.shapes import Labelled, RatedText, TaggedWords, of_shape
from luthier.errors import DataError, Problem
from luthier.evaluation.significance import RowScores, confidence_interval
from luthier.types import Row

SHOWN = 5
"""Labels, or pairs of labels that were mistaken, that a remark names."""


def scores(rows: Sequence[Row], answers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Scores of ``answers`` to ``rows`` that hold the truth, each from 0 to 1 but for errors."""
    if not rows:
        return {}
    missing = [row for row in rows if not row.annotated]
    if missing:
        fix = "Give rows of text and label, text and rating, or tokens and tags."
        raise DataError(
            [
                Problem(
                    row.file, row.line, "row.no_label", "there is nothing to compare with.", fix
                )
                for row in missing
            ],
            "nothing was evaluated",
        )
    if rated := of_shape(RatedText, rows):
        return _ratings([(r.rating, a["rating"]) for r, a in zip(rated, answers, strict=True)])
    if tagged := of_shape(TaggedWords, rows):
        return _entities(
            [(row.tags or (), a["tags"]) for row, a in zip(tagged, answers, strict=True)]
        )
    return _labels(
        [(frozenset(row.classes()), _set(a["label"])) for row, a in zip(rows, answers, strict=True)]
    )


def row_scores(rows: Sequence[Row], answers: Sequence[Mapping[str, Any]]) -> RowScores:
    """Row by row, the score that :func:`scores` names first."""
    if rated := of_shape(RatedText, rows):
        errors = [abs(r.rating - a["rating"]) for r, a in zip(rated, answers, strict=True)]
        return RowScores.of(errors, is_share=False)
    if tagged := of_shape(TaggedWords, rows):
        return tag_scores((a["tags"], r.tags or ()) for r, a in zip(tagged, answers, strict=True))
    both = zip(rows, answers, strict=True)
    return RowScores.of([frozenset(row.classes()) == _set(a["label"]) for row, a in both])


def tag_scores(pairs: Iterable[tuple[Sequence[str], Sequence[str]]]) -> RowScores:
    """Entity F1 of rows of tags that were given and wanted."""
    each = [(entities(given), entities(wanted)) for given, wanted in pairs]
    right = [len(given & wanted) for given, wanted in each]
    return RowScores.of(right, [(len(given) + len(wanted)) / 2 for given, wanted in each])


def label_remarks(rows: Sequence[Row], answers: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the scores of single labels do not say: how sure they are, and where the mistakes lie.

    Named are the labels of the rows that the answers have no score for, which no answer can be, and the
    labels that are mistaken for each other most often.
    """
    pairs = [
        (row.label, answer["label"])
        for row, answer in zip(rows, answers, strict=True)
        if isinstance(row, Labelled) and isinstance(row.label, str)
    ]
    if not pairs or len(pairs) < len(rows):
        return []
    right = sum(truth == answer for truth, answer in pairs) / len(pairs)
    low, high = confidence_interval(right, len(pairs))
    remarks = [f"with 95 % confidence the accuracy is between {low:.1%} and {high:.1%}"]
    wanted = Counter(truth for truth, _ in pairs)
    unknown = [name for name in wanted if name not in answers[0].get("scores", wanted)]
    if unknown:
        count = sum(wanted[name] for name in unknown)
        some = ", ".join(unknown[:SHOWN]) + (", …" if len(unknown) > SHOWN else "")
        have = "has a label" if count == 1 else "have labels"
        remarks.append(
            f"{count:,} of the rows {have} that the model was not trained with, which it can only get "
            f"wrong: {some}"
        )
    wrong = Counter(pair for pair in pairs if pair[0] != pair[1] and pair[0] not in unknown)
    if wrong:
        most = [
            f"{answer} for {truth} ({count:,} of {wanted[truth]:,})"
            for (truth, answer), count in wrong.most_common(SHOWN)
        ]
        remarks.append(f"answered wrong most often: {', '.join(most)}")
    return remarks


def _set(label: str | Iterable[str]) -> frozenset[str]:
    return frozenset([label] if isinstance(label, str) else label)


def _labels(pairs: Sequence[tuple[frozenset[str], frozenset[str]]]) -> dict[str, float]:
    """Accuracy (all labels of a row right) and F1, over classes alike and over all labels alike."""
    right, given, wanted = Counter[str](), Counter[str](), Counter[str]()
    for truth, answer in pairs:
        wanted.update(truth)
        given.update(answer)
        right.update(truth & answer)
    classes = wanted.keys() | given.keys()
    each = [_f1(right[name], given[name], wanted[name]) for name in classes]
    return {
        "accuracy": sum(truth == answer for truth, answer in pairs) / len(pairs),
        "macro_f1": statistics.fmean(each) if each else 1.0,
        "micro_f1": _f1(right.total(), given.total(), wanted.total()),
    }


def _ratings(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Mean absolute error, and Pearson's correlation where both sides vary."""
    found = {"mean_absolute_error": statistics.fmean(abs(a - b) for a, b in pairs)}
    truth, answer = zip(*pairs, strict=True)
    if min(truth) < max(truth) and min(answer) < max(answer):
        found["pearson"] = statistics.correlation(truth, answer)
    return found


def _entities(pairs: Sequence[tuple[Sequence[str], Sequence[str]]]) -> dict[str, float]:
    """Precision, recall and F1 over all entities, and the share of words with the right tag."""
    right = given = wanted = same = words = 0
    for truth, answer in pairs:
        expected, found = entities(truth), entities(answer)
        right += len(expected & found)
        given += len(found)
        wanted += len(expected)
        same += sum(a == b for a, b in zip(truth, answer, strict=True))
        words += len(truth)
    return {
        "entity_f1": _f1(right, given, wanted),
        "entity_precision": right / given if given else 0.0,
        "entity_recall": right / wanted if wanted else 0.0,
        "word_accuracy": same / words,
    }


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


def _f1(right: int, given: int, wanted: int) -> float:
    """Harmonic mean of precision and recall; 0 where nothing was wanted and nothing given."""
    return 2 * right / (given + wanted) if given + wanted else 0.0
