"""Verification of AWS Signature Version 4, in the header and in the query.

The signature covers the raw path, the query as handlers decode the query, the headers and the bytes
of the body. If the specification gives several requests one signature, only the plain request is
accepted.

Source: the specification "AWS Signature Version 4 for API requests" and its published test vectors.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from urllib.parse import quote

from luthier.server.http.messages import Caller, Fault, RequestHead, Signed, query_pairs

ALGORITHM = "AWS4-HMAC-SHA256"
TERMINATOR = "aws4_request"
UNSIGNED = "UNSIGNED-PAYLOAD"
STREAMED_UNSIGNED = "STREAMING-UNSIGNED-PAYLOAD-TRAILER"
STREAMED = (
    "STREAMING-AWS4-HMAC-SHA256-PAYLOAD", "STREAMING-AWS4-HMAC-SHA256-PAYLOAD-TRAILER"
)  # fmt: skip
LONGEST_PRESIGNED = 604_800
"""Maximum validity of a presigned request, in seconds: one week."""

_PRESIGNED = ("Algorithm", "Credential", "Date", "Expires", "SignedHeaders", "Signature")
_SIGNS = frozenset({b"X-Amz-Algorithm", b"X-Amz-Credential", b"X-Amz-Signature"})
"""Query parameters of a presigned request. Any of the three marks a request as presigned."""
_EARLY = timedelta(minutes=5)
"""Time before its date at which a presigned request is accepted, because clocks differ."""
_ONCE = ("host", "date", "content-type", "content-length", "content-md5", "range")
"""Headers with a single value, like all ``x-amz`` headers. In a request with two values, the signer
and the handler could read different values."""
_HEX = re.compile(r"[0-9a-f]{64}")
# An access key contains no slash, so a scope has only one reading.
_SCOPE = re.compile(
    r"([!-.0-~]{1,128})/([0-9]{8})/([a-z0-9-]{1,64})/([a-z0-9-]{1,64})/aws4_request"
)
_MOMENT = "%Y%m%dT%H%M%SZ"


@dataclass(frozen=True)
class SignedService:
    """Signature rules of one service."""

    skew: timedelta
    """Maximum difference between the clocks of client and server."""
    objects: bool = False
    """Object storage: the path is signed as sent, and a header has the body's hash."""
    path: str | None = None
    """The only valid path of the service, if any."""

    @property
    def refusal(self) -> str:
        """Error code of a wrong signature."""
        return "SignatureDoesNotMatch" if self.objects else "InvalidSignature"


SERVICES = {
    "bedrock": SignedService(timedelta(minutes=5)),
    "bedrock-mantle": SignedService(timedelta(minutes=5)),
    "s3": SignedService(timedelta(minutes=15), objects=True),
    "sts": SignedService(timedelta(minutes=15), path="/"),
}


@dataclass(frozen=True)
class Credential:
    """The secret and the owner of an access key."""

    secret: str
    caller: Caller

    def __repr__(self) -> str:
        return f"Credential({self.caller.arn})"


@dataclass(frozen=True)
class Claim:
    """The unverified signature data of a request."""

    access_key: str
    day: str
    region: str
    service: str
    signed_headers: tuple[str, ...]
    signature: str
    moment: str
    """Time of signing, in the form ``yyyymmddThhmmssZ``."""
    expires: int | None = None
    """Validity of a presigned request, in seconds."""

    @property
    def at(self) -> datetime:
        """Time of signing."""
        return datetime.strptime(self.moment, _MOMENT).replace(tzinfo=UTC)

    @property
    def scope(self) -> str:
        """Scope of the credential: day, region, service and terminator."""
        return f"{self.day}/{self.region}/{self.service}/{TERMINATOR}"

    @property
    def is_presigned(self) -> bool:
        """True if the query has the signature."""
        return self.expires is not None


LookUp = Callable[[str], Credential | None]
"""Returns the credential of an access key; ``None`` for an unknown or disabled key."""


