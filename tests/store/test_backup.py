"""Backups of a service that goes on working, and what restoring them gives."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from postgres import Postgres
from principals_of import FIRST, made_at
from sqlalchemy import select, text

from luthier.errors import CorruptFile, RefusedInput, RunConflict
from luthier.files import lock, sha256_of, write_bytes, write_json
from luthier.store import accounts, principals
from luthier.store import backup as backups
from luthier.store.audit import Event, append, entries
from luthier.store.backup import backup, restore
from luthier.store.custom_models import ACTIVE, CustomModel
from luthier.store.database import Database, now
from luthier.store.jobs import COMPLETED, RUNNING, Job
from luthier.store.objects import ObjectMetadata, ObjectPiece, Objects
from luthier.store.sealing import Sealing, server_key
from luthier.store.snapshot import remove_orphaned_snapshots, snapshot


@pytest.fixture
def database_url(luthier_home: Path) -> str:
    """SQLite's, which is in a backup as it is; a backup of PostgreSQL has tests of its own."""
    return f"sqlite:///{luthier_home / 'luthier.db'}"


@pytest.fixture
def store(database: Database, luthier_home: Path) -> Path:
    """A store with an account, a key and some files."""
    with database.write() as session:
        accounts.create_account(session, FIRST)
        root = principals.create_user(session, FIRST, "root", role="administrator")
        principals.create_access_key(session, root, Sealing(server_key()), "AKIA1", "the-secret")
        append(session, Event("luthier:test"))
    put(database, b"the content" * 100)
    for name in ("models/a/weights.safetensors", "objects/ab/no-row", "models/é/x y.json"):
        (luthier_home / name).parent.mkdir(parents=True, exist_ok=True)
        (luthier_home / name).write_bytes(name.encode() * 100)
    (luthier_home / "models" / ".tmp-half").write_bytes(b"half")
    return luthier_home


def put(database: Database, content: bytes, key: str = "key") -> Path:
    """Let ``key`` of a bucket name ``content``; its file."""
    objects = Objects(database)
    if not any(bucket.name == "data" for bucket in objects.buckets(FIRST)):
        objects.create_bucket(FIRST, "data")
    with objects.files.begin(FIRST) as file:
        file.write(content)
        written = file.finish()
    objects.put(FIRST, "data", key, written, ObjectMetadata())
    return objects.files.path(FIRST, written.id)


def job_in(state: str, job_id: str) -> Job:
    return Job(
        id=job_id, account=FIRST, name=job_id, model_name=job_id, face="native",
        customization_type="FINE_TUNING", foundation="luthier.tiny", base_model="arn", command="tune",
        recipe={}, request={}, output=None, validators=[], state=state, failure=None, result=None,
        time_limit=None, lease=None, lease_ends=None, worker=None, created=now(), modified=now(),
        started=None, ended=None,
    )  # fmt: skip


def model_of(database: Database, home: Path, name: str, job_id: str | None) -> Path:
    """A custom model with a row, its files and the folder of its run; the model's folder."""
    folder = home / "models" / "custom" / "tiny" / name
    folder.mkdir(parents=True)
    (folder / "adapter.safetensors").write_bytes(name.encode() * 50)
    files = {"adapter.safetensors": sha256_of(folder / "adapter.safetensors")}
    write_json(folder / "luthier.json", {"id": f"tiny:{name}", "parent": None, "files": files})
    write_json(home / "runs" / "tiny" / name / "result.json", {})
    with database.write() as session:
        session.add(
            CustomModel(
                id=name, account=FIRST, name=name, foundation="luthier.tiny", root="", base_model="",
                stored_id=f"tiny:{name}", job_id=job_id, openai_id=None, status=ACTIVE, failure=None,
                details={}, created=now(),
            )
        )  # fmt: skip
    return folder


def restored_secret(home: Path) -> str:
    database = Database(f"sqlite:///{home / 'luthier.db'}")
    with database.read() as session:
        found = principals.signer(session, "AKIA1", Sealing(server_key(home)))
    database.close()
    assert found is not None
    return found.secret


