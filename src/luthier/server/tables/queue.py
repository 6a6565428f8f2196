"""Leased work: database rows, each processed by one process at a time.

A process claims a row by a lease, renews the lease, and writes only under a valid lease. A process
that does not renew its lease counts as dead: another process continues the work. A later write of
the dead process fails with :class:`~luthier.errors.LeaseLost`.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from sqlalchemy import BigInteger, ColumnElement, and_, func, or_, select, true
from sqlalchemy.orm import Mapped, Session, mapped_column

from luthier.errors import LeaseLost
from luthier.files import luthier_home
from luthier.server.tables.database import count_rows, find_row, lock_by_name, now

LEASE = timedelta(seconds=30)
"""Time after the last renewal until a worker counts as dead."""
PATIENCE = timedelta(minutes=10)
"""Time during which smaller work may overtake larger work."""
MAX_SCANNED = 500
"""Maximum number of waiting rows per claim."""


class Leased:
    """Columns of a row with a lease."""

    noun: ClassVar[str]
    """Name of a row in messages."""
    lease_time: ClassVar[timedelta] = LEASE

    seq: Mapped[int]
    id: Mapped[str]
    lease: Mapped[str | None]
    """Token of the holder."""
    lease_ends: Mapped[datetime | None]
    """Time at which the lease expires unless renewed."""

    def release(self, session: Session, message: str) -> None:
        """Release the row for another process, with the reason ``message``."""
        self.lease = self.lease_ends = None
        session.flush()


class TakesTurns(Leased):
    """Columns of work that accounts share fairly."""

    account: Mapped[str] = mapped_column(index=True)
    turn: Mapped[int] = mapped_column(default=0)
    """Order among works of equal priority, lowest first."""

    @classmethod
    def is_unfinished(cls) -> ColumnElement[bool]:
        """Return the condition of unfinished rows: all rows, if a row is deleted at the end of its
        work."""
        return true()


class BackgroundWork(TakesTurns):
    """Columns of background work with the server's own models."""

    lease_time: ClassVar[timedelta] = timedelta(seconds=60)
    ended: ClassVar[tuple[str, ...]]
    """Values of ``status`` of finished work."""

    caller: Mapped[dict[str, Any]]
    """Client that created the work: ``account`` and ``user``. The client's current rights apply."""
    status: Mapped[str] = mapped_column(index=True)
    created: Mapped[datetime] = mapped_column(default=now)

    @classmethod
    def is_unfinished(cls) -> ColumnElement[bool]:
        """See :meth:`TakesTurns.is_unfinished`."""
        return cls.status.not_in(cls.ended)


class QueuedWork(TakesTurns):
    """Columns of work with a process from the scheduler."""

    memory_advice: ClassVar[str] = "use a smaller model, or a server with more memory."
    """Advice for work that needs too much memory."""
    unknown_memory: ClassVar[int] = 0
    """Bytes to reserve while the memory of a row is unknown."""

    priority: Mapped[int] = mapped_column(default=0)
    """Higher priorities start first."""
    since: Mapped[datetime]
    """Start of the wait."""
    memory: Mapped[int] = mapped_column(BigInteger, default=0)
    """Estimated peak in bytes; 0 if unknown."""
    cores: Mapped[int] = mapped_column(default=0)
    crashes: Mapped[int] = mapped_column(default=0)
    """Number of dead workers."""
    worker: Mapped[dict[str, Any] | None]
    """Process of the worker.

    ``host``, ``pid``, start time (``born``), and the number of ``processes`` if several share the
    work.
    """

    @classmethod
    def ready(cls) -> tuple[ColumnElement[bool], ...]:
        """Return additional conditions of rows that may start."""
        return ()

    @classmethod
    def order(cls) -> tuple[ColumnElement[Any], ...]:
        """Return the order of waiting rows: by priority, then by turns of the accounts."""
        return cls.priority.desc(), cls.turn.asc(), cls.seq.asc()

    def start(self, session: Session, lease: str, worker: Mapping[str, Any]) -> None:
        """Give the lease to ``worker``."""
        self.lease, self.lease_ends, self.worker = lease, now() + self.lease_time, dict(worker)
        session.flush()

    def release(self, session: Session, message: str) -> None:
        """Release the row for another process, with the reason ``message``."""
        self.worker = None
        super().release(session, message)

    def expire(self, session: Session, why: str, cause: str = "") -> str:
        """Expire the lease of a dead worker and return the new state for the log.

        ``why`` states how the worker ended. ``cause`` is a sentence about the reason, or empty.
        Kinds of work that fail after several deaths override this method.
        """
        self.crashes += 1
        self.release(session, why)
        return "another worker goes on"

    @property
    def processes(self) -> int:
        """Number of processes that share the work."""
        return int((self.worker or {}).get("processes", 1))

    @classmethod
    def needs(cls, memory: int, cores: int, processes: int) -> tuple[int, int]:
        """Return the bytes and threads that a work of ``processes`` processes reserves.

        Each process stores the whole network. The processes share the threads, at least one thread
        each.
        """
        least = processes if processes > 1 else 0
        return (memory or cls.unknown_memory) * processes, max(cores, least)

    @property
    def needed_memory(self) -> int:
        """Reserved bytes."""
        return self.needs(self.memory, self.cores, self.processes)[0]

    @property
    def needed_cores(self) -> int:
        """Reserved threads."""
        return self.needs(self.memory, self.cores, self.processes)[1]


