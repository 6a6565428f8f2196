"""Backup of a running service, and restoration."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import subprocess
import threading
from pathlib import Path

import pytest
from both_databases import with_tables
from postgres import Postgres
from principals_of import FIRST
from sqlalchemy import select

from luthier.errors import CorruptFile, LuthierError, RefusedInput, RunConflict
from luthier.files import sha256_of, write_json
from luthier.server.stores import backup as backups
from luthier.server.stores.backup import backup, restore
from luthier.server.stores.objects import Objects
from luthier.server.tables import accounts, principals
from luthier.server.tables.audit import Event, append, entries
from luthier.server.tables.custom_models import ACTIVE, CustomModel
from luthier.server.tables.database import Database, now
from luthier.server.tables.objects import ObjectMetadata, ObjectPiece
from luthier.server.tables.secrets import Sealing, server_key


@pytest.fixture
def database_url(luthier_home: Path) -> str:
    """Use SQLite; a separate test covers PostgreSQL."""
    return f"sqlite:///{luthier_home / 'luthier.db'}"


@pytest.fixture
def store(database: Database, luthier_home: Path) -> Path:
    """A store with an account, a key, an object, a model, an ended run and files without a row."""
    with database.write() as session:
        accounts.create_account(session, FIRST)
        root = principals.create_user(session, FIRST, "root", role="administrator")
        principals.create_access_key(session, root, Sealing(server_key()), "AKIA1", "the-secret")
        append(session, Event("luthier:test"))
    put(database, b"the content" * 100)
    model_of(database, luthier_home, "mine")
    for name in (
        "objects/ab/no-row", "models/custom/tiny/.tmp-half/luthier.json", "jobs/x.log",
        "runs/tiny/mine/checkpoints/1/state.json", "runs/tiny/unfinished/metrics.jsonl",
    ):  # fmt: skip
        (luthier_home / name).parent.mkdir(parents=True, exist_ok=True)
        (luthier_home / name).write_bytes(b"{}")
    return luthier_home


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Return the path of the home folder for restored backups, which does not exist yet."""
    return tmp_path / "restored"


