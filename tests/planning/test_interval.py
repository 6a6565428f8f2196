"""Numbers with an error, and lines through a few points."""

from __future__ import annotations

import math

import numpy as np
import pytest

from luthier.planning.interval import Interval, Line


def test_errors_that_have_nothing_to_do_with_each_other_add_as_squares() -> None:
    total = Interval(10.0, 7.0, 13.0) + Interval(20.0, 16.0, 24.0)
    assert total == Interval(30.0, 25.0, 35.0)
    assert Interval.exactly(5.0) + Interval(1.0, 0.0, 3.0) == Interval(6.0, 5.0, 8.0)
    assert Interval.around(10.0, 0.1, 0.2).times(3) == Interval(30.0, 27.0, 36.0)
    wide = Interval(10.0, 7.0, 13.0).widened(0.4, 0.4)
    assert (wide.low, wide.high) == (5.0, 15.0)


def test_a_line_through_exact_points_gives_the_exact_total() -> None:
    tokens = [100.0, 200.0, 400.0, 700.0]
    line = Line.through(tokens, [0.5 + 0.01 * x for x in tokens])
    run = [150.0, 250.0, 1000.0]
    total = line.total(run, 3)
    assert total.value == pytest.approx(sum(0.5 + 0.01 * x for x in run))
    assert total.high == pytest.approx(total.value)
    assert line.total(run, 30).value == pytest.approx(10 * total.value)


@pytest.mark.parametrize(
    ("tokens", "seconds"),
    [
        ([100.0, 100.0, 100.0], [1.0, 1.2, 1.1]),  # no spread
        ([100.0, 200.0, 300.0], [3.0, 2.0, 1.0]),  # faster the more there is
        ([100.0, 200.0, 300.0], [0.5, 2.0, 3.5]),  # less than nothing without tokens
        ([100.0], [1.0]),
    ],
)
def test_no_part_of_a_line_is_negative_and_a_mean_run_takes_about_the_mean(
    tokens: list[float], seconds: list[float]
) -> None:
    line = Line.through(tokens, seconds)
    assert line.slope >= 0 and line.intercept >= 0
    value = line.total(tokens, len(tokens))
    assert value.value == pytest.approx(sum(seconds), rel=0.15)
    assert 0 <= value.low < value.value < value.high


def test_nine_of_ten_runs_are_inside_the_interval() -> None:
    draw = np.random.default_rng(0)
    inside = trials = 0
    for _ in range(400):
        tokens = draw.uniform(200, 1200, 60)
        seconds = 0.2 + 0.002 * tokens + draw.normal(0, 0.15, 60)
        tried = draw.choice(60, 5, replace=False)
        total = Line.through(tokens[tried].tolist(), seconds[tried].tolist()).total(
            tokens.tolist(), 60
        )
        inside += total.low <= seconds.sum() <= total.high
        trials += 1
    # Five points are few, and lines are kept from being negative; 4 standard errors of 400 draws.
    assert abs(inside / trials - 0.9) < 4 * math.sqrt(0.09 / trials) + 0.02
