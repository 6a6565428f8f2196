"""Quotas and daily usage of the caller's account."""

from __future__ import annotations

from datetime import date, timedelta
from typing import Annotated

from fastapi import Query
from pydantic import Field

from luthier.server.native.operations import Input, NativeCall, View, native_router
from luthier.server.tables.database import now
from luthier.server.tables.quota_usage import quota_usage
from luthier.server.tables.usage import report

router = native_router()
DAYS = 30
"""Default number of days of a report."""


class QuotaView(View):
    """Current use of a quota."""

    used: int
    """Current value."""
    quota: int
    """Maximum value."""


class UsageView(View):
    """Quotas of the account."""

    account: str
    quotas: dict[str, QuotaView]
    """Quotas by name, such as ``stored_bytes`` and ``custom_models``."""


class Days(Input):
    """Range of days, in UTC."""

    first: date | None = Field(default=None, alias="from")
    """First day; 30 days ago by default."""
    last: date | None = Field(default=None, alias="to")
    """Last day; today by default."""


class DayView(View):
    """Usage of a user and a model on a day."""

    day: date
    user: str
    """Name of the user; empty for jobs and storage."""
    model: str
    """Name of a custom model, or id of a foundation model; empty for usage without a model."""
    requests: int
    prompt_tokens: int
    generated_tokens: int
    training_seconds: float
    """Wall-clock time of training workers, in seconds."""
    bytes_in: int
    """Size of request bodies."""
    bytes_out: int
    """Size of response bodies."""
    stored_bytes: int
    """Maximum storage of the day, sampled once a minute."""


class DaysView(View):
    """Usage by day, user and model. Counts of the last minute may be missing."""

    account: str
    first: date
    """Range of days, both inclusive."""
    last: date
    days: list[DayView]


@router.get("/usage")
def get_usage(call: NativeCall) -> UsageView:
    """Return the account's current use of each quota."""
    quotas = call.context.quotas(call.account)
    with call.context.database.read() as session:
        current = quota_usage(session, call.account)
    views = {
        name: QuotaView(used=used, quota=getattr(quotas, name)) for name, used in current.items()
    }
    return UsageView(account=call.account, quotas=views)


@router.get("/usage/days")
def get_daily_usage(call: NativeCall, range_of_days: Annotated[Days, Query()]) -> DaysView:
    """Return the account's usage by day, user and model."""
    last = range_of_days.last or now().date()
    first = range_of_days.first or last - timedelta(days=DAYS)
    with call.context.database.read() as session:
        rows = report(session, first, last, call.account)
    days = [DayView(**each) for each in rows]
    return DaysView(account=call.account, first=first, last=last, days=days)
