"""Regression: a number for each text, such as a rating or a similarity (Devlin et al. 2019, STS-B).

One output of the sequence classification head with squared error. Ratings are standardized to mean
0 and standard deviation 1 for training. The model stores both statistics, and predictions use the
original scale. (transformers returns the standardized number.)
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np

from luthier.data.shapes.texts import RatedText
from luthier.errors import RowRefused
from luthier.models.networks.heads import Head
from luthier.objectives.base import Objective
from luthier.tasks import RATING, Task
from luthier.types import Example, Loss, Row

if TYPE_CHECKING:
    from luthier.data.conversations.chat import ChatFormat
    from luthier.models.networks.network import Network, TreeBatch


class Regression(Objective):
    """Regression of a number for each text.

    Use ``classification`` for numbers without order, such as codes.
    """

    method: Literal["regression"] = "regression"
    center: float | None = None
    """Mean rating; default: from the training rows."""
    scale: float | None = None
    """Standard deviation of the ratings; default: from the training rows."""

    task: ClassVar[Task] = RATING
    truncates_long_rows: ClassVar[bool] = True
    evaluation_shapes: ClassVar[frozenset[str]] = frozenset({"rating"})
    can_shard: ClassVar[bool] = True
    shapes: ClassVar[frozenset[str]] = frozenset({"rating"})
    allows_augmentation: ClassVar[bool] = True

    def head(self) -> Head:
        """Return a head with one output."""
        return Head(self.task.head, ("rating",), "regression")

    def fit(self, rows: Sequence[Row], chat: ChatFormat) -> Self:
        """Compute mean and standard deviation of the ratings."""
        ratings = [row.rating for row in rows if isinstance(row, RatedText)]
        center = statistics.fmean(ratings) if self.center is None else self.center
        scale = statistics.pstdev(ratings) if self.scale is None else self.scale
        if not (scale > 0 and math.isfinite(scale)):
            raise RowRefused(
                "rating.constant",
                f"all {len(rows)} rows have the rating {ratings[0]:g}.",
                "Add rows with other ratings.",
            )
        return self.model_copy(update={"center": center, "scale": scale})

    def encode(self, row: Row, index: int, chat: ChatFormat) -> Example:
        """Return the whole text; the weight of the row is on the last token."""
        example = chat.encode_input(row, index)
        if not isinstance(row, RatedText):
            return example
        standard = (row.rating - (self.center or 0.0)) / (self.scale or 1.0)
        return replace(example, target=np.array([standard], dtype=np.float32))

    def loss(self, network: Network, batch: TreeBatch) -> Loss:
        """Return the summed squared error of the standardized ratings."""
        import torch

        scores_R = network.row_scores(batch).float()[:, 0]
        error_R = scores_R - torch.from_numpy(np.concatenate(batch.tree.targets)).to(
            scores_R.device
        )
        absolute = float(error_R.detach().abs().sum()) * (self.scale or 1.0)
        return Loss.from_rows(error_R.square(), {"mean_absolute_error": absolute})

    def describe(self, example: Example) -> str:
        """Return the rating of the row."""
        return f"{float(np.asarray(example.target)[0]) * (self.scale or 1) + (self.center or 0):g}"

    def predict(self, network: Network, batch: TreeBatch) -> list[dict[str, Any]]:
        """Return the rating of each row in the scale of the data, in tree order."""
        scores = network.row_scores(batch).float()[:, 0].tolist()
        return [{"rating": s * (self.scale or 1.0) + (self.center or 0.0)} for s in scores]