def test_there_and_back(database: Database, store: Path, tmp_path: Path) -> None:
    made = backup(database, store, tmp_path / "backup", with_key=True)
    assert (made.files, made.database, made.key) == (4, True, True)
    assert made.damaged == ()
    home = tmp_path / "other"
    assert restore(tmp_path / "backup", home).files == 4
    assert restored_secret(home) == "the-secret"
    assert (home / "models/é/x y.json").read_bytes() == (store / "models/é/x y.json").read_bytes()
    assert not list(home.rglob(".tmp-*")) and not list(store.glob(".tmp-*"))
    # Of objects there is what rows name, and nothing else.
    assert [path.read_bytes() for path in (home / "objects").rglob("*") if path.is_file()] == [
        b"the content" * 100
    ]
    for key in (home / "server.key", tmp_path / "backup" / "server.key"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600


def test_what_a_killed_restore_left_goes_and_two_do_not_mix(
    database: Database, store: Path, tmp_path: Path
) -> None:
    backup(database, store, tmp_path / "backup")
    home, left = tmp_path / "other", tmp_path / ".tmp-other~killed"
    left.mkdir()
    (left / "part").write_bytes(b"half of it")
    with lock(tmp_path / ".other.restoring") as free:
        assert free
        with pytest.raises(RunConflict, match="another restore"):
            restore(tmp_path / "backup", home)
    assert left.exists() and not home.exists()
    restore(tmp_path / "backup", home)
    assert home.exists() and not list(tmp_path.glob(".*"))


def modes_below(folder: Path) -> set[tuple[bool, int]]:
    """Permissions of ``folder`` and all in it, each with whether it is of a folder."""
    entries = [folder, *folder.rglob("*")]
    return {(entry.is_dir(), stat.S_IMODE(entry.stat().st_mode)) for entry in entries}


def test_only_the_owner_reads_a_backup_and_what_is_restored(
    database: Database, store: Path, tmp_path: Path
) -> None:
    before = os.umask(0)
    try:
        backup(database, store, tmp_path / "backup")
        home = tmp_path / "other"
        home.mkdir(mode=0o755)
        restore(tmp_path / "backup", home)
        private = {(True, 0o700), (False, 0o600)}
        assert modes_below(tmp_path / "backup") == modes_below(home) == private
        restored = Database(f"sqlite:///{home / 'luthier.db'}")
        with restored.write() as session:
            append(session, Event("luthier:test"))
            assert (home / "luthier.db-wal").exists()
            assert modes_below(home) == private
        restored.close()
    finally:
        os.umask(before)


def test_the_key_is_left_out_unless_asked_for(
    database: Database, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not backup(database, store, tmp_path / "backup").key
    assert not list((tmp_path / "backup").rglob("server.key*"))
    everything = [p.read_bytes() for p in (tmp_path / "backup").rglob("*") if p.is_file()]
    assert not any(b"the-secret" in content for content in everything)
    restore(tmp_path / "backup", tmp_path / "other")
    home = tmp_path / "other"
    monkeypatch.setenv("LUTHIER_HOME", str(home))
    restored = Database(f"sqlite:///{home / 'luthier.db'}")
    with restored.read() as session:
        # No other key is made, which would open nothing.
        with pytest.raises(CorruptFile, match=r"no server key.*\(AKIA1\).*keys remove ID"):
            principals.matching_server_key(session)
        assert not (home / "server.key").exists()
        server_key(home)
        with pytest.raises(CorruptFile, match=r"another one.*\(AKIA1\).*put the server\.key"):
            principals.matching_server_key(session)
        assert principals.signer(session, "AKIA1", Sealing(server_key(home))) is None
        (home / "server.key").write_bytes((store / "server.key").read_bytes())
        assert principals.matching_server_key(session) == server_key(store)
    with restored.write() as session:
        (home / "server.key").unlink()
        principals.remove_key(session, principals.key_of(session, "AKIA1"))
        assert principals.matching_server_key(session) == server_key(home) != server_key(store)
    restored.close()


@pytest.mark.slow
def test_a_backup_while_others_write(database: Database, store: Path, tmp_path: Path) -> None:
    done = threading.Event()

    def write() -> None:
        while not done.is_set():
            with database.write() as session:
                append(session, Event("x:one"), Event("x:two"))

    threads = [threading.Thread(target=write) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(5):
        backup(database, store, tmp_path / f"backup{number}")
    done.set()
    for thread in threads:
        thread.join()
    for number in range(5):
        restore(tmp_path / f"backup{number}", tmp_path / f"home{number}")
        copy = Database(f"sqlite:///{tmp_path / f'home{number}' / 'luthier.db'}")
        with copy.read() as session:
            # Transactions are in it whole.
            assert len(entries(session, limit=10_000)) % 2 == 1
        copy.close()


def test_what_was_changed_is_not_restored(database: Database, store: Path, tmp_path: Path) -> None:
    source = tmp_path / "backup"
    backup(database, store, source)
    home = tmp_path / "other"
    weights = source / "files/models/a/weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + b"x")
    with pytest.raises(CorruptFile, match=r"a/weights.safetensors was changed\. Nothing was rest"):
        restore(source, home)
    weights.unlink()
    with pytest.raises(CorruptFile, match=r"a/weights.safetensors is missing\. Nothing was rest"):
        restore(source, home)
    weights.write_bytes(whole)
    copied = (source / "luthier.db").read_bytes()
    (source / "luthier.db").write_bytes(copied + b"\0")
    with pytest.raises(CorruptFile, match=r"luthier.db is missing or was changed"):
        restore(source, home, allow_damaged=True)
    (source / "luthier.db").write_bytes(copied)
    (source / "files" / "extra").write_bytes(b"x")
    with pytest.raises(CorruptFile, match="extra, which was not backed up"):
        restore(source, home)
    (source / "files" / "extra").unlink()
    manifest = json.loads((source / "backup.json").read_text())
    manifest["hashes"]["files/../../escaped"] = "0" * 64
    (source / "backup.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptFile, match="which no backup holds"):
        restore(source, home)
    assert not home.exists()


def test_the_rest_of_a_damaged_backup_is_restored_where_that_is_allowed(
    database: Database, store: Path, tmp_path: Path
) -> None:
    for name in ("one", "two", "three"):
        put(database, name.encode(), name)
    source, home = tmp_path / "backup", tmp_path / "other"
    backup(database, store, source, with_key=True)
    objects = {p.read_bytes(): p for p in (source / "files/objects").rglob("*") if p.is_file()}
    objects[b"one"].unlink()
    objects[b"two"].write_bytes(b"TWO")
    (source / "files/models/a/weights.safetensors").unlink()
    with pytest.raises(CorruptFile, match=r"is not whole: .*; .*; .*\. Nothing was") as refused:
        restore(source, home)
    for part in ("s3://data/one", "s3://data/two", "weights.safetensors is missing"):
        assert part in str(refused.value)
    made = restore(source, home, allow_damaged=True)
    assert len(made.damaged) == 3 and made.key
    contents = [path.read_bytes() for path in home.rglob("*") if path.is_file()]
    assert b"three" in contents and b"TWO" not in contents


def test_the_key_is_there_with_the_rest_or_nothing_is(
    database: Database, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, home = tmp_path / "backup", tmp_path / "other"
    backup(database, store, source, with_key=True)
    assert (source / "server.key").read_bytes() == (store / "server.key").read_bytes()
    replace = os.replace

    def killed(old: Path, new: Path) -> None:
        replace(old, new)
        if Path(new) == home:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        restore(source, home)
    monkeypatch.undo()
    assert (home / "server.key").read_bytes() == (store / "server.key").read_bytes()
    (source / "server.key").write_bytes(b"x" * 32)
    with pytest.raises(CorruptFile, match=r"server.key is not the one that was backed up"):
        restore(source, tmp_path / "third")
    (source / "server.key").unlink()
    assert not restore(source, tmp_path / "third").key


def test_relative_folders(
    database: Database, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    backup(database, store, Path("backup"))
    restore(Path("backup"), Path("other"))
    monkeypatch.chdir(tmp_path / "backup")
    restore(Path(), Path("../third"))
    assert (tmp_path / "third" / "luthier.db").is_file()


def test_homes_that_cannot_be_restored_into(
    database: Database, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "backup"
    backup(database, store, source)
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunConflict, match="not empty"):
        restore(source, tmp_path / "file")
    elsewhere, home = tmp_path / "disk" / "store", tmp_path / "link"
    elsewhere.mkdir(parents=True)
    home.symlink_to(elsewhere)
    restore(source, home)
    assert home.is_symlink() and (elsewhere / "luthier.db").is_file()
    volume = tmp_path / "volume"
    volume.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == volume)
    with pytest.raises(RefusedInput, match=r"mount point.*LUTHIER_HOME=.*volume/luthier"):
        restore(source, volume)
    restore(source, volume / "luthier")
    monkeypatch.undo()

    empty, copyfile = tmp_path / "empty", shutil.copyfile

    def busy(one: Path, other: Path) -> Path:
        (empty / "precious").write_text("x")  # a service that began to work there
        return copyfile(one, other)

    empty.mkdir()
    monkeypatch.setattr(shutil, "copyfile", busy)
    with pytest.raises(RunConflict, match="not empty any more; nothing was restored"):
        restore(source, empty)
    assert [path.name for path in empty.iterdir()] == ["precious"]


@pytest.mark.parametrize("text", ["[" * 200_000, '{"format": 1, "hashes": {"files/a": null}}', "{"])
def test_a_manifest_that_makes_no_sense(tmp_path: Path, text: str) -> None:
    (tmp_path / "backup").mkdir()
    (tmp_path / "backup" / "backup.json").write_text(text)
    with pytest.raises(CorruptFile):
        restore(tmp_path / "backup", tmp_path / "other")


def test_a_folder_that_is_no_backup(tmp_path: Path) -> None:
    with pytest.raises(CorruptFile, match=r"has no backup.json: it is no backup.*Nothing was"):
        restore(tmp_path, tmp_path / "other")


def test_places_that_are_refused(database: Database, store: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusedInput, match="lies in the store"):
        backup(database, store, store / "backup")
    backup(database, store, tmp_path / "backup")
    with pytest.raises(RunConflict, match="already"):
        backup(database, store, tmp_path / "backup")
    with pytest.raises(RunConflict, match="not empty"):
        restore(tmp_path / "backup", store)
    with pytest.raises(CorruptFile, match=r"backup\.json"):
        restore(tmp_path, tmp_path / "other")


def test_a_database_that_does_not_hold_together(
    database: Database, store: Path, tmp_path: Path
) -> None:
    backup(database, store, tmp_path / "backup")
    copy = tmp_path / "backup" / "luthier.db"
    copy.write_bytes(copy.read_bytes()[:4096] + b"\xff" * 8192)
    manifest = json.loads((tmp_path / "backup" / "backup.json").read_text())
    manifest["hashes"]["luthier.db"] = sha256_of(copy)
    (tmp_path / "backup" / "backup.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptFile, match=r"luthier\.db"):
        restore(tmp_path / "backup", tmp_path / "other")


def test_the_service_goes_on(database: Database, store: Path, tmp_path: Path) -> None:
    backup(database, store, tmp_path / "backup")
    with database.write() as session:
        session.execute(text("UPDATE users SET name='renamed'"))
    restore(tmp_path / "backup", tmp_path / "other")
    copy = Database(f"sqlite:///{tmp_path / 'other' / 'luthier.db'}")
    with copy.read() as session:
        assert [user.name for user in principals.users(session)] == ["root"]
    copy.close()


def test_what_goes_during_a_backup_is_in_it_with_its_row(
    database: Database, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(database, store, "job-abc", None)
    copy_sqlite = backups._copy_sqlite

    def change_meanwhile(*arguments: object) -> None:
        """Between the moment that is copied and the copy: one goes, one is replaced, one comes."""
        Objects(database).delete(FIRST, "data", ["key"])
        put(database, b"later", "replaced")
        put(database, b"new", "new")
        (model / "adapter.safetensors").unlink()
        copy_sqlite(*arguments)  # type: ignore[arg-type]

    put(database, b"earlier", "replaced")
    monkeypatch.setattr(backups, "_copy_sqlite", change_meanwhile)
    backup(database, store, tmp_path / "backup")
    restore(tmp_path / "backup", tmp_path / "other")
    copy = Database(f"sqlite:///{tmp_path / 'other' / 'luthier.db'}")
    with copy.read() as session:
        hashes = set(session.scalars(select(ObjectPiece.sha256)))
    copy.close()
    found = {sha256_of(p) for p in (tmp_path / "other" / "objects").rglob("*") if p.is_file()}
    assert hashes == found
    assert hashes == {
        hashlib.sha256(each).hexdigest() for each in (b"the content" * 100, b"earlier")
    }
    assert (tmp_path / "other/models/custom/tiny/job-abc/adapter.safetensors").is_file()


def test_a_store_that_has_lost_files_is_not_backed_up_unless_that_is_allowed(
    database: Database, store: Path, tmp_path: Path
) -> None:
    gone, changed = put(database, b"gone", "gone\x1b[31m"), put(database, b"changed", "changed")
    gone.unlink()
    changed.write_bytes(b"CHANGED")
    model = model_of(database, store, "job-abc", None)
    (model / "adapter.safetensors").write_bytes(b"other")
    with pytest.raises(CorruptFile, match="nothing was backed up") as refused:
        backup(database, store, tmp_path / "backup")
    for part in ("s3://data/gone", "s3://data/changed", "job-abc/adapter.safetensors"):
        assert part in str(refused.value)
    assert not (tmp_path / "backup").exists()
    made = backup(database, store, tmp_path / "backup", allow_damaged=True)
    assert len(made.damaged) == 3
    with pytest.raises(CorruptFile, match=r"is not whole.*s3://data/"):
        restore(tmp_path / "backup", tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert len(restore(tmp_path / "backup", tmp_path / "other", allow_damaged=True).damaged) == 3


@pytest.mark.parametrize("lost", ["objects", "models"])
def test_a_backup_that_lacks_a_file_of_a_row_is_not_restored(
    database: Database, store: Path, tmp_path: Path, lost: str
) -> None:
    """As earlier versions made them: the list of files itself leaves one out."""
    model_of(database, store, "job-abc", None)
    source = tmp_path / "backup"
    backup(database, store, source)
    manifest = json.loads((source / "backup.json").read_text())
    names = [
        name
        for name in manifest["hashes"]
        if name.startswith((f"files/{lost}/0", f"files/{lost}/c"))
    ]
    for name in names:
        del manifest["hashes"][name]
        (source / name).unlink()
    del manifest["damaged"]
    (source / "backup.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptFile, match="s3://data/key" if lost == "objects" else "job-abc"):
        restore(source, tmp_path / "other")
    assert names and not (tmp_path / "other").exists()


def test_work_that_goes_on_is_there_and_what_is_being_removed_is_not(
    database: Database, store: Path, tmp_path: Path
) -> None:
    with database.write() as session:
        session.add_all(
            [job_in(RUNNING, "running"), job_in(COMPLETED, "done"), job_in(COMPLETED, "gone")]
        )
    model_of(database, store, "job-done", "done")
    for job in ("running", "done", "gone"):
        write_json(store / "jobs" / job / "sources.json", {})
        write_json(store / "runs" / "tiny" / f"job-{job}" / "request.json", {})
        (store / "jobs" / f"{job}.log").write_text("log")
    steps = store / "runs" / "tiny" / "job-running" / "checkpoints"
    for step in ("step-1", "step-2"):
        write_json(steps / step / "state.json", {"sha256": {"tensors.safetensors": "x"}})
    (steps / "step-2" / "tensors.safetensors").write_bytes(b"tensors")
    # A model of which half is removed already, as its record is.
    model_of(database, store, "job-half", None)
    with database.write() as session:
        session.execute(text("DELETE FROM custom_models WHERE name='job-half'"))
    (store / "models/custom/tiny/job-half/adapter.safetensors").unlink()
    backup(database, store, tmp_path / "backup")
    files = tmp_path / "backup" / "files"
    there = {p.relative_to(files).as_posix() for p in files.rglob("*") if p.is_file()}
    assert {name for name in there if not name.startswith(("objects/", "models/a/", "models/é/"))} == {
        "jobs/running/sources.json", "jobs/running.log", "jobs/done.log", "jobs/gone.log",
        "runs/tiny/job-running/request.json",
        "runs/tiny/job-running/checkpoints/step-2/state.json",
        "runs/tiny/job-running/checkpoints/step-2/tensors.safetensors",
        "runs/tiny/job-done/request.json", "runs/tiny/job-done/result.json",
        "runs/tiny/job-half/result.json",
        "models/custom/tiny/job-done/adapter.safetensors", "models/custom/tiny/job-done/luthier.json",
    }  # fmt: skip


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_writers_wait_only_for_models_that_came_meanwhile(
    database: Database, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    """Without hard links to copy all models would take longer than writers may wait."""
    for name in ("same", "replaced", "removed"):
        model_of(database, store, name, None)
    step = store / "runs" / "tiny" / "replaced" / "checkpoints" / "step-1"
    write_json(step / "state.json", {"sha256": {}})
    model_of(database, store, "new", None)
    (store / "models/custom/tiny/new").rename(tmp_path / "new")
    meanwhile = list[str]()
    waiting = False
    link, without_writers = os.link, database.without_writers

    def named(source: Path, target: Path) -> None:
        if waiting:
            meanwhile.append(source.relative_to(store).as_posix())
        if not links:
            raise OSError(errno.EXDEV, "another disk")
        link(source, target)

    @contextmanager
    def after_changes() -> Iterator[None]:
        nonlocal waiting
        folder = store / "models" / "custom" / "tiny"
        with database.write() as session:
            session.execute(text("DELETE FROM custom_models WHERE name='removed'"))
        shutil.rmtree(folder / "removed")
        (tmp_path / "new").rename(folder / "new")
        # Another of the same name and length, as a run that is started again stores it.
        write_bytes(folder / "replaced" / "adapter.safetensors", b"REPLACED" * 50)
        files = {"adapter.safetensors": sha256_of(folder / "replaced" / "adapter.safetensors")}
        manifest = {"id": "tiny:replaced", "parent": None, "files": files}
        write_json(folder / "replaced" / "luthier.json", manifest)
        with without_writers():
            waiting = True
            yield
        waiting = False

    monkeypatch.setattr(os, "link", named)
    monkeypatch.setattr(database, "without_writers", after_changes)
    backup(database, store, tmp_path / "backup")
    folders = {Path(name).parent.name for name in meanwhile if "models/custom" in name}
    assert folders == {"new", "replaced"}
    assert not any("checkpoints" in name for name in meanwhile)
    files = tmp_path / "backup" / "files"
    models = files / "models" / "custom" / "tiny"
    there = {path.relative_to(models).as_posix() for path in models.rglob("*") if path.is_file()}
    assert there == {
        f"{model}/{name}"
        for model in ("same", "replaced", "new")
        for name in ("adapter.safetensors", "luthier.json")
    }
    assert (models / "replaced" / "adapter.safetensors").read_bytes() == b"REPLACED" * 50
    assert (files / step.relative_to(store) / "state.json").exists()


def test_one_backup_at_a_time(database: Database, store: Path, tmp_path: Path) -> None:
    with snapshot(database, store), pytest.raises(RunConflict, match="another backup"):
        backup(database, store, tmp_path / "backup")
    backup(database, store, tmp_path / "backup")


HOLD = """
import sys, time
from pathlib import Path
from luthier.store.database import Database
from luthier.store.snapshot import snapshot
database = Database(sys.argv[1])
if sys.argv[2] == "writers":
    with database.without_writers():
        print("here", flush=True)
        time.sleep(120)
with snapshot(database, Path(sys.argv[3])):
    print("here", flush=True)
    time.sleep(120)
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["writers", "snapshot"])
def test_a_backup_that_is_killed_blocks_nobody(
    database_url: str, luthier_home: Path, tmp_path: Path, stage: str
) -> None:
    for database in made_at(database_url):
        put(database, b"content")
        command = [sys.executable, "-c", HOLD, database_url, stage, str(luthier_home)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "here\n"
        written = threading.Event()

        def write(database: Database = database, written: threading.Event = written) -> None:
            with database.write() as session:
                append(session, Event("x:one"))
            written.set()

        writer = threading.Thread(target=write)
        writer.start()
        # Writers wait while the moment is taken, and no longer.
        assert written.wait(1.0) == (stage == "snapshot")
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        writer.join(20)
        assert written.is_set()
        assert bool(list(luthier_home.glob(".tmp-backup~*"))) == (stage == "snapshot")
        remove_orphaned_snapshots(luthier_home)
        assert not list(luthier_home.glob(".tmp-*"))
        backup(database, luthier_home, tmp_path / "backup")


def test_postgres_is_in_it_as_it_was_at_that_moment(
    postgres: Postgres, luthier_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = postgres.new_database().replace("postgres@", "postgres:the-secret@")
    dump = backups._dump_postgres
    run = subprocess.run

    def no_secrets(command: list[str], **options: object) -> object:
        assert not any("the-secret" in each for each in command)
        return run(command, **options)  # type: ignore[call-overload]

    def change_meanwhile(database: Database, *arguments: object) -> None:
        Objects(database).delete(FIRST, "data", ["key"])
        put(database, b"new", "new")
        with monkeypatch.context() as patch:
            patch.setattr(subprocess, "run", no_secrets)
            dump(database, *arguments)  # type: ignore[arg-type]

    for database in made_at(url):
        put(database, b"content")
        monkeypatch.setattr(backups, "_dump_postgres", change_meanwhile)
        made = backup(database, luthier_home, tmp_path / "backup")
        assert made.database and (tmp_path / "backup" / "luthier.pgdump").is_file()
    home, empty = tmp_path / "other", postgres.new_database()
    with pytest.raises(RefusedInput, match="pg_restore"):
        restore(tmp_path / "backup", home)
    restored = Database(empty)
    with pytest.raises(RefusedInput, match="has no tables"):
        restore(tmp_path / "backup", home, restored)
    subprocess.run(
        ["pg_restore", f"--dbname={empty}", str(tmp_path / "backup" / "luthier.pgdump")], check=True
    )
    assert restore(tmp_path / "backup", home, restored).database
    with restored.read() as session:
        assert session.scalars(select(ObjectPiece.sha256)).all() == [
            hashlib.sha256(b"content").hexdigest()
        ]
    assert [p.read_bytes() for p in home.rglob("*") if p.is_file()] == [b"content"]
    with restored.write() as session:
        session.execute(text("UPDATE object_pieces SET sha256='x'"))
    with pytest.raises(CorruptFile, match="s3://data/key"):
        restore(tmp_path / "backup", tmp_path / "third", restored)
    restored.close()
