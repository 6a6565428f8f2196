"""Clocks that jump by an hour, forward and back, under the server and under its workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from job_checks import check_history
from shifted_clock import shifted

from luthier.store.custom_models import CustomModel
from luthier.store.jobs import Job, JobEvent

SERVER = """
import json, sys, threading
from luthier.jobs.admission import Capacity
from luthier.jobs.scheduler import Scheduler
from luthier.store.database import Database
url, command = json.loads(sys.argv[1])
Scheduler(Database(url), Capacity(memory=10**12, cores=3), command=command).start()
threading.Event().wait(1000)
"""


@pytest.mark.slow
@pytest.mark.parametrize("who", ["server", "worker"])
@pytest.mark.parametrize("hours", ["+1h", "-1h"])
def test_a_clock_that_jumps_costs_no_job(queue: Any, tmp_path: Path, who: str, hours: str) -> None:
    shift = tmp_path / "shift"
    faked = shifted(shift)
    worker = [sys.executable, "-m", "luthier", "worker"]
    roots = ["--file-root", str(queue.folder)]
    plain = {"LUTHIER_DATABASE": queue.database.engine.url.render_as_string(hide_password=False)}
    command = ["env", *[f"{k}={v}" for k, v in faked.items()]] if who == "worker" else []
    environment = {**os.environ, **plain, **(faked if who == "server" else {})}
    unfaked = ["env", "-u", "LD_PRELOAD"] if who == "server" else []
    argument = json.dumps([queue.database.url, [*command, *unfaked, *worker, *roots]])
    job_id = queue.submit("jumps", steps=60)
    with (tmp_path / "server.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-c", SERVER, argument], env=environment, stdout=log, stderr=log
        )
    try:
        queue.until(job_id, lambda job: job.details.get("progress", {}).get("step", 0) > 2, 120)
        shift.write_text(hours)
        jobs = [queue.ended(job_id, 240), queue.ended(queue.submit("after", steps=2), 240)]
    finally:
        server.kill()
        server.wait()
    times = []
    for job in jobs:
        assert (job.state, job.attempts, job.crashes) == ("Completed", 1, 0)
        with queue.database.read() as session:
            assert session.query(CustomModel).filter_by(job_id=job.id).count() == 1
            assert session.query(Job).filter(Job.lease.is_not(None)).count() == 0
            found = session.query(JobEvent).filter_by(job_id=job.id).order_by(JobEvent.seq).all()
        check_history(job, found)
        times += [event.at.timestamp() for event in found]
    jumps = [abs(after - before) > 3000 for before, after in pairwise(times)]
    assert any(jumps), "the clock did not jump"
