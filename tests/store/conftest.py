"""An object store of its own for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from luthier.store.database import Base, Database
from luthier.store.objects import Objects


@pytest.fixture
def objects(luthier_home: Path) -> Iterator[Objects]:
    """Buckets of two accounts can be made in it; nothing is there."""
    import luthier.store.uploads  # noqa: F401

    database = Database()
    Base.metadata.create_all(database.engine)
    yield Objects(database)
    database.close()
