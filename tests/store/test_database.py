"""Who may read SQLite's files; writers and who keeps them out for a moment, on PostgreSQL."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from postgres import Postgres
from small_disk import Disk
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from luthier.store import database as databases
from luthier.store.database import Database


@pytest.fixture
def database(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    monkeypatch.setattr(databases, "_LOCK_SECONDS", 1)
    made = Database(postgres.new_database())
    yield made
    made.close()


def test_only_the_owner_reads_the_files_of_sqlite(tmp_path: Path) -> None:
    file = tmp_path / "luthier.db"

    def modes() -> dict[str, int]:
        return {each.name: stat.S_IMODE(each.stat().st_mode) for each in tmp_path.iterdir()}

    before = os.umask(0)
    try:
        first = Database(f"sqlite:///{file}")
        write(first)
        assert modes() == dict.fromkeys(("luthier.db", "luthier.db-wal", "luthier.db-shm"), 0o600)
        # As an earlier version, or another program, left them.
        for each in tmp_path.iterdir():
            each.chmod(0o644)
        second = Database(f"sqlite:///{file}")
        write(second)
        assert set(modes().values()) == {0o600}
        first.close()
        second.close()
    finally:
        os.umask(before)


def test_writes_go_on_after_a_read_only_disk(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "disk")
    disk.folder.mkdir()
    if not disk.mount("size=64m"):
        pytest.skip("this user may not mount a file system")
    address = f"sqlite:///{disk.folder / 'luthier.db'}"
    code = (
        "import sys; from luthier.store.database import Database\n"
        f"database = Database({address!r})\n"
        "with database.write(): print('open', flush=True); sys.stdin.read()"
    )
    # Another process has the log open, so its files stay while this process has none of them open.
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert other.stdout is not None and other.stdin is not None
        assert other.stdout.readline() == b"open\n"
        disk.lock(True)
        try:
            database = Database(address)
            in_use = database.engine.connect()
            idle = [database.engine.connect() for _ in range(3)]
            for connection in (in_use, *idle):
                assert connection.scalar(text("SELECT count(*) FROM sqlite_master")) == 0
            for connection in idle:
                connection.close()
        finally:
            disk.lock(False)
        other.communicate()

        def change() -> None:
            with database.write() as session:
                session.execute(text("CREATE TABLE changes (number INTEGER)"))

        with pytest.raises(OperationalError, match="readonly"):
            change()
        in_use.close()
        change()
        database.close()
    finally:
        other.kill()
        other.wait()
        disk.unmount()


def write(database: Database) -> None:
    with database.write() as session:
        session.execute(text("SELECT 1"))
