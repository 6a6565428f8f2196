"""Databases that fail while rows of new objects are written: no file stays that no row names."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from luthier.errors import DiskFull
from luthier.store.database import Database
from luthier.store.multipart import CompletedPart, MultipartUploads
from luthier.store.object_files import ObjectFiles, WrittenFile
from luthier.store.objects import ObjectMetadata, Objects
from luthier.store.uploaded_files import UploadedFiles

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
def committing(first: Callable[[Session], None]) -> Iterator[None]:
    """In the block the first commit is ``first``."""
    real, calls = Session.commit, [first]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "commit", lambda self: calls.pop()(self) if calls else real(self))
        yield


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
def test_rows_that_are_not_written_leave_no_file(data: Objects, prepare: Any) -> None:
    work = prepare(data)
    before = files(data)
    with failing(data.database, "object_pieces"), pytest.raises(OperationalError):
        work()
    assert files(data) == before
    work()
    assert len(files(data)) == len(before) + 1


@pytest.mark.parametrize("prepare", WORKS)
def test_a_commit_that_failed_leaves_no_file(data: Objects, prepare: Any) -> None:
    work = prepare(data)
    if prepare is add:
        found, store = written(data), UploadedFiles(data.database, data)
        work = lambda: store.keep(ONE, found, "name", "batch")  # noqa: E731
        before: list[Path] = []
    else:
        before = files(data)

    def commit(session: Session) -> None:
        raise GONE

    with committing(commit), pytest.raises(OperationalError):
        work()
    assert files(data) == before


@pytest.mark.parametrize("prepare", [put, put_part])
def test_a_commit_whose_answer_was_lost_keeps_its_file(data: Objects, prepare: Any) -> None:
    work, real = prepare(data), Session.commit

    def commit(session: Session) -> None:
        real(session)
        raise GONE

    with committing(commit), pytest.raises(OperationalError):
        work()
    assert len(files(data)) == 1
    assert data.sweep(older_than=0) == 0


SLOW = """
CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN PERFORM pg_sleep(1.5); RETURN NULL; END $$;
CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON object_pieces DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION slow();
"""


@pytest.mark.parametrize("prepare", [put, put_part])
def test_a_commit_that_goes_on_without_its_client_is_waited_for(
    data: Objects, prepare: Any
) -> None:
    if data.database.is_sqlite:
        pytest.skip("SQLite commits in the client itself")
    work, real = prepare(data), Session.commit
    with data.database.engine.begin() as connection:
        connection.exec_driver_sql(SLOW)

    def commit(session: Session) -> None:
        number = session.connection().connection.driver_connection.fileno()  # type: ignore[union-attr]
        with socket.socket(fileno=os.dup(number)) as line:
            cut = threading.Timer(0.5, line.shutdown, (socket.SHUT_RDWR,))
            cut.start()
            try:
                real(session)
            finally:
                cut.join()

    began = time.monotonic()
    with committing(commit), pytest.raises(OperationalError):
        work()
    assert time.monotonic() - began > 1
    # The server wrote the row after it had lost its client.
    assert len(files(data)) == 1 and data.sweep(older_than=0) == 0


def test_a_file_whose_row_is_not_written_is_no_object_either(data: Objects) -> None:
    store = UploadedFiles(data.database, data)
    with failing(data.database, "uploaded_files"), pytest.raises(OperationalError):
        store.add(ONE, [b"bytes"], "name", "batch")
    assert files(data) == [] and store.list(ONE, 10) == []
    data.delete_bucket(ONE, "luthier-files")


def test_a_copy_that_finds_no_room_leaves_none_of_its_files(
    data: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads, real = MultipartUploads(data), ObjectFiles.link
    upload = uploads.create(ONE, "data", "k", ObjectMetadata(), ("", "")).id
    for number in (1, 2):
        body = b"x" * (5 << 20)
        uploads.put_part(ONE, "data", "k", upload, number, written(data, body), {})
    chosen = [
        CompletedPart(part.number, part.md5, {}) for part in uploads.parts(ONE, "data", "k", upload)
    ]
    uploads.complete(ONE, "data", "k", upload, chosen, lambda *told: {})
    links: list[str] = []

    def link(self: ObjectFiles, account: str, file_id: str) -> str:
        if links:
            raise DiskFull("the disk is full")
        links.append(real(self, account, file_id))
        return links[0]

    monkeypatch.setattr(ObjectFiles, "link", link)
    with pytest.raises(DiskFull):
        data.copy(ONE, ("data", "k"), ("data", "l"), lambda found: ObjectMetadata())
    assert len(files(data)) == 2


def test_a_file_is_deleted_with_its_object_or_not_at_all(data: Objects) -> None:
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
    # Its bytes were deleted before, and the bucket with them.
    row = store.add(ONE, [b"bytes"], "name", "batch")
    data.delete(ONE, "luthier-files", [row.id])
    data.delete_bucket(ONE, "luthier-files")
    assert store.delete(ONE, row.id) and store.get(ONE, row.id) is None
