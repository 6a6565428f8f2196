"""What faces receive and give: a head, who signed it, a request that is let in, and its response.

A face never sees a socket. The application (``luthier.server.http.application``) reads the request,
finds out who sent it, and hands a :class:`Request` to the face whose routes match; what comes back
is a :class:`Response`, or a :class:`Fault` that the face writes in its own way. Nothing that a head
tells is verified here.
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
from typing import Any, ClassVar
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
from luthier.escaping import map_code
from luthier.graders.json_schema import depth_of
from luthier.inference.inference import InferenceFailed, InferenceRefused, PredictionsOnly
from luthier.server.tables.text import check_storable, decode_storable

HEAD_BYTES = 64 << 10
"""Maximum size of the headers of a request, in bytes."""
JSON_DEPTH = 200
"""Levels of objects and lists in a body."""
JSON_VALUES = 500_000
"""Values in a body: each takes up to 200 bytes of memory."""
PREDICTIONS = "POST /api/v1/models/NAME/predictions"
"""How models that read are asked, of every face."""
_FORM = "application/x-www-form-urlencoded"
_log = logging.getLogger("luthier.server")


def parse_digits(text: str, most: int = 18) -> int | None:
    """The number that ``text`` is in at most so many digits; ``None`` for what is none.

    Digits of other scripts are numbers to Python, and thousands of them cost time.
    """
    return int(text) if re.fullmatch(rf"[0-9]{{1,{most}}}", text) else None


@dataclass(frozen=True)
class Caller:
    """The sender of a request, as its signature or key proved."""

    account: str
    """Twelve digits; what one account owns does not exist for another."""
    user: str
    roles: tuple[str, ...]
    """Role of the user and of the key; an operation needs the permission of each."""
    id: str = ""
    """``AIDA…``, as AWS identifies a user."""

    @property
    def arn(self) -> str:
        """ARN of the user."""
        return f"arn:aws:iam::{self.account}:user/{self.user}"


@dataclass(frozen=True)
class RequestHead:
    """A request before its body, as it came over the wire."""

    method: str
    path: str
    """Raw: percent-encoded as sent."""
    query: str
    """Raw, without the question mark."""
    headers: Sequence[tuple[str, str]]
    """Names in lower case, in their order; a name that was sent twice stands here twice."""
    tls: bool

    @property
    def has_two_lengths(self) -> bool:
        """Whether the head has both ``Content-Length`` and ``Transfer-Encoding``."""
        return {"content-length", "transfer-encoding"} <= {name for name, _ in self.headers}

    @property
    def body_length(self) -> int | None:
        """Bytes of the body by what the head says of it; ``None`` where it does not say."""
        if any(name == "transfer-encoding" for name, _ in self.headers):
            return None
        lengths = [value for name, value in self.headers if name == "content-length"]
        return int(lengths[0]) if lengths and lengths[0].isdigit() else 0


@dataclass(frozen=True)
class Signed:
    """A caller who was let in, and what a body that is still to come has to match."""

    caller: Caller
    service: str = ""
    """Of the credential scope: ``bedrock``, ``bedrock-mantle``, ``s3`` or ``sts``; empty for a bearer
    key."""
    payload: str = ""
    """``X-Amz-Content-SHA256`` as it was signed: hexadecimal, ``UNSIGNED-PAYLOAD``, ``STREAMING-…``."""
    signature: str = ""
    """Hexadecimal: what the signatures of chunks go on from."""
    signing_key: bytes = field(default=b"", repr=False)
    scope: str = ""
    """``yyyymmdd/region/service/aws4_request``."""
    moment: str = ""
    """``X-Amz-Date`` as it was sent."""


@dataclass(frozen=True)
class Request:
    """One request that was let in."""

    request_id: str
    caller: Caller
    method: str
    path: str
    """As it was sent: segments still percent-encoded, without the query."""
    query: Mapping[str, list[str]]
    """Decoded; a key without a value has an empty one."""
    headers: Mapping[str, str]
    """By names in lower case."""
    body: bytes
    received: datetime
    params: Mapping[str, str] = field(default_factory=dict)
    """Segments of the path by the names that the route gives them, each decoded once."""
    address: str = ""
    """Of the client; empty where it is not known."""
    signed: Signed | None = None
    """What was signed of a body that is read as it comes; ``body`` is empty then."""
    tls: bool = False
    """Whether it came encrypted, to this server itself."""

    @property
    def account(self) -> str:
        """Whose things are meant."""
        return self.caller.account

    @cached_property
    def json(self) -> Any:
        """The body as JSON; ``None`` where there is none.

        Raises:
            ValueError: for what is not JSON in UTF-8 or is nested too deeply.
            Fault: RequestEntityTooLarge for more than ``JSON_VALUES`` values; Validation for a number
                that is too large to hold.
        """
        return parse_json(self.body) if self.body.strip() else None


def _check_texts(value: Any) -> None:
    """Refuse text that no database keeps."""
    # In Python, so that others run meanwhile: to write 24 MB as JSON again takes seconds at a stretch.
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
    """Return a client's JSON; raises as :attr:`Request.json`.

    Refused is, too, text that no database keeps: U+0000, and halves of surrogate pairs.
    """
    # Counted as they would be outside of texts: to tell them apart takes as long as parsing.
    if sum(map(data.count, (b",", b"[", b"{"))) > JSON_VALUES:
        raise Fault("RequestEntityTooLarge", f"The body has more than {JSON_VALUES:,} JSON values.")
    try:
        # Given bytes, json would take UTF-16 and halves of pairs as well.
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    try:
        found = json.loads(text, parse_constant=_not_finite, parse_float=_finite)
        if data.count(b"[") + data.count(b"{") > JSON_DEPTH and depth_of(found) > JSON_DEPTH:
            # It can be read, and not written again by code that calls itself for each level.
            raise ValueError(f"it is nested deeper than {JSON_DEPTH} levels")
        if b"\\u" in data:
            # Read first: only so are pairs whole, and backslashes told from escapes.
            _check_texts(found)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return found


def _not_finite(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


def _finite(text: str) -> float:
    if math.isinf(number := float(text)):
        shown = text if len(text) <= 20 else f"{text[:20]}…"
        raise Fault("Validation", f"The body has the number {shown}, which is too large to hold.")
    return number


@dataclass(frozen=True)
class Response:
    """What a face gives back: a whole body, or pieces as they come."""

    status: int = 200
    body: bytes | Iterator[bytes] = b""
    """Pieces are sent one by one; the iterator is closed as soon as the client has hung up."""
    headers: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def json(value: Any, status: int = 200, **headers: str) -> Response:
        """``value`` as JSON."""
        body = json.dumps(value, separators=(",", ":")).encode()
        return Response(status, body, {"Content-Type": "application/json", **headers})


_TROUBLES = {
    "is full": "has no room: its operator frees some of its disk",
    "No space left": "has no room: its operator frees some of its disk",
    "readonly": "takes no writes now",
    "read-only": "takes no writes now",
    "locked": "is busy",
}
"""What databases say, and what it means."""


class Fault(LuthierError):
    """A refusal or failure that the client is told of; each face has its own shape for it.

    ``code`` is the name of Bedrock's exception without the word Exception, such as ``Validation``,
    ``ResourceNotFound``, ``Conflict``, ``AccessDenied``, ``Throttling``; ``parameter`` is the member of
    the request that is meant, where it is one.
    """

    default_rule: ClassVar[str] = ""

    def __init__(
        self,
        code: str,
        message: str,
        *,
        parameter: str | None = None,
        rule: str = "",
        **details: Any,
    ) -> None:
        super().__init__(message, rule=rule)
        self.code, self.message, self.parameter, self.details = code, message, parameter, details

    @staticmethod
    def unavailable(error: OperationalError | ReadOnlyDisk) -> Fault:
        """What a database or store that is away, full or read-only becomes, or such a disk."""
        if isinstance(error, ReadOnlyDisk):
            text = "The service's disk takes no writes now: its operator mends that."
            return Fault("ServiceUnavailable", text, retry_after=30)
        said = str(error.orig)
        why = next((text for word, text in _TROUBLES.items() if word in said), "does not answer")
        text = f"The service's database {why}. Ask again; what was asked may have been done."
        return Fault("ServiceUnavailable", text, retry_after=5)

    @staticmethod
    def of(error: RefusedInput) -> Fault:
        """What a refusal of the parts below becomes, where a face says nothing closer."""
        if isinstance(error, DoesNotFit):
            # Names of the server's folders are not for clients.
            why = (
                "Its disk is full: its operator frees some." if isinstance(error, DiskFull) else ""
            )
            text = f"The server has no room for it now. {why}".rstrip()
            return Fault("ServiceUnavailable", text, retry_after=30)
        if isinstance(error, UnknownModel):
            return Fault("ResourceNotFound", "The files of the model are not there.")
        kinds = ((QuotaExceeded, "ServiceQuotaExceeded"), (WrongState, "Conflict"))
        code = next((name for kind, name in kinds if isinstance(error, kind)), "Validation")
        field = error.setting or error.problem.location.field or None
        return Fault(code, error.text, parameter=field, rule=error.rule, refused=True)

    @staticmethod
    def of_inference(failed: InferenceFailed) -> Fault:
        """What a failure of a model becomes; who is told to come again is told when."""
        passes = failed.code in ("Throttling", "ModelNotReady", "ServiceUnavailable")
        details: dict[str, Any] = {"retry_after": 1} if passes else {}
        return Fault(failed.code, str(failed), **details)

    def with_setting_names(self, name: Callable[[str], str]) -> Fault:
        """Return the fault with an API's names for settings, if it names settings as recipes do."""
        if not self.details.get("refused"):
            return self
        text = map_code(self.message, name)
        parameter = self.parameter and name(self.parameter)
        details = {**self.details, "refused": False}
        return Fault(self.code, text, parameter=parameter, rule=self.rule, **details)


