"""Job runners: machines for worker processes, and the free capacity of the machines.

Leases, heartbeats, events and ends of jobs are in the database and do not depend on the runner. A
runner reports free capacity and builds the command of the server's child process for a worker. The
child process lives as long as the worker and ends with the worker's exit status.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sqlalchemy.orm import Session

from luthier.errors import RefusedInput
from luthier.plugins import PluginTable
from luthier.server.jobs import processes
from luthier.server.jobs.admission import Capacity
from luthier.server.jobs.kinds import WORK_KINDS, WorkKind
from luthier.server.tables import queue
from luthier.server.tables.database import Database
from luthier.server.tables.queue import QueuedWork


@dataclass(frozen=True)
class FreeCapacity:
    """The unused part of a capacity."""

    memory: int
    cores: int
    at_work: Counter[type[QueuedWork]]
    """Number of running works by table class."""

    @property
    def idle(self) -> bool:
        """Whether the machine runs no work."""
        return not self.at_work


class Runner:
    """Workers as child processes of the server. Subclasses run workers on other machines."""

    def check(self, database: Database) -> None:
        """Raise :class:`RefusedInput` if no job could run, before the server starts."""

    def refresh(self) -> None:
        """Query the free capacity of other machines, before a transaction begins.

        Raises:
            LuthierError: if the machines do not answer.
        """

    def free(self, session: Session, capacity: Capacity) -> Sequence[FreeCapacity]:
        """Return the free capacity of each machine; an empty sequence if no worker may start now.

        No other server claims work before the transaction ends. ``capacity`` belongs to this machine.
        """
        return [free(session, capacity)]

    def command(self, worker: Sequence[str], kind: WorkKind, row: QueuedWork) -> list[str]:
        """Return the command of the server's child process for the command ``worker``."""
        return list(worker)


@dataclass(frozen=True)
class RunnerEntry:
    """A job runner by the name in ``luthier serve --runner``."""

    id: str
    open: Callable[[str, float], Runner]
    """Constructor from the machines' address and the number of GPUs per worker."""


RUNNERS: PluginTable[RunnerEntry] = PluginTable(
    "runners", RunnerEntry, {"local": RunnerEntry("local", lambda address, gpus: Runner())}
)


def open_runner(name: str, address: str | None, gpus: float) -> Runner:
    """Return the job runner called ``name``.

    Raises:
        RefusedInput: for an unknown name, or options that the runner rejects.
    """
    if name not in RUNNERS:
        raise RefusedInput(f"--runner {name} is unknown. Choose one of {', '.join(RUNNERS)}")
    if name == "local" and (address is not None or gpus):
        raise RefusedInput("--ray-address and --ray-gpus need a runner: add --runner ray")
    return RUNNERS[name].open(address or "", gpus)


def free(session: Session, capacity: Capacity, ignored: str | None = None) -> FreeCapacity:
    """Return the unused part of ``capacity`` on this machine.

    No other server claims work before the transaction ends. ``ignored`` is the id of a work to ignore.
    """
    queue.lock_claims(session)
    return unused_capacity(capacity, [row for row in rows_here(session) if row.id != ignored])


def unused_capacity(capacity: Capacity, rows: Sequence[QueuedWork]) -> FreeCapacity:
    """Return the part of ``capacity`` that the works ``rows`` leave."""
    memory = capacity.memory - sum(row.needed_memory for row in rows)
    cores = capacity.cores - sum(row.needed_cores for row in rows)
    return FreeCapacity(memory, cores, Counter(type(row) for row in rows))


def rows_here(session: Session) -> list[QueuedWork]:
    """Return the leased work of this machine, including work without a recorded worker."""
    return [
        row for row in _leased_rows(session) if row.worker is None or processes.is_here(row.worker)
    ]


def claimed_rows(session: Session) -> list[QueuedWork]:
    """Return the leased work of all kinds, and lock claims until the transaction ends."""
    queue.lock_claims(session)
    return _leased_rows(session)


def _leased_rows(session: Session) -> list[QueuedWork]:
    return [row for kind in WORK_KINDS.values() for row in queue.leased_rows(session, kind.table)]
