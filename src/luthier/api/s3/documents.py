"""XML as S3 writes and reads it, and as STS writes it; errors among it.

Small trees of elements: no attributes, no entities.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from xml.parsers import expat
from xml.sax.saxutils import escape

from luthier.api.http.messages import Fault, Response
from luthier.errors import DoesNotFit, ObjectRefused, QuotaExceeded

NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"
DOCUMENT_LIMIT = 4 << 20
"""Bytes of a document at most: ten thousand parts, or a thousand keys."""
_DEPTH = 8
_ELEMENTS = 100_000
_CONTROLS = {chr(code): f"&#{code};" for code in (*range(1, 9), 11, 12, 13, *range(14, 32))}

Content = str | int | bool | Iterable["Element | None"]
Element = tuple[str, "Content"]
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


def document(name: str, content: Sequence[Element | None], namespace: str = NAMESPACE) -> bytes:
    """A document of S3's namespace, or of another one. Elements that are ``None`` are left out."""
    inner = "".join(_text(each) for each in content if each is not None)
    head = '<?xml version="1.0" encoding="UTF-8"?>\n'
    return f'{head}<{name} xmlns="{namespace}">{inner}</{name}>'.encode()


def error_document(fields: Sequence[Element]) -> bytes:
    """An error, which S3 writes without a namespace."""
    inner = "".join(_text(each) for each in fields)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<Error>{inner}</Error>'.encode()


def iso(moment: datetime) -> str:
    """A time as S3 writes it in documents: UTC, milliseconds."""
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03d}Z"


def _text(element: Element) -> str:
    name, content = element
    if isinstance(content, bool):
        inner = "true" if content else "false"
    elif isinstance(content, (str, int)):
        inner = escape(str(content), _CONTROLS)
    else:
        inner = "".join(_text(each) for each in content if each is not None)
    return f"<{name}>{inner}</{name}>"


@dataclass
class Node:
    """An element that was read."""

    name: str
    """Without its namespace."""
    text: str = ""
    children: list[Node] = field(default_factory=list)

    def all(self, name: str) -> list[Node]:
        """The children of that name."""
        return [child for child in self.children if child.name == name]

    def value(self, name: str) -> str | None:
        """Text of the first child of that name; ``None`` where there is none."""
        return next((child.text for child in self.children if child.name == name), None)


def parse(body: bytes, root: str) -> Node:
    """The tree of a document whose outermost element is ``root``.

    Raises:
        Fault: ``MalformedXML``; a document type, which is where entities are declared, included.
    """
    reader = _Reader()
    parser = expat.ParserCreate(namespace_separator=" ")
    # Text comes in large pieces, however many lines and references it has.
    parser.buffer_text, parser.buffer_size = True, 1 << 20
    parser.StartElementHandler = reader.start
    parser.EndElementHandler = reader.end
    parser.CharacterDataHandler = reader.characters
    parser.StartDoctypeDeclHandler = reader.refuse
    try:
        parser.Parse(body, True)
    # A coding that is not known, or of several bytes a character, is no error of the parser.
    except (expat.ExpatError, LookupError, ValueError):
        raise malformed_xml() from None
    if reader.root is None or reader.root.name != root:
        raise malformed_xml()
    return reader.root


def malformed_xml() -> Fault:
    """The refusal of a document."""
    text = (
        "The XML you provided was not well-formed or did not validate against our published schema"
    )
    return Fault("MalformedXML", text)


class _Reader:
    def __init__(self) -> None:
        self.root: Node | None = None
        self.open: list[Node] = []
        self.count = 0

    def start(self, name: str, attributes: dict[str, str]) -> None:
        node = Node(re.sub(r"^.* ", "", name))
        if self.open:
            self.open[-1].children.append(node)
        else:
            self.root = node
        self.open.append(node)
        self.count += 1
        if len(self.open) > _DEPTH or self.count > _ELEMENTS:
            raise malformed_xml()

    def end(self, name: str) -> None:
        self.open.pop()

    def characters(self, data: str) -> None:
        self.open[-1].text += data

    def refuse(self, *declared: object) -> None:
        raise malformed_xml()


def refusal(fault: Fault, request_id: str) -> Response:
    """``fault`` as clients of S3 expect it.

    Of its details, ``headers`` are sent with it, and ``fields`` stand in the document.
    """
    code = _NAMES.get(fault.code.removesuffix("Exception"), fault.code)
    code = {"path": "InvalidURI", "query": "InvalidArgument"}.get(
        str(fault.details.get("place")), code
    )
    headers = fault.details.get("headers", {})
    status = _STATUS.get(code, 400)
    if status == 304:
        return Response(status, b"", headers)
    elements = [("Code", code), ("Message", fault.message)]
    elements += fault.details.get("fields", {}).items()
    body = error_document([*elements, ("RequestId", request_id)])
    return Response(status, body, {"Content-Type": "application/xml", **headers})


def as_fault(error: ObjectRefused | DoesNotFit | QuotaExceeded) -> Fault:
    """A refusal of the store as a fault of this face.

    AWS has a code for too many buckets alone; the others are told as Ceph's gateway tells them.
    """
    if isinstance(error, QuotaExceeded):
        return Fault("TooManyBuckets" if error.quota == "buckets" else "QuotaExceeded", str(error))
    if isinstance(error, ObjectRefused):
        return Fault(error.code, error.message)
    return Fault.of(error)
