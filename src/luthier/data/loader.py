"""Which rows each step sees: a function of seed and step alone, so that a run can go on anywhere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from luthier.types import IntArray

_PLACES, _FURTHER = 2, 3
"""Last numbers of seeds, which keep draws for different ends apart."""


@dataclass(frozen=True)
class MixedSet:
    """A further set of rows, of which each pass over the main set takes a part."""

    rows: int
    """Rows of the set."""
    drawn: int
    """Rows of it in one pass over the main set; more than there are come more than once."""


@dataclass(frozen=True)
class RowOrder:
    """Batches of row indices; an epoch's last batch may be smaller.

    An epoch is one pass over the ``rows`` of the main set, with ``drawn`` rows of each further set
    spread evenly among them, so that every batch holds the sets in proportion, to a row or two. A
    further set is used up, in a random order, before any of its rows comes again, also over the end of
    an epoch. Indices count through the main set and then through the others.
    """

    rows: int
    batch_size: int
    seed: int
    shuffle: bool = True
    mixed: tuple[MixedSet, ...] = ()

    @property
    def rows_per_epoch(self) -> int:
        """Rows in one pass, those of further sets included."""
        return self.rows + sum(each.drawn for each in self.mixed)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the rows."""
        return math.ceil(self.rows_per_epoch / self.batch_size)

    def steps(self, epochs: float) -> int:
        """Optimizer steps in ``epochs`` passes, at least one."""
        return max(1, round(epochs * self.steps_per_epoch))

    def batch(self, step: int) -> list[int]:
        """Indices of the rows of step ``step`` (0-based)."""
        epoch, index = divmod(step, self.steps_per_epoch)
        start = index * self.batch_size
        chosen: list[int] = _epoch(self, epoch)[start : start + self.batch_size].tolist()
        return chosen

    def places(self, rows: int, epoch: int, number: int) -> NDArray[np.float64]:
        """Where in the epoch (0 to 1) the rows of a set stand: one in each of ``rows`` even parts."""
        if not self.shuffle:
            return (np.arange(rows) + 0.5) / max(1, rows)
        jitter = np.random.default_rng([self.seed, epoch, number, _PLACES]).random(rows)
        return (np.arange(rows) + jitter) / max(1, rows)

    def one_pass(self, rows: int, turn: int, number: int = 0) -> IntArray:
        """One pass over ``rows`` rows; ``number`` is that of a further set, 0 for the main one."""
        if not self.shuffle:
            return np.arange(rows)
        key = [self.seed, turn, number, _FURTHER] if number else [self.seed, turn]
        return np.random.default_rng(key).permutation(rows)


@lru_cache(maxsize=2)
def _epoch(order: RowOrder, epoch: int) -> IntArray:
    """All rows of an epoch in order; kept, as each of its steps asks for a part of it."""
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
    """Rows of a further set in an epoch: a stretch of one random pass over it after the other."""
    start, end = epoch * each.drawn, (epoch + 1) * each.drawn
    passes = range(start // each.rows, -(-end // each.rows))
    rows = np.concatenate([order.one_pass(each.rows, turn, number) for turn in passes])
    skipped = passes.start * each.rows
    return rows[start - skipped : end - skipped]
