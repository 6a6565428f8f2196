"""The object store below its API: interrupted writes and rights."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from luthier.errors import CorruptFile, DoesNotFit, ObjectRefused
from luthier.server.stores.listing import beyond
from luthier.server.stores.locations import Locations
from luthier.server.stores.multipart import CompletedPart, MultipartUploads
from luthier.server.stores.object_files import WrittenFile
from luthier.server.stores.objects import Content, Objects
from luthier.server.tables.objects import ObjectMetadata

ONE = "000000000001"


def written(objects: Objects, body: bytes, account: str = ONE) -> WrittenFile:
    with objects.files.begin(account) as writing:
        writing.write(body)
        return writing.finish()


def put(objects: Objects, key: str, body: bytes) -> None:
    objects.put(ONE, "data", key, written(objects, body), ObjectMetadata())


def read(objects: Objects, key: str) -> bytes:
    _, pieces = objects.open_range(ONE, "data", key, lambda found: (0, found.size))
    return b"".join(pieces)


def files(objects: Objects) -> list[Path]:
    return [path for path in objects.files.folder.rglob("*") if path.is_file()]


@pytest.fixture
def data(objects: Objects) -> Objects:
    objects.create_bucket(ONE, "data")
    return objects


def test_files_of_replaced_and_deleted_objects_are_removed(data: Objects) -> None:
    put(data, "k", b"one")
    put(data, "k", b"two")
    assert read(data, "k") == b"two" and len(files(data)) == 1
    data.copy(ONE, ("data", "k"), ("data", "l"), lambda found: ObjectMetadata())
    data.delete(ONE, "data", ["k", "none"])
    assert read(data, "l") == b"two" and len(files(data)) == 1
    data.delete(ONE, "data", ["l"])
    assert files(data) == []
    data.delete_bucket(ONE, "data")


def test_sweep_removes_files_without_rows(data: Objects) -> None:
    put(data, "k", b"kept")
    lost = written(data, b"its process died before the row was committed")
    with data.files.begin(ONE) as writing:
        writing.write(b"x")
        (temporary,) = [path for path in files(data) if path.name.startswith(".tmp-")]
        assert data.sweep() == 0 and temporary.exists()  # may belong to a request that is not done
        assert data.sweep(older_than=0) == 2
        assert not temporary.exists() and not data.files.path(ONE, lost.id).exists()
    assert read(data, "k") == b"kept" and len(files(data)) == 1


KILLED = """
import os, signal, sys
from luthier.server.tables.database import Database
from luthier.server.stores.objects import Objects
from luthier.server.tables.objects import ObjectMetadata


objects = Objects(Database(sys.argv[2]))
if sys.argv[1] == "before":
    objects.place = lambda *given: os.kill(os.getpid(), signal.SIGKILL)
else:
    objects.files.remove = lambda *given: os.kill(os.getpid(), signal.SIGKILL)
with objects.files.begin("000000000001") as writing:
    writing.write(b"new")
    done = writing.finish()
