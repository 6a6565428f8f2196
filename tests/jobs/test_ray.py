"""Training on a real Ray cluster: nodes that are processes of this machine, started by `ray start`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from job_checks import bits, running

from luthier.errors import RefusedInput
from luthier.jobs.ray_runner import RayRunner
from luthier.jobs.scheduler import Scheduler
from luthier.store.jobs import Job, JobEvent, get, stop

pytest.importorskip("ray", reason="Ray is not installed: pip install 'luthier[ray]'")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),  # a node alone takes half a minute to start on two busy cores
    pytest.mark.parametrize("database_url", ["sqlite"], indirect=True),
]
ACCOUNT = "000000000000"
RAY = Path(sys.executable).with_name("ray")
MEMORY = 2_000_000_000
STEPS = 300


class Cluster:
    """Nodes on this machine, each with one CPU; the first is the head and takes no work."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port
        self.nodes: list[subprocess.Popen[bytes]] = []
        self.start("--head", f"--port={port}", "--num-cpus=0", f"--temp-dir={folder}")
        self.address = f"127.0.0.1:{port}"

    def start(self, *options: str) -> subprocess.Popen[bytes]:
        """One more node, as a process that ends when its raylet does."""
        command = [str(RAY), "start", *options, "--block", "--disable-usage-stats"]
        command += ["--include-dashboard=false"] if "--head" in options else []
        command += [f"--memory={MEMORY}", "--object-store-memory=80000000"]
        path = self.folder / f"node-{len(self.nodes)}.log"
        with path.open("wb") as log:
            node = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        self.nodes.append(node)
        return node

    def add(self) -> subprocess.Popen[bytes]:
        """One more node that takes work."""
        return self.start(f"--address={self.address}", "--num-cpus=1")

    def wait_for(self, count: int, seconds: float = 300) -> None:
        """Wait until so many nodes take work."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                found = [node for node in RayRunner(self.address).nodes() if node.cores]
            except Exception:  # it is starting
                found = None
            if found is not None and len(found) == count:
                return
            assert self.nodes[0].poll() is None, (self.folder / "node-0.log").read_text()
            assert time.monotonic() < deadline, f"{found} instead of {count} nodes"
            time.sleep(0.5)

    def wait_for_idle(self, count: int, seconds: float = 60) -> None:
        """Wait until so many nodes have all of their resources free."""
        deadline = time.monotonic() + seconds
        while sum(n.idle for n in RayRunner(self.address).nodes() if n.cores) != count:
            assert time.monotonic() < deadline
            time.sleep(0.5)

    def close(self) -> None:
        """End all nodes."""
        for node in reversed(self.nodes):
            if node.poll() is None:
                node.terminate()
        for node in self.nodes:
            try:
                node.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(node.pid, 9)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head and two nodes that take a job each."""
    # Its sockets lie below, and their names may have 107 characters: pytest's folders are too long.
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    # Ray's workers listen from 10002 to 19999, and connections go out from 32768 on.
    made = Cluster(folder, 21000 + os.getpid() % 10000)
    try:
        made.wait_for(0)
        for count in (
            1,
            2,
        ):  # of two that start at once on one machine one may take the other's port
            made.add()
            made.wait_for(count)
        yield made
    finally:
        made.close()
        shutil.rmtree(folder, ignore_errors=True)


def scheduler(queue: Any, cluster: Cluster) -> Scheduler:
    """A server's, whose training runs on the cluster by the command of a real server."""
    made = Scheduler(
        queue.database,
        options=["--file-root", str(queue.folder)],
        environment={"OMP_NUM_THREADS": "1"},
        runner=RayRunner(cluster.address),
    )
    queue.schedulers.append(made)
    made.start()
    return made


def submit_rows(queue: Any, name: str, steps: int) -> str:
    address = queue.file(f"{ACCOUNT}/rows.jsonl", queue.pairs())
    return str(queue.submit(name, training=[address], steps=steps))


def actor_of(job: Job) -> psutil.Process:
    """The process of Ray's that the worker of a job runs below."""
    parent = psutil.Process(job.worker["pid"]).parent()
    assert parent is not None and "RayWorker" in " ".join(parent.cmdline())
    return parent


def trained_steps(queue: Any, job_id: str) -> list[int]:
    with queue.database.read() as session:
        found = session.query(JobEvent).filter_by(job_id=job_id, kind="metrics")
        return [e.data["step"] for e in found.order_by(JobEvent.seq) if "train_loss" in e.data]


def test_killed_workers_and_a_killed_node_change_no_bit(queue: Any, cluster: Cluster) -> None:
    # Two servers, which start no job twice.
    for _ in range(2):
        scheduler(queue, cluster)
    whole, broken = (submit_rows(queue, name, STEPS) for name in ("whole", "broken"))
    job = queue.until(broken, running(10))
    # Its worker and Ray's process above it, as the system does that runs out of memory.
    actor, worker = actor_of(job), psutil.Process(job.worker["pid"])
    actor.kill()
    worker.wait(20)  # nobody signals it: its standard input ends
    job = queue.until(broken, lambda job: job.attempts == 2 and running(20)(job))
    psutil.Process(job.worker["pid"]).kill()
    job = queue.until(broken, lambda job: job.attempts == 3 and running(30)(job))
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
    cluster.add()
    cluster.wait_for(2)


def test_a_stopped_job_ends_and_its_node_is_free_again(queue: Any, cluster: Cluster) -> None:
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
    # A server that ends and takes its workers along: the driver passes the signal on.
    again = submit_rows(queue, "given-back", 100_000)
    queue.until(again, running(5))
    (driver,) = made.children.values()
    driver.terminate()
    queue.until(again, lambda job: job.state == "Queued" or job.attempts == 2)
    with queue.database.read() as session:
        texts = [e.message for e in session.query(JobEvent).filter_by(job_id=again)]
    assert "The worker made a checkpoint and gave the job back." in texts


def test_a_server_whose_cluster_is_not_there_does_not_start(
    cluster: Cluster, database: Any, luthier_home: Path
) -> None:
    RayRunner(cluster.address).check(database)
    with pytest.raises(RefusedInput, match=r"cannot be reached .* `ray start --head`"):
        RayRunner("127.0.0.1:1").check(database)
