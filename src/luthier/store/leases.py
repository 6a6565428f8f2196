"""Who works on which job: a worker holds a job by the token of its lease, and writes only with it.

A worker that is not heard from is taken for dead: its lease is taken away, and the job is queued
again. Whatever the old worker still writes is refused (:class:`~luthier.errors.LeaseLost`).
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from luthier.errors import LeaseLost
from luthier.limits import AccountQuotas
from luthier.store import storage
from luthier.store.accounts import quotas_of
from luthier.store.custom_models import ACTIVE, RESERVED, CustomModel
from luthier.store.database import lock_by_name, now
from luthier.store.jobs import (
    COMPLETED,
    FAILED,
    QUEUED,
    RUNNING,
    STOPPED,
    STOPPING,
    Job,
    move,
    record,
)
from luthier.store.usage import Used, add_usage

LEASE = timedelta(seconds=30)
"""How long a worker is believed alive after it was last heard from."""
MOST_CRASHES = 25
"""So many workers may die one after the other without a step between them."""
PATIENCE = timedelta(minutes=10)
"""How long a job or an import that does not fit now is overtaken by smaller ones."""


@dataclass(frozen=True)
class Waiting:
    """A job, or an import, that has waited for memory for longer than ``PATIENCE``."""

    since: datetime
    memory: int
    """Bytes that those who came later have to leave it."""


def fits(
    need: int, since: datetime, free_memory: int, idle: bool, before: Waiting | None = None
) -> bool:
    """Whether ``need`` bytes may be given to what waits since ``since``.

    ``idle`` and ``before`` are those of :func:`claim`.
    """
    if before is not None and before.since < since:
        return need <= free_memory - before.memory
    return idle or need <= free_memory


def alone(session: Session) -> None:
    """Keep every other server from claiming until the transaction ends, on PostgreSQL; SQLite does."""
    lock_by_name(session, "claim")


def claim(
    session: Session,
    worker: Mapping[str, Any],
    free_memory: int,
    free_cores: int,
    *,
    idle: bool = False,
    per_account: int | None = None,
    passed_over: Collection[str] = (),
    before: Waiting | None = None,
) -> Job | None:
    """Take the next job that fits: by priority, then by turns of the accounts; ``None`` for none.

    Those whose memory is not estimated yet wait for that.

    Args:
        worker: the process that holds the lease until the worker itself is there.
        free_memory: bytes that a job may take.
        free_cores: threads that it may run.
        idle: nothing else runs on this machine: what does not fit is not going to fit later, and
            says so itself.
        per_account: jobs of one account at once.
        passed_over: ids of jobs that are not to be started now.
        before: an import that waits for memory; jobs that came later leave it what it needs.
    """
    alone(session)
    for row in _queued(session, per_account):
        if row.id in passed_over:
            continue
        small = idle or row.cores <= free_cores
        if not (small and fits(row.memory, row.modified, free_memory, idle, before)):
            if now() - row.modified > PATIENCE:
                return None
            continue
        taken = select(Job).where(Job.id == row.id, Job.state == QUEUED, Job.lease.is_(None))
        # A row that somebody stops or pauses now is passed over.
        job = session.scalars(taken.with_for_update(skip_locked=True)).first()
        if job is not None:
            return _leased(session, job, worker)
    return None


def overdue(session: Session, per_account: int | None = None) -> Waiting | None:
    """The next job, where it has waited for longer than ``PATIENCE``; see :func:`claim`."""
    late = (row for row in _queued(session, per_account) if now() - row.modified > PATIENCE)
    row = next(late, None)
    return None if row is None else Waiting(row.modified, row.memory)


def _queued(session: Session, per_account: int | None) -> Iterator[Any]:
    """Jobs that may be started, in their order: of accounts that have not as many as they may have."""
    busy = _running(session) if per_account is not None else {}
    waiting = select(Job.id, Job.account, Job.memory, Job.cores, Job.modified)
    waiting = waiting.where(Job.state == QUEUED, Job.lease.is_(None), Job.memory > 0)
    for row in session.execute(waiting.order_by(Job.priority.desc(), Job.turn, Job.seq)):
        if per_account is None or busy.get(row.account, 0) < per_account:
            yield row


def _running(session: Session) -> dict[str, int]:
    """How many jobs of each account are held by a worker."""
    counted = select(Job.account, func.count()).where(Job.lease.is_not(None)).group_by(Job.account)
    return {row[0]: row[1] for row in session.execute(counted)}


def _leased(session: Session, job: Job, worker: Mapping[str, Any]) -> Job:
    again = " to go on with it" if job.attempts else ""
    moment = now()
    return move(
        session,
        job,
        RUNNING,
        f"A worker is started{again}.",
        attempts=job.attempts + 1,
        lease=secrets.token_hex(16),
        lease_ends=moment + LEASE,
        littered=True,
        started=job.started or moment,
        worker=dict(worker),
    )


def held(session: Session) -> list[Job]:
    """Every job that a worker holds."""
    return list(session.scalars(select(Job).where(Job.lease.is_not(None)).order_by(Job.seq)))


def holding(session: Session, job_id: str, lease: str) -> Job:
    """The job, kept as it is until the transaction ends.

    Raises:
        LeaseLost: where ``lease`` does not hold it.
    """
    found = select(Job).where(Job.id == job_id, Job.lease == lease).with_for_update()
    job = session.scalars(found.execution_options(populate_existing=True)).first()
    if job is None:
        raise LeaseLost(f"the lease of job {job_id} is lost")
    return job


def renew(
    session: Session,
    job_id: str,
    lease: str,
    *,
    worked: float | None = None,
    worker: Mapping[str, Any] | None = None,
    **details: Any,
) -> Job:
    """Hear from the worker: the lease is longer, ``details`` are noted. The job, for its state.

    Raises:
        LeaseLost: as :func:`holding`.
    """
    job = holding(session, job_id, lease)
    job.lease_ends = now() + LEASE
    if worked is not None:
        seconds = max(0.0, worked - job.worked)
        used = Used(training_seconds=seconds)
        add_usage(session, {(now().date(), job.account, ""): used})
        job.worked = worked
    if worker is not None:
        job.worker = dict(worker)
    if details:
        job.details = {**job.details, **details}
        job.modified = now()
    session.flush()
    return job


def release(session: Session, job_id: str, lease: str, message: str) -> Job:
    """Give a job back after a checkpoint: to the queue, or to where people wanted it meanwhile.

    Raises:
        LeaseLost: as :func:`holding`.
    """
    return _let_go(session, holding(session, job_id, lease), message)


def _let_go(session: Session, job: Job, message: str) -> Job:
    nobody: dict[str, Any] = {"lease": None, "lease_ends": None, "worker": None}
    token = job.lease
    if job.state == STOPPING:
        return move(session, job, STOPPED, "The job was stopped.", holder=token)
    if job.state == RUNNING:
        return move(session, job, QUEUED, message, holder=token, **nobody)
    # Paused, or paused and resumed: only its worker was still there.
    session.execute(update(Job).where(Job.id == job.id, Job.lease == token).values(**nobody))
    session.refresh(job)
    return job


def complete(
    session: Session,
    job_id: str,
    lease: str,
    result: Mapping[str, Any],
    stored_bytes: int = 0,
    defaults: AccountQuotas | None = None,
) -> Job:
    """End a job whose model is stored and verified: in one transaction the model is there, too.

    ``result["stored_id"]`` is the id under which the store opens it; it takes ``stored_bytes`` of the
    account's quota, which is that of ``defaults`` where it has none of its own.

    Raises:
        QuotaExceeded: where the account has no room for it.
        LeaseLost: as :func:`holding`.
        WrongState: where it was stopped or paused meanwhile.
    """
    job = holding(session, job_id, lease)
    move(session, job, COMPLETED, "The job is completed.", holder=lease, result=dict(result))
    made = update(CustomModel).where(CustomModel.job_id == job_id, CustomModel.status == RESERVED)
    stored = {"status": ACTIVE, "stored_id": result["stored_id"], "created": job.ended}
    session.execute(made.values(**stored, stored_bytes=stored_bytes))
    quotas = quotas_of(session, job.account, defaults or AccountQuotas())
    storage.charge(session, job.account, quotas, stored_bytes=stored_bytes)
    return job


def fail(session: Session, job_id: str, lease: str, failure: str) -> Job:
    """End a job that cannot be done; one that was being stopped is stopped.

    Raises:
        LeaseLost: as :func:`holding`.
    """
    job = holding(session, job_id, lease)
    if job.state == STOPPING:
        return move(session, job, STOPPED, "The job was stopped.", holder=lease)
    return move(session, job, FAILED, failure, holder=lease, failure=failure)


def expire(session: Session, job_id: str, lease: str, why: str) -> Job:
    """Take the lease from a worker that died; its job goes on with another one.

    It fails instead where too many died without a step between them.

    Raises:
        LeaseLost: where ``lease`` does not hold it any more.
    """
    job = holding(session, job_id, lease)
    if job.state != RUNNING:
        return _let_go(session, job, why)
    step = int(job.details.get("progress", {}).get("step", 0))
    job.crashes = 1 if step > int(job.details.get("crashed_at", -1)) else job.crashes + 1
    job.details = {**job.details, "crashed_at": step}
    session.flush()
    if job.crashes < MOST_CRASHES:
        record(session, job.id, "warning", f"{why}; the job goes on from its last checkpoint.")
        return _let_go(session, job, "The job is queued again.")
    failure = (
        f"{job.crashes} workers died one after the other at step {step} (the last one: {why}). "
        "Where this is the system's way to end what takes too much memory, choose a smaller batch, "
        "shorter rows or a smaller model."
    )
    return move(session, job, FAILED, failure, holder=lease, failure=failure)
