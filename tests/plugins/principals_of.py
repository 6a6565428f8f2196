"""A database with the service's tables, and principals in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from signing import ACCESS_KEY, SECRET

from luthier.store import accounts, audit, principals
from luthier.store.database import Base, Database
from luthier.store.sealing import Sealing

KEY = bytes(range(32))
FIRST = "000000000000"
OTHER = "111111111111"
TABLES = (accounts.Account, principals.User, audit.AuditEntry)
ALLOW_ALL: dict[str, Any] = {
    "Version": "2012-10-17",
    "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}],
}


@pytest.fixture
def database() -> Iterator[Database]:
    """An empty database in the test's store."""
    made = Database()
    Base.metadata.create_all(made.engine)
    yield made
    made.close()


@pytest.fixture
def api_key(database: Database) -> str:
    """Root of the first account has botocore's example key and this API key."""
    with database.write() as session:
        accounts.create_account(session, FIRST, "first")
        root = principals.create_user(session, FIRST, "root", role="admin")
        principals.create_access_key(session, root, Sealing(KEY), ACCESS_KEY, SECRET)
        return principals.create_api_key(session, root)[1]
