"""Requests that are broken on the wire, to every route of every face, and what an answer has to be.

A request is drawn from a seed: one that is fine, signed or with a key, of which the path, the query,
the headers or the bytes of the body are then mistreated. It is sent as it is, past all clients' checks.
"""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

from broken_requests import NATIVE, OPENAI, RUNTIME, control, walked
from signing import signed

from luthier.api.s3.face import OPERATIONS as OBJECTS

SECONDS = 10.0
"""An answer may take so long at most, also on a machine that does other things."""
ALLOWED = (501, 503)
PREFIXES = {"openai": ("/v1/", "/openai/v1/"), "native": "/api/", "bedrock": "/"}
SIGNS = ("Traceback", "site-packages", 'File "', "luthier/api", "sqlalchemy", "pydantic", "psycopg")
"""What the inside of the service would show itself by."""
XML = b"""<Delete xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Object><Key>a</Key></Object></Delete>"""
COMPLETE = (
    b"<CompleteMultipartUpload><Part><PartNumber>1</PartNumber><ETag>a</ETag></Part>"
    b"</CompleteMultipartUpload>"
)

WORDS = (
    "", "a", "0", "-1", "1e308", "9" * 30, "9" * 400, "true", "null", "[]", "{}", "%", "%zz", "%ff",
    "%2F", "%2e%2e%2f", "..", ".", "//", "\\", ";", "&", "=", "+", "*", "'\"", "<a>", "é", "\u202e",
    "a\0", "😀", "x" * 300, "x" * 5000, "${aws:username}", "{{item}}",
    "arn:aws:bedrock:us-east-1:0:x/y", "s3://rows/../etc", "file:///etc/passwd", "2026-13-99T99:99:99Z",
    "bytes=0-", "bytes=-0",
    "bytes=5-2", "bytes=" + "0-1," * 200, "application/xml", "text/plain; charset=utf-99",
    "multipart/form-data", "multipart/form-data; boundary=" + "b" * 300, "gzip", "W/\"x\"",
    "Mon, 99 Foo 2026 99:99:99 GMT", "identity", "aws-chunked", "1,2", "sha256",
)  # fmt: skip
NAMES = (
    "content-type", "accept", "accept-encoding", "content-encoding", "range", "if-match",
    "if-none-match", "if-modified-since", "if-unmodified-since", "if-range", "last-event-id", "expires",
    "cache-control",
    "content-md5", "content-disposition", "content-language", "x-amz-copy-source", "x-amz-meta-a",
    "x-amz-metadata-directive", "x-amz-copy-source-range", "x-amz-checksum-crc32",
    "x-amz-checksum-sha256", "x-amz-sdk-checksum-algorithm", "x-amz-trailer",
    "x-amz-decoded-content-length", "x-amz-acl",
    "x-amz-expected-bucket-owner", "x-amz-storage-class", "x-amz-tagging", "x-amzn-bedrock-accept",
    "x-amzn-bedrock-content-type", "x-amzn-bedrock-guardrailidentifier", "x-amz-checksum-mode",
    "x-amz-checksum-type", "x-amz-mp-object-size", "origin", "cookie", "x-forwarded-for", "user-agent",
    "openai-organization", "x-stainless-retry-count", "x-request-id", "traceparent", "connection", "te",
)  # fmt: skip
METHODS = ("GET", "PUT", "POST", "DELETE", "HEAD", "PATCH", "OPTIONS", "TRACE", "FOO", "get")


@dataclass(frozen=True)
class Case:
    """One request, as bytes, and which face has to answer it."""

    face: str
    method: str
    target: str
    headers: Sequence[tuple[str, bytes]]
    body: bytes

    @property
    def wire(self) -> bytes:
        """What is sent."""
        lines = [f"{self.method} {self.target} HTTP/1.1".encode()]
        lines += [name.encode() + b": " + value for name, value in self.headers]
        return b"\r\n".join([*lines, b"", self.body])

    @property
    def has_nul(self) -> bool:
        """Whether a path, a query or a text in JSON has the character 0."""
        return "%00" in self.target or b"\\u0000" in self.body


@dataclass(frozen=True)
class Keys:
    """Of the principal that asks."""

    access_key: str
    secret: str
    api_key: str


