"""Database failures while rows of new objects are written: no unnamed file remains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.exc import OperationalError

from luthier.server.stores.multipart import MultipartUploads
from luthier.server.stores.object_files import WrittenFile
from luthier.server.stores.objects import Objects
from luthier.server.stores.uploaded_files import UploadedFiles
from luthier.server.tables.database import Database
from luthier.server.tables.objects import ObjectMetadata

ONE = "000000000001"
GONE = OperationalError("COMMIT", {}, Exception("the database is away"))


def written(objects: Objects, body: bytes = b"bytes") -> WrittenFile:
    with objects.files.begin(ONE) as writing:
        writing.write(body)
        return writing.finish()


def files(objects: Objects) -> list[Path]:
    return [path for path in objects.files.folder.rglob("*") if path.is_file()]


@pytest.fixture
def data(objects: Objects) -> Objects:
    objects.create_bucket(ONE, "data")
    return objects


def put(data: Objects) -> Callable[[], Any]:
    return lambda: data.put(ONE, "data", "k", written(data), ObjectMetadata())


def put_part(data: Objects) -> Callable[[], Any]:
    uploads = MultipartUploads(data)
    upload = uploads.create(ONE, "data", "k", ObjectMetadata(), ("", "")).id
    return lambda: uploads.put_part(ONE, "data", "k", upload, 1, written(data), {})


def add(data: Objects) -> Callable[[], Any]:
    store = UploadedFiles(data.database, data)
    store.begin(ONE).__exit__(None, None, None)
    return lambda: store.add(ONE, [b"bytes"], "name", "batch")


def copy(data: Objects) -> Callable[[], Any]:
    data.put(ONE, "data", "from", written(data), ObjectMetadata())
    return lambda: data.copy(ONE, ("data", "from"), ("data", "to"), lambda found: ObjectMetadata())


WORKS = [put, put_part, add, copy]


@contextmanager
def failing(database: Database, table: str) -> Iterator[None]:
    """While the block runs, rows of a table are not written."""

    def refuse(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        if statement.startswith(f"INSERT INTO {table}"):
            raise GONE

    event.listen(database.engine, "before_cursor_execute", refuse)
    yield
    event.remove(database.engine, "before_cursor_execute", refuse)


@pytest.mark.parametrize("prepare", WORKS)
def test_failed_row_leaves_no_file(data: Objects, prepare: Any) -> None:
    work = prepare(data)
    before = files(data)
    with failing(data.database, "object_pieces"), pytest.raises(OperationalError):
        work()
    assert files(data) == before
    work()
    assert len(files(data)) == len(before) + 1


def test_failed_file_row_leaves_no_object(data: Objects) -> None:
    store = UploadedFiles(data.database, data)
    with failing(data.database, "uploaded_files"), pytest.raises(OperationalError):
        store.add(ONE, [b"bytes"], "name", "batch")
    assert files(data) == [] and store.list(ONE, 10) == []
    data.delete_bucket(ONE, "luthier-files")


def test_file_and_object_are_deleted_atomically(data: Objects) -> None:
    store = UploadedFiles(data.database, data)
    row = store.add(ONE, [b"bytes"], "name", "batch")

    def refuse(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        if statement.startswith(("DELETE FROM objects", "DELETE FROM object_pieces")):
            raise GONE

    event.listen(data.database.engine, "before_cursor_execute", refuse)
    with pytest.raises(OperationalError):
        store.delete(ONE, row.id)
    event.remove(data.database.engine, "before_cursor_execute", refuse)
    found = store.get(ONE, row.id)
    assert found is not None and b"".join(store.read(found)) == b"bytes"
    assert store.delete(ONE, row.id) and not store.delete(ONE, row.id)
    assert files(data) == []
    # The object and the bucket were deleted before the file.
    row = store.add(ONE, [b"bytes"], "name", "batch")
    data.delete(ONE, "luthier-files", [row.id])
    data.delete_bucket(ONE, "luthier-files")
    assert store.delete(ONE, row.id) and store.get(ONE, row.id) is None
