"""Row order of each step, a function of seed and step alone, so a run can resume at any step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from luthier.types import IntArray

_PLACES, _FURTHER = 2, 3
"""Last components of seeds, to keep random streams independent."""


@dataclass(frozen=True)
class MixedSet:
    """An additional set of rows, of which each pass over the main set uses a part."""

    rows: int
    """Rows of the set."""
    drawn: int
    """Rows used per pass over the main set; above ``rows``, rows repeat."""


def one_pass(rows: int, mixed: Sequence[MixedSet]) -> list[int]:
    """Return the indices of a pass over the main set, of ``rows`` rows with the mixed-in sets.

    The rows of a mixed-in set are evenly spaced, as many as a pass draws.
    """
    first = rows - sum(each.rows for each in mixed)
    places = [*range(first)]
    for each in mixed:
        places += (first + number * each.rows // each.drawn for number in range(each.drawn))
        first += each.rows
    return places


@dataclass(frozen=True)
class RowOrder:
    """Batches of row indices; the last batch of an epoch may be smaller.

    An epoch is one pass over the ``rows`` of the main set. ``drawn`` rows of each additional set
    are spread evenly among the main rows, so every batch has the overall proportions, up to two
    rows. Each row of an additional set is used, in random order, before any row repeats, also
    across epochs. Indices count through the main set first, then through the additional sets.
    """

    rows: int
    batch_size: int
    seed: int
    shuffle: bool = True
    mixed: tuple[MixedSet, ...] = ()

    @property
    def rows_per_epoch(self) -> int:
        """Rows in one pass, additional sets included."""
        return self.rows + sum(each.drawn for each in self.mixed)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch."""
        return math.ceil(self.rows_per_epoch / self.batch_size)

    def steps(self, epochs: float) -> int:
        """Return the number of optimizer steps in ``epochs`` epochs, at least one."""
        return max(1, round(epochs * self.steps_per_epoch))

    def batch(self, step: int) -> list[int]:
        """Indices of the rows of step ``step`` (0-based)."""
        epoch, index = divmod(step, self.steps_per_epoch)
        start = index * self.batch_size
        chosen: list[int] = _epoch(self, epoch)[start : start + self.batch_size].tolist()
        return chosen

    def places(self, rows: int, epoch: int, number: int) -> NDArray[np.float64]:
        """Return each row's position in the epoch (0 to 1): one in each of ``rows`` equal
        intervals."""
        if not self.shuffle:
            return (np.arange(rows) + 0.5) / max(1, rows)
        jitter = np.random.default_rng([self.seed, epoch, number, _PLACES]).random(rows)
        return (np.arange(rows) + jitter) / max(1, rows)

    def one_pass(self, rows: int, turn: int, number: int = 0) -> IntArray:
        """Return one pass over ``rows`` rows of set ``number``; 0 is the main set."""
        if not self.shuffle:
            return np.arange(rows)
        key = [self.seed, turn, number, _FURTHER] if number else [self.seed, turn]
        return np.random.default_rng(key).permutation(rows)


@lru_cache(maxsize=2)
def _epoch(order: RowOrder, epoch: int) -> IntArray:
    """Return all rows of an epoch in order, cached for the epoch's steps."""
    main = order.one_pass(order.rows, epoch)
    if not order.mixed:
        return main
    indices, places = [main], [order.places(order.rows, epoch, 0)]
    first = order.rows
    for number, each in enumerate(order.mixed, 1):
        indices.append(first + _draw_rows(order, each, epoch, number))
        places.append(order.places(each.drawn, epoch, number))
        first += each.rows
    spread: IntArray = np.concatenate(indices)[np.argsort(np.concatenate(places), kind="stable")]
    return spread


def _draw_rows(order: RowOrder, each: MixedSet, epoch: int, number: int) -> IntArray:
    """Return the rows of an additional set in an epoch, cut from consecutive random passes."""
    start, end = epoch * each.drawn, (epoch + 1) * each.drawn
    passes = range(start // each.rows, -(-end // each.rows))
    rows = np.concatenate([order.one_pass(each.rows, turn, number) for turn in passes])
    skipped = passes.start * each.rows
    return rows[start - skipped : end - skipped]
