"""Temporary credentials of STS: tokens that carry what they stand for, so that no table grows by them.

A token is sealed under a key derived from the server's key and its access key id: it opens beside no
other access key and cannot be changed. The secret is derived in the same way and is not in the token.
What the token says is compared with the tables at each use: a session ends with the access key it was
begun with, with that key's user and account, and with the roles that were assumed on the way.
"""

from __future__ import annotations

import base64
import secrets
import zlib
from dataclasses import dataclass, field
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from luthier.errors import CorruptFile
from luthier.store.accounts import Account
from luthier.store.principals import IamRole, Principal, usable_access_key
from luthier.store.sealing import Sealing, purpose_key
from luthier.validation import StrictModel

ASSUMED = "assumed-role"
"""Beginning of what stands for the user's name in a session of a role: no user's name has a slash."""


class TemporarySession(StrictModel):
    """What one set of temporary credentials stands for."""

    account: str
    """Of the user who began it."""
    user: str
    access_key: str
    """The long-term access key that it was begun with."""
    key_created: datetime
    """When that key was made: one made later with the same id is another key."""
    expires: datetime
    roles: tuple[str, ...] = ()
    """Ids of the roles that were assumed one from the other, the acting one last; empty for the user's
    own session."""
    name: str = ""
    """``RoleSessionName``."""
    policy: str | None = None
    """The session policy, JSON: what it does not allow, the session may not do."""


@dataclass(frozen=True)
class TemporaryKey:
    """Temporary credentials as they are told once."""

    access_key: str
    secret: str = field(repr=False)
    token: str = field(repr=False)


def issue(key: bytes, session: TemporarySession) -> TemporaryKey:
    """Credentials for ``session``; ``key`` is the server's."""
    access_key = "ASIA" + base64.b32encode(secrets.token_bytes(10)).decode()
    packed = zlib.compress(session.model_dump_json(exclude_defaults=True).encode(), 9)
    token = base64.urlsafe_b64encode(_sealing(key, access_key).seal_bytes(packed, access_key))
    return TemporaryKey(access_key, secret_of(key, access_key), token.decode())


def open_token(key: bytes, access_key: str, token: str) -> TemporarySession | None:
    """What ``token`` stands for; ``None`` unless it was issued with ``access_key`` by this server."""
    try:
        sealed = base64.b64decode(token, altchars=b"-_", validate=True)
        packed = _sealing(key, access_key).open_bytes(sealed, access_key)
        return TemporarySession.model_validate_json(zlib.decompress(packed))
    except (ValueError, CorruptFile):
        return None


def secret_of(key: bytes, access_key: str) -> str:
    """The secret of a temporary access key: 40 letters."""
    drawn = purpose_key(key, f"secret of the session {access_key}")[:30]
    return base64.urlsafe_b64encode(drawn).decode()


def session_principal(session: Session, temporary: TemporarySession) -> Principal | None:
    """Who acts in ``temporary``, with the policies of this moment and without a secret.

    ``None`` where what it stands on is disabled, gone or made anew: the access key it was begun with,
    its user, one of its roles or one of their accounts. That it has expired is not looked at: requests
    compare times themselves, and a batch goes on after them.
    """
    found = usable_access_key(session, temporary.access_key)
    if found is None:
        return None
    key, user = found
    if key.created != temporary.key_created:
        return None
    if (user.account, user.name) != (temporary.account, temporary.user):
        return None
    if not temporary.roles:
        return Principal(user.account, user.name, user.documents, id=user.unique_id)
    query = select(IamRole).join(Account, Account.id == IamRole.account)
    query = query.where(IamRole.id.in_(temporary.roles), Account.disabled.is_(False))
    assumed = {role.id: role for role in session.scalars(query)}
    if len(assumed) != len(temporary.roles):
        return None
    acting = assumed[temporary.roles[-1]]
    return Principal(
        acting.account,
        f"{ASSUMED}/{acting.name}/{temporary.name}",
        tuple(acting.policies),
        id=f"{acting.id}:{temporary.name}",
    )


def _sealing(key: bytes, access_key: str) -> Sealing:
    # A key for each token: no number of tokens repeats a nonce under one.
    return Sealing(purpose_key(key, f"session token of {access_key}"))
