"""The shared store: one contract for a folder and for S3; folders in it are whole or not there."""

from __future__ import annotations

import errno
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from moto_server import KEYS, moto_client, moto_server

from luthier.errors import CorruptFile, RefusedInput, SharedStoreAway
from luthier.files import sha256_of
from luthier.store import shared
from luthier.store.shared import (
    IDENTITY,
    BucketStore,
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
    (source / "big").write_bytes(b"big" * 4_000_000)
    files = {name: source / name for name in ("x", "big")}
    record = folders.upload("models/base/one", {**files, "deep/x": source / "x"}, parent=None)
    assert folders.read("models/base/one") is None and folders.names("models") == set()
    folders.commit("models/base/one", record)
    assert folders.names("models") == {"models/base/one"}
    found = folders.read("models/base/one")
    assert found == record and found.size == 12_000_002
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
    store.put("blobs/jobs/a/upload", b"of somebody who uploads now")
    folders.commit("jobs/a", folders.upload("jobs/a", {"2": tmp_path / "two"}))
    assert len([*store.list("blobs/jobs/a")]) == 2
    assert store.exists("blobs/jobs/a/upload")
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
        with pytest.raises(SharedStoreAway, match="of the shared store is missing"):
            use()
    assert not (tmp_path / "mount").exists()


def test_an_empty_folder_in_the_place_of_the_store_is_away(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    store = DirectoryStore(tmp_path / "shared")
    store.put("records/one.json", b"x")
    store.create(IDENTITY, b"id")
    (tmp_path / "shared").rename(tmp_path / "unmounted")
    (tmp_path / "shared").mkdir()
    with pytest.raises(SharedStoreAway, match="is another one than before, without store-id"):
        read_shared(store, "records/one.json")
    with pytest.raises(SharedStoreAway, match="Mount what was mounted there"):
        store.put("records/one.json", b"y")
    assert not [*(tmp_path / "shared").iterdir()]
    # Mounted again it may have another number.
    (tmp_path / "shared").rmdir()
    shutil.copytree(tmp_path / "unmounted", tmp_path / "shared")
    assert read_shared(store, "records/one.json") == b"x"


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOTCONN])
def test_a_volume_that_does_not_answer_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    store = DirectoryStore(tmp_path)
    store.put("a", b"x")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "open", fail)
    monkeypatch.setattr(os, "open", fail)
    monkeypatch.setattr(Path, "unlink", fail)
    for use in (
        lambda: read_shared(store, "a"),
        lambda: store.put("a", b"y"),
        lambda: store.put_once("a", b"y"),
        lambda: store.delete(["a"]),
    ):
        with pytest.raises(SharedStoreAway, match="does not answer"):
            use()
    monkeypatch.setattr(Path, "stat", fail)
    for look in (lambda: store.exists("a"), lambda: [*store.list("")]):
        with pytest.raises(SharedStoreAway, match="does not answer"):
            look()


def test_within_the_fence_is_one_put_that_is_tried_again_outside(
    store: SharedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "_PAUSE", 0.0)
    folders = SharedFolders(store)
    for number in range(2):
        (tmp_path / "x").write_text(str(number))
        record = folders.upload("jobs/a", {"x": tmp_path / "x"})
        if not number:
            folders.commit("jobs/a", record)
    calls: list[str] = []
    put_once = store.put_once

    def note(name: str, use: Any) -> Any:
        def noted(*arguments: Any) -> Any:
            calls.append(name)
            return use(*arguments)

        return noted

    def fail_once(key: str, content: bytes) -> None:
        monkeypatch.setattr(store, "put_once", note("put_once", put_once))
        calls.append("put_once")
        raise SharedStoreAway("away")

    for name in ("put", "list", "delete", "exists", "pieces"):
        monkeypatch.setattr(store, name, note(name, getattr(store, name)))
    monkeypatch.setattr(store, "put_once", fail_once)

    def fence(action: Callable[[], None]) -> None:
        calls.append("begin")
        try:
            action()
        finally:
            calls.append("end")

    folders.commit("jobs/a", record, fence)
    one_try = ["begin", "put_once", "end"]
    first, last = calls.index("begin"), len(calls) - calls[::-1].index("end")
    assert calls[first:last] == one_try * 2
    assert "delete" in calls[last:] and len([*store.list("blobs/jobs/a")]) == 1