def verify(
    head: RequestHead,
    body: bytes | None,
    look_up: LookUp,
    moment: datetime,
) -> Signed:
    """Verify the signature of a request and return the signer.

    Args:
        head: the request head as received.
        body: the whole body; ``None`` only for ``s3``, because S3 bodies are verified as streams.
        look_up: returns the credential of an access key.
        moment: the current time.

    Raises:
        Fault: ``MissingAuthenticationToken``, ``IncompleteSignature``, ``UnrecognizedClient``,
            ``InvalidSignature``. For ``s3`` the last code is ``SignatureDoesNotMatch``,
            ``RequestTimeTooSkewed``, or ``AccessDenied`` for an expired presigned request.
    """
    claim, service = _valid_claim(head, body is None, moment)
    payload = _payload_hash(head, body, claim, service)
    credential = look_up(claim.access_key)
    # An unknown key costs equal work, so response times do not reveal which keys exist.
    secret = credential.secret if credential else secrets.token_hex(20)
    key = signing_key(secret, claim.day, claim.region, claim.service)
    expected = signature(key, claim, canonical_request(head, claim, payload))
    matches = hmac.compare_digest(expected, claim.signature)
    if credential is None:
        raise Fault("UnrecognizedClient", _UNKNOWN)
    if not matches:
        raise Fault(service.refusal, _WRONG)
    return Signed(
        credential.caller, claim.service, payload, claim.signature, key, claim.scope, claim.moment
    )


def check_claim(
    head: RequestHead,
    look_up: LookUp,
    moment: datetime,
) -> None:
    """Check the head of a request before the body arrives: form, time, headers and access key.

    The signature is verified later, because the signature covers the body. Arguments and faults as
    in :func:`verify`.
    """
    claim, _ = _valid_claim(head, False, moment)
    if look_up(claim.access_key) is None:
        raise Fault("UnrecognizedClient", _UNKNOWN)


def _valid_claim(head: RequestHead, objects: bool, moment: datetime) -> tuple[Claim, SignedService]:
    claim = parse_claim(head)
    service = SERVICES.get(claim.service)
    if service is None:
        raise Fault("InvalidSignature", f"Credential should be scoped to {', '.join(SERVICES)}.")
    # S3 signs the path and the body differently: a request for S3 must not be valid elsewhere.
    if service.objects != objects or service.path not in (None, head.path):
        raise Fault(
            "InvalidSignature", "Credential should be scoped to the service that is called."
        )
    if claim.day != claim.moment[:8]:
        raise Fault(service.refusal, "Date in Credential scope is not the day of the request.")
    _check_time(claim, service, moment)
    _check_headers(head, claim, service)
    _check_no_token(head, service)
    return claim, service


def _check_no_token(head: RequestHead, service: SignedService) -> None:
    """Reject a session token: the server issues none."""
    names = {name for name, _ in head.headers}
    names |= {name.decode("latin-1").lower() for name, _ in query_pairs(head.query)}
    if "x-amz-security-token" not in names:
        return
    if service.objects:
        raise Fault("InvalidToken", "The provided token is malformed or otherwise invalid.")
    raise Fault("UnrecognizedClient", _UNKNOWN)


_UNKNOWN = "The security token included in the request is invalid."
_WRONG = (
    "The request signature we calculated does not match the signature you provided. Check your AWS "
    "Secret Access Key and signing method. Consult the service documentation for details."
)


def parse_claim(head: RequestHead) -> Claim:
    """Return the signature data of ``head``; raises :class:`Fault` for malformed data."""
    authorizations = [value for name, value in head.headers if name == "authorization"]
    names = {name for name, _ in query_pairs(head.query)}
    in_query = not names.isdisjoint(_SIGNS)
    if len(authorizations) > 1 or (authorizations and in_query):
        raise _incomplete("The request has several authorizations. Send one.")
    if in_query:
        return _parse_query(head)
    if not authorizations and b"AWSAccessKeyId" in names:  # the default of `aws s3 presign`
        raise _incomplete("Signature Version 2 is not supported. Use s3 signature_version=s3v4.")
    if not authorizations:
        raise Fault("MissingAuthenticationToken", "Missing Authentication Token")
    return _parse_header(head, authorizations[0])


def canonical_request(head: RequestHead, claim: Claim, payload: str) -> bytes:
    """Return the canonical request of the specification; ``payload`` is the hash of the body."""
    parts = (
        head.method.encode("latin-1"),
        canonical_path(head.path, claim.service),
        canonical_query(head.query, claim.is_presigned),
        b"".join(
            name.encode() + b":" + _join_values(head, name) + b"\n" for name in claim.signed_headers
        ),
        ";".join(claim.signed_headers).encode(),
        payload.encode(),
    )
    return b"\n".join(parts)


def canonical_path(path: str, service: str) -> bytes:
    """Return the raw path for object storage, and the normalized, encoded path for other services."""
    raw = path.encode("latin-1") or b"/"
    if service in SERVICES and SERVICES[service].objects:
        return raw
    # The specification encodes the path twice, except for S3. `raw` is encoded once.
    return quote(normal_path(raw), safe="/-_.~").encode()


