"""Quantiles against numpy's own on the numbers themselves."""

from __future__ import annotations

import numpy as np
import pytest

from luthier.gate.histogram import Histogram


@pytest.mark.parametrize("seed", range(3))
def test_histogram_quantiles_approximate_numpy(seed: int) -> None:
    numbers = np.random.default_rng(seed).lognormal(5, 1, 20_000).astype(np.int64)
    found = Histogram()
    for part in np.array_split(numbers, 7):
        found.add(part)
    plain = found.plain()
    assert (plain["min"], plain["max"], plain["count"]) == (numbers.min(), numbers.max(), 20_000)
    assert found.sum == numbers.sum()
    for share in (0.05, 0.5, 0.95, 0.99):
        assert found.quantile(share) == pytest.approx(np.quantile(numbers, share), rel=0.035, abs=1)
    assert sum(bar["count"] for bar in plain["bars"]) == 20_000
    assert plain["bars"][0]["from"] == numbers.min() and plain["bars"][-1]["to"] == numbers.max()


@pytest.mark.parametrize("numbers", [[], [0], [7, 7, 7], [0, 1 << 40]])
def test_the_edges(numbers: list[int]) -> None:
    found = Histogram()
    found.add(np.array(numbers, np.int64))
    assert sum(bar["count"] for bar in found.plain().get("bars", [])) == len(numbers)
    if numbers:
        assert found.quantile(0.0001) == min(numbers)
        assert found.quantile(1.0) == pytest.approx(max(numbers), rel=0.03)
