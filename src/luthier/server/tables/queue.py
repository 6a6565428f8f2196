"""The queue of leased work: what waits, and who works on what.

Each kind of work is a table with the columns of :class:`QueuedWork`. A worker holds a row by the token
of its lease, and writes only with it. One that is not heard from is taken for dead: its lease is taken
away, and another one goes on. Whatever the old one still writes is refused
(:class:`~luthier.errors.LeaseLost`).
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
"""How long a worker is believed alive after it was last heard from."""
PATIENCE = timedelta(minutes=10)
"""How long work that does not fit now is overtaken by smaller work."""
LOOKED_AT = 500
"""Waiting rows of which one is started, each second: however many wait behind them."""


class Leased:
    """Columns of a row that one process at a time works on."""

    noun: ClassVar[str]
    """What a row is called in messages."""
    lease_time: ClassVar[timedelta] = LEASE

    seq: Mapped[int]
    id: Mapped[str]
    lease: Mapped[str | None]
    """Token of who holds it; what anybody else writes is refused."""
    lease_ends: Mapped[datetime | None]
    """The holder is taken for dead after this moment, unless it has been heard from."""

    def give_back(self, session: Session, message: str) -> None:
        """Let somebody else go on with it; ``message`` says why."""
        self.lease = self.lease_ends = None
        session.flush()


class TakesTurns(Leased):
    """Columns of work that accounts take turns with."""

    account: Mapped[str] = mapped_column(index=True)
    turn: Mapped[int] = mapped_column(default=0)
    """Lower ones are first, of one priority; those of an account have turns one after the other."""

    @classmethod
    def is_unfinished(cls) -> ColumnElement[bool]:
        """What holds of rows whose work has not ended; all of them, where its end deletes a row."""
        return true()


class BackgroundWork(TakesTurns):
    """Columns of work that servers do themselves, in the background, as their models answer for it."""

    lease_time: ClassVar[timedelta] = timedelta(seconds=60)
    """How long a server may be silent before another one goes on."""
    ended: ClassVar[tuple[str, ...]]
    """Values of ``status`` of work that is over."""

    caller: Mapped[dict[str, Any]]
    """Who asked: ``account``, ``user``, whether by a ``bearer`` key, and the ``session`` of temporary
    credentials. Models answer with the rights that the user has when their turn comes."""
    status: Mapped[str] = mapped_column(index=True)
    created: Mapped[datetime]
    expires: Mapped[datetime]
    """When the work is given up, however much of it is done."""

    @classmethod
    def is_unfinished(cls) -> ColumnElement[bool]:
        """See :meth:`TakesTurns.is_unfinished`."""
        return cls.status.not_in(cls.ended)


class QueuedWork(TakesTurns):
    """Columns of work that a scheduler starts a process for."""

    memory_advice: ClassVar[str] = "use a smaller model, or a server with more memory."
    """Advice to a client whose work needs too much memory."""
    unknown_memory: ClassVar[int] = 0
    """Bytes that it counts for as long as its memory is 0."""

    priority: Mapped[int] = mapped_column(default=0)
    """Higher is started first."""
    since: Mapped[datetime]
    """Since when it waits."""
    memory: Mapped[int] = mapped_column(BigInteger, default=0)
    """Bytes that it takes at its peak, for admission; 0 while that is unknown."""
    cores: Mapped[int] = mapped_column(default=0)
    """Threads that it computes with, for admission."""
    crashes: Mapped[int] = mapped_column(default=0)
    """Workers that died over it."""
    worker: Mapped[dict[str, Any] | None]
    """The process that holds the lease: ``host``, ``pid``, when it was ``born``, and on how many
    ``processes`` it works, where these are several."""

    @classmethod
    def ready(cls) -> tuple[ColumnElement[bool], ...]:
        """What has to hold, beside that nobody holds it, for a row to be started."""
        return ()

    def start(self, session: Session, lease: str, worker: Mapping[str, Any]) -> None:
        """Let ``worker`` hold it by ``lease``."""
        self.lease, self.lease_ends, self.worker = lease, now() + self.lease_time, dict(worker)
        session.flush()

    def give_back(self, session: Session, message: str) -> None:
        """Let somebody else go on with it; ``message`` says why."""
        self.worker = None
        super().give_back(session, message)

    def expire(self, session: Session, why: str, cause: str = "") -> str:
        """Take the row from a worker that died, and return the new state for the server's log.

        ``why`` says how the worker ended. ``cause`` is a sentence about the reason, empty where
        nothing is known. Kinds of work that give up after several deaths override this method.
        """
        self.crashes += 1
        self.give_back(session, why)
        return "another worker goes on"

    @property
    def processes(self) -> int:
        """Among how many its worker shares the work."""
        return int((self.worker or {}).get("processes", 1))

    @classmethod
    def needs(cls, memory: int, cores: int, processes: int) -> tuple[int, int]:
        """Bytes and threads that such work counts for, shared among ``processes``.

        Each of several holds a whole network; they share the threads, and have one each at least.
        """
        least = processes if processes > 1 else 0
        return (memory or cls.unknown_memory) * processes, max(cores, least)

    @property
    def needed_memory(self) -> int:
        """Bytes that it counts for now."""
        return self.needs(self.memory, self.cores, self.processes)[0]

    @property
    def needed_cores(self) -> int:
        """Threads that it counts for now."""
        return self.needs(self.memory, self.cores, self.processes)[1]


Row = TypeVar("Row", bound=Leased)
Work = TypeVar("Work", bound=QueuedWork)
Background = TypeVar("Background", bound=BackgroundWork)


def lock_claims(session: Session) -> None:
    """Keep every other server from claiming until the transaction ends, on PostgreSQL; SQLite does."""
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
    """Take the next work of a kind that fits: by priority, then by turns of the accounts.

    Args:
        session: one that writes.
        kind: its table.
        worker: the process that holds the lease until the worker itself is there; its ``processes``
            are those that the work would be shared among.
        free_memory: bytes that it may take.
        free_cores: threads that it may run.
        idle: nothing else runs on this machine: what does not fit is not going to fit later, and
            says so itself.
    """
    lock_claims(session)
    processes = worker.get("processes", 1)
    waiting = select(kind.seq, kind.memory, kind.cores, kind.since)
    waiting = waiting.where(kind.lease.is_(None), *kind.ready())
    in_turn = waiting.order_by(kind.priority.desc(), kind.turn, kind.seq).limit(LOOKED_AT)
    for row in session.execute(in_turn).all():
        need, cores = kind.needs(row.memory, row.cores, processes)
        if not (idle or (need <= free_memory and cores <= max(free_cores, 0))):
            if now() - row.since > PATIENCE:
                return None
            continue
        taken = select(kind).where(kind.seq == row.seq, kind.lease.is_(None), *kind.ready())
        # A row that somebody changes now, such as by stopping a job, is passed over.
        found: Work | None = session.scalars(taken.with_for_update(skip_locked=True)).first()
        if found is not None:
            found.start(session, secrets.token_hex(16), worker)
            return found
    return None


def next_turn(
    session: Session, kind: type[TakesTurns], account: str, *going_on: ColumnElement[bool]
) -> int:
    """The turn after the last one of ``account``; where it has none, the one the others are at.

    So an account that asks for one thing waits for one of each other account at most, however many
    those asked for before (start-time fair queueing, Goyal, Vin and Cheng 1996, with equal shares).
    ``going_on`` is what holds of work that takes part, where that is not all that has not ended.
    """
    going_on = going_on or (kind.is_unfinished(),)
    lowest = select(func.min(kind.turn)).where(*going_on)
    last = select(func.max(kind.turn)).where(kind.account == account, *going_on)
    own, others = session.scalar(last), session.scalar(lowest)
    return int(others or 0) if own is None else int(own) + 1


def in_flight(session: Session, kind: type[TakesTurns], account: str) -> int:
    """How much work of an account has not ended."""
    return count_rows(session, kind.account == account, kind.is_unfinished())


def has_unfinished(session: Session, kind: type[TakesTurns], row_id: str) -> bool:
    """Whether there is anything to do for the row of this id, if there is one."""
    found = select(kind.seq).where(kind.id == row_id, kind.is_unfinished())
    return session.scalar(found) is not None


def leases(session: Session, kind: type[BackgroundWork]) -> list[tuple[str, datetime | None]]:
    """Ids of the rows that servers work on, each with what its lease says of its end."""
    query = select(kind.id, kind.lease_ends).where(kind.is_unfinished(), kind.lease.is_not(None))
    return [(row_id, ends) for row_id, ends in session.execute(query)]


def claim_next(
    session: Session,
    kind: type[Background],
    token: str,
    silent: Iterable[tuple[str, datetime | None]] = (),
) -> Background | None:
    """The next row that nobody works on, by turns of the accounts, now held by ``token``.

    ``silent`` are those of :func:`leases` that are taken from their servers, unless one was heard from
    since. No end of a lease is compared with a clock: those of two servers may be an hour apart.
    """
    lost = [and_(kind.id == row_id, kind.lease_ends == ends) for row_id, ends in silent]
    free = or_(kind.lease.is_(None), *lost)
    waiting = select(kind).where(kind.is_unfinished(), free)
    first = waiting.order_by(kind.turn, kind.seq).limit(1)
    row: Background | None = session.scalar(first.with_for_update(skip_locked=True))
    if row is not None:
        row.lease, row.lease_ends = token, now() + row.lease_time
    return row


def give_way(session: Session, kind: type[Background], row_id: str, lease: str) -> bool:
    """Put the row behind the next waiting one of each other account; whether there is one.

    Raises:
        LeaseLost: as :func:`hold`.
    """
    row = hold(session, kind, row_id, lease)
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
    """Every row that somebody holds."""
    return list(session.scalars(select(kind).where(kind.lease.is_not(None)).order_by(kind.seq)))


def read_leased(
    session: Session, kind: type[Row], row_id: str, lease: str, *, lock: bool = False
) -> Row:
    """The row as it stands now; with ``lock`` it stays so until the transaction ends.

    Raises:
        LeaseLost: where ``lease`` does not hold it.
    """
    held = select(kind).where(kind.id == row_id, kind.lease == lease)
    row = find_row(session, held, lock=lock)
    if row is None:
        raise LeaseLost(f"the lease of {kind.noun} {row_id} is lost")
    return row


def hold(session: Session, kind: type[Row], row_id: str, lease: str) -> Row:
    """The row, kept as it is until the transaction ends.

    Raises:
        LeaseLost: as :func:`read_leased`.
    """
    return read_leased(session, kind, row_id, lease, lock=True)


def renew(session: Session, kind: type[Row], row_id: str, lease: str) -> Row:
    """Hear from the holder: it is believed alive for longer.

    Raises:
        LeaseLost: as :func:`hold`.
    """
    row = hold(session, kind, row_id, lease)
    row.lease_ends = now() + row.lease_time
    return row


def release(
    session: Session, kind: type[Leased], row_id: str, lease: str, message: str = ""
) -> None:
    """Let somebody else go on with it; ``message`` says why.

    Raises:
        LeaseLost: as :func:`hold`.
    """
    hold(session, kind, row_id, lease).give_back(session, message)


def expire(
    session: Session, kind: type[QueuedWork], row_id: str, lease: str, why: str, cause: str = ""
) -> str:
    """Take a row from a worker that died; see :meth:`QueuedWork.expire`.

    Raises:
        LeaseLost: as :func:`hold`.
    """
    return hold(session, kind, row_id, lease).expire(session, why, cause)


def log_file(work: str) -> Path:
    """What the workers of a job print, by its id; of an import, by the name of its files."""
    return luthier_home() / "jobs" / f"{work}.log"


class LeaseWatch:
    """Tells which leases are no longer renewed, by this process's own clock.

    Whether ``lease_ends`` changes is what counts, not what it says: a clock that is set forward makes
    no worker look dead, and one that is set back keeps no dead one alive.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.clock = seconds, clock
        self._seen: dict[str, tuple[object, float]] = {}

    def silent(self, lease: str, ends: object) -> bool:
        """Whether ``ends`` of this lease has been the same for too long."""
        before, since = self._seen.get(lease, (None, 0.0))
        if before != ends:
            self._seen[lease] = (ends, self.clock())
            return False
        return self.clock() - since > self.seconds

    def forget_others(self, leases: Collection[str]) -> None:
        """Drop what is known of all but these ``leases``."""
        self._seen = {lease: seen for lease, seen in self._seen.items() if lease in leases}