def normal_path(raw: bytes) -> bytes:
    """Return a path without empty segments, ``.`` and ``..`` (RFC 3986, section 5.2.4)."""
    segments: list[bytes] = []
    for segment in raw.split(b"/"):
        if segment == b"..":
            segments = segments[:-1]
        elif segment not in (b"", b"."):
            segments.append(segment)
    end = b"/" if segments and raw.endswith(b"/") else b""
    return b"/" + b"/".join(segments) + end


def canonical_query(query: str, presigned: bool) -> bytes:
    """Return the query with decoded and encoded keys and values, sorted."""
    # Clients encode in different ways, so decode first. The specification sorts encoded pairs.
    pairs = sorted(
        (quote(name, safe="-_.~"), quote(value, safe="-_.~"))
        for name, value in query_pairs(query)
        if not (presigned and name == b"X-Amz-Signature")
    )
    return "&".join(f"{name}={value}" for name, value in pairs).encode()


def signing_key(secret: str, day: str, region: str, service: str) -> bytes:
    """Return the signing key of one day, region and service."""
    key = f"AWS4{secret}".encode()
    for part in (day, region, service, TERMINATOR):
        key = hmac.digest(key, part.encode(), hashlib.sha256)
    return key


def string_to_sign(claim: Claim, canonical: bytes) -> str:
    """Return algorithm, time, scope and hash of the canonical request."""
    digest = hashlib.sha256(canonical).hexdigest()
    return f"{ALGORITHM}\n{claim.moment}\n{claim.scope}\n{digest}"


def signature(key: bytes, claim: Claim, canonical: bytes) -> str:
    """Return the expected signature in hexadecimal."""
    return hmac.new(key, string_to_sign(claim, canonical).encode(), hashlib.sha256).hexdigest()


def _parse_header(head: RequestHead, value: str) -> Claim:
    algorithm, _, rest = value.partition(" ")
    if algorithm != ALGORITHM:
        raise _incomplete("Authorization header is not of the kind AWS4-HMAC-SHA256.")
    fields = [part.strip(" ").partition("=") for part in rest.split(",")]
    values = {name: text for name, _, text in fields}
    if len(fields) != 3 or set(values) != {"Credential", "SignedHeaders", "Signature"}:
        raise _incomplete("Authorization header requires Credential, SignedHeaders and Signature.")
    return _claim(values, _signing_time(head), None)


def _parse_query(head: RequestHead) -> Claim:
    pairs = [(name.decode("latin-1"), value) for name, value in query_pairs(head.query)]
    parameters = {}
    for short in _PRESIGNED:
        values = [value for name, value in pairs if name == f"X-Amz-{short}"]
        if len(values) != 1:
            raise _incomplete(f"A presigned request must have one X-Amz-{short} in the query.")
        parameters[short] = values[0].decode("latin-1")
    if parameters["Algorithm"] != ALGORITHM:
        raise _incomplete("X-Amz-Algorithm is not AWS4-HMAC-SHA256.")
    expires = parameters["Expires"]
    if not re.fullmatch("[0-9]{1,6}", expires) or not 1 <= int(expires) <= LONGEST_PRESIGNED:
        raise _incomplete("X-Amz-Expires must be from 1 to 604800 seconds.")
    return _claim(parameters, _check_moment(parameters["Date"]), int(expires))


def _claim(fields: dict[str, str], moment: str, expires: int | None) -> Claim:
    scope = _SCOPE.fullmatch(fields["Credential"])
    if scope is None:
        raise _incomplete("Credential must be ACCESS-KEY/yyyymmdd/region/service/aws4_request.")
    names = tuple(fields["SignedHeaders"].split(";"))
    # Printable ASCII without upper-case letters and the separators `:` and `;`.
    if not all(re.fullmatch(r"[!-9<-@\[-~]+", name) for name in names):
        raise _incomplete("SignedHeaders must be names in lower case, separated by semicolons.")
    if list(names) != sorted(set(names)):
        raise _incomplete("SignedHeaders must be sorted and unique.")
    if not _HEX.fullmatch(fields["Signature"]):
        raise _incomplete("Signature must be 64 hexadecimal digits.")
    access_key, day, region, service = scope.group(1, 2, 3, 4)
    return Claim(access_key, day, region, service, names, fields["Signature"], moment, expires)


