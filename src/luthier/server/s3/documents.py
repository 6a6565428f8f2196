"""XML as S3 writes and reads it, and as STS writes it.

Small trees of elements: no attributes, no entities.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from xml.parsers import expat
from xml.sax.saxutils import escape

from luthier.server.http.messages import Fault, Response

NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"
DOCUMENT_LIMIT = 4 << 20
"""Bytes of a document at most: ten thousand parts, or a thousand keys."""
_DEPTH = 8
_ELEMENTS = 100_000
_CONTROLS = {chr(code): f"&#{code};" for code in (*range(1, 9), 11, 12, 13, *range(14, 32))}

Content = str | int | bool | Iterable["Element | None"]
Element = tuple[str, "Content"]


def document(name: str, content: Content, namespace: str | None = NAMESPACE) -> bytes:
    """A document of S3's namespace, of another one, or of none."""
    xmlns = f' xmlns="{namespace}"' if namespace else ""
    head = '<?xml version="1.0" encoding="UTF-8"?>\n'
    return f"{head}<{name}{xmlns}>{_text(content)}</{name}>".encode()


def xml_response(name: str, content: Content, **headers: str) -> Response:
    """A document of S3's namespace as an answer."""
    body = document(name, content)
    return Response(200, body, {"Content-Type": "application/xml", **headers})


def _text(content: Content) -> str:
    """What stands in an element. Elements that are ``None`` are left out."""
    if isinstance(content, bool):
        return "true" if content else "false"
    if isinstance(content, (str, int)):
        return escape(str(content), _CONTROLS)
    elements = (each for each in content if each is not None)
    return "".join(f"<{name}>{_text(inner)}</{name}>" for name, inner in elements)


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
