"""Stratified split into training and held-out rows, with grouped rows on one side.

The split depends on rows and seed only, so a resumed run holds out the same rows.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from luthier.data.shapes.conversations import PromptCompletion
from luthier.errors import RecipeError
from luthier.types import IntArray, Row


def split_rows(
    strata: Sequence[str], groups_N: IntArray, shares: Sequence[float], seed: int
) -> list[IntArray]:
    """Return ascending row numbers of the training part and one part per share.

    Every stratum contributes its share of rows, rounded to whole rows, as far as group sizes allow.
    One group of each stratum stays in training. Rows with equal numbers in ``groups_N`` stay
    together. A part with a positive share has at least one row, unless only the groups reserved for
    training are left.

    Raises:
        RecipeError: if no training rows are left.
    """
    if sum(shares) >= 1:
        text = f"held-out shares of {sum(shares):g} in total leave no training rows"
        raise RecipeError(text, rule="split.empty")
    units = _Units(strata, groups_N, seed)
    for part, share in enumerate(shares, 1):
        if share > 0:
            units.hold_out(part, share)
    return [np.flatnonzero(units.part_U[units.unit_N] == part) for part in range(len(shares) + 1)]


class _Units:
    """Row groups in random order with an assigned part; 0 is training."""

    def __init__(self, strata: Sequence[str], groups_N: IntArray, seed: int) -> None:
        rows = len(strata)
        _, first_U, unit_N = np.unique(groups_N, return_index=True, return_inverse=True)
        # The third component separates the random stream from the epoch order.
        drawn = np.random.default_rng([seed, 0, 1]).permutation(len(first_U))
        self.rows = rows
        self.unit_N: IntArray = np.argsort(drawn)[unit_N]
        """Unit of each row; units are numbered in drawing order."""
        self.size_U = np.bincount(self.unit_N, minlength=len(first_U))
        self.part_U = np.zeros(len(first_U), np.int64)
        names = {name: number for number, name in enumerate(sorted(set(strata)))}
        stratum_N = np.fromiter((names[name] for name in strata), np.int64, rows)
        self.stratum_U = stratum_N[first_U[drawn]]
        # The first unit of each stratum stays in training, so every label is trained.
        self.free_U = np.ones(len(first_U), np.bool_)
        self.free_U[np.unique(self.stratum_U, return_index=True)[1]] = False
        self.stratum_rows_S = np.bincount(self.stratum_U, self.size_U, len(names))

    def hold_out(self, part: int, share: float) -> None:
        """Move units of about ``share`` of all rows to ``part``."""
        goal = min(max(1, round(share * self.rows)), self.rows - 1)
        left_S = _quotas(share * self.stratum_rows_S, goal)
        for unit in np.flatnonzero(self.free_U & (self.part_U == 0)).tolist():
            stratum = self.stratum_U[unit]
            if self.size_U[unit] <= left_S[stratum]:
                self.part_U[unit] = part
                left_S[stratum] -= self.size_U[unit]
        self._fill(part, goal)

    def _fill(self, part: int, goal: int) -> None:
        """Move more units, of any stratum, until the part has ``goal`` rows."""
        missing = goal - int(self.size_U[self.part_U == part].sum())
        for unit in np.flatnonzero(self.free_U & (self.part_U == 0)).tolist():
            if self.size_U[unit] <= missing:
                self.part_U[unit] = part
                missing -= int(self.size_U[unit])
        left = np.flatnonzero(self.free_U & (self.part_U == 0))
        if len(left):  # the smallest, if the part is empty or the goal is nearer with the unit
            smallest = left[np.argmin(self.size_U[left])]
            if missing == goal or self.size_U[smallest] < 2 * missing:
                self.part_U[smallest] = part


def _quotas(wanted_S: np.ndarray, goal: int) -> IntArray:
    """Round ``wanted_S`` to integers with the sum ``goal``, each off by less than 1."""
    quotas: IntArray = np.floor(wanted_S).astype(np.int64)
    order = np.argsort(quotas - wanted_S, kind="stable")
    quotas[order[: max(0, goal - int(quotas.sum()))]] += 1
    return quotas


ROWS_PER_COMPLETION = 8
"""Fewest rows per distinct completion for completions to count as labels."""
MOST_COMPLETIONS = 100_000
"""Most distinct completions that count as labels, if the number of rows is unknown."""


class Strata:
    """Incremental collection of each row's stratum.

    The stratum is the label (the rarest of several), the judgement, or the completion, if there are
    at least :data:`ROWS_PER_COMPLETION` rows per distinct completion. Memory: one number per row,
    plus distinct label sets.
    """

    def __init__(self, rows: int | None = None) -> None:
        """``rows`` is the total number of rows, if known."""
        self._most = MOST_COMPLETIONS if rows is None else rows // ROWS_PER_COMPLETION
        self._number_N = array("L")
        self._numbers: dict[tuple[str, ...], int] = {}
        self._counts = Counter[str]()
        self._completions, self._are_texts = True, False

    def add(self, rows: Iterable[Row]) -> None:
        """Add the next rows."""
        for row in rows:
            self._completions &= row.shape == PromptCompletion.shape
            names = () if self._are_texts else row.classes()
            self._counts.update(names)
            self._number_N.append(self._numbers.setdefault(names, len(self._numbers)))
            if self._completions and len(self._counts) > self._most:
                self._are_texts = True  # distinct texts would fill the memory
                self._counts.clear()
                self._numbers = {(): 0}

    def names(self) -> list[str]:
        """Return the stratum ``[N]`` of each row; empty strings without strata."""
        rows = len(self._number_N)
        few = self._completions and ROWS_PER_COMPLETION * len(self._counts) > rows
        if self._are_texts or few:
            return [""] * rows
        stratum_names = [
            min(names, key=lambda name: (self._counts[name], name), default="")
            for names in self._numbers
        ]
        return [stratum_names[number] for number in self._number_N]


def strata_of(rows: Sequence[Row]) -> list[str]:
    """Return the stratum of each row; see :class:`Strata`."""
    strata = Strata(len(rows))
    strata.add(rows)
    return strata.names()
