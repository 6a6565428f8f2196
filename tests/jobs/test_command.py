"""``luthier worker`` as the scheduler starts it, from one end of a job to the other."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from luthier.jobs.admission import Capacity
from luthier.jobs.scheduler import Scheduler

pytest.importorskip("luthier.store.locations")
COMMAND = "import typer; from luthier.cli.worker import worker; typer.run(worker)"


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_the_command_does_a_job(queue: Any, tmp_path: Path) -> None:
    output = tmp_path / "data" / "out"
    output.mkdir(parents=True)
    inside = queue.submit("inside", output=f"file://{output}", steps=2)
    outside = tmp_path / "outside.jsonl"
    outside.write_bytes((tmp_path / "data" / "rows.jsonl").read_bytes())
    refused = queue.submit("outside", training=[f"file://{outside}"], steps=2)
    scheduler = Scheduler(
        queue.database,
        Capacity(memory=10**12, cores=2),
        command=[sys.executable, "-c", COMMAND],
        options=["--file-root", str(tmp_path / "data")],
    )
    scheduler.start()
    queue.schedulers.append(scheduler)
    job = queue.ended(inside)
    assert job.state == "Completed", job.failure
    assert list(output.glob("model-customization-job-*/training_artifacts/*.csv"))
    job = queue.until(refused, lambda job: job.state == "Failed")
    assert "folders" in job.failure and "outside" not in job.failure
