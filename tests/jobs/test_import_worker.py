"""What ends a process that takes a model from outside."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier.jobs import import_worker
from luthier.jobs.admission import Capacity
from luthier.jobs.heart import LOST
from luthier.jobs.import_worker import ImportWorker
from luthier.jobs.imports import submit_import
from luthier.jobs.processes import this_process
from luthier.store import imports
from luthier.store.arns import Arns
from luthier.store.database import Database
from luthier.store.imports import ModelImport
from luthier.store.locations import Locations


class _Ended(BaseException):
    pass


def test_work_that_no_signal_reaches_ends_by_the_heart(
    luthier_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library that stays in native code hears no alarm; the lease would be kept for ever."""
    database = Database()
    worker = ImportWorker(database, Locations(database), Arns(), "m", "lease", Capacity())
    status: list[int] = []

    def leave(code: int) -> None:
        status.append(code)
        raise _Ended

    monkeypatch.setattr(import_worker, "RENEWAL", 0.01)
    monkeypatch.setattr(import_worker, "SECONDS", -import_worker.GRACE)
    monkeypatch.setattr(import_worker.os, "_exit", leave)
    with pytest.raises(_Ended):
        worker._beat()
    assert status == [LOST]


class _Asked(Exception):
    pass


def test_memory_is_asked_for_before_any_weights_come(
    luthier_home: Path, tiny_model_folder: Path, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_model_folder.as_uri()
    with database.write() as session:
        submit_import(session, "000000000000", "model", source, {})
        found = imports.claim(session, this_process(), 10**15)
    assert found is not None
    there: list[str] = []

    def asked(worker: ImportWorker, found: ModelImport, size: int) -> None:
        there.extend(path.name for path in luthier_home.rglob("models/**/*") if path.is_file())
        assert size == 3 * (tiny_model_folder / "model.safetensors").stat().st_size + (1 << 29)
        raise _Asked

    monkeypatch.setattr(ImportWorker, "_have_memory", asked)
    locations = Locations(database, file_roots=[tiny_model_folder])
    lease = str(found.lease)
    worker = ImportWorker(database, locations, Arns(), found.model_id, lease, Capacity())
    with pytest.raises(_Asked):
        worker._taken(found)
    assert "config.json" in there and "tokenizer.json" in there
    assert not any(name.endswith(".safetensors") for name in there)
    assert not list(luthier_home.rglob(".tmp-*"))
