"""Routes of the S3 API, with streamed request and response bodies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import Response as HttpResponse
from starlette.routing import request_response

from luthier.errors import ObjectRefused, QuotaExceeded
from luthier.server.actions import record_action
from luthier.server.http.application import Api
from luthier.server.http.messages import Fault, Request, Response
from luthier.server.http.routes import read_head
from luthier.server.http.streams import RequestBody, to_starlette
from luthier.server.roles import authorize
from luthier.server.s3 import buckets, multipart, objects
from luthier.server.s3.body import OBJECT_LIMIT, SignedBody
from luthier.server.s3.documents import DOCUMENT_LIMIT, document
from luthier.server.s3.request import S3Request, Stores, read_request
from luthier.server.stores.multipart import MultipartUploads
from luthier.server.stores.object_files import WrittenFile
from luthier.server.stores.objects import Objects
from luthier.server.tables.objects import UPLOADS

Respond = Callable[[Stores, S3Request, bytes], Response]
Store = Callable[[Stores, S3Request, WrittenFile, Mapping[str, str]], Response]


@dataclass(frozen=True)
class S3Operation:
    """An operation, selected by method, level and query."""

    name: str
    """Name of the operation in botocore."""
    method: str
    level: str
    """``service``, ``bucket`` or ``object``."""
    action: str
    """Action that a role must allow."""
    respond: Respond | None = None
    store: Store | None = None
    """Implementation of an operation that stores the body as a file."""
    precheck: Callable[[Stores, S3Request], int] = lambda stores, request: 0
    """Checks the request before the body is read. Returns the bytes that the new file replaces."""
    required: frozenset[str] = frozenset()
    """Required keys of the query."""
    optional: frozenset[str] = frozenset()
    """Optional keys of the query."""
    covers_object: bool = False
    """True if checksums in the headers cover the object instead of the body."""
    copies: bool = False
    """True if a header names a source object in place of a body."""


def _keys(text: str) -> frozenset[str]:
    return frozenset(text.split())


_V1 = _keys("prefix delimiter marker max-keys encoding-type")
_V2 = _keys("prefix delimiter start-after continuation-token max-keys encoding-type fetch-owner")
_BUCKETS = _keys("max-buckets continuation-token prefix bucket-region")
_RESPONSE = _keys(
    "response-cache-control response-content-disposition response-content-encoding "
    "response-content-language response-content-type response-expires"
)
_PART = _keys("uploadId partNumber")
_UPLOAD, _NEW = _keys("uploadId"), _keys("uploads")

OPERATIONS = (
    S3Operation("ListBuckets", "GET", "service", "s3:ListAllMyBuckets", buckets.list_buckets,
           optional=_BUCKETS),
    S3Operation("CreateBucket", "PUT", "bucket", "s3:CreateBucket", buckets.create_bucket),
    S3Operation("HeadBucket", "HEAD", "bucket", "s3:ListBucket", buckets.head_bucket),
    S3Operation("DeleteBucket", "DELETE", "bucket", "s3:DeleteBucket", buckets.delete_bucket),
    S3Operation("GetBucketLocation", "GET", "bucket", "s3:GetBucketLocation", buckets.bucket_location,
           required=_keys("location")),
    S3Operation("ListObjectsV2", "GET", "bucket", "s3:ListBucket", buckets.list_objects_v2,
           required=_keys("list-type"), optional=_V2),
    S3Operation("ListObjects", "GET", "bucket", "s3:ListBucket", buckets.list_objects, optional=_V1),
    S3Operation("DeleteObjects", "POST", "bucket", "s3:DeleteObject", objects.delete_objects,
           required=_keys("delete")),
    S3Operation("PutObject", "PUT", "object", "s3:PutObject", store=objects.put_object,
           precheck=objects.before_put),
    S3Operation("CopyObject", "PUT", "object", "s3:PutObject", objects.copy_object, copies=True),
    S3Operation("GetObject", "GET", "object", "s3:GetObject", objects.get_object, optional=_RESPONSE),
    S3Operation("HeadObject", "HEAD", "object", "s3:GetObject", objects.head_object,
           optional=_RESPONSE),
    S3Operation("DeleteObject", "DELETE", "object", "s3:DeleteObject", objects.delete_object),
    S3Operation("CreateMultipartUpload", "POST", "object", "s3:PutObject", multipart.create_upload,
           required=_NEW),
    S3Operation("UploadPart", "PUT", "object", "s3:PutObject", store=multipart.upload_part,
           precheck=multipart.before_part, required=_PART),
    S3Operation("UploadPartCopy", "PUT", "object", "s3:PutObject", multipart.copy_part,
           required=_PART, copies=True),
    S3Operation("CompleteMultipartUpload", "POST", "object", "s3:PutObject",
           multipart.complete_upload, required=_UPLOAD, covers_object=True),
    S3Operation("AbortMultipartUpload", "DELETE", "object", "s3:AbortMultipartUpload",
           multipart.abort_upload, required=_UPLOAD),
)  # fmt: skip


def operation_of(request: S3Request) -> S3Operation:
    """Return the requested operation.

    Raises:
        Fault: ``MethodNotAllowed``. ``NotImplemented`` for an unsupported query such as ``?acl``, which
            must not select the operation without the query.
    """
    level = "object" if request.key else "bucket" if request.bucket else "service"
    candidates = [
        each for each in OPERATIONS if (each.method, each.level) == (request.method, level)
    ]
    if not candidates:
        text = "The specified method is not allowed against this resource."
        raise Fault("MethodNotAllowed", text)
    # Signatures in the query were verified, and x-id only names the operation for logs.
    keys = {key for key in request.query if not key.lower().startswith("x-amz-")} - {"x-id"}
    copies = "x-amz-copy-source" in request.headers
    for each in candidates:
        if each.required <= keys <= each.required | each.optional and each.copies == copies:
            return each
    text = "A query you provided implies functionality that is not implemented"
    raise Fault("NotImplemented", text)


_STATUS = {
    "AccessDenied": 403,
    "BucketAlreadyOwnedByYou": 409,
    "BucketNotEmpty": 409,
    "InternalError": 500,
    "InvalidAccessKeyId": 403,
    "InvalidRange": 416,
    "MethodNotAllowed": 405,
    "MissingContentLength": 411,
    "NoSuchBucket": 404,
    "NoSuchKey": 404,
    "NoSuchUpload": 404,
    "NotImplemented": 501,
    "NotModified": 304,
    "PreconditionFailed": 412,
    "QuotaExceeded": 403,
    "RequestTimeTooSkewed": 403,
    "ServiceUnavailable": 503,
    "SignatureDoesNotMatch": 403,
    "SlowDown": 503,
}
"""HTTP status by code; the default is 400."""
_CODES = {
    "IncompleteSignature": "AuthorizationHeaderMalformed",
    "InternalServer": "InternalError",
    "InvalidSignature": "SignatureDoesNotMatch",
    "MissingAuthenticationToken": "AccessDenied",
    "RequestEntityTooLarge": "EntityTooLarge",
    "Throttling": "SlowDown",
    "UnrecognizedClient": "InvalidAccessKeyId",
    "Validation": "InvalidRequest",
}
"""S3's error codes by error codes of the server."""


