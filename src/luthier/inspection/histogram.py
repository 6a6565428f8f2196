"""Distributions of sizes in bounded memory, exact to 3 %."""

from __future__ import annotations

from typing import Any

import numpy as np

PER_DOUBLING = 24
"""Bins between a number and its double; 2^(1/24) is 1.029."""
BINS = 64 * PER_DOUBLING


class Histogram:
    """Counts of whole numbers from 0, in bins that widen with the number."""

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
        """The number below which ``share`` of all lie, to the width of a bin."""
        if not self.count:
            return 0
        below_B = np.cumsum(self._counts_B)
        bin_ = int(np.searchsorted(below_B, share * self.count))
        middle = round(2 ** ((bin_ + 0.5) / PER_DOUBLING) - 1)
        return max(self.smallest, min(self.largest, middle))

    def plain(self, bars: int = 30) -> dict[str, Any]:
        """Quantiles, and ``bars`` equal steps from the smallest to the largest on a log axis."""
        found: dict[str, Any] = {
            "count": self.count,
            "min": self.smallest,
            "max": self.largest,
            "mean": round(self.sum / self.count, 1) if self.count else 0.0,
            **{f"p{round(100 * q)}": self.quantile(q) for q in (0.05, 0.5, 0.95, 0.99)},
        }
        if self.count:
            low, high = np.log2(self.smallest + 1), np.log2(self.largest + 1)
            edges = np.linspace(low, max(high, low + 0.1), bars + 1)
            middles_B = (np.arange(BINS) + 0.5) / PER_DOUBLING
            middles_B = np.clip(middles_B, edges[0], edges[-1])
            counts, _ = np.histogram(middles_B, edges, weights=self._counts_B)
            found["bars"] = [
                {"from": round(2**a - 1), "to": round(2**b - 1), "count": int(n)}
                for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)
            ]
        return found