objects.put("000000000001", "data", "k", done, ObjectMetadata())
"""


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "left"), [("before", b"old"), ("after", b"new")])
def test_kill_around_commit_leaves_intact_object(data: Objects, moment: str, left: bytes) -> None:
    put(data, "k", b"old")
    command = [sys.executable, "-c", KILLED, moment, data.database.url]
    ended = subprocess.run(command, check=False, timeout=60)
    assert ended.returncode == -signal.SIGKILL
    assert read(data, "k") == left and len(files(data)) == 2
    assert data.sweep(older_than=0) == 1
    assert read(data, "k") == left and len(files(data)) == 1


def test_rejected_object_leaves_no_file(data: Objects) -> None:
    def refuse(now: object) -> None:
        raise ObjectRefused("PreconditionFailed", "")

    put(data, "k", b"old")
    for bucket, check in (("none", None), ("data", refuse)):
        with pytest.raises(ObjectRefused):
            data.put(ONE, bucket, "k", written(data, b"new"), ObjectMetadata(), check)
    assert read(data, "k") == b"old" and len(files(data)) == 1
    with suppress(KeyError), data.files.begin(ONE) as writing:
        writing.write(b"x")
        raise KeyError
    assert len(files(data)) == 1


def test_full_disk_leaves_no_file(data: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    def fill() -> None:
        with data.files.begin(ONE) as writing:
            monkeypatch.setattr(writing, "_file", Full())
            writing.write(b"x")

    with pytest.raises(DoesNotFit):
        fill()
    assert files(data) == []


def test_open_object_is_readable_after_replacement(data: Objects) -> None:
    body = os.urandom(3 << 20)
    put(data, "k", body)
    _, pieces = data.open_range(ONE, "data", "k", lambda found: (0, found.size))
    first = next(pieces)
    put(data, "k", b"new")
    assert first + b"".join(pieces) == body and read(data, "k") == b"new"


def test_object_replaced_during_lookup(data: Objects) -> None:
    put(data, "k", b"old")
    calls = []

    def span(found: object) -> tuple[int, int]:
        if not calls:
            put(data, "k", b"newer")
        calls.append(found)
        return 0, calls[-1].size  # type: ignore[attr-defined]

    found, pieces = data.open_range(ONE, "data", "k", span)
    assert b"".join(pieces) == b"newer" and found.size == 5 and len(calls) == 2


def test_object_replaced_during_copy(
    data: Objects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Objects.open
    late: list[bytes] = []

    def replaced(self: Objects, *name: str) -> Content:
        content = real(self, *name)
        if late:
            put(data, "k", late.pop())
        return content

    monkeypatch.setattr(Objects, "open", replaced)
    put(data, "k", b"old")
    late.append(b"newer")
    data.copy(ONE, ("data", "k"), ("data", "l"), lambda found: ObjectMetadata())
    assert read(data, "l") == b"newer"
    late.append(b"newest")
    ((_, path),) = Locations(data.database).fetch(ONE, "s3://data/k", tmp_path)
    assert path.read_bytes() == b"newest" and len(files(data)) == 2


def test_truncated_object_file_is_corrupt(data: Objects) -> None:
    put(data, "k", b"0123456789")
    (path,) = files(data)
    path.write_bytes(b"0123")
    with pytest.raises(CorruptFile):
        read(data, "k")
    path.unlink()
    with pytest.raises(CorruptFile):
        data.copy(ONE, ("data", "k"), ("data", "l"), lambda found: ObjectMetadata())
    assert files(data) == []


def test_concurrent_conditional_writes_create_key_once(data: Objects) -> None:
    def absent(found: object) -> None:
        if found is not None:
            raise ObjectRefused("PreconditionFailed", "")

    def make(number: int) -> bool:
        try:
            body = written(data, str(number).encode())
            data.put(ONE, "data", "k", body, ObjectMetadata(), absent)
        except ObjectRefused:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(make, range(16))) == 1
    assert len(files(data)) == 1


def test_unused_parts_of_uploads_are_removed(data: Objects) -> None:
    uploads = MultipartUploads(data)
    upload = uploads.create(ONE, "data", "k", ObjectMetadata(), ("", ""))
    for number in (1, 2, 2):
        part = written(data, b"x" * number)
        piece = uploads.put_part(ONE, "data", "k", upload.id, number, part, {})
    assert len(files(data)) == 2 and data.sweep(older_than=0) == 0
    chosen = [CompletedPart(2, piece.md5, {})]
    uploads.complete(ONE, "data", "k", upload.id, chosen, lambda upload, pieces: {})
    assert read(data, "k") == b"xx" and len(files(data)) == 1
    other = uploads.create(ONE, "data", "l", ObjectMetadata(), ("", ""))
    uploads.put_part(ONE, "data", "l", other.id, 1, written(data, b"y"), {})
    uploads.abort(ONE, "data", "l", other.id)
    with pytest.raises(ObjectRefused):
        uploads.put_part(ONE, "data", "l", other.id, 1, written(data, b"y"), {})
    assert len(files(data)) == 1


@pytest.mark.parametrize(
    ("prefix", "following"),
    [("a/", "a0"), ("\ud7ff", "\ue000"), ("a\U0010ffff", "b"), ("\U0010ffff", None), ("", None)],
)
def test_first_key_after_prefix(prefix: str, following: str | None) -> None:
    assert beyond(prefix) == following
