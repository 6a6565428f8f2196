"""Distributions of sizes in bounded memory, exact to 3 %."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

PER_DOUBLING = 24
"""Number of bins per doubling; 2^(1/24) is 1.029."""
BINS = 64 * PER_DOUBLING


class Histogram:
    """Histogram of non-negative integers, with bins that widen logarithmically."""

    def __init__(self) -> None:
        self._counts_B = np.zeros(BINS, np.int64)
        self.count = self.sum = self.largest = 0
        self.smallest = 0

    def add(self, numbers_N: Any, times_N: Any = None) -> None:
        """Add numbers of at least 0, each as often as ``times_N`` says, or once."""
        numbers_N = np.asarray(numbers_N, np.int64)
        times_N = np.ones(len(numbers_N), np.int64) if times_N is None else times_N
        numbers_N, times_N = numbers_N[times_N > 0], times_N[times_N > 0]
        if not len(numbers_N):
            return
        bins_N = np.floor(np.log2(numbers_N + 1) * PER_DOUBLING).astype(np.int64)
        counts_B = np.bincount(np.minimum(bins_N, BINS - 1), weights=times_N, minlength=BINS)
        self._counts_B += counts_B.astype(np.int64)
        smallest = int(numbers_N.min())
        self.smallest = min(self.smallest, smallest) if self.count else smallest
        self.largest = max(self.largest, int(numbers_N.max()))
        self.count += int(times_N.sum())
        self.sum += int(numbers_N @ times_N)

    def quantile(self, share: float) -> int:
        """Return the quantile at ``share``, with the precision of a bin."""
        if not self.count:
            return 0
        below_B = np.cumsum(self._counts_B)
        bin_ = int(np.searchsorted(below_B, share * self.count))
        middle = round(2 ** ((bin_ + 0.5) / PER_DOUBLING) - 1)
        return max(self.smallest, min(self.largest, middle))

    def plain(self, bars: int = 30) -> dict[str, Any]:
        """Return quantiles, and at most ``bars`` bars from the minimum to the maximum.

        A bar counts the integers from ``from`` to ``to``, both included. Bars have about equal
        width on a log axis and at least one integer. Plot count divided by width.
        """
        found: dict[str, Any] = {
            "count": self.count,
            "min": self.smallest,
            "max": self.largest,
            "mean": round(self.sum / self.count, 1) if self.count else 0.0,
            **{f"p{round(100 * q)}": self.quantile(q) for q in (0.05, 0.5, 0.95, 0.99)},
        }
        if self.count:
            used = np.flatnonzero(self._counts_B)
            low, high = int(used[0]), int(used[-1])
            # The first whole number of each bin; narrow bins that hold none have that of the next.
            first_B = np.ceil(np.exp2(np.arange(low, high + 1) / PER_DOUBLING) - 1).astype(np.int64)
            first_B = np.maximum(first_B, self.smallest)
            chosen = np.linspace(0, high - low + 1, bars + 1).astype(np.int64)[:-1]
            starts = np.unique(first_B[chosen])
            bar_B = np.searchsorted(starts, first_B, side="right") - 1
            counts = np.bincount(bar_B, self._counts_B[low : high + 1]).astype(np.int64)
            stops = [*(starts[1:] - 1).tolist(), self.largest]
            found["bars"] = [
                {"from": a, "to": b, "count": n}
                for a, b, n in zip(starts.tolist(), stops, counts.tolist(), strict=True)
            ]
        return found


def merge_bars(bars: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Merge adjacent bars."""
    count = sum(bar["count"] for bar in bars)
    return {"from": bars[0]["from"], "to": bars[-1]["to"], "count": count}


def density(bar: Mapping[str, int]) -> float:
    """Return the count divided by the width on the log axis, where n covers n+1 to n+2."""
    return bar["count"] / math.log((bar["to"] + 2) / (bar["from"] + 1))
