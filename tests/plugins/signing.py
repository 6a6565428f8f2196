"""Requests signed by botocore, as they come over the wire."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from threading import RLock
from unittest.mock import patch
from urllib.parse import urlsplit

import pytest
from botocore.auth import S3SigV4Auth, S3SigV4QueryAuth, SigV4Auth, SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from luthier.server.http.messages import Caller, Fault, RequestHead, Signed
from luthier.server.sigv4 import Credential, verify

ACCESS_KEY, SECRET = "AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
HOST = "models.example:8080"
CALLER = Caller("000000000000", "root", ("administrator",))
NOW = datetime(2026, 1, 31, 12, 0, 0, tzinfo=UTC)

_ONE_AT_A_TIME = RLock()


@contextmanager
def clock(at: datetime) -> Iterator[None]:
    """Set botocore's clock; awscrt signs if installed.

    Only one thread at a time may patch the clock.
    """

    def now(remove_tzinfo: bool = True) -> datetime:
        return at.replace(tzinfo=None) if remove_tzinfo else at

    with (
        _ONE_AT_A_TIME,
        patch("botocore.auth.get_current_datetime", now),
        patch("botocore.crt.auth.get_current_datetime", now),
    ):
        yield


def signed(
    method: str = "GET",
    target: str = "/",
    body: bytes = b"",
    *,
    service: str = "bedrock",
    at: datetime | None = None,
    headers: Mapping[str, str] | None = None,
    keys: tuple[str, str] = (ACCESS_KEY, SECRET),
    region: str = "us-east-1",
    scheme: str = "http",
) -> RequestHead:
    """Return a request with botocore's ``Authorization`` header."""
    kind = S3SigV4Auth if service == "s3" else SigV4Auth
    request = _request(method, target, body, headers, scheme)
    with clock(at or datetime.now(UTC)):
        kind(Credentials(*keys), service, region).add_auth(request)
    return _head(request)


def presigned(
    method: str = "GET",
    target: str = "/",
    body: bytes = b"",
    *,
    service: str = "s3",
    at: datetime | None = None,
    expires: int = 300,
    headers: Mapping[str, str] | None = None,
    keys: tuple[str, str] = (ACCESS_KEY, SECRET),
    host: str = HOST,
) -> RequestHead:
    """Return a request with botocore's presigned query."""
    kind = S3SigV4QueryAuth if service == "s3" else SigV4QueryAuth
    request = _request(method, target, body, headers, "http", host)
    with clock(at or datetime.now(UTC)):
        kind(Credentials(*keys), service, "us-east-1", expires=expires).add_auth(request)
    return _head(request)


def short_term_key(
    keys: tuple[str, str] = (ACCESS_KEY, SECRET),
    *,
    at: datetime | None = None,
    expires: int = 3600,
    action: str = "CallWithBearerToken",
    host: str = "bedrock.amazonaws.com",
    service: str = "bedrock",
) -> str:
    """Return a short-term key like Amazon's token generators."""
    head = presigned(
        "POST", f"/?Action={action}", service=service, at=at, expires=expires, keys=keys, host=host,
    )  # fmt: skip
    text = f"{host}/?{head.query}&Version=1"
    return "bedrock-api-key-" + base64.b64encode(text.encode()).decode()


def _request(
    method: str,
    target: str,
    body: bytes,
    headers: Mapping[str, str] | None,
    scheme: str,
    host: str = HOST,
) -> AWSRequest:
    given = {"Host": host, "User-Agent": "tests", **(headers or {})}
    return AWSRequest(method, f"{scheme}://{host}{target}", headers=given, data=body)


def _head(request: AWSRequest) -> RequestHead:
    url = urlsplit(request.url)
    headers = [(name.lower(), str(value)) for name, value in request.headers.items()]
    return RequestHead(request.method, url.path, url.query, headers, url.scheme == "https")


def keys(access_key: str) -> Credential | None:
    return Credential(SECRET, CALLER) if access_key == ACCESS_KEY else None


def verified(head: RequestHead, body: bytes | None = b"", at: datetime = NOW) -> Signed:
    return verify(head, body, keys, at)


def refused(head: RequestHead, body: bytes | None = b"", at: datetime = NOW) -> str:
    with pytest.raises(Fault) as caught:
        verified(head, body, at)
    assert SECRET not in caught.value.message
    return caught.value.code


def header(head: RequestHead, name: str) -> str:
    return next(value for key, value in head.headers if key == name)


def with_header(head: RequestHead, name: str, value: str | None) -> RequestHead:
    kept = [(key, text) for key, text in head.headers if key != name]
    return replace(head, headers=kept if value is None else [*kept, (name, value)])
