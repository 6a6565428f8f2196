"""Requests and responses of the APIs: heads, callers, JSON bodies with limits, and faults.

Signatures are not verified in this module.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, ClassVar, Literal, TypedDict, Unpack
from urllib.parse import parse_qs, unquote_to_bytes

from sqlalchemy.exc import OperationalError
from starlette.exceptions import HTTPException
from starlette.types import Scope

from luthier.errors import (
    DiskFull,
    DoesNotFit,
    LuthierError,
    QuotaExceeded,
    ReadOnlyDisk,
    RefusedInput,
    UnknownModel,
    WrongState,
)
from luthier.formatting import map_code
from luthier.graders.json_schema import depth_of
from luthier.inference.inference import InferenceFailed, InferenceRefused, PredictionsOnly
from luthier.server.tables.text import check_storable, decode_storable

HEAD_BYTES = 64 << 10
"""Maximum size of the headers of a request, in bytes."""
JSON_DEPTH = 200
"""Maximum nesting depth of a JSON body."""
INTEGER_DIGITS = 4300
"""Maximum length of an integer in a JSON body: Python converts no longer text. Handlers reject shorter
integers with the name of the field."""
JSON_VALUES = 500_000
"""Maximum number of values in a JSON body; a value needs up to 200 bytes of memory."""
PREDICTIONS = "POST /api/v1/models/NAME/predictions"
"""Operation for models that predict, embed or classify."""
_FORM = "application/x-www-form-urlencoded"
_log = logging.getLogger("luthier.server")


def parse_digits(text: str, most: int = 18) -> int | None:
    """Return the number in ``text``, or None unless ``text`` is 1 to ``most`` ASCII digits.

    ``int`` also accepts digits of other scripts, and is slow for thousands of digits.
    """
    return int(text) if re.fullmatch(rf"[0-9]{{1,{most}}}", text) else None


@dataclass(frozen=True)
class Caller:
    """Authenticated sender of a request."""

    account: str
    """Account id of 12 digits."""
    user: str
    roles: tuple[str, ...]
    """Roles of the user and of the key; all must have the permission of an operation."""
    id: str = ""
    """Id of the user in AWS's format, ``AIDA…``."""
    key: str = ""
    """Id of the key that authenticated the request: not a secret."""

    @property
    def arn(self) -> str:
        """ARN of the user."""
        return f"arn:aws:iam::{self.account}:user/{self.user}"


@dataclass(frozen=True)
class RequestHead:
    """Head of a request, unverified."""

    method: str
    path: str
    """Raw path, percent-encoded."""
    query: str
    """Raw query without the question mark."""
    headers: Sequence[tuple[str, str]]
    """Lower-case names and values, in the order of the request."""
    tls: bool

    @property
    def has_two_lengths(self) -> bool:
        """True if the head has both ``Content-Length`` and ``Transfer-Encoding``."""
        return {"content-length", "transfer-encoding"} <= {name for name, _ in self.headers}

    @property
    def body_length(self) -> int | None:
        """Size of the body in bytes, or None for chunked bodies."""
        if any(name == "transfer-encoding" for name, _ in self.headers):
            return None
        lengths = [value for name, value in self.headers if name == "content-length"]
        return int(lengths[0]) if lengths and lengths[0].isdigit() else 0


@dataclass(frozen=True)
class Signed:
    """Authenticated caller, and the data to verify the body."""

    caller: Caller
    service: str = ""
    """Service of the credential scope, such as ``s3``; empty for a bearer key."""
    payload: str = ""
    """Signed value of ``X-Amz-Content-SHA256``: hexadecimal, ``UNSIGNED-PAYLOAD`` or
    ``STREAMING-…``."""
    signature: str = ""
    """Hexadecimal signature of the head, the seed of chunk signatures."""
    signing_key: bytes = field(default=b"", repr=False)
    scope: str = ""
    """Credential scope: ``yyyymmdd/region/service/aws4_request``."""
    moment: str = ""
    """Value of ``X-Amz-Date``."""


