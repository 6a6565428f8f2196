"""Training on a real Ray cluster whose nodes are local processes of ``ray start``."""

from __future__ import annotations

import sys
from typing import Any

import psutil
import pytest
from job_checks import bits, running
from ray_cluster import Cluster

from luthier.cluster.ray_cluster import RayCluster
from luthier.cluster.ray_jobs import RayRunner
from luthier.server.jobs.scheduler import Scheduler
from luthier.server.jobs.training import TrainingWorker
from luthier.server.tables.jobs import Job, JobEvent, get, stop

pytest.importorskip("ray", reason="Ray is not installed: pip install 'luthier[ray]'")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),  # a node alone takes half a minute to start on two busy cores
    pytest.mark.parametrize("database_url", ["sqlite"], indirect=True),
]
ACCOUNT = "000000000000"
STEPS = 600


def scheduler(queue: Any, cluster: Cluster) -> Scheduler:
    """Start the scheduler of a server that trains on the cluster."""
    runner = RayRunner(RayCluster(cluster.address))
    runner.check(queue.database)
    made = Scheduler(
        queue.database,
        environment={"OMP_NUM_THREADS": "1"},
        runner=runner,
        # A process of Ray, and not a fork of the tests.
        command=[sys.executable, "-P", "-m", "luthier", "worker"],
    )
    queue.schedulers.append(made)
    made.start()
    return made


def submit_rows(queue: Any, name: str, steps: int) -> str:
    address = queue.stored("rows.jsonl", queue.pairs())
    return str(queue.submit(name, training=[address], steps=steps))


def actor_of(job: Job) -> psutil.Process:
    """Return the Ray process above the worker of a job."""
    parent = psutil.Process(job.worker["pid"]).parent()
    assert parent is not None and "RayWorker" in " ".join(parent.cmdline())
    return parent


def running_again(killed: Job) -> Any:
    """Return a condition: the next worker has trained beyond the step of the killed worker."""
    # The progress of the killed worker remains until the next one reports.
    further = running(killed.details["progress"]["step"] + 1)
    return lambda job: job.attempts == killed.attempts + 1 and further(job)


def trained_steps(queue: Any, job_id: str) -> list[int]:
    with queue.database.read() as session:
        found = session.query(JobEvent).filter_by(job_id=job_id, kind="metrics")
        return [e.data["step"] for e in found.order_by(JobEvent.seq) if "train_loss" in e.data]


def test_killed_workers_and_a_killed_node_change_no_bit(queue: Any, cluster: Cluster) -> None:
    # Two servers never start the same job twice.
    for _ in range(2):
        scheduler(queue, cluster)
    whole, broken = (submit_rows(queue, name, STEPS) for name in ("whole", "broken"))
    job = queue.until(broken, running(10))
    # Kill the worker and Ray's parent process, like the kernel's out-of-memory killer.
    actor, worker = actor_of(job), psutil.Process(job.worker["pid"])
    actor.kill()
    worker.wait(20)  # the worker ends because its standard input closes
    job = queue.until(broken, running_again(job))
    psutil.Process(job.worker["pid"]).kill()
    job = queue.until(broken, running_again(job))
    raylet = actor_of(job).parent()
    assert raylet is not None and "raylet" in raylet.name()
    worker = psutil.Process(job.worker["pid"])
    raylet.kill()
    worker.wait(60)
    jobs = [queue.ended(each, 600) for each in (whole, broken)]
    assert [job.state for job in jobs] == ["Completed", "Completed"]
    assert jobs[1].attempts >= 4
    assert bits(queue.job(whole)) == bits(queue.job(broken))
    assert trained_steps(queue, broken) == list(range(1, STEPS + 1))
    cluster.wait_for(1)
    cluster.add_until(2)


def test_stopped_ray_job_frees_node(queue: Any, cluster: Cluster) -> None:
    made = scheduler(queue, cluster)
    job_id = submit_rows(queue, "stopped", 100_000)
    worker = psutil.Process(queue.until(job_id, running()).worker["pid"])
    with queue.database.write() as session:
        job = get(session, ACCOUNT, job_id, lock=True)
        assert job is not None
        stop(session, job)
    assert queue.ended(job_id).state == "Stopped"
    worker.wait(60)
    cluster.wait_for_idle(2)
    # A server that stops its workers: the driver forwards the signal.
    again = submit_rows(queue, "given-back", 100_000)
    queue.until(again, running(5))
    (driver,) = made.children.values()
    driver.terminate()
    queue.until(again, lambda job: job.state == "Queued" or job.attempts == 2)
    with queue.database.read() as session:
        texts = [e.message for e in session.query(JobEvent).filter_by(job_id=again)]
    assert TrainingWorker.release_message in texts
