"""Means of the loss and the metrics over rows, without gradient or dropout."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import chain
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from luthier.evaluation.significance import RowScores
from luthier.types import Example, Loss

if TYPE_CHECKING:
    from luthier.models.networks.network import Network
    from luthier.models.process_group import ProcessGroup
    from luthier.objectives.base import Objective

MOST_ROW_SCORES = 2_000
"""Maximum number of held-out rows with row-level scores in the metrics file."""

_Part = tuple[Sequence[int], float, dict[str, float], dict[str, list[list[float]]]]
"""Place, weight, sums and ratios of a micro-batch, exchanged between processes as JSON."""


class Means:
    """Means of the loss and of all metrics over micro-batches, from their sums."""

    def __init__(self) -> None:
        self._parts: list[_Part] = []

    def add(self, loss: Loss, weight: float, *place: int) -> None:
        """Add a micro-batch of ``weight``; ``place`` orders the micro-batches of several processes."""
        ratios = {
            name: [np.asarray(side, dtype=np.float64).tolist() for side in pair]
            for name, pair in loss.ratios.items()
        }
        sums = {"loss": float(loss.total.detach()), **loss.metrics}
        self._parts.append((place, weight, sums, ratios))

    def of_all(self, processes: ProcessGroup) -> Means:
        """Return the means including the other processes, in the order of a single process."""
        if processes.size == 1:
            return self
        means = Means()
        parts = chain.from_iterable(processes.gather(self._parts))
        means._parts = sorted(parts, key=itemgetter(0))
        return means

    def values(self) -> dict[str, float]:
        """Return ``loss`` and each metric by name."""
        totals: defaultdict[str, float] = defaultdict(float)
        for _, _, sums, _ in self._parts:
            for name, value in sums.items():
                totals[name] += value
        # Exact, because the divisor must not depend on the order of the micro-batches.
        weight = math.fsum(each for _, each, _, _ in self._parts)
        means = {name: total / weight for name, total in totals.items()}
        scores = self.row_scores()
        # `loss` remains the mean by weight; row-level losses only give the standard error.
        return means | {name: each.value for name, each in scores.items() if name != "loss"}

    def row_scores(self) -> dict[str, RowScores]:
        """Return the row-level scores, in the order of the micro-batches."""
        scores: defaultdict[str, list[RowScores]] = defaultdict(list)
        for _, _, _, ratios in self._parts:
            for name, (parts_R, wholes_R) in ratios.items():
                scores[name].append(RowScores.of(parts_R, wholes_R, name != "loss"))
        return {name: RowScores.concatenate(each) for name, each in scores.items()}


def loss_means(
    objective: Objective,
    network: Network,
    examples: Sequence[Example],
    budget: int,
    on_loss: Callable[[Loss], None] = lambda loss: None,
) -> Means:
    """Return the means of the loss over ``examples`` of all processes.

    ``on_loss`` is called with the loss of each micro-batch of this process.
    """
    import torch

    network.model.eval()
    means = Means()
    # Contrasted rows need all other rows. Other rows come in parts that fit in memory (images).
    parts = [examples] if objective.contrasts_rows else network.parts(examples)
    with torch.no_grad(), network.split_work() as processes:
        for number, part in enumerate(parts):
            for batch in objective.annotate(network, part, budget):
                loss = objective.loss(network, batch)
                # A filler repeats a batch, so that sharded processes run equal collectives.
                if not batch.is_filler:
                    # Part and place restore the order of a single process in `of_all`.
                    means.add(loss, batch.weight, number, batch.place)
                    on_loss(loss)
    return means.of_all(processes)


def mean_loss(
    objective: Objective, network: Network, examples: Sequence[Example], budget: int
) -> float:
    """Return the loss on ``examples``, averaged over their weight."""
    return loss_means(objective, network, examples, budget).values()["loss"]


def loss_metrics(
    objective: Objective,
    network: Network,
    examples: Sequence[Example],
    budget: int,
    on_loss: Callable[[Loss], None] = lambda loss: None,
) -> dict[str, Any]:
    """Return the metrics of the loss on ``examples``, with standard errors and scores of rows."""
    means = loss_means(objective, network, examples, budget, on_loss)
    metrics: dict[str, Any] = means.values()
    scores = means.row_scores()
    if objective.measure in scores:
        metrics[f"{objective.measure}_error"] = scores[objective.measure].error
    if scores and len(examples) <= MOST_ROW_SCORES:
        metrics["rows"] = {name: each.plain() for name, each in scores.items()}
    return metrics
