"""Scores of models that predict: labels, ratings, tags, rewards, embeddings and transcriptions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from luthier.data.shapes import of_shape
from luthier.data.shapes.base import Labelled
from luthier.data.shapes.media import CaptionedImage
from luthier.data.shapes.preferences import JudgedAnswers
from luthier.data.shapes.texts import History, QueryDocument, TaggedWords, TextPair
from luthier.errors import DataError, Problem
from luthier.evaluation.breakdown import Calibration
from luthier.evaluation.evaluate import Evaluation, check_shapes
from luthier.evaluation.labels import label_remarks, scores
from luthier.evaluation.long_rows import FittingRows, fit_rows
from luthier.evaluation.preferences import ranking_scores
from luthier.evaluation.retrieval import (
    CUT,
    ClassRetrieval,
    Ranking,
    pair_ranks,
    partner_ranks,
    retrieval_scores,
)
from luthier.evaluation.significance import RowScores
from luthier.evaluation.thresholds import threshold_scores
from luthier.evaluation.transcription import transcription_remarks, transcription_scores
from luthier.inference.prediction import Predictor
from luthier.objectives import Contrastive
from luthier.types import LongRows, Row

Predictions = list[dict[str, Any]]


def score_predictions(
    predictor: Predictor,
    rows: Sequence[Row],
    done: Callable[[int], None] = lambda count: None,
    long_rows: LongRows | None = None,
) -> Evaluation:
    """Return the predictions for ``rows`` and their scores.

    Raises:
        DataError: for rows without what the model predicts, and for long rows with ``error``.
    """
    objective = predictor.objective
    check_shapes(rows, objective)
    rows = objective.regroup(rows)
    examples = [
        [
            predictor.encode(side, index)
            for side in (row.sides() if objective.task.two_sided else [row])
        ]
        for index, row in enumerate(rows)
    ]
    chosen = objective.long_rows(long_rows)
    fitting = fit_rows(rows, examples, predictor.context, chosen, objective.truncate)
    count = len(fitting.examples[0]) if fitting.rows else 1
    flat = [text for texts in fitting.examples for text in texts]
    predictions = predictor.read(flat, lambda finished: done(finished // count))
    sides = [predictions[side::count] for side in range(count)]
    if fitting.rows:
        kinds: tuple[tuple[type[Row], str, Callable[..., Evaluation]], ...] = (
            (JudgedAnswers, "reward", _score_rewards),
            (TextPair, "embedding", _score_partners),
            (QueryDocument, "score", _score_relevance),
            (Labelled, "embedding", _score_classes),
            (CaptionedImage, "embedding", _score_captions),
            (CaptionedImage, "text", _score_transcriptions),
        )
        for shape, answer, score in kinds:
            if of_shape(shape, fitting.rows) and answer in sides[0][0]:
                return score(predictor, fitting, *sides)
    return _score_labels(predictor, fitting, *sides)


def _score_rewards(
    predictor: Predictor, fitting: FittingRows, first: Predictions, second: Predictions
) -> Evaluation:
    pairs = [(c["reward"], r["reward"]) for c, r in zip(first, second, strict=True)]
    records = [
        {"line": row.line, "chosen": c, "rejected": r}
        for row, (c, r) in zip(fitting.rows, pairs, strict=True)
    ]
    return fitting.evaluation(ranking_scores(pairs, "reward"), records)


def _score_partners(
    predictor: Predictor, fitting: FittingRows, first: Predictions, second: Predictions
) -> Evaluation:
    """Score retrieval: the rank of each text's partner, or of the next item of a history."""
    rows = cast("Sequence[TextPair]", fitting.rows)
    anchors, partners = (np.array([a["embedding"] for a in side]) for side in (first, second))
    texts = [row.text for row in rows], [row.positive for row in rows]
    # The candidates include hard negatives, and earlier items of histories.
    items = {*chain.from_iterable(row.candidates for row in rows)} - {*texts[1]}
    others = predictor.embed(sorted(items)) if items else partners[:0]
    scores = retrieval_scores(partner_ranks(anchors, partners, texts[1], others))
    objective = predictor.objective

    def cut(row_NH: NDArray[np.float32], size: int) -> NDArray[np.float32]:
        part_NH = row_NH[:, :size]
        shorter: NDArray[np.float32] = part_NH / np.linalg.norm(part_NH, axis=1, keepdims=True)
        return shorter

    for size in objective.dimensions if isinstance(objective, Contrastive) else ():
        query_PH, partner_PH, other_NH = (cut(each, size) for each in (anchors, partners, others))
        ranks = partner_ranks(query_PH, partner_PH, texts[1], other_NH)
        scores[f"ndcg_at_{CUT}_of_{size}"] = retrieval_scores(ranks)[f"ndcg_at_{CUT}"]
    if predictor.threshold is not None:
        scores |= threshold_scores(anchors, partners, *texts, predictor.threshold)
    target = "next item" if isinstance(rows[0], History) else "partner"
    remark = f"each {target} is searched among {len({*texts[1]}) + len(items):,} candidates"
    return fitting.evaluation(scores, first, [remark])


