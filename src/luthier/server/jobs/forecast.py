"""Positions and expected starts of waiting jobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from luthier.server.jobs.admission import Capacity
from luthier.server.jobs.runners import rows_here, unused_capacity
from luthier.server.tables.database import now
from luthier.server.tables.jobs import QUEUED, RUNNING, Job
from luthier.server.tables.queue import MAX_SCANNED, PATIENCE, QueuedWork


@dataclass(frozen=True)
class QueuePlace:
    """Place of a waiting job in the queue."""

    position: int
    """Position among the waiting jobs of all accounts, from 1."""
    expected_start: datetime | None = None
    """None if the start does not follow from the ends of running work."""


def queue_places(
    session: Session, capacity: Capacity | None, processes: int = 1
) -> dict[str, QueuePlace]:
    """Return the places of the first :data:`~luthier.server.tables.queue.MAX_SCANNED` waiting jobs.

    Args:
        session: session of a read transaction.
        capacity: resources of this machine; None if jobs run on other machines.
        processes: number of processes per job.
    """
    queued = select(Job).where(Job.state == QUEUED, Job.lease.is_(None))
    waiting = session.scalars(queued.order_by(*Job.order()).limit(MAX_SCANNED)).all()
    starts = {}
    if waiting and capacity is not None:
        starts = _expected_starts(waiting, rows_here(session), capacity, processes)
    return {
        job.id: QueuePlace(position, starts.get(job.id))
        for position, job in enumerate(waiting, start=1)
    }


def _expected_starts(
    waiting: Sequence[Job], running: Sequence[QueuedWork], capacity: Capacity, processes: int
) -> dict[str, datetime]:
    """Return the starts that follow from the estimated ends of ``running``, by job id.

    Each end frees resources, and claims follow as in :func:`luthier.server.tables.queue.claim`. The
    duration of a waiting job is unknown, so a job that starts keeps its resources.
    """
    starts: dict[str, datetime] = {}
    present, free = now(), unused_capacity(capacity, running)
    memory, cores, at_work = free.memory, free.cores, len(running)
    ends = [(end, row) for row in running if (end := _end_of(row, present)) is not None]
    left = [job for job in waiting if job.memory]
    for moment, ended in [(present, None), *sorted(ends, key=lambda pair: pair[0])]:
        if ended is not None:
            memory, cores, at_work = (
                memory + ended.needed_memory,
                cores + ended.needed_cores,
                at_work - 1,
            )
        for job in tuple(left):
            need, threads = Job.needs(job.memory, job.cores, processes)
            if not at_work or (need <= memory and threads <= max(cores, 0)):
                left.remove(job)
                memory, cores, at_work = memory - need, cores - threads, at_work + 1
                # A job that fits at present waits for another reason, such as a full disk.
                if moment > present:
                    starts[job.id] = moment
            elif moment - job.since > PATIENCE:
                break
    return starts


def _end_of(row: QueuedWork, present: datetime) -> datetime | None:
    """Return the estimated end of a leased work; None if unknown."""
    if not isinstance(row, Job):
        return None
    if row.state != RUNNING:
        return present  # the worker of a paused or stopped job ends soon
    return max(present, row.estimated_finish) if row.estimated_finish else None
