"""Rows that belong together, by their numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from luthier.types import IntArray


class Groups:
    """Connected components: rows joined in pairs, whole columns of pairs at once.

    Each round hangs the larger of two roots below the smaller and then shortens all paths (Shiloach
    and Vishkin 1982, "An O(log n) parallel connectivity algorithm"), so the root of a group is its
    first row.
    """

    def __init__(self, rows: int) -> None:
        self.roots_N: IntArray = np.arange(rows)

    def join(self, first_P: Any, second_P: Any) -> None:
        """Put both rows of each pair into one group."""
        while len(first_P):
            one_P, other_P = self.roots_N[first_P], self.roots_N[second_P]
            apart_P = one_P != other_P
            if not apart_P.any():
                return
            first_P, second_P = first_P[apart_P], second_P[apart_P]
            one_P, other_P = one_P[apart_P], other_P[apart_P]
            np.minimum.at(self.roots_N, np.maximum(one_P, other_P), np.minimum(one_P, other_P))
            while True:
                shorter_N = self.roots_N[self.roots_N]
                if np.array_equal(shorter_N, self.roots_N):
                    break
                self.roots_N = shorter_N

    def together(self, first_P: Any, second_P: Any) -> Any:
        """``[P]`` whether both rows of each pair are in one group already."""
        return self.roots_N[first_P] == self.roots_N[second_P]

    def members(self) -> Iterator[IntArray]:
        """Rows of each group of two or more, in ascending order, by their first rows."""
        return runs(self.roots_N)


def runs(keys_N: Any) -> Iterator[IntArray]:
    """Row numbers of each value that occurs more than once, ascending, in the order of the first."""
    order = np.argsort(keys_N, kind="stable")
    sorted_N = keys_N[order]
    edges = np.flatnonzero(np.concatenate([[True], sorted_N[1:] != sorted_N[:-1], [True]]))
    if not len(keys_N):
        return
    starts, ends = edges[:-1], edges[1:]
    several = ends - starts > 1
    starts, ends = starts[several], ends[several]
    by_first = np.argsort(order[starts])
    for start, end in zip(starts[by_first].tolist(), ends[by_first].tolist(), strict=True):
        yield order[start:end]


def firsts(keys_N: Any) -> IntArray:
    """``[N]`` number of the first row with the same key as each."""
    order = np.argsort(keys_N, kind="stable")
    sorted_N = keys_N[order]
    new_N = np.concatenate([[True], sorted_N[1:] != sorted_N[:-1]]) if len(keys_N) else order
    found: IntArray = np.empty(len(keys_N), np.int64)
    found[order] = order[np.flatnonzero(new_N)[np.cumsum(new_N) - 1]] if len(keys_N) else 0
    return found