def _score_relevance(predictor: Predictor, fitting: FittingRows, first: Predictions) -> Evaluation:
    """Score the order of each query's documents, for queries with a relevant document.

    Raises:
        DataError: if no query has relevant and other documents.
    """
    rows = cast("Sequence[QueryDocument]", fitting.rows)
    queries = defaultdict[str, list[tuple[float, float]]](list)
    for row, answer in zip(rows, first, strict=True):
        queries[row.text].append((answer["score"], row.label or 0.0))
    ranked = [Ranking.of(*zip(*pairs, strict=True)) for pairs in queries.values()]
    scored = [each for each in ranked if each is not None]
    if not scored:
        message = "no query has a relevant document and another document."
        fix = 'Add "negatives" to the rows: `luthier mine-negatives`.'
        raise DataError([Problem("row.no_label", message, fix, rows[0].location)])
    ranks, gains = ([each.rank for each in scored], [each.ndcg for each in scored])
    remark = f"{len(scored):,} queries with {len(rows) / len(queries):.1f} documents on average"
    return fitting.evaluation(retrieval_scores(ranks, gains), first, [remark])


def _score_classes(predictor: Predictor, fitting: FittingRows, first: Predictions) -> Evaluation:
    """Score how often a row finds rows with the same label.

    Raises:
        DataError: if no two rows have the same label.
    """
    rows = cast("Sequence[Labelled]", fitting.rows)
    retrieval = ClassRetrieval.of([a["embedding"] for a in first], [str(row.label) for row in rows])
    count = len(retrieval.rank_R)
    if not count:
        message = "no two rows have the same label, so no row can find another of its label."
        fix = "Give several rows of the same label."
        problem = Problem("row.no_label", message, fix, rows[0].location)
        raise DataError([problem])
    remark = f"each row searches the {len(rows) - 1:,} other rows for its label"
    if count < len(rows):
        remark += f"; {len(rows) - count:,} rows are alone with their label and do not search"
    return fitting.evaluation(retrieval.scores, first, [remark])


def _score_captions(
    predictor: Predictor, fitting: FittingRows, first: Predictions, second: Predictions
) -> Evaluation:
    """Score how often an image finds its captions, and a caption its images."""
    rows = cast("Sequence[CaptionedImage]", fitting.rows)
    keys = [row.media.digest() for row in rows], [row.caption for row in rows]
    sides = [[answer["embedding"] for answer in side] for side in (first, second)]
    scores = dict[str, RowScores]()
    for name, (query, item) in {"image_to_text": (0, 1), "text_to_image": (1, 0)}.items():
        ranks = pair_ranks(sides[query], sides[item], keys[query], keys[item])
        scores |= {f"{name}_{key}": value for key, value in retrieval_scores(ranks).items()}
    images, texts = (len({*each}) for each in keys)
    remark = f"each of {images:,} images searches {texts:,} texts, and each text the images"
    return fitting.evaluation(scores, first, [remark])


def _score_transcriptions(
    predictor: Predictor, fitting: FittingRows, first: Predictions
) -> Evaluation:
    rows = cast("Sequence[CaptionedImage]", fitting.rows)
    pairs = [(a["text"], row.caption) for a, row in zip(first, rows, strict=True)]
    return fitting.evaluation(
        transcription_scores(pairs), first, transcription_remarks(rows, first)
    )


def _score_labels(predictor: Predictor, fitting: FittingRows, first: Predictions) -> Evaluation:
    rows = fitting.rows
    for row, answer in zip(rows, first, strict=True):
        if isinstance(row, TaggedWords):
            # Words after the cut were not encoded and have no entity.
            answer["tags"] += ["O"] * (len(row.tokens) - len(answer["tags"]))
    found = scores(rows, first)
    if calibration := Calibration.of(rows, first):
        found["expected_calibration_error"] = calibration.score()
    return fitting.evaluation(found, first, label_remarks(rows, first))
