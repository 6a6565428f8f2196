"""The worker of imports."""

from __future__ import annotations

from pathlib import Path

import pytest
from stored_objects import put_objects

from luthier.server.jobs.import_worker import ImportWorker
from luthier.server.jobs.processes import this_process
from luthier.server.jobs.submit import submit_import
from luthier.server.stores.locations import Locations
from luthier.server.tables import queue
from luthier.server.tables.database import Database
from luthier.server.tables.imports import ModelImport


class _Asked(Exception):
    pass


def begun(database: Database, folder: Path) -> tuple[ImportWorker, ModelImport]:
    """Return a worker for the import of the model in ``folder``."""
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


def test_memory_is_reserved_before_weight_download(
    luthier_home: Path, tiny_model_folder: Path, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, found = begun(database, tiny_model_folder)
    there: list[str] = []

    def asked(worker: ImportWorker, size: int) -> None:
        there.extend(path.name for path in luthier_home.rglob("models/**/*") if path.is_file())
        assert size == 3 * (tiny_model_folder / "model.safetensors").stat().st_size + (1 << 29)
        raise _Asked

    monkeypatch.setattr(ImportWorker, "_reserve", asked)
    with pytest.raises(_Asked):
        worker._store(found)
    assert "config.json" in there and "tokenizer.json" in there
    assert not any(name.endswith(".safetensors") for name in there)
    assert not list(luthier_home.rglob(".tmp-*"))
