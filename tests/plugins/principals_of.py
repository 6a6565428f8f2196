"""A database with the service's tables and principals."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from both_databases import with_tables
from signing import ACCESS_KEY, SECRET

from luthier.server.tables import accounts, principals
from luthier.server.tables.database import Database
from luthier.server.tables.secrets import Sealing

KEY = bytes(range(32))
FIRST = "000000000000"
OTHER = "111111111111"


@pytest.fixture
def database() -> Iterator[Database]:
    """An empty database in the test's store."""
    yield from with_tables()


@pytest.fixture
def api_key(database: Database) -> str:
    """Root of the first account has botocore's example key and this API key."""
    with database.write() as session:
        accounts.create_account(session, FIRST, "first")
        root = principals.create_user(session, FIRST, "root", role="administrator")
        principals.create_access_key(session, root, Sealing(KEY), ACCESS_KEY, SECRET)
        return principals.create_api_key(session, root)[1]
