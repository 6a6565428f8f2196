"""A database for jobs of a cluster."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from both_databases import with_tables

from luthier.server.tables.database import Database


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """An empty database with all tables."""
    yield from with_tables(database_url)
