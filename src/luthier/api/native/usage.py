"""What the caller's account stores beside what it may, and what it used on each day."""

from __future__ import annotations

from datetime import date, timedelta

from pydantic import Field

from luthier.api.native.context import Context
from luthier.api.native.operations import Operation, Part, Request, Told
from luthier.limits import AccountQuotas
from luthier.store.database import now
from luthier.store.quota_usage import quota_usage
from luthier.store.usage import report

DAYS = 30
"""Of a report whose first day is not named."""


class QuotaTold(Told):
    """One quota."""

    used: int
    """What there is of it now."""
    quota: int
    """What there may be; what it counts is in ``name``."""


class UsageTold(Told):
    """Quotas of the account."""

    account: str
    quotas: dict[str, QuotaTold]
    """By name: ``stored_bytes``, ``objects``, ``files``, ``buckets``, ``custom_models`` and others."""


class Days(Part):
    """Which days are meant, in UTC."""

    first: date | None = Field(default=None, alias="from")
    """30 days back when not given."""
    last: date | None = Field(default=None, alias="to")
    """Today when not given."""


class DayTold(Told):
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


class DaysTold(Told):
    """A report by day and model; counts of the last minute may be missing."""

    account: str
    days: list[DayTold]


def operations(context: Context) -> list[Operation]:
    """Everything about quotas and usage."""
    handlers = _Usage(context)
    return [
        Operation(
            "getUsage", "GET", "/api/v1/usage", handlers.quotas,
            "What the account stores and has in hand, beside its quotas.", UsageTold,
        ),
        Operation(
            "getDailyUsage", "GET", "/api/v1/usage/days", handlers.days,
            "What the account used, by day and model.", DaysTold, query=Days,
        ),
    ]  # fmt: skip


class _Usage:
    def __init__(self, context: Context) -> None:
        self.context = context

    def quotas(self, request: Request) -> UsageTold:
        self.context.allow(request, "GetUsage", "*")
        quotas: AccountQuotas = self.context.limits(request.account)
        with self.context.database.read() as session:
            found = quota_usage(session, request.account)
        told = {
            name: QuotaTold(used=used, quota=getattr(quotas, name)) for name, used in found.items()
        }
        return UsageTold(account=request.account, quotas=told)

    def days(self, request: Request) -> DaysTold:
        self.context.allow(request, "GetUsage", "*")
        asked: Days = request.query
        last = asked.last or now().date()
        first = asked.first or last - timedelta(days=DAYS)
        with self.context.database.read() as session:
            found = report(session, first, last, request.account)
        return DaysTold(account=request.account, days=[DayTold(**each) for each in found])
