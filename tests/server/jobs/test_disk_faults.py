"""A disk that is full, or read-only, under jobs: they wait for it, and none is lost.

The store is a small file system of its own in memory, which needs the right to mount one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from job_checks import SLOWLY, bits, check_history
from small_disk import Disk

from luthier.server.tables.custom_models import CustomModel
from luthier.server.tables.jobs import Job, JobEvent

SIZE = 64_000_000


@pytest.fixture
def luthier_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The store of the test, on a disk of its own."""
    home = tmp_path / "luthier-home"
    home.mkdir()
    monkeypatch.setenv("LUTHIER_HOME", str(home))
    if not Disk(home).mount(f"size={SIZE}"):
        pytest.skip("this user may not mount a file system")
    yield home
    Disk(home).unmount()


@pytest.fixture
def disk(luthier_home: Path) -> Disk:
    return Disk(luthier_home)


def check(queue: Any, job_id: str, expected: Any) -> None:
    job = queue.ended(job_id, 120)
    assert job.state == "Completed", job.failure
    assert bits(job) == expected
    with queue.database.read() as session:
        assert session.query(CustomModel).filter_by(job_id=job_id).count() == 1
        assert session.query(Job).filter(Job.lease.is_not(None)).count() == 0
        events = session.query(JobEvent).filter_by(job_id=job_id).order_by(JobEvent.seq).all()
    check_history(job, events)


def told_of(queue: Any, job_id: str) -> bool:
    with queue.database.read() as session:
        events = session.query(JobEvent).filter_by(job_id=job_id)
        return any("disk cannot take what the job writes" in each.message for each in events)


@pytest.mark.slow
def test_a_job_outlives_a_full_disk(queue: Any, disk: Disk) -> None:
    whole = queue.submit("whole", steps=60)
    queue.scheduler(environment={"LUTHIER_TEST_BEFORE": SLOWLY})
    expected = bits(queue.ended(whole))
    broken = queue.submit("broken", steps=60)
    queue.until(broken, lambda job: job.details.get("progress"))
    disk.fill()
    if queue.database.is_sqlite:
        time.sleep(3)  # nothing more can be told: what it was to be told to is on the same disk
        assert queue.job(broken).state in ("Running", "Queued")
    else:
        job = queue.until(broken, lambda job: job.state == "Queued")
        assert job.failure is None and told_of(queue, broken)
    disk.free()
    waits = queue.submit("waits", steps=4)
    check(queue, broken, expected)
    assert queue.ended(waits).state == "Completed"
