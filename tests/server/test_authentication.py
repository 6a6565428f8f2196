"""Authentication: signatures, API keys, short-term keys, and disabled principals."""

from __future__ import annotations

import base64
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta

import pytest
from principals_of import FIRST, KEY
from signing import ACCESS_KEY, SECRET, presigned, short_term_key, signed
from sqlalchemy import event

from luthier.server.authentication import Authenticator
from luthier.server.http.messages import Fault, RequestHead
from luthier.server.tables import accounts, principals
from luthier.server.tables.database import Database, now
from luthier.server.tables.secrets import Sealing


@pytest.fixture
def authenticator(database: Database, api_key: str) -> Authenticator:
    return Authenticator(database, KEY)


def bearing(key: str, path: str = "/v1/models", query: str = "") -> RequestHead:
    return RequestHead(
        "GET", path, query, [("host", "h"), ("authorization", f"Bearer {key}")], tls=False
    )


def code_of(authenticator: Authenticator, head: RequestHead, body: bytes | None = b"") -> str:
    with pytest.raises(Fault) as caught:
        authenticator.authenticate(head, body)
    assert SECRET not in caught.value.message
    return caught.value.code


def test_every_authentication_method_is_accepted(
    authenticator: Authenticator, api_key: str
) -> None:
    by_signature = authenticator.authenticate(signed("POST", "/x", b"{}"), b"{}")
    assert by_signature.caller.arn == f"arn:aws:iam::{FIRST}:user/root"
    assert authenticator.authenticate(signed(service="s3"), None).service == "s3"
    assert authenticator.authenticate(presigned("GET", "/b/k"), None).payload == "UNSIGNED-PAYLOAD"
    for key in (api_key, short_term_key()):
        found = authenticator.authenticate(bearing(key), b"any body")
        assert (found.caller.user, found.service) == ("root", "")


def test_secrets_are_neither_printed_nor_stored(
    authenticator: Authenticator, api_key: str, database: Database
) -> None:
    found = authenticator.authenticate(signed(), b"")
    assert SECRET not in repr(found) + repr(vars(authenticator))
    assert found.signing_key.hex() not in repr(found)
    database.close()
    kept = b"".join(path.read_bytes() for path in _files(database))
    assert ACCESS_KEY.encode() in kept
    assert SECRET.encode() not in kept
    assert api_key.encode() not in kept


def _files(database: Database) -> list:
    from pathlib import Path

    path = Path(str(database.engine.url.database))
    return [each for each in path.parent.glob(f"{path.name}*") if each.is_file()]


@pytest.mark.parametrize(
    "key", ["", "sk-unknown", "sk-", ACCESS_KEY, "null", "sha256:", "é", "a b"]
)
def test_unknown_bearer_key_is_rejected(authenticator: Authenticator, key: str) -> None:
    assert code_of(authenticator, bearing(key)) == "AccessDenied"


def test_api_key_hash_is_no_access_key(authenticator: Authenticator, api_key: str) -> None:
    """A hash from the database is no valid key, also after a lookup of the key."""
    digest = principals.digest_of(api_key)
    assert authenticator.authenticate(bearing(api_key), b"").caller.user == "root"
    for name in (digest, f"sha256:{digest}"):
        assert code_of(authenticator, signed(keys=(name, ""))) == "UnrecognizedClient"


def test_modified_bearer_key_is_rejected(authenticator: Authenticator, api_key: str) -> None:
    for other in (api_key.upper(), api_key[:-1], api_key + "x", principals.digest_of(api_key)):
        assert code_of(authenticator, bearing(other)) == "AccessDenied"


def test_ambiguous_bearer_header_is_rejected(authenticator: Authenticator, api_key: str) -> None:
    head = bearing(api_key)
    twice = RequestHead(head.method, head.path, "", [*head.headers, head.headers[1]], tls=False)
    assert code_of(authenticator, twice) == "IncompleteSignature"
    query = presigned("GET", "/v1/models", service="bedrock").query
    assert code_of(authenticator, bearing(api_key, query=query)) == "IncompleteSignature"
    # Object storage takes signatures only.
    assert code_of(authenticator, head, None) == "IncompleteSignature"
    basic = RequestHead(
        "GET", "/", "", [("host", "h"), ("authorization", "Basic cm9vdDpyb290")], tls=False
    )
    assert code_of(authenticator, basic) == "IncompleteSignature"


def test_invalid_short_term_keys_are_rejected(authenticator: Authenticator) -> None:
    now_ = datetime.now(UTC)
    keys = {
        "over": short_term_key(at=now_ - timedelta(seconds=3601)),
        "not yet": short_term_key(at=now_ + timedelta(minutes=6)),
        "too long": short_term_key(expires=12 * 3600 + 1),
        "of another secret": short_term_key((ACCESS_KEY, "guessed")),
        "of an unknown key": short_term_key(("AKIDUNKNOWN", SECRET)),
        "for something else": short_term_key(action="ListFoundationModels"),
        "for another host": short_term_key(host="bedrock.example.com"),
        "for another service": short_term_key(service="bedrock-mantle"),
        "for objects": short_term_key(service="s3"),
        "not base64": "bedrock-api-key-%%%",
        "empty": "bedrock-api-key-",
        "other text": "bedrock-api-key-" + base64.b64encode(b"hello").decode(),
    }
    for name, key in keys.items():
        assert code_of(authenticator, bearing(key)) == "AccessDenied", name
    longest = bearing(short_term_key(expires=12 * 3600))
    assert authenticator.authenticate(longest, b"").caller.user == "root"


