"""The shared store: one contract for a folder and for S3; folders in it are whole or not there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from moto_server import KEYS, moto_client, moto_server

from luthier.errors import CorruptFile, RefusedInput, SharedStoreAway
from luthier.store import shared
from luthier.store.shared import (
    DirectoryStore,
    FolderRecord,
    SharedFolders,
    SharedStore,
    StoredFile,
    check_writable,
    fetch_shared,
    read_shared,
    shared_store,
)


@pytest.fixture(scope="module")
def moto() -> Iterator[int]:
    with moto_server() as port:
        yield port


@pytest.fixture(params=["folder", "s3"])
def store(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> SharedStore:
    """An empty store of each kind, named as a server's is."""
    if request.param == "folder":
        (tmp_path / "shared").mkdir()
        monkeypatch.setenv(shared.ENVIRONMENT, f"file://{tmp_path}/shared")
    else:
        use_bucket(request.getfixturevalue("moto"), tmp_path.name, monkeypatch)
    found = shared_store()
    assert found is not None
    return found


def use_bucket(port: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = f"shared-{name.replace('_', '-').lower()}"[:60].rstrip("-")
    moto_client(port).create_bucket(Bucket=bucket)
    for variable, value in KEYS.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv(shared.ENVIRONMENT, f"s3://{bucket}/some/prefix/")


def test_keys_name_bytes_until_they_are_deleted(store: SharedStore, tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.write_bytes(b"0123456789abcdef" * 700_000)
    store.put("a/one", b"1")
    store.put("a/two", large)
    store.put("ab/three", b"")
    assert read_shared(store, "a/one") == b"1"
    assert read_shared(store, "a/two") == large.read_bytes()
    assert {(e.key, e.size) for e in store.list("a")} == {("a/one", 1), ("a/two", 11_200_000)}
    assert [e.key for e in store.list("none")] == []
    assert store.exists("ab/three") and not store.exists("ab")
    store.put("a/one", b"other")
    assert read_shared(store, "a/one") == b"other"
    store.delete(["a/one", "a/never"])
    store.delete([])
    assert read_shared(store, "a/one") is None
    with pytest.raises(FileNotFoundError):
        next(store.pieces("a/one"))


def test_of_two_that_create_a_key_one_does(store: SharedStore) -> None:
    assert store.create("keys", b"first") and not store.create("keys", b"second")
    assert read_shared(store, "keys") == b"first"


def test_what_is_fetched_is_what_was_put(store: SharedStore, tmp_path: Path) -> None:
    check_writable(store)
    store.put("a", b"bytes")
    digest = "277089d91c0bdf4f2e6862ba7e4a07605119431f5d13f726dd352b06f1b206a9"
    fetch_shared(store, "a", tmp_path / "a", StoredFile(digest, 5))
    assert (tmp_path / "a").read_bytes() == b"bytes"
    with pytest.raises(CorruptFile, match="a of the shared store is not what was put there"):
        fetch_shared(store, "a", tmp_path / "b", StoredFile(digest, 6))
    assert not (tmp_path / "b").exists()


def test_a_folder_is_whole_or_not_there(store: SharedStore, tmp_path: Path) -> None:
    folders, source = SharedFolders(store), tmp_path / "source"
    source.mkdir()
    (source / "x").write_bytes(b"x")
    (source / "big").write_bytes(b"big" * 1_000_000)
    files = {name: source / name for name in ("x", "big")}
    record = folders.upload("models/base/one", {**files, "deep/x": source / "x"}, parent=None)
    assert folders.read("models/base/one") is None and folders.names("models") == set()
    folders.commit("models/base/one", record)
    assert folders.names("models") == {"models/base/one"}
    found = folders.read("models/base/one")
    assert found == record and found.size == 3_000_002
    assert folders.fetch("models/base/one", found, (tmp_path / "copy").joinpath)
    assert (tmp_path / "copy/deep/x").read_bytes() == b"x"
    assert (tmp_path / "copy/big").read_bytes() == (source / "big").read_bytes()


def test_what_a_folder_no_longer_names_goes_and_the_rest_is_not_put_again(
    store: SharedStore, tmp_path: Path
) -> None:
    folders = SharedFolders(store)
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
    folders.commit("jobs/a", folders.upload("jobs/a", {"1": tmp_path / "one"}))
    folders.commit("jobs/b", folders.upload("jobs/b", {"1": tmp_path / "one"}))
    before = {each.key: each.modified for each in store.list("blobs/jobs/a")}
    both = {"1": tmp_path / "one", "2": tmp_path / "two"}
    folders.commit("jobs/a", folders.upload("jobs/a", both))
    after = {each.key: each.modified for each in store.list("blobs/jobs/a")}
    assert len(after) == 2 and before.items() <= after.items()
    folders.commit("jobs/a", folders.upload("jobs/a", {"2": tmp_path / "two"}))
    assert len([*store.list("blobs/jobs/a")]) == 1
    folders.remove("jobs/a")
    folders.remove("jobs/a")
    assert folders.names("jobs") == {"jobs/b"} and not [*store.list("blobs/jobs/a")]
    assert len([*store.list("blobs/jobs/b")]) == 1


def test_a_blob_that_is_missing_or_changed_is_named(store: SharedStore, tmp_path: Path) -> None:
    folders = SharedFolders(store)
    (tmp_path / "x").write_text("x")
    record = folders.upload("models/b/n", {"x": tmp_path / "x"})
    folders.commit("models/b/n", record)
    (blob,) = store.list("blobs/models/b/n")
    store.put(blob.key, b"y")
    with pytest.raises(CorruptFile, match=f"{blob.key} of the shared store is not what"):
        folders.fetch("models/b/n", record, (tmp_path / "copy").joinpath)
    store.delete([blob.key])
    with pytest.raises(
        CorruptFile, match=f"{blob.key} of the shared store is missing: x of models"
    ):
        folders.fetch("models/b/n", record, (tmp_path / "copy").joinpath)
    folders.remove("models/b/n")
    assert not folders.fetch("models/b/n", record, (tmp_path / "copy").joinpath)
    assert not (tmp_path / "copy" / "x").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b'{"format": 1}', b'{"format": 1, "files": {"../x": ["a", 1]}, "about": {}}',
     b'{"format": 1, "files": {"/x": ["a", 1]}, "about": {}}', b'{"format": 2}'],
)  # fmt: skip
def test_a_record_that_is_none_is_refused(content: bytes) -> None:
    with pytest.raises(CorruptFile):
        FolderRecord.parse(content, "records/x.json")