def cases_of(face: str, further: Sequence[tuple[str, str]]) -> list[tuple[str, str, Any]]:
    """Fine requests to all routes of a face; ``further`` are methods and paths with names in braces."""
    known = {"openai": OPENAI, "native": NATIVE, "bedrock": [*RUNTIME, *control()]}[face]
    plain = [(method, _filled(path), {} if method == "POST" else None) for method, path in further]
    # An event stream of a job that goes on has no end.
    return [
        (method, f"{path}?follow=false" if path.endswith("/events") else path, body)
        for method, path, body in (*known, *plain)
    ]


def _filled(path: str) -> str:
    parts = ["train.jsonl" if part.startswith("{") else part for part in path.split("/")]
    return "/".join(parts)


def objects(random: Random) -> tuple[str, str, bytes]:
    """A fine request to one of the operations of S3."""
    operation = random.choice(OBJECTS)
    bucket = "rows" if operation.name != "DeleteBucket" else random.choice(("none", "fresh"))
    path = {"service": "/", "bucket": f"/{bucket}", "object": f"/{bucket}/train.jsonl"}[
        operation.level
    ]
    if operation.level == "object" and random.random() < 0.3:
        path = f"/{bucket}/" + random.choice(
            ("a/b c", "..", "é", "x" * 900, "a//b", "%", "a+b")
        ).replace(" ", "%20")
        path = quote(path, safe="/%+.")
    needs = {key: random.choice(("", "2", "1", "none")) for key in operation.needs}
    may = {key: random.choice(WORDS) for key in operation.may if random.random() < 0.3}
    query = "&".join(f"{key}={quote(value, safe='')}" for key, value in {**needs, **may}.items())
    body = {"DeleteObjects": XML, "CompleteMultipartUpload": COMPLETE}.get(operation.name, b"")
    if operation.method in ("PUT", "POST") and not body:
        body = random.choice((b"", b"rows", b"x" * 3000))
    return operation.method, path + (f"?{query}" if query else ""), body


def drawn(seed: int, face: str, cases: Sequence[tuple[str, str, Any]], keys: Keys) -> Case:
    """The case of a seed: the same each time."""
    random = Random(f"{face}{seed}")
    if face == "s3":
        method, target, body = objects(random)
    else:
        method, target, given = random.choice(cases)
        body = b"" if given is None else json.dumps(_changed(random, given)).encode()
    if random.random() < 0.35:
        target = _mistaken(random, target)
    if random.random() < 0.06:
        method = random.choice(METHODS)
    if body and random.random() < 0.4:
        body = _mangled(random, body)
    extra = [
        (random.choice(NAMES), random.choice(WORDS)) for _ in range(random.choice((0, 0, 1, 2, 5)))
    ]
    return _sent(random, face, method, target, extra, body, keys)


def _sent(
    random: Random,
    face: str,
    method: str,
    target: str,
    extra: list[tuple[str, str]],
    body: bytes,
    keys: Keys,
) -> Case:
    """With what proves who asks: mostly a signature for AWS's faces, and a key for the others."""
    plain = {name: value for name, value in extra if value.isascii()}
    if face in ("s3", "bedrock") and (face == "s3" or random.random() < 0.5):
        ready = signed(
            method, target, body, service="s3" if face == "s3" else "bedrock", headers=plain,
            keys=(keys.access_key, keys.secret),
        )  # fmt: skip
        headers = [(name, value.encode("latin-1", "replace")) for name, value in ready.headers]
    else:
        headers = [
            ("host", b"models.example"),
            ("authorization", f"Bearer {keys.api_key}".encode()),
        ]
        headers += [(name, value.encode()) for name, value in plain.items()]
    # What was not signed: not in ASCII, or twice.
    headers += [(name, value.encode()) for name, value in extra if not value.isascii()]
    if extra and random.random() < 0.2:
        headers.append((extra[0][0], random.choice((b"", b"twice", b"\xff\xfe", b"\x85"))))
    headers.append(("content-length", str(len(body)).encode()))
    return Case(face, method, target, headers, body)


def _changed(random: Random, body: Any) -> Any:
    """``body`` with values replaced by such as programs trip over."""
    body = json.loads(json.dumps(body))
    for _ in range(random.choice((0, 1, 1, 2, 3))):
        places = list(walked(body)) if isinstance(body, (dict, list)) else []
        if not places:
            break
        holder, key = random.choice(places)
        holder[key] = random.choice((
            random.choice(WORDS), None, True, [], {}, [None], -1, 0, 2**31, 2**63, -(2**63) - 1,
            10**400, 1e308, 5e-324, 0.5, "\ud800", "a\ud800b", [[[[[]]]]], {"": {"": {}}}, [{}] * 200,
            "x" * 70_000,
        ))  # fmt: skip
    return body


