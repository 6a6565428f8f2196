"""A new database and object store for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from luthier.server.tables.database import Database
from luthier.server.tables.objects import Objects
from luthier.server.tables.schema import METADATA


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """Return a database with empty tables, once per kind of database."""
    made = Database(database_url)
    METADATA.create_all(made.engine)
    yield made
    made.close()


@pytest.fixture
def objects(database: Database) -> Objects:
    """Return an empty object store."""
    return Objects(database)
