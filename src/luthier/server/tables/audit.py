"""The audit log: changes of users and operators, and refused requests. Entries are only added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import func, insert, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from luthier.server.tables.database import Base, now
from luthier.server.tables.text import storable_value

LONGEST = 2048
"""Longest text of a field, in characters."""


class AuditEntry(Base):
    """Entry of the audit log."""

    __tablename__ = "audit_log"

    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    at: Mapped[datetime]
    account: Mapped[str] = mapped_column(index=True)
    user: Mapped[str]
    action: Mapped[str]
    resource: Mapped[str]
    outcome: Mapped[str]
    """``ok``, or the code of the refusal or failure."""
    request_id: Mapped[str]
    address: Mapped[str]
    details: Mapped[dict[str, Any]]


@dataclass(frozen=True)
class Event:
    """Content of a new entry."""

    action: str
    resource: str = "*"
    outcome: str = "ok"
    account: str = ""
    user: str = ""
    request_id: str = ""
    address: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    """Strings, numbers, booleans."""
    at: datetime = field(default_factory=now)


def append(session: Session, *events: Event) -> None:
    """Add entries in the transaction of ``session``."""
    rows = [
        {
            # Names come from requests and may be long.
            name: value[:LONGEST] if isinstance(value, str) else value
            for name, value in storable_value(asdict(event)).items()
        }
        for event in events
    ]
    session.execute(insert(AuditEntry), rows)


def entries(
    session: Session,
    account: str | None = None,
    user: str | None = None,
    action: str | None = None,
    since: datetime | None = None,
    before: int | None = None,
    limit: int = 100,
) -> Sequence[AuditEntry]:
    """Return entries, the newest first; ``before`` is the number of the last entry of a page."""
    query = select(AuditEntry).order_by(AuditEntry.seq.desc()).limit(limit)
    exact = {"account": account, "user": user}
    query = query.filter_by(**{name: each for name, each in exact.items() if each is not None})
    if action is not None:
        query = query.where(func.lower(AuditEntry.action).contains(action.lower(), autoescape=True))
    if since is not None:
        query = query.where(AuditEntry.at >= since)
    if before is not None:
        query = query.where(AuditEntry.seq < before)
    return session.scalars(query).all()


def entry_values(entry: AuditEntry) -> dict[str, Any]:
    """Return an entry as plain values."""
    row = {column.key: getattr(entry, column.key) for column in AuditEntry.__table__.columns}
    return {**row, "at": row["at"].astimezone(UTC).isoformat(timespec="microseconds")}
