"""Scores of models that predict: labels, ratings, tags, rewards, embeddings and transcriptions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from luthier.evaluation.evaluate import Evaluation, check_shapes
from luthier.evaluation.long_rows import fit_rows
from luthier.inference.prediction import Predictor
from luthier.types import LongRows, Row


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
    rows = objective.regroup_scored(rows)
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
    return objective.task.evaluate(predictor, fitting, sides)