def test_modified_short_term_key_is_rejected(authenticator: Authenticator) -> None:
    text = base64.b64decode(short_term_key().removeprefix("bedrock-api-key-")).decode()
    for old, new in (
        ("X-Amz-Expires=3600", "X-Amz-Expires=43200"),
        ("Action=CallWithBearerToken", "Action=CallWithBearerToken&Action=CallWithBearerToken"),
        ("us-east-1", "us-west-2"),
        ("&Version=1", "&Version=1&X-Amz-Expires=43200"),
        ("X-Amz-SignedHeaders=host", "X-Amz-SignedHeaders="),
        (ACCESS_KEY, "AKIDOTHER"),
        ("bedrock.amazonaws.com/?", "bedrock.example.com/?"),
        ("bedrock.amazonaws.com/?", "bedrock.amazonaws.com/model?"),
    ):
        changed = text.replace(old, new)
        assert changed != text
        key = "bedrock-api-key-" + base64.b64encode(changed.encode()).decode()
        assert code_of(authenticator, bearing(key)) == "AccessDenied", new


def test_disabled_principal_is_rejected_immediately(
    database: Database, authenticator: Authenticator, api_key: str
) -> None:
    """Disabling and enabling a key, user or account applies to both kinds of key."""
    heads = [signed(), bearing(api_key), bearing(short_term_key())]
    for what in ("key", "user", "account"):
        for disabled in (False, True, False):
            with database.write() as session:
                user = principals.user_of(session, FIRST, "root")
                if what == "account":
                    accounts.disable_account(session, FIRST, disabled)
                elif what == "user":
                    principals.disable_user(session, user, disabled)
                else:
                    for key in principals.access_keys(session, user):
                        principals.disable_key(session, key, disabled)
                    for api in principals.api_keys(session, user):
                        principals.disable_key(session, api, disabled)
            codes = []
            for head in heads:
                try:
                    authenticator.authenticate(head, b"")
                except Fault as fault:
                    codes.append(fault.code)
            refused = ["UnrecognizedClient", "AccessDenied", "AccessDenied"]
            assert codes == (refused if disabled else []), what


def test_role_change_applies_immediately(database: Database, authenticator: Authenticator) -> None:
    assert authenticator.authenticate(signed(), b"").caller.roles == ("administrator",)
    with database.write() as session:
        principals.set_role(session, principals.user_of(session, FIRST, "root"), "invoker")
    assert authenticator.authenticate(signed(), b"").caller.roles == ("invoker",)


def test_caller_roles_include_role_of_key(
    database: Database, authenticator: Authenticator, api_key: str
) -> None:
    with database.write() as session:
        user = principals.user_of(session, FIRST, "root")
        _, text = principals.create_api_key(session, user, role="invoker")
        key, secret = principals.create_access_key(session, user, Sealing(KEY), role="read-only")
    caller = authenticator.authenticate(bearing(text), b"").caller
    assert caller.roles == ("administrator", "invoker")
    caller = authenticator.authenticate(signed(keys=(key.id, secret)), b"").caller
    assert caller.roles == ("administrator", "read-only")
    assert authenticator.authenticate(bearing(api_key), b"").caller.roles == ("administrator",)


def test_user_disabled_by_second_process_is_rejected(
    database: Database, authenticator: Authenticator
) -> None:
    authenticator.authenticate(signed(), b"")
    script = (
        "from luthier.server.tables import principals as p\n"
        "from luthier.server.tables.database import Database\n"
        "with Database().write() as s:\n"
        "    p.disable_user(s, p.user_of(s, '000000000000', 'root'))\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    time.sleep(accounts.FRESH_SECONDS)
    assert code_of(authenticator, signed()) == "UnrecognizedClient"


def test_authentication_caches_database_lookups(
    database: Database, authenticator: Authenticator, api_key: str
) -> None:
    authenticator.authenticate(signed(), b"")
    authenticator.authenticate(bearing(api_key), b"")
    queries: list[str] = []
    event.listen(database.engine, "before_cursor_execute", lambda *args: queries.append(args[2]))
    began = time.monotonic()
    for _ in range(200):
        authenticator.authenticate(signed(), b"")
        authenticator.authenticate(bearing(api_key), b"")
    assert len(queries) <= 1 + (time.monotonic() - began) / accounts.FRESH_SECONDS


def test_expired_api_key_is_rejected(database: Database, authenticator: Authenticator) -> None:
    with database.write() as session:
        user = principals.user_of(session, FIRST, "root")
        _, soon = principals.create_api_key(session, user, now() + timedelta(seconds=0.3))
    assert authenticator.authenticate(bearing(soon), b"").caller.user == "root"
    time.sleep(0.35)
    assert code_of(authenticator, bearing(soon)) == "AccessDenied"


def test_removed_keys_and_users_are_rejected(
    database: Database, authenticator: Authenticator, api_key: str
) -> None:
    with database.write() as session:
        user = principals.create_user(session, FIRST, "guest", role="read-only")
        key, secret = principals.create_access_key(session, user, Sealing(KEY))
    theirs = signed(keys=(key.id, secret))
    assert authenticator.authenticate(theirs, b"").caller.user == "guest"
    with database.write() as session:
        principals.remove_user(session, principals.user_of(session, FIRST, "guest"))
    assert code_of(authenticator, theirs) == "UnrecognizedClient"
    assert authenticator.authenticate(bearing(api_key), b"").caller.user == "root"


def test_credentials_sealed_with_different_server_key_are_rejected(
    database: Database, api_key: str
) -> None:
    other = Authenticator(database, bytes(32))
    for head in (signed(), signed(service="sts")):
        assert code_of(other, head) == "UnrecognizedClient"
    # The error equals the error for an unknown access key.
    assert code_of(other, signed(keys=("AKIANOBODY", SECRET))) == "UnrecognizedClient"
    assert code_of(other, bearing(short_term_key())) == "AccessDenied"
    assert other.authenticate(bearing(api_key), b"").caller.user == "root"
