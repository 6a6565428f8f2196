"""Rows that ask nearly the same, or have one partner, which a split must keep on one side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from luthier.inspection.columns import LIMIT, Table
from luthier.inspection.groups import Groups, firsts
from luthier.inspection.identity import asked, key, keys
from luthier.inspection.near import Near
from luthier.inspection.shingles import Words, common_shingles, normal, sketch
from luthier.types import IntArray, Row

BATCH = 1024
LARGEST = 0.5
"""Share of the rows beyond which a group is one of a template, and its rows are not kept together."""


class Kin:
    """Collects rows, in order; texts are not kept."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._near, self._table = Near(limit), Table(limit)
        self._common: Words | None = None

    def add(self, rows: Sequence[Row]) -> None:
        """Take in the next rows; the first ones show what all are written in."""
        for start in range(0, len(rows), BATCH):
            texts = [normal(asked(row)) for row in rows[start : start + BATCH]]
            if self._common is None:
                self._common = common_shingles(texts)
            self._table.append("asked", keys(map(key, texts), len(texts)))
            partners = [
                text if row.positive is None else normal(row.positive)
                for row, text in zip(rows[start : start + BATCH], texts, strict=True)
            ]
            self._table.append("partner", keys(map(key, partners), len(partners)))
            self._near.add(sketch(texts, self._common))

    def groups(self) -> IntArray:
        """``[N]`` number of the first row of each row's group.

        Where more than half of all rows would be one group, as of a template, only rows that ask the
        same stay together, and not even those where half of all do: they could not be split otherwise.
        """
        if not self._near.rows:
            return np.zeros(0, np.int64)
        asked_N = self._table.read("asked")
        groups = Groups(self._near.rows)
        same_N = firsts(asked_N)
        groups.join(np.arange(len(same_N)), same_N)
        groups.join(np.arange(len(same_N)), firsts(self._table.read("partner")))
        self._near.find(asked_N, lambda one, other: ~groups.together(one, other), groups.join)
        found_N = groups.roots_N
        for finer_N in (same_N, np.arange(len(same_N))):
            crowded = np.bincount(found_N) > LARGEST * len(same_N)
            found_N = np.where(crowded[found_N], finer_N, found_N)
        return found_N


def alike(rows: Sequence[Row]) -> IntArray:
    """``[N]`` groups of rows in memory; see :meth:`Kin.groups`."""
    kin = Kin()
    kin.add(rows)
    return kin.groups()
