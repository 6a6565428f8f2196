"""Addresses of data: rights, and errors that reveal nothing about other accounts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from luthier.errors import CorruptFile, LocationRefused
from luthier.server.stores.locations import Locations
from luthier.server.stores.objects import Objects
from luthier.server.stores.uploaded_files import UploadedFiles
from luthier.server.tables.objects import UPLOADS, ObjectMetadata

ONE, TWO = "000000000001", "000000000002"


def put(objects: Objects, key: str, body: bytes, bucket: str = "data", account: str = ONE) -> None:
    with objects.files.begin(account) as writing:
        writing.write(body)
        written = writing.finish()
    objects.put(account, bucket, key, written, ObjectMetadata())


def refusal(call: object, *arguments: object) -> str:
    with pytest.raises(LocationRefused) as caught:
        call(*arguments)  # type: ignore[operator]
    return str(caught.value)


@pytest.fixture
def data(objects: Objects) -> Objects:
    objects.create_bucket(ONE, "data")
    for key in ("train/b.jsonl", "train/a.jsonl", "train/sub/a.jsonl", "train/note.txt", "one.csv"):
        put(objects, key, key.encode())
    return objects


def test_fetch_of_object_and_prefix(data: Objects, tmp_path: Path) -> None:
    locations = Locations(data.database)
    for uri in ("s3://data/one.csv", "s3://data/train/", "s3://data/"):
        locations.check(ONE, uri)
    ((uri, path),) = locations.fetch(ONE, "s3://data/one.csv", tmp_path / "x")
    assert uri == "s3://data/one.csv"
    assert path == tmp_path / "x" / "one.csv" and path.read_bytes() == b"one.csv"
    fetched = locations.fetch(ONE, "s3://data/train/", tmp_path / "y")
    paths = [path for _, path in fetched]
    assert [(uri, path.read_text()) for uri, path in fetched] == [
        (f"s3://data/{key}", key) for key in ("train/a.jsonl", "train/b.jsonl", "train/sub/a.jsonl")
    ]
    assert len(set(paths)) == 3 and all(path.parent == tmp_path / "y" for path in paths)


def test_fetched_upload_keeps_original_file_name(objects: Objects, tmp_path: Path) -> None:
    files = UploadedFiles(objects.database, objects)
    locations = Locations(objects.database)
    for number, name in enumerate(("../é/x.csv", "y.CSV.gz", "")):
        file = files.add(ONE, iter([b"a,b\n1,2\n"]), name, "fine-tune")
        uri = f"s3://{UPLOADS}/{file.id}"
        ((shown, path),) = locations.fetch(ONE, uri, tmp_path / str(number))
        peeked = locations.peek(ONE, uri, tmp_path / f"peek-{number}", 3)
        assert path.name == peeked[1].name == (name.rpartition("/")[2] or "object")
        assert shown == peeked[0] == uri and path.parent == tmp_path / str(number)
        assert peeked[1].read_bytes() == b"a,b"


def test_prefix_selects_files_as_a_local_folder_does(data: Objects, tmp_path: Path) -> None:
    for key in ("x/train.jsonl", "x/train.changes.jsonl", "x/.tmp/a.jsonl", "x/notes.txt"):
        put(data, key, key.encode())
    locations = Locations(data.database)
    assert [uri for uri, _ in locations.fetch(ONE, "s3://data/x/", tmp_path / "in")] == [
        "s3://data/x/train.jsonl"
    ]
    put(data, "x/test.jsonl", b"{}")
    said = refusal(locations.check, ONE, "s3://data/x/")
    assert "s3://data/x/" in said and "test.jsonl" in said and "train.jsonl" in said


def test_keys_with_equal_suffix_have_separate_copies(data: Objects, tmp_path: Path) -> None:
    keys = ["x/a/3-c.jsonl", "x/b/c.jsonl", "x/d/c.jsonl"]  # the third copy would be 3-c.jsonl
    for key in keys:
        put(data, key, key.encode())
    copies = Locations(data.database).fetch(ONE, "s3://data/x/", tmp_path / "in")
    assert [path.read_text() for _, path in copies] == keys


def test_keys_are_no_paths(data: Objects, tmp_path: Path) -> None:
    for key in ("x/../../escape.jsonl", "x/..", "x/.jsonl", "x/a b?.jsonl"):
        put(data, key, key.encode())
    copies = Locations(data.database).fetch(ONE, "s3://data/x/", tmp_path / "in")
    assert all(path.parent == tmp_path / "in" for _, path in copies) and len(copies) == 2
    ((_, path),) = Locations(data.database).fetch(ONE, "s3://data/x/..", tmp_path / "dots")
    assert path.parent == tmp_path / "dots" and path.is_file()


def test_folder_lists_direct_files(data: Objects, tmp_path: Path) -> None:
    locations = Locations(data.database)
    for uri in ("s3://data/train/", "s3://data/train"):
        assert locations.folder(ONE, uri) == [("a.jsonl", 13), ("b.jsonl", 13), ("note.txt", 14)]
        locations.fetch_from(ONE, uri, "note.txt", tmp_path / "note")
        assert (tmp_path / "note").read_text() == "train/note.txt"
    assert locations.folder(ONE, "s3://data") == [("one.csv", 7)]
    for uri in ("s3://data/trai", "s3://none/x", f"file://{tmp_path}"):
        assert refusal(locations.folder, ONE, uri)
    assert "no bucket" in refusal(locations.folder, TWO, "s3://data/train")


def test_folder_listing_is_limited(data: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    locations = Locations(data.database)
    monkeypatch.setattr("luthier.server.stores.locations.MOST_ENTRIES", 5)
    assert len(locations.folder(ONE, "s3://data/train")) == 3
    locations.check(ONE, "s3://data/")
    monkeypatch.setattr("luthier.server.stores.locations.MOST_ENTRIES", 3)
    for call, uri in ((locations.folder, "s3://data/train"), (locations.check, "s3://data/")):
        assert "more than 3 objects below" in refusal(call, ONE, uri)


def test_openai_files_bucket_is_not_writable_for_jobs(data: Objects) -> None:
    locations = Locations(data.database)
    data.create_bucket(ONE, UPLOADS)
    address = f"s3://{UPLOADS}/x/"
    assert "reserved" in refusal(locations.check_writable, ONE, address)
    assert "reserved" in refusal(locations.write, ONE, address, "x", b"")


def test_unreadable_locations_are_rejected(data: Objects) -> None:
    locations = Locations(data.database)
    assert "no object" in refusal(locations.check, ONE, "s3://data/none")
    assert "no object below" in refusal(locations.check, ONE, "s3://data/none/")
    for folder in ("s3://data/train", "s3://data"):
        assert f"{folder}/?" in refusal(locations.check, ONE, folder)
    assert "?" not in refusal(locations.check, ONE, "s3://data/trai")
    assert "names a bucket" in refusal(locations.check, ONE, "s3://data")
    said = refusal(locations.check, TWO, "s3://data/one.csv")
    assert said == refusal(locations.check, TWO, "s3://none/one.csv").replace("none", "data")
    assert refusal(locations.check_writable, TWO, "s3://data/out/") == said
    wrong = (
        "", "data/x", "http://host/x", "S3://data/x", "s3:///x", "s3://UP/x", "gs://data/x",
        "s3://data/a\0b", "s3://data/" + "x" * 1025, "s3://data@host/x", "/etc/passwd",
    )  # fmt: skip
    for uri in wrong:
        assert refusal(locations.check, ONE, uri)


def test_written_file_can_be_fetched(data: Objects, tmp_path: Path) -> None:
    locations = Locations(data.database)
    source = tmp_path / "file"
    source.write_bytes(os.urandom(3 << 20))
    for uri in ("s3://data/out", "s3://data/out/"):
        locations.check_writable(ONE, uri)
        assert (
            locations.write(ONE, uri, "m/metrics.csv", b"step\n") == "s3://data/out/m/metrics.csv"
        )
    assert locations.write(ONE, "s3://data", "big", source) == "s3://data/big"
    ((_, path),) = locations.fetch(ONE, "s3://data/big", tmp_path / "back")
    assert path.read_bytes() == source.read_bytes()
    assert "no bucket" in refusal(locations.write, TWO, "s3://data/out", "x", b"")
    assert data.head(ONE, "data", "out/m/metrics.csv").size == 5


def test_corrupt_or_missing_object_bytes_are_detected(data: Objects, tmp_path: Path) -> None:
    (piece,) = data.open(ONE, "data", "one.csv").pieces
    path = data.files.path(ONE, piece.id)
    path.write_bytes(b"two.csv")
    with pytest.raises(CorruptFile):
        Locations(data.database).fetch(ONE, "s3://data/one.csv", tmp_path / "x")
    assert not list((tmp_path / "x").iterdir())
    path.unlink()
    with pytest.raises(CorruptFile):
        Locations(data.database).fetch(ONE, "s3://data/one.csv", tmp_path / "x")


def test_output_address_length_is_limited(data: Objects) -> None:
    locations = Locations(data.database)
    locations.check_writable(ONE, "s3://data/" + "k" * 700)
    for uri in ("s3://data/" + "k" * 800, "s3://data/" + "ü" * 400):
        refusal(locations.check_writable, ONE, uri)
