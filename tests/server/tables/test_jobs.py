"""Jobs in the database: all transitions, lists, and actions of clients."""

from __future__ import annotations

from datetime import timedelta
from itertools import product
from typing import Any

import pytest
from job_rows import ACCOUNT, OTHER
from job_rows import add_job as add

from luthier.errors import LeaseLost, WrongState
from luthier.server.tables import queue
from luthier.server.tables.custom_models import CustomModel
from luthier.server.tables.database import Database, now
from luthier.server.tables.jobs import (
    COMPLETED,
    ENDED,
    FAILED,
    PAUSED,
    QUEUED,
    RUNNING,
    STOPPED,
    STOPPING,
    TRANSITIONS,
    Job,
    events,
    get,
    list_jobs,
    move,
    pause,
    record,
    resume,
    stop,
)

STATES = (QUEUED, RUNNING, PAUSED, STOPPING, COMPLETED, FAILED, STOPPED)
LEGAL = {
    (QUEUED, RUNNING), (QUEUED, PAUSED), (QUEUED, STOPPING), (QUEUED, STOPPED), (QUEUED, FAILED),
    (RUNNING, QUEUED), (RUNNING, PAUSED), (RUNNING, STOPPING), (RUNNING, COMPLETED),
    (RUNNING, FAILED), (PAUSED, QUEUED), (PAUSED, STOPPING), (PAUSED, STOPPED), (PAUSED, FAILED),
    (STOPPING, STOPPED),
}  # fmt: skip


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_illegal_state_transitions_are_rejected(database: Database) -> None:
    assert TRANSITIONS.keys() == set(STATES)
    for number, (before, after) in enumerate(product(STATES, STATES)):
        job = add(database, f"job-{number}", state=before, lease="token")
        with database.write() as session:
            held = get(session, ACCOUNT, job.id, lock=True)
            assert held is not None
            if (before, after) in LEGAL:
                move(session, held, after, "why")
            else:
                with pytest.raises(WrongState):
                    move(session, held, after, "why")
        with database.read() as session:
            left = session.query(Job).filter_by(id=job.id).one()
            found = events(session, left, limit=9)
            names = session.query(CustomModel).filter_by(job_id=job.id).count()
        legal = (before, after) in LEGAL
        assert left.state == (after if legal else before)
        assert [event.data["state"] for event in found] == [after] * legal
        assert (left.ended is not None) == (legal and after in ENDED)
        assert (left.lease is None) == (legal and after in ENDED)
        assert names == (0 if legal and after in (FAILED, STOPPED) else 1)


def test_job_change_requires_lease_and_current_state(database: Database) -> None:
    job = add(database, state=RUNNING, lease="mine")
    with database.write() as session:
        fresh = get(session, ACCOUNT, job.id, lock=True)
        assert fresh is not None
        with pytest.raises(LeaseLost):
            move(session, fresh, COMPLETED, "why", holder="another")
        move(session, fresh, COMPLETED, "why", holder="mine")
    with database.write() as session, pytest.raises(WrongState):
        move(session, job, FAILED, "by who read it before")
    with database.read() as session:
        assert session.query(Job).one().state == COMPLETED


def test_stop_pause_and_resume(database: Database) -> None:
    def ask(act: Any, job: Job) -> Job:
        with database.write() as session:
            held = get(session, ACCOUNT, job.id, lock=True)
            assert held is not None
            return act(session, held)

    waiting = add(database, "waiting")
    assert ask(pause, waiting).state == PAUSED == ask(pause, waiting).state
    assert ask(resume, waiting).state == QUEUED == ask(resume, waiting).state
    assert ask(stop, waiting).state == STOPPED == ask(stop, waiting).state
    at_work = add(database, "at-work", state=RUNNING, lease="token")
    assert ask(resume, at_work).state == RUNNING
    assert ask(pause, at_work).state == PAUSED
    # The worker still holds the lease, so the job does not end immediately.
    assert ask(stop, at_work).state == STOPPING == ask(stop, at_work).state
    for act in (pause, resume):
        with pytest.raises(WrongState):
            ask(act, at_work)
    for state in (COMPLETED, FAILED):
        ended = add(database, state, state=state)
        for act in (stop, pause, resume):
            with pytest.raises(WrongState):
                ask(act, ended)


def test_job_lookup_is_limited_to_account(database: Database) -> None:
    mine, theirs = add(database, "same"), add(database, "same", account=OTHER)
    with database.read() as session:
        for identifier in (mine.id, "same"):
            found = get(session, ACCOUNT, identifier)
            assert found is not None and found.id == mine.id
        assert get(session, ACCOUNT, theirs.id) is None
        assert queue.in_flight(session, Job, OTHER) == 1


def test_job_id_takes_precedence_over_equal_name(database: Database) -> None:
    first = add(database, "first")
    add(database, first.id)
    with database.read() as session:
        found = get(session, ACCOUNT, first.id)
        assert found is not None and found.name == "first"


def test_job_pages_are_stable_while_jobs_are_created(database: Database) -> None:
    made = [add(database, f"job-{n}") for n in range(7)]
    add(database, "not-mine", account=OTHER)
    seen, position = [], None
    with database.read() as session:
        first = list_jobs(session, ACCOUNT, limit=3)
    seen, position = [job.name for job in first], first[-1].seq
    add(database, "late")
    while True:
        with database.read() as session:
            page = list_jobs(session, ACCOUNT, limit=3, position=position)
        if not page:
            break
        seen, position = seen + [job.name for job in page], page[-1].seq
    assert seen == [job.name for job in reversed(made)]


def test_job_list_filters(database: Database) -> None:
    moment = now()
    add(database, "Alpha-1", created=moment)
    add(database, "alpha-2", created=moment + timedelta(seconds=1), state=FAILED)
    add(database, "beta%1", created=moment + timedelta(seconds=2), api="openai",
        request={"metadata": {"team": "blue"}})  # fmt: skip

    def names(**wanted: Any) -> list[str]:
        with database.read() as session:
            found = list_jobs(session, ACCOUNT, **wanted, limit=9)
        return [job.name for job in found]

    assert names(states=[QUEUED]) == ["beta%1", "Alpha-1"]
    assert names(metadata={"team": "blue"}) == ["beta%1"]
    assert names(metadata={"team": "red"}) == []


def test_events_are_paged_by_their_order(database: Database) -> None:
    job = add(database)
    with database.write() as session:
        for step in range(5):
            record(session, job.id, "metrics" if step % 2 else "message", f"m{step}", step=step)
    with database.read() as session:
        newest = events(session, job, limit=2)
        rest = events(session, job, limit=9, position=newest[-1].seq)
        metrics = events(session, job, kinds=["metrics"], limit=9, ascending=True)
    assert [event.message for event in newest + rest] == ["m4", "m3", "m2", "m1", "m0"]
    assert [event.data["step"] for event in metrics] == [1, 3]
