"""Who sends a request: by AWS signature, by a key issued here, or by a short-term key of Bedrock's."""

from __future__ import annotations

import base64
import binascii
import threading
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import parse_qsl

from luthier.server.http.messages import Caller, Fault, RequestHead, Signed
from luthier.server.sigv4 import Credential, check_claim, claim_of, verify
from luthier.server.tables.accounts import PrincipalsWatch
from luthier.server.tables.database import Database, now
from luthier.server.tables.principals import SHORT_TERM, Principal, bearer, digest_of, signer
from luthier.server.tables.secrets import Sealing

LONGEST_SHORT_TERM = 12 * 3600
"""Seconds that a short-term key may be good for."""
_HOST = "bedrock.amazonaws.com"
_ACTION = ("Action", "CallWithBearerToken")
_MOST = 10_000
"""Keys that are remembered, known and unknown ones."""


@dataclass(frozen=True)
class _Entry:
    principal: Principal | None
    token: str
    """Version of the principals that it was read at."""


class Authenticator:
    """Finds out who sends a request.

    Keys that were looked up are remembered until any principal changes. A key that is disabled in this
    process is refused at once; in another one, after a second at most
    (:data:`luthier.server.tables.accounts.FRESH_SECONDS`).
    """

    def __init__(self, database: Database, key: bytes) -> None:
        """``key`` is the server's."""
        self._database = database
        self._sealing = Sealing(key)
        self._watch = PrincipalsWatch(database)
        self._lock = threading.Lock()
        # By kind and name: an access key may be called what another kind's name looks like.
        self._known: dict[tuple[str, str], _Entry] = {}

    def authenticate(self, head: RequestHead, body: bytes | None) -> Signed:
        """The caller of a request.

        Args:
            head: the request as it came.
            body: the whole body; ``None`` for object storage, whose body is compared as it is read.

        Raises:
            Fault: as :func:`luthier.server.sigv4.verify` says; ``AccessDenied`` with
                ``credentials=True`` in its details for a bearer key that lets nobody in.
        """
        key = _bearer_key(head)
        if key is not None:
            # A presigned query beside a key: which of them is meant is not for us to guess.
            if "X-Amz-Signature" in head.query or body is None:
                raise Fault("IncompleteSignature", "A request carries one authorization.")
            return Signed(self._bearer(key))
        return verify(head, body, self._credential, now())

    def recognize(self, head: RequestHead) -> Signed | None:
        """The caller by the head alone; ``None`` for a signature, which covers the body still to come.

        Raises:
            Fault: as :meth:`authenticate`, as far as the head says it.
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

        found = self._read_cached("API key", digest, read)
        if found is None or (found.expires is not None and found.expires <= now()):
            raise _no_entry()
        return _caller(found)

    def _short_term(self, text: str) -> Caller:
        """Such a key is a presigned request that is never sent: its signature proves the signer."""
        try:
            url = base64.b64decode(text, validate=True).decode("ascii")
        except (binascii.Error, ValueError) as error:
            raise _no_entry() from error
        place, _, query = url.partition("?")
        kept = [part for part in query.split("&") if part.partition("=")[0] != "Version"]
        pairs = parse_qsl(query, keep_blank_values=True)
        if place != f"{_HOST}/" or [pair for pair in pairs if pair[0] == "Action"] != [_ACTION]:
            raise _no_entry()
        head = RequestHead("POST", "/", "&".join(kept), [("host", _HOST)], tls=True)
        try:
            claim = claim_of(head)
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

        found = self._read_cached("access key", access_key, read)
        return None if found is None else Credential(found.secret, _caller(found))

    def _read_cached(
        self, kind: str, identifier: str, read: Callable[[], Principal | None]
    ) -> Principal | None:
        # The version is asked for before the key is read: what is newer than it is read again.
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


def _caller(found: Principal) -> Caller:
    return Caller(found.account, found.user, found.roles, found.id)


def _bearer_key(head: RequestHead) -> str | None:
    """Return the API key in the header ``Authorization``; ``None`` without one."""
    given = [value for name, value in head.headers if name == "authorization"]
    scheme, _, key = given[0].partition(" ") if len(given) == 1 else ("", "", "")
    return key.strip() if scheme.lower() == "bearer" else None


def _no_entry() -> Fault:
    text = "Authentication failed: Please make sure your API Key is valid."
    return Fault("AccessDenied", text, credentials=True)
