"""Addresses of data: who can read what, and that nothing is told of what is not theirs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from luthier.errors import CorruptFile, LocationRefused
from luthier.store.locations import Locations
from luthier.store.objects import UPLOADS, ObjectMetadata, Objects

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


def test_an_object_and_all_rows_below_a_prefix(data: Objects, tmp_path: Path) -> None:
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


def test_keys_that_end_alike_never_share_a_copy(data: Objects, tmp_path: Path) -> None:
    keys = ["x/a/3-c.jsonl", "x/b/c.jsonl", "x/d/c.jsonl"]  # the third copy would be 3-c.jsonl
    for key in keys:
        put(data, key, key.encode())
    copies = Locations(data.database).fetch(ONE, "s3://data/x/", tmp_path / "in")
    assert [path.read_text() for _, path in copies] == keys


def test_keys_are_no_paths(data: Objects, tmp_path: Path) -> None:
    for key in ("x/../../escape.jsonl", "x/..", "x/.jsonl", "x/a b?.jsonl"):
        put(data, key, key.encode())
    copies = Locations(data.database).fetch(ONE, "s3://data/x/", tmp_path / "in")
    assert all(path.parent == tmp_path / "in" for _, path in copies) and len(copies) == 3
    ((_, path),) = Locations(data.database).fetch(ONE, "s3://data/x/..", tmp_path / "dots")
    assert path.parent == tmp_path / "dots" and path.is_file()


def test_the_files_right_below_a_folder(data: Objects, root: Path, tmp_path: Path) -> None:
    locations = Locations(data.database, file_roots=[root])
    for uri in ("s3://data/train/", "s3://data/train"):
        assert locations.folder(ONE, uri) == [("a.jsonl", 13), ("b.jsonl", 13), ("note.txt", 14)]
        locations.fetch_from(ONE, uri, "note.txt", tmp_path / "note")
        assert (tmp_path / "note").read_text() == "train/note.txt"
    assert locations.folder(ONE, "s3://data") == [("one.csv", 7)]
    for uri in (f"file://{root}", f"file://{root}/"):
        assert locations.folder(ONE, uri) == [("a ü.jsonl", 1)]
        locations.fetch_from(ONE, uri, "a ü.jsonl", tmp_path / "a")
        assert (tmp_path / "a").read_text() == "a"
    for uri in ("s3://data/trai", "s3://none/x", f"file://{root}/none", f"file://{tmp_path}"):
        assert refusal(locations.folder, ONE, uri)
    assert "no bucket" in refusal(locations.folder, TWO, "s3://data/train")
    assert refusal(locations.fetch_from, ONE, f"file://{root}", "../secret.jsonl", tmp_path / "x")
    (root / "link").symlink_to(tmp_path / "secret.jsonl")
    assert refusal(locations.folder, ONE, f"file://{root}") == refusal(
        locations.folder, ONE, f"file://{tmp_path}"
    )


def test_a_folder_of_very_many_files_is_not_looked_through(
    data: Objects, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("luthier.store.locations.MOST_ENTRIES", 4)
    locations = Locations(data.database, file_roots=[root])
    (root / "many").mkdir()
    for number in range(4):
        (root / "many" / f"{number}").write_text("x")
        put(data, f"many/{number}", b"x")
    addresses = {f"file://{root}/many": "entries in", "s3://data/many": "objects below"}
    for uri in addresses:
        assert len(locations.folder(ONE, uri)) == 4
    # Folders in it count: they are looked at, too.
    (root / "many" / "folder").mkdir()
    put(data, "many/folder/x", b"x")
    for uri, what in addresses.items():
        assert f"more than 4 {what}" in refusal(locations.folder, ONE, uri)


def test_rows_below_a_folder_of_very_many_files_are_refused(
    data: Objects, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locations = Locations(data.database, file_roots=[root])
    most = {"s3://data/": (5, "objects below"), f"file://{root}/": (3, "entries below")}
    for uri, (number, what) in most.items():
        monkeypatch.setattr("luthier.store.locations.MOST_ENTRIES", number)
        locations.check(ONE, uri)
        monkeypatch.setattr("luthier.store.locations.MOST_ENTRIES", number - 1)
        assert f"more than {number - 1} {what}" in refusal(locations.check, ONE, uri)


def test_jobs_write_nothing_among_the_files_of_the_openai_api(data: Objects) -> None:
    locations = Locations(data.database)
    data.create_bucket(ONE, UPLOADS)
    address = f"s3://{UPLOADS}/x/"
    assert "Name another one" in refusal(locations.check_writable, ONE, address)
    assert "Name another one" in refusal(locations.write, ONE, address, "x", b"")


def test_what_cannot_be_read(data: Objects) -> None:
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


def test_what_is_written(data: Objects, tmp_path: Path) -> None:
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


def test_bytes_that_are_not_what_was_stored(data: Objects, tmp_path: Path) -> None:
    (piece,) = data.open(ONE, "data", "one.csv").pieces
    path = data.files.path(ONE, piece.id)
    path.write_bytes(b"two.csv")
    with pytest.raises(CorruptFile):
        Locations(data.database).fetch(ONE, "s3://data/one.csv", tmp_path / "x")
    assert not list((tmp_path / "x").iterdir())
    path.unlink()
    with pytest.raises(CorruptFile):
        Locations(data.database).fetch(ONE, "s3://data/one.csv", tmp_path / "x")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "b.jsonl").write_text("b")
    (folder / "a ü.jsonl").write_text("a")
    (tmp_path / "secret.jsonl").write_text("secret")
    return folder


def test_files_inside_a_root(data: Objects, root: Path, tmp_path: Path) -> None:
    locations = Locations(data.database, file_roots=[root])
    for uri in (f"file://{root}/sub/../a%20ü.jsonl", (root / "a ü.jsonl").as_uri()):
        locations.check(ONE, uri)
        ((address, path),) = locations.fetch(ONE, uri, tmp_path / str(len(uri)))
        assert address == uri and path.read_text() == "a"
    both = locations.fetch(ONE, f"file://{root}/", tmp_path / "both")
    assert [path.read_text() for _, path in both] == ["a", "b"]
    assert both[0][0] == (root / "a ü.jsonl").as_uri()
    locations.check_writable(ONE, f"file://{root}/out/deep")
    locations.write(ONE, f"file://{root}/out/deep", "x/y", b"z")
    assert (root / "out" / "deep" / "x" / "y").read_bytes() == b"z"
    assert "cannot be read" in refusal(locations.check, ONE, f"file://{root}/none")
    assert "not a file" in refusal(locations.check, ONE, f"file://{root}/sub")
    os.mkfifo(root / "pipe")
    assert "not a file" in refusal(locations.check, ONE, f"file://{root}/pipe")


def test_nothing_is_told_of_files_outside(data: Objects, root: Path, tmp_path: Path) -> None:
    (root / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    (root / "loop").symlink_to(root / "loop")
    (tmp_path / "root2").mkdir()
    locations = Locations(data.database, file_roots=[root])
    outside = [
        f"file://{tmp_path}/secret.jsonl", f"file://{tmp_path}/none", f"file://{root}/link.jsonl",
        f"file://{root}/../secret.jsonl", f"file://{root}/%2e%2e/secret.jsonl", "file:///",
        f"file://{root}2/x", f"file://{root}/a%00b", f"file://{root}/", f"file://{root}/loop/x",
    ]  # fmt: skip
    said = {refusal(locations.check, ONE, uri) for uri in outside}
    assert len(said) == 1 and str(tmp_path) not in said.pop()
    assert len({refusal(Locations(data.database).check, ONE, uri) for uri in outside}) == 1
    for uri in (f"file://{tmp_path}", f"file://{root}/.."):
        refusal(locations.check_writable, ONE, uri)
        refusal(locations.write, ONE, uri, "x", b"")
    refusal(locations.write, ONE, f"file://{root}", "../x", b"")
    assert not (tmp_path / "x").exists()
    for uri in (
        "file://host/x",
        "file:relative",
        "file://localhost/etc/passwd",
        "file:/etc/passwd",
    ):
        assert refusal(locations.check, ONE, uri)


def test_an_address_leaves_room_for_the_names_below_it(data: Objects, root: Path) -> None:
    """A name that has no room there is no reason of a worker's end, and takes nothing back."""
    locations = Locations(data.database, file_roots=[root])
    locations.check_writable(ONE, "s3://data/" + "k" * 700)
    for uri in ("s3://data/" + "k" * 800, "s3://data/" + "ü" * 400):
        assert "too long" in refusal(locations.check_writable, ONE, uri)
    assert "only in the folders" in refusal(
        locations.check_writable, ONE, f"file://{root}/" + "n" * 300
    )
    locations.remove(ONE, ["s3://data/" + "k" * 2000, "s3://data/one.csv"])
    assert "no object" in refusal(locations.check, ONE, "s3://data/one.csv").lower()
