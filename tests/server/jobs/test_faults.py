"""Fifty kills at random points over a mixed queue: of workers, of servers, of both.

What has to hold: no job is lost, each ends as it would have ended unbroken, with the same bits and one
model; every state that is seen is the truth and follows from the one before; nothing temporary is left.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from job_checks import SLOWLY, bits, check_history

from luthier.library.models import custom_models, find
from luthier.server.tables.custom_models import CustomModel
from luthier.server.tables.jobs import ENDED, Job, JobEvent, get, stop

KILLS = 50
ACCOUNT = "000000000000"
SERVER = """
import json, sys, time
from luthier.server.jobs.admission import Capacity
from luthier.server.jobs.scheduler import Scheduler
from luthier.server.tables import jobs
from luthier.server.tables.database import Database
jobs.MOST_CRASHES = 50  # random kills strike one step several times
url, command = json.loads(sys.argv[1])
Scheduler(Database(url), Capacity(memory=10**12, cores=3), command=command).start()
time.sleep(1000)
"""


class Servers:
    """A server that comes again after each kill."""

    def __init__(self, queue: Any) -> None:
        import json

        argument = json.dumps([queue.database.url, queue.command])
        self.command = [sys.executable, "-c", SERVER, argument]
        self.environment = {**os.environ, "LUTHIER_TEST_BEFORE": SLOWLY}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, env=self.environment)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def restart(self) -> None:
        self.kill()
        self.start()


def kinds(queue: Any) -> dict[str, dict[str, Any]]:
    """Jobs of several kinds, each by name."""
    preferred = [
        {"prompt": f"Say {n}", "chosen": f"It is {n}.", "rejected": "I do not know."}
        for n in range(8)
    ]
    texts = [{"text": f"Line {n} says that {n * n} is the square of {n}."} for n in range(20)]
    return {
        "tune": {"steps": 40},
        "full": {
            "settings": {
                "training": {
                    "max_steps": 30,
                    "batch_size": 4,
                    "precision": "float32",
                    "threads": 1,
                },
                "adaptation": {"method": "full"},
            }
        },
        "preferred": {"training": [queue.file("dpo.jsonl", preferred)], "steps": 20},
        "text": {
            "training": [queue.file("text.jsonl", texts)],
            "customization_type": "CONTINUED_PRE_TRAINING",
            "steps": 30,
        },
    }


class Observer:
    """Sees every job as a client would, and remembers where it stood."""

    def __init__(self, queue: Any) -> None:
        self.queue, self.last = queue, dict[str, str]()

    def look(self) -> list[Job]:
        with self.queue.database.read() as session:
            jobs = list(session.query(Job))
            active = {model.job_id: model for model in session.query(CustomModel)}
        for job in jobs:
            before = self.last.get(job.id, "Queued")
            # Several steps may lie between two looks, but nothing leaves an end.
            assert job.state == before or before not in ENDED, (job.name, before, job.state)
            self.last[job.id] = job.state
            model = active.get(job.id)
            if job.state == "Completed":
                assert model is not None and model.status == "Active"
                assert find(model.stored_id).manifest.files
            elif job.state in ENDED:
                assert model is None
            else:
                assert model is not None and model.status == "Reserved"
        return jobs


@pytest.mark.slow
def test_fifty_kills_lose_nothing(queue: Any, luthier_home: Path) -> None:
    dice = random.Random(20)
    wanted = kinds(queue)
    whole = {name: queue.submit(f"whole-{name}", **fields) for name, fields in wanted.items()}
    scheduler = queue.scheduler()
    expected = {name: bits(queue.ended(job_id)) for name, job_id in whole.items()}
    scheduler.stop()

    servers, observer = Servers(queue), Observer(queue)
    servers.start()
    ids: dict[str, str] = {}
    stopped: set[str] = set()
    bad = queue.submit("bad", training=[queue.file("bad.jsonl", ["{", *queue.pairs(3)])])
    kills, rounds = 0, 0
    while kills < KILLS:
        jobs = observer.look()
        if sum(job.state not in ENDED for job in jobs) < 3:
            rounds += 1
            for name, fields in wanted.items():
                ids[queue.submit(f"{name}-{rounds}", **fields)] = name
            doomed = queue.submit(f"doomed-{rounds}", steps=400)
            stopped.add(doomed)
        time.sleep(dice.uniform(0.1, 2.0))
        kills += strike(queue, servers, dice)
        for job_id in stopped:
            job = queue.job(job_id)
            if job.state not in ENDED and dice.random() < 0.1:
                with queue.database.write() as session:
                    stop(session, get(session, ACCOUNT, job_id, lock=True))
    for job_id in stopped:
        with queue.database.write() as session:
            stop(session, get(session, ACCOUNT, job_id, lock=True))
    try:
        for job_id, name in ids.items():
            job = queue.ended(job_id, 300)
            assert job.state == "Completed", (name, job.failure)
            assert bits(job) == expected[name], name
        assert {queue.ended(job_id, 60).state for job_id in stopped} == {"Stopped"}
        assert queue.ended(bad, 60).state == "Failed"
        observer.look()
    finally:
        servers.kill()
    check_left(queue, luthier_home, len(ids) + len(whole))


def strike(queue: Any, servers: Servers, dice: random.Random) -> int:
    """Kill a server, a worker, or both; how many died."""
    what = dice.choice(("server", "worker", "worker", "both"))
    died = 0
    if what in ("worker", "both"):
        with queue.database.read() as session:
            held = [job.id for job in session.query(Job).filter(Job.lease.is_not(None))]
        if held:
            died += queue.kill(dice.choice(held)) is not None
    if what in ("server", "both"):
        servers.restart()
        died += 1
    return died


def check_left(queue: Any, luthier_home: Path, models: int) -> None:
    assert [str(path) for path in luthier_home.rglob(".tmp-*")] == []
    assert [path.name for path in (luthier_home / "jobs").iterdir() if path.suffix != ".log"] == []
    assert len(custom_models()) == models
    assert len(list((luthier_home / "runs").glob("*/*"))) == models
    with queue.database.read() as session:
        assert session.query(CustomModel).count() == models
        assert session.query(Job).filter(Job.lease.is_not(None)).count() == 0
        for job in session.query(Job):
            found = session.query(JobEvent).filter_by(job_id=job.id).order_by(JobEvent.seq).all()
            check_history(job, found)


@pytest.mark.slow
def test_a_database_that_goes_away_and_comes_back_costs_no_job(
    request: pytest.FixtureRequest, queue: Any, database_url: str
) -> None:
    if database_url.startswith("sqlite"):
        pytest.skip("SQLite is no server that could go away")
    server = request.getfixturevalue("postgres")
    whole = queue.submit("whole", steps=60)
    queue.scheduler(environment={"LUTHIER_TEST_BEFORE": SLOWLY})
    expected = bits(queue.ended(whole))
    broken = queue.submit("broken", steps=60)
    patient(lambda: queue.until(broken, lambda job: job.details.get("progress")))
    for mode in ("immediate", "fast"):
        server.stop(mode)
        time.sleep(1.5)
        server.start()
        time.sleep(0.5)
    job = patient(lambda: queue.ended(broken, 120))
    assert job.state == "Completed" and bits(job) == expected


def patient(look: Callable[[], Any]) -> Any:
    """What ``look`` gives, once the database is there."""
    from sqlalchemy.exc import OperationalError

    for _ in range(100):
        try:
            return look()
        except OperationalError:
            time.sleep(0.1)
    raise AssertionError("the database never came back")