def fault_of(error: BaseException, request_id: str) -> Fault:
    """Return the fault that an API reports for an error, and log errors of the service."""
    if isinstance(error, Fault):
        return error
    if isinstance(error, RefusedInput):
        return Fault.of(error)
    if isinstance(error, HTTPException):
        # Starlette found no route, or a form in the body that cannot be read.
        unknown = error.status_code in (404, 405)
        return Fault("UnknownOperation" if unknown else "Validation", str(error.detail))
    if isinstance(error, asyncio.CancelledError):
        text = "The service is ending. Ask again; what was asked may have been done."
        return Fault("ServiceUnavailable", text, retry_after=5)
    if isinstance(error, OperationalError | ReadOnlyDisk):
        # The database or the disk may come back: clients are told to retry.
        _log.error("database or disk trouble", exc_info=error, extra={"request_id": request_id})
        return Fault.unavailable(error)
    # Only the log has the details of an error inside the service.
    _log.error("request failed", exc_info=error, extra={"request_id": request_id})
    text = f"Something failed inside the service; its log has request {request_id}."
    return Fault("InternalServer", text)


def refusal_text(refused: InferenceRefused) -> str:
    """Why a model cannot be asked so, and how it can be, where that is by an operation of ours."""
    hint = f" Ask it by {PREDICTIONS}." if isinstance(refused, PredictionsOnly) else ""
    return f"{refused}{hint}"


