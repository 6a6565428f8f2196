"""Who may read SQLite's files; writers and who keeps them out for a moment, on PostgreSQL."""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from postgres import Postgres
from sqlalchemy import text

from luthier.errors import LuthierError
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


def test_a_writer_that_is_stuck_stops_the_backup_and_no_other_writer(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(databases, "_LOCK_TRIES", 2)
    refused: list[str] = []

    def keep_out() -> None:
        try:
            with database.without_writers():
                pass
        except LuthierError as error:
            refused.append(str(error))

    with database.write() as stuck:
        stuck.execute(text("SELECT 1"))
        backup = threading.Thread(target=keep_out, daemon=True)
        backup.start()
        wait_for_a_waiting_lock(database)
        written = threading.Thread(target=write, args=[database], daemon=True)
        written.start()
        written.join(10)
        assert not written.is_alive()
        backup.join(10)
        assert not backup.is_alive()
    assert len(refused) == 1 and "pg_stat_activity" in refused[0]
    # The timeout was of that transaction alone.
    with database.read() as session:
        assert session.scalar(text("SHOW lock_timeout")) == "0"


def test_who_waits_for_writers_tries_again(database: Database) -> None:
    inside = threading.Event()

    def keep_out() -> None:
        with database.without_writers():
            inside.set()

    with database.write() as slow:
        slow.execute(text("SELECT 1"))
        backup = threading.Thread(target=keep_out, daemon=True)
        backup.start()
        assert not inside.wait(1.5)
    assert inside.wait(10)
    backup.join(10)


def write(database: Database) -> None:
    with database.write() as session:
        session.execute(text("SELECT 1"))


def wait_for_a_waiting_lock(database: Database) -> None:
    waiting = text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
    deadline = time.monotonic() + 10
    while True:
        with database.read() as session:
            if session.scalar(waiting):
                return
        assert time.monotonic() < deadline
        time.sleep(0.02)
