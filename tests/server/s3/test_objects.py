"""Objects with boto3 over HTTP and HTTPS."""

from __future__ import annotations

import base64
import hashlib
import io
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.request import Request, urlopen

import pytest
from botocore.exceptions import ClientError

from luthier.server.tables.objects import ObjectMetadata

ODD = [
    "../../x", "a//b", "//", "a/./b/../c", "sp ace+plus%25", "ünïcödé/日本/🎻", "q?a=b&c#d",
    "a\u2028b\u0085", "quote'\"<>&amp;", "tab\tnew\nline\rend", "~-_.!*()", "x" * 1024, ".", "..",
    "a;b,c:d@e=f$", "\\back\\", "end/",
]  # fmt: skip


def test_object_round_trip_with_metadata(either: Any, bucket: str) -> None:
    client = either.client()
    body = b"some text\n"
    put = client.put_object(
        Bucket=bucket, Key="a/b.txt", Body=body, ContentType="text/plain; charset=utf-8",
        Metadata={"Purpose": "test"}, CacheControl="no-cache", ContentLanguage="de",
    )  # fmt: skip
    md5 = hashlib.md5(body).hexdigest()
    assert put["ETag"] == f'"{md5}"'
    crc = base64.b64encode(zlib.crc32(body).to_bytes(4, "big")).decode()
    assert (put["ChecksumCRC32"], put["ChecksumType"]) == (crc, "FULL_OBJECT")
    got = client.get_object(Bucket=bucket, Key="a/b.txt", ChecksumMode="ENABLED")
    assert got["Body"].read() == body
    names = ("ContentType", "CacheControl", "ContentLanguage", "Metadata", "ContentLength", "ETag")
    assert [got[name] for name in names] == [
        "text/plain; charset=utf-8", "no-cache", "de", {"purpose": "test"}, len(body), f'"{md5}"',
    ]  # fmt: skip
    assert got["ChecksumCRC32"] == crc and got["AcceptRanges"] == "bytes"
    assert "ContentEncoding" not in got
    head = client.head_object(Bucket=bucket, Key="a/b.txt")
    assert [head[name] for name in names] == [got[name] for name in names]
    assert head["LastModified"] == got["LastModified"]
    client.delete_object(Bucket=bucket, Key="a/b.txt")
    client.delete_object(Bucket=bucket, Key="a/b.txt")


def test_openai_files_bucket_is_read_only(service: Any) -> None:
    service.objects.create_bucket("000000000001", "luthier-files")
    with service.objects.files.begin("000000000001") as file:
        file.write(b"a row")
        written = file.finish()
    service.objects.put("000000000001", "luthier-files", "file-1", written, ObjectMetadata())
    client, place = service.client(), {"Bucket": "luthier-files", "Key": "file-1"}
    one = {"Objects": [{"Key": "file-1"}]}
    for change in (
        lambda: client.delete_object(**place),
        lambda: client.delete_objects(Bucket="luthier-files", Delete=one),
        lambda: client.put_object(**place, Body=b"another row"),
        lambda: client.copy_object(**place, CopySource=place),
        lambda: client.create_multipart_upload(**place),
        lambda: client.delete_bucket(Bucket="luthier-files"),
    ):
        with pytest.raises(ClientError, match="AccessDenied"):
            change()
    assert client.get_object(**place)["Body"].read() == b"a row"
    assert [each["Key"] for each in client.list_objects_v2(Bucket="luthier-files")["Contents"]] == [
        "file-1"
    ]
    service.objects.delete("000000000001", "luthier-files", ["file-1"])
    service.objects.delete_bucket("000000000001", "luthier-files")


def test_object_keys_are_no_file_paths(either: Any, bucket: str) -> None:
    client = either.client()
    for number, key in enumerate(ODD):
        client.put_object(Bucket=bucket, Key=key, Body=str(number).encode())
    for number, key in enumerate(ODD):
        assert client.get_object(Bucket=bucket, Key=key)["Body"].read() == str(number).encode()
    listed = client.list_objects_v2(Bucket=bucket)
    assert [each["Key"] for each in listed["Contents"]] == sorted(ODD, key=str.encode)
    for path in either.objects.files.folder.rglob("*"):
        assert path.is_dir() or len(path.name) == 32
    copied = client.copy_object(
        Bucket=bucket, Key="copy of/ünï", CopySource={"Bucket": bucket, "Key": "../../x"}
    )
    assert copied["CopyObjectResult"]["ETag"]
    assert client.get_object(Bucket=bucket, Key="copy of/ünï")["Body"].read() == b"0"
    gone = client.delete_objects(
        Bucket=bucket, Delete={"Objects": [{"Key": key} for key in ODD if "\r" not in key]}
    )
    assert len(gone["Deleted"]) == len(ODD) - 1 and "Errors" not in gone


