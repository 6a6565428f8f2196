"""Multipart uploads with boto3 and its transfer manager."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import zlib
from pathlib import Path
from typing import Any

import pytest
from boto3.s3.transfer import TransferConfig

MIB = 1 << 20


def begun(client: Any, bucket: str, key: str = "k", **settings: Any) -> dict[str, str]:
    made = client.create_multipart_upload(Bucket=bucket, Key=key, **settings)
    return {"Bucket": bucket, "Key": key, "UploadId": made["UploadId"]}


def done(client: Any, upload: dict[str, str], parts: list[tuple[int, str]]) -> Any:
    named = [{"PartNumber": number, "ETag": etag} for number, etag in parts]
    return client.complete_multipart_upload(**upload, MultipartUpload={"Parts": named})


def test_transfer_manager_uploads_in_parts(either: Any, bucket: str, tmp_path: Path) -> None:
    client, body = either.client(), os.urandom(18 * MIB + 7)
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(body)
    settings = TransferConfig(multipart_threshold=6 * MIB, multipart_chunksize=5 * MIB)
    client.upload_file(
        str(source), bucket, "dir/large", Config=settings, ExtraArgs={"ContentType": "x/y"}
    )
    head = client.head_object(Bucket=bucket, Key="dir/large", ChecksumMode="ENABLED")
    sizes = [body[start : start + 5 * MIB] for start in range(0, len(body), 5 * MIB)]
    md5 = hashlib.md5(b"".join(hashlib.md5(part).digest() for part in sizes)).hexdigest()
    assert head["ETag"] == f'"{md5}-4"' and head["ContentType"] == "x/y"
    crc = zlib.crc32(b"".join(zlib.crc32(part).to_bytes(4, "big") for part in sizes))
    checksum = base64.b64encode(crc.to_bytes(4, "big")).decode()
    assert (head["ChecksumCRC32"], head["ChecksumType"]) == (f"{checksum}-4", "COMPOSITE")
    client.download_file(bucket, "dir/large", str(target), Config=settings)
    assert target.read_bytes() == body
    across = f"bytes={5 * MIB - 3}-{10 * MIB + 2}"
    got = client.get_object(Bucket=bucket, Key="dir/large", Range=across)
    assert got["Body"].read() == body[5 * MIB - 3 : 10 * MIB + 3]
    client.copy({"Bucket": bucket, "Key": "dir/large"}, bucket, "copy", Config=settings)
    client.delete_object(Bucket=bucket, Key="dir/large")
    assert client.get_object(Bucket=bucket, Key="copy")["Body"].read() == body
    pipe = io.BytesIO(body)
    client.upload_fileobj(pipe, bucket, "pipe", Config=settings)
    assert client.head_object(Bucket=bucket, Key="pipe")["ContentLength"] == len(body)


def test_multipart_upload_assembles_selected_parts(service: Any, bucket: str, refused: Any) -> None:
    client = service.client()
    upload = begun(client, bucket, Metadata={"x": "1"})
    first = client.upload_part(**upload, PartNumber=2, Body=bytes(5 * MIB))["ETag"]
    client.upload_part(**upload, PartNumber=9, Body=b"never chosen")
    client.upload_part(**upload, PartNumber=5, Body=b"replaced")
    last = client.upload_part(**upload, PartNumber=5, Body=b"last")["ETag"]
    assert refused(client.get_object, Bucket=bucket, Key="k")[0] == "NoSuchKey"
    assert refused(done, client=client, upload=upload, parts=[(5, last), (2, first)]) == (
        "InvalidPartOrder", 400,
    )  # fmt: skip
    for parts in ([(2, first), (5, first)], [(2, first), (3, last)]):
        assert refused(done, client=client, upload=upload, parts=parts) == ("InvalidPart", 400)
    assert refused(done, client=client, upload=upload, parts=[(5, last), (9, '"x"')])[1] == 400
    other = {**upload, "Key": "other"}
    assert refused(done, client=client, upload=other, parts=[(2, first)])[0] == "NoSuchUpload"
    made = done(client, upload, [(2, first), (5, last)])
    assert made["ETag"].endswith('-2"')
    # A client repeats the request if the response is lost.
    assert done(client, upload, [(2, first), (5, last)])["ETag"] == made["ETag"]
    got = client.get_object(Bucket=bucket, Key="k")
    assert got["Body"].read() == bytes(5 * MIB) + b"last" and got["Metadata"] == {"x": "1"}
    assert refused(done, client=client, upload=upload, parts=[(2, first)])[0] == "NoSuchUpload"
    service.objects.sweep(0)
    assert client.get_object(Bucket=bucket, Key="k")["ContentLength"] == 5 * MIB + 4


def test_undersized_parts_are_rejected(service: Any, bucket: str, refused: Any) -> None:
    client = service.client()
    upload = begun(client, bucket)
    tags = [client.upload_part(**upload, PartNumber=n, Body=b"x")["ETag"] for n in (1, 2)]
    parts = list(zip((1, 2), tags, strict=True))
    assert refused(done, client=client, upload=upload, parts=parts) == ("EntityTooSmall", 400)
    assert (
        refused(client.upload_part, **upload, PartNumber=10_001, Body=b"x")[0] == "InvalidArgument"
    )
    assert refused(done, client=client, upload=upload, parts=[]) == ("MalformedXML", 400)


def test_aborted_upload_is_removed(service: Any, bucket: str, refused: Any) -> None:
    client = service.client()
    uploads = [begun(client, bucket, key) for key in ("b", "a", "a")]
    client.upload_part(**uploads[0], PartNumber=1, Body=b"x")
    other = service.client("AKTWO")
    other.create_bucket(Bucket=bucket)
    assert refused(other.abort_multipart_upload, **uploads[0]) == ("NoSuchUpload", 404)
    for upload in uploads:
        client.abort_multipart_upload(**upload)
    assert refused(client.upload_part, **uploads[0], PartNumber=1, Body=b"x")[0] == "NoSuchUpload"


def test_upload_parts_copied_from_object(service: Any, bucket: str, refused: Any) -> None:
    client, body = service.client(), os.urandom(6 * MIB)
    client.put_object(Bucket=bucket, Key="source", Body=body)
    upload, source = begun(client, bucket), {"Bucket": bucket, "Key": "source"}
    ranges = [f"bytes=0-{5 * MIB - 1}", f"bytes={5 * MIB}-{6 * MIB - 1}"]
    tags = [
        client.upload_part_copy(
            **upload, PartNumber=number, CopySource=source, CopySourceRange=asked
        )["CopyPartResult"]["ETag"]
        for number, asked in enumerate(ranges, 1)
    ]
    done(client, upload, list(enumerate(tags, 1)))
    assert client.get_object(Bucket=bucket, Key="k")["Body"].read() == body
    missing = {**upload, "PartNumber": 1, "CopySource": {"Bucket": bucket, "Key": "none"}}
    assert refused(client.upload_part_copy, **missing)[0] in ("NoSuchUpload", "NoSuchKey")


@pytest.mark.parametrize("algorithm", ["SHA256", "SHA1", "CRC32"])
def test_checksums_of_the_whole(service: Any, bucket: str, algorithm: str, refused: Any) -> None:
    client = service.client()
    upload = begun(client, bucket, ChecksumAlgorithm=algorithm)
    part = client.upload_part(**upload, PartNumber=1, Body=b"abc", ChecksumAlgorithm=algorithm)
    name = f"Checksum{algorithm}"
    wrong = {"PartNumber": 1, "ETag": part["ETag"], name: base64.b64encode(b"x" * 4).decode()}
    assert refused(
        client.complete_multipart_upload, **upload, MultipartUpload={"Parts": [wrong]}
    ) == ("InvalidPart", 400)
    right = {**wrong, name: part[name]}
    made = client.complete_multipart_upload(**upload, MultipartUpload={"Parts": [right]})
    new = (lambda data: zlib.crc32(data).to_bytes(4, "big")) if algorithm == "CRC32" else (
        lambda data: hashlib.new(algorithm.lower(), data).digest()
    )  # fmt: skip
    assert made[name] == base64.b64encode(new(new(b"abc"))).decode() + "-1"


@pytest.mark.parametrize("algorithm", ["CRC32", "CRC32C", "CRC64NVME"])
def test_full_object_checksum_is_verified(
    service: Any, bucket: str, algorithm: str, refused: Any
) -> None:
    checksums = pytest.importorskip("awscrt.checksums", reason="awscrt is not installed")
    client, bodies = service.client(), [os.urandom(5 * MIB), b"end"]
    upload = begun(client, bucket, ChecksumAlgorithm=algorithm, ChecksumType="FULL_OBJECT")
    tags = [
        client.upload_part(**upload, PartNumber=n, Body=body, ChecksumAlgorithm=algorithm)["ETag"]
        for n, body in enumerate(bodies, 1)
    ]
    value = getattr(checksums, algorithm.lower())(b"".join(bodies))
    checksum = base64.b64encode(
        value.to_bytes(8 if algorithm == "CRC64NVME" else 4, "big")
    ).decode()
    parts = {"Parts": [{"PartNumber": n, "ETag": tag} for n, tag in enumerate(tags, 1)]}
    name = f"Checksum{algorithm}"
    wrong = {name: base64.b64encode(b"xxxx").decode(), "ChecksumType": "FULL_OBJECT"}
    assert refused(client.complete_multipart_upload, **upload, MultipartUpload=parts, **wrong) == (
        "BadDigest",
        400,
    )
    client.complete_multipart_upload(**upload, MultipartUpload=parts, **{**wrong, name: checksum})
    got = client.get_object(Bucket=bucket, Key="k", ChecksumMode="ENABLED")
    assert got[name] == checksum and got["Body"].read() == b"".join(bodies)