@dataclass(frozen=True)
class Request:
    """A request of an authenticated caller, for a handler."""

    request_id: str
    caller: Caller
    method: str
    path: str
    """Raw path without the query."""
    query: Mapping[str, list[str]]
    """Decoded values by key."""
    headers: Mapping[str, str]
    """Values by lower-case name."""
    body: bytes
    received: datetime
    params: Mapping[str, str] = field(default_factory=dict)
    """Decoded path parameters by name."""
    address: str = ""
    """IP address of the client; empty if unknown."""
    signed: Signed | None = None
    """Signature of the request."""
    tls: bool = False
    """True if the connection to the server is encrypted."""

    @property
    def account(self) -> str:
        """Account of the caller."""
        return self.caller.account

    @cached_property
    def json(self) -> Any:
        """JSON of the body; None for an empty body. Raises like :func:`parse_json`."""
        return parse_json(self.body) if self.body.strip() else None


def _check_texts(value: Any) -> None:
    """Reject text that databases cannot store."""
    # A Python loop releases the GIL regularly; json.dumps of 24 MB blocks all threads for seconds.
    left = [value]
    while left:
        part = left.pop()
        if isinstance(part, str):
            check_storable(part)
        elif isinstance(part, list):
            left += part
        elif isinstance(part, dict):
            left += part
            left += part.values()


def parse_json(data: bytes) -> Any:
    """Parse the JSON of a client.

    Raises:
        ValueError: If the text is not JSON in UTF-8, is nested too deeply, or contains U+0000 or a
            lone
            surrogate, which databases cannot store.
        Fault: ``RequestEntityTooLarge`` for more than ``JSON_VALUES`` values; ``Validation`` for a
            number out of range.
    """
    # Characters in strings count too: excluding strings would be as slow as parsing.
    if sum(map(data.count, (b",", b"[", b"{"))) > JSON_VALUES:
        raise Fault("RequestEntityTooLarge", f"The body has more than {JSON_VALUES:,} JSON values.")
    try:
        # json.loads would also accept UTF-16 and lone surrogates.
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("the text is not UTF-8") from None
    try:
        # By default, json.loads accepts NaN and Infinity, parses 1e999 as infinity, and raises
        # Python's advice for integers of more than 4,300 digits.
        value = json.loads(
            text, parse_constant=_not_finite, parse_float=_finite, parse_int=_integer
        )
        # Counting brackets is fast, and spares most bodies the walk through all values.
        if data.count(b"[") + data.count(b"{") > JSON_DEPTH and depth_of(value) > JSON_DEPTH:
            # Recursive encoders could not write the value.
            raise ValueError(f"the value has more than {JSON_DEPTH} levels")
        if b"\\u" in data:
            # Check escapes after parsing, which joins surrogate pairs and resolves backslashes.
            _check_texts(value)
    except RecursionError:
        raise ValueError("the value has too many levels") from None
    return value


