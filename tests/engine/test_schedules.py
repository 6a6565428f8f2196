"""The factor of the learning rate at each step."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.engine.schedules import rate_factor

PROPERTY = settings(max_examples=80, deadline=None, database=None)
NAMES = ("cosine", "linear", "constant", "step")


@pytest.mark.parametrize("schedule", NAMES)
def test_the_rate_rises_evenly_in_the_warm_up(schedule: str) -> None:
    found = [rate_factor(schedule, step, 40, 0.1) for step in range(5)]
    assert found == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", [1.0, 0.8535534, 0.5, 0.1464466]),
        ("linear", [1.0, 0.75, 0.5, 0.25]),
        ("constant", [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_after_the_warm_up_it_falls(schedule: str, expected: list[float]) -> None:
    steps = [20 + quarter * 20 for quarter in range(4)]
    found = [rate_factor(schedule, step, 100, 0.2) for step in steps]
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_last_step_is_just_above_nothing(schedule: str) -> None:
    assert 0 < rate_factor(schedule, 999, 1000, 0.05) < 2e-3
    assert rate_factor(schedule, 1000, 1000, 0.05) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("thirds", [1, 2, 7, 10, 33, 49, 100])
def test_step_divides_by_ten_after_each_third(thirds: int) -> None:
    steps = 3 * thirds
    found = [rate_factor("step", step, steps, 0.0) for step in range(steps)]
    expected = [1.0] * thirds + [0.1] * thirds + [0.01] * thirds
    assert found == pytest.approx(expected)


def test_without_warm_up_the_first_step_has_the_full_rate() -> None:
    assert [rate_factor(name, 0, 10, 0.0) for name in NAMES] == [1.0] * 4


@PROPERTY
@given(st.sampled_from(NAMES), st.integers(1, 300), st.floats(0, 0.99))
def test_the_factor_is_a_share_that_rises_once_and_falls_once(
    schedule: str, steps: int, warmup: float
) -> None:
    found = [rate_factor(schedule, step, steps, warmup) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in found)
    peak = found.index(max(found))
    assert found[: peak + 1] == sorted(found[: peak + 1])
    assert found[peak:] == sorted(found[peak:], reverse=True)


def test_an_unknown_schedule_is_an_error() -> None:
    with pytest.raises(ValueError, match="unknown schedule 'sawtooth'"):
        rate_factor("sawtooth", 5, 10, 0.1)
