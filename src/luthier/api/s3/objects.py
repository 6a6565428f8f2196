"""Operations on objects."""

from __future__ import annotations

from collections.abc import Mapping

from luthier.api.s3 import documents
from luthier.api.s3.buckets import xml
from luthier.api.s3.checksums import as_elements, as_headers
from luthier.api.s3.conditions import check_read, check_write, http_date, span
from luthier.api.s3.documents import Element, document, iso
from luthier.api.s3.request import Incoming, Request, Stores, arn, copy_source, described
from luthier.api.wire import Answer, Fault
from luthier.errors import ObjectRefused
from luthier.store.object_files import Written
from luthier.store.objects import Described, StoredObject, check_key

MOST_DELETED = 1000
_RESPONSE = "response-"


def before_put(stores: Stores, request: Request) -> Incoming:
    """Refuse what can be refused before the bytes have come."""
    check_key(request.key)
    described(request, {})
    try:
        found = stores.objects.head(request.account, request.bucket, request.key)
    except ObjectRefused as refused:
        if refused.code != "NoSuchKey":
            raise
        return Incoming(objects=1)
    return Incoming(freed=found.size)


def put_object(
    stores: Stores, request: Request, written: Written, checksums: Mapping[str, str]
) -> Answer:
    """Let the key name what came."""
    made = stores.objects.put(
        request.account,
        request.bucket,
        request.key,
        written,
        described(request, checksums),
        lambda now: check_write(request.headers, now),
    )
    return Answer(200, b"", {"ETag": f'"{made.etag}"', **as_headers(made.checksums)})


def get_object(stores: Stores, request: Request, body: bytes) -> Answer:
    """An object, or a range of it."""
    asked = request.headers.get("range")

    def wanted(found: StoredObject) -> tuple[int, int]:
        check_read(request.headers, found)
        return span(asked, found.size) or (0, found.size)

    found, pieces = stores.objects.open_range(request.account, request.bucket, request.key, wanted)
    status, headers = _told(request, found)
    return Answer(status, pieces, headers)


def head_object(stores: Stores, request: Request, body: bytes) -> Answer:
    """What is told of an object."""
    found = stores.objects.head(request.account, request.bucket, request.key)
    check_read(request.headers, found)
    status, headers = _told(request, found)
    return Answer(status, b"", headers)


def delete_object(stores: Stores, request: Request, body: bytes) -> Answer:
    """Remove an object; one that is not there is no error."""
    stores.objects.delete(request.account, request.bucket, [request.key])
    return Answer(204)


def delete_objects(stores: Stores, request: Request, body: bytes) -> Answer:
    """Remove the objects that a document names, each if the caller may."""
    tree = documents.parse(body, "Delete")
    named = tree.all("Object")
    keys = [each.value("Key") or "" for each in named]
    if not keys or len(keys) > MOST_DELETED or not all(keys):
        raise documents.malformed()
    if any(each.value("VersionId") for each in named):
        raise Fault("NotImplemented", "Objects have no versions here.")
    stores.objects.bucket(request.account, request.bucket)
    allowed: list[str] = []
    told: list[Element] = []
    for key in keys:
        try:
            stores.authorize(request.caller, "s3:DeleteObject", arn(request.bucket, key))
            check_key(key)
        except (Fault, ObjectRefused) as refused:
            fields = [("Key", key), ("Code", refused.code), ("Message", refused.message)]
            told.append(("Error", fields))
        else:
            allowed.append(key)
    stores.objects.delete(request.account, request.bucket, allowed)
    if (tree.value("Quiet") or "").strip() != "true":
        told = [("Deleted", [("Key", key)]) for key in allowed] + told
    return xml(document("DeleteResult", told))


def copy_object(stores: Stores, request: Request, body: bytes) -> Answer:
    """Let the key name the bytes of another object."""
    source, target = copy_source(request), (request.bucket, request.key)
    stores.authorize(request.caller, "s3:GetObject", arn(*source))
    directive = request.headers.get("x-amz-metadata-directive", "COPY")
    if directive not in ("COPY", "REPLACE"):
        raise Fault("InvalidArgument", "Unknown metadata directive.")
    if source == target and directive == "COPY":
        text = (
            "This copy request is illegal because it is trying to copy an object to itself without "
            "changing the object's metadata."
        )
        raise Fault("InvalidRequest", text)

    def told(found: StoredObject) -> Described:
        check_read(request.headers, found, "x-amz-copy-source-if-")
        if directive == "REPLACE":
            return described(request, found.checksums)
        return Described(found.headers, found.user_metadata, found.checksums)

    made = stores.objects.copy(request.account, source, target, told)
    return xml(document("CopyObjectResult", copied(made.etag, made, made.checksums)))


def copied(etag: str, made: object, checksums: Mapping[str, str]) -> list[Element]:
    """What is told of a copy; ``made`` has the moment it was made."""
    moment = iso(made.modified)  # type: ignore[attr-defined]
    return [("ETag", f'"{etag}"'), ("LastModified", moment), *as_elements(checksums)]


def _told(request: Request, found: StoredObject) -> tuple[int, dict[str, str]]:
    part = span(request.headers.get("range"), found.size)
    headers = {
        "ETag": f'"{found.etag}"',
        "Last-Modified": http_date(found.modified),
        "Accept-Ranges": "bytes",
        "content-type": "binary/octet-stream",
        **found.headers,
        **_overrides(request),
        **{f"x-amz-meta-{name}": value for name, value in found.user_metadata.items()},
        # The console has the same origin: what a client stored must not act there.
        "Content-Security-Policy": "sandbox",
        "X-Content-Type-Options": "nosniff",
    }
    if part is None:
        if request.headers.get("x-amz-checksum-mode", "").upper() == "ENABLED":
            headers |= as_headers(found.checksums)
        return 200, {**headers, "Content-Length": str(found.size)}
    first, length = part
    headers["Content-Range"] = f"bytes {first}-{first + length - 1}/{found.size}"
    return 206, {**headers, "Content-Length": str(length)}


def _overrides(request: Request) -> dict[str, str]:
    """Headers that the query of a request sets, as links to downloads do."""
    told = {
        name[len(_RESPONSE) :]: value
        for name, value in request.query.items()
        if name.startswith(_RESPONSE)
    }
    for name, value in told.items():
        if not all(" " <= letter <= "~" for letter in value):
            raise Fault("InvalidArgument", f"{_RESPONSE}{name} is no value of a header.")
    return told
