"""Fixtures: SQLite and PostgreSQL databases with empty tables, and an object store in each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from luthier.server.stores.objects import Objects
from luthier.server.tables.database import Database
from luthier.server.tables.schema import METADATA


def with_tables(url: str) -> Iterator[Database]:
    """Yield a database with empty tables, and close the database at the end."""
    made = Database(url)
    METADATA.create_all(made.engine)
    yield made
    made.close()


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """Return a database with empty tables, once per kind of database."""
    yield from with_tables(database_url)


@pytest.fixture
def objects(database: Database) -> Objects:
    """Return an empty object store."""
    return Objects(database)
