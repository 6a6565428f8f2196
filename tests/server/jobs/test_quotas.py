"""Storage quotas of jobs and imports: above a quota they fail and leave no files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from stored_objects import put_objects

from luthier.server.jobs.import_worker import ImportWorker
from luthier.server.jobs.processes import this_process
from luthier.server.jobs.submit import submit_import
from luthier.server.stores.locations import Locations
from luthier.server.stores.objects import Objects
from luthier.server.stores.removal import remove
from luthier.server.tables import queue as leased_work
from luthier.server.tables.accounts import create_account, set_quota
from luthier.server.tables.custom_models import CustomModel
from luthier.server.tables.database import Database, now
from luthier.server.tables.imports import ModelImport
from luthier.server.tables.storage import stored_by
from luthier.server.tables.usage import report

ACCOUNT = "000000000000"
pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


def stored(database: Database) -> int:
    with database.read() as session:
        return stored_by(session, ACCOUNT)


def quota(database: Database, **values: int) -> None:
    with database.write() as session:
        set_quota(session, ACCOUNT, **values)


@pytest.mark.slow
def test_job_over_storage_quota_leaves_no_files(queue: Any, luthier_home: Path) -> None:
    database, objects = queue.database, Objects(queue.database)
    with database.write() as session:
        create_account(session, ACCOUNT)
    objects.create_bucket(ACCOUNT, "rows")
    queue.scheduler()
    assert queue.ended(queue.submit("whole")).state == "Completed"
    with database.read() as session:
        model = session.query(CustomModel).one()
        today = now().date()
        (used,) = report(session, today, today, ACCOUNT)
    files = luthier_home / "models" / "custom"
    on_disk = sum(path.stat().st_size for path in files.rglob("*") if path.is_file())
    assert stored(database) == model.stored_bytes == on_disk > 0
    assert 0 < used["training_seconds"] < 60
    # The model fits and the outputs fit, but not both.
    for name, room in (("outputs", on_disk + 1000), ("model", 1000)):
        quota(database, stored_bytes=on_disk + room)
        job = queue.ended(queue.submit(name, output="s3://rows/out/"))
        assert job.state == "Failed" and "stored_bytes" in job.failure
        with database.read() as session:
            assert [each.name for each in session.query(CustomModel)] == ["whole"]
        assert len(list(files.rglob("luthier.json"))) == 1
        assert stored(database) == on_disk
        assert not list(objects.files.folder.rglob("??/*"))
    with database.write() as session:
        remove(session, session.query(CustomModel).one(), "arn")
    assert stored(database) == 0


def test_import_over_storage_quota_fails_before_copy(
    luthier_home: Path, tiny_model_folder: Path, database: Database
) -> None:
    with database.write() as session:
        create_account(session, ACCOUNT)
    files = {f"model/{each.name}": each.read_bytes() for each in tiny_model_folder.iterdir()}
    put_objects(database, ACCOUNT, files)
    there = stored(database)
    models = []
    for name, room in (("small", 1000), ("whole", 1 << 30)):
        quota(database, stored_bytes=there + room)
        with database.write() as session:
            submit_import(session, ACCOUNT, name, "s3://rows/model/", {})
            found = leased_work.claim(session, ModelImport, this_process(), 10**15)
        assert found is not None
        places = Locations(database)
        ImportWorker(database, places, found.id, str(found.lease)).work(found)
        with database.read() as session:
            models.append(session.query(CustomModel).filter_by(name=name).one())
        if name == "small":
            assert not list((luthier_home / "models").rglob("*.safetensors"))
    failed, whole = models
    assert failed.status == "Failed" and "stored_bytes" in str(failed.failure)
    assert whole.status == "Active"
    weights = (tiny_model_folder / "model.safetensors").stat().st_size
    assert stored(database) - there == whole.stored_bytes > weights