def test_empty_object_round_trip(either: Any, bucket: str, refused: Any) -> None:
    client = either.client()
    client.put_object(Bucket=bucket, Key="empty")
    got = client.get_object(Bucket=bucket, Key="empty")
    assert got["Body"].read() == b"" and got["ContentLength"] == 0
    assert got["ETag"] == f'"{hashlib.md5(b"").hexdigest()}"'
    assert refused(client.get_object, Bucket=bucket, Key="empty", Range="bytes=0-") == (
        "InvalidRange", 416,
    )  # fmt: skip


def test_upload_of_unknown_length(secure: Any, bucket: str) -> None:
    left = [b"abc" * 100_000, b"def" * 100_000]

    class Pipe(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def read(self, size: int = -1) -> bytes:
            return left.pop(0) if left else b""

    client = secure.client()
    client.put_object(Bucket=bucket, Key="pipe", Body=Pipe())
    assert client.head_object(Bucket=bucket, Key="pipe")["ContentLength"] == 600_000


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [("bytes=0-0", 0, 1), ("bytes=5-", 5, 20), ("bytes=-5", 15, 20), ("bytes=10-99", 10, 20),
     ("bytes=-99", 0, 20), ("bytes=19-19", 19, 20)],
)  # fmt: skip
def test_range_request_returns_partial_content(
    service: Any, bucket: str, asked: str, start: int, end: int
) -> None:
    client, body = service.client(), bytes(range(20))
    client.put_object(Bucket=bucket, Key="k", Body=body)
    got = client.get_object(Bucket=bucket, Key="k", Range=asked)
    assert got["Body"].read() == body[start:end]
    assert got["ContentRange"] == f"bytes {start}-{end - 1}/20"
    assert got["ResponseMetadata"]["HTTPStatusCode"] == 206


def test_empty_range_is_rejected_and_invalid_range_ignored(
    service: Any, bucket: str, refused: Any
) -> None:
    client = service.client()
    client.put_object(Bucket=bucket, Key="k", Body=b"0123456789")
    for asked in ("bytes=10-", "bytes=10-12", "bytes=-0"):
        assert refused(client.get_object, Bucket=bucket, Key="k", Range=asked) == (
            "InvalidRange", 416,
        )  # fmt: skip
    for asked in ("bytes=5-3", "bytes=0-1,3-4", "lines=1-2", "bytes=a-b"):
        assert client.get_object(Bucket=bucket, Key="k", Range=asked)["ContentLength"] == 10


def test_conditional_requests_are_evaluated(service: Any, bucket: str, refused: Any) -> None:
    client = service.client()
    tag = client.put_object(Bucket=bucket, Key="k", Body=b"one")["ETag"]
    name = {"Bucket": bucket, "Key": "k"}
    assert client.get_object(**name, IfMatch=tag)["Body"].read() == b"one"
    assert refused(client.get_object, **name, IfMatch='"other"') == ("PreconditionFailed", 412)
    assert refused(client.get_object, **name, IfNoneMatch=tag)[1] == 304
    assert refused(client.head_object, **name, IfNoneMatch=tag)[1] == 304
    moment = client.head_object(**name)["LastModified"]
    assert refused(client.get_object, **name, IfModifiedSince=moment)[1] == 304
    assert client.get_object(**name, IfUnmodifiedSince=moment)["ContentLength"] == 3
    assert refused(client.put_object, **name, Body=b"two", IfNoneMatch="*") == (
        "PreconditionFailed", 412,
    )  # fmt: skip
    assert refused(client.put_object, **name, Body=b"two", IfMatch='"x"') == (
        "PreconditionFailed", 412,
    )  # fmt: skip
    assert client.get_object(**name)["Body"].read() == b"one"
    client.put_object(**name, Body=b"two", IfMatch=tag)
    client.put_object(Bucket=bucket, Key="new", Body=b"x", IfNoneMatch="*")


