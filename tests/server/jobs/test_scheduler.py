"""The scheduler: dead workers, removal of files, and starts."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from luthier.server.jobs import processes
from luthier.server.jobs.admission import Capacity, memory_of
from luthier.server.jobs.folders import JobFolders
from luthier.server.jobs.kinds import TRAINING
from luthier.server.jobs.scheduler import Scheduler
from luthier.server.tables import queue as leased_work
from luthier.server.tables.jobs import Job
from luthier.server.tables.queue import LeaseWatch

sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
ONCE = Capacity(memory=10**12, cores=2)


def claimed(queue: Any, worker: dict[str, Any]) -> Job:
    queue.submit()
    with queue.database.write() as session:
        session.query(Job).update({"memory": 1})
        job = leased_work.claim(session, Job, worker, 10**12, 9)
        assert job is not None
        return job


def nobody(queue: Any) -> Scheduler:
    """Return a scheduler without capacity."""
    return Scheduler(queue.database, Capacity(memory=0, cores=0), command=["/no/such/program"])


def sleeper() -> tuple[subprocess.Popen[bytes], dict[str, Any]]:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    import psutil

    born = psutil.Process(child.pid).create_time()
    return child, {"host": processes.host(), "pid": child.pid, "born": born}


@sqlite
def test_dead_worker_returns_job_to_queue(queue: Any) -> None:
    child, worker = sleeper()
    job = claimed(queue, worker)
    scheduler = nobody(queue)
    scheduler.expire_dead()
    assert queue.job(job.id).lease == job.lease
    child.kill()
    child.wait()
    scheduler.expire_dead()
    left = queue.job(job.id)
    assert (left.state, left.lease, left.crashes) == ("Queued", None, 1)


@sqlite
def test_reused_pid_is_not_mistaken_for_worker(queue: Any) -> None:
    child, worker = sleeper()
    assert processes.is_alive(worker)
    assert not processes.is_alive({**worker, "born": worker["born"] - 100})
    assert not processes.is_alive({**worker, "host": f"{worker['host'].partition('/')[0]}/boot"})
    processes.send({**worker, "born": 1.0}, signal.SIGKILL)
    assert child.poll() is None
    processes.send(worker, signal.SIGKILL)
    assert child.wait(10) == -9
    assert not processes.is_alive(worker)


@sqlite
def test_silent_worker_is_killed(queue: Any, monkeypatch: Any) -> None:
    child, worker = sleeper()
    job = claimed(queue, worker)
    scheduler = nobody(queue)
    monkeypatch.setattr(scheduler, "watch", LeaseWatch(0.05))
    scheduler.expire_dead()
    time.sleep(0.1)
    scheduler.expire_dead()
    assert child.wait(10) == -9
    assert queue.job(job.id).state == "Queued"


@sqlite
def test_server_starting_silent_worker_is_not_killed(queue: Any, monkeypatch: Any) -> None:
    child, worker = sleeper()
    job = claimed(queue, {**worker, "starting": True})
    scheduler = nobody(queue)
    monkeypatch.setattr(scheduler, "watch", LeaseWatch(0.05))
    scheduler.expire_dead()
    time.sleep(0.1)
    scheduler.expire_dead()
    assert queue.job(job.id).state == "Queued"
    assert child.poll() is None
    child.kill()
    child.wait()


@sqlite
def test_slow_worker_start_is_no_crash(queue: Any, monkeypatch: Any) -> None:
    job_id = queue.submit()
    sleep = ["/bin/sh", "-c", "sleep 60"]
    scheduler = Scheduler(queue.database, ONCE, command=sleep, kinds=[TRAINING])
    monkeypatch.setattr(scheduler, "watch", LeaseWatch(0.05))
    monkeypatch.setattr("luthier.server.jobs.scheduler.LEASE", timedelta(hours=1))
    scheduler.tick()
    before = queue.job(job_id)
    time.sleep(0.1)
    scheduler.expire_dead()
    time.sleep(0.1)
    scheduler.expire_dead()
    job = queue.job(job_id)
    assert (job.state, job.lease, job.crashes) == ("Running", before.lease, 0)
    assert job.lease_ends > before.lease_ends
    monkeypatch.setattr(processes, "BEGIN_SECONDS", 0.0)
    for _ in range(2):
        scheduler.expire_dead()
        time.sleep(0.1)
    assert (queue.job(job_id).state, queue.job(job_id).crashes) == ("Queued", 1)
    for child in scheduler.children.values():
        child.kill()
        child.wait()


def test_lease_watch_ignores_clock_jumps() -> None:
    clock = [100.0]
    watch = LeaseWatch(30, lambda: clock[0])
    assert not watch.is_silent("a", "12:00")
    clock[0] += 29
    # A worker with a wrong clock renews the lease, first with tomorrow, then with yesterday.
    assert not watch.is_silent("a", "tomorrow")
    clock[0] += 29
    assert not watch.is_silent("a", "yesterday")
    clock[0] += 31
    assert watch.is_silent("a", "yesterday")
    watch.forget_except(set())
    assert not watch.is_silent("a", "yesterday")


@sqlite
def test_failed_worker_start_counts_no_crash(queue: Any) -> None:
    job_id = queue.submit()
    scheduler = Scheduler(queue.database, ONCE, command=["/no/such/program"])
    scheduler.tick()
    job = queue.job(job_id)
    assert (job.state, job.lease, job.crashes) == ("Queued", None, 0)
    assert job.memory > 100_000_000
    # The scheduler waits before a retry: a fix takes time.
    scheduler.tick()
    assert queue.job(job_id).attempts == 1


@sqlite
def test_worker_exit_before_start_counts_as_crash(queue: Any) -> None:
    job_id = queue.submit()
    scheduler = Scheduler(
        queue.database, ONCE, command=[sys.executable, "-c", "raise SystemExit(3)"]
    )
    scheduler.tick()
    (child,) = scheduler.children.values()
    assert child.wait(20) == 3
    scheduler.capacity = Capacity(memory=0, cores=0)
    scheduler.expire_dead()
    job = queue.job(job_id)
    assert (job.state, job.crashes, scheduler.children) == ("Queued", 1, {})


@sqlite
def test_scheduler_removes_files_of_stopped_job(queue: Any, luthier_home: Path) -> None:
    child, worker = sleeper()
    job = claimed(queue, worker)
    places = [
        luthier_home / "jobs" / job.id / "train" / "x.jsonl",
        luthier_home / "jobs" / f".tmp-{job.id}~abc" / "x",
        luthier_home / "runs" / "tiny" / f"job-{job.id}" / "metrics.jsonl",
        luthier_home / "distillations" / "tiny" / f"job-{job.id}" / "train.jsonl",
        luthier_home / "models" / "custom" / "tiny" / f"job-{job.id}" / "luthier.json",
        luthier_home / "models" / "custom" / "tiny" / f".tmp-job-{job.id}~abc" / "x",
    ]
    for place in places:
        place.parent.mkdir(parents=True)
        place.write_text("x")
    with queue.database.write() as session:
        session.query(Job).update({"state": "Stopping"})
    child.kill()
    child.wait()
    scheduler = nobody(queue)
    folders = JobFolders(job.id)
    with folders.lock():
        scheduler.tick()
        assert queue.job(job.id).state == "Stopped"
        # The lock on the files is still held.
        assert places[0].exists() and queue.job(job.id).has_working_files
    scheduler.tick()
    assert not queue.job(job.id).has_working_files
    assert [place for place in places if place.exists() or place.parent.exists()] == []


@sqlite
def test_no_worker_is_started_on_a_full_disk(queue: Any, monkeypatch: Any) -> None:
    free = [1000]
    monkeypatch.setattr("luthier.server.jobs.scheduler.free_bytes", lambda folder: free[0])
    monkeypatch.setattr("luthier.server.jobs.scheduler.LATER", 0.1)
    job = queue.submit(steps=2)
    queue.scheduler()
    time.sleep(0.5)
    assert queue.job(job).state == "Queued" and queue.job(job).attempts == 0
    free[0] = 10**12
    assert queue.ended(job).state == "Completed"


@sqlite
def test_full_disk_delays_next_worker_start(queue: Any, monkeypatch: Any) -> None:
    job_id = queue.submit()
    exits = [sys.executable, "-c", f"raise SystemExit({processes.NO_SPACE})"]
    scheduler = Scheduler(queue.database, ONCE, command=exits)
    scheduler.tick()
    (child,) = scheduler.children.values()
    child.wait(20)
    scheduler.tick()
    assert (queue.job(job_id).attempts, scheduler.children) == (1, {})
    monkeypatch.setattr("luthier.server.jobs.scheduler.LATER", 0.0)
    scheduler._not_before.clear()
    scheduler.tick()
    assert queue.job(job_id).attempts == 2
    next(iter(scheduler.children.values())).wait(20)


@sqlite
def test_memory_is_estimated_as_the_engine_does(queue: Any, luthier_home: Path) -> None:
    base = "smollm2-135m-instruct"
    small, full = (
        {**queue.job(queue.submit(name, settings=settings)).recipe, "base": base}
        for name, settings in (("a", {}), ("b", {"adaptation": {"method": "full"}}))
    )
    # A catalogue model without local files: its size needs no download.
    # In float32, where the processor has no products of bfloat16, full tuning takes 7.4 GB.
    assert 0.6e9 < memory_of("tune", small) < memory_of("tune", full) < 9e9
    taught = {**small, "method": "responses", "teacher": {"model": base}}
    beside = memory_of("distil", taught) - memory_of("tune", small)
    assert 0.2e9 < beside < 0.7e9
    assert not (luthier_home / "models" / "base" / base).exists()


@pytest.mark.filterwarnings("ignore:Initializing zero-element")  # an untrained classification head
@pytest.mark.parametrize(
    ("base", "objectives", "least"),
    [
        ("all-minilm-l6-v2", ("classification", "masked_lm", "token_classification"), 0.5e9),
        ("bert-base-uncased", ("classification", "contrastive", "masked_lm"), 1e9),
        pytest.param(
            "efficientnet-lite0", ("classification", "contrastive"), 1e9, marks=pytest.mark.slow
        ),
        ("smollm2-135m-instruct", ("sft", "dpo", "classification"), 1e9),
    ],
)
def test_job_memory_estimate_matches_inferred_objective(
    luthier_home: Path, base: str, objectives: tuple[str, ...], least: float
) -> None:
    fields = {"base": base, "data": {"train": "x"}}
    found = memory_of("tune", fields)
    assert least < found < 6e9
    for method in objectives:
        chosen = memory_of("tune", {**fields, "objective": {"method": method}})
        assert chosen == pytest.approx(found, rel=0.02)
    smaller = memory_of("tune", {**fields, "training": {"micro_batch_tokens": 8}})
    assert smaller < found
