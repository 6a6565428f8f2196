"""Which rows each step sees: a function of seed and step alone, so that a run can go on anywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from luthier.types import Example, IntArray


@dataclass(frozen=True)
class RowOrder:
    """Batches of row indices for ``rows`` rows; an epoch's last batch may be smaller."""

    rows: int
    batch_size: int
    seed: int
    shuffle: bool = True

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the rows."""
        return math.ceil(self.rows / self.batch_size)

    def steps(self, epochs: float) -> int:
        """Optimizer steps in ``epochs`` passes, at least one."""
        return max(1, round(epochs * self.steps_per_epoch))

    def batch(self, step: int) -> list[int]:
        """Indices of the rows of step ``step`` (0-based)."""
        epoch, index = divmod(step, self.steps_per_epoch)
        start = index * self.batch_size
        stop = min(start + self.batch_size, self.rows)
        if not self.shuffle:
            return list(range(start, stop))
        chosen: list[int] = _permutation(self.seed, epoch, self.rows)[start:stop].tolist()
        return chosen


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, rows: int) -> IntArray:
    """The rows in the order of one epoch; kept, as each of its steps asks for a part of it."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


def hold_out(rows: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Split row indices into training and validation, each in the order of the file.

    At least one row is held out and at least one is kept when ``share`` is above 0.
    """
    if share <= 0 or rows < 2:
        return list(range(rows)), []
    count = min(max(1, round(share * rows)), rows - 1)
    # The third number keeps the split apart from the orders of the epochs.
    chosen = set(np.random.default_rng([seed, 0, 1]).permutation(rows)[:count].tolist())
    return [i for i in range(rows) if i not in chosen], sorted(chosen)


def total_tokens(examples: Sequence[Example]) -> int:
    """Tokens of all examples, shared prefixes counted in each."""
    return sum(example.tokens for example in examples)
