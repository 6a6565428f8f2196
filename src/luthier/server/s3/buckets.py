"""Bucket operations and listings."""

from __future__ import annotations

import base64
from collections.abc import Callable
from urllib.parse import quote

from luthier.server.http.messages import Fault, Response, timestamp
from luthier.server.s3 import documents
from luthier.server.s3.documents import Element, xml_response
from luthier.server.s3.request import S3Request, Stores
from luthier.server.stores.listing import KeyPage, after, beyond, page, rolled_up
from luthier.server.tables.objects import StoredObject
from luthier.server.tables.text import decode_storable

MOST_KEYS = 1000


def list_buckets(stores: Stores, request: S3Request, body: bytes) -> Response:
    """List the account's buckets by name, all on one page."""
    prefix = request.query.get("prefix", "")
    matching = [
        each for each in stores.objects.buckets(request.account) if each.name.startswith(prefix)
    ]
    shown = [
        ("Bucket", [("Name", each.name), ("CreationDate", timestamp(each.created))])
        for each in matching
    ]
    return xml_response("ListAllMyBucketsResult", [owner(request), ("Buckets", shown)])


def create_bucket(stores: Stores, request: S3Request, body: bytes) -> Response:
    """Create a bucket. The requested location has no effect: the server has one region."""
    if body.strip():
        documents.parse(body, "CreateBucketConfiguration")
    stores.objects.create_bucket(request.account, request.bucket)
    return Response(200, b"", {"Location": f"/{request.bucket}"})


def head_bucket(stores: Stores, request: S3Request, body: bytes) -> Response:
    """Check that a bucket exists."""
    stores.objects.bucket(request.account, request.bucket)
    return Response(200, b"", {"x-amz-bucket-region": stores.region})


def delete_bucket(stores: Stores, request: S3Request, body: bytes) -> Response:
    """Delete an empty bucket."""
    stores.objects.delete_bucket(request.account, request.bucket)
    return Response(204)


def bucket_location(stores: Stores, request: S3Request, body: bytes) -> Response:
    """Return the region; empty for ``us-east-1``, as on AWS."""
    stores.objects.bucket(request.account, request.bucket)
    region = "" if stores.region == "us-east-1" else stores.region
    return xml_response("LocationConstraint", region)


def list_objects_v2(stores: Stores, request: S3Request, body: bytes) -> Response:
    """Return a page of keys after a token or after ``start-after``."""
    query, encode = request.query, encoding(request)
    token, max_keys = (
        query.get("continuation-token"),
        request.number("max-keys", MOST_KEYS, MOST_KEYS),
    )
    marker = query.get("start-after", "")
    start = decoded_token(token) if token is not None else _start(request, marker)
    listing = _page(stores, request, start, max_keys)
    content: list[Element | None] = [
        ("Name", request.bucket),
        ("Prefix", encode(query.get("prefix", ""))),
        ("Delimiter", encode(query["delimiter"])) if query.get("delimiter") else None,
        ("StartAfter", encode(marker)) if marker else None,
        ("MaxKeys", max_keys),
        ("KeyCount", len(listing.entries)),
        ("EncodingType", "url") if "encoding-type" in query else None,
        ("ContinuationToken", token) if token is not None else None,
        ("IsTruncated", listing.next is not None),
        ("NextContinuationToken", encoded_token(listing.next))
        if listing.next is not None
        else None,
    ]
    owner_element = owner(request) if query.get("fetch-owner") == "true" else None
    return xml_response("ListBucketResult", [*content, *_entries(listing, encode, owner_element)])


def list_objects(stores: Stores, request: S3Request, body: bytes) -> Response:
    """Return a page of keys after ``marker``: version 1 of the operation."""
    query, encode = request.query, encoding(request)
    max_keys, marker = request.number("max-keys", MOST_KEYS, MOST_KEYS), query.get("marker", "")
    listing = _page(stores, request, _start(request, marker), max_keys)
    last = listing.entries[-1] if listing.next is not None and listing.entries else None
    # S3 returns NextMarker only with a delimiter. Without one, clients send the last key.
    next_marker = last.key if isinstance(last, StoredObject) else last
    content: list[Element | None] = [
        ("Name", request.bucket),
        ("Prefix", encode(query.get("prefix", ""))),
        ("Marker", encode(marker)),
        ("NextMarker", encode(next_marker)) if next_marker and query.get("delimiter") else None,
        ("MaxKeys", max_keys),
        ("Delimiter", encode(query["delimiter"])) if query.get("delimiter") else None,
        ("EncodingType", "url") if "encoding-type" in query else None,
        ("IsTruncated", listing.next is not None),
    ]
    entries = _entries(listing, encode, owner(request))
    return xml_response("ListBucketResult", [*content, *entries])


def owner(request: S3Request) -> Element:
    """Return the element of the account."""
    return ("Owner", [("ID", request.account), ("DisplayName", request.account)])


def encoding(request: S3Request) -> Callable[[str], str]:
    """Return the encoder of keys in a document: percent-encoding if the client requests URL
    encoding."""
    kind = request.query.get("encoding-type", "")
    if kind not in ("", "url"):
        raise Fault("InvalidArgument", "Invalid Encoding Method specified in S3Request")
    return quote if kind else str


def encoded_token(position: str) -> str:
    """Encode a position in a listing as an opaque token."""
    return base64.urlsafe_b64encode(position.encode()).decode()


def decoded_token(token: str) -> str:
    """Decode a token into a position in the listing."""
    try:
        return decode_storable(base64.b64decode(token, altchars=b"-_", validate=True))
    except ValueError:
        text = "The continuation token provided is incorrect"
        raise Fault("InvalidArgument", text) from None


def _start(request: S3Request, marker: str) -> str:
    """Return the first key after ``marker``, a key or common prefix."""
    if not marker:
        return ""
    prefix, delimiter = request.query.get("prefix", ""), request.query.get("delimiter", "")
    # An earlier page listed this common prefix: skip all keys below the prefix.
    if rolled_up(marker, prefix, delimiter) == marker:
        return beyond(marker) or after(marker)
    return after(marker)


def _page(stores: Stores, request: S3Request, start: str, limit: int) -> KeyPage:
    # max-keys=0 lists no keys, but a missing bucket is still an error.
    if not limit:
        stores.objects.bucket(request.account, request.bucket)
        return KeyPage((), None)
    return page(
        stores.objects.database,
        request.account,
        request.bucket,
        prefix=request.query.get("prefix", ""),
        delimiter=request.query.get("delimiter", ""),
        start=start,
        limit=limit,
    )


def _entries(
    listing: KeyPage, encode: Callable[[str], str], owner_element: Element | None
) -> list[Element]:
    entries: list[Element] = [
        (
            "Contents",
            [
                ("Key", encode(each.key)),
                ("LastModified", timestamp(each.modified)),
                ("ETag", f'"{each.etag}"'),
                *[("ChecksumAlgorithm", name.upper()) for name in each.checksums],
                ("Size", each.size),
                owner_element,
                ("StorageClass", "STANDARD"),
            ],
        )
        for each in listing.objects
    ]
    return entries + [("CommonPrefixes", [("Prefix", encode(each))]) for each in listing.prefixes]
