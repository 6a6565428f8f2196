"""What the head of a request tells before its body is read. Nothing of it is verified here."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any
from urllib.parse import parse_qs, unquote_to_bytes

from luthier.api.observability import Observed
from luthier.api.sigv4 import query_pairs
from luthier.api.wire import Call, Caller, Fault, Head, Route
from luthier.store.database import now
from luthier.store.text import check_storable

Scope = MutableMapping[str, Any]


def head_of(scope: Scope) -> Head:
    """The request of an ASGI scope as it came over the wire."""
    raw = scope.get("raw_path") or scope["path"].encode()
    headers = [(k.decode("latin-1").lower(), v.decode("latin-1")) for k, v in scope["headers"]]
    path, query = raw.decode("latin-1"), scope["query_string"].decode("latin-1")
    return Head(scope["method"], path, query, headers, scope.get("scheme") == "https")


def check_text(head: Head, of_path: str = "Validation", of_query: str = "Validation") -> None:
    """Refuse a path or a query that is not UTF-8 or holds U+0000: no database keeps such names.

    Raises:
        Fault: with the codes ``of_path`` and ``of_query``, the latter with the parameter's name.
    """
    if "%" not in head.path + head.query and (head.path + head.query).isascii():
        return
    try:
        check_storable(unquote_to_bytes(head.path.encode("latin-1")).decode())
    except ValueError as error:
        raise Fault(of_path, f"The path cannot be used: {_reason(error)}.") from None
    for name, value in query_pairs(head.query):
        try:
            check_storable(name.decode())
            check_storable(value.decode())
        except ValueError as error:
            shown = name.decode(errors="replace").replace("\0", "\ufffd")[:64]
            text = f"The query parameter '{shown}' cannot be used: {_reason(error)}."
            raise Fault(of_query, text, parameter=shown) from None


def _reason(error: ValueError) -> str:
    return "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)


def call_of(
    head: Head, body: bytes, route: Route, caller: Caller, seen: Observed, json_values: int
) -> Call:
    """What a handler is given of a request of ``caller``, who was let in."""
    return Call(
        seen.request_id,
        caller,
        head.method,
        head.path,
        parse_qs(head.query, keep_blank_values=True),
        dict(head.headers),
        body,
        now(),
        route.params,
        seen.address,
        json_values=json_values,
    )


_FORM = "application/x-www-form-urlencoded"


def service_of(head: Head) -> str:
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


def address_of(scope: Scope) -> str:
    """Where the request comes from; empty where that is not known."""
    client = scope.get("client")
    return client[0] if client else ""
