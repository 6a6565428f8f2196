"""Objects in the built-in object store."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from luthier.errors import ObjectRefused
from luthier.server.stores.objects import Objects
from luthier.server.tables.database import Database
from luthier.server.tables.objects import ObjectMetadata


def put_objects(database: Database, account: str, files: Mapping[str, bytes]) -> None:
    """Put objects into the bucket ``rows`` of an account."""
    objects = Objects(database)
    with suppress(ObjectRefused):
        objects.create_bucket(account, "rows")
    for key, content in files.items():
        with objects.begin(account) as writing:
            writing.write(content)
            objects.put(account, "rows", key, writing.finish(), ObjectMetadata())
