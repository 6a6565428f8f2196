"""The factor of the learning rate at each step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from luthier.engine.optimizers import schedule_factor
from luthier.recipe import Training

PROPERTY = settings(max_examples=80, deadline=None, database=None)
NAMES = ("cosine", "linear", "constant", "step")
EVERY = (*NAMES, "one_cycle")


@pytest.mark.parametrize("schedule", NAMES)
def test_the_rate_rises_evenly_in_the_warm_up(schedule: str) -> None:
    found = [schedule_factor(schedule, step, 40, 0.1) for step in range(5)]
    assert found == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", [1.0, 0.8535534, 0.5, 0.1464466]),
        ("linear", [1.0, 0.75, 0.5, 0.25]),
        ("constant", [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_rate_falls_after_warm_up(schedule: str, expected: list[float]) -> None:
    steps = [20 + quarter * 20 for quarter in range(4)]
    found = [schedule_factor(schedule, step, 100, 0.2) for step in steps]
    assert found == pytest.approx(expected)


def test_the_warm_up_may_be_a_number_of_steps() -> None:
    found = [schedule_factor("constant", step, 7, 0.9, warmup_steps=3) for step in range(5)]
    assert found == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert schedule_factor("cosine", 0, 7, warmup_steps=0) == 1.0
    assert schedule_factor("linear", 6, 7, warmup_steps=100) == pytest.approx(7 / 101)
    cycle = [schedule_factor("one_cycle", step, 10, warmup_steps=4) for step in range(10)]
    assert cycle.index(max(cycle)) == 4


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_last_rate_is_just_above_zero(schedule: str) -> None:
    assert 0 < schedule_factor(schedule, 999, 1000, 0.05) < 2e-3
    assert schedule_factor(schedule, 1000, 1000, 0.05) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("thirds", [1, 2, 7, 10, 33, 49, 100])
def test_step_divides_by_ten_after_each_third(thirds: int) -> None:
    steps = 3 * thirds
    found = [schedule_factor("step", step, steps, 0.0) for step in range(steps)]
    expected = [1.0] * thirds + [0.1] * thirds + [0.01] * thirds
    assert found == pytest.approx(expected)


def test_first_step_without_warm_up_has_full_rate() -> None:
    assert [schedule_factor(name, 0, 10, 0.0) for name in NAMES] == [1.0] * 4


@PROPERTY
@given(st.sampled_from(EVERY), st.integers(1, 300), st.floats(0, 0.99))
def test_factor_rises_once_and_falls_once(schedule: str, steps: int, warmup: float) -> None:
    found = [schedule_factor(schedule, step, steps, warmup) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in found)
    peak = found.index(max(found))
    assert found[: peak + 1] == sorted(found[: peak + 1])
    assert found[peak:] == sorted(found[peak:], reverse=True)


def test_one_cycle_is_symmetric_and_ends_near_zero() -> None:
    found = [schedule_factor("one_cycle", step, 1000) for step in range(1001)]
    assert found[0] == found[900] == pytest.approx(0.04)
    assert found.index(max(found)) == 450 and found[450] == 1.0
    assert found[225] == found[675] == pytest.approx(0.52)
    for before, after, slope in ((0, 450, 0.96 / 450), (450, 900, -0.96 / 450), (900, 1000, -4e-4)):
        steps = [found[n + 1] - found[n] for n in range(before, after)]
        assert steps == pytest.approx([slope] * len(steps), abs=1e-12)
    assert 0 < found[999] < 1e-3 and found[1000] == 0


@pytest.mark.parametrize(("rise", "falls_until"), [(0.1, 90), (0.6, 90), (0.86, 93)])
def test_one_cycle_with_share_of_rise(rise: float, falls_until: int) -> None:
    found = [schedule_factor("one_cycle", step, 100, rise) for step in range(100)]
    assert found[round(100 * rise)] == pytest.approx(1.0) == max(found)
    assert found[falls_until] == pytest.approx(0.04)


def test_default_share_of_each_schedule() -> None:
    for name in NAMES:
        assert all(
            schedule_factor(name, n, 60) == schedule_factor(name, n, 60, 0.05) for n in range(60)
        )
    assert schedule_factor("one_cycle", 9, 20) == schedule_factor("one_cycle", 9, 20, 0.45) == 1.0


def test_an_unknown_schedule_is_an_error() -> None:
    with pytest.raises(ValueError):
        schedule_factor("sawtooth", 5, 10, 0.1)


def test_step_schedule_equals_step_lr_of_torch() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    torch_schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=4, gamma=0.3)
    for step in range(13):
        factor = schedule_factor("step", step, 13, 0.0, step_size=4, step_factor=0.3)
        assert factor == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        torch_schedule.step()


def test_step_settings_without_step_schedule_are_refused() -> None:
    with pytest.raises(ValidationError, match="step_size"):
        Training(step_size=3)
