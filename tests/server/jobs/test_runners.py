"""Where workers run: what a runner offers, and what stands for a worker, without a cluster."""

from __future__ import annotations

import itertools
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from luthier.errors import RefusedInput
from luthier.server.jobs.kinds import WORK_KINDS
from luthier.server.jobs.ray_runner import RayNode, RayRunner
from luthier.server.tables import queue as leased_work
from luthier.server.tables.jobs import Job

sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
IDLE = RayNode("10.0.0.1", 4.0, 4.0, 8_000, 8_000)
BUSY = RayNode("10.0.0.2", 4.0, 1.0, 8_000, 2_000)


def ray_runner(*nodes: RayNode) -> RayRunner:
    made = RayRunner("127.0.0.1:1")
    made.nodes = lambda: list(nodes)  # type: ignore[method-assign]
    made.refresh()
    return made


@sqlite
def test_one_worker_is_on_its_way_to_a_cluster_at_a_time(queue: Any) -> None:
    queue.submit()
    runner = ray_runner(IDLE, BUSY)
    with queue.database.write() as session:
        offers = runner.free(session, SimpleNamespace())
        assert [(o.memory, o.cores, o.idle) for o in offers] == [
            (8_000, 4, True),
            (2_000, 1, False),
        ]
        session.query(Job).update({"memory": 1})
        here = {"host": "server", "pid": 1, "born": 1.0}
        job = leased_work.claim(session, Job, {**here, "starting": True}, 10**12, 9)
        assert job is not None and runner.free(session, SimpleNamespace()) == []
        job.worker = here
        session.flush()
        assert len(runner.free(session, SimpleNamespace())) == 2


def test_no_more_is_reserved_than_a_node_has() -> None:
    row = SimpleNamespace(cores=9, needed_memory=9_000, id="job", lease="token")
    command = ray_runner(IDLE).command(["luthier"], WORK_KINDS["training"], row)  # type: ignore[arg-type]
    named = dict(itertools.pairwise(command))
    assert (named["--cores"], named["--memory"], named["--"]) == ("4.0", "8000", "luthier")


def test_an_address_that_is_none_is_refused() -> None:
    for address in ("", "head", "head:", "ray://head:x"):
        with pytest.raises(RefusedInput, match="HOST:PORT"):
            RayRunner(address)


def test_a_cluster_that_is_not_there_is_refused_with_what_to_do(database: Any) -> None:
    with pytest.raises(RefusedInput, match=r"cannot be reached .* `ray start --head`"):
        RayRunner("127.0.0.1:1").check(database)


def test_a_worker_ends_with_its_standard_input() -> None:
    # Its database does not answer.
    code = (
        "import sys, time; from luthier.server.jobs import processes; "
        "processes.inherited_database = lambda: time.sleep(60); "
        "from luthier.cli.app import main; main()"
    )
    options = ("--kind", "training", "--id", "x", "--lease", "x", "--until-stdin-closes")
    command = [sys.executable, "-c", code, "worker", *options]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE)
    with pytest.raises(subprocess.TimeoutExpired):
        worker.wait(1)
    assert worker.stdin is not None
    worker.stdin.close()
    assert worker.wait(60) == 75
