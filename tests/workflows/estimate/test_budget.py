"""Price tables: costs and limits."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from luthier.errors import DoesNotFit, RecipeError
from luthier.workflows.estimate.budget import (
    BreakEven,
    Prices,
    advice,
    check_limits,
    duration,
    monthly_costs,
    plan,
    prices_file,
    read_prices,
    seconds_until,
)
from luthier.workflows.estimate.estimate import Estimate, PredictionInterval


def test_rent_electricity_and_tokens_add_up() -> None:
    prices = Prices(per_hour=0.5, per_kwh=0.3, watts=200, per_million_tokens=2)
    # Two hours: 1.00 rent, 0.4 kWh at 0.3, and three million tokens.
    assert prices.cost(7200, 3e6) == pytest.approx(1.0 + 0.12 + 6.0)
    assert Prices().cost(7200, 3e6) == 0


def test_rent_of_a_month_covers_the_idle_hours_of_all_machines() -> None:
    prices = Prices(per_hour=2, per_kwh=0.5, watts=100)
    assert prices.month(0) == 0
    assert prices.month(36_000) == pytest.approx(730 * 2 + 10 * 0.1 * 0.5)
    assert prices.month(731 * 3600) == pytest.approx(2 * 730 * 2 + 731 * 0.1 * 0.5)


def test_break_even_is_the_first_month_in_which_savings_exceed_the_training() -> None:
    def month(rival_cost: float) -> int | None:
        return BreakEven("tuned", "rival", 1000, "EUR", 10.0, rival_cost, 25.0).month

    assert [month(cost) for cost in (35.0, 20.0, 10.0, 5.0)] == [1, 3, None, None]


def test_estimated_month_of_an_endpoint_has_the_tokens_of_the_rows() -> None:
    prices = Prices.model_validate(
        {"per_hour": 1, "endpoints": {"big": {"per_million_input": 2, "per_million_output": 10}}}
    )
    tokens = {"tokens": PredictionInterval.exactly(400), "learned": PredictionInterval.exactly(100)}
    found = estimate(rows=10, epochs=2.0, **tokens)
    (month,) = monthly_costs(found, prices, 1_000_000)
    # 15 tokens of prompt and 5 of reply a row.
    assert month.rival_cost == pytest.approx(15 * 2 + 5 * 10)
    assert month.tuned_cost == pytest.approx(730)


def test_default_price_table_is_optional(luthier_home: Path) -> None:
    assert read_prices() is None
    luthier_home.mkdir()
    prices_file().write_text("per_hour = 1.5")
    assert read_prices() == Prices(per_hour=1.5)


@pytest.mark.parametrize(
    "text",
    [
        "per_hour = -1",
        "per_houre = 1",
        "per_hour = ",
        "per_kwh = 0.3",
        "watts = 100",
    ],
)
def test_a_wrong_table_is_refused_with_the_fix(text: str, tmp_path: Path) -> None:
    file = tmp_path / "prices.toml"
    file.write_text(text)
    with pytest.raises(RecipeError):
        read_prices(file)


def test_missing_price_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as refused:
        read_prices(tmp_path / "none.toml")
    assert refused.value.rule == "file.unreadable"


def estimate(**other: Any) -> Estimate:
    """Return an estimate of 100 s of steps and 20 s of fixed time, without error."""
    fields: dict[str, Any] = {
        "key": "k",
        "machine": "m",
        "created": "",
        "base": "b",
        "objective": "sft",
        "adaptation": "lora",
        "rows": 500,
        "steps": 100,
        "refit_steps": 0,
        "epochs": 4.0,
        "tokens": PredictionInterval.exactly(1e6),
        "learned": PredictionInterval.exactly(1e5),
        "parts": {
            "data": PredictionInterval.exactly(15.0),
            "steps": PredictionInterval.exactly(100.0),
            "store": PredictionInterval.exactly(5.0),
        },
        "seconds": PredictionInterval.exactly(120.0),
        "memory": PredictionInterval.exactly(1e9),
        "disk": PredictionInterval.exactly(1e7),
        "modelled_memory": 10**9,
        "tried": [],
    }
    return Estimate(**{**fields, **other})


def test_plan_subtracts_time_outside_of_steps() -> None:
    planned = plan(estimate(), 70)
    assert (planned.fits, planned.steps, planned.rows) == (False, 50, 250)
    assert planned.share == 0.5 and planned.epochs == 2.0
    assert advice(planned, 4) == "--epochs 2 (50 steps), or 50 % of the rows (250) with --epochs 4"


def test_plan_with_enough_time_has_all_steps() -> None:
    planned = plan(estimate(), 120)
    assert planned.fits and planned.steps == 100 and planned.share == 1


def test_the_upper_end_is_planned_with() -> None:
    wide = estimate(seconds=PredictionInterval(120.0, 90.0, 240.0))
    assert not plan(wide, 200).fits
    assert plan(wide, 140).steps == 50  # everything may take twice as long


def test_advice_names_smallest_run_if_no_step_fits() -> None:
    planned = plan(estimate(), 10)
    assert planned.steps == 0 and planned.least == pytest.approx(21)
    assert "21 s" in advice(planned, 4)


def test_advice_may_be_a_fraction_of_an_epoch() -> None:
    assert advice(plan(estimate(), 35), 4).startswith("--epochs 0.6 (15 steps)")
    assert advice(plan(estimate(epochs=0.01), 21.5), 1).startswith("--set training.max_steps=1 ")


def test_job_over_time_or_cost_limit_is_refused() -> None:
    prices = Prices(per_hour=60)  # a minute costs 1
    check_limits(estimate(), 2, 2.0, prices)
    with pytest.raises(DoesNotFit):
        check_limits(estimate(), 1, None, None)
    with pytest.raises(DoesNotFit):
        check_limits(estimate(), None, 1.0, prices)
    with pytest.raises(RecipeError):
        check_limits(estimate(), None, 1.0, None)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("2h", 7200), ("90m", 5400), ("1h30m", 5400), ("45s", 45), ("1.5 h", 5400), ("10min", 600)],
)
def test_durations_are_read(text: str, seconds: float) -> None:
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "2", "two hours", "2h later", "0m", "1..5h"])
def test_invalid_duration_is_refused(text: str) -> None:
    with pytest.raises(RecipeError):
        duration(text)


def test_past_time_of_day_means_tomorrow() -> None:
    now = datetime(2026, 11, 20, 17, 30)
    assert seconds_until("18:00", now) == 1800
    assert seconds_until("17:00", now) == 23.5 * 3600
    assert seconds_until("2026-11-21T17:30", now) == 86400
    for wrong in ("25:00", "soon", "2026-11-20T10:00"):
        with pytest.raises(RecipeError):
            seconds_until(wrong, now)
