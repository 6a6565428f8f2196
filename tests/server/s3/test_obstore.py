"""The object store with obstore, the client of luthier for external buckets."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from luthier.data.rows import load_rows
from luthier.errors import DataError, DownloadError, LocationRefused
from luthier.server.stores.locations import Locations
from luthier.server.tables.objects import UPLOADS, ObjectMetadata

pytest.importorskip("obstore")
SECRET = "a secret of thirty letters, or so"
ACCOUNT = "000000000009"


@pytest.fixture
def locations(service: Any, monkeypatch: pytest.MonkeyPatch) -> Locations:
    """Return the locations of a service with the tested service as external endpoint."""
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKONE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    return Locations(service.objects.database, s3_endpoint=service.url)


def test_data_is_read_from_external_endpoint(
    service: Any, bucket: str, locations: Locations, tmp_path: Path
) -> None:
    client = service.client()
    large = os.urandom(12 << 20)
    for key, body in (
        ("t/b.jsonl", b"b"),
        ("t/a.jsonl", large),
        ("t/x.txt", b"x"),
        ("t2.jsonl", b""),
    ):
        client.put_object(Bucket=bucket, Key=key, Body=body)
    locations.check(ACCOUNT, f"s3://{bucket}/t/")
    locations.check_writable(ACCOUNT, f"s3://{bucket}/out")
    found = dict(locations.fetch(ACCOUNT, f"s3://{bucket}/t/", tmp_path))
    paths = [*found.values()]
    assert [*found] == [f"s3://{bucket}/t/a.jsonl", f"s3://{bucket}/t/b.jsonl"]
    assert [path.name for path in paths] == ["a.jsonl", "b.jsonl"]
    assert paths[0].read_bytes() == large
    written = locations.write(ACCOUNT, f"s3://{bucket}/out/", "m/large", paths[0])
    assert written == f"s3://{bucket}/out/m/large"
    assert client.get_object(Bucket=bucket, Key="out/m/large")["Body"].read() == large
    for uri in (f"s3://{bucket}/none", f"s3://{bucket}/none/", "s3://no-such-bucket/k"):
        with pytest.raises(LocationRefused):
            locations.check(ACCOUNT, uri)


def test_uploads_bucket_is_local_with_external_endpoint(
    service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKONE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    objects = service.objects
    objects.create_bucket(ACCOUNT, UPLOADS)
    with objects.files.begin(ACCOUNT) as file:
        file.write(b"rows")
        written = file.finish()
    objects.put(ACCOUNT, UPLOADS, "file-1", written, ObjectMetadata())
    silent = Locations(objects.database, s3_endpoint="http://127.0.0.1:1", files=objects.files)
    silent.check(ACCOUNT, f"s3://{UPLOADS}/file-1")
    with pytest.raises(LocationRefused):
        silent.check(ACCOUNT, f"s3://{UPLOADS}/file-2")
    with pytest.raises(DownloadError):
        silent.check(ACCOUNT, "s3://elsewhere/rows.jsonl")


@pytest.mark.slow
def test_external_endpoint_rejects_key_or_is_unreachable(
    service: Any, bucket: str, locations: Locations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    for call in (locations.check, locations.check_writable):
        with pytest.raises(LocationRefused):
            call(ACCOUNT, f"s3://{bucket}/k")
    silent = Locations(service.objects.database, s3_endpoint="http://127.0.0.1:1")
    with pytest.raises(DownloadError):
        silent.check(ACCOUNT, f"s3://{bucket}/k")


def test_rows_of_an_address(
    service: Any, bucket: str, monkeypatch: pytest.MonkeyPatch, locations: Locations
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", service.url)
    body = b'{"text": "one"}\n{"text": "two"}\n'
    service.client().put_object(Bucket=bucket, Key="rows.jsonl", Body=body)
    assert [row.text for row in load_rows(f"s3://{bucket}/rows.jsonl")] == ["one", "two"]


def test_images_below_a_prefix(
    service: Any, bucket: str, monkeypatch: pytest.MonkeyPatch, locations: Locations, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", service.url)
    client, stream = service.client(), io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(stream, format="PNG")

    def put(key: str, body: bytes = stream.getvalue()) -> None:
        client.put_object(Bucket=bucket, Key=key, Body=body)

    for key in ("photos/dog/1.png", "photos/cat/2.png", "photos/cat/1.png"):
        put(key)
    rows = load_rows(f"s3://{bucket}/photos/")
    assert [(row.label, row.media.name) for row in rows] == [  # type: ignore[attr-defined]
        ("cat", "photos/cat/1.png"), ("cat", "photos/cat/2.png"), ("dog", "photos/dog/1.png"),
    ]  # fmt: skip
    # The next fetch creates the folder again because an object was added.
    put("photos/dog/2.png")
    assert len(load_rows(f"s3://{bucket}/photos")) == 4
    ((_, tree),) = locations.fetch(ACCOUNT, f"s3://{bucket}/photos/", tmp_path)
    assert sorted(path.name for path in tree.rglob("*.png")) == ["1.png", "1.png", "2.png", "2.png"]
    # A table next to the images names some images.
    put("photos/table.csv", b"image,label\ncat/2.png,tom\n")
    assert [row.label for row in load_rows(f"s3://{bucket}/photos/")] == ["tom"]  # type: ignore[attr-defined]
    put("odd/a.png")
    put("odd/a.png/b.png")
    with pytest.raises(DataError):
        load_rows(f"s3://{bucket}/odd/")
