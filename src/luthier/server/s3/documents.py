"""XML documents of S3 and STS: small trees of elements without attributes."""

from __future__ import annotations

from collections.abc import Iterable
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from luthier.server.http.messages import Fault, Response

NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"
DOCUMENT_LIMIT = 4 << 20
"""Maximum size of a request document in bytes: ten thousand parts, or a thousand keys."""
# XML parsers change a plain carriage return (13) to a line feed; tab and line feed stay.
_CONTROLS = {chr(code): f"&#{code};" for code in (*range(1, 9), 11, 12, 13, *range(14, 32))}

Content = str | int | bool | Iterable["Element | None"]
Element = tuple[str, "Content"]


def document(name: str, content: Content, namespace: str | None = NAMESPACE) -> bytes:
    """Return a document with the root element ``name``."""
    xmlns = f' xmlns="{namespace}"' if namespace else ""
    head = '<?xml version="1.0" encoding="UTF-8"?>\n'
    return f"{head}<{name}{xmlns}>{_text(content)}</{name}>".encode()


def xml_response(name: str, content: Content, **headers: str) -> Response:
    """Return a response with a document in S3's namespace."""
    body = document(name, content)
    return Response(200, body, {"Content-Type": "application/xml", **headers})


def _text(content: Content) -> str:
    # Keys may hold control characters, which ElementTree would write as they are.
    if isinstance(content, bool):
        return "true" if content else "false"
    if isinstance(content, (str, int)):
        return escape(str(content), _CONTROLS)
    elements = (each for each in content if each is not None)
    return "".join(f"<{name}>{_text(inner)}</{name}>" for name, inner in elements)


def parse(body: bytes, root: str) -> ElementTree.Element:
    """Return the root element of a document, without namespaces.

    Raises:
        Fault: ``MalformedXML``, also for a root element other than ``root`` and for a document
            type.
    """
    # A document type declares entities. No client sends one.
    if b"<!DOCTYPE" in body:
        raise malformed_xml()
    try:
        # LookupError and ValueError: unknown encodings, and encodings of several bytes.
        tree = ElementTree.fromstring(body)  # noqa: S314 - without entities there is nothing to expand
    except (ElementTree.ParseError, LookupError, ValueError):
        raise malformed_xml() from None
    for element in tree.iter():
        # Some clients send S3's namespace, and some send none.
        element.tag = element.tag.rpartition("}")[2]
    if tree.tag != root:
        raise malformed_xml()
    return tree


def malformed_xml() -> Fault:
    """Return the error for a document that S3 rejects."""
    text = (
        "The XML you provided was not well-formed or did not validate against our published schema"
    )
    return Fault("MalformedXML", text)
