"""Positions and expected starts of waiting jobs, compared with the claims that follow."""

from __future__ import annotations

from datetime import datetime, timedelta
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from job_rows import OTHER, add_job
from native_client import native_client
from sqlalchemy.orm import Session

from luthier.limits import AccountQuotas
from luthier.server.jobs.admission import Capacity
from luthier.server.jobs.forecast import QueuePlace, queue_places
from luthier.server.jobs.runners import Runner
from luthier.server.jobs.scheduler import Scheduler
from luthier.server.native.operations import Context
from luthier.server.tables import queue
from luthier.server.tables.arns import Arns
from luthier.server.tables.database import Database, now
from luthier.server.tables.jobs import PAUSED, RUNNING, STOPPING, Job
from luthier.server.tables.queue import PATIENCE

CAPACITY = Capacity(memory=10, cores=4)
# In a long suite, minutes pass between import and the last test.
SOON, LATER = now() + timedelta(hours=12), now() + timedelta(days=1)


def add(database: Database, name: str, **fields: Any) -> str:
    return add_job(database, name, **fields).id


def run(database: Database, name: str, finish: datetime | None = None, **fields: Any) -> str:
    progress: dict[str, Any] = {"step": 2, "steps": 9, "loss": 1.0}
    if finish is not None:
        progress["estimated_finish"] = finish.isoformat()
    running = {"state": RUNNING, "lease": name, "details": {"progress": progress}, **fields}
    return add(database, name, **running)


def places(database: Database) -> dict[str, QueuePlace]:
    with database.read() as session:
        return queue_places(session, CAPACITY)


def claims(session: Session) -> list[str]:
    claimed = iter(lambda: queue.claim(session, Job, {}, 100, 100), None)
    return [job.id for job in claimed if job]


def test_positions_are_the_order_of_claims(database: Database) -> None:
    add(database, "low", priority=-1)
    add(database, "second turn", turn=1)
    add(database, "other account", account=OTHER)
    add(database, "urgent", priority=2)
    add(database, "paused", state=PAUSED)
    run(database, "running")
    found = places(database)
    with database.write() as session:
        assert list(found) == claims(session)
    assert [place.position for place in found.values()] == [1, 2, 3, 4]


def test_expected_start_waits_for_enough_free_memory(database: Database) -> None:
    run(database, "large", LATER, memory=6, cores=2)
    run(database, "small", SOON, memory=4, cores=2)
    first = add(database, "first", memory=3, cores=2)
    second = add(database, "second", memory=3, cores=1)
    third = add(database, "third", memory=3, cores=1)
    found = places(database)
    assert found[first].expected_start == SOON
    # The first job keeps its memory, so the end of the large job frees enough for the others.
    assert found[second].expected_start == found[third].expected_start == LATER


def test_start_after_jobs_of_unknown_duration_is_unknown(database: Database) -> None:
    run(database, "running", SOON, cores=4)
    first, second = add(database, "first", cores=4), add(database, "second", cores=4)
    assert places(database) == {first: QueuePlace(1, SOON), second: QueuePlace(2)}


@pytest.mark.parametrize(
    ("finish", "fields"),
    [(None, {}), (SOON, {"state": STOPPING}), (now() - timedelta(minutes=1), {})],
    ids=["no estimate", "stopping", "estimate passed"],
)
def test_expected_start_is_unknown_without_later_end(
    database: Database, finish: datetime | None, fields: dict[str, Any]
) -> None:
    run(database, "running", finish, cores=4, **fields)
    waiting = add(database, "waiting", cores=4)
    assert places(database) == {waiting: QueuePlace(1)}


def test_small_jobs_overtake_large_jobs_within_patience(database: Database) -> None:
    within, beyond = now() + PATIENCE / 2, now() + 2 * PATIENCE
    run(database, "first", within, memory=5)
    run(database, "second", beyond, memory=5)
    large, small = add(database, "large", memory=9), add(database, "small", memory=1)
    assert [places(database)[each].expected_start for each in (large, small)] == [beyond, within]
    with database.write() as session:
        session.query(Job).filter_by(id=large).update({"modified": now() - PATIENCE})
    assert [places(database)[each].expected_start for each in (large, small)] == [beyond, beyond]


def test_jobs_on_remote_machines_have_no_expected_start(database: Database) -> None:
    run(database, "running", SOON, cores=4)
    waiting = add(database, "waiting", cores=4)
    here = Scheduler(database, CAPACITY, runner=Runner())
    elsewhere = Scheduler(database, CAPACITY, runner=type("Cluster", (Runner,), {})())
    with database.read() as session:
        assert here.queue_places(session) == {waiting: QueuePlace(1, SOON)}
        assert elsewhere.queue_places(session) == {waiting: QueuePlace(1)}


def test_job_without_estimated_memory_has_a_position(database: Database) -> None:
    run(database, "running", SOON, cores=4)
    new, known = add(database, "new", memory=0), add(database, "known", cores=4)
    assert places(database) == {new: QueuePlace(1), known: QueuePlace(2, SOON)}


def test_native_jobs_have_position_and_expected_start(database: Database) -> None:
    run(database, "running", SOON, cores=4)
    add(database, "other", account=OTHER, cores=4)
    add(database, "waiting", cores=4)
    nothing: Any = SimpleNamespace()
    context = Context(
        database=database, arns=Arns(), locations=nothing, pool=nothing,
        quotas=lambda account: AccountQuotas(), delete_model=lambda model: None, capture=nothing,
        queue_places=partial(queue_places, capacity=CAPACITY),
    )  # fmt: skip
    client, other = native_client(context), native_client(context, OTHER)
    waiting, running = client.get("/api/v1/jobs").json()["jobs"]
    assert (
        waiting["queue_position"]
        == client.get("/api/v1/jobs/waiting").json()["queue_position"]
        == 2
    )
    assert "expected_start" not in waiting and "queue_position" not in running
    first = other.get("/api/v1/jobs/other").json()
    assert first["queue_position"] == 1
    assert datetime.fromisoformat(first["expected_start"]) == SOON
