"""Which rows each step sees: a function of seed and step alone, so that a run can go on anywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from luthier.types import Example


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
        return self._permutation(epoch)[start : start + self.batch_size]

    def _permutation(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(self.rows))
        order: list[int] = np.random.default_rng([self.seed, epoch]).permutation(self.rows).tolist()
        return order


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
