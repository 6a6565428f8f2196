"""What accounts store is counted as it changes, to the byte, and held below their quotas."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from luthier.errors import ObjectRefused, QuotaExceeded
from luthier.limits import AccountQuotas
from luthier.store import accounts, storage
from luthier.store.accounts import create_account, set_quota
from luthier.store.database import Database
from luthier.store.multipart import CompletedPart, MultipartUploads
from luthier.store.objects import ObjectMetadata, Objects
from luthier.store.quota_usage import recount
from luthier.store.schema import upgrade
from luthier.store.storage import Storage, stored_by
from luthier.store.uploaded_files import UploadedFiles

ONE, OTHER = "111111111111", "222222222222"
PART = 5 << 20
EMPTY = dict.fromkeys(storage.COUNTED, 0)


class Store:
    """An object store and what is counted of it."""

    def __init__(self, database: Database, quotas: AccountQuotas) -> None:
        self.database, self.objects = database, Objects(database, quotas=quotas)
        self.uploads, self.files = (
            MultipartUploads(self.objects),
            UploadedFiles(database, self.objects),
        )

    def put(self, key: str, size: int, account: str = ONE, bucket: str = "rows") -> None:
        with self.objects.files.begin(account) as writing:
            writing.write(b"x" * size)
            self.objects.put(account, bucket, key, writing.finish(), ObjectMetadata())

    def begin(self, key: str) -> str:
        return self.uploads.create(ONE, "rows", key, ObjectMetadata(), ("", "")).id

    def part(self, key: str, upload: str, number: int, size: int) -> CompletedPart:
        with self.objects.files.begin(ONE) as writing:
            writing.write(b"x" * size)
            piece = self.uploads.put_part(ONE, "rows", key, upload, number, writing.finish(), {})
        return CompletedPart(number, piece.md5, {})

    def complete(self, key: str, upload: str, *parts: CompletedPart) -> None:
        self.uploads.complete(ONE, "rows", key, upload, parts, lambda upload, pieces: {})

    def counts(self, account: str = ONE) -> dict[str, int]:
        """What is counted now; counted anew it is the same."""
        with self.database.read() as session:
            found = stored_by(session, account)
        with self.database.write() as session:
            assert recount(session) == []
        return {name: number for name, number in found.items() if number}

    def quota(self, **values: int | None) -> None:
        with self.database.write() as session:
            set_quota(session, ONE, **values)

    def on_disk(self) -> int:
        return sum(1 for path in self.objects.files.folder.rglob("*") if path.is_file())


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    database = Database(database_url)
    upgrade(database)
    with database.write() as session:
        create_account(session, ONE)
        create_account(session, OTHER)
    made = Store(database, AccountQuotas(stored_bytes=100 << 20, buckets=2))
    made.objects.create_bucket(ONE, "rows")
    yield made
    database.close()


def test_every_change_is_counted(store: Store) -> None:
    store.put("a", 10)
    store.put("b", 5)
    assert store.counts() == {"stored_bytes": 15, "objects": 2, "buckets": 1}
    store.put("a", 3)
    assert store.counts() == {"stored_bytes": 8, "objects": 2, "buckets": 1}
    store.objects.copy(ONE, ("rows", "b"), ("rows", "c"), lambda found: ObjectMetadata())
    assert store.counts() == {"stored_bytes": 13, "objects": 3, "buckets": 1}
    store.objects.delete(ONE, "rows", ["a", "b", "never"])
    assert store.counts() == {"stored_bytes": 5, "objects": 1, "buckets": 1}
    file = store.files.add(ONE, [b"1234"], "name", "batch")
    assert store.counts() == {"stored_bytes": 9, "objects": 2, "files": 1, "buckets": 1}
    assert store.files.delete(ONE, file.id)
    assert not store.files.delete(ONE, file.id)
    store.objects.delete(ONE, "rows", ["c"])
    store.objects.delete_bucket(ONE, "rows")
    assert store.counts() == store.counts(OTHER) == {}


def test_parts_of_uploads_are_counted_until_they_are_objects_or_gone(store: Store) -> None:
    store.put("a", 7)
    upload = store.begin("a")
    first, last = store.part("a", upload, 1, PART), store.part("a", upload, 2, 9)
    store.part("a", upload, 3, 100)
    store.part("a", upload, 3, 50)
    whole = {"stored_bytes": 7 + PART + 59, "objects": 1, "buckets": 1, "uploads_in_progress": 1}
    assert store.counts() == whole
    store.complete("a", upload, first, last)
    assert store.counts() == {"stored_bytes": PART + 9, "objects": 1, "buckets": 1}
    upload = store.begin("b")
    store.part("b", upload, 1, 11)
    store.uploads.abort(ONE, "rows", "b", upload)
    upload = store.begin("c")
    store.part("c", upload, 1, 11)
    store.objects.delete(ONE, "rows", ["a"])
    store.objects.delete_bucket(ONE, "rows")
    assert store.counts() == {}
    assert store.on_disk() == 0


def test_what_goes_beyond_a_quota_changes_nothing(store: Store) -> None:
    store.quota(stored_bytes=10, objects=2, uploads_in_progress=1)
    store.put("a", 6)
    with pytest.raises(
        QuotaExceeded, match=r"10 bytes \(quota stored_bytes\) and has 6"
    ) as refused:
        store.put("b", 5)
    assert refused.value.quota == "stored_bytes"
    store.put("a", 10)  # what it replaces is gone then
    store.put("b", 0)
    with pytest.raises(QuotaExceeded, match="2 objects"):
        store.put("c", 0)
    with pytest.raises(QuotaExceeded, match="2 objects"):
        store.objects.copy(ONE, ("rows", "b"), ("rows", "c"), lambda found: ObjectMetadata())
    with pytest.raises(QuotaExceeded, match="bytes"):
        store.begin("d")
    store.objects.delete(ONE, "rows", ["a"])
    upload = store.begin("d")
    with pytest.raises(QuotaExceeded, match="1 uploads"):
        store.begin("e")
    with pytest.raises(QuotaExceeded, match="bytes"):
        store.part("d", upload, 1, 11)
    store.part("d", upload, 1, 10)
    store.part("d", upload, 1, 9)
    store.objects.create_bucket(ONE, "more")
    with pytest.raises(QuotaExceeded, match="2 buckets"):
        store.objects.create_bucket(ONE, "most")
    counted = {"stored_bytes": 9, "objects": 1, "buckets": 2, "uploads_in_progress": 1}
    assert store.counts() == counted and store.on_disk() == 2
    store.files.add(ONE, [b"1"], "name", "batch")  # its bucket is ours
    with pytest.raises(ObjectRefused, match="yours"):
        store.objects.create_bucket(ONE, "more")
    store.quota(files=1, objects=None, stored_bytes=None)
    with pytest.raises(QuotaExceeded, match="1 files"):
        store.files.add(ONE, [b""], "name", "batch")
    store.put("free", 1 << 20, OTHER, bucket=other_bucket(store))


def other_bucket(store: Store) -> str:
    store.objects.create_bucket(OTHER, "rows")
    return "rows"


def test_a_quota_that_was_lowered_lets_an_account_shrink(store: Store) -> None:
    store.put("a", 10)
    store.put("b", 10)
    upload = store.begin("c")
    part = store.part("c", upload, 1, 10)
    store.quota(stored_bytes=5, objects=2)
    store.put("a", 10)  # as large as before
    store.put("a", 9)
    with pytest.raises(QuotaExceeded):
        store.put("a", 10)
    with pytest.raises(QuotaExceeded, match="2 objects"):
        store.complete("c", upload, part)
    store.objects.delete(ONE, "rows", ["a"])
    store.complete("c", upload, part)
    assert store.counts() == {"stored_bytes": 20, "objects": 2, "buckets": 1}


def test_of_those_who_come_at_once_as_many_get_in_as_there_is_room(store: Store) -> None:
    for name in ("more",):
        store.objects.create_bucket(ONE, name)
    store.quota(stored_bytes=50, objects=1000)
    outcomes: list[str] = []
    gate = threading.Barrier(12)

    def work(number: int) -> None:
        bucket = ("rows", "more")[number % 2]
        with store.objects.files.begin(ONE) as writing:  # as if none had been refused early
            writing.write(b"x" * 10)
            written = writing.finish()
            gate.wait(30)
            try:
                store.objects.put(ONE, bucket, f"key-{number}", written, ObjectMetadata())
                outcomes.append("stored")
            except QuotaExceeded:
                outcomes.append("refused")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["refused"] * 7 + ["stored"] * 5
    assert store.counts() == {"stored_bytes": 50, "objects": 5, "buckets": 2}
    assert store.on_disk() == 5


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_files_in_the_making_take_room_from_each_other(store: Store) -> None:
    store.quota(stored_bytes=20)
    with store.objects.begin(ONE) as first, store.objects.begin(ONE) as second:
        first.write(b"x" * 15)
        with pytest.raises(QuotaExceeded, match="25 more are on their way"):
            second.write(b"x" * 10)
    store.put("a", 20)
    with pytest.raises(QuotaExceeded):
        store.objects.begin(ONE, 1)
    with store.objects.begin(ONE, 20, freed=20) as instead:
        instead.write(b"x" * 20)
    store.quota(stored_bytes=1)
    with store.objects.begin(ONE, 20, freed=20) as instead:
        instead.write(b"x" * 20)
    assert store.on_disk() == 1


def test_rows_that_are_wrong_are_made_right(store: Store) -> None:
    store.put("a", 10)
    store.files.add(ONE, [b"1234"], "name", "batch")
    with store.database.write() as session:
        row: Any = session.get(Storage, ONE)
        row.stored_bytes, row.files = 5, 9
    with store.database.write() as session:
        assert recount(session) == [ONE]
    assert store.counts() == {"stored_bytes": 14, "objects": 2, "files": 1, "buckets": 1}


def test_an_account_that_stores_nothing_can_be_removed(store: Store) -> None:
    store.put("a", 1)
    with pytest.raises(Exception, match="still has"), store.database.write() as session:
        accounts.remove_account(session, ONE)
    store.objects.delete(ONE, "rows", ["a"])
    store.objects.delete_bucket(ONE, "rows")
    with store.database.write() as session:
        accounts.remove_account(session, ONE)
        assert session.get(Storage, ONE) is None
