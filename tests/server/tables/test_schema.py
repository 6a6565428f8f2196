"""Migrations: they make what the code declares, once, and never go back unseen."""

from __future__ import annotations

import threading

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from luthier.errors import LuthierError, RefusedInput
from luthier.server.tables.database import Database
from luthier.server.tables.schema import METADATA, upgrade


def test_migrations_make_what_the_code_declares() -> None:
    database = Database()
    upgrade(database)
    assert database.tables() == {*METADATA.tables, "alembic_version"}
    with database.read() as session:
        found = MigrationContext.configure(session.connection())
        assert compare_metadata(found, METADATA) == []
    upgrade(database)  # a second time changes nothing


def test_servers_that_start_together_make_the_tables_once() -> None:
    failed: list[Exception] = []

    def start() -> None:
        database = Database()
        try:
            upgrade(database)
        except Exception as error:
            failed.append(error)
        database.close()

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_a_database_of_a_newer_version_is_left_alone() -> None:
    database = Database()
    upgrade(database)
    with database.write() as session:
        session.connection().exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(LuthierError, match="9999"):
        upgrade(database)


@pytest.mark.parametrize(
    ("change", "lacking"),
    [
        ("DROP TABLE batch_lines", "the table batch_lines"),
        ("ALTER TABLE custom_models DROP COLUMN failure", "custom_models.failure"),
    ],
)
def test_a_database_that_lacks_what_no_migration_adds_is_refused(change: str, lacking: str) -> None:
    database = Database()
    upgrade(database)
    with database.write() as session:
        session.connection().exec_driver_sql(change)
    with pytest.raises(LuthierError, match=f"not released, and lacks {lacking}. Use another"):
        upgrade(database)


@pytest.mark.parametrize("url", ["mysql://a/b", "nonsense", "sqlite://", "sqlite:///:memory:"])
def test_other_databases_are_refused(url: str) -> None:
    with pytest.raises(RefusedInput):
        Database(url)