def _not_finite(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    if math.isinf(number := float(text)):
        raise _out_of_range(text)
    return number


def _integer(text: str) -> int:
    if len(text) > INTEGER_DIGITS:
        raise _out_of_range(text)
    return int(text)


def _out_of_range(text: str) -> Fault:
    shown = text if len(text) <= 20 else f"{text[:20]}…"
    return Fault("Validation", f"The number {shown} in the body is out of range.")


@dataclass(frozen=True)
class Response:
    """A response with a complete or streamed body."""

    status: int = 200
    body: bytes | Iterator[bytes] = b""
    """Complete body, or an iterator of pieces, which is closed when the client disconnects."""
    headers: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def json(value: Any, status: int = 200, **headers: str) -> Response:
        """Return a response with ``value`` as JSON."""
        body = json.dumps(value, separators=(",", ":")).encode()
        return Response(status, body, {"Content-Type": "application/json", **headers})


class FaultDetails(TypedDict, total=False):
    """Details of a fault that an API may put into its response."""

    retry_after: int
    """Seconds until a retry may succeed, for the header ``Retry-After``."""
    allow: str
    """Methods of the path, for the header ``Allow``."""
    headers: Mapping[str, str]
    """Headers of S3's response."""
    fields: Mapping[str, str]
    """Elements of S3's error document."""
    place: Literal["path", "query"]
    """Part of the address that is not UTF-8."""
    reason: str | None
    """Code of an OpenAI error."""
    credentials: bool
    """True for an invalid bearer key."""
    resourceName: str
    """ARN of the resource with too many tags, as Bedrock names the member."""
    refused: bool
    """True for an error of the lower layers, whose text names settings of the recipe."""


class Fault(LuthierError):
    """An error that each API reports in the API's own format.

    ``code`` is the name of a Bedrock exception without the suffix Exception, such as
    ``Validation``, ``ResourceNotFound``, ``Conflict``, ``AccessDenied`` or ``Throttling``.
    ``parameter`` is the invalid member of the request.
    """

    default_rule: ClassVar[str] = ""

    def __init__(
        self,
        code: str,
        message: str,
        *,
        parameter: str | None = None,
        rule: str = "",
        **details: Unpack[FaultDetails],
    ) -> None:
        super().__init__(message, rule=rule)
        self.code, self.message, self.parameter, self.details = code, message, parameter, details

    @staticmethod
    def unavailable(error: OperationalError | ReadOnlyDisk) -> Fault:
        """Return the fault for a database or disk that is unreachable, full or read-only."""
        if isinstance(error, ReadOnlyDisk):
            text = "The server's disk is read-only. The operator must fix the disk."
            return Fault("ServiceUnavailable", text, retry_after=30)
        text = (
            "The server's database is unavailable. Try again; the request may have been completed."
        )
        return Fault("ServiceUnavailable", text, retry_after=5)

    @staticmethod
    def of(error: RefusedInput) -> Fault:
        """Return the fault for an error of the lower layers, unless an API has a more specific
        fault."""
        if isinstance(error, DoesNotFit):
            # The error names folders of the server, which clients must not see.
            full = isinstance(error, DiskFull)
            why = "The disk is full. The operator must free disk space." if full else ""
            text = f"The server has not enough memory or disk space now. {why}".rstrip()
            return Fault("ServiceUnavailable", text, retry_after=30)
        if isinstance(error, UnknownModel):
            return Fault("ResourceNotFound", "The files of the model are missing.")
        kinds = ((QuotaExceeded, "ServiceQuotaExceeded"), (WrongState, "Conflict"))
        code = next((name for kind, name in kinds if isinstance(error, kind)), "Validation")
        field = error.setting or error.problem.location.field or None
        text = error.text
        if error.setting and f"`{error.setting}`" not in text:
            text = f"`{error.setting}`: {text}"
        return Fault(code, text, parameter=field, rule=error.rule, refused=True)

    @staticmethod
    def of_inference(failed: InferenceFailed) -> Fault:
        """Return the fault for an inference error, with ``retry_after`` if a retry may succeed."""
        passes = failed.code in ("Throttling", "ModelNotReady", "ServiceUnavailable")
        details: FaultDetails = {"retry_after": 1} if passes else {}
        return Fault(failed.code, str(failed), **details)

    def with_setting_names(self, name: Callable[[str], str]) -> Fault:
        """Return the fault with recipe settings renamed to an API's names."""
        if not self.details.get("refused"):
            return self
        text = map_code(self.message, name)
        parameter = self.parameter and name(self.parameter)
        # A second call must not rename the API's names again.
        details: FaultDetails = {**self.details, "refused": False}
        return Fault(self.code, text, parameter=parameter, rule=self.rule, **details)


def fault_of(error: BaseException, request_id: str) -> Fault:
    """Return the fault for an error. Errors of the service are logged."""
    if isinstance(error, Fault):
        return error
    if isinstance(error, RefusedInput):
        return Fault.of(error)
    if isinstance(error, HTTPException):
        # Starlette found no route, or an invalid form in the body.
        unknown = error.status_code in (404, 405)
        return Fault("UnknownOperation" if unknown else "Validation", str(error.detail))
    if isinstance(error, asyncio.CancelledError):
        text = "The server shuts down. Try again; the request may have been completed."
        return Fault("ServiceUnavailable", text, retry_after=5)
    if isinstance(error, OperationalError | ReadOnlyDisk):
        # Outages of the database or disk are temporary: clients should retry.
        _log.error("database or disk trouble", exc_info=error, extra={"request_id": request_id})
        return Fault.unavailable(error)
    # Details of internal errors appear only in the log.
    _log.error("request failed", exc_info=error, extra={"request_id": request_id})
    text = f"Internal error. See request {request_id} in the server's log."
    return Fault("InternalServer", text)


def refusal_text(refused: InferenceRefused, model: str = "NAME") -> str:
    """Return the reason of a rejected query, with the operation that supports ``model``."""
    if not isinstance(refused, PredictionsOnly):
        return str(refused)
    value = [0.5, 0.7] if refused.reads == "window" else "..."
    body = json.dumps({"inputs": [{refused.reads: value}]})
    return f"{refused} Use {PREDICTIONS.replace('NAME', model)} with {body}."


@contextmanager
def inference_faults() -> Iterator[None]:
    """Convert errors of the engine to faults."""
    try:
        yield
    except InferenceRefused as refused:
        raise Fault("Validation", refusal_text(refused), parameter=refused.parameter) from refused
    except UnknownModel as refused:
        raise Fault("ResourceNotFound", "The model is deleted.") from refused
    except InferenceFailed as failed:
        raise Fault.of_inference(failed) from failed


def head_of(scope: Scope) -> RequestHead:
    """Return the head of an ASGI scope."""
    # raw_path is optional in ASGI.
    raw = scope.get("raw_path") or scope["path"].encode()
    # latin-1 maps every byte to one character, so that signatures cover the bytes as sent.
    headers = [(k.decode("latin-1").lower(), v.decode("latin-1")) for k, v in scope["headers"]]
    path, query = raw.decode("latin-1"), scope["query_string"].decode("latin-1")
    return RequestHead(scope["method"], path, query, headers, scope.get("scheme") == "https")


def query_pairs(query: str) -> list[tuple[bytes, bytes]]:
    """Return decoded keys and values in order."""
    split = [part.partition("=") for part in query.split("&") if part]
    return [(_unquote(name), _unquote(value)) for name, _, value in split]


def _unquote(text: str) -> bytes:
    # Handlers read + as a space, so signatures must, too: otherwise + could replace a signed %2B.
    return unquote_to_bytes(text.replace("+", " ").encode("latin-1"))


def check_head(head: RequestHead) -> None:
    """Reject a head that is too large, and a body with two lengths.

    With two lengths, a proxy that uses ``Content-Length`` and a server that uses
    ``Transfer-Encoding`` would disagree about the start of the next request (request smuggling).

    Raises:
        Fault: ``RequestEntityTooLarge`` or ``Validation``.
    """
    if sum(len(name) + len(value) for name, value in head.headers) > HEAD_BYTES:
        raise Fault("RequestEntityTooLarge", f"The headers have more than {HEAD_BYTES:,} bytes.")
    if head.has_two_lengths:
        raise Fault("Validation", "Send either Content-Length or Transfer-Encoding.")
    check_text(head)


def check_text(head: RequestHead) -> None:
    """Reject a path or query that is not UTF-8 or contains U+0000, which databases cannot store.

    Raises:
        Fault: ``Validation``, with the detail ``place`` set to ``path`` or ``query``.
    """
    # Only escapes and bytes above 127 decode to U+0000 or invalid UTF-8; h11 rejects a raw NUL.
    if "%" not in head.path + head.query and (head.path + head.query).isascii():
        return
    try:
        decode_storable(unquote_to_bytes(head.path.encode("latin-1")))
    except ValueError as error:
        text = f"The path is invalid: {error}."
        raise Fault("Validation", text, place="path") from None
    for name, value in query_pairs(head.query):
        try:
            decode_storable(name)
            decode_storable(value)
        except ValueError as error:
            shown = name.decode(errors="replace").replace("\0", "\ufffd")[:64]
            text = f"The query parameter '{shown}' is invalid: {error}."
            raise Fault("Validation", text, parameter=shown, place="query") from None


def service_of(head: RequestHead) -> str:
    """Return the unverified service in the credential scope of the header or a presigned query.

    An unsigned form is a request for STS: STS clients expect XML.
    """
    form = False
    for name, value in head.headers:
        form = form or (name == "content-type" and value.startswith(_FORM))
        if name == "authorization":
            _, _, after = value.partition("Credential=")
            parts = after.partition(",")[0].strip().split("/")
            return parts[3] if len(parts) > 3 else ""
    presigned = parse_qs(head.query).get("X-Amz-Credential", [""])[0].split("/")
    if len(presigned) > 3:
        return presigned[3]
    return "sts" if form and (head.method, head.path) == ("POST", "/") else ""


def timestamp(moment: datetime) -> str:
    """Return a time in AWS's format, such as ``2026-01-31T12:00:00.123Z``."""
    text = moment.astimezone(UTC).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")


def address_of(scope: Scope) -> str:
    """Return the IP address of the client; empty if unknown."""
    client = scope.get("client")
    return client[0] if client else ""
