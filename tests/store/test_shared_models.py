"""Custom models of the shared store: fetched where they lack, and gone everywhere once deleted."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from luthier import files
from luthier.errors import CorruptFile, SharedStoreAway, UnknownModel
from luthier.files import hashes_of
from luthier.models.manifest import MANIFEST, Manifest, created_now
from luthier.store import removal, shared, shared_models
from luthier.store.database import Database
from luthier.store.model_folders import custom_folder
from luthier.store.models import find, update_record
from luthier.store.shared import shared_folders, shared_store
from luthier.store.shared_models import (
    copies,
    drop_copy,
    mark_removal,
    marked_removals,
    put_model,
    remove_models_of_run,
)


@pytest.fixture(autouse=True)
def shared_folder(tmp_path: Path, luthier_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "shared").mkdir()
    monkeypatch.setenv(shared.ENVIRONMENT, str(tmp_path / "shared"))
    return tmp_path / "shared"


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The store of another machine, once :func:`move` was called."""
    return tmp_path / "elsewhere"


def model(name: str, parent: str | None = None) -> str:
    """A model on this machine and in the shared store; its id."""
    folder = custom_folder("tiny", name)
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "weights").write_text(name)
    fields = {"id": f"tiny:{name}", "created": created_now(), "parent": parent}
    saved = "adapter" if parent else "network"
    Manifest(**fields, saved=saved, files=hashes_of(folder)).write(folder)
    put_model(f"tiny:{name}", folder)
    return f"tiny:{name}"


def test_a_machine_that_lacks_a_model_fetches_it_with_those_below_it(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, luthier_home: Path
) -> None:
    model("below")
    child = model("child", "tiny:below")
    monkeypatch.setenv("LUTHIER_HOME", str(elsewhere))
    found = find(child)
    assert found.folder == elsewhere / "models/custom/tiny/child"
    assert found.parent is not None and found.parent.id == "tiny:below"
    assert hashes_of(found.folder) == hashes_of(luthier_home / "models/custom/tiny/child")
    assert {each[0] for each in copies()} == {"tiny:below", "tiny:child"}
    with pytest.raises(UnknownModel):
        find("tiny:never")


def test_a_damaged_blob_leaves_no_model(
    shared_folder: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored_id = model("one")
    digest = hashes_of(custom_folder("tiny", "one"))["deep/weights"]
    weights = shared_folder / "blobs" / "models" / "tiny" / "one" / digest
    weights.write_text("two")
    monkeypatch.setenv("LUTHIER_HOME", str(elsewhere))
    with pytest.raises(CorruptFile, match="is not what was put there"):
        find(stored_id)
    weights.unlink()
    with pytest.raises(CorruptFile, match="is missing: deep/weights of models/tiny/one"):
        find(stored_id)
    assert not [*(elsewhere / "models").rglob(MANIFEST)]


def test_a_copy_that_was_dropped_is_fetched_again() -> None:
    stored_id = model("one")
    drop_copy(stored_id)
    assert not custom_folder("tiny", "one").exists() and not [*copies()]
    assert find(stored_id).folder.is_dir()


def test_a_copy_is_dropped_where_one_who_was_killed_had_begun_to() -> None:
    stored_id = model("one")
    folder = custom_folder("tiny", "one")
    left = folder.with_name(".tmp-one~dropped")
    (left / "deep").mkdir(parents=True)
    (left / "deep" / "weights").write_text("of an earlier copy")
    assert drop_copy(stored_id)
    assert not folder.exists() and not left.exists()


def test_a_copy_that_is_fetched_as_another_is_dropped_is_marked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stored_id = model("one")

    @contextmanager
    def lock_and_fetch(path: Path, wait: bool = False) -> Iterator[bool]:
        with files.lock(path, wait=wait) as free:
            yield free
        monkeypatch.setattr(shared_models, "lock", files.lock)
        find(stored_id)  # by another process, as soon as the lock is free

    monkeypatch.setattr(shared_models, "lock", lock_and_fetch)
    drop_copy(stored_id)
    assert [each[0] for each in copies()] == [stored_id]


def test_a_copy_that_is_dropped_while_all_are_listed_is_none() -> None:
    model("one")
    model("two")
    listed = copies()
    first = next(listed)[0]
    (other,) = {"tiny:one", "tiny:two"} - {first}
    drop_copy(other)
    assert [*listed] == []


def test_a_record_that_the_shared_store_does_not_take_is_as_before(
    shared_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = find(model("one"))
    monkeypatch.setattr(shared_models.SharedFolders, "commit", refuse)
    with pytest.raises(SharedStoreAway):
        update_record(stored, lambda m: m.model_copy(update={"accepted": "yes"}))
    assert Manifest.read(stored.folder) == stored.manifest


def refuse(*_: object, **__: object) -> None:
    raise SharedStoreAway("it does not answer")


def test_a_changed_record_is_what_others_fetch(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored_id = model("one")
    changed = update_record(find(stored_id), lambda m: m.model_copy(update={"accepted": "yes"}))
    monkeypatch.setenv("LUTHIER_HOME", str(elsewhere))
    assert find(stored_id).manifest == changed.manifest


def test_a_model_that_others_stand_on_stays_until_the_last_of_them_goes(
    shared_folder: Path,
) -> None:
    below, child, other = model("below"), model("a", "tiny:below"), model("b", "tiny:below")
    folders = shared_folders()
    assert folders is not None
    removal.remove_files(below)
    removal.remove_files(child)
    assert folders.names("models") == {"models/tiny/below", "models/tiny/b"}
    removal.remove_files(other)
    assert not [path for path in shared_folder.rglob("*") if path.is_file()]
    assert not [*copies()]


def test_a_model_is_deleted_from_a_machine_that_has_no_copy(
    shared_folder: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored_id = model("one")
    monkeypatch.setenv("LUTHIER_HOME", str(elsewhere))
    removal.remove_files(stored_id)
    assert not [path for path in shared_folder.rglob("*") if path.is_file()]


def test_a_deletion_that_a_crash_cut_short_is_finished(
    shared_folder: Path, database: Database
) -> None:
    stored_id = model("one")
    shutil.rmtree(custom_folder("tiny", "one"))
    with removal.mark_for_removal() as mark:
        mark(stored_id)  # its row went, and then the process died
    assert marked_removals() == {stored_id}
    removal.finish_deletions(database)
    assert not [path for path in shared_folder.rglob("*") if path.is_file()]


def test_a_deletion_that_was_refused_leaves_the_model() -> None:
    stored_id = model("one")

    def refuse() -> None:
        with removal.mark_for_removal() as mark:
            mark(stored_id)
            raise removal.ModelInUse("in use")

    with pytest.raises(removal.ModelInUse):
        refuse()
    assert marked_removals() == set() and find(stored_id).id == stored_id


def test_what_a_failed_job_put_goes() -> None:
    model("job-a")
    model("job-b")
    assert mark_removal("tiny:never") is False
    remove_models_of_run("job-a")
    folders = shared_folders()
    assert folders is not None and folders.names("models") == {"models/tiny/job-b"}


def test_without_a_shared_store_nothing_is_put(
    monkeypatch: pytest.MonkeyPatch, shared_folder: Path, luthier_home: Path
) -> None:
    monkeypatch.delenv(shared.ENVIRONMENT)
    assert shared_store() is None
    assert find(model("one")).folder.is_dir()
    removal.remove_files("tiny:one")
    assert not [*shared_folder.iterdir()] and not (luthier_home / "shared").exists()
