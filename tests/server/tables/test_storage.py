"""Stored bytes of accounts: exact counts, and quotas."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from both_databases import new_database

from luthier.errors import QuotaExceeded, RefusedInput
from luthier.limits import AccountQuotas
from luthier.server.stores.multipart import CompletedPart, MultipartUploads
from luthier.server.stores.objects import Objects
from luthier.server.stores.uploaded_files import UploadedFiles
from luthier.server.tables import accounts
from luthier.server.tables.accounts import create_account, set_quota
from luthier.server.tables.database import Database
from luthier.server.tables.objects import ObjectMetadata
from luthier.server.tables.storage import Storage, stored_by

ONE, OTHER = "111111111111", "222222222222"
PART = 5 << 20


class Store:
    """Object store with the counted bytes."""

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

    def stored(self, account: str = ONE) -> int:
        with self.database.read() as session:
            return stored_by(session, account)

    def quota(self, **values: int | None) -> None:
        with self.database.write() as session:
            set_quota(session, ONE, **values)

    def on_disk(self) -> int:
        return sum(1 for path in self.objects.files.folder.rglob("*") if path.is_file())


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    database = new_database(database_url)
    with database.write() as session:
        create_account(session, ONE)
        create_account(session, OTHER)
    made = Store(database, AccountQuotas(stored_bytes=100 << 20))
    made.objects.create_bucket(ONE, "rows")
    yield made
    database.close()


def test_stored_bytes_after_each_change(store: Store) -> None:
    store.put("a", 10)
    store.put("b", 5)
    assert store.stored() == 15
    store.put("a", 3)
    assert store.stored() == 8
    store.objects.copy(ONE, ("rows", "b"), ("rows", "c"), lambda found: ObjectMetadata())
    assert store.stored() == 13
    store.objects.delete(ONE, "rows", ["a", "b", "never"])
    assert store.stored() == 5
    file = store.files.add(ONE, [b"1234"], "name", "batch")
    assert store.stored() == 9
    assert store.files.delete(ONE, file.id)
    assert not store.files.delete(ONE, file.id)
    store.objects.delete(ONE, "rows", ["c"])
    store.objects.delete_bucket(ONE, "rows")
    assert store.stored() == store.stored(OTHER) == 0


def test_stored_bytes_of_upload_parts(store: Store) -> None:
    store.put("a", 7)
    upload = store.begin("a")
    first, last = store.part("a", upload, 1, PART), store.part("a", upload, 2, 9)
    store.part("a", upload, 3, 100)
    store.part("a", upload, 3, 50)
    assert store.stored() == 7 + PART + 59
    store.complete("a", upload, first, last)
    assert store.stored() == PART + 9
    upload = store.begin("b")
    store.part("b", upload, 1, 11)
    store.uploads.abort(ONE, "rows", "b", upload)
    upload = store.begin("c")
    store.part("c", upload, 1, 11)
    store.objects.delete(ONE, "rows", ["a"])
    store.objects.delete_bucket(ONE, "rows")
    assert store.stored() == 0
    assert store.on_disk() == 0


def test_write_beyond_quota_changes_nothing(store: Store) -> None:
    store.quota(stored_bytes=10)
    store.put("a", 6)
    with pytest.raises(QuotaExceeded, match="stored_bytes") as refused:
        store.put("b", 5)
    assert refused.value.setting == "stored_bytes"
    store.put("a", 10)  # what it replaces is gone then
    store.put("b", 0)
    with pytest.raises(QuotaExceeded, match="stored_bytes"):
        store.begin("d")
    with pytest.raises(QuotaExceeded):
        store.objects.begin(ONE, 1)
    store.objects.begin(ONE, 10, freed=10).__exit__(None, None, None)
    store.objects.delete(ONE, "rows", ["a"])
    upload = store.begin("d")
    with pytest.raises(QuotaExceeded, match="stored_bytes"):
        store.part("d", upload, 1, 11)
    store.part("d", upload, 1, 10)
    store.part("d", upload, 1, 9)
    assert store.stored() == 9 and store.on_disk() == 2
    store.put("free", 1 << 20, OTHER, bucket=other_bucket(store))


def other_bucket(store: Store) -> str:
    store.objects.create_bucket(OTHER, "rows")
    return "rows"


def test_account_above_lowered_quota_can_shrink(store: Store) -> None:
    store.put("a", 10)
    store.put("b", 10)
    upload = store.begin("c")
    part = store.part("c", upload, 1, 10)
    store.quota(stored_bytes=5)
    store.put("a", 10)  # as large as before
    store.put("a", 9)
    with pytest.raises(QuotaExceeded):
        store.put("a", 10)
    store.objects.delete(ONE, "rows", ["a"])
    store.complete("c", upload, part)
    assert store.stored() == 20


def test_concurrent_writes_fill_quota_exactly(store: Store) -> None:
    for name in ("more",):
        store.objects.create_bucket(ONE, name)
    store.quota(stored_bytes=50)
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
    assert store.stored() == 50
    assert store.on_disk() == 5


def test_account_without_stored_data_can_be_removed(store: Store) -> None:
    store.put("a", 1)
    with pytest.raises(RefusedInput), store.database.write() as session:
        accounts.remove_account(session, ONE)
    store.objects.delete(ONE, "rows", ["a"])
    store.objects.delete_bucket(ONE, "rows")
    with store.database.write() as session:
        accounts.remove_account(session, ONE)
        assert session.get(Storage, ONE) is None
