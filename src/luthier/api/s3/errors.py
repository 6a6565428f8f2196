"""S3's names for what goes wrong, with their statuses, and the documents that tell them."""

from __future__ import annotations

from luthier.api.s3.documents import error_document
from luthier.api.wire import Answer, Fault
from luthier.errors import DoesNotFit, ObjectRefused, QuotaExceeded

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
"""Of all others 400."""
_NAMES = {
    "IncompleteSignature": "AuthorizationHeaderMalformed",
    "InternalServer": "InternalError",
    "InvalidSignature": "SignatureDoesNotMatch",
    "MissingAuthenticationToken": "AccessDenied",
    "RequestEntityTooLarge": "EntityTooLarge",
    "Throttling": "SlowDown",
    "UnrecognizedClient": "InvalidAccessKeyId",
    "Validation": "InvalidRequest",
}
"""By the names that the rest of the service has for the same."""


def refusal(fault: Fault, request_id: str) -> Answer:
    """``fault`` as clients of S3 expect it.

    Of its details, ``headers`` are sent with it, ``fields`` stand in the document, and ``retry_after``
    is a number of seconds.
    """
    code = _NAMES.get(fault.code.removesuffix("Exception"), fault.code)
    headers = {"x-amz-request-id": request_id, **fault.details.get("headers", {})}
    if "retry_after" in fault.details:
        headers["Retry-After"] = str(fault.details["retry_after"])
    status = _STATUS.get(code, 400)
    if status == 304:
        return Answer(status, b"", headers)
    told = [("Code", code), ("Message", fault.message)]
    told += fault.details.get("fields", {}).items()
    body = error_document([*told, ("RequestId", request_id)])
    return Answer(status, body, {"Content-Type": "application/xml", **headers})


def as_fault(error: ObjectRefused | DoesNotFit | QuotaExceeded) -> Fault:
    """A refusal of the store as a fault of this face.

    AWS has a code for too many buckets alone; the others are told as Ceph's gateway tells them.
    """
    if isinstance(error, QuotaExceeded):
        return Fault("TooManyBuckets" if error.quota == "buckets" else "QuotaExceeded", str(error))
    if isinstance(error, ObjectRefused):
        return Fault(error.code, error.message)
    return Fault.of(error)
