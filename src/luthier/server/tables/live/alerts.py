"""Alerts about deployed models, in the order of their creation."""

from __future__ import annotations

from datetime import datetime, timedelta

from sqlalchemy import UniqueConstraint, select, update
from sqlalchemy.orm import Mapped, Session, mapped_column

from luthier.server.tables.database import Base, now

MOST_ATTEMPTS = 5
"""Maximum number of deliveries of an alert to the webhook."""
RETRY = timedelta(seconds=30)
"""Time until the second delivery; the time doubles after each delivery."""


class Alert(Base):
    """An alert, announced once in the log and delivered to the webhook."""

    __tablename__ = "alerts"
    __table_args__ = (UniqueConstraint("account", "key"),)

    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    account: Mapped[str]
    key: Mapped[str]
    """Identity of the event, so that an event has one alert."""
    kind: Mapped[str]
    """``health``, ``drift``, ``rollback``, ``evaluation``."""
    subject: Mapped[str]
    """Name of the model or deployment."""
    text: Mapped[str]
    created: Mapped[datetime]
    attempts: Mapped[int] = mapped_column(default=0)
    """Number of started deliveries."""
    due: Mapped[datetime | None] = mapped_column(index=True)
    """Time of the next delivery; none after the last."""


def add_alert(session: Session, account: str, kind: str, subject: str, text: str, key: str) -> None:
    """Add an alert in the caller's transaction. An alert with a known ``key`` is ignored.

    A running server logs, counts and delivers the alert.
    """
    known = select(Alert.seq).where(Alert.account == account, Alert.key == key)
    if session.scalar(known) is None:
        moment = now()
        session.add(
            Alert(
                account=account, key=key, kind=kind, subject=subject, text=text, created=moment,
                due=moment,
            )
        )  # fmt: skip


def claim_alert(session: Session) -> Alert | None:
    """Return the first due alert, and schedule the next delivery; ``None`` without a due alert.

    Another server, or this server after a crash, repeats a delivery without
    :func:`finish_alert`.
    """
    moment = now()
    exhausted = Alert.due <= moment, Alert.attempts >= MOST_ATTEMPTS
    session.execute(update(Alert).where(*exhausted).values(due=None))
    found = session.scalars(
        select(Alert).where(Alert.due <= moment).order_by(Alert.seq).limit(1).with_for_update()
    ).first()
    if found is not None:
        found.due = moment + RETRY * 2**found.attempts
        found.attempts += 1
    return found


def finish_alert(session: Session, alert: Alert) -> None:
    """Deliver the alert no more."""
    session.execute(update(Alert).where(Alert.seq == alert.seq).values(due=None))
