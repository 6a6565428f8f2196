"""Backups of a service that goes on working, and what restoring them gives."""

from __future__ import annotations

import json
import stat
import threading
from pathlib import Path

import pytest
from principals_of import FIRST
from sqlalchemy import text

from luthier.errors import CorruptFile, RefusedInput, RunConflict
from luthier.store import accounts, principals
from luthier.store.audit import Event, append, last, verify
from luthier.store.backup import backup, restore
from luthier.store.database import Database
from luthier.store.sealing import Sealing, server_key


@pytest.fixture
def store(database: Database, luthier_home: Path) -> Path:
    """A store with an account, a key and some files."""
    with database.write() as session:
        accounts.create_account(session, FIRST)
        root = principals.create_user(session, FIRST, "root", role="admin")
        principals.create_access_key(session, root, Sealing(server_key()), "AKIA1", "the-secret")
        append(session, Event("luthier:test"))
    for name in ("models/a/weights.safetensors", "objects/ab/cd", "models/é/x y.json"):
        (luthier_home / name).parent.mkdir(parents=True, exist_ok=True)
        (luthier_home / name).write_bytes(name.encode() * 100)
    (luthier_home / "models" / ".tmp-half").write_bytes(b"half")
    return luthier_home


def restored_secret(home: Path) -> str:
    database = Database(f"sqlite:///{home / 'luthier.db'}")
    with database.read() as session:
        found = principals.signer(session, "AKIA1", Sealing(server_key(home)))
        assert verify(session) is None
    database.close()
    assert found is not None
    return found.secret


def test_there_and_back(database: Database, store: Path, tmp_path: Path) -> None:
    made = backup(database, store, tmp_path / "backup", with_key=True)
    assert (made.files, made.database, made.key) == (4, True, True)
    home = tmp_path / "other"
    assert restore(tmp_path / "backup", home).files == 4
    assert restored_secret(home) == "the-secret"
    assert (home / "models/é/x y.json").read_bytes() == (store / "models/é/x y.json").read_bytes()
    assert not list(home.rglob(".tmp-*"))
    for key in (home / "server.key", tmp_path / "backup" / "server.key"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600


def test_the_key_is_left_out_unless_asked_for(
    database: Database, store: Path, tmp_path: Path
) -> None:
    assert not backup(database, store, tmp_path / "backup").key
    assert not list((tmp_path / "backup").rglob("server.key*"))
    everything = [p.read_bytes() for p in (tmp_path / "backup").rglob("*") if p.is_file()]
    assert not any(b"the-secret" in content for content in everything)
    restore(tmp_path / "backup", tmp_path / "other")
    with pytest.raises(CorruptFile, match=r"server\.key"):
        restored_secret(tmp_path / "other")


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
            assert verify(session) is None
            # Transactions are in it whole.
            assert last(session)[0] % 2 == 1
        copy.close()


def test_what_was_changed_is_not_restored(database: Database, store: Path, tmp_path: Path) -> None:
    source = tmp_path / "backup"
    backup(database, store, source)
    home = tmp_path / "other"
    weights = source / "files/models/a/weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + b"x")
    with pytest.raises(CorruptFile, match="SHA-256 differs"):
        restore(source, home)
    weights.unlink()
    with pytest.raises(CorruptFile, match="missing"):
        restore(source, home)
    weights.write_bytes(whole)
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
    from luthier.files import sha256_of

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
