"""What the caller's account stores beside what it may, and what it used on each day."""

from __future__ import annotations

from datetime import date, timedelta

from pydantic import Field

from luthier.server.http.messages import Request
from luthier.server.native.operations import Context, Input, NativeOperation, View
from luthier.server.tables.database import now
from luthier.server.tables.quota_usage import quota_usage
from luthier.server.tables.usage import report

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


def operations(context: Context) -> list[NativeOperation]:
    """Everything about quotas and usage."""
    handlers = _Usage(context)
    return [
        NativeOperation(
            "getUsage", "GET", "/api/v1/usage", handlers.quotas,
            "What the account stores and has in hand, beside its quotas.", UsageView,
        ),
        NativeOperation(
            "getDailyUsage", "GET", "/api/v1/usage/days", handlers.days,
            "What the account used, by day and model.", DaysView, query=Days,
        ),
    ]  # fmt: skip


class _Usage:
    def __init__(self, context: Context) -> None:
        self.context = context

    def quotas(self, request: Request) -> UsageView:
        self.context.record(request, "GetUsage", "*")
        quotas = self.context.quotas(request.account)
        with self.context.database.read() as session:
            found = quota_usage(session, request.account)
        views = {
            name: QuotaView(used=used, quota=getattr(quotas, name)) for name, used in found.items()
        }
        return UsageView(account=request.account, quotas=views)

    def days(self, request: Request, asked: Days) -> DaysView:
        self.context.record(request, "GetUsage", "*")
        last = asked.last or now().date()
        first = asked.first or last - timedelta(days=DAYS)
        with self.context.database.read() as session:
            found = report(session, first, last, request.account)
        days = [DayView(**each) for each in found]
        return DaysView(account=request.account, first=first, last=last, days=days)
