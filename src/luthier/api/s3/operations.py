"""Which operation a request is, and what its caller has to be allowed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from luthier.api.s3 import buckets, multipart, objects
from luthier.api.s3.request import Incoming, Request, Stores
from luthier.api.wire import Answer, Fault
from luthier.store.object_files import Written

Works = Callable[[Stores, Request, bytes], Answer]
Keeps = Callable[[Stores, Request, Written, Mapping[str, str]], Answer]


@dataclass(frozen=True)
class Operation:
    """One operation, and how it is asked for."""

    name: str
    """As botocore has it."""
    method: str
    level: str
    """``service``, ``bucket`` or ``object``."""
    action: str
    """Of IAM; empty where the operation asks for each of the things it acts on."""
    works: Works | None = None
    keeps: Keeps | None = None
    """Of an operation whose body is kept as a file."""
    before: Callable[[Stores, Request], Incoming] = lambda stores, request: Incoming()
    """Refuses what can be refused before such a body is read, and says what it will take."""
    needs: frozenset[str] = frozenset()
    """Keys of the query that are there."""
    may: frozenset[str] = frozenset()
    """Keys of the query that may be there too."""
    whole: bool = False
    """Whether checksums in its headers are those of the object, and not of the body it has."""
    copies: bool = False
    """Whether another object is named in place of a body."""


def _keys(text: str = "") -> frozenset[str]:
    return frozenset(text.split())


_V1 = _keys("prefix delimiter marker max-keys encoding-type")
_V2 = _keys("prefix delimiter start-after continuation-token max-keys encoding-type fetch-owner")
_BUCKETS = _keys("max-buckets continuation-token prefix bucket-region")
_RESPONSE = _keys(
    "response-cache-control response-content-disposition response-content-encoding "
    "response-content-language response-content-type response-expires"
)
_UPLOADS = _keys("prefix delimiter key-marker upload-id-marker max-uploads encoding-type")
_PART, _OF_PART = _keys("uploadId partNumber"), _keys("max-parts part-number-marker")
_UPLOAD, _NEW = _keys("uploadId"), _keys("uploads")
_LIST_UPLOADS, _LIST_PARTS = "s3:ListBucketMultipartUploads", "s3:ListMultipartUploadParts"

OPERATIONS = (
    Operation("ListBuckets", "GET", "service", "s3:ListAllMyBuckets", buckets.list_buckets,
              may=_BUCKETS),
    Operation("CreateBucket", "PUT", "bucket", "s3:CreateBucket", buckets.create_bucket),
    Operation("HeadBucket", "HEAD", "bucket", "s3:ListBucket", buckets.head_bucket),
    Operation("DeleteBucket", "DELETE", "bucket", "s3:DeleteBucket", buckets.delete_bucket),
    Operation("GetBucketLocation", "GET", "bucket", "s3:GetBucketLocation", buckets.bucket_location,
              needs=_keys("location")),
    Operation("ListObjectsV2", "GET", "bucket", "s3:ListBucket", buckets.list_objects_v2,
              needs=_keys("list-type"), may=_V2),
    Operation("ListObjects", "GET", "bucket", "s3:ListBucket", buckets.list_objects, may=_V1),
    Operation("ListMultipartUploads", "GET", "bucket", _LIST_UPLOADS, multipart.list_uploads,
              needs=_NEW, may=_UPLOADS),
    Operation("DeleteObjects", "POST", "bucket", "", objects.delete_objects,
              needs=_keys("delete")),
    Operation("PutObject", "PUT", "object", "s3:PutObject", keeps=objects.put_object,
              before=objects.before_put),
    Operation("CopyObject", "PUT", "object", "s3:PutObject", objects.copy_object, copies=True),
    Operation("GetObject", "GET", "object", "s3:GetObject", objects.get_object, may=_RESPONSE),
    Operation("HeadObject", "HEAD", "object", "s3:GetObject", objects.head_object, may=_RESPONSE),
    Operation("DeleteObject", "DELETE", "object", "s3:DeleteObject", objects.delete_object),
    Operation("CreateMultipartUpload", "POST", "object", "s3:PutObject", multipart.create_upload,
              needs=_NEW),
    Operation("UploadPart", "PUT", "object", "s3:PutObject", keeps=multipart.upload_part,
              before=multipart.before_part, needs=_PART),
    Operation("UploadPartCopy", "PUT", "object", "s3:PutObject", multipart.copy_part,
              needs=_PART, copies=True),
    Operation("CompleteMultipartUpload", "POST", "object", "s3:PutObject",
              multipart.complete_upload, needs=_UPLOAD, whole=True),
    Operation("AbortMultipartUpload", "DELETE", "object", "s3:AbortMultipartUpload",
              multipart.abort_upload, needs=_UPLOAD),
    Operation("ListParts", "GET", "object", _LIST_PARTS, multipart.list_parts,
              needs=_UPLOAD, may=_OF_PART),
)  # fmt: skip


def operation_of(request: Request) -> Operation:
    """The operation that is asked for.

    Raises:
        Fault: ``MethodNotAllowed``; ``NotImplemented`` where the query asks for what is not done here,
            such as ``?acl``, which must not be taken for the operation without it.
    """
    level = "object" if request.key else "bucket" if request.bucket else "service"
    there = [each for each in OPERATIONS if (each.method, each.level) == (request.method, level)]
    if not there:
        text = "The specified method is not allowed against this resource."
        raise Fault("MethodNotAllowed", text)
    # Signatures in the query were verified, and x-id only names the operation for logs.
    asked = {key for key in request.query if not key.lower().startswith("x-amz-")} - {"x-id"}
    copies = "x-amz-copy-source" in request.headers
    for each in there:
        if each.needs <= asked <= each.needs | each.may and each.copies == copies:
            return each
    text = "A query you provided implies functionality that is not implemented"
    raise Fault("NotImplemented", text)
