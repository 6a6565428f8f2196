"""Forged, modified and ambiguous requests are rejected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from urllib.parse import parse_qsl, quote

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from signing import (
    ACCESS_KEY,
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
from luthier.server.http.messages import Fault, RequestHead

# --- forged, changed, ambiguous

EMPTY = sigv4.hashlib.sha256(b"").hexdigest()
Change = Callable[[RequestHead], RequestHead]


def in_authorization(old: str, new: str) -> Change:
    def change(head: RequestHead) -> RequestHead:
        value = header(head, "authorization")
        assert old in value
        return with_header(head, "authorization", value.replace(old, new))

    return change


def upper_signature(value: str) -> str:
    return value[:-64] + value[-64:].upper()


CHANGED: dict[str, tuple[Change, str]] = {
    "no authorization": (lambda h: with_header(h, "authorization", None), "MissingAuthenticationToken"),
    "two authorizations": (
        lambda h: replace(h, headers=[*h.headers, ("authorization", header(h, "authorization"))]),
        "IncompleteSignature",
    ),
    "header and query": (
        lambda h: replace(h, query="X-Amz-Signature=" + "0" * 64), "IncompleteSignature",
    ),
    "another method": (lambda h: replace(h, method="DELETE"), "InvalidSignature"),
    "another path": (lambda h: replace(h, path="/custom-models/b"), "InvalidSignature"),
    "decoded path": (lambda h: replace(h, path="/custom-models/a:b"), "InvalidSignature"),
    "lower-case escape": (lambda h: replace(h, path="/custom-models/a%3ab"), "InvalidSignature"),
    "doubled slash": (lambda h: replace(h, path="//custom-models/a%3Ab"), "InvalidSignature"),
    "dots": (lambda h: replace(h, path="/x/../custom-models/a%3Ab"), "InvalidSignature"),
    "a query": (lambda h: replace(h, query="maxResults=1"), "InvalidSignature"),
    "another host": (lambda h: with_header(h, "host", "evil.example"), "InvalidSignature"),
    "two hosts": (
        lambda h: replace(h, headers=[("host", "evil.example"), *h.headers]), "IncompleteSignature",
    ),
    "two dates": (
        lambda h: replace(h, headers=[*h.headers, ("x-amz-date", "20260131T120000Z")]),
        "IncompleteSignature",
    ),
    "no date": (lambda h: with_header(h, "x-amz-date", None), "IncompleteSignature"),
    "malformed date": (
        lambda h: with_header(h, "x-amz-date", "2026-01-31T12:00:00Z"), "IncompleteSignature",
    ),
    "impossible date": (
        lambda h: with_header(h, "x-amz-date", "20260231T120000Z"), "IncompleteSignature",
    ),
    "later date": (lambda h: with_header(h, "x-amz-date", "20260131T120001Z"), "InvalidSignature"),
    "unsigned x-amz": (
        lambda h: with_header(h, "x-amz-target", "DeleteCustomModel"), "InvalidSignature",
    ),
    "signed header gone": (lambda h: with_header(h, "accept", None), "InvalidSignature"),
    "unsigned host": (in_authorization("accept;host;", "accept;"), "InvalidSignature"),
    "unsigned date": (in_authorization(";x-amz-date", ""), "InvalidSignature"),
    "upper-case names": (in_authorization("accept;host", "Accept;host"), "IncompleteSignature"),
    "unsorted names": (in_authorization("accept;host", "host;accept"), "IncompleteSignature"),
    "repeated names": (in_authorization("accept;", "accept;accept;"), "IncompleteSignature"),
    "an empty name": (in_authorization("accept;", ";accept;"), "IncompleteSignature"),
    "upper-case algorithm": (in_authorization("AWS4-HMAC", "aws4-hmac"), "IncompleteSignature"),
    "another hash": (in_authorization("HMAC-SHA256", "HMAC-SHA1"), "IncompleteSignature"),
    "other service": (in_authorization("/bedrock/", "/ec2/"), "InvalidSignature"),
    "service of objects": (in_authorization("/bedrock/", "/s3/"), "InvalidSignature"),
    "upper-case service": (in_authorization("/bedrock/", "/BEDROCK/"), "IncompleteSignature"),
    "mantle": (in_authorization("/bedrock/", "/bedrock-mantle/"), "InvalidSignature"),
    "other region": (in_authorization("us-east-1", "eu-west-1"), "InvalidSignature"),
    "other end": (in_authorization("aws4_request", "aws4_requests"), "IncompleteSignature"),
    "other key": (in_authorization(ACCESS_KEY, "AKIDEXAMPLF"), "UnrecognizedClient"),
    "no key": (in_authorization(ACCESS_KEY, ""), "IncompleteSignature"),
    "a fourth field": (in_authorization("SignedHeaders", "X=1, SignedHeaders"), "IncompleteSignature"),
    "two signatures": (
        in_authorization("Signature=", f"Signature={'0' * 64}, Signature="), "IncompleteSignature",
    ),
    "short signature": (
        lambda h: with_header(h, "authorization", header(h, "authorization")[:-1]),
        "IncompleteSignature",
    ),
    "upper-case signature": (
        lambda h: with_header(h, "authorization", upper_signature(header(h, "authorization"))),
        "IncompleteSignature",
    ),
    "empty signature": (
        lambda h: with_header(h, "authorization", header(h, "authorization")[:-64]),
        "IncompleteSignature",
    ),
    "zero signature": (
        lambda h: with_header(h, "authorization", header(h, "authorization")[:-64] + "0" * 64),
        "InvalidSignature",
    ),
    "unsigned payload": (
        lambda h: with_header(h, "x-amz-content-sha256", "UNSIGNED-PAYLOAD"), "InvalidSignature",
    ),
    "streamed payload": (
        lambda h: with_header(
            h, "x-amz-content-sha256", "STREAMING-AWS4-HMAC-SHA256-PAYLOAD"
        ),
        "InvalidSignature",
    ),
    "session token": (lambda h: with_header(h, "x-amz-security-token", "x"), "InvalidSignature"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGED)
def test_modified_request_is_rejected(name: str) -> None:
    change, code = CHANGED[name]
    body = b'{"a": 1}'
    head = signed("POST", "/custom-models/a%3Ab", body, at=NOW, headers={"Accept": "x"})
    assert verified(head, body).caller == CALLER
    assert refused(change(head), body) == code


def test_credential_scope_of_different_day_is_rejected() -> None:
    """The request is signed with the different day, not modified after signing."""
    for day, let_in in (("20260131", True), ("20260130", False), ("20260201", False)):
        head = resigned(signed(at=NOW), "bedrock", EMPTY, day)
        if let_in:
            assert verified(head).caller == CALLER
        else:
            assert refused(head) == "InvalidSignature"


def test_request_with_two_signatures_is_rejected() -> None:
    query = presigned("GET", "/custom-models", service="bedrock", at=NOW)
    both = replace(query, headers=signed("GET", "/custom-models", at=NOW).headers)
    assert verified(query).caller == CALLER
    assert refused(both) == "IncompleteSignature"


def test_missing_signed_empty_header_is_rejected() -> None:
    head = signed(at=NOW, headers={"X-Empty": ""})
    assert verified(head).caller == CALLER
    assert refused(with_header(head, "x-empty", None)) == "InvalidSignature"


def test_session_token_is_rejected() -> None:
    token = {"X-Amz-Security-Token": "invented"}
    assert refused(signed(at=NOW, headers=token)) == "UnrecognizedClient"
    assert refused(signed(at=NOW, service="s3", headers=token), None) == "InvalidToken"
    query = presigned("GET", "/b/k?X-Amz-Security-Token=invented", at=NOW)
    assert refused(query, None) == "InvalidToken"


def test_signature_with_wrong_secret_is_rejected() -> None:
    head = signed(at=NOW, keys=(ACCESS_KEY, "guessed"))
    assert refused(head) == "InvalidSignature"
    assert refused(signed(at=NOW, keys=("AKIDUNKNOWN", SECRET))) == "UnrecognizedClient"
    assert (
        refused(signed(at=NOW, service="s3", keys=(ACCESS_KEY, "x")), None)
        == "SignatureDoesNotMatch"
    )


def test_sts_signature_is_rejected_on_bedrock_paths() -> None:
    assert (
        verified(signed("POST", "/", b"Action=x", service="sts", at=NOW), b"Action=x").service
        == "sts"
    )
    for path in ("/foundation-models", "/v1/models", "/api/v1/whoami", "/model/x/converse"):
        assert refused(signed("GET", path, service="sts", at=NOW)) == "InvalidSignature"
        query = presigned("GET", path, service="sts", at=NOW)
        assert refused(query) == "InvalidSignature"


@pytest.mark.parametrize("service", ["iam", "bedrock-runtime", "bedrock-agent", "s3express"])
def test_signature_for_unknown_service_is_rejected(service: str) -> None:
    assert refused(signed(at=NOW, service=service)) == "InvalidSignature"
    assert refused(signed(at=NOW, service=service), None) == "InvalidSignature"


def test_signature_is_rejected_by_api_of_different_service() -> None:
    assert refused(signed(at=NOW, service="s3"), b"") == "InvalidSignature"
    assert refused(signed(at=NOW, service="bedrock"), None) == "InvalidSignature"


def test_content_hash_header_is_compared_with_body() -> None:
    wrong = {"X-Amz-Content-SHA256": sigv4.hashlib.sha256(b"other").hexdigest()}
    head = signed("POST", "/x", b"body", service="bedrock-mantle", at=NOW, headers=wrong)
    assert refused(head, b"body") == "InvalidSignature"
    for word in ("UNSIGNED-PAYLOAD", "STREAMING-UNSIGNED-PAYLOAD-TRAILER"):
        given = {"X-Amz-Content-SHA256": word}
        head = signed("POST", "/x", b"body", at=NOW, headers=given)
        assert refused(head, b"body") == "InvalidSignature"


def test_payloads_of_object_storage() -> None:
    def told(value: str | None, tls: bool) -> RequestHead:
        head = signed("PUT", "/b/k", b"x", service="s3", at=NOW)
        plain = with_header(head, "x-amz-content-sha256", value)
        return replace(resigned(plain, "s3", value or ""), tls=tls)

    assert verified(told("UNSIGNED-PAYLOAD", True), None).payload == "UNSIGNED-PAYLOAD"
    assert refused(told("UNSIGNED-PAYLOAD", False), None) == "SignatureDoesNotMatch"
    trailer = "STREAMING-UNSIGNED-PAYLOAD-TRAILER"
    assert verified(told(trailer, True), None).payload == trailer
    assert refused(told(trailer, False), None) == "SignatureDoesNotMatch"
    chunks = "STREAMING-AWS4-HMAC-SHA256-PAYLOAD"
    assert verified(told(chunks, False), None).payload == chunks
    for odd in ("", "abc", "A" * 64, "STREAMING-AWS4-ECDSA-P256-SHA256-PAYLOAD"):
        assert refused(told(odd, True), None) == "IncompleteSignature"
    assert refused(told(None, True), None) == "IncompleteSignature"


def resigned(head: RequestHead, service: str, payload: str, day: str = "20260131") -> RequestHead:
    """Return the request with a signature of the new content."""
    names = sorted(key for key, _ in head.headers if key not in ("authorization", "user-agent"))
    start = f"AWS4-HMAC-SHA256 Credential={ACCESS_KEY}/{day}/us-east-1/{service}/aws4_request, "
    start += f"SignedHeaders={';'.join(names)}, Signature="
    claim = sigv4.parse_claim(with_header(head, "authorization", start + "0" * 64))
    key = sigv4.signing_key(SECRET, claim.day, claim.region, claim.service)
    value = sigv4.signature(key, claim, sigv4.canonical_request(head, claim, payload))
    return with_header(head, "authorization", start + value)


def test_signed_plus_in_query_is_not_a_space() -> None:
    """Otherwise an attacker could replace a signed plus sign with a space."""
    head = signed("GET", "/custom-models?nameContains=a%2Bb", at=NOW)
    assert verified(head).caller == CALLER
    assert refused(replace(head, query="nameContains=a+b")) == "InvalidSignature"
    blank = signed("GET", "/custom-models?nameContains=a%20b", at=NOW)
    assert verified(replace(blank, query="nameContains=a+b")).caller == CALLER


def test_date_header_must_be_signed() -> None:
    """An RFC 1123 date without X-Amz-Date must be signed."""
    head = RequestHead(
        "GET", "/x", "", [("host", "h"), ("date", "Sat, 31 Jan 2026 12:00:00 GMT")], False
    )
    for names in ("date;host", "host"):
        start = (
            f"AWS4-HMAC-SHA256 Credential={ACCESS_KEY}/20260131/us-east-1/bedrock/aws4_request, "
        )
        start += f"SignedHeaders={names}, Signature="
        claim = sigv4.parse_claim(with_header(head, "authorization", start + "0" * 64))
        empty = sigv4.hashlib.sha256(b"").hexdigest()
        key = sigv4.signing_key(SECRET, claim.day, claim.region, claim.service)
        value = sigv4.signature(key, claim, sigv4.canonical_request(head, claim, empty))
        whole = with_header(head, "authorization", start + value)
        if names == "host":
            assert refused(whole) == "InvalidSignature"
        else:
            assert verified(whole).moment == "20260131T120000Z"


# --- any single byte

segment = st.text("abcXYZ019-_.~:%/ é你", min_size=1, max_size=12).map(lambda t: quote(t, safe=""))
text = st.text("abc XYZ019&=+%é/", max_size=10)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_modified_byte_is_rejected(data: st.DataObject) -> None:
    service = data.draw(st.sampled_from(["bedrock", "bedrock-mantle", "s3"]))
    path = "/" + "/".join(data.draw(st.lists(segment, min_size=1, max_size=4)))
    assume("/./" not in f"{path}/" and "/../" not in f"{path}/")
    pairs = data.draw(st.lists(st.tuples(text, text), max_size=3))
    query = "&".join(f"{quote(a, safe='')}={quote(b, safe='')}" for a, b in pairs if a)
    body = data.draw(st.binary(max_size=20))
    target = f"{path}?{query}" if query else path
    extra = {"Content-Type": "application/json", "X-Amz-Meta-A": "one two"}
    head = signed("POST", target, body, service=service, at=NOW, headers=extra)
    late = None if service == "s3" else body
    assert verified(head, late).caller == CALLER
    changed, body = changed_byte(data, head, late)
    with pytest.raises(Fault):
        verified(changed, body)


def changed_byte(
    data: st.DataObject, head: RequestHead, body: bytes | None
) -> tuple[RequestHead, bytes | None]:
    signed_names = header(head, "authorization").split("SignedHeaders=")[1].split(",")[0].split(";")
    parts = ["method", "path", "authorization", *signed_names]
    parts += ["query"] if head.query else []
    parts += ["body"] if body else []
    part = data.draw(st.sampled_from(parts))
    if part == "body":
        assert body
        place = data.draw(st.integers(0, len(body) - 1))
        other = data.draw(st.integers(0, 255).filter(lambda value: value != body[place]))
        return head, body[:place] + bytes([other]) + body[place + 1 :]
    whole = {"method": head.method, "path": head.path, "query": head.query}.get(part)
    old = whole if whole is not None else header(head, part)
    place = data.draw(st.integers(0, len(old) - 1))
    letters = st.characters(min_codepoint=1, max_codepoint=255)
    new = old[:place] + data.draw(letters.filter(lambda c: c != old[place])) + old[place + 1 :]
    if part == "query":
        # The same pairs written differently are the same request.
        assume(sorted(read(old)) != sorted(read(new)))
        return replace(head, query=new), body
    if part in ("method", "path"):
        return replace(head, **{part: new}), body
    assume(old.encode("latin-1").split() != new.encode("latin-1").split())
    return with_header(head, part, new), body


def read(query: str) -> list[tuple[str, str]]:
    """Return the query parameters as handlers parse them. Bytes outside UTF-8 stay distinct."""
    return parse_qsl(query, keep_blank_values=True, encoding="latin-1")