Row = TypeVar("Row", bound=Leased)
Work = TypeVar("Work", bound=QueuedWork)
Background = TypeVar("Background", bound=BackgroundWork)


def lock_claims(session: Session) -> None:
    """Lock claims until the transaction ends. SQLite allows one writer at a time anyway."""
    lock_by_name(session, "claim")


def claim(
    session: Session,
    kind: type[Work],
    worker: Mapping[str, Any],
    free_memory: int,
    free_cores: int = 0,
    *,
    idle: bool = False,
) -> Work | None:
    """Lease the first work that fits, in the order of :meth:`QueuedWork.order`.

    Args:
        session: session of a write transaction.
        kind: table of the work.
        worker: process that owns the lease until the worker has started.
        free_memory: free bytes.
        free_cores: free threads.
        idle: whether the machine is idle. On an idle machine, work that does not fit starts anyway
            and fails with its own message.
    """
    lock_claims(session)
    processes = worker.get("processes", 1)
    waiting = select(kind.seq, kind.memory, kind.cores, kind.since)
    waiting = waiting.where(kind.lease.is_(None), *kind.ready())
    in_turn = waiting.order_by(*kind.order()).limit(MAX_SCANNED)
    for row in session.execute(in_turn).all():
        need, cores = kind.needs(row.memory, row.cores, processes)
        if not (idle or (need <= free_memory and cores <= max(free_cores, 0))):
            # Small works would otherwise overtake a large work forever. After a while the large
            # work blocks the queue until its memory is free.
            if now() - row.since > PATIENCE:
                return None
            continue
        taken = select(kind).where(kind.seq == row.seq, kind.lease.is_(None), *kind.ready())
        # Skip a row that another transaction changes now, such as a stop of the job.
        found: Work | None = session.scalars(taken.with_for_update(skip_locked=True)).first()
        if found is not None:
            found.start(session, secrets.token_hex(16), worker)
            return found
    return None


def next_turn(
    session: Session, kind: type[TakesTurns], account: str, *conditions: ColumnElement[bool]
) -> int:
    """Return the turn of new work: after the account's last turn, or the lowest turn of all
    accounts.

    An account without work waits for at most one work of every account with work (start-time fair
    queueing, Goyal, Vin and Cheng 1996, with equal shares). ``conditions`` are the conditions of rows
    that count; by default unfinished rows.
    """
    conditions = conditions or (kind.is_unfinished(),)
    lowest = select(func.min(kind.turn)).where(*conditions)
    last = select(func.max(kind.turn)).where(kind.account == account, *conditions)
    own, others = session.scalar(last), session.scalar(lowest)
    # A new account starts at the lowest turn, and not at 0: with 0 it would run before all works of
    # accounts that have waited for hours.
    return int(others or 0) if own is None else int(own) + 1


def in_flight(session: Session, kind: type[TakesTurns], account: str) -> int:
    """Return the number of unfinished works of an account."""
    return count_rows(session, kind.account == account, kind.is_unfinished())


def has_unfinished(session: Session, kind: type[TakesTurns], row_id: str) -> bool:
    """Return whether a row of this id exists and is unfinished."""
    found = select(kind.seq).where(kind.id == row_id, kind.is_unfinished())
    return session.scalar(found) is not None


def leases(session: Session, kind: type[BackgroundWork]) -> list[tuple[str, datetime | None]]:
    """Return the ids of leased rows and the ends of their leases."""
    query = select(kind.id, kind.lease_ends).where(kind.is_unfinished(), kind.lease.is_not(None))
    return [(row_id, ends) for row_id, ends in session.execute(query)]


