"""Signatures: the published test vectors, and requests signed by botocore."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import quote

import pytest
from signing import (
    CALLER,
    NOW,
    SECRET,
    header,
    presigned,
    refused,
    signed,
    verified,
    with_header,
)

from luthier.server import sigv4
from luthier.server.http.messages import RequestHead
from luthier.server.sigv4 import SignedService
from real_data import FOLDER, needs_data

VECTORS = FOLDER / "aws4_testsuite"
ARN = "arn:aws:bedrock:us-east-1:000000000000:custom-model/hf.smol/abcdefabcdef"


# --- the published vectors


def vector_folders() -> list[Path]:
    return sorted(path.parent for path in VECTORS.rglob("*.req"))


def read_request(path: Path) -> tuple[RequestHead, bytes]:
    top, _, body = path.read_bytes().partition(b"\n\n")
    first, *lines = top.decode("latin-1").split("\n")
    method, target = first.removesuffix(" HTTP/1.1").split(" ", 1)
    headers: list[tuple[str, str]] = []
    for line in lines:
        if line.startswith(" "):
            name, value = headers.pop()
            headers.append((name, f"{value}\n{line}"))
        else:
            name, _, value = line.partition(":")
            headers.append((name.lower(), value if name == "My-Header1" else value.strip()))
    path_, _, query = target.partition("?")
    return RequestHead(method, path_, query, headers, tls=True), body


@needs_data("aws4_testsuite")
@pytest.mark.parametrize("folder", vector_folders(), ids=lambda path: path.name)
def test_published_vector_signature_matches(folder: Path) -> None:
    read = {end: folder / f"{folder.name}.{end}" for end in ("sreq", "creq", "sts", "authz")}
    head, body = read_request(read["sreq"])
    claim = sigv4.parse_claim(head)
    payload = sigv4.hashlib.sha256(body).hexdigest()
    canonical = sigv4.canonical_request(head, claim, payload)
    assert canonical == read["creq"].read_bytes()
    assert sigv4.string_to_sign(claim, canonical) == read["sts"].read_text()
    secret = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
    key = sigv4.signing_key(secret, claim.day, claim.region, claim.service)
    # One .sreq file has the signature of a different case; every .authz is correct.
    assert read["authz"].read_text().endswith(sigv4.signature(key, claim, canonical))


AMBIGUOUS = {
    "get-relative", "get-relative-relative", "get-slash", "get-slash-dot-slash", "get-slashes",
    "get-slash-pointless-dot", "post-sts-header-after",
}  # fmt: skip
"""Valid by the specification, but rejected for the form of the path or an unsigned token."""


@needs_data("aws4_testsuite")
@pytest.mark.parametrize("folder", vector_folders(), ids=lambda path: path.name)
def test_published_vector_as_a_request(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sigv4.SERVICES, "service", SignedService(timedelta(minutes=5)))
    head, body = read_request(folder / f"{folder.name}.sreq")
    # One .sreq file has the signature of a different case.
    authorization = (folder / f"{folder.name}.authz").read_text()
    head = with_header(head, "authorization", authorization)
    at = datetime(2015, 8, 30, 12, 36, tzinfo=UTC)
    if folder.name in ("post-sts-header-before", "get-vanilla-with-session-token"):
        assert refused(head, body, at) == "UnrecognizedClient"  # a signed session token
    elif folder.name in AMBIGUOUS:
        assert refused(head, body, at) == "InvalidSignature"
    else:
        assert verified(head, body, at).caller == CALLER
        assert refused(head, body + b" ", at) == "InvalidSignature"


@needs_data("aws4_testsuite")
def test_all_published_vectors_are_tried() -> None:
    folders = vector_folders()
    assert len(folders) == 34
    assert {folder.name for folder in folders} >= AMBIGUOUS


# --- what botocore signs

TARGETS = [
    "/",
    "/foundation-models",
    "/custom-models?maxResults=10&sortOrder=Ascending&nameContains=a%20b",
    f"/custom-models/{quote(ARN, safe='')}",
    f"/model/{quote(ARN, safe='')}/converse",
    "/model/huggingfacetb.smollm2-135m-instruct/converse-stream",
    "/model-customization-jobs/a%2Bb%20c/stop",
    "/model/%E4%BD%A0%E5%A5%BD/invoke",
    "/openai/v1/models/ft%3Asmollm2%3Aorg%3Asuffix%3Aid",
    "/custom-models?nameContains=%E4%BD%A0&b=2&a=1&b=1&empty=&alone=",
    "/x/~tilde_-.!*'()",
    "/custom-models?creationTimeAfter=2026-01-31T12%3A00%3A00%2B01%3A00",
]


@pytest.mark.parametrize("service", ["bedrock", "bedrock-mantle"])
@pytest.mark.parametrize("target", TARGETS)
def test_botocore_signature_is_accepted(target: str, service: str) -> None:
    headers = {"X-Spaced": "  a   b  c ", "Content-Type": "application/json", "Accept": "*/*"}
    head = signed("POST", target, b'{"a": 1}', service=service, at=NOW, headers=headers)
    found = verified(head, b'{"a": 1}')
    assert (found.caller, found.service) == (CALLER, service)
    assert refused(head, b'{"a": 2}') == "InvalidSignature"


@pytest.mark.parametrize(
    "target", ["/bucket/a%20b//c/../%C3%A9.jsonl?uploads", "/b/k%3Dv+plus/x?list-type=2&prefix=%2F"]
)
def test_object_storage_signs_the_raw_path(target: str) -> None:
    head = signed("PUT", target, b"rows", service="s3", at=NOW)
    found = verified(head, None)
    assert found.payload == sigv4.hashlib.sha256(b"rows").hexdigest()
    assert found.scope == "20260131/us-east-1/s3/aws4_request"
    assert found.moment == "20260131T120000Z"
    assert found.signing_key == sigv4.signing_key(SECRET, "20260131", "us-east-1", "s3")
    assert found.signature == header(head, "authorization")[-64:]


def test_presigned_request_expires() -> None:
    head = presigned("GET", "/bucket/key%20x", at=NOW, expires=60)
    assert verified(head, None).payload == "UNSIGNED-PAYLOAD"
    assert verified(head, None, NOW - timedelta(minutes=5)).caller == CALLER
    assert verified(head, None, NOW + timedelta(seconds=60)).caller == CALLER
    assert refused(head, None, NOW + timedelta(seconds=61)) == "AccessDenied"
    assert refused(head, None, NOW - timedelta(seconds=301)) == "RequestTimeTooSkewed"
    query = presigned("GET", "/custom-models?maxResults=5", service="bedrock", at=NOW, expires=60)
    assert verified(query).caller == CALLER
    assert refused(query, b"a body that nobody signed") == "InvalidSignature"
    assert refused(query, at=NOW + timedelta(seconds=61)) == "InvalidSignature"


@pytest.mark.parametrize("expires", ["0", "604801", "-1", "", "1e3", "٣", "99999999"])
def test_presigned_for_an_odd_time(expires: str) -> None:
    head = presigned("GET", "/b/k", at=NOW)
    query = head.query.replace("X-Amz-Expires=300", f"X-Amz-Expires={quote(expires)}")
    assert refused(replace(head, query=query), None) == "IncompleteSignature"


def test_presigned_request_valid_for_seven_days() -> None:
    head = presigned("GET", "/b/k", at=NOW, expires=604_800)
    assert verified(head, None, NOW + timedelta(days=7)).caller == CALLER


@pytest.mark.parametrize(
    "name", ["Algorithm", "Credential", "Date", "Expires", "SignedHeaders", "Signature"]
)
def test_presigned_request_requires_each_parameter_once(name: str) -> None:
    head = presigned("GET", "/b/k", at=NOW)
    part = next(each for each in head.query.split("&") if each.startswith(f"X-Amz-{name}="))
    twice = replace(head, query=f"{head.query}&{part}")
    without = replace(head, query="&".join(p for p in head.query.split("&") if p != part))
    assert refused(twice, None) == "IncompleteSignature"
    assert refused(without, None) == "IncompleteSignature"


# --- time


@pytest.mark.parametrize(
    ("service", "minutes", "code"),
    [("bedrock", 5, "InvalidSignature"), ("s3", 15, "RequestTimeTooSkewed")],
)
def test_clock_skew_limit_is_enforced(service: str, minutes: int, code: str) -> None:
    head, body = signed(service=service, at=NOW), None if service == "s3" else b""
    for sign in (1, -1):
        edge = timedelta(minutes=minutes)
        assert verified(head, body, NOW + sign * edge).caller == CALLER
        assert refused(head, body, NOW + sign * (edge + timedelta(seconds=1))) == code


def test_credential_scope_matches_signing_day() -> None:
    night = datetime(2026, 1, 31, 23, 59, 59, tzinfo=UTC)
    head = signed(at=night)
    assert verified(head, at=night + timedelta(minutes=2)).caller == CALLER
    moved = header(head, "authorization").replace("/20260131/", "/20260201/")
    assert refused(with_header(head, "authorization", moved), at=night) == "InvalidSignature"
