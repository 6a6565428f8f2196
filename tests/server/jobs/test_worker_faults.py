"""Faults of a worker that do not end its job."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from luthier.server.jobs import worker
from luthier.server.jobs.folders import LOG_TAIL, JobFolders
from luthier.server.tables.jobs import JobEvent

sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


DIES = """
from luthier.server.jobs.training import TrainingWorker
def work(self, row):
    {how}
TrainingWorker.work = work
"""
AFTER_STEPS = """
import os
from luthier.engine.metrics import MetricsFile
append = MetricsFile.append
def die(self, values):
    append(self, values)
    if values["step"] >= 3:
        import time; time.sleep(1.5)  # until the step is reported
        os._exit(7)
MetricsFile.append = die
"""


@sqlite
@pytest.mark.parametrize(
    ("before", "step", "why", "lines", "memory"),
    [
        (DIES.format(how="raise SystemError('the library broke')"), 0, "status 1",
         "SystemError: the library broke", False),
        (DIES.format(how="import os; os.kill(os.getpid(), 9)"), 0, "signal 9", "", True),
        pytest.param(DIES.format(how="import os; os.kill(os.getpid(), 11)"), 0, "signal 11", "",
                     False, marks=pytest.mark.slow),
        pytest.param(AFTER_STEPS, 2, "status 7", "", False, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_job_fails_after_third_crash_at_same_step(
    queue: Any, before: str, step: int, why: str, lines: str, memory: bool
) -> None:
    job_id = queue.submit(steps=6)
    queue.scheduler(environment={"LUTHIER_TEST_BEFORE": before})
    job = queue.ended(job_id)
    assert (job.state, job.attempts, job.crashes) == ("Failed", 3, 3)
    assert f"step {step}" in job.failure
    assert why in job.failure and lines in job.failure
    assert ("memory" in job.failure) is memory
    tail = JobFolders(job_id).log_tail()
    assert len(tail) <= LOG_TAIL and lines in "\n".join(tail)
    with queue.database.read() as session:
        warned = session.query(JobEvent).filter_by(job_id=job_id, kind="warning").all()
    deaths = [each.message for each in warned if "its worker ended" in each.message]
    assert len(deaths) == 2 and all(why in text for text in deaths)


FLAKY = """
from worker_forks import Folders
from luthier.errors import LuthierError
calls = 0
def flaky(method):
    def call(*arguments):
        global calls
        calls += 1
        if calls % 3:
            raise LuthierError("the bucket does not answer")
        return method(*arguments)
    return call
Folders.fetch, Folders.write = flaky(Folders.fetch), flaky(Folders.write)
"""


@pytest.mark.slow
@sqlite
def test_flaky_bucket_does_not_fail_job(queue: Any) -> None:
    output = queue.folder / "out"
    job_id = queue.submit(output=f"file://{output}", steps=2)
    queue.scheduler(environment={"LUTHIER_TEST_BEFORE": FLAKY})
    job = queue.ended(job_id)
    assert job.state == "Completed", job.failure
    assert list(output.rglob("step_wise_training_metrics.csv"))


FULL = """
import pathlib
from luthier.engine.metrics import MetricsFile
from luthier.files import disk_errors
append, flag = MetricsFile.append, pathlib.Path({flag!r})
def full(self, values):
    if flag.exists() or values["step"] < 3:
        return append(self, values)
    flag.touch()
    with disk_errors(flag.parent):
        raise OSError({number}, "no")
MetricsFile.append = full
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_full_disk_during_training_does_not_fail_job(
    queue: Any, tmp_path: Path, monkeypatch: Any, number: int
) -> None:
    monkeypatch.setattr("luthier.server.jobs.scheduler.LATER", 0.2)
    job_id = queue.submit(steps=6)
    before = FULL.format(flag=str(tmp_path / "flag"), number=number)
    queue.scheduler(environment={"LUTHIER_TEST_BEFORE": before})
    job = queue.ended(job_id)
    assert (job.state, job.attempts, job.crashes) == ("Completed", 2, 0)
    with queue.database.read() as session:
        said = [each.message for each in session.query(JobEvent).filter_by(job_id=job_id)]
    (values,) = [text for text in said if "full or read-only" in text]
    assert "last checkpoint" in values


SHORT = """
import pathlib
from luthier.engine.metrics import MetricsFile
append, flag = MetricsFile.append, pathlib.Path({flag!r})
def short(self, values):
    if flag.exists() or values["step"] < 3:
        return append(self, values)
    {once}
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
MetricsFile.append = short
"""


@sqlite
@pytest.mark.slow
@pytest.mark.parametrize(("once", "state", "attempts"), [
    ("flag.touch()", "Completed", 2),
    ("pass", "Failed", 3),
])  # fmt: skip
def test_shortage_of_memory_during_training(
    queue: Any, tmp_path: Path, monkeypatch: Any, once: str, state: str, attempts: int
) -> None:
    monkeypatch.setattr("luthier.server.jobs.scheduler.LATER", 0.2)
    job_id = queue.submit(steps=6)
    before = SHORT.format(flag=str(tmp_path / "flag"), once=once)
    queue.scheduler(environment={"LUTHIER_TEST_BEFORE": before})
    job = queue.ended(job_id)
    assert (job.state, job.attempts) == (state, attempts)
    with queue.database.read() as session:
        warned = session.query(JobEvent).filter_by(job_id=job_id, kind="warning").all()
    assert any(worker.NO_MEMORY in each.message for each in warned)
    assert state == "Completed" or worker.NO_MEMORY in job.failure


@pytest.mark.slow
@sqlite
def test_late_worker_leaves_no_files(queue: Any, luthier_home: Path) -> None:
    job_id = queue.submit(steps=2)
    queue.scheduler()
    queue.ended(job_id)
    address = queue.database.engine.url.render_as_string(hide_password=False)
    late = subprocess.run(
        [*queue.command, "--kind", "training", "--id", job_id, "--lease", "an older one"],
        env={**os.environ, "LUTHIER_DATABASE": address}, capture_output=True, check=False,
    )  # fmt: skip
    assert late.returncode == 75
    assert [path.name for path in (luthier_home / "jobs").iterdir()] == [f"{job_id}.log"]
