"""A database for each kind of database server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from luthier.server.tables.database import Base, Database


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """An empty database with all tables."""
    made = Database(database_url)
    Base.metadata.create_all(made.engine)
    yield made
    made.close()