def s3_api(objects: Objects, region: str) -> Api:
    """Return path-style S3 on the built-in object store, for all requests signed for S3."""
    stores = Stores(objects, MultipartUploads(objects), region)

    async def endpoint(sent: HttpRequest) -> HttpResponse:
        sent.state.record.operation = f"s3.{sent.method}"
        # An aws-chunked body is longer than the object.
        sent.state.body.limit = 2 * OBJECT_LIMIT
        try:
            return to_starlette(await _respond(stores, read_head(sent), sent.state.body))
        except QuotaExceeded as refused:
            # AWS has no code for this; Ceph's gateway has.
            raise Fault("QuotaExceeded", str(refused)) from refused
        except ObjectRefused as refused:
            raise Fault(refused.rule, refused.problem.message) from refused

    return Api(
        "s3",
        request_response(endpoint),
        lambda head, service: service == "s3",
        render_fault,
        "x-amz-request-id",
        signs_body_hash=True,
    )


def render_fault(fault: Fault, request_id: str) -> Response:
    """Return ``fault`` in S3's form. The details have ``headers`` and ``fields`` of the document."""
    code = _CODES.get(fault.code.removesuffix("Exception"), fault.code)
    code = {"path": "InvalidURI", "query": "InvalidArgument"}.get(
        fault.details.get("place", ""), code
    )
    headers = fault.details.get("headers", {})
    status = _STATUS.get(code, 400)
    if status == 304:
        return Response(status, b"", headers)
    fields = fault.details.get("fields", {}).items()
    content = [("Code", code), ("Message", fault.message), *fields, ("RequestId", request_id)]
    # S3's error documents have no namespace.
    body = document("Error", content, namespace=None)
    return Response(status, body, {"Content-Type": "application/xml", **headers})


async def _respond(stores: Stores, sent: Request, received: RequestBody) -> Response:
    """Respond to a request, with all blocking work in threads.

    Raises:
        Fault: for a rejected request, which has changed nothing.
    """
    request = read_request(received.head, sent.caller)
    operation = operation_of(request)
    authorize(request.caller, operation.action, request.resource)
    if operation.respond is not objects.delete_objects:  # delete_objects records each key
        record_action(operation.action, request.resource)
    if request.bucket == UPLOADS and request.method not in ("GET", "HEAD"):
        # Each file also has a database row, which only the OpenAI API writes.
        text = f"{UPLOADS} contains OpenAI files. Write and delete files with the OpenAI API."
        raise Fault("AccessDenied", text)
    limit = OBJECT_LIMIT if operation.store else DOCUMENT_LIMIT
    assert sent.signed is not None
    body = SignedBody(request.headers, sent.signed, limit, not operation.covers_object)
    if operation.respond is not None:
        document_body = bytearray()
        await body.receive(received, document_body.extend)
        return await run_in_threadpool(operation.respond, stores, request, bytes(document_body))
    assert operation.store is not None
    # A rejected client with `Expect: 100-continue` never sends the body.
    replaced = await run_in_threadpool(operation.precheck, stores, request)
    if not body.has_length:
        text = "You must provide the Content-Length HTTP header."
        raise Fault("MissingContentLength", text)
    begin = partial(stores.objects.begin, freed=replaced)
    with await run_in_threadpool(begin, request.account, body.length) as writing:
        # `receive` raises for a wrong signature or checksum, before the file gets its name.
        checksums = await body.receive(received, writing.write)
        written = await run_in_threadpool(writing.finish)
        return await run_in_threadpool(operation.store, stores, request, written, checksums)
