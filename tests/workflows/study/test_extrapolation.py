"""Effect of more rows: fitted law, coverage of the interval, and verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from luthier.workflows.study.extrapolation import CurvePoint, MoreRows, extrapolate

SHARES = tuple(2 ** (-step / 2) for step in range(6, -1, -1))
ROWS = 800


def points_of(costs: Sequence[float]) -> list[CurvePoint]:
    return [
        CurvePoint(round(share * ROWS), cost) for share, cost in zip(SHARES, costs, strict=True)
    ]


def law(share: float, floor: float = 0.05, scale: float = 0.15, exponent: float = 0.5) -> float:
    return float(floor + scale * share**-exponent)


def test_the_gain_of_a_law_without_noise_is_found() -> None:
    gain, (low, high) = extrapolate(points_of([law(share) for share in SHARES]))
    assert gain == pytest.approx(law(1) - law(2), rel=0.01)
    assert low == pytest.approx(high, abs=1e-3)
    assert extrapolate(points_of([0.2] * 7))[0] == pytest.approx(0, abs=1e-9)


@pytest.mark.slow
def test_the_interval_contains_the_truth_in_nineteen_of_twenty() -> None:
    draw = np.random.default_rng(1)
    truth, contained, many = law(1) - law(2), 0, 100
    for _ in range(many):
        # All shares have the same 500 held-out rows; the noise differs per run.
        uniform_R = draw.random(500)
        points = []
        for point in points_of([law(share) for share in SHARES]):
            cost = float((uniform_R < point.cost + draw.normal(0, 0.005)).mean())
            points.append(replace(point, cost=cost, error=math.sqrt(cost * (1 - cost) / 500)))
        _, (low, high) = extrapolate(points)
        contained += low <= truth <= high
    assert contained / many >= 0.92


@pytest.mark.parametrize(
    ("measure", "sign"), [("accuracy", "+"), ("loss", "-"), ("cer", "-"), ("reward", "+")]
)
def test_the_verdict_names_rows_and_direction(measure: str, sign: str) -> None:
    said = MoreRows(2 * ROWS, measure, 0.01, (0.003, 0.02)).verdict()
    assert "(1,600)" in said
