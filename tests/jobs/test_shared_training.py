"""Jobs whose training several processes share: model, events and losses are those of one process."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from job_checks import bits, check_history, running

from luthier.api.service import Service
from luthier.api.settings import Settings
from luthier.encryption import keys, memory
from luthier.errors import RefusedInput
from luthier.jobs import training
from luthier.jobs.admission import Capacity
from luthier.jobs.job_reporter import JobReporter
from luthier.jobs.runners import free
from luthier.jobs.training import JobHeartbeat, TrainingWorker
from luthier.store import queue as leased_work
from luthier.store import shared
from luthier.store.jobs import Job, JobEvent, get, pause, resume, stop
from luthier.store.locations import Locations
from luthier.store.models import find
from luthier.store.shared import shared_folders

sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
ACCOUNT = "000000000000"
HERE = {"host": "server", "pid": 1, "born": 1.0}


def change(queue: Any, act: Any, job_id: str) -> None:
    with queue.database.write() as session:
        job = get(session, ACCOUNT, job_id, lock=True)
        assert job is not None
        act(session, job)


def events_of(queue: Any, job: Job) -> list[JobEvent]:
    with queue.database.read() as session:
        found = list(session.query(JobEvent).filter_by(job_id=job.id).order_by(JobEvent.seq))
    # A validation has the loss of the step before it, too.
    check_history(job, [event for event in found if "valid_loss" not in event.data])
    return found


def losses(found: list[JobEvent]) -> list[float]:
    return [
        event.data[name]
        for event in found
        if event.kind == "metrics"
        for name in ("train_loss", "valid_loss")
        if name in event.data
    ]


def ranks(job: Job) -> list[psutil.Process]:
    """The processes that train for a job."""
    assert job.worker is not None
    children = psutil.Process(job.worker["pid"]).children(recursive=True)
    return [each for each in children if "luthier.engine.processes" in each.cmdline()]


@sqlite
def test_a_job_of_two_processes_is_one_of_one_process(queue: Any, luthier_home: Path) -> None:
    held = [queue.file("held.jsonl", queue.pairs(40)[20:26])]
    settings = {"training": {"max_steps": 20, "batch_size": 4, "precision": "float32"}}
    one = queue.submit("one", validators=held, settings=settings)
    alone = queue.scheduler()
    first = queue.ended(one)
    alone.stop()
    two = queue.submit("two", validators=held, settings=settings)
    queue.scheduler(shared_by=2)
    job = queue.until(two, running())
    assert job.worker["processes"] == 2 and len(ranks(job)) == 2
    second = queue.ended(two)
    assert (first.state, second.state) == ("Completed", "Completed"), second.failure
    before, after = events_of(queue, first), events_of(queue, second)
    assert losses(after) == pytest.approx(losses(before), rel=1e-5) and len(losses(after)) > 20
    texts = [event.message for event in after]
    assert "2 processes share the rows of each step" in texts
    assert first.details["chosen"] == second.details["chosen"]
    stored = find(second.result["stored_id"])
    assert stored.id == f"tiny:job-{two}"
    recipes = [find(each.result["stored_id"]).manifest.recipe for each in (first, second)]
    assert recipes[0]["training"] == recipes[1]["training"]
    assert {"tokens", "steps"} <= second.result.keys()
    assert second.result["tokens"] == first.result["tokens"]
    log = (luthier_home / "jobs" / f"{two}.log").read_text()
    assert "Traceback" not in log


@sqlite
@pytest.mark.slow
def test_kills_pauses_and_stops_are_those_of_one_process(queue: Any, luthier_home: Path) -> None:
    queue.scheduler(shared_by=2)
    whole = queue.ended(queue.submit("whole", steps=400))
    broken = queue.submit("broken", steps=400)
    job = queue.until(broken, running(20))
    ranks(job)[-1].kill()
    job = queue.until(broken, running(150))
    assert job.attempts == 1  # the worker itself started both processes again
    left = ranks(job)
    queue.kill(broken)
    queue.until(broken, lambda job: job.attempts == 2)
    assert not psutil.wait_procs(left, timeout=30)[1]
    queue.until(broken, running(230))
    change(queue, pause, broken)
    queue.until(broken, lambda job: job.lease is None)
    assert queue.job(broken).state == "Paused"
    change(queue, resume, broken)
    job = queue.ended(broken)
    assert job.state == "Completed", job.failure
    assert job.attempts == 3 and bits(job) == bits(whole)
    found = events_of(queue, job)
    assert any("ended by surprise" in event.message for event in found)
    stopped = queue.submit("stopped", steps=4000)
    queue.until(stopped, running())
    change(queue, stop, stopped)
    assert queue.ended(stopped).state == "Stopped"
    assert not [p for p in luthier_home.rglob(f"*{stopped}*") if p.suffix != ".log"]


@pytest.fixture
def encrypted(luthier_home: Path) -> Iterator[None]:
    luthier_home.mkdir()
    keys.open_store_keys(secrets.token_bytes(32))
    yield
    shutil.rmtree(memory.memory(), ignore_errors=True)
    keys.use_keyring(None)


@sqlite
@pytest.mark.slow
def test_processes_of_an_encrypted_store_have_its_keys_also_when_they_start_again(
    encrypted: None, queue: Any, luthier_home: Path
) -> None:
    canary = "zanzibar-canary-7731"
    rows = [{"prompt": f"{canary} {n}", "completion": f"yes {n}"} for n in range(12)]
    queue.scheduler(shared_by=2)
    job_id = queue.submit(training=[queue.file("rows.jsonl", rows)], steps=200)
    ranks(queue.until(job_id, running(20)))[0].kill()
    job = queue.ended(job_id)
    assert job.state == "Completed" and job.attempts == 1, job.failure
    assert any("ended by surprise" in event.message for event in events_of(queue, job))
    files = [p for top in (luthier_home, memory.memory()) for p in top.rglob("*") if p.is_file()]
    assert files and not any(canary.encode() in path.read_bytes() for path in files)


@sqlite
@pytest.mark.slow
def test_a_checkpoint_of_several_processes_is_in_the_shared_store(
    queue: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shared").mkdir()
    monkeypatch.setenv(shared.ENVIRONMENT, str(tmp_path / "shared"))
    whole = queue.submit("whole", steps=200)
    scheduler = queue.scheduler(shared_by=2)
    first = queue.ended(whole)
    broken = queue.submit("broken", steps=200)
    queue.until(broken, running(40))
    scheduler.stop()
    queue.kill(broken)
    for child in scheduler.children.values():
        child.wait(30)
    folders = shared_folders()
    assert folders is not None and folders.names("jobs") == {f"jobs/{broken}"}
    home, other = Path(os.environ["LUTHIER_HOME"]), tmp_path / "second"
    shutil.copytree(home / "models" / "base", other / "models" / "base")
    monkeypatch.setenv("LUTHIER_HOME", str(other))
    queue.scheduler(shared_by=2)
    job = queue.ended(broken)
    assert job.state == "Completed" and bits(first) == bits(job), job.failure
    assert any(event.message.startswith("going on after step") for event in events_of(queue, job))


@sqlite
def test_each_process_counts_when_it_is_asked_whether_a_job_fits(queue: Any) -> None:
    queue.submit("first", settings={"training": {"max_steps": 1, "threads": 1}})
    queue.submit("second")
    with queue.database.write() as session:
        session.query(Job).update({"memory": 1_000})
        two = {**HERE, "processes": 2}
        assert leased_work.claim(session, Job, two, 1_999, 9) is None
        assert leased_work.claim(session, Job, two, 2_000, 1) is None
        job = leased_work.claim(session, Job, two, 2_000, 2)
        assert job is not None and (job.needed_memory, job.needed_cores) == (2_000, 2)
        left = free(session, Capacity(memory=10_000, cores=4))
        job.worker = None
        assert (left.memory, left.cores) == (10_000, 4)  # a worker of another machine
        left = free(session, Capacity(memory=10_000, cores=4))
        assert (left.memory, left.cores) == (9_000, 3)
        assert leased_work.claim(session, Job, HERE, 1_000, 1) is not None


@sqlite
def test_a_job_without_room_for_all_processes_trains_on_one_and_says_why(
    queue: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = queue.job(queue.submit())
    reporter = JobReporter(job, lambda text: text)
    worker = TrainingWorker(queue.database, Locations(queue.database), job.id, "token", processes=2)
    assert worker._count_processes(reporter) == 2
    monkeypatch.setattr("luthier.engine.processes.available_memory", lambda: 500 << 20)
    assert worker._count_processes(reporter) == 1
    (event,) = reporter.take().events
    assert event.kind == "warning" and "trains on one process" in event.message
    assert "room for 1 to 1" in event.message


@sqlite
def test_several_processes_are_asked_to_stop_once_while_they_write_a_checkpoint(
    queue: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = queue.job(queue.submit(time_limit=1))
    signals: list[int] = []
    clock = [1_000.0]
    monkeypatch.setattr(os, "kill", lambda pid, number: signals.append(number))
    monkeypatch.setattr(training.time, "monotonic", lambda: clock[0])
    job.state = "Stopping"
    for again, wanted in ((training.AGAIN, 2), (training.SHUTDOWN_SECONDS, 1)):
        signals.clear()
        reporter = JobReporter(job, lambda text: text)
        heartbeat = JobHeartbeat(queue.database, job, "token", reporter, again)
        for _ in range(2):
            heartbeat._obey(job)
            clock[0] += training.AGAIN + 1
        assert len(signals) == wanted and heartbeat.reason == "stop"


def test_what_cannot_be_shared_is_refused_at_the_start(
    luthier_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RefusedInput, match=r"--job-processes 2 \(LUTHIER_JOB_PROCESSES\).*Ray"):
        Service(Settings(job_processes=2, ray_address="127.0.0.1:1"))
    for number in (0, 100_000):
        with pytest.raises(RefusedInput, match=f"LUTHIER_JOB_PROCESSES.*{number} processes"):
            Service(Settings(job_processes=number))
