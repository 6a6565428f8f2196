"""Usage of each account per day (UTC), user and model.

Rows are never reduced, and stay when an account is removed, like the audit log.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import date, timedelta
from typing import Any

from sqlalchemy import BigInteger, case, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from luthier.errors import RefusedInput
from luthier.server.tables.custom_models import CustomModel
from luthier.server.tables.database import Base, dialect_insert

LONGEST_REPORT = timedelta(days=3660)


class DailyUsage(Base):
    """Usage of a user on a day, by model or without a model."""

    __tablename__ = "usage"

    account: Mapped[str] = mapped_column(primary_key=True)
    day: Mapped[date] = mapped_column(primary_key=True)
    user: Mapped[str] = mapped_column(primary_key=True)
    """Name of the user; empty for jobs and storage."""
    model: Mapped[str] = mapped_column(primary_key=True)
    """Id of the model in the library; empty for requests without a model."""
    requests: Mapped[int] = mapped_column(BigInteger)
    prompt_tokens: Mapped[int] = mapped_column(BigInteger)
    generated_tokens: Mapped[int] = mapped_column(BigInteger)
    training_seconds: Mapped[float]
    bytes_in: Mapped[int] = mapped_column(BigInteger)
    bytes_out: Mapped[int] = mapped_column(BigInteger)
    stored_bytes: Mapped[int] = mapped_column(BigInteger)
    """Maximum of the stored bytes, measured once a minute."""


@dataclass
class Usage:
    """Amounts of usage."""

    requests: int = 0
    """Authenticated requests, and lines of batches."""
    prompt_tokens: int = 0
    """Prompt tokens, embeddings included."""
    generated_tokens: int = 0
    """Generated tokens, also of replies that the client interrupted."""
    training_seconds: float = 0.0
    """Wall time of workers in seconds, validation and waiting for data included."""
    bytes_in: int = 0
    bytes_out: int = 0
    stored_bytes: int = 0
    """Maximum of the stored bytes, measured once a minute."""

    def add(self, other: Usage) -> None:
        """Add ``other``; for stored bytes, keep the maximum."""
        for each in fields(self):
            mine, more = getattr(self, each.name), getattr(other, each.name)
            setattr(self, each.name, max(mine, more) if each.name == _PEAK else mine + more)


CountUsage = Callable[[str, str, str, Usage], None]
"""Callback that counts usage by account, user and stored model id."""
_PEAK = "stored_bytes"
_AMOUNTS = tuple(each.name for each in fields(Usage))


def add_usage(session: Session, used: Mapping[tuple[date, str, str, str], Usage]) -> None:
    """Add ``used`` by day, account, user and model."""
    if not used:
        return
    # Sorted, so that two servers lock the rows in the same order and cannot deadlock.
    rows = [
        {"account": account, "day": day, "user": user, "model": model, **asdict(each)}
        for (day, account, user, model), each in sorted(used.items(), key=lambda pair: pair[0])
    ]
    fresh = dialect_insert(session, DailyUsage)
    table = DailyUsage.__table__.c
    changes: dict[str, Any] = {
        name: table[name] + fresh.excluded[name] for name in _AMOUNTS if name != _PEAK
    }
    larger = fresh.excluded[_PEAK] > table[_PEAK]
    changes[_PEAK] = case((larger, fresh.excluded[_PEAK]), else_=table[_PEAK])
    statement = fresh.on_conflict_do_update(
        index_elements=["account", "day", "user", "model"], set_=changes
    )
    session.execute(statement, rows)


def report(
    session: Session, first: date, last: date, account: str | None = None
) -> list[dict[str, Any]]:
    """Return usage from ``first`` to ``last`` by day, account, user and model, ready for JSON.

    Existing custom models appear by name.

    Raises:
        RefusedInput: if the days are in the wrong order, or too many.
    """
    if not timedelta(0) <= last - first <= LONGEST_REPORT:
        raise RefusedInput(
            f"a report needs first and last day in order, at most {LONGEST_REPORT.days} days apart"
        )
    query = (
        select(DailyUsage, CustomModel.name)
        .outerjoin(
            CustomModel,
            (CustomModel.stored_id == DailyUsage.model)
            & (CustomModel.account == DailyUsage.account)
            & (DailyUsage.model != ""),
        )
        .where(DailyUsage.day.between(first, last))
        .order_by(DailyUsage.day, DailyUsage.account, DailyUsage.user, DailyUsage.model)
    )
    if account is not None:
        query = query.where(DailyUsage.account == account)
    return [
        {
            "day": row.day.isoformat(),
            "account": row.account,
            "user": row.user,
            "model": name or row.model,
            **{amount: getattr(row, amount) for amount in _AMOUNTS},
        }
        for row, name in session.execute(query)
    ]