def _mangled(random: Random, body: bytes) -> bytes:
    """The same bytes, cut, doubled, or put into another coding."""
    at = random.randrange(len(body))
    return random.choice((
        body[:at], body[at:], body + body, body[:at] + b"\xff\xfe" + body[at:], b"\xef\xbb\xbf" + body,
        body[:at] + b"\xed\xa0\x80" + body[at:], body.decode(errors="replace").encode("utf-16"),
        b"[" * 50_000, b'{"a":' * 50_000, b"[" * 900 + b"]" * 900, b" ", b"null", b"1" * 5000, b'"a"',
        b"-", b"NaN", b"{}", b"[]", b"--b\r\n\r\n", b"<a>" * 5000,
        b"<!DOCTYPE a [<!ENTITY b 'c'>]><a>&b;</a>",
        b'<?xml version="1.0" encoding="utf-99"?><a/>',
        bytes(random.randrange(1, 256) for _ in range(200)),
    ))  # fmt: skip


def _mistaken(random: Random, target: str) -> str:
    """Another path or query, of characters that a request line may hold."""
    plain, mark, query = target.partition("?")
    word = random.choice(WORDS)
    raw = (
        word
        if word.isascii() and word.isprintable() and " " not in word and "#" not in word
        else ""
    )
    part = raw if raw and random.random() < 0.5 else quote(word, safe="")
    if random.random() < 0.5:
        segments = plain.split("/")
        segments[random.randrange(1, len(segments)) if len(segments) > 1 else 0] = part
        plain = "/".join(segments)
        plain = plain if plain.startswith("/") else f"/{plain}"
    else:
        name = random.choice(
            ("limit", "after", "maxResults", "nextToken", "order", "metadata[a]", "x", "nameContains",
             "X-Amz-Date", "X-Amz-Signature", "X-Amz-Credential", "uploads", "list-type", "prefix",
             "follow")
        )  # fmt: skip
        pair = random.choice((f"{name}={part}", name, f"={part}", "&&", f"{name}={part}&{name}=b"))
        query = f"{query}&{pair}" if query else pair
        mark = "?"
    return (
        f"{plain}{mark}{query}"[:12_000].replace("#", "%23").replace("follow=", "follow=false&f=")
    )


@dataclass(frozen=True)
class Answered:
    """What came back."""

    status: int
    headers: Any
    body: bytes


def send(place: tuple[str, int], case: Case) -> Answered:
    """The answer; ``TimeoutError`` where none came to its end in time."""
    with socket.create_connection(place, SECONDS) as connection:
        connection.sendall(case.wire)
        answer = http.client.HTTPResponse(connection, method=case.method)
        with answer:
            answer.begin()
            return Answered(answer.status, answer.headers, answer.read())


def wrong(case: Case, found: Answered) -> str:
    """What is wrong with an answer; empty where nothing is."""
    if found.status >= 500 and found.status not in ALLOWED:
        return f"status {found.status}"
    text = found.body.decode("utf-8", "replace")
    if signs := [
        sign for sign in SIGNS if sign in text and sign not in case.wire.decode("latin-1")
    ]:
        return f"it shows {signs}"
    if found.status < 400 or case.method == "HEAD" or found.status == 304:
        return ""
    if "Invalid HTTP request received." in text:
        return ""  # the server's own, before there is a face
    # Another path may be another face's, which speaks as it does.
    face = (
        case.face if case.face == "s3" or case.target.startswith(PREFIXES[case.face]) else "bedrock"
    )
    try:
        return _shape(face, found, text)
    except (ValueError, KeyError, TypeError, ElementTree.ParseError) as error:
        return f"it is no refusal of {case.face}: {error!r}"


def _shape(face: str, found: Answered, text: str) -> str:
    if face == "s3":
        root = ElementTree.fromstring(text)
        return "" if root.tag == "Error" and root.findtext("Code") else "no <Error>"
    body = json.loads(text)
    if face == "bedrock":
        code = found.headers["x-amzn-errortype"] or ""
        return "" if isinstance(body["message"], str) and code.endswith("Exception") else "no code"
    error = body["error"]
    if face == "native":
        return "" if error["code"] and error["message"] else "no code"
    wanted = {"message", "type", "param", "code"}
    return "" if error.keys() == wanted and error["message"] and error["type"] else "no error"
