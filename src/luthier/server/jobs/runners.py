"""Where the processes of workers run, and how much more fits there.

All else about leased work is in the database, and the same for every runner: leases, heartbeats, what
is asked of a job meanwhile, its events and its end. A runner only says what room there is, and which
child process of the server stands for a worker: it lives as long as the worker does and ends as it did.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy.orm import Session

from luthier.server.jobs import processes
from luthier.server.jobs.admission import Capacity
from luthier.server.jobs.kinds import WORK_KINDS, WorkKind
from luthier.server.tables import queue
from luthier.server.tables.queue import QueuedWork


@dataclass(frozen=True)
class FreeCapacity:
    """What is left of a capacity."""

    memory: int
    cores: int
    at_work: Counter[type[QueuedWork]]
    """How much of each kind goes on here."""

    @property
    def idle(self) -> bool:
        """Whether nothing goes on here."""
        return not self.at_work


class Runner(ABC):
    """Where workers run."""

    @abstractmethod
    def refresh(self) -> None:
        """Find out what room there is, where others have to be asked: before a transaction begins.

        Raises:
            LuthierError: they do not answer.
        """

    @abstractmethod
    def free(self, session: Session, capacity: Capacity) -> Sequence[FreeCapacity]:
        """What is free for the next worker, one member for each machine; none where none may start.

        No other server claims anything before the transaction ends. ``capacity`` is this machine's.
        """

    @abstractmethod
    def command(self, worker: Sequence[str], kind: WorkKind, row: QueuedWork) -> list[str]:
        """The command line of the child process that stands for ``worker``, the worker's own."""


class LocalRunner(Runner):
    """Workers are child processes of the server, on its machine."""

    def refresh(self) -> None:
        """Nobody is to be asked."""

    def free(self, session: Session, capacity: Capacity) -> Sequence[FreeCapacity]:
        """See :class:`Runner`."""
        return [free(session, capacity)]

    def command(self, worker: Sequence[str], kind: WorkKind, row: QueuedWork) -> list[str]:
        """See :class:`Runner`."""
        return list(worker)


def free(session: Session, capacity: Capacity, but: str | None = None) -> FreeCapacity:
    """What work of all kinds on this machine leaves of ``capacity``.

    No other server claims anything before the transaction ends, so that what is claimed in it was free.
    ``but`` is the id of work that is not counted.
    """
    rows = [
        row
        for row in claimed_rows(session)
        # Of one without a worker nothing is known: it may be here.
        if row.id != but and (row.worker is None or processes.is_here(row.worker))
    ]
    memory = capacity.memory - sum(row.needed_memory for row in rows)
    cores = capacity.cores - sum(row.needed_cores for row in rows)
    return FreeCapacity(memory, cores, Counter(type(row) for row in rows))


def claimed_rows(session: Session) -> list[QueuedWork]:
    """What is worked on, of all kinds, and stays so until the transaction ends: others wait."""
    queue.lock_claims(session)
    return [row for kind in WORK_KINDS.values() for row in queue.leased_rows(session, kind.table)]
