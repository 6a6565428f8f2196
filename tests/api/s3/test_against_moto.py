"""The same calls to moto, the S3 that boto3's users test with: same statuses, codes and fields."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from botocore.exceptions import ClientError
from moto_server import moto_client, moto_server

BUCKET = "compared"
MIB = 1 << 20
VOLATILE = {
    "LastModified", "CreationDate", "UploadId", "ID", "DisplayName", "Location", "Initiated", "Date",
    "NextContinuationToken", "ContinuationToken", "Body",
}  # fmt: skip
OURS = {
    "ChecksumType", "AcceptRanges", "NextPartNumberMarker", "Marker", "PartNumberMarker", "Initiator",
    "Owner", "BucketRegion", "StorageClass", "ChecksumAlgorithm", "CacheControl", "ChecksumCRC32",
}  # fmt: skip
"""Fields that S3 sends and moto leaves out at times, or fills in at times."""
THEIRS = {
    "ServerSideEncryption",
    "AccessPointAlias",
    "BucketKeyEnabled",
    "BucketArn",
    "Prefix",
    "VersionId",
}
"""Fields that moto sends where S3 does not, or that say what is not done here."""


@pytest.fixture(scope="module")
def moto() -> Iterator[Any]:
    with moto_server() as port:
        yield moto_client(port)


def plain(value: Any) -> Any:
    """What is left of an answer without what differs from call to call."""
    if isinstance(value, dict):
        passed = VOLATILE | OURS | THEIRS | {"ResponseMetadata", "RequestId", "HostId"}
        return {name: plain(each) for name, each in value.items() if name not in passed}
    if isinstance(value, list):
        return [plain(each) for each in value]
    return value


def outcome(call: Callable[[], Any]) -> Any:
    try:
        answer = call()
    except ClientError as error:
        response = error.response
        return response["Error"]["Code"], response["ResponseMetadata"]["HTTPStatusCode"]
    body = answer["Body"].read() if "Body" in answer else None
    return answer["ResponseMetadata"]["HTTPStatusCode"], plain(answer), body


def multipart(client: Any, parts: list[bytes], order: list[int] | None = None) -> Any:
    named = {"Bucket": BUCKET, "Key": "multi"}
    upload = {**named, "UploadId": client.create_multipart_upload(**named)["UploadId"]}
    tags = {
        number: client.upload_part(**upload, PartNumber=number, Body=part)["ETag"]
        for number, part in enumerate(parts, 1)
    }
    chosen = [{"PartNumber": each, "ETag": tags[each]} for each in order or sorted(tags)]
    return client.complete_multipart_upload(**upload, MultipartUpload={"Parts": chosen})


def calls(client: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Calls in an order in which each leaves what the next ones need."""
    b = {"Bucket": BUCKET}
    past = datetime(2020, 1, 1, tzinfo=UTC)
    yield "create", lambda: client.create_bucket(**b)
    yield "head", lambda: client.head_bucket(**b)
    yield "head none", lambda: client.head_bucket(Bucket="none-such")
    yield "location", lambda: client.get_bucket_location(**b)
    yield "empty list", lambda: client.list_objects_v2(**b)
    yield "list none", lambda: client.list_objects_v2(Bucket="none-such")
    for key in ("a", "b/1", "b/2", "c d+e%", "ü"):
        yield f"put {key}", lambda key=key: client.put_object(**b, Key=key, Body=key.encode())
    yield "put meta", lambda: client.put_object(
        **b, Key="meta", Body=b"0123456789", ContentType="text/x", Metadata={"A": "b"},
        ContentDisposition="inline", ContentEncoding="gzip",
    )  # fmt: skip
    yield "get", lambda: client.get_object(**b, Key="meta")
    yield "head object", lambda: client.head_object(**b, Key="meta")
    yield "get none", lambda: client.get_object(**b, Key="none")
    yield "head no object", lambda: client.head_object(**b, Key="none")
    for asked in ("bytes=2-4", "bytes=7-", "bytes=-3", "bytes=10-12", "bytes=5-99"):
        yield asked, lambda asked=asked: client.get_object(**b, Key="meta", Range=asked)
    yield "if match", lambda: client.get_object(**b, Key="meta", IfMatch='"x"')
    yield (
        "if modified",
        lambda: client.get_object(**b, Key="meta", IfModifiedSince=datetime.now(UTC)),
    )
    yield "if unmodified", lambda: client.get_object(**b, Key="meta", IfUnmodifiedSince=past)
    yield "put if none", lambda: client.put_object(**b, Key="meta", Body=b"", IfNoneMatch="*")
    yield "list", lambda: client.list_objects_v2(**b)
    yield "list v1", lambda: client.list_objects(**b)
    yield "delimiter", lambda: client.list_objects_v2(**b, Delimiter="/")
    yield "prefix", lambda: client.list_objects_v2(**b, Prefix="b/")
    yield "start after", lambda: client.list_objects_v2(**b, StartAfter="b/1")
    yield "page", lambda: client.list_objects_v2(**b, MaxKeys=2)
    yield "copy", lambda: client.copy_object(**b, Key="copied", CopySource=f"{BUCKET}/meta")
    yield "copied", lambda: client.get_object(**b, Key="copied")
    yield "copy none", lambda: client.copy_object(**b, Key="x", CopySource=f"{BUCKET}/none")
    yield "copy itself", lambda: client.copy_object(**b, Key="meta", CopySource=f"{BUCKET}/meta")
    yield "multipart", lambda: multipart(client, [bytes(5 * MIB), b"end"])
    yield "multi head", lambda: client.head_object(**b, Key="multi")
    yield "too small", lambda: multipart(client, [b"x", b"y"])
    yield "no upload", lambda: client.abort_multipart_upload(**b, Key="k", UploadId="none")
    yield "no parts", lambda: client.list_parts(**b, Key="k", UploadId="none")
    yield "not empty", lambda: client.delete_bucket(**b)
    yield "delete", lambda: client.delete_object(**b, Key="a")
    yield "delete none", lambda: client.delete_object(**b, Key="a")
    yield (
        "delete many",
        lambda: client.delete_objects(**b, Delete={"Objects": [{"Key": "b/1"}, {"Key": "none"}]}),
    )
    yield "delete no bucket", lambda: client.delete_bucket(Bucket="none-such")


def test_answers_are_those_of_moto(service: Any, moto: Any) -> None:
    differ = {}
    pairs = zip(calls(service.client()), calls(moto), strict=True)
    for (name, ours), (_, theirs) in pairs:
        found, expected = outcome(ours), outcome(theirs)
        if found != expected:
            differ[name] = (found, expected)
    assert differ == {}