def _signing_time(head: RequestHead) -> str:
    value = _value(head, "x-amz-date")
    if value is not None:
        return _check_moment(value)
    date = _value(head, "date")
    if date is None:
        raise _incomplete("Authorization header requires existence of X-Amz-Date or Date.")
    try:
        return parsedate_to_datetime(date).astimezone(UTC).strftime(_MOMENT)
    except (ValueError, OverflowError):
        return _check_moment(date)


def _check_moment(moment: str) -> str:
    try:
        # strptime alone accepts numbers without leading zeros, so a time would have several forms.
        if re.fullmatch("[0-9]{8}T[0-9]{6}Z", moment):
            datetime.strptime(moment, _MOMENT)
            return moment
    except ValueError:
        pass
    raise _incomplete("Date must be in ISO-8601 basic format, yyyymmddThhmmssZ.")


def _check_time(claim: Claim, service: SignedService, moment: datetime) -> None:
    if claim.expires is None:
        in_time = abs(moment - claim.at) <= service.skew
    else:
        in_time = claim.at - _EARLY <= moment <= claim.at + timedelta(seconds=claim.expires)
    if in_time:
        return
    if not service.objects:
        text = (
            f"Signature expired or not yet valid: the request was signed at {claim.moment}, and the "
            f"server's time is {moment.strftime(_MOMENT)}. Correct the wrong clock."
        )
        raise Fault("InvalidSignature", text)
    if claim.is_presigned and moment > claim.at:
        raise Fault("AccessDenied", "Request has expired")
    text = "The difference between the request time and the current time is too large."
    raise Fault("RequestTimeTooSkewed", text)


def _check_headers(head: RequestHead, claim: Claim, service: SignedService) -> None:
    code = service.refusal
    names = [name for name, _ in head.headers]
    for name in set(names):
        if (name in _ONCE or name.startswith("x-amz")) and names.count(name) > 1:
            raise _incomplete(f"The header {name} was sent more than once.")
    # Otherwise a third party could add an x-amz header to a signed request.
    required = {"host"} | {name for name in names if name.startswith("x-amz-")}
    if not claim.is_presigned and "x-amz-date" not in required:
        required.add("date")
    if not service.objects:
        # The server signs the hash of the received body, so the header protects nothing.
        required.discard("x-amz-content-sha256")
        if normal_path(head.path.encode("latin-1")) != head.path.encode("latin-1"):
            # Clients sign the normal form, and different paths have one normal form.
            raise Fault(code, "The path of the request has empty segments or dots.")
    for name in sorted(required - set(claim.signed_headers)):
        raise Fault(code, f"The header {name} must be signed.")
    # The canonical request does not distinguish a missing header from an empty header.
    for name in sorted(set(claim.signed_headers) - set(names)):
        raise Fault(code, f"The signed header {name} is missing.")


def _payload_hash(
    head: RequestHead, body: bytes | None, claim: Claim, service: SignedService
) -> str:
    """Return the signed hash of the body. For ``s3`` the hash is verified later, while the body
    arrives."""
    payload = _value(head, "x-amz-content-sha256")
    if body is not None:
        digest = hashlib.sha256(body).hexdigest()
        if payload is not None and payload != digest:
            raise Fault(service.refusal, "X-Amz-Content-SHA256 does not match the body.")
        return digest
    if payload is None and claim.is_presigned:
        return UNSIGNED
    if payload is None:
        raise _incomplete("Missing required header for this request: x-amz-content-sha256")
    # Without TLS, nothing protects an unsigned body. A presigner often does not know the body.
    if payload in (UNSIGNED, STREAMED_UNSIGNED) and not (head.tls or claim.is_presigned):
        raise Fault(
            service.refusal,
            f"{payload} is accepted over TLS only. A TLS proxy must send X-Forwarded-Proto: https, "
            "and `luthier serve --trusted-proxy` must name the proxy's address.",
        )
    if payload not in (UNSIGNED, STREAMED_UNSIGNED, *STREAMED) and not _HEX.fullmatch(payload):
        raise _incomplete(
            "x-amz-content-sha256 must be a SHA-256 in hexadecimal or a known keyword."
        )
    return payload


def _value(head: RequestHead, name: str) -> str | None:
    values = [value for key, value in head.headers if key == name]
    if len(values) > 1:
        raise _incomplete(f"The header {name} was sent more than once.")
    return values[0].strip() if values else None


def _join_values(head: RequestHead, name: str) -> bytes:
    values = [value.encode("latin-1") for key, value in head.headers if key == name]
    # The specification trims values, joins spaces, and separates several values by commas.
    return b",".join(b" ".join(value.split()) for value in values)


def _incomplete(message: str) -> Fault:
    return Fault("IncompleteSignature", message)
