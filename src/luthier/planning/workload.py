"""What a run will compute: tokens of its steps, and which steps stand for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from luthier.data.loader import RowOrder
from luthier.data.tree import build_tree, split_to_budget
from luthier.engine.job import Job
from luthier.models.network import SIZE_STEP
from luthier.types import Example

LOOKED_AT = 200
"""Steps whose token trees are built to know the whole run; a longer run is sampled evenly."""


@dataclass(frozen=True)
class Step:
    """What one step computes: distinct tokens, those of its largest micro-batch, and their sizes."""

    tokens: int
    largest: int
    sizes: frozenset[int]
    """Sizes of the micro-batches as they are computed. Matrix kernels are made for one size each."""


@dataclass(frozen=True)
class Workload:
    """Tokens of a whole run."""

    steps: int
    tokens: int
    """Of the rows of all steps at most, shared prefixes counted in each."""
    learned: int
    """Those among them that carry loss."""
    validation_tokens: int
    """Of one measurement."""
    row_tokens: int
    """Of all training and validation rows, each once."""


def order_of(job: Job) -> RowOrder:
    """The order in which a run takes its rows."""
    training, data = job.recipe.training, job.data
    return RowOrder(
        data.main, training.batch_size or 1, training.seed, training.shuffle, data.mixed
    )


def workload_of(job: Job) -> Workload:
    """Count the tokens of ``job``, none of whose rows have been touched yet."""
    order, rows = order_of(job), job.data.train
    tokens_R = np.array([_tokens(job, [row]) for row in rows])
    learned_R = np.array([_learned(job, row) for row in rows])
    tokens = learned = 0
    for step in range(job.steps):
        batch = order.batch(step)
        tokens += int(tokens_R[batch].sum())
        learned += int(learned_R[batch].sum())
    held = _tokens(job, job.data.validation)
    return Workload(job.steps, tokens, learned, held, held + int(tokens_R.sum()))


def spread_steps(job: Job) -> list[int]:
    """Numbers of steps, spread evenly over the run."""
    count = min(job.steps, LOOKED_AT)
    return sorted({int(place * job.steps / count) for place in range(count)})


def representative(job: Job, count: int) -> list[list[int]]:
    """Rows of ``count`` whole batches of the run's first pass that stand for all.

    They lie at quantiles of the tokens, evenly apart, the largest of all among them: it decides the
    peak of memory. The middle one comes first, as the first step of all is slower. Batches that a
    short run does not come to are none of its own.
    """
    order, size = order_of(job), job.recipe.training.batch_size or 1
    batches = [order.batch(step) for step in range(min(job.steps, order.steps_per_epoch))]
    whole = [batch for batch in batches if len(batch) == size] or batches[:1]
    tokens_R = np.array([_tokens(job, [row]) for row in job.data.train])
    whole.sort(key=lambda batch: int(tokens_R[batch].sum()))
    count = min(count, len(whole))
    places = [round((place + 0.5) / count * len(whole) - 0.5) for place in range(count)]
    places[-1] = len(whole) - 1
    chosen = [whole[place] for place in dict.fromkeys(places)]
    middle = len(chosen) // 2
    return [chosen[middle], *chosen[:middle], *chosen[middle + 1 :]]


def step_of(job: Job, rows: Sequence[Example], shares: bool) -> Step:
    """What a step on ``rows`` computes; ``shares`` tells whether prefixes are computed once."""
    budget = job.recipe.training.micro_batch_tokens or 1
    seen = _largest(job, rows)
    sizes = [
        len(build_tree(part, shares)) if shares else sum(row.tokens for row in part)
        for part in (split_to_budget(seen, budget, shares) if seen else [])
    ]
    rounded = frozenset(-(-size // SIZE_STEP) for size in sizes)
    return Step(sum(sizes), max(sizes, default=0), rounded)


def _largest(job: Job, rows: Sequence[Example]) -> list[Example]:
    """All that the rows may become in a step."""
    objective = job.data.objective
    return [row for view in objective.seen(rows) or list(rows) for row in objective.room(view)]


def _tokens(job: Job, rows: Sequence[Example]) -> int:
    return sum(row.tokens for row in _largest(job, rows)) if rows else 0


def _learned(job: Job, row: Example) -> int:
    return sum(int(np.count_nonzero(view.weight_T)) for view in job.data.objective.views(row))
