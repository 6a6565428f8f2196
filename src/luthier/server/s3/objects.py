"""Object operations, byte ranges, and conditional requests (RFC 9110)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import format_datetime, parsedate_to_datetime

from luthier.errors import ObjectRefused
from luthier.server.actions import record_action
from luthier.server.http.messages import Fault, Response, timestamp
from luthier.server.s3 import documents
from luthier.server.s3.body import checksum_elements, checksum_headers
from luthier.server.s3.documents import Element, xml_response
from luthier.server.s3.request import S3Request, Stores, arn, copy_source, describe_object
from luthier.server.stores.object_files import WrittenFile
from luthier.server.tables.objects import ObjectMetadata, StoredObject, check_key

MOST_DELETED = 1000
_RESPONSE = "response-"


def http_date(moment: datetime) -> str:
    """Return a time as an HTTP date, in seconds."""
    return format_datetime(moment.astimezone(UTC), usegmt=True)


def span(header: str | None, size: int) -> tuple[int, int] | None:
    """Return the first byte and the length of a ``Range``; ``None`` for the whole object.

    Raises:
        Fault: ``InvalidRange`` if the range does not overlap the object.
    """
    match = re.fullmatch(r"\s*bytes=([0-9]{0,18})-([0-9]{0,18})\s*", header or "")
    if match is None or not (match[1] or match[2]):
        return None  # several ranges or another unit: RFC 9110 allows ignoring them
    if match[1]:
        first, last = int(match[1]), int(match[2] or size - 1)
        if match[2] and int(match[2]) < first:
            return None
    else:
        first, last = max(0, size - int(match[2])), size - 1
    if first >= size or (not match[1] and not int(match[2])):
        text = "The requested range is not satisfiable"
        raise Fault("InvalidRange", text, headers={"Content-Range": f"bytes */{size}"})
    return first, min(last, size - 1) - first + 1


def check_read(headers: Mapping[str, str], stored: StoredObject, start: str = "if-") -> None:
    """Check the conditions of a read, in headers whose names begin with ``start``.

    Raises:
        Fault: ``PreconditionFailed``, or ``NotModified`` if the client has the current object.
    """
    match, none_match = headers.get(f"{start}match"), headers.get(f"{start}none-match")
    changed = headers.get(f"{start}modified-since")
    unchanged = headers.get(f"{start}unmodified-since")
    # HTTP dates have whole seconds.
    modified = stored.modified.replace(microsecond=0)
    # RFC 9110, section 13.2.2: a condition on the ETag overrides the condition on the date.
    if match is not None:
        if not _matches(match, stored):
            raise _precondition_failed("If-Match")
    elif unchanged is not None and (limit := _moment(unchanged)) and modified > limit:
        raise _precondition_failed("If-Unmodified-Since")
    if none_match is not None:
        is_current = _matches(none_match, stored)
    else:
        limit = _moment(changed) if changed is not None else None
        is_current = limit is not None and modified <= limit
    # For a copy, S3 returns 412 instead of 304: the client has no cached response.
    if is_current and start == "if-":
        validators = {"ETag": f'"{stored.etag}"', "Last-Modified": http_date(stored.modified)}
        raise Fault("NotModified", "Not Modified", headers=validators)
    if is_current:
        raise _precondition_failed("If-None-Match")


def check_write(headers: Mapping[str, str], stored: StoredObject | None) -> None:
    """Check the conditions of a write against the current object of the key.

    Raises:
        Fault: ``PreconditionFailed``; ``NoSuchKey`` if ``If-Match`` requires a missing object.
    """
    match, none_match = headers.get("if-match"), headers.get("if-none-match")
    if match is not None and stored is None:
        raise Fault("NoSuchKey", "The specified key does not exist.")
    if match is not None and stored is not None and not _matches(match, stored):
        raise _precondition_failed("If-Match")
    if none_match is not None and stored is not None and _matches(none_match, stored):
        raise _precondition_failed("If-None-Match")


def _matches(header: str, stored: StoredObject) -> bool:
    tags = [each.strip().removeprefix("W/").strip('"') for each in header.split(",")]
    return "*" in tags or stored.etag in tags


def _moment(text: str) -> datetime | None:
    try:
        moment = parsedate_to_datetime(text)
    except ValueError:
        return None  # RFC 9110: ignore a date that cannot be parsed
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _precondition_failed(condition: str) -> Fault:
    text = "At least one of the pre-conditions you specified did not hold"
    return Fault("PreconditionFailed", text, fields={"Condition": condition})


def before_put(stores: Stores, request: S3Request) -> int:
    """Check the request before the body is read. Return the size in bytes of the replaced object."""
    check_key(request.key)
    describe_object(request, {})
    try:
        replaced = stores.objects.head(request.account, request.bucket, request.key)
    except ObjectRefused as refused:
        if refused.rule != "NoSuchKey":
            raise
        return 0
    return replaced.size


def put_object(
    stores: Stores, request: S3Request, written: WrittenFile, checksums: Mapping[str, str]
) -> Response:
    """Store the received file under the key."""
    stored = stores.objects.put(
        request.account,
        request.bucket,
        request.key,
        written,
        describe_object(request, checksums),
        # Checked in the transaction that replaces the row: of two writers with
        # `If-None-Match: *`, only one succeeds.
        lambda now: check_write(request.headers, now),
    )
    return Response(200, b"", {"ETag": f'"{stored.etag}"', **checksum_headers(stored.checksums)})


def get_object(stores: Stores, request: S3Request, body: bytes) -> Response:
    """Return an object or a byte range of an object."""
    range_header = request.headers.get("range")

    def choose_range(stored: StoredObject) -> tuple[int, int]:
        # Checked on the version whose bytes are sent: another client may replace the object.
        check_read(request.headers, stored)
        return span(range_header, stored.size) or (0, stored.size)

    stored, pieces = stores.objects.open_range(
        request.account, request.bucket, request.key, choose_range
    )
    status, headers = _status_and_headers(request, stored)
    return Response(status, pieces, headers)


def head_object(stores: Stores, request: S3Request, body: bytes) -> Response:
    """Return the headers of an object."""
    stored = stores.objects.head(request.account, request.bucket, request.key)
    check_read(request.headers, stored)
    status, headers = _status_and_headers(request, stored)
    return Response(status, b"", headers)


def delete_object(stores: Stores, request: S3Request, body: bytes) -> Response:
    """Delete an object. Deleting a missing object succeeds."""
    stores.objects.delete(request.account, request.bucket, [request.key])
    return Response(204)


def delete_objects(stores: Stores, request: S3Request, body: bytes) -> Response:
    """Delete the objects that a document lists."""
    tree = documents.parse(body, "Delete")
    named = tree.findall("Object")
    keys = [each.findtext("Key") or "" for each in named]
    if not keys or len(keys) > MOST_DELETED or not all(keys):
        raise documents.malformed_xml()
    if any(each.findtext("VersionId") for each in named):
        raise Fault("NotImplemented", "Object versions are not supported.")
    # A missing bucket is an error of the request, not of each key.
    stores.objects.bucket(request.account, request.bucket)
    allowed: list[str] = []
    results: list[Element] = []
    for key in keys:
        try:
            record_action("s3:DeleteObject", arn(request.bucket, key))
            check_key(key)
        except (Fault, ObjectRefused) as refused:
            code = refused.code if isinstance(refused, Fault) else refused.rule
            fields = [("Key", key), ("Code", code), ("Message", refused.problem.message)]
            results.append(("Error", fields))
        else:
            allowed.append(key)
    stores.objects.delete(request.account, request.bucket, allowed)
    if tree.findtext("Quiet", "").strip() != "true":
        results = [("Deleted", [("Key", key)]) for key in allowed] + results
    return xml_response("DeleteResult", results)


def copy_object(stores: Stores, request: S3Request, body: bytes) -> Response:
    """Copy another object to the key."""
    source, target = copy_source(request), (request.bucket, request.key)
    record_action("s3:GetObject", arn(*source))
    directive = request.headers.get("x-amz-metadata-directive", "COPY")
    if directive not in ("COPY", "REPLACE"):
        raise Fault("InvalidArgument", "Unknown metadata directive.")
    if source == target and directive == "COPY":
        text = (
            "This copy request is illegal because it is trying to copy an object to itself without "
            "changing the object's metadata."
        )
        raise Fault("InvalidRequest", text)

    def describe_copy(stored: StoredObject) -> ObjectMetadata:
        check_read(request.headers, stored, "x-amz-copy-source-if-")
        if directive == "REPLACE":
            return describe_object(request, stored.checksums)
        return ObjectMetadata(stored.headers, stored.user_metadata, stored.checksums)

    copied = stores.objects.copy(request.account, source, target, describe_copy)
    return xml_response(
        "CopyObjectResult", copy_elements(copied.etag, copied.modified, copied.checksums)
    )


def copy_elements(etag: str, modified: datetime, checksums: Mapping[str, str]) -> list[Element]:
    """Return the elements that describe a copy."""
    moment = timestamp(modified)
    return [("ETag", f'"{etag}"'), ("LastModified", moment), *checksum_elements(checksums)]


def _status_and_headers(request: S3Request, stored: StoredObject) -> tuple[int, dict[str, str]]:
    byte_range = span(request.headers.get("range"), stored.size)
    headers = {
        "ETag": f'"{stored.etag}"',
        "Last-Modified": http_date(stored.modified),
        "Accept-Ranges": "bytes",
        "content-type": "binary/octet-stream",
        **stored.headers,
        **_overrides(request),
        **{f"x-amz-meta-{name}": value for name, value in stored.user_metadata.items()},
        # The console has the same origin, so a stored page must not run scripts.
        "Content-Security-Policy": "sandbox",
        "X-Content-Type-Options": "nosniff",
    }
    if byte_range is None:
        # The stored checksums cover the whole object, and would fail for a range.
        if request.headers.get("x-amz-checksum-mode", "").upper() == "ENABLED":
            headers |= checksum_headers(stored.checksums)
        return 200, {**headers, "Content-Length": str(stored.size)}
    first, length = byte_range
    headers["Content-Range"] = f"bytes {first}-{first + length - 1}/{stored.size}"
    return 206, {**headers, "Content-Length": str(length)}


def _overrides(request: S3Request) -> dict[str, str]:
    """Return the response headers that the query sets, as download links do."""
    overrides = {
        name[len(_RESPONSE) :]: value
        for name, value in request.query.items()
        if name.startswith(_RESPONSE)
    }
    for name, value in overrides.items():
        # A line break would add a header to the response.
        if not all(" " <= letter <= "~" for letter in value):
            raise Fault("InvalidArgument", f"{_RESPONSE}{name} is not a valid header value.")
    return overrides
