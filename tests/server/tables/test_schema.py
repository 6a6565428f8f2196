"""Creation and migration of the tables."""

from __future__ import annotations

import threading

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from luthier.errors import LuthierError, RefusedInput
from luthier.server.tables.database import Database
from luthier.server.tables.schema import METADATA, upgrade


def test_migrations_make_what_the_code_declares(database_url: str) -> None:
    database = Database(database_url)
    upgrade(database)
    assert database.tables() == {*METADATA.tables, "alembic_version"}
    with database.read() as session:
        found = MigrationContext.configure(session.connection())
        assert compare_metadata(found, METADATA) == []
    upgrade(database)  # the second time finds nothing to change
    database.close()


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


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE alembic_version SET version_num = '9999'",
        "DROP TABLE batch_lines",
        "ALTER TABLE custom_models DROP COLUMN failure",
        "ALTER TABLE custom_models ADD COLUMN further VARCHAR",
    ],
)
def test_a_database_of_another_version_is_rejected(database_url: str, change: str) -> None:
    database = Database(database_url)
    upgrade(database)
    with database.write() as session:
        session.connection().exec_driver_sql(change)
    with pytest.raises(LuthierError):
        upgrade(database)
    database.close()


@pytest.mark.parametrize("url", ["mysql://a/b", "nonsense", "sqlite://", "sqlite:///:memory:"])
def test_other_databases_are_refused(url: str) -> None:
    with pytest.raises(RefusedInput):
        Database(url)
