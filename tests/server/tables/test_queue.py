"""Order, leases and ends of jobs in the queue."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from job_rows import add_job

from luthier.errors import LeaseLost, WrongState
from luthier.server.tables import jobs, queue
from luthier.server.tables.custom_models import ACTIVE, CustomModel
from luthier.server.tables.database import Database, now
from luthier.server.tables.jobs import (
    COMPLETED,
    FAILED,
    PAUSED,
    QUEUED,
    RUNNING,
    STOPPED,
    STOPPING,
    Job,
    JobEvent,
)

WORKER = {"host": "here", "pid": 1, "born": 0.0}


def add(database: Database, name: str, **fields: Any) -> str:
    return add_job(database, name, **fields).id


def claim(
    database: Database, memory: int = 100, cores: int = 9, **how: Any
) -> tuple[str, str] | None:
    with database.write() as session:
        job = queue.claim(session, Job, WORKER, memory, cores, **how)
        return None if job is None else (job.id, str(job.lease))


def job_of(database: Database, job_id: str) -> Job:
    with database.read() as session:
        return session.query(Job).filter_by(id=job_id).one()


def put(database: Database, job_id: str, **fields: Any) -> None:
    with database.write() as session:
        session.query(Job).filter_by(id=job_id).update(fields)


def test_jobs_are_claimed_by_priority_then_age(database: Database) -> None:
    low = add(database, "low", priority=-1)
    first, second = add(database, "first"), add(database, "second")
    urgent = add(database, "urgent", priority=5)
    taken = [claim(database) for _ in range(5)]
    assert [each and each[0] for each in taken] == [urgent, first, second, low, None]
    job = job_of(database, first)
    assert (job.state, job.attempts, job.worker, job.has_working_files) == (
        RUNNING,
        1,
        WORKER,
        True,
    )
    assert job.started is not None and job.lease_ends is not None
    assert len({each[1] for each in taken if each}) == 4


def test_only_fitting_jobs_are_claimed(database: Database) -> None:
    large = add(database, "large", memory=500)
    wide = add(database, "wide", cores=64)
    small = add(database, "small", memory=50)
    assert claim(database) == (small, job_of(database, small).lease)
    assert claim(database) is None
    # An oversized job starts on an idle machine and reports the shortage itself.
    assert claim(database, idle=True)[0] == large  # type: ignore[index]
    assert claim(database, cores=64)[0] == wide  # type: ignore[index]


def test_large_job_is_not_overtaken_after_patience(database: Database) -> None:
    add(database, "large", memory=500, modified=now() - queue.PATIENCE - timedelta(seconds=1))
    add(database, "small", memory=50)
    assert claim(database) is None
    assert claim(database, memory=500) is not None
    assert claim(database) is not None


def test_leased_or_unqueued_jobs_are_not_claimed(database: Database) -> None:
    held = add(database, "held", lease="still there")
    for state in (PAUSED, STOPPING, STOPPED, COMPLETED, FAILED, RUNNING):
        add(database, state, state=state)
    assert claim(database, idle=True) is None
    put(database, held, lease=None, memory=0)
    assert claim(database, idle=True) is None
    put(database, held, memory=1)
    assert claim(database)[0] == held  # type: ignore[index]


def test_job_writes_require_current_lease(database: Database) -> None:
    job_id = add(database, "one")
    _, lease = claim(database)  # type: ignore[misc]
    before = job_of(database, job_id)
    with database.write() as session:
        jobs.renew(session, job_id, lease, worked=3.5, progress={"step": 2})
    after = job_of(database, job_id)
    assert after.lease_ends > before.lease_ends  # type: ignore[operator]
    assert (after.worked, after.details) == (3.5, {"progress": {"step": 2}})
    writes = (
        lambda s: jobs.renew(s, job_id, "old", worked=9.0),
        lambda s: queue.release(s, Job, job_id, "old", "x"),
        lambda s: jobs.complete(s, job_id, "old", {"stored_id": "x"}),
        lambda s: jobs.fail(s, job_id, "old", "x"),
        lambda s: queue.expire(s, Job, job_id, "old", "x"),
    )
    for write in writes:
        with pytest.raises(LeaseLost), database.write() as session:
            write(session)
    left = job_of(database, job_id)
    assert (left.state, left.lease, left.worked) == (RUNNING, lease, 3.5)


def test_model_is_active_in_the_transaction_of_completion(database: Database) -> None:
    job_id = add(database, "one")
    _, lease = claim(database)  # type: ignore[misc]
    with database.write() as session:
        jobs.complete(session, job_id, lease, {"stored_id": "tiny:job-x"})
        session.rollback()  # as when the process is killed before its end
    with database.read() as session:
        assert session.query(CustomModel).one().status == "Reserved"
    assert job_of(database, job_id).state == RUNNING
    with database.write() as session:
        jobs.complete(session, job_id, lease, {"stored_id": "tiny:job-x"})
    with database.read() as session:
        model = session.query(CustomModel).one()
    assert (model.status, model.stored_id) == (ACTIVE, "tiny:job-x")
    assert job_of(database, job_id).state == COMPLETED


def test_withheld_model_has_failed_status(database: Database) -> None:
    job_id = add(database, "one")
    _, lease = claim(database)  # type: ignore[misc]
    with database.write() as session:
        jobs.complete(session, job_id, lease, {"stored_id": "tiny:job-x"}, withheld="it drifted")
    with database.read() as session:
        model = session.query(CustomModel).one()
    assert (model.status, model.failure) == ("Failed", "it drifted")
    assert model.stored_id == "tiny:job-x" and job_of(database, job_id).state == COMPLETED


@pytest.mark.parametrize(
    ("state", "released", "failed", "expired"),
    [
        (RUNNING, QUEUED, FAILED, QUEUED),
        (STOPPING, STOPPED, STOPPED, STOPPED),
        (PAUSED, PAUSED, FAILED, PAUSED),
        (QUEUED, QUEUED, FAILED, QUEUED),
    ],
)
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_job_state_after_worker_release(
    database: Database, state: str, released: str, failed: str, expired: str
) -> None:
    ways = {
        released: lambda s, job: queue.release(s, Job, job, "token", "why"),
        failed: lambda s, job: jobs.fail(s, job, "token", "why"),
    }
    last = lambda s, job: queue.expire(s, Job, job, "token", "why")  # noqa: E731
    for number, (left, way) in enumerate([*ways.items(), (expired, last)]):
        job_id = add(database, f"job-{number}", state=state, lease="token", worker=WORKER)
        with database.write() as session:
            way(session, job_id)
        job = job_of(database, job_id)
        assert (job.state, job.lease, job.worker) == (left, None, None)
    if state in (PAUSED, STOPPING):
        job_id = add(database, "ready", state=state, lease="token")
        with pytest.raises(WrongState), database.write() as session:
            jobs.complete(session, job_id, "token", {"stored_id": "x"})


def test_job_fails_after_repeated_crashes_without_progress(database: Database) -> None:
    job_id = add(database, "one")

    def die(step: int) -> Job:
        _, lease = claim(database)  # type: ignore[misc]
        with database.write() as session:
            jobs.renew(session, job_id, lease, progress={"step": step})
            queue.expire(session, Job, job_id, lease, "its worker ended by signal 9")
        return job_of(database, job_id)

    for crash in range(jobs.MOST_CRASHES - 1):
        assert die(4).crashes == crash + 1
    # Progress resets the count of crashes.
    assert (die(5).crashes, die(5).crashes) == (1, 2)
    for _ in range(jobs.MOST_CRASHES - 2):
        job = die(5)
    assert job.state == FAILED
    assert job.failure is not None
    assert "step 5" in job.failure
    assert "signal 9" in job.failure
    with database.read() as session:
        warned = session.query(JobEvent).filter_by(job_id=job_id, kind="warning").count()
        assert session.query(CustomModel).count() == 0
    assert warned == 2 * jobs.MOST_CRASHES - 2
