"""Multipart upload operations."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from luthier.server.actions import record_action
from luthier.server.http.messages import Fault, Response, parse_digits
from luthier.server.s3 import documents
from luthier.server.s3.body import (
    COMPOSITE,
    FULL_OBJECT,
    PREFIX,
    check_combinable,
    checksum_elements,
    combine_composite,
    combine_full,
    parse_elements,
    sent_checksums,
)
from luthier.server.s3.documents import Element, xml_response
from luthier.server.s3.objects import check_read, check_write, copy_elements, span
from luthier.server.s3.request import S3Request, Stores, arn, copy_source, describe_object
from luthier.server.stores.multipart import MOST_PARTS, CompletedPart
from luthier.server.stores.object_files import WrittenFile
from luthier.server.tables.objects import ObjectPiece, Upload


def create_upload(stores: Stores, request: S3Request, body: bytes) -> Response:
    """Create an upload."""
    algorithm = request.headers.get("x-amz-checksum-algorithm", "").lower()
    kind = request.headers.get("x-amz-checksum-type", "").upper()
    if kind not in ("", COMPOSITE, FULL_OBJECT):
        raise Fault("InvalidRequest", "Value for x-amz-checksum-type header is invalid.")
    if algorithm:
        # S3 has no composite checksum for CRC64NVME.
        kind = kind or (FULL_OBJECT if algorithm == "crc64nvme" else COMPOSITE)
        check_combinable(algorithm, kind)
    upload = stores.uploads.create(
        request.account,
        request.bucket,
        request.key,
        describe_object(request, {}),
        (algorithm, kind),
    )
    headers = {}
    if algorithm:
        headers = {"x-amz-checksum-algorithm": algorithm.upper(), "x-amz-checksum-type": kind}
    content = [*_bucket_and_key(request), ("UploadId", upload.id)]
    return xml_response("InitiateMultipartUploadResult", content, **headers)


def before_part(stores: Stores, request: S3Request) -> int:
    """Check the request before the body is read. Return the size in bytes of the replaced part."""
    number, upload_id = _number(request), request.query["uploadId"]
    part = stores.uploads.part(request.account, request.bucket, request.key, upload_id, number)
    return 0 if part is None else part.size


def upload_part(
    stores: Stores, request: S3Request, written: WrittenFile, checksums: Mapping[str, str]
) -> Response:
    """Store a part."""
    piece = _put_part(stores, request, written, checksums)
    checksum_headers = {PREFIX + name: value for name, value in piece.checksums.items()}
    return Response(200, b"", {"ETag": f'"{piece.md5}"', **checksum_headers})


def copy_part(stores: Stores, request: S3Request, body: bytes) -> Response:
    """Copy a byte range of another object into a part."""
    source = copy_source(request)
    record_action("s3:GetObject", arn(*source))
    freed = before_part(stores, request)
    range_header = request.headers.get("x-amz-copy-source-range")
    if range_header is not None and not re.fullmatch(r"bytes=[0-9]+-[0-9]+", range_header):
        text = "The x-amz-copy-source-range value must be of the form bytes=first-last"
        raise Fault("InvalidArgument", text)
    content = stores.objects.open(request.account, *source)
    check_read(request.headers, content.found, "x-amz-copy-source-if-")
    first, length = span(range_header, content.found.size) or (0, content.found.size)
    # The new part replaces a part of the same number, whose bytes do not count twice in the quota.
    with stores.objects.begin(request.account, length, freed=freed) as writing:
        for data in content.read(first, length):
            writing.write(data)
        piece = _put_part(stores, request, writing.finish(), {})
    return xml_response("CopyPartResult", copy_elements(piece.md5, piece.modified, {}))


def complete_upload(stores: Stores, request: S3Request, body: bytes) -> Response:
    """Create the object from the parts that a document lists."""
    parts = _parse_parts(body)
    expected = sent_checksums(request.headers)

    def checksum(upload: Upload, pieces: Sequence[ObjectPiece]) -> dict[str, str]:
        return _object_checksum(upload, pieces, expected)

    stored = stores.uploads.complete(
        request.account,
        request.bucket,
        request.key,
        request.query["uploadId"],
        parts,
        checksum,
        # Checked in the transaction that creates the object: of two writers with
        # `If-None-Match: *`, only one succeeds.
        lambda now: check_write(request.headers, now),
    )
    content = [
        ("Location", f"/{request.bucket}/{request.key}"),
        *_bucket_and_key(request),
        ("ETag", f'"{stored.etag}"'),
        *checksum_elements(stored.checksums),
    ]
    return xml_response("CompleteMultipartUploadResult", content)


def abort_upload(stores: Stores, request: S3Request, body: bytes) -> Response:
    """Abort an upload and delete the parts."""
    stores.uploads.abort(request.account, request.bucket, request.key, request.query["uploadId"])
    return Response(204)


def _put_part(
    stores: Stores, request: S3Request, written: WrittenFile, checksums: Mapping[str, str]
) -> ObjectPiece:
    return stores.uploads.put_part(
        request.account,
        request.bucket,
        request.key,
        request.query["uploadId"],
        _number(request),
        written,
        dict(checksums),
    )


def _number(request: S3Request) -> int:
    number = parse_digits(request.query["partNumber"], 5)
    if number is None or not 1 <= number <= MOST_PARTS:
        text = f"Part number must be an integer between 1 and {MOST_PARTS}, inclusive"
        raise Fault("InvalidArgument", text)
    return number


def _parse_parts(body: bytes) -> list[CompletedPart]:
    parts = documents.parse(body, "CompleteMultipartUpload").findall("Part")
    if not 1 <= len(parts) <= MOST_PARTS:
        raise documents.malformed_xml()
    completed = []
    for part in parts:
        values = {child.tag: (child.text or "").strip() for child in part}
        number = parse_digits(values.get("PartNumber", ""), 9)
        etag = values.get("ETag", "").strip('"')
        if number is None or not etag:
            raise documents.malformed_xml()
        completed.append(CompletedPart(number, etag, parse_elements(values)))
    return completed


def _object_checksum(
    upload: Upload, pieces: Sequence[ObjectPiece], expected: Mapping[str, str]
) -> dict[str, str]:
    """Return the checksum of the object if all parts have checksums."""
    algorithm, combined = upload.checksum, {}
    of_parts = [piece.checksums.get(algorithm) for piece in pieces]
    checksums = [each for each in of_parts if each is not None]
    if algorithm and len(checksums) == len(pieces):
        if upload.checksum_type == COMPOSITE:
            combined = {algorithm: combine_composite(algorithm, checksums)}
        else:
            sizes = [piece.size for piece in pieces]
            combined = {
                algorithm: combine_full(algorithm, list(zip(checksums, sizes, strict=True)))
            }
    for sent_algorithm, value in expected.items():
        if sent_algorithm not in combined:
            text = f"The {sent_algorithm.upper()} is unknown, because parts have no checksum."
            raise Fault("InvalidRequest", text)
        if combined[sent_algorithm].partition("-")[0] != value.partition("-")[0]:
            text = (
                f"The {sent_algorithm.upper()} you specified did not match the calculated checksum."
            )
            raise Fault("BadDigest", text)
    return combined


def _bucket_and_key(request: S3Request) -> list[Element]:
    return [("Bucket", request.bucket), ("Key", request.key)]
