"""Authentication by AWS signature, by API key, or by short-term Bedrock API key."""

from __future__ import annotations

import base64
import binascii
import threading
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import parse_qsl

from luthier.server.http.messages import Caller, Fault, RequestHead, Signed
from luthier.server.sigv4 import Credential, check_claim, parse_claim, verify
from luthier.server.tables.accounts import PrincipalsWatch
from luthier.server.tables.database import Database, now
from luthier.server.tables.principals import SHORT_TERM, Principal, bearer, digest_of, signer
from luthier.server.tables.secrets import Sealing

LONGEST_SHORT_TERM = 12 * 3600
"""Maximum lifetime of a short-term key, in seconds."""
_HOST = "bedrock.amazonaws.com"
_ACTION = ("Action", "CallWithBearerToken")
_MOST = 10_000
"""Maximum number of cached keys, including unknown keys."""


@dataclass(frozen=True)
class _Entry:
    principal: Principal | None
    token: str
    """Version of the principals at the time of the query."""


class Authenticator:
    """Authentication of requests.

    Keys are cached until a principal changes. A disabled key is rejected at once in this process,
    and within a second in other processes (:data:`luthier.server.tables.accounts.FRESH_SECONDS`).
    """

    def __init__(self, database: Database, key: bytes) -> None:
        """Create the authenticator; ``key`` is the server's encryption key."""
        self._database = database
        self._sealing = Sealing(key)
        self._watch = PrincipalsWatch(database)
        self._lock = threading.Lock()
        # The kind is part of the key: an access key id may equal the digest of an API key.
        self._known: dict[tuple[str, str], _Entry] = {}

    def authenticate(self, head: RequestHead, body: bytes | None) -> Signed:
        """Return the caller of a request.

        Args:
            head: Head of the request.
            body: Whole body; ``None`` for object storage, where the body is verified while it is
                read.

        Raises:
            Fault: As in :func:`luthier.server.sigv4.verify`; ``AccessDenied`` with the detail
                ``credentials=True`` for an invalid bearer key.
        """
        key = _bearer_key(head)
        if key is not None:
            # A key and a presigned query may belong to different users: reject the request.
            if "X-Amz-Signature" in head.query or body is None:
                raise Fault(
                    "IncompleteSignature", "The request has two authorizations. Remove one."
                )
            return Signed(self._bearer(key))
        return verify(head, body, self._credential, now())

    def recognize(self, head: RequestHead) -> Signed | None:
        """Return the caller from the head alone, or ``None`` for a signature that covers the body.

        Raises:
            Fault: As in :meth:`authenticate`, for errors in the head.
        """
        if _bearer_key(head) is not None:
            return self.authenticate(head, b"")
        check_claim(head, self._credential, now())
        return None

    def _bearer(self, key: str) -> Caller:
        if key.startswith(SHORT_TERM):
            return self._short_term(key.removeprefix(SHORT_TERM))
        digest = digest_of(key)

        def read() -> Principal | None:
            with self._database.read() as session:
                return bearer(session, digest)

        principal = self._read_cached("API key", digest, read)
        if principal is None or (principal.expires is not None and principal.expires <= now()):
            raise _no_entry()
        return _caller(principal)

    def _short_term(self, text: str) -> Caller:
        """Return the caller of a short-term key: a presigned request in base64, signed by the
        caller."""
        try:
            url = base64.b64decode(text, validate=True).decode("ascii")
        except (binascii.Error, ValueError) as error:
            raise _no_entry() from error
        location, _, query = url.partition("?")
        signed_parts = [part for part in query.split("&") if part.partition("=")[0] != "Version"]
        pairs = parse_qsl(query, keep_blank_values=True)
        if location != f"{_HOST}/" or [pair for pair in pairs if pair[0] == "Action"] != [_ACTION]:
            raise _no_entry()
        head = RequestHead("POST", "/", "&".join(signed_parts), [("host", _HOST)], tls=True)
        try:
            claim = parse_claim(head)
            if claim.service != "bedrock" or (claim.expires or 0) > LONGEST_SHORT_TERM:
                raise _no_entry()
            signed = verify(head, b"", self._credential, now())
        except Fault as fault:
            raise _no_entry() from fault
        return signed.caller

    def _credential(self, access_key: str) -> Credential | None:
        def read() -> Principal | None:
            with self._database.read() as session:
                return signer(session, access_key, self._sealing)

        principal = self._read_cached("access key", access_key, read)
        return None if principal is None else Credential(principal.secret, _caller(principal))

    def _read_cached(
        self, kind: str, identifier: str, read: Callable[[], Principal | None]
    ) -> Principal | None:
        # Read the version before the principal: a later change then invalidates the entry.
        token = self._watch.token()
        name = kind, identifier
        entry = self._known.get(name)
        if entry is None or entry.token != token:
            entry = _Entry(read(), token)
            with self._lock:
                if len(self._known) >= _MOST:
                    self._known.clear()
                self._known[name] = entry
        return entry.principal


def _caller(principal: Principal) -> Caller:
    return Caller(principal.account, principal.user, principal.roles, principal.id, principal.key)


def _bearer_key(head: RequestHead) -> str | None:
    """Return the API key in the header ``Authorization``; ``None`` without a key."""
    values = [value for name, value in head.headers if name == "authorization"]
    scheme, _, key = values[0].partition(" ") if len(values) == 1 else ("", "", "")
    return key.strip() if scheme.lower() == "bearer" else None


def _no_entry() -> Fault:
    text = "Authentication failed: Please make sure your API Key is valid."
    return Fault("AccessDenied", text, credentials=True)
