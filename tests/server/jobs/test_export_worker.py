"""The worker of exports on a stored model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from luthier.engine.train import train
from luthier.errors import Interrupted, LeaseLost
from luthier.files import sha256_of, write_json
from luthier.library.folders import base_folder
from luthier.library.models import find
from luthier.limits import AccountQuotas
from luthier.models.manifest import MANIFEST
from luthier.recipe import Recipe
from luthier.server.jobs.admission import Capacity
from luthier.server.jobs.export_worker import INDEX, ExportWorker
from luthier.server.jobs.kinds import EXPORT
from luthier.server.jobs.processes import LOST, this_process
from luthier.server.jobs.scheduler import Scheduler
from luthier.server.jobs.submit import submit_export
from luthier.server.stores.locations import Locations
from luthier.server.stores.objects import Objects
from luthier.server.tables import queue, results
from luthier.server.tables.arns import Arns
from luthier.server.tables.custom_models import ACTIVE, CustomModel
from luthier.server.tables.database import Database, now
from luthier.server.tables.exports import ModelExport
from luthier.server.tables.jobs import COMPLETED, FAILED, QUEUED, STOPPED

pytestmark = pytest.mark.usefixtures("in_float32")
ACCOUNT = "000000000000"


@pytest.fixture
def database_url(luthier_home: Path) -> str:
    """Use SQLite only: tests of the tables cover both databases."""
    return f"sqlite:///{luthier_home / 'luthier.db'}"


def tune(home: Path, tiny_model_folder: Path) -> None:
    """Create the base model ``tiny`` and its LoRA adapter ``tiny:job-x``."""
    shutil.copytree(tiny_model_folder, base_folder("tiny"))
    manifest = {"id": "tiny", "kind": "causal_lm", "created": "2026-01-01T00:00:00+00:00"}
    write_json(base_folder("tiny") / MANIFEST, manifest)
    rows = home.parent / "rows.jsonl"
    rows.write_text('{"prompt": "say fox", "completion": "FOX"}\n' * 4)
    fields = {
        "base": "tiny", "name": "job-x", "data": {"train": str(rows), "validation_share": 0},
        "adaptation": {"method": "lora", "rank": 2},
        "training": {"max_steps": 2, "precision": "float32", "threads": 1},
    }  # fmt: skip
    train(Recipe.parse(fields))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """The models of a store, to be copied."""
    home = tmp_path_factory.mktemp("trained") / "home"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUTHIER_HOME", str(home))
        tune(home, tiny_model_folder)
    return home / "models"


@pytest.fixture
def model(database: Database, luthier_home: Path, models: Path) -> CustomModel:
    """Return the row of a LoRA model, with files and a bucket."""
    shutil.copytree(models, luthier_home / "models")
    return with_row(database)


def with_row(database: Database) -> CustomModel:
    Objects(database).create_bucket(ACCOUNT, "bucket")
    with database.write() as session:
        made = CustomModel(
            id="model", account=ACCOUNT, name="mine", foundation="luthier.tiny", root="luthier.tiny",
            base_model="arn", stored_id="tiny:job-x", status=ACTIVE, details={}, created=now(),
        )  # fmt: skip
        session.add(made)
    return made


def submit(database: Database, output: str = "s3://bucket/out/", **fields: Any) -> str:
    with database.write() as session:
        model = session.query(CustomModel).one()
        given = {"format": "safetensors", "merged": None, **fields}
        return submit_export(session, model, model.arn(Arns()), output, **given).id


def claimed(database: Database, locations: Any = None, **settings: Any) -> ExportWorker:
    """The worker of the next export."""
    with database.write() as session:
        found = queue.claim(session, ModelExport, this_process(), 10**15)
    assert found is not None
    places = locations or Locations(database)
    return ExportWorker(database, places, found.id, str(found.lease), **settings)


def row(database: Database, export_id: str) -> ModelExport:
    with database.read() as session:
        return session.query(ModelExport).filter_by(id=export_id).one()


def stop(database: Database, export_id: str) -> None:
    with database.write() as session:
        found = results.get(session, ModelExport, ACCOUNT, export_id, lock=True)
        assert found is not None
        results.stop(session, found)


def objects(database: Database, folder: Path) -> dict[str, Path]:
    """Return copies of the objects in the bucket, by key."""
    places = Locations(database)
    keys = [key for key, _ in places._built_in.below(ACCOUNT, "bucket", "")]
    for number, key in enumerate(keys):
        places._built_in.fetch(ACCOUNT, "bucket", key, folder / str(number))
    return {key: folder / str(number) for number, key in enumerate(keys)}


def left(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "jobs").iterdir())


@pytest.mark.parametrize("merged", [True, False])
def test_export_writes_files_and_index(
    database: Database, model: CustomModel, luthier_home: Path, tmp_path: Path, merged: bool
) -> None:
    made = submit(database, merged=merged)
    assert claimed(database).run() == 0
    done = row(database, made)
    assert done.state == COMPLETED, done.failure
    assert done.result is not None and done.progress is None
    assert done.result["address"] == f"s3://bucket/out/model-export-{made}"
    found = objects(database, tmp_path / "found")
    prefix = f"out/model-export-{made}/"
    index = json.loads(found.pop(f"{prefix}{INDEX}").read_text())
    assert index["files"] == done.result["files"] and index["model"] == model.arn(Arns())
    assert {f"{prefix}{each['name']}": each["sha256"] for each in index["files"]} == {
        key: sha256_of(path) for key, path in found.items()
    }
    weights = "model.safetensors" if merged else "adapter_model.safetensors"
    assert load_file(found[f"{prefix}{weights}"])
    if not merged:
        same = find("tiny:job-x").folder / weights
        assert same.read_bytes() == found[f"{prefix}{weights}"].read_bytes()
    assert left(luthier_home) == []


class Killed(BaseException):
    """Replacement for ``kill -9``: no code of the worker runs afterwards."""


class DyingLocations(Locations):
    """Locations of a worker that is killed after a number of writes."""

    def __init__(self, database: Database, files: int, act: Callable[[], None]) -> None:
        super().__init__(database)
        self.files, self.act = files, act

    def write(self, account: str, uri: str, name: str, data: bytes | Path) -> str:
        if self.files == 0:
            self.act()
        self.files -= 1
        return super().write(account, uri, name, data)


def kill() -> None:
    raise Killed


def test_export_completes_after_killed_worker(
    database: Database, model: CustomModel, luthier_home: Path, tmp_path: Path
) -> None:
    made = submit(database)
    worker = claimed(database, DyingLocations(database, 2, kill))
    with pytest.raises(Killed):
        worker.run()
    assert len(objects(database, tmp_path / "half")) == 2
    assert (luthier_home / "jobs" / f"export-{made}").is_dir()
    with database.write() as session:
        queue.expire(session, ModelExport, made, worker.lease, "signal 9")
    assert row(database, made).state == QUEUED
    assert claimed(database).run() == 0
    done = row(database, made)
    assert done.state == COMPLETED and done.result is not None
    assert len(objects(database, tmp_path / "whole")) == len(done.result["files"]) + 1
    assert left(luthier_home) == []


def test_stopped_export_writes_no_index(
    database: Database, model: CustomModel, luthier_home: Path, tmp_path: Path
) -> None:
    made = submit(database)

    def interrupt() -> None:
        stop(database, made)
        raise Interrupted("as by the signal that the heartbeat sends")

    worker = claimed(database, DyingLocations(database, 2, interrupt))
    assert worker.run() == 0
    assert row(database, made).state == STOPPED
    assert not any(key.endswith(INDEX) for key in objects(database, tmp_path / "found"))
    EXPORT.prepare(database)
    assert left(luthier_home) == []


@pytest.mark.parametrize(
    ("fields", "quotas", "words"),
    [
        ({"format": "onnx"}, {}, "mine"),
        ({}, {"stored_bytes": 10}, "quota stored_bytes"),
        ({"output": "s3://nobody-has-this/x"}, {}, "There is no bucket nobody-has-this"),
    ],
    ids=["model", "quota", "place"],
)
def test_failed_export_reports_cause_and_leaves_no_files(
    database: Database,
    model: CustomModel,
    luthier_home: Path,
    tmp_path: Path,
    fields: dict[str, Any],
    quotas: dict[str, int],
    words: str,
) -> None:
    made = submit(database, **fields)
    assert claimed(database, quotas=AccountQuotas(**quotas)).run() == 0
    failed = row(database, made)
    assert failed.state == FAILED and words in str(failed.failure)
    for own in ("job-x", str(luthier_home)):
        assert own not in str(failed.failure)
    assert objects(database, tmp_path / "found") == {} and left(luthier_home) == []


def test_export_worker_without_lease_leaves_row_unchanged(
    database: Database, model: CustomModel
) -> None:
    made = submit(database)
    worker = claimed(database)
    with database.write() as session:
        queue.release(session, ModelExport, made, worker.lease)
    assert worker.run() == LOST
    worker._renewed = 0.0
    with pytest.raises(LeaseLost):
        worker.beat()
    assert row(database, made).state == QUEUED


def test_scheduler_removes_files_of_dead_export_workers(
    database: Database, model: CustomModel, luthier_home: Path
) -> None:
    made = submit(database)
    worker = claimed(database, DyingLocations(database, 0, kill))
    with pytest.raises(Killed):
        worker.run()
    looking = Scheduler(
        database, Capacity(memory=10**12, cores=1), kinds=[EXPORT], command=["/no/such/program"]
    )
    EXPORT.prepare(database)
    assert f"export-{made}" in left(luthier_home)  # the export continues
    with database.write() as session:
        found = session.query(ModelExport).filter_by(id=made).one()
        found.end(session)
    looking.tick()
    assert left(luthier_home) == []
