"""Rating: a number for each text, in the scale of the data."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
from numpy.typing import NDArray

from luthier.data.shapes.texts import RatedText
from luthier.evaluation.baselines import Answers as Predicted
from luthier.evaluation.baselines import Method, States
from luthier.evaluation.linear import fit_ridge
from luthier.evaluation.significance import RowScores, Score, Statistic
from luthier.models.networks.heads import HeadKind
from luthier.tasks.base import Answer, Task, check_targets
from luthier.tasks.onnx import OnnxOutput
from luthier.types import Example, Row

if TYPE_CHECKING:
    from luthier.models.networks.network import Network


class RatingTask(Task):
    """Ratings of texts."""

    head: ClassVar[HeadKind] = "sequence_classification"
    learns_words: ClassVar[bool] = True

    def scores(self, rows: Sequence[Row], answers: Sequence[Answer]) -> Mapping[str, Score]:
        """Return the mean absolute error, and Pearson's correlation if both sides vary."""
        check_targets(rows)
        rated = zip(cast("Sequence[RatedText]", rows), answers, strict=True)
        truth_R, answer_R = np.array(
            [(row.rating, each["rating"]) for row, each in rated], dtype=np.float64
        ).T

        def correlation(row_K: NDArray[np.int64]) -> float:
            one_K, other_K = truth_R[row_K], answer_R[row_K]
            if one_K.min() == one_K.max() or other_K.min() == other_K.max():
                return math.nan
            return float(np.corrcoef(one_K, other_K)[0, 1])

        found: dict[str, Score] = {
            "mean_absolute_error": RowScores.of(abs(truth_R - answer_R), is_share=False)
        }
        pearson = Statistic.of(correlation, len(rows), is_share=False)
        return found if math.isnan(pearson.value) else found | {"pearson": pearson}

    def is_comparable(self, row: Row, example: Example) -> bool:
        """Return True for rated rows."""
        return isinstance(row, RatedText)

    def baselines(self, train: Sequence[Row], held: Sequence[Row]) -> Iterator[Method]:
        """Yield the median, and a regression on the states of the base model."""
        ratings = [row.rating for row in cast("Sequence[RatedText]", train)]
        # The median has the least absolute error of all constants.
        median = statistics.median(ratings)
        yield Method(
            "always the median rating", lambda _: [{"rating": median}] * len(held), constant=True
        )

        def by_regression(states: States) -> Predicted:
            # The states may be those of the first rows only.
            targets_N = states.train_NH.new_tensor(ratings[: len(states.train_NH)])
            found = fit_ridge(states.train_NH, targets_N).scores(states.held_QH)[:, 0].tolist()
            return [{"rating": rating} for rating in found]

        yield Method("ridge regression on the base model", by_regression, reads_states=True)

    def onnx(self, objective: Any, network: Network) -> OnnxOutput:
        """Return the rating in the scale of the data."""
        return OnnxOutput(
            "rating", ("batch",), "the rating, in the scale of the training data",
            "number", "predictions", "print(answer)",
            {"scale": objective.scale or 1.0, "center": objective.center or 0.0},
            unit=objective.scale,
        )  # fmt: skip

    def show(self, answer: Answer, threshold: float | None, top: int) -> str:
        """Return the rating."""
        return f"{answer['rating']:.3f}"


RATING = RatingTask()
