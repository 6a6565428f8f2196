"""Times of series in the forms of Excel, and of European and American exports."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from luthier.data.files.times import parse_times

START = datetime(2024, 1, 31, 14, 5, tzinfo=UTC)
HOURS = [START + timedelta(hours=number) for number in range(60)]


def spell(moments: list[datetime], form: str) -> list[str]:
    return [moment.strftime(form) for moment in moments]


@pytest.mark.parametrize(
    "form",
    [
        "%Y-%m-%d %H:%M", "%Y-%m-%dT%H:%M:%SZ", "%Y-%m-%d %H:%M UTC", "%Y/%m/%d %H:%M",
        "%d.%m.%Y %H:%M", "%d.%m.%y, %H:%M:%S", "%d/%m/%Y %H:%M", "%d-%m-%Y %H:%M",
        "%m/%d/%Y %H:%M", "%m/%d/%y %I:%M %p", "%m/%d/%Y, %I:%M:%S %p",
        "%d %b %Y %H:%M", "%d-%b-%y %H:%M:%S", "%b %d, %Y %I:%M %p",
    ],
)  # fmt: skip
def test_forms_of_times(form: str) -> None:
    assert parse_times(spell(HOURS, form)) == [moment.timestamp() for moment in HOURS]


@pytest.mark.parametrize("form", ["%d/%m/%Y %H:%M", "%m/%d/%Y %H:%M", "%m-%d-%Y %I:%M %p"])
def test_order_of_day_and_month_by_regular_steps(form: str) -> None:
    moments = [datetime(2026, 3, 1, tzinfo=UTC) + timedelta(hours=n) for n in range(140)]
    del moments[80:83]  # a gap
    assert parse_times(spell(moments, form)) == [moment.timestamp() for moment in moments]
    assert parse_times(spell(moments[::-1], form)) == [m.timestamp() for m in moments[::-1]]


def test_order_of_day_and_month_of_a_monthly_series() -> None:
    months = [datetime(2025 + n // 12, n % 12 + 1, 1, tzinfo=UTC) for n in range(14)]
    assert parse_times(spell(months, "%d/%m/%Y")) == [moment.timestamp() for moment in months]


def test_ambiguous_order_of_day_and_month() -> None:
    days = [datetime(2026, 3, day, tzinfo=UTC) for day in range(1, 10)]
    assert np.isnan(parse_times(spell(days, "%d/%m/%Y"))).all()


@pytest.mark.parametrize(
    ("text", "time"),
    [
        ("45322.5", 45322.5),
        ("45322,5", 45322.5),
        ("-3e2", -300.0),
        ("noon", None),
        ("31/02/2024", None),
    ],
)
def test_numbers_and_unknown_times(text: str, time: float | None) -> None:
    (parsed,) = parse_times([text])
    assert np.isnan(parsed) if time is None else parsed == time


def test_unknown_time_among_dates() -> None:
    first, second, third = parse_times(["31/01/2024", "later", "02/02/2024"])
    assert np.isnan(second) and third - first == 2 * 86_400


def test_ambiguous_dates_of_single_day_log() -> None:
    times = parse_times([f"03/04/2026 {hour}:00" for hour in range(8, 14)])
    assert np.diff(times).tolist() == [3600.0] * 5


@pytest.mark.parametrize("form", ["%Y-%m", "%Y/%m", "%m/%Y"])
def test_months(form: str) -> None:
    months = [datetime(2025 + n // 12, n % 12 + 1, 1, tzinfo=UTC) for n in range(14)]
    assert parse_times(spell(months, form)) == [month.timestamp() for month in months]
