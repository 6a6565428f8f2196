"""Files of models are deleted when no model needs them, in any order of deletion."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from both_databases import with_tables
from sqlalchemy import event
from sqlalchemy.orm import Session

from luthier.errors import WrongState
from luthier.files import luthier_home, write_json
from luthier.library.folders import custom_folder, working_folders
from luthier.library.models import custom_models
from luthier.library.removal import remove_side_files
from luthier.models.manifest import MANIFEST
from luthier.server.stores import removal
from luthier.server.stores.removal import remove_files, remove_unneeded
from luthier.server.tables import results
from luthier.server.tables.arns import Arns
from luthier.server.tables.custom_models import ACTIVE, CustomModel
from luthier.server.tables.database import Database, now
from luthier.server.tables.measurements import (
    EVALUATION,
    MeasuredModel,
    Measurement,
    create,
    delete,
)


def stored(name: str, parent: str | None, saved: str = "adapter") -> str:
    """A model with a run, on ``parent``."""
    model_id = f"tiny:{name}"
    write_json(
        custom_folder("tiny", name) / MANIFEST,
        {"id": model_id, "parent": parent, "saved": saved, "root": "tiny"},
    )
    run(name).mkdir(parents=True)
    (run(name) / "metrics.jsonl").write_text("")
    return model_id


def run(name: str) -> Path:
    return luthier_home() / "runs" / "tiny" / name


def left() -> set[str]:
    """Return the models on disk. Runs belong to these models."""
    models = {each.folder.name for each in custom_models()}
    runs = {path.name for path in (luthier_home() / "runs" / "tiny").iterdir()}
    assert runs <= models
    return models


@pytest.mark.parametrize("last", ["child", "grandchild"])
def test_parent_files_are_removed_with_the_last_child(last: str) -> None:
    parent = stored("parent", "tiny")
    child = stored("child", parent)
    grandchild = stored("grandchild", child)
    sibling = stored("sibling", parent)
    log = luthier_home() / "jobs" / "parent.log"
    log.parent.mkdir()
    log.write_text("rows may be quoted here")
    remove_files(parent)
    assert left() == {"parent", "child", "grandchild", "sibling"}
    # Other models do not need the run folder of a model.
    assert not run("parent").exists() and not log.exists() and run("child").exists()
    remove_files(sibling)
    assert left() == {"parent", "child", "grandchild"}
    first, second = (grandchild, child) if last == "child" else (child, grandchild)
    remove_files(first)
    assert left() == ({"parent", "child"} if last == "child" else {"parent", "child", "grandchild"})
    remove_files(second)
    assert left() == set()


def test_run_is_removed_if_model_folder_is_missing() -> None:
    model_id = stored("elsewhere", "tiny")
    shutil.rmtree(custom_folder("tiny", "elsewhere"))
    assert run("elsewhere").is_dir()
    remove_files(model_id)
    assert not run("elsewhere").exists()


@pytest.mark.parametrize("model_id", ["", ".", "..", "tiny:..", ":", "/tmp", "org/tiny", "~"])
def test_invalid_model_id_removes_no_files(model_id: str) -> None:
    stored("other", "tiny")
    new = luthier_home() / "pretraining" / "new" / "request.json"
    new.parent.mkdir(parents=True)
    new.write_text("")
    remove_side_files(model_id)
    remove_side_files("tiny")  # the base of a second model
    assert run("other").is_dir() and new.is_file()
    assert working_folders(model_id) == []


def test_parent_not_marked_for_deletion_remains() -> None:
    parent = stored("by-command-line", "tiny")
    remove_files(stored("child", parent))
    assert left() == {"by-command-line"}
    remove_unneeded(parent)
    remove_unneeded(None)
    remove_files("tiny:never")
    remove_files(None)
    assert left() == {"by-command-line"}


@pytest.fixture
def database() -> Iterator[Database]:
    yield from with_tables()


def recorded(database: Database, stored_id: str) -> CustomModel:
    """The record of a stored model."""
    name = stored_id.partition(":")[2]
    model = CustomModel(
        id=name, account="000000000000", name=name, foundation="luthier.tiny", root="luthier.tiny",
        base_model="arn", details={}, created=now(), status=ACTIVE, stored_id=stored_id,
    )  # fmt: skip
    with database.write() as session:
        session.add(model)
    return model


class Killed(BaseException):
    """Replacement for a killed process."""


def test_deletion_killed_after_commit_is_finished_at_start(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, other = stored("parent", "tiny"), stored("other", "tiny")
    model = recorded(database, parent)
    recorded(database, other)

    def killed(stored_id: str | None) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(removal, "remove_files", killed)
        with pytest.raises(Killed):
            removal.delete(database, Arns(), model)
    assert left() == {"parent", "other"}
    removal.finish_deletions(database)
    assert left() == {"other"}
    removal.finish_deletions(database)
    assert left() == {"other"}


def test_deletion_with_failed_commit_keeps_files(
    database: Database,
) -> None:
    parent = stored("parent", "tiny")
    model = recorded(database, parent)

    def fails(session: Session) -> None:
        raise OSError("the disk is full")

    event.listen(Session, "before_commit", fails)
    try:
        with pytest.raises(OSError):
            removal.delete(database, Arns(), model)
    finally:
        event.remove(Session, "before_commit", fails)
    # Removal of a child does not remove a parent that is not deleted.
    remove_files(stored("child", parent))
    removal.finish_deletions(database)
    assert left() == {"parent"}


def test_deletion_killed_before_commit_keeps_files(database: Database) -> None:
    parent = stored("parent", "tiny")
    recorded(database, parent)
    (custom_folder("tiny", "parent") / ".removed").write_bytes(b"")
    removal.finish_deletions(database)
    remove_files(stored("child", parent))
    assert left() == {"parent"}


def test_measured_model_is_not_deleted(database: Database) -> None:
    model = recorded(database, stored("parent", "tiny"))
    measured = MeasuredModel(name="parent", arn=model.arn(Arns()), stored_id="tiny:parent")
    with database.write() as session:
        row = create(session, Measurement, model.account, {}, [measured], kind=EVALUATION)
        with pytest.raises(WrongState):
            delete(session, row)
    with pytest.raises(removal.ModelInUse):
        removal.delete(database, Arns(), model)
    with database.write() as session:
        stopped = results.stop(session, session.merge(row))
        delete(session, stopped)
    removal.delete(database, Arns(), model)
    assert left() == set()
