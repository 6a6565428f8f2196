"""Scheduling of imports: dead workers, and removal of their files."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from luthier.files import lock
from luthier.server.jobs.admission import Capacity
from luthier.server.jobs.folders import ImportFolders
from luthier.server.jobs.kinds import IMPORT
from luthier.server.jobs.scheduler import Scheduler
from luthier.server.jobs.submit import submit_import
from luthier.server.stores.removal import delete
from luthier.server.tables import imports, queue
from luthier.server.tables.arns import Arns
from luthier.server.tables.custom_models import FAILED, CustomModel
from luthier.server.tables.database import Database
from luthier.server.tables.imports import ModelImport

ACCOUNT = "000000000000"
sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
DIES = "import os, sys; print('a word', flush=True); {before}; os.kill(os.getpid(), 9)"
LOCKS = "open(sys.argv[1], 'w')"


@pytest.fixture
def model(database: Database) -> CustomModel:
    with database.write() as session:
        return submit_import(session, ACCOUNT, "model", "s3://x/y", {})


def left(home: Path) -> set[str]:
    return {path.name for path in (home / "jobs").glob("*")}


@sqlite
@pytest.mark.parametrize("before", ["pass", LOCKS], ids=["at once", "with its lock"])
def test_failed_import_leaves_no_files_after_crashes(
    database: Database, model: CustomModel, luthier_home: Path, before: str
) -> None:
    (luthier_home / "jobs").mkdir(parents=True)
    locked = str(luthier_home / "jobs" / f"import-{model.id}.lock")
    command = [sys.executable, "-c", DIES.format(before=before), locked]
    importer = Scheduler(
        database, Capacity(memory=10**12, cores=2), kinds=[IMPORT], command=command
    )
    for _ in range(imports.MOST_CRASHES):
        importer.tick()
        (child,) = importer.children.values()
        assert child.wait(30) == -9
        assert f"import-{model.id}.log" in left(luthier_home)
    importer.tick()
    with database.read() as session:
        found = session.query(CustomModel).one()
    assert found.status == FAILED and "signal 9" in str(found.failure)
    assert left(luthier_home) == set()


@sqlite
def test_import_log_is_deleted_with_model(
    database: Database, model: CustomModel, luthier_home: Path
) -> None:
    log = ImportFolders(model.id).open_log()
    os.write(log, b"Traceback")
    os.close(log)
    with database.write() as session:
        found = queue.claim(session, ModelImport, {"host": "x", "pid": 1, "born": 0.0}, 10**15)
        assert found is not None
        imports.fail(session, model.id, str(found.lease), "x")
    Scheduler(database, Capacity(), command=["/no/such/program"]).tick()
    assert left(luthier_home) == {f"import-{model.id}.log"}
    with database.read() as session:
        failed = session.query(CustomModel).one()
    delete(database, Arns(), failed)
    assert left(luthier_home) == set()


@sqlite
def test_locked_import_folder_is_not_removed(
    database: Database, model: CustomModel, luthier_home: Path
) -> None:
    with database.write() as session:
        found = queue.claim(session, ModelImport, {"host": "x", "pid": 1, "born": 0.0}, 10**15)
        assert found is not None
        imports.fail(session, model.id, str(found.lease), "x")
    folders = ImportFolders(model.id)
    folders.model.mkdir(parents=True)
    importer = Scheduler(database, Capacity(), command=["/no/such/program"])
    with lock(folders.parent / f"import-{model.id}.lock"):
        importer.tick()
        assert folders.model.is_dir()
    importer.tick()
    assert not folders.model.exists() and left(luthier_home) == set()
