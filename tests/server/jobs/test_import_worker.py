"""What ends a process that takes a model from outside."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from stored_objects import put_objects

from luthier.server.jobs import import_worker
from luthier.server.jobs.import_worker import ImportWorker
from luthier.server.jobs.processes import LOST, this_process
from luthier.server.jobs.submit import submit_import
from luthier.server.jobs.worker import Heartbeat
from luthier.server.tables import queue
from luthier.server.tables.database import Database
from luthier.server.tables.imports import ModelImport
from luthier.server.tables.locations import Locations


class _Ended(BaseException):
    pass


def test_work_that_no_signal_reaches_ends_by_the_heartbeat(
    luthier_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library that stays in native code hears no alarm; the lease would be kept for ever."""
    database = Database()
    worker = ImportWorker(database, Locations(database), "m", "lease")
    worker._began = time.monotonic()
    status: list[int] = []

    def leave(code: int) -> None:
        status.append(code)
        raise _Ended

    monkeypatch.setattr(import_worker, "SECONDS", -import_worker.GRACE)
    monkeypatch.setattr(import_worker.os, "_exit", leave)
    with pytest.raises(_Ended):
        Heartbeat(worker.beat, 0.01).run()
    assert status == [LOST]


class _Asked(Exception):
    pass


def begun(database: Database, folder: Path) -> tuple[ImportWorker, ModelImport]:
    """A worker that is to take the model in ``folder``."""
    put_objects(
        database,
        "000000000000",
        {f"model/{path.name}": path.read_bytes() for path in folder.iterdir()},
    )
    with database.write() as session:
        submit_import(session, "000000000000", "model", "s3://rows/model/", {})
        found = queue.claim(session, ModelImport, this_process(), 10**15)
    assert found is not None
    locations = Locations(database)
    lease = str(found.lease)
    return ImportWorker(database, locations, found.id, lease), found


def test_memory_is_asked_for_before_any_weights_come(
    luthier_home: Path, tiny_model_folder: Path, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, found = begun(database, tiny_model_folder)
    there: list[str] = []

    def asked(worker: ImportWorker, found: ModelImport, size: int) -> None:
        there.extend(path.name for path in luthier_home.rglob("models/**/*") if path.is_file())
        assert size == 3 * (tiny_model_folder / "model.safetensors").stat().st_size + (1 << 29)
        raise _Asked

    monkeypatch.setattr(ImportWorker, "_have_memory", asked)
    with pytest.raises(_Asked):
        worker._store(found)
    assert "config.json" in there and "tokenizer.json" in there
    assert not any(name.endswith(".safetensors") for name in there)
    assert not list(luthier_home.rglob(".tmp-*"))
