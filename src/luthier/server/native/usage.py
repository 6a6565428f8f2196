"""What the caller's account stores beside what it may, and what it used on each day."""

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
"""Of a report whose first day is not named."""


class QuotaView(View):
    """One quota."""

    used: int
    """What there is of it now."""
    quota: int
    """What there may be; what it counts is in ``name``."""


class UsageView(View):
    """Quotas of the account."""

    account: str
    quotas: dict[str, QuotaView]
    """By name: ``stored_bytes``, ``custom_models`` and others."""


class Days(Input):
    """Which days are meant, in UTC."""

    first: date | None = Field(default=None, alias="from")
    """30 days back when not given."""
    last: date | None = Field(default=None, alias="to")
    """Today when not given."""


class DayView(View):
    """What was used on one day, of one model or beside models."""

    day: date
    model: str
    """Name of a custom model, or id of another; empty for what no model answered."""
    requests: int
    prompt_tokens: int
    generated_tokens: int
    training_seconds: float
    """Seconds on the clock that workers had jobs in hand."""
    bytes_in: int
    """Of the bodies of requests."""
    bytes_out: int
    """Of the bodies of answers."""
    stored_bytes: int
    """The most that was stored that day, looked at once a minute."""


class DaysView(View):
    """A report by day and model; counts of the last minute may be missing."""

    account: str
    first: date
    """The days that were looked at, both with what was used on them."""
    last: date
    days: list[DayView]


@router.get("/usage")
def get_usage(call: NativeCall) -> UsageView:
    """Return what the account stores and uses now, next to its quotas."""
    quotas = call.context.quotas(call.account)
    with call.context.database.read() as session:
        found = quota_usage(session, call.account)
    views = {
        name: QuotaView(used=used, quota=getattr(quotas, name)) for name, used in found.items()
    }
    return UsageView(account=call.account, quotas=views)


@router.get("/usage/days")
def get_daily_usage(call: NativeCall, asked: Annotated[Days, Query()]) -> DaysView:
    """Return what the account used, by day and model."""
    last = asked.last or now().date()
    first = asked.first or last - timedelta(days=DAYS)
    with call.context.database.read() as session:
        found = report(session, first, last, call.account)
    days = [DayView(**each) for each in found]
    return DaysView(account=call.account, first=first, last=last, days=days)
