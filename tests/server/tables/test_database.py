"""Permissions of SQLite's files, and concurrent writers on PostgreSQL."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from postgres import Postgres
from sqlalchemy import text

from luthier.server.tables import database as databases
from luthier.server.tables.database import Database


@pytest.fixture
def database(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    monkeypatch.setattr(databases, "_LOCK_SECONDS", 1)
    made = Database(postgres.new_database())
    yield made
    made.close()


def test_sqlite_files_are_private(tmp_path: Path) -> None:
    file = tmp_path / "luthier.db"

    def modes() -> dict[str, int]:
        return {each.name: stat.S_IMODE(each.stat().st_mode) for each in tmp_path.iterdir()}

    before = os.umask(0)
    try:
        first = Database(f"sqlite:///{file}")
        write(first)
        assert modes() == dict.fromkeys(("luthier.db", "luthier.db-wal", "luthier.db-shm"), 0o600)
        # File modes as left by an earlier version or a different program.
        for each in tmp_path.iterdir():
            each.chmod(0o644)
        second = Database(f"sqlite:///{file}")
        write(second)
        assert set(modes().values()) == {0o600}
        first.close()
        second.close()
    finally:
        os.umask(before)


def write(database: Database) -> None:
    with database.write() as session:
        session.execute(text("SELECT 1"))
