"""An object store of its own for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from luthier.store.database import Base, Database
from luthier.store.objects import Objects


@pytest.fixture
def objects(database_url: str) -> Iterator[Objects]:
    """Nothing is in it, once with each kind of database."""
    database = Database(database_url)
    Base.metadata.create_all(database.engine)
    yield Objects(database)
    database.close()