@contextmanager
def inference_faults() -> Iterator[None]:
    """What the engine refuses or fails at, as faults."""
    try:
        yield
    except InferenceRefused as refused:
        raise Fault("Validation", refusal_text(refused), parameter=refused.parameter) from refused
    except UnknownModel as refused:
        raise Fault("ResourceNotFound", "The model is no longer there.") from refused
    except InferenceFailed as failed:
        raise Fault.of_inference(failed) from failed


def head_of(scope: Scope) -> RequestHead:
    """The request of an ASGI scope as it came over the wire."""
    raw = scope.get("raw_path") or scope["path"].encode()
    headers = [(k.decode("latin-1").lower(), v.decode("latin-1")) for k, v in scope["headers"]]
    path, query = raw.decode("latin-1"), scope["query_string"].decode("latin-1")
    return RequestHead(scope["method"], path, query, headers, scope.get("scheme") == "https")


def query_pairs(query: str) -> list[tuple[bytes, bytes]]:
    """Keys and values in their order, decoded."""
    split = [part.partition("=") for part in query.split("&") if part]
    return [(_unquote(name), _unquote(value)) for name, _, value in split]


def _unquote(text: str) -> bytes:
    return unquote_to_bytes(text.replace("+", " ").encode("latin-1"))


def check_head(head: RequestHead) -> None:
    """Reject a head that is too large, and a body with two lengths.

    A proxy that believes ``Content-Length`` and a server that believes ``Transfer-Encoding`` would
    disagree where the next request begins.

    Raises:
        Fault: ``RequestEntityTooLarge`` or ``Validation``.
    """
    if sum(len(name) + len(value) for name, value in head.headers) > HEAD_BYTES:
        raise Fault("RequestEntityTooLarge", f"The headers have more than {HEAD_BYTES:,} bytes.")
    if head.has_two_lengths:
        raise Fault("Validation", "Send either Content-Length or Transfer-Encoding.")
    check_text(head)


def check_text(head: RequestHead) -> None:
    """Refuse a path or a query that is not UTF-8 or holds U+0000: no database keeps such names.

    Raises:
        Fault: Validation, with ``path`` or ``query`` as ``place`` in its details.
    """
    if "%" not in head.path + head.query and (head.path + head.query).isascii():
        return
    try:
        decode_storable(unquote_to_bytes(head.path.encode("latin-1")))
    except ValueError as error:
        text = f"The path cannot be used: {error}."
        raise Fault("Validation", text, place="path") from None
    for name, value in query_pairs(head.query):
        try:
            decode_storable(name)
            decode_storable(value)
        except ValueError as error:
            shown = name.decode(errors="replace").replace("\0", "\ufffd")[:64]
            text = f"The query parameter '{shown}' cannot be used: {error}."
            raise Fault("Validation", text, parameter=shown, place="query") from None


def service_of(head: RequestHead) -> str:
    """The service of the credential scope, in the header or in a presigned query; unverified.

    A form that nobody signed is one of STS: only its clients send such, and they read XML alone.
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
    """``2026-01-31T12:00:00.123Z``, as AWS tells times: what is below a millisecond is cut off."""
    text = moment.astimezone(UTC).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")


def address_of(scope: Scope) -> str:
    """Where the request comes from; empty where that is not known."""
    client = scope.get("client")
    return client[0] if client else ""
