"""Batches of the OpenAI API: files of requests, processed in the background.

The server answers several lines at a time and stores each result in its own transaction. A
restarted server does not repeat stored lines, and no line occurs twice in the output.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ForeignKey, UniqueConstraint, delete, func, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from luthier.server.tables.database import Base, JSONText, find_row, now, page_of, random_id
from luthier.server.tables.queue import BackgroundWork, next_turn

VALIDATING, IN_PROGRESS, FINALIZING, COMPLETED = (
    "validating",
    "in_progress",
    "finalizing",
    "completed",
)
FAILED, EXPIRED, CANCELLING, CANCELLED = "failed", "expired", "cancelling", "cancelled"
ENDED = (COMPLETED, FAILED, EXPIRED, CANCELLED)
PAGE = 20
"""Number of lines in memory while a file is written. One line may have megabytes."""


class Batch(BackgroundWork, Base):
    """Batch of requests."""

    __tablename__ = "batches"
    noun = "batch"
    ended = ENDED

    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    endpoint: Mapped[str]
    """``/v1/chat/completions``, ..."""
    window: Mapped[str]
    input_file: Mapped[str]
    output_file: Mapped[str | None]
    error_file: Mapped[str | None]
    errors: Mapped[list[Any]] = mapped_column(default=list)
    """Errors of the input file: ``code``, ``message``, ``param``, ``line``."""
    user_metadata: Mapped[dict[str, Any]]
    total: Mapped[int] = mapped_column(default=0)
    succeeded: Mapped[int] = mapped_column(default=0)
    failed: Mapped[int] = mapped_column(default=0)
    """Number of completed or failed lines, set at the end of the batch."""
    moments: Mapped[dict[str, Any]] = mapped_column(default=dict)
    """Unix time by status."""
    expires: Mapped[datetime]
    """Time limit of the batch."""


class BatchLine(Base):
    """Result of a line."""

    __tablename__ = "batch_lines"
    __table_args__ = (UniqueConstraint("batch_id", "number"),)

    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    batch_id: Mapped[str] = mapped_column(ForeignKey("batches.id"), index=True)
    number: Mapped[int]
    failed: Mapped[bool]
    result: Mapped[dict[str, Any]] = mapped_column(JSONText)


def create(
    session: Session,
    account: str,
    caller: dict[str, Any],
    endpoint: str,
    window: str,
    input_file: str,
    metadata: dict[str, str],
) -> Batch:
    """Create a batch in the state ``validating``. A lock orders creations of an account."""
    moment = now()
    batch = Batch(
        id="batch_" + random_id(24),
        account=account,
        turn=next_turn(session, Batch, account),
        caller=caller,
        endpoint=endpoint,
        window=window,
        input_file=input_file,
        status=VALIDATING,
        user_metadata=metadata,
        created=moment,
        expires=moment + timedelta(hours=24),
    )
    session.add(batch)
    session.flush()
    return batch


def get(session: Session, account: str, batch_id: str, *, lock: bool = False) -> Batch | None:
    """Return the account's batch; ``lock`` locks the row until the transaction ends."""
    found = select(Batch).where(Batch.account == account, Batch.id == batch_id)
    return find_row(session, found, lock=lock)


def list_batches(session: Session, account: str, limit: int, position: int | None) -> list[Batch]:
    """Return at most ``limit`` batches, the newest first, older than the ``seq`` ``position``."""
    query = select(Batch).where(Batch.account == account)
    return page_of(session, query, Batch.seq, limit=limit, position=position)


def enter(batch: Batch, status: str) -> None:
    """Set the status of a batch and its time."""
    batch.status = status
    batch.moments = {**batch.moments, status: int(now().timestamp())}


def cancel(batch: Batch) -> bool:
    """Request the end of a batch. Returns False if the batch has ended."""
    if batch.status in (*ENDED, FINALIZING):
        return False
    if batch.status != CANCELLING:
        enter(batch, CANCELLING)
    return True


def done_lines(session: Session, batch_id: str) -> set[int]:
    """Return the numbers of the lines with a result."""
    return set(session.scalars(select(BatchLine.number).where(BatchLine.batch_id == batch_id)))


def record(
    session: Session, batch_id: str, number: int, failed: bool, result: dict[str, Any]
) -> None:
    """Store the result of a line."""
    session.add(BatchLine(batch_id=batch_id, number=number, failed=failed, result=result))
    session.flush()


def results(
    session: Session, batch_id: str, failed: bool, after: int
) -> list[tuple[int, dict[str, Any]]]:
    """Return the next results of the output or error file after line ``after``, in input order."""
    query = select(BatchLine.number, BatchLine.result).where(
        BatchLine.batch_id == batch_id, BatchLine.failed == failed, BatchLine.number > after
    )
    found = session.execute(query.order_by(BatchLine.number).limit(PAGE))
    return [(number, result) for number, result in found]


def counts(session: Session, batch: Batch) -> tuple[int, int]:
    """Return the numbers of succeeded and failed lines."""
    if batch.status in ENDED:
        return batch.succeeded, batch.failed
    counted = select(BatchLine.failed, func.count()).where(BatchLine.batch_id == batch.id)
    found = dict(session.execute(counted.group_by(BatchLine.failed)).all())
    return found.get(False, 0), found.get(True, 0)


def end(session: Session, batch: Batch, status: str) -> None:
    """End a batch and delete the line results after the output files exist."""
    batch.succeeded, batch.failed = counts(session, batch)
    session.execute(delete(BatchLine).where(BatchLine.batch_id == batch.id))
    enter(batch, status)