@pytest.mark.parametrize("address", ["some/folder", "http://127.0.0.1/x", "s3://", "s3://A_B/x"])
def test_an_address_that_is_none_is_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(shared.ENVIRONMENT, address)
    with pytest.raises(RefusedInput, match="is no address: write s3://bucket/prefix"):
        shared_store()


def test_nothing_is_shared_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(shared.ENVIRONMENT, raising=False)
    assert shared_store() is None
    monkeypatch.setenv(shared.ENVIRONMENT, "")
    assert shared_store() is None


def test_a_store_that_cannot_be_reached_says_what_to_check(
    moto: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_bucket(moto, "reached", monkeypatch)
    monkeypatch.setenv(shared.ENVIRONMENT, "s3://nobodys-bucket/x")
    store = shared_store()
    assert store is not None
    with pytest.raises(
        SharedStoreAway, match="the shared store s3://nobodys-bucket/x could not be"
    ):
        check_writable(store)


def test_a_folder_that_is_missing_is_away_and_not_empty(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "mount" / "shared")
    for use in (
        lambda: [*store.list("records")],
        lambda: read_shared(store, "a"),
        lambda: store.exists("a"),
        lambda: store.put("a", b"x"),
        lambda: store.create("a", b"x"),
        lambda: store.delete(["a"]),
    ):
        with pytest.raises(SharedStoreAway, match="of the shared store is missing. Mount it"):
            use()
    assert not (tmp_path / "mount").exists()
