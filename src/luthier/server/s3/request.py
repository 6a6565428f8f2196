"""A parsed request to the object store: bucket, key, query, headers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import parse_qsl, unquote

from luthier.server.http.messages import Caller, Fault, RequestHead, parse_digits
from luthier.server.stores.multipart import MultipartUploads
from luthier.server.stores.objects import Objects
from luthier.server.tables.arns import object_arn
from luthier.server.tables.objects import ObjectMetadata
from luthier.server.tables.text import check_storable

DESCRIBING = (
    "cache-control", "content-disposition", "content-encoding", "content-language", "content-type",
    "expires",
)  # fmt: skip
"""Headers that are stored with an object and returned unchanged."""
_METADATA = "x-amz-meta-"
_METADATA_BYTES = 2048
_REFUSED = ("x-amz-object-lock-", "x-amz-server-side-encryption", "x-amz-tagging", "x-amz-website-")
"""Prefixes of headers for unsupported features. Ignoring such a header would mislead the client."""
_PRIVATE = ("", "private", "bucket-owner-full-control", "bucket-owner-read")


@dataclass(frozen=True)
class Stores:
    """The object store and the multipart uploads behind the operations."""

    objects: Objects
    uploads: MultipartUploads
    region: str


@dataclass(frozen=True)
class S3Request:
    """One authenticated request."""

    caller: Caller
    method: str
    bucket: str
    """Name of the bucket; empty for the service."""
    key: str
    """Key of the object; empty for a bucket."""
    query: Mapping[str, str]
    headers: Mapping[str, str]
    """Headers with lower-case names."""

    @property
    def account(self) -> str:
        """Account of the caller, the owner of the buckets."""
        return self.caller.account

    @property
    def resource(self) -> str:
        """ARN of the bucket or object."""
        return arn(self.bucket, self.key)

    def number(self, name: str, default: int, maximum: int, minimum: int = 0) -> int:
        """Return a number of the query, at most ``maximum``."""
        text = self.query.get(name, "")
        if not text:
            return default
        number = parse_digits(text, 9)
        if number is None or number < minimum:
            raise Fault(
                "InvalidArgument", f"Provided {name} not an integer or within integer range"
            )
        return min(number, maximum)


def arn(bucket: str, key: str = "") -> str:
    """Return the ARN of a bucket or object; ``*`` for all buckets."""
    if not bucket:
        return "*"
    return object_arn(bucket, key) if key else f"arn:aws:s3:::{bucket}"


def read_request(head: RequestHead, caller: Caller) -> S3Request:
    """Parse the head of a request; raises :class:`Fault` for a path or query that is not UTF-8."""
    # Split before decoding: an encoded slash is part of a name.
    bucket, _, key = head.path.removeprefix("/").partition("/")
    try:
        named = unquote(bucket, errors="strict"), unquote(key, errors="strict")
        pairs = parse_qsl(head.query, keep_blank_values=True, errors="strict", max_num_fields=200)
    except ValueError:
        raise Fault("InvalidURI", "Couldn't parse the specified URI.") from None
    headers: dict[str, str] = {}
    for name, value in head.headers:
        # RFC 9110, section 5.3: several headers of one name form a list.
        headers[name] = f"{headers[name]},{value}" if name in headers else value
    request = S3Request(caller, head.method, *named, dict(pairs), headers)
    _check(request)
    return request


def copy_source(request: S3Request) -> tuple[str, str]:
    """Return bucket and key in ``x-amz-copy-source``."""
    # Split before decoding: an encoded question mark is part of the key.
    text, _, query = request.headers["x-amz-copy-source"].partition("?")
    try:
        named = unquote(text, errors="strict").removeprefix("/")
        check_storable(named)
        bucket, slash, key = named.partition("/")
    except ValueError:
        bucket = slash = key = ""
    if query:
        raise Fault("NotImplemented", "Object versions are not supported.")
    if not (bucket and slash and key):
        text = "Copy Source must mention the source bucket and key: sourcebucket/sourcekey"
        raise Fault("InvalidArgument", text)
    return bucket, key


def describe_object(request: S3Request, checksums: Mapping[str, str]) -> ObjectMetadata:
    """Return the metadata of the new object from the headers of a request."""
    sent = request.headers
    headers = {name: sent[name] for name in DESCRIBING if name in sent}
    # aws-chunked describes the body of this request; the stored bytes are decoded.
    codings = [each.strip() for each in headers.pop("content-encoding", "").split(",")]
    content_encoding = ",".join(each for each in codings if each and each != "aws-chunked")
    if content_encoding:
        headers["content-encoding"] = content_encoding
    metadata = {
        name[len(_METADATA) :]: value for name, value in sent.items() if name.startswith(_METADATA)
    }
    if sum(len(name) + len(value) for name, value in metadata.items()) > _METADATA_BYTES:
        text = "Your metadata headers exceed the maximum allowed metadata size"
        raise Fault("MetadataTooLarge", text)
    return ObjectMetadata(headers, metadata, checksums)


def _check(request: S3Request) -> None:
    owner = request.headers.get("x-amz-expected-bucket-owner", request.account)
    if owner != request.account:
        raise Fault("AccessDenied", "Access Denied")
    if request.headers.get("x-amz-acl", "") not in _PRIVATE:
        raise Fault(
            "NotImplemented", "ACLs are not supported: each bucket is private to its account."
        )
    for name in request.headers:
        if name.startswith(_REFUSED) and request.method in ("PUT", "POST"):
            text = "A header you provided implies functionality that is not implemented"
            raise Fault("NotImplemented", text, fields={"Header": name})