def test_copied_object_has_source_content(service: Any, bucket: str, refused: Any) -> None:
    client = service.client()
    client.put_object(Bucket=bucket, Key="a", Body=b"abc", Metadata={"x": "1"}, ContentType="a/b")
    source = {"Bucket": bucket, "Key": "a"}
    client.copy_object(Bucket=bucket, Key="b", CopySource=source)
    client.copy_object(
        Bucket=bucket, Key="c", CopySource=source, MetadataDirective="REPLACE", Metadata={"y": "2"}
    )
    client.delete_object(Bucket=bucket, Key="a")
    b, c = (client.get_object(Bucket=bucket, Key=key) for key in "bc")
    assert b["Body"].read() == c["Body"].read() == b"abc"
    assert (b["Metadata"], b["ContentType"]) == ({"x": "1"}, "a/b")
    assert c["Metadata"] == {"y": "2"} and c["ContentType"] != "a/b"
    assert refused(client.copy_object, Bucket=bucket, Key="d", CopySource=source)[0] == "NoSuchKey"
    itself = {"Bucket": bucket, "Key": "b", "CopySource": {"Bucket": bucket, "Key": "b"}}
    assert refused(client.copy_object, **itself) == ("InvalidRequest", 400)
    client.copy_object(**itself, MetadataDirective="REPLACE", Metadata={"z": "3"})
    assert client.head_object(Bucket=bucket, Key="b")["Metadata"] == {"z": "3"}
    assert client.get_object(Bucket=bucket, Key="b")["Body"].read() == b"abc"


def test_presigned_urls_upload_and_download(service: Any, bucket: str) -> None:
    client = service.client(signature_version="s3v4")
    name = {"Bucket": bucket, "Key": "a link/ü"}
    put = client.generate_presigned_url("put_object", Params=name)
    urlopen(Request(put, data=b"linked", method="PUT"), timeout=10).close()
    overrides = {"ResponseContentDisposition": 'attachment; filename="x.txt"'}
    get = client.generate_presigned_url("get_object", Params={**name, **overrides})
    with urlopen(get, timeout=10) as answer:
        assert answer.read() == b"linked"
        assert answer.headers["Content-Disposition"] == 'attachment; filename="x.txt"'
        # The web console has the same origin.
        assert answer.headers["Content-Security-Policy"] == "sandbox"


def test_missing_key_or_bucket_returns_404(service: Any, bucket: str, refused: Any) -> None:
    client = service.client()
    assert refused(client.get_object, Bucket=bucket, Key="none") == ("NoSuchKey", 404)
    assert refused(client.head_object, Bucket=bucket, Key="none") == ("404", 404)
    assert refused(client.get_object, Bucket="no-such", Key="none") == ("NoSuchBucket", 404)
    assert refused(client.put_object, Bucket="no-such", Key="none", Body=b"x") == (
        "NoSuchBucket", 404,
    )  # fmt: skip
    # Rejected before the body is sent; the connection stays usable.
    large = io.BytesIO(bytes(3 << 20))
    assert refused(client.put_object, Bucket="no-such", Key="none", Body=large)[0] == "NoSuchBucket"
    assert client.put_object(Bucket=bucket, Key="k", Body=b"x")["ETag"]
    assert (
        refused(client.put_object, Bucket=bucket, Key="x" * 1025, Body=b"")[0] == "KeyTooLongError"
    )


def test_unsupported_object_options_are_rejected(service: Any, bucket: str, refused: Any) -> None:
    client = service.client()
    client.put_object(Bucket=bucket, Key="k", Body=b"x")
    name = {"Bucket": bucket, "Key": "k"}
    assert refused(client.put_object_acl, **name, ACL="private") == ("NotImplemented", 501)
    assert refused(client.put_object, **name, ACL="public-read") == ("NotImplemented", 501)
    assert refused(client.put_object, **name, ServerSideEncryption="AES256")[0] == "NotImplemented"
    assert refused(client.put_object, **name, Tagging="a=b")[0] == "NotImplemented"
    assert refused(client.get_object, **name, VersionId="x")[0] == "NotImplemented"
    assert client.get_object(**name)["Body"].read() == b"x"
    other = {"ExpectedBucketOwner": "000000000002"}
    assert refused(client.get_object, **name, **other) == ("AccessDenied", 403)


def test_bulk_deletion_removes_objects(service: Any, bucket: str) -> None:
    client = service.client()
    names = [f"k{number:03}" for number in range(30)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda key: client.put_object(Bucket=bucket, Key=key, Body=b"x"), names))
    asked = [{"Key": key} for key in [*names[1:], "none"]]
    gone = client.delete_objects(Bucket=bucket, Delete={"Objects": asked})
    assert "Errors" not in gone and len(gone["Deleted"]) == 30
    assert [each["Key"] for each in client.list_objects_v2(Bucket=bucket)["Contents"]] == ["k000"]
    quiet = {"Objects": [{"Key": "k000"}], "Quiet": True}
    assert "Deleted" not in client.delete_objects(Bucket=bucket, Delete=quiet)
    left = list(service.objects.files.folder.rglob("*"))
    known = service.objects._files_of_rows("")
    assert {path.name for path in left if path.is_file()} <= known
