"""Creation and migration of the tables."""

from __future__ import annotations

import hashlib
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import inspect

from luthier.errors import LuthierError, RefusedInput
from luthier.server.tables import schema
from luthier.server.tables.database import Database
from luthier.server.tables.schema import METADATA, upgrade

MIGRATIONS = Path(schema.__file__).parent / "migrations" / "versions"


def tables_of(database: Database) -> dict[str, Any]:
    found = inspect(database.engine)
    tables: dict[str, Any] = {}
    for name in sorted(database.tables() - {"alembic_version"}):
        tables[name] = {
            "columns": sorted(
                (each["name"], repr(each["type"]), each["nullable"], each["default"])
                for each in found.get_columns(name)
            ),
            "key": found.get_pk_constraint(name)["constrained_columns"],
            "references": sorted(
                (each["constrained_columns"], each["referred_table"], each["referred_columns"],
                 sorted(each["options"].items()))
                for each in found.get_foreign_keys(name)
            ),
            "unique": sorted(each["column_names"] for each in found.get_unique_constraints(name)),
            "indexes": sorted(
                (str(each["name"]), each["column_names"], bool(each["unique"]))
                for each in found.get_indexes(name)
            ),
            "checks": sorted(each["sqltext"] for each in found.get_check_constraints(name)),
        }  # fmt: skip
    return tables


def test_migrations_create_tables_of_models(
    database_url: str,
) -> None:
    database = Database(database_url)
    upgrade(database)
    migrated = tables_of(database)
    upgrade(database)  # a second start accepts the tables
    METADATA.drop_all(database.engine)
    METADATA.create_all(database.engine)
    assert set(migrated) == set(METADATA.tables)
    assert migrated == tables_of(database)
    database.close()


@pytest.mark.parametrize("file", sorted(MIGRATIONS.glob("*.py")), ids=lambda file: file.stem)
def test_migration_does_not_import_luthier(file: Path) -> None:
    assert not re.search(r"^(from|import) luthier", file.read_text(), re.MULTILINE)


def test_first_migration_is_unchanged() -> None:
    # Databases with these tables exist. Changes of tables are new migrations (CONTRIBUTING.md).
    digest = hashlib.sha256((MIGRATIONS / "0001_tables.py").read_bytes()).hexdigest()
    assert digest == "cc9c9b2ee2f844c98ee14638f7b9326ec117bfbe8865e122b5880239c9e24d85"


def test_concurrent_starts_create_tables_once() -> None:
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
def test_database_of_different_version_is_rejected(database_url: str, change: str) -> None:
    database = Database(database_url)
    upgrade(database)
    with database.write() as session:
        session.connection().exec_driver_sql(change)
    with pytest.raises(LuthierError):
        upgrade(database)
    database.close()


@pytest.mark.parametrize("url", ["mysql://a/b", "nonsense", "sqlite://", "sqlite:///:memory:"])
def test_unsupported_database_url_is_rejected(url: str) -> None:
    with pytest.raises(RefusedInput):
        Database(url)