def claim_next(
    session: Session,
    kind: type[Background],
    token: str,
    silent: Iterable[tuple[str, datetime | None]] = (),
) -> Background | None:
    """Lease the next free row, by turns of the accounts, with the lease ``token``.

    ``silent`` are expired leases from :func:`leases` to replace unless renewed since. The end of a
    lease is not compared with a clock, because the clocks of two servers may differ.
    """
    # The lease must still end at the time that was seen: a renewal between both transactions keeps
    # it.
    lost = [and_(kind.id == row_id, kind.lease_ends == ends) for row_id, ends in silent]
    free = or_(kind.lease.is_(None), *lost)
    waiting = select(kind).where(kind.is_unfinished(), free)
    first = waiting.order_by(kind.turn, kind.seq).limit(1)
    row: Background | None = session.scalar(first.with_for_update(skip_locked=True))
    if row is not None:
        row.lease, row.lease_ends = token, now() + row.lease_time
    return row


def yield_turn(session: Session, kind: type[Background], row_id: str, lease: str) -> bool:
    """Move the row behind the next waiting row of each account. Returns False without a waiting
    row.

    Raises:
        LeaseLost: as :func:`lock_leased`.
    """
    row = lock_leased(session, kind, row_id, lease)
    firsts = (
        select(func.min(kind.turn).label("turn"))
        .where(kind.is_unfinished(), kind.lease.is_(None), kind.account != row.account)
        .group_by(kind.account)
        .subquery()
    )
    last = session.scalar(select(func.max(firsts.c.turn)))
    if last is None:
        return False
    row.turn = max(row.turn, int(last)) + 1
    return True


def leased_rows(session: Session, kind: type[Row]) -> list[Row]:
    """Return all leased rows."""
    return list(session.scalars(select(kind).where(kind.lease.is_not(None)).order_by(kind.seq)))


def read_leased(
    session: Session, kind: type[Row], row_id: str, lease: str, *, lock: bool = False
) -> Row:
    """Return the row with ``lease``; ``lock`` locks the row until the transaction ends."""
    held = select(kind).where(kind.id == row_id, kind.lease == lease)
    row = find_row(session, held, lock=lock)
    if row is None:
        raise LeaseLost(f"the lease of {kind.noun} {row_id} is lost")
    return row


def lock_leased(session: Session, kind: type[Row], row_id: str, lease: str) -> Row:
    """Return the row with ``lease``, locked; raises like :func:`read_leased`."""
    return read_leased(session, kind, row_id, lease, lock=True)


def renew(session: Session, kind: type[Row], row_id: str, lease: str) -> Row:
    """Renew the lease and return the row; raises like :func:`lock_leased`."""
    row = lock_leased(session, kind, row_id, lease)
    row.lease_ends = now() + row.lease_time
    return row


def release(
    session: Session, kind: type[Leased], row_id: str, lease: str, message: str = ""
) -> None:
    """Release the row for another process with a reason; raises like :func:`lock_leased`."""
    lock_leased(session, kind, row_id, lease).release(session, message)


def expire(
    session: Session, kind: type[QueuedWork], row_id: str, lease: str, why: str, cause: str = ""
) -> str:
    """Expire the lease of a dead worker; see :meth:`QueuedWork.expire`."""
    return lock_leased(session, kind, row_id, lease).expire(session, why, cause)


def log_file(work: str) -> Path:
    """Return the path of the log of a work."""
    return luthier_home() / "jobs" / f"{work}.log"


class LeaseWatch:
    """Detector of leases without renewal, by the clock of this process.

    Only a change of ``lease_ends`` counts, not its value: a changed system clock neither kills a
    living worker nor preserves the lease of a dead worker.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.clock = seconds, clock
        self._seen: dict[str, tuple[object, float]] = {}

    def is_silent(self, lease: str, ends: object) -> bool:
        """Return whether ``ends`` of this lease has not changed for too long."""
        before, since = self._seen.get(lease, (None, 0.0))
        if before != ends:
            self._seen[lease] = (ends, self.clock())
            return False
        return self.clock() - since > self.seconds

    def forget_except(self, leases: Collection[str]) -> None:
        """Forget all leases except ``leases``."""
        self._seen = {lease: seen for lease, seen in self._seen.items() if lease in leases}