def restore_to(home: Path, source: Path, database: str | None = None) -> int:
    """Restore a backup into ``home``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUTHIER_HOME", str(home))
        return restore(source, database)


def put(database: Database, content: bytes, key: str = "key") -> Path:
    """Store ``content`` as the object ``key`` and return its file."""
    objects = Objects(database)
    if not any(bucket.name == "data" for bucket in objects.buckets(FIRST)):
        objects.create_bucket(FIRST, "data")
    with objects.files.begin(FIRST) as file:
        file.write(content)
        written = file.finish()
    objects.put(FIRST, "data", key, written, ObjectMetadata())
    return objects.files.path(FIRST, written.id)


def model_of(database: Database, home: Path, name: str) -> Path:
    """Return the folder of a new custom model with a row, files and an ended run."""
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
                stored_id=f"tiny:{name}", job_id=None, openai_id=None, status=ACTIVE, failure=None,
                details={}, created=now(),
            )
        )  # fmt: skip
    return folder


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def left(tmp_path: Path) -> set[str]:
    """Names next to the store."""
    return {path.name for path in tmp_path.iterdir()}


def restored_secret(home: Path) -> str:
    database = Database(f"sqlite:///{home / 'luthier.db'}")
    with database.read() as session:
        found = principals.signer(session, "AKIA1", Sealing(server_key(home)))
    database.close()
    assert found is not None
    return found.secret


def test_restored_store_equals_backed_up_store(
    database: Database, store: Path, tmp_path: Path, home: Path
) -> None:
    assert backup(database, tmp_path / "backup", with_key=True) == 6
    files = {
        "luthier.db", "server.key", "models/custom/tiny/mine/luthier.json",
        "models/custom/tiny/mine/adapter.safetensors", "runs/tiny/mine/result.json",
    }  # fmt: skip
    (piece,) = names(tmp_path / "backup") - files - {"backup.json"}
    assert piece.startswith(f"objects/{FIRST}/")
    assert restore_to(home, tmp_path / "backup") == 6
    assert names(home) == files | {piece}
    assert (home / piece).read_bytes() == b"the content" * 100
    assert restored_secret(home) == "the-secret"


def test_objects_and_models_share_their_bytes_with_the_store(
    database: Database, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup(database, tmp_path / "linked")

    def no_links(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, "another disk")

    monkeypatch.setattr(os, "link", no_links)
    backup(database, tmp_path / "copied")
    for name in names(store) & names(tmp_path / "linked"):
        shared = name.startswith(("objects/", "models/"))
        assert os.path.samefile(store / name, tmp_path / "linked" / name) is shared
        assert not os.path.samefile(store / name, tmp_path / "copied" / name)
    assert names(tmp_path / "linked") == names(tmp_path / "copied")


def test_backup_and_restored_store_are_private(
    database: Database, store: Path, tmp_path: Path, home: Path
) -> None:
    before = os.umask(0)
    try:
        modes = {path: path.stat().st_mode for path in (store / "models").rglob("*")}
        backup(database, tmp_path / "backup", with_key=True)
        home.mkdir(mode=0o755)
        restore_to(home, tmp_path / "backup")
        assert stat.S_IMODE((tmp_path / "backup").stat().st_mode) == 0o700
        for path in (home, *home.rglob("*")):
            assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)
        assert modes == {path: path.stat().st_mode for path in modes}
    finally:
        os.umask(before)


def test_backup_omits_server_key_by_default(
    database: Database, store: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup(database, tmp_path / "backup")
    assert not any(b"the-secret" in p.read_bytes() for p in (tmp_path / "backup").rglob("*.*"))
    restore_to(home, tmp_path / "backup")
    assert not (home / "server.key").exists()
    shutil.copy(store / "server.key", home / "server.key")
    assert restored_secret(home) == "the-secret"
    (store / "server.key").unlink()
    with pytest.raises(RefusedInput, match=r"server\.key"):
        backup(database, tmp_path / "other", with_key=True)
    monkeypatch.setenv("LUTHIER_HOME", str(home))
    (home / "server.key").unlink()
    restored = Database()
    with restored.read() as session, pytest.raises(CorruptFile, match="AKIA1"):
        principals.matching_server_key(session)  # no new key: it could not open the secrets
    restored.close()


@pytest.mark.slow
def test_backup_is_consistent_during_writes(
    database: Database, store: Path, tmp_path: Path
) -> None:
    done = threading.Event()

    def write() -> None:
        while not done.is_set():
            with database.write() as session:
                append(session, Event("x:one"), Event("x:two"))

    threads = [threading.Thread(target=write) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(5):
        backup(database, tmp_path / f"backup{number}")
    done.set()
    for thread in threads:
        thread.join()
    for number in range(5):
        restore_to(tmp_path / f"home{number}", tmp_path / f"backup{number}")
        copy = Database(f"sqlite:///{tmp_path / f'home{number}' / 'luthier.db'}")
        with copy.read() as session:
            # The copy contains whole transactions only.
            assert len(entries(session, limit=10_000)) % 2 == 1
        copy.close()


def test_backup_is_consistent_during_object_changes(
    database: Database, store: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(database, b"earlier", "replaced")
    link, copy = backups._link, backups._copy_database
    changes = iter((b"first", b"second"))

    def change_before(named: dict[str, str | None], *folders: Path) -> set[str]:
        if content := next(changes, None):
            Objects(database).delete(FIRST, "data", ["key"])
            put(database, content, "replaced")
        return link(named, *folders)

    def change_after(*arguments: object) -> None:
        put(database, b"third", "replaced")
        copy(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(backups, "_link", change_before)
    monkeypatch.setattr(backups, "_copy_database", change_after)
    backup(database, tmp_path / "backup")
    restore_to(home, tmp_path / "backup")
    restored = Database(f"sqlite:///{home / 'luthier.db'}")
    with restored.read() as session:
        hashes = session.scalars(select(ObjectPiece.sha256)).all()
    restored.close()
    assert hashes == [hashlib.sha256(b"second").hexdigest()]
    assert [sha256_of(p) for p in (home / "objects").rglob("*") if p.is_file()] == hashes


def test_missing_and_changed_files_of_the_store(
    database: Database, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = store / "models/custom/tiny/mine/adapter.safetensors"
    piece = put(database, b"piece", "piece")
    for path in (weights, piece, weights.with_name("luthier.json")):
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(CorruptFile, match=path.name):
            backup(database, tmp_path / "backup")
        path.write_bytes(content)
    for path in (weights, piece):
        content = path.read_bytes()
        path.write_bytes(content + b"x")
        with pytest.raises(CorruptFile, match=path.name):
            backup(database, tmp_path / "backup")
        path.write_bytes(content)
    monkeypatch.setattr(backups, "_TRIES", 1)
    piece.unlink()
    with pytest.raises(LuthierError):
        backup(database, tmp_path / "backup")
    assert left(tmp_path) == {"luthier-home"}


def test_missing_and_changed_files_of_a_backup(
    database: Database, store: Path, tmp_path: Path, home: Path
) -> None:
    source = tmp_path / "backup"
    backup(database, source)
    for name in json.loads((source / "backup.json").read_text())["hashes"]:
        content = (source / name).read_bytes()
        (source / name).unlink()
        with pytest.raises(CorruptFile, match=name):
            restore_to(home, source)
        (source / name).write_bytes(content + b"x")
        with pytest.raises(CorruptFile, match=name):
            restore_to(home, source)
        (source / name).write_bytes(content)
    (source / "backup.json").rename(source / "other.json")
    for text_ in (None, "{", '{"format": 1}'):
        if text_ is not None:
            (source / "backup.json").write_text(text_)
        with pytest.raises(CorruptFile, match=r"backup\.json"):
            restore_to(home, source)
    assert left(tmp_path) == {"luthier-home", "backup"}


def test_invalid_folders_of_backup_and_restore(
    database: Database, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "backup"
    with pytest.raises(RefusedInput):
        backup(database, store / "backup")
    backup(database, source)
    with pytest.raises(RunConflict):
        backup(database, source)
    (tmp_path / "file").write_text("x")
    for home in (store, tmp_path / "file"):
        with pytest.raises(RunConflict):
            restore_to(home, source)
    volume = tmp_path / "volume"
    volume.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_mount", lambda path: path == volume)
        with pytest.raises(RefusedInput):
            restore_to(volume, source)
        restore_to(volume / "luthier", source)
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "target").mkdir()
    restore_to(tmp_path / "link", source)
    assert (tmp_path / "target" / "luthier.db").is_file()


def test_killed_backup_or_restore_leaves_no_complete_folder(
    database: Database, store: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "backup"

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "sync", killed)
        with pytest.raises(KeyboardInterrupt):
            backup(database, source)
    half = tmp_path / ".tmp-backup~killed"  # left by a process that could not clean up
    shutil.copytree(store / "models", half)
    assert not source.exists()
    backup(database, source)
    assert not half.exists()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", killed)
        with pytest.raises(KeyboardInterrupt):
            restore_to(home, source)
    assert not home.exists()
    restore_to(home, source)


def test_backup_and_restore_with_postgresql(
    postgres: Postgres,
    luthier_home: Path,
    tmp_path: Path,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = postgres.new_database().replace("postgres@", "postgres:the-secret@")
    copy, run = backups._copy_database, subprocess.run

    def check_command(command: list[str], **options: object) -> object:
        assert not any("the-secret" in each for each in command)
        return run(command, **options)  # type: ignore[call-overload]

    def change_meanwhile(database: Database, *arguments: object) -> None:
        Objects(database).delete(FIRST, "data", ["key"])
        put(database, b"new", "new")
        copy(database, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(subprocess, "run", check_command)
    for database in with_tables(url):
        put(database, b"content")
        with monkeypatch.context() as patch:
            patch.setattr(backups, "_copy_database", change_meanwhile)
            backup(database, tmp_path / "backup")
    with pytest.raises(RefusedInput):
        restore_to(home, tmp_path / "backup")
    with pytest.raises(RunConflict):
        restore_to(home, tmp_path / "backup", url)
    assert not home.exists()
    empty = postgres.new_database()
    restore_to(home, tmp_path / "backup", empty)
    restored = Database(empty)
    with restored.read() as session:
        hashes = session.scalars(select(ObjectPiece.sha256)).all()
    assert hashes == [hashlib.sha256(b"content").hexdigest()]
    assert [sha256_of(p) for p in home.rglob("*") if p.is_file()] == hashes
    monkeypatch.setenv("LUTHIER_HOME", str(home))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(LuthierError):
        backup(restored, tmp_path / "other")
    restored.close()
