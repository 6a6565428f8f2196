"""Queued work that ends with a result: exports and measurements.

The life cycle is that of a customization job without a pause.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, ClassVar, TypeVar

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from luthier.errors import WrongState
from luthier.server.tables.database import Plain, QuotingText, find_row, now, page_of
from luthier.server.tables.jobs import (
    COMPLETED,
    ENDED,
    FAILED,
    MOST_CRASHES,
    QUEUED,
    RUNNING,
    STOPPED,
    STOPPING,
)
from luthier.server.tables.queue import QueuedWork, lock_leased, log_file
from luthier.server.tables.queue import renew as renew_lease

_LONGEST = 2048
"""Maximum length of a failure message, in characters."""


class ResultWork(QueuedWork):
    """Columns and life cycle of work that ends with a result."""

    prefix: ClassVar[str]
    """Beginning of the names of folder, lock and log."""

    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    state: Mapped[str] = mapped_column(default=QUEUED, index=True)
    failure: Mapped[str | None] = mapped_column(QuotingText)
    progress: Mapped[Any] = mapped_column(Plain, nullable=True)
    """``phase``, ``done`` and ``total`` of running work."""
    result: Mapped[Any] = mapped_column(Plain, nullable=True)
    created: Mapped[datetime]
    started: Mapped[datetime | None]
    ended: Mapped[datetime | None]

    @classmethod
    def is_unfinished(cls) -> ColumnElement[bool]:
        """See :meth:`luthier.server.tables.queue.TakesTurns.is_unfinished`."""
        return cls.state.not_in(ENDED)

    @classmethod
    def ready(cls) -> tuple[ColumnElement[bool], ...]:
        """See :meth:`luthier.server.tables.queue.QueuedWork.ready`."""
        return (cls.state == QUEUED,)

    def start(self, session: Session, lease: str, worker: Mapping[str, object]) -> None:
        """See :meth:`luthier.server.tables.queue.QueuedWork.start`."""
        self.state, self.started = RUNNING, self.started or now()
        super().start(session, lease, worker)

    def release(self, session: Session, message: str) -> None:
        """Queue the work again, or end stopped work."""
        if self.state == STOPPING:
            self.end(session)
            return
        self.state, self.since, self.progress = QUEUED, now(), None
        super().release(session, message)

    def expire(self, session: Session, why: str, cause: str = "") -> str:
        """Expire the lease of a dead worker. The work fails after :data:`MOST_CRASHES` deaths."""
        self.crashes += 1
        if self.crashes >= MOST_CRASHES and self.state == RUNNING:
            self.end(
                session,
                failure=f"{self.crashes} workers died during {self.noun}; in the last attempt, {why}. "
                f"{cause}".rstrip(),
            )
            # A worker that died before locking its files leaves the log.
            log_file(f"{self.prefix}{self.id}").unlink(missing_ok=True)
        else:
            self.release(session, why)
        return f"it is {self.state}"

    def end(self, session: Session, result: Any = None, failure: str | None = None) -> None:
        """End the work: completed with a ``result``, failed with a ``failure``, else stopped."""
        self.result, self.progress, self.ended = result, None, now()
        self.failure = failure and failure[:_LONGEST]
        self.state = COMPLETED if result is not None else FAILED if failure else STOPPED
        self.lease = self.lease_ends = self.worker = None
        session.flush()


Work = TypeVar("Work", bound=ResultWork)


def get(
    session: Session, kind: type[Work], account: str, row_id: str, *, lock: bool = False
) -> Work | None:
    """Return the account's work; ``lock`` locks the row until the transaction ends."""
    found = select(kind).where(kind.account == account, kind.id == row_id)
    return find_row(session, found, lock=lock)


def list_works(
    session: Session,
    kind: type[Work],
    account: str,
    states: Sequence[str] = (),
    *conditions: ColumnElement[bool],
    limit: int,
    position: int | None = None,
) -> list[Work]:
    """Return at most ``limit`` works, the newest first, created before ``position``."""
    query = select(kind).where(kind.account == account, *conditions)
    if states:
        query = query.where(kind.state.in_(states))
    return page_of(session, query, kind.seq, limit=limit, position=position)


def stop(session: Session, work: Work) -> Work:
    """Stop a work at once, or at the end of its worker. The caller has locked the row.

    Raises:
        WrongState: for completed or failed work.
    """
    if work.state in (STOPPING, STOPPED):
        return work
    if work.state in ENDED:
        raise WrongState(f"{work.noun} {work.id} is {work.state} and cannot be stopped")
    if work.lease is None:
        work.end(session)
    else:
        work.state = STOPPING
        session.flush()
    return work


def renew(session: Session, kind: type[Work], row_id: str, lease: str, progress: Any) -> Work:
    """Renew the lease and store the progress; raises :class:`LeaseLost`."""
    work = renew_lease(session, kind, row_id, lease)
    work.progress = progress
    session.flush()
    return work


def finish(session: Session, kind: type[Work], row_id: str, lease: str, end: Any) -> Work:
    """End running work with a result or a failure (text). Stopping work becomes stopped."""
    work = lock_leased(session, kind, row_id, lease)
    if work.state == STOPPING:
        work.end(session)
    elif isinstance(end, str):
        work.end(session, failure=end)
    else:
        work.end(session, end)
    return work