def test_who_commits_deletes_no_blobs_of_another_that_uploads(
    store: SharedStore, tmp_path: Path
) -> None:
    for name in ("base", "one", "two"):
        (tmp_path / name).write_text(name)
    one, two = SharedFolders(store), SharedFolders(store)
    one.commit("m/a/b", one.upload("m/a/b", {"x": tmp_path / "base"}))
    first = one.upload("m/a/b", {"x": tmp_path / "one"})
    second = two.upload("m/a/b", {"x": tmp_path / "two", "y": tmp_path / "base"})
    one.commit("m/a/b", first)
    # Its own blob is still there; the one that it took from the first record is not, and it says so.
    with pytest.raises(SharedStoreAway, match="were removed"):
        two.commit("m/a/b", second)
    second = two.upload("m/a/b", {"x": tmp_path / "two", "y": tmp_path / "base"})
    two.commit("m/a/b", second)
    assert two.fetch("m/a/b", second, (tmp_path / "copy").joinpath)


def test_the_blobs_of_killed_uploads_are_old_and_named_by_nothing(
    store: SharedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = SharedFolders(store)
    (tmp_path / "x").write_text("x")
    folders.commit("models/b/n", folders.upload("models/b/n", {"x": tmp_path / "x"}))
    store.put("blobs/models/b/n/left", b"left")
    store.put("blobs/models/b/lost/blob", b"its record was lost")
    store.put("blobs/jobs/gone/blob", b"killed")
    assert folders.old_blobs() == {}
    monkeypatch.setattr(shared, "LEFTOVER", timedelta(days=-1))
    found = folders.old_blobs()
    assert folders.drop_unnamed("models/b/n", found["models/b/n"], True) == 1
    assert folders.drop_unnamed("models/b/lost", found["models/b/lost"], True) == 0
    assert folders.drop_unnamed("jobs/gone", found["jobs/gone"], False) == 1
    store.put("records/models/b/lost.json", b"damaged")
    assert folders.drop_unnamed("models/b/lost", found["models/b/lost"], False) == 0
    assert set(found) == {"models/b/n", "models/b/lost", "jobs/gone"}
    assert len([*store.list("blobs")]) == 2


def test_a_blob_is_under_the_hash_of_what_was_sent(store: SharedStore, tmp_path: Path) -> None:
    folders, large = SharedFolders(store), tmp_path / "large"
    large.write_bytes(b"0123456789" * 200_000)
    hashed: list[str] = []

    def hash_before_it_grows(path: Path) -> str:
        hashed.append(sha256_of(path))
        if len(hashed) == 1:
            with path.open("ab") as file:
                file.write(b"more")
        return hashed[-1]

    record = folders.upload("jobs/a", {"large": large}, hash_before_it_grows)
    (blob,) = store.list("blobs/jobs/a")
    assert blob.key.endswith(hashed[1]) and blob.size == 2_000_004
    folders.commit("jobs/a", record)
    assert folders.fetch("jobs/a", record, (tmp_path / "copy").joinpath)
    with pytest.raises(CorruptFile, match="changes while it is put"):
        folders.upload("jobs/b", {"large": large}, lambda path: "0" * 64)
    assert not [*store.list("blobs/jobs/b")]


def test_a_record_is_put_in_one_short_try(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in KEYS.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(shared, "ONCE_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(SharedStoreAway, match="could not be written"):
            BucketStore("bucket", "").put_once("records/a.json", b"x")
        silent.settimeout(5)
        silent.accept()[0].close()
        silent.settimeout(0)
        with pytest.raises(BlockingIOError):  # it asked once
            silent.accept()
