"""A queue with real workers: tiny base model, database, scheduler, data."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from forked_commands import forker
from stored_objects import put_objects

from luthier.files import write_json
from luthier.library.folders import base_folder
from luthier.models.manifest import MANIFEST
from luthier.server.jobs.admission import Capacity
from luthier.server.jobs.scheduler import Scheduler
from luthier.server.jobs.submit import Submission, submit
from luthier.server.tables.arns import Arns
from luthier.server.tables.database import Database
from luthier.server.tables.foundation import foundation_model
from luthier.server.tables.jobs import Job

FORKS = Path(__file__).with_name("worker_forks.py")
ACCOUNT = "000000000000"
OTHER = "111111111111"


@pytest.fixture
def tiny_base(luthier_home: Path, tiny_model_folder: Path) -> str:
    """A base model in the store: ``tiny``, or ``luthier.tiny``."""
    shutil.copytree(tiny_model_folder, base_folder("tiny"))
    manifest = {"id": "tiny", "kind": "causal_lm", "created": "2026-01-01T00:00:00+00:00"}
    write_json(base_folder("tiny") / MANIFEST, manifest)
    return "tiny"


def pairs(count: int = 12) -> list[dict[str, Any]]:
    """Return distinct rows of prompt and completion."""
    words = ("red", "blue", "green", "small", "tall", "loud", "quiet")
    return [
        {
            "prompt": f"What is {words[n % 7]} number {n}?",
            "completion": f"It is the {words[(n * 3) % 7]} one, {n * n}.",
        }
        for n in range(count)
    ]


class Queue:
    """A job queue with a tiny model and few steps."""

    def __init__(self, database: Database, folder: Path, command: list[str]) -> None:
        self.database, self.folder, self.command = database, folder, command
        self.schedulers: list[Scheduler] = []
        self.pairs = pairs

    def file(self, name: str, rows: list[Any]) -> str:
        """Store rows as a file and return its address; a string is a raw line."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return f"file://{path}"

    def stored(self, key: str, rows: list[Any]) -> str:
        """Address of rows in the built-in object store."""
        text = "".join(f"{json.dumps(row)}\n" for row in rows)
        put_objects(self.database, ACCOUNT, {key: text.encode()})
        return f"s3://rows/{key}"

    def submission(self, name: str = "one", **changes: Any) -> Submission:
        """Return a parsed submission."""
        base = foundation_model("luthier.tiny")
        assert base is not None
        steps = changes.pop("steps", 6)
        training = {"max_steps": steps, "batch_size": 4, "precision": "float32", "threads": 1}
        fields: dict[str, Any] = {
            "account": ACCOUNT,
            "api": "bedrock",
            "job_name": name,
            "model_name": name,
            "customization_type": "FINE_TUNING",
            "base": base,
            "settings": {"training": training},
            **changes,
        }
        if "training" not in fields:
            fields["training"] = [self.file("rows.jsonl", pairs())]
        return Submission(**fields)

    def submit(self, name: str = "one", **changes: Any) -> str:
        """Submit a job and return its id."""
        with self.database.write() as session:
            return submit(session, self.submission(name, **changes), Arns()).id

    def scheduler(self, **settings: Any) -> Scheduler:
        """Return a running scheduler whose workers start at once."""
        capacity = settings.pop("capacity", Capacity(memory=64_000_000_000, cores=2))
        made = Scheduler(self.database, capacity, command=self.command, **settings)
        made.start()
        self.schedulers.append(made)
        return made

    def job(self, job_id: str) -> Job:
        """Return the job's current row."""
        with self.database.read() as session:
            return session.query(Job).filter_by(id=job_id).one()

    def until(self, job_id: str, wanted: Callable[[Job], Any], seconds: float = 300) -> Job:
        """Wait for a condition of a job; a failed job is an error."""
        deadline = time.monotonic() + seconds
        while True:
            job = self.job(job_id)
            if wanted(job):
                return job
            if job.state == "Failed" and job.has_working_files:
                time.sleep(0.02)
                continue
            if time.monotonic() > deadline or job.state == "Failed":
                log = Path(os.environ["LUTHIER_HOME"], "jobs", f"{job_id}.log")
                text = log.read_text() if log.exists() else "no log"
                raise AssertionError(f"{job.state}, {job.failure}, {job.details}\n{text}")
            time.sleep(0.02)

    def ended(self, job_id: str, seconds: float = 300) -> Job:
        """Wait until a job has ended and its files are cleaned up."""
        done = ("Completed", "Failed", "Stopped")
        return self.until(
            job_id, lambda job: job.state in done and not job.has_working_files, seconds
        )

    def kill(self, job_id: str) -> int | None:
        """Kill the job's worker, if any, and return its process id."""
        worker = self.job(job_id).worker
        if worker is None or worker.get("starting"):
            return None
        with suppress(ProcessLookupError):
            os.kill(worker["pid"], 9)
        return int(worker["pid"])


@pytest.fixture
def queue(database: Database, tmp_path: Path, tiny_base: str) -> Iterator[Queue]:
    """Yield an empty queue with immediate workers; remaining workers are killed at the end."""
    command = [sys.executable, "-S", "-E", str(FORKS), forker()]
    made = Queue(database, tmp_path / "data", command)
    yield made
    for scheduler in made.schedulers:
        scheduler.stop()
    with database.read() as session:
        ids = [job.id for job in session.query(Job).filter(Job.lease.is_not(None))]
    for job_id in ids:
        made.kill(job_id)
    for scheduler in made.schedulers:
        for child in scheduler.children.values():
            child.wait(60)
