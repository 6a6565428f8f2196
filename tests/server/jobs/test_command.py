"""``luthier worker`` as started by the scheduler, for a whole job."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import forked_commands
import pytest
from native_client import native_client, native_context
from typer.testing import CliRunner

from luthier.cli.service.admin import admin_app
from luthier.server.jobs.admission import Capacity
from luthier.server.jobs.folders import LOG_TAIL, JobFolders
from luthier.server.jobs.scheduler import Scheduler
from luthier.server.tables.objects import StoredObject

pytest.importorskip("luthier.server.stores.locations")
COMMAND = "import typer; from luthier.cli.service.worker import worker; typer.run(worker)"


def forked(code: str) -> list[str]:
    """Return the command of a worker that runs ``code`` in a process with all imports."""
    program = (
        f"import sys; sys.path.append({str(Path(forked_commands.__file__).parent)!r}); "
        "from forked_commands import stand_for; "
        f"stand_for(sys.argv[1], {code!r}, ['worker', *sys.argv[2:]])"
    )
    return [sys.executable, "-S", "-E", "-c", program, forked_commands.forker()]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_worker_command_runs_job(queue: Any) -> None:
    training = [queue.stored("rows.jsonl", queue.pairs())]
    inside = queue.submit("inside", training=training, output="s3://rows/out/", steps=2)
    refused = queue.submit("outside", training=["s3://none/rows.jsonl"], steps=2)
    scheduler = Scheduler(
        queue.database,
        Capacity(memory=10**12, cores=2),
        command=forked(COMMAND),
    )
    scheduler.start()
    queue.schedulers.append(scheduler)
    job = queue.ended(inside)
    assert job.state == "Completed", job.failure
    with queue.database.read() as session:
        keys = [each.key for each in session.query(StoredObject)]
    assert any(key.startswith("out/") and key.endswith(".csv") for key in keys)
    job = queue.until(refused, lambda job: job.state == "Failed")
    assert "none" in job.failure


@pytest.mark.slow
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_library_crash_traceback_is_in_job_log(queue: Any, monkeypatch: Any) -> None:
    job_id = queue.submit(steps=2)
    crash = (
        "import ctypes; from luthier.server.jobs.training import TrainingWorker; "
        "TrainingWorker.work = lambda self, row: ctypes.string_at(0); "
    )
    scheduler = Scheduler(
        queue.database, Capacity(memory=10**12, cores=2),
        command=forked(crash + COMMAND),
    )  # fmt: skip
    scheduler.start()
    queue.schedulers.append(scheduler)
    job = queue.ended(job_id)
    assert (job.state, job.crashes) == ("Failed", 3)
    assert "signal 11" in job.failure and "string_at" in "".join(JobFolders(job_id).log_tail())
    assert "memory" not in job.failure
    # The API and the command line show the end of the log.
    context = native_context(queue.database)
    path = f"/api/v1/jobs/{job.name}"
    assert native_client(context, "222222222222").get(path).status_code == 404
    log = native_client(context, job.account).get(path).json()["log"]
    assert log == JobFolders(job_id).log_tail() and 5 < len(log) <= LOG_TAIL
    monkeypatch.setattr(
        "luthier.server.tables.schema.upgrade", lambda database: None
    )  # has all tables
    command = ["jobs", "show", job.name, "--database", queue.database.url, "--json"]
    shown = json.loads(CliRunner().invoke(admin_app, command).stdout)
    assert (shown["failure"], shown["log"]) == (job.failure, log)
    command = ["jobs", "list", "--database", queue.database.url, "--json"]
    (listed,) = json.loads(CliRunner().invoke(admin_app, command).stdout)["jobs"]
    assert (listed["name"], listed["state"], listed["suffix"]) == (job.name, "Failed", None)


def test_worker_exits_when_stdin_closes() -> None:
    # The database of the worker does not answer.
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
