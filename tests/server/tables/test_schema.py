"""Migrations: they make what the code declares, once, and never go back unseen."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text

from luthier.errors import LuthierError, RefusedInput
from luthier.server.tables import schema
from luthier.server.tables.bootstrap import ALLOW_ALL
from luthier.server.tables.database import Database
from luthier.server.tables.principals import AccessKey, User
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
    with pytest.raises(LuthierError, match="newer version"):
        upgrade(database)


def test_a_database_of_the_first_revision_is_brought_up_to_date() -> None:
    database, config = Database(), schema._config()
    with database.write() as session:
        config.attributes["connection"] = session.connection()
        command.upgrade(config, "0001")
    upgrade(database)
    with database.read() as session:
        found = MigrationContext.configure(session.connection())
        assert compare_metadata(found, METADATA) == []


@pytest.mark.parametrize(
    ("role", "policies", "expected"),
    [
        ("admin", [], "administrator"), ("developer", [], "developer"),
        ("auditor", [], "read-only"), ("invoke-only", [], "invoker"),
        (None, [ALLOW_ALL], "administrator"), (None, [], "read-only"),
        ("admin", [{"Statement": []}], "read-only"), (None, [{"Statement": []}], "read-only"),
    ],
)  # fmt: skip
def test_users_with_policies_get_a_role(
    role: str | None, policies: list[Any], expected: str
) -> None:
    database, config = Database(), schema._config()
    with database.write() as session:
        connection = session.connection()
        config.attributes["connection"] = connection
        command.upgrade(config, "0003")
        for statement, values in (
            ("INSERT INTO accounts VALUES ('000000000000', '', 0, :at)", {}),
            (
                "INSERT INTO users (account, name, role, policies, disabled, created) "
                "VALUES ('000000000000', 'ann', :role, :policies, 0, :at)",
                {"role": role, "policies": json.dumps(policies)},
            ),
            (
                "INSERT INTO access_keys (id, account, user, sealed, origin, disabled, created) "
                "VALUES ('AKIA', '000000000000', 1, '', 'issued', 0, :at)",
                {},
            ),
        ):
            connection.execute(text(statement), {"at": "2026-01-01 00:00:00.000000", **values})
    upgrade(database)
    with database.read() as session:
        user, key = session.query(User).one(), session.query(AccessKey).one()
        assert (user.role, key.user, key.role) == (expected, user.seq, None)


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
