"""Pairs of rows that resemble each other, among all rows, in memory that does not grow with texts.

Banding proposes pairs (Leskovec et al., section 3.4.2) and their sketches decide: exactly for texts of
up to 256 different shingles, by an estimate beyond. A few hundred bytes a row are kept, on disk once
there are many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from luthier.inspection.columns import LIMIT, Table
from luthier.inspection.groups import firsts
from luthier.inspection.shingles import BANDS, Sketches, padded, similarity
from luthier.types import IntArray

LEAST = 0.8
"""Jaccard similarity from which texts are near-duplicates."""
MARGIN = 0.01
"""By how much an estimate may fall short: less than half its standard error of 0.025."""
NEIGHBOURS = 8
"""Rows that each row of a crowded bucket is compared with, beside the first of the bucket."""
CHUNK = 4096
"""Pairs compared at once."""

Pairs = Callable[[Any, Any], Any]


class Near:
    """Sketches of rows, appended in order, and the pairs of rows that are alike."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._table = Table(limit)
        self.rows = 0

    def add(self, sketches: Sketches) -> None:
        """Take in the next rows."""
        append = self._table.append
        for band in range(BANDS):
            append(f"band {band}", sketches.bands_NB[:, band])
        append("hashes", sketches.hashes_M)
        append("counts", sketches.counts_N)
        append("whole", sketches.whole_N)
        self.rows += len(sketches.counts_N)

    def find(self, keys_N: Any, wanted: Pairs, found: Callable[[Any, Any], None]) -> None:
        """Call ``found(first_P, second_P)`` with pairs of rows that are alike, in batches.

        Rows with the same key of ``keys_N`` (of the text, and of what else must differ for two rows to
        be of interest) are one: only the first of them is compared. ``wanted(first_P, second_P)`` says
        which proposed pairs are worth the comparison, so that what follows from earlier pairs is not
        looked at again. ``first_P < second_P``.
        """
        if not self.rows:
            return
        self._counts_N = self._table.read("counts")
        self._whole_N = self._table.read("whole")
        self._starts_N = np.cumsum(self._counts_N, dtype=np.int64) - self._counts_N
        alone = np.flatnonzero(firsts(keys_N) == np.arange(self.rows))
        # By key, so that what is found does not depend on the order of rows.
        alone = alone[np.argsort(keys_N[alone])]
        for first_P, second_P in self._proposed(alone):
            for start in range(0, len(first_P), CHUNK * 16):
                one_P, other_P = first_P[start:][: CHUNK * 16], second_P[start:][: CHUNK * 16]
                one_P, other_P = np.minimum(one_P, other_P), np.maximum(one_P, other_P)
                worth_P = wanted(one_P, other_P)
                worth_P &= self._possible(one_P, other_P)
                one_P, other_P = one_P[worth_P], other_P[worth_P]
                alike_P = self._alike(one_P, other_P)
                found(one_P[alike_P], other_P[alike_P])

    def _proposed(self, alone: IntArray) -> Iterator[tuple[Any, Any]]:
        """Pairs that share a band: all of a small bucket, neighbours and the first of a crowded one."""
        following = self._table.read(f"band {BANDS - 1}")[alone]
        for band in range(BANDS):
            values = self._table.read(f"band {band}")[alone]
            # Within a bucket, rows that agree in a further band stand beside each other.
            order = np.argsort(
                (values.astype(np.uint64) << np.uint64(32)) | following, kind="stable"
            )
            following, values = values, values[order]
            rows = alone[order]
            # How far each row stands behind the first of its bucket.
            new = np.concatenate([[True], values[1:] != values[:-1]])
            starts = np.flatnonzero(new)[np.cumsum(new) - 1]
            behind = np.arange(len(rows)) - starts
            for step in range(1, NEIGHBOURS + 1):
                later = np.flatnonzero(behind >= step)
                if not len(later):
                    break
                yield rows[later - step], rows[later]
            later = np.flatnonzero(behind > NEIGHBOURS)
            yield rows[starts[later]], rows[later]

    def _possible(self, one_P: Any, other_P: Any) -> Any:
        """Whether the sizes allow it: sets of sizes a < b resemble each other by a/b at most."""
        a_P, b_P = self._counts_N[one_P].astype(np.float64), self._counts_N[other_P]
        exact_P = self._whole_N[one_P] & self._whole_N[other_P]
        return ~exact_P | (np.minimum(a_P, b_P) >= LEAST * np.maximum(a_P, b_P))

    def _alike(self, one_P: IntArray, other_P: IntArray) -> Any:
        """``[P]`` whether the sketches of each pair are similar enough."""
        alike_P = np.zeros(len(one_P), np.bool_)
        # Short texts with short ones, as rows are filled up to the longest of a chunk.
        order = np.argsort(np.maximum(self._counts_N[one_P], self._counts_N[other_P]))
        for start in range(0, len(order), CHUNK):
            chunk = order[start : start + CHUNK]
            pairs_P2 = np.stack([one_P[chunk], other_P[chunk]], 1)
            rows, places = np.unique(pairs_P2, return_inverse=True)
            counts = self._counts_N[rows].astype(np.int64)
            hashes = self._table["hashes"].gather(self._starts_N[rows], counts)
            filled_RK, places = padded(hashes, counts), places.reshape(-1, 2)
            whole_P2 = self._whole_N[pairs_P2]
            found_P = similarity(filled_RK[places[:, 0]], filled_RK[places[:, 1]], whole_P2)
            alike_P[chunk] = found_P >= np.where(whole_P2.all(1), LEAST, LEAST - MARGIN)
        return alike_P
