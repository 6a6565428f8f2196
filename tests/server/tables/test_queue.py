"""Leases: each job has one worker, and only that one writes."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import Counter
from datetime import timedelta
from typing import Any

import pytest

from luthier.errors import LeaseLost, WrongState
from luthier.server.tables import jobs, queue
from luthier.server.tables.custom_models import ACTIVE, CustomModel
from luthier.server.tables.database import Database, new_id, now
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

ACCOUNT, OTHER = "000000000000", "111111111111"
WORKER = {"host": "here", "pid": 1, "born": 0.0}
CLAIM_ALL = """
import sys
from luthier.server.tables import queue
from luthier.server.tables.database import Database
from luthier.server.tables.jobs import Job
database = Database(sys.argv[1])
while True:
    with database.write() as session:
        job = queue.claim(session, Job, {"host": "x", "pid": 1, "born": 0.0}, 10**12, 10**6)
        if job is None:
            break
        print(job.id, job.lease)
"""


def add(database: Database, name: str, **fields: Any) -> str:
    moment = now()
    job = Job(
        **{
            "id": new_id(), "account": ACCOUNT, "name": name, "model_name": name, "face": "bedrock",
            "customization_type": "FINE_TUNING", "foundation": "luthier.tiny", "base_model": "arn",
            "command": "tune", "recipe": {}, "request": {}, "validators": [], "state": QUEUED,
            "details": {}, "created": moment, "modified": moment, "cores": 1, "memory": 1, **fields,
        }
    )  # fmt: skip
    model = CustomModel(
        id=new_id(), account=job.account, name=job.model_name, foundation="luthier.tiny",
        root="luthier.tiny", base_model="arn", job_id=job.id, details={}, created=moment,
    )  # fmt: skip
    with database.write() as session:
        session.add(job)
        session.flush()
        session.add(model)
    return job.id


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


def test_by_priority_then_by_age(database: Database) -> None:
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


def test_only_what_fits_is_started(database: Database) -> None:
    large = add(database, "large", memory=500)
    wide = add(database, "wide", cores=64)
    small = add(database, "small", memory=50)
    assert claim(database) == (small, job_of(database, small).lease)
    assert claim(database) is None
    # With nothing else at work it will not fit better: it may say itself what it lacks.
    assert claim(database, idle=True)[0] == large  # type: ignore[index]
    assert claim(database, cores=64)[0] == wide  # type: ignore[index]


def test_a_large_job_is_not_overtaken_for_ever(database: Database) -> None:
    add(database, "large", memory=500, modified=now() - queue.PATIENCE - timedelta(seconds=1))
    add(database, "small", memory=50)
    assert claim(database) is None
    assert claim(database, memory=500) is not None
    assert claim(database) is not None


def test_what_is_held_or_not_queued_is_not_claimed(database: Database) -> None:
    held = add(database, "held", lease="still there")
    for state in (PAUSED, STOPPING, STOPPED, COMPLETED, FAILED, RUNNING):
        add(database, state, state=state)
    assert claim(database, idle=True) is None
    put(database, held, lease=None, memory=0)
    assert claim(database, idle=True) is None
    put(database, held, memory=1)
    assert claim(database)[0] == held  # type: ignore[index]


def test_many_threads_claim_each_job_once(database: Database) -> None:
    wanted = [add(database, f"job-{n}") for n in range(24)]
    taken: list[tuple[str, str]] = []

    def work() -> None:
        while (found := claim(database)) is not None:
            taken.append(found)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(job for job, _ in taken) == Counter(wanted)
    assert all(job_of(database, job).lease == lease for job, lease in taken)


def test_many_processes_claim_each_job_once(database: Database) -> None:
    wanted = [add(database, f"job-{n}") for n in range(12)]
    command = [sys.executable, "-c", CLAIM_ALL, database.url]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    taken = [
        line.split()[0]
        for process in started
        for line in process.communicate()[0].split("\n")
        if line
    ]
    assert Counter(taken) == Counter(wanted)


def test_the_holder_is_heard_and_nobody_else(database: Database) -> None:
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


def test_the_model_is_there_with_the_end_of_its_job(database: Database) -> None:
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


def test_a_model_that_is_withheld_is_there_and_not_active(database: Database) -> None:
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
def test_a_worker_lets_go(
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


def test_a_job_whose_workers_keep_dying_fails_and_says_why(database: Database) -> None:
    job_id = add(database, "one")

    def die(step: int) -> Job:
        _, lease = claim(database)  # type: ignore[misc]
        with database.write() as session:
            jobs.renew(session, job_id, lease, progress={"step": step})
            queue.expire(session, Job, job_id, lease, "its worker ended by signal 9")
        return job_of(database, job_id)

    for crash in range(jobs.MOST_CRASHES - 1):
        assert die(4).crashes == crash + 1
    # One that came further begins to count anew.
    assert (die(5).crashes, die(5).crashes) == (1, 2)
    for _ in range(jobs.MOST_CRASHES - 2):
        job = die(5)
    assert job.state == FAILED
    assert job.failure is not None
    assert "workers died one after the other at step 5" in job.failure
    assert "its worker ended by signal 9" in job.failure
    with database.read() as session:
        warned = session.query(JobEvent).filter_by(job_id=job_id, kind="warning").count()
        assert session.query(CustomModel).count() == 0
    assert warned == 2 * jobs.MOST_CRASHES - 2
