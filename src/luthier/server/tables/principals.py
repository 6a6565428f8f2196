"""Users of accounts with their roles, and the keys of users.

The database stores the secret of an access key sealed, because signatures need it, and only the hash of
an API key. Both are shown once, when they are made.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TypeVar

from sqlalchemy import ColumnElement, ForeignKey, UniqueConstraint, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from luthier.errors import CorruptFile, RefusedInput
from luthier.files import luthier_home
from luthier.formatting import list_some
from luthier.server.tables.accounts import Account, account_of, invalidate_caches
from luthier.server.tables.database import Base, new_id, now
from luthier.server.tables.secrets import ENVIRONMENT, KEY_FILE, Sealing, has_server_key, server_key

ROLES = ("administrator", "developer", "invoker", "reviewer", "read-only")
"""Roles of users and keys; :mod:`luthier.server.roles` has their permissions."""
ISSUED, BOOTSTRAP = "issued", "bootstrap"
"""Origins of a key."""
SHORT_TERM = "bedrock-api-key-"
"""Prefix of Bedrock's short-term keys, which a client signs."""
_MAX_NAMED_KEYS = 5
"""Maximum number of access keys in an error message."""
_log = logging.getLogger("luthier.server")
_NAME = re.compile(r"[A-Za-z0-9_+=,.@-]{1,64}")
_ACCESS_KEY = re.compile(r"[A-Za-z0-9_.+=@-]{1,128}")
_PRINTABLE = re.compile(r"[!-~]{1,512}")


class User(Base):
    """Principal: a person or a program of one account."""

    __tablename__ = "users"
    __table_args__ = (UniqueConstraint("account", "name"),)

    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    account: Mapped[str] = mapped_column(ForeignKey("accounts.id"), index=True)
    name: Mapped[str]
    role: Mapped[str]
    disabled: Mapped[bool] = mapped_column(default=False)
    created: Mapped[datetime] = mapped_column(default=now)

    @property
    def unique_id(self) -> str:
        """Unique id ``AIDA…`` as on AWS. A recreated user has a new id."""
        text = f"{self.seq} {self.account} {self.name} {self.created.isoformat()}"
        return "AIDA" + base64.b32encode(hashlib.sha256(text.encode()).digest()).decode()[:17]


class AccessKey(Base):
    """Access key for request signatures."""

    __tablename__ = "access_keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    account: Mapped[str] = mapped_column(index=True)
    user: Mapped[int] = mapped_column(ForeignKey("users.seq"), index=True)
    sealed: Mapped[bytes]
    role: Mapped[str | None]
    """Role that restricts the key further than the user; ``None`` for the user's role."""
    origin: Mapped[str]
    disabled: Mapped[bool] = mapped_column(default=False)
    created: Mapped[datetime] = mapped_column(default=now)


class ApiKey(Base):
    """A bearer key."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(unique=True)
    """SHA-256 of the key in hexadecimal. Keys are random, so a salt is not necessary."""
    shown: Mapped[str]
    """First characters of the key, for recognition."""
    label: Mapped[str]
    account: Mapped[str] = mapped_column(index=True)
    user: Mapped[int] = mapped_column(ForeignKey("users.seq"), index=True)
    role: Mapped[str | None]
    origin: Mapped[str]
    expires: Mapped[datetime | None]
    disabled: Mapped[bool] = mapped_column(default=False)
    created: Mapped[datetime] = mapped_column(default=now)


Key = TypeVar("Key", AccessKey, ApiKey)


@dataclass(frozen=True)
class Principal:
    """User authenticated by a key."""

    account: str
    user: str
    roles: tuple[str, ...]
    """Role of the user, and the key's own role if set."""
    expires: datetime | None = None
    """Time at which the key expires."""
    secret: str = field(default="", repr=False)
    """Secret of the access key; empty for an API key."""
    id: str = ""
    """``AIDA…``, as AWS identifies a user."""
    key: str = ""
    """Id of the key."""


def signer(session: Session, access_key: str, sealing: Sealing) -> Principal | None:
    """Return the principal of an access key.

    Returns ``None`` if the key, user or account is disabled, or the secret cannot be decrypted.
    """
    found = _usable(session, AccessKey, AccessKey.id == access_key)
    if found is None:
        return None
    key, user = found
    try:
        secret = sealing.open(key.sealed, key.id)
    except CorruptFile as error:
        _log.warning("%s", error)
        return None
    # A request needs the permission of all roles, so that a key can only restrict its user.
    roles = _roles(user, key)
    return Principal(user.account, user.name, roles, None, secret, user.unique_id, key.id)


def matching_server_key(session: Session) -> bytes:
    """Return the server's key, created if no access key exists.

    Raises:
        CorruptFile: if access keys exist and the server's key is missing or does not decrypt their
            secrets.
        LuthierError: see :func:`luthier.server.tables.secrets.server_key`.
    """
    query = select(AccessKey.id, AccessKey.sealed).order_by(AccessKey.created)
    rows = session.execute(query).all()
    # A new key would be written in its place, and all access keys would fail at each request
    # instead of once at the start.
    if rows and not has_server_key():
        raise CorruptFile(f"the server key is missing, {_key_advice([row.id for row in rows])}")
    key = server_key()
    sealing = Sealing(key)
    closed = [row.id for row in rows if not sealing.opens(row.sealed, row.id)]
    if closed:
        raise CorruptFile(f"the server key has changed, {_key_advice(closed)}")
    return key


def _key_advice(access_keys: Sequence[str]) -> str:
    """Return the error message for access keys that need a different server key."""
    names = list_some(access_keys, _MAX_NAMED_KEYS)
    return (
        f"so these access keys cannot be decrypted: {names}. Restore {KEY_FILE} in {luthier_home()}, "
        f"or set {ENVIRONMENT}. Or remove each access key: luthier admin keys remove ID"
    )


def bearer(session: Session, digest: str) -> Principal | None:
    """Return the principal of an API key by its SHA-256.

    Returns ``None`` if the key has expired, or if the key, user or account is disabled.
    """
    found = _usable(session, ApiKey, ApiKey.digest == digest)
    if found is None:
        return None
    key, user = found
    roles, identifier = _roles(user, key), user.unique_id
    return Principal(user.account, user.name, roles, key.expires, id=identifier, key=key.id)


def _roles(user: User, key: AccessKey | ApiKey) -> tuple[str, ...]:
    return (user.role,) if key.role is None else (user.role, key.role)


def _usable(
    session: Session, table: type[Key], wanted: ColumnElement[bool]
) -> tuple[Key, User] | None:
    """Return the key and its user; ``None`` if the key, user or account is disabled."""
    row = session.execute(
        select(table, User, Account)
        .join(User, User.seq == table.user)
        .join(Account, Account.id == User.account)
        .where(wanted)
    ).one_or_none()
    if row is None or any(part.disabled for part in row):
        return None
    return row[0], row[1]


def active_role(session: Session, account: str, name: str) -> str | None:
    """Return the user's role; ``None`` if the user or account is disabled or removed."""
    row = session.execute(
        select(User, Account)
        .join(Account, Account.id == User.account)
        .where(User.account == account, User.name == name)
    ).one_or_none()
    if row is None or any(part.disabled for part in row):
        return None
    user: User = row[0]
    return user.role


def check_role(name: str) -> str:
    """Return ``name`` if the role exists; raises :class:`RefusedInput` otherwise."""
    if name not in ROLES:
        raise RefusedInput(f"{name!r} is not a role. Choose one of {', '.join(ROLES)}")
    return name


def digest_of(key: str) -> str:
    """Return the stored SHA-256 of an API key."""
    return hashlib.sha256(key.encode()).hexdigest()


def create_user(session: Session, account: str, name: str, role: str = "read-only") -> User:
    """Add a user."""
    account_of(session, account)
    if not _NAME.fullmatch(name):
        raise RefusedInput(
            f"{name!r} is not a valid user name: use 1 to 64 of A-Z a-z 0-9 _ + = , . @ -"
        )
    if find_user(session, account, name) is not None:
        raise RefusedInput(f"user {name} exists already in account {account}")
    user = User(account=account, name=name, role=check_role(role))
    session.add(user)
    session.flush()
    invalidate_caches(session)
    return user


def user_of(session: Session, account: str, name: str) -> User:
    """Return a user; raises :class:`RefusedInput` if the user does not exist."""
    found = find_user(session, account, name)
    if found is None:
        raise RefusedInput(f"account {account} has no user {name}")
    return found


def find_user(session: Session, account: str, name: str) -> User | None:
    """Return a user, or ``None``."""
    return session.scalar(select(User).where(User.account == account, User.name == name))


def users(session: Session, account: str | None = None) -> list[User]:
    """Return the users of one account, or of all accounts."""
    query = select(User).order_by(User.account, User.name)
    return list(session.scalars(query if account is None else query.where(User.account == account)))


def set_role(session: Session, user: User, role: str) -> None:
    """Change the role of a user and of all keys without an own role."""
    user.role = check_role(role)
    invalidate_caches(session)


def disable_user(session: Session, user: User, disabled: bool = True) -> None:
    """Disable or enable a user and all keys of the user."""
    user.disabled = disabled
    invalidate_caches(session)


def remove_user(session: Session, user: User) -> None:
    """Remove a user and all keys of the user."""
    # Keys first: the database refuses to remove a user that keys refer to.
    for key in (*access_keys(session, user), *api_keys(session, user)):
        session.delete(key)
    session.flush()
    session.delete(user)
    invalidate_caches(session)


def create_access_key(
    session: Session,
    user: User,
    sealing: Sealing,
    access_key: str | None = None,
    secret: str | None = None,
    origin: str = ISSUED,
    role: str | None = None,
) -> tuple[AccessKey, str]:
    """Create an access key and return its secret. Key and secret are random by default."""
    access_key = access_key or "AKIA" + base64.b32encode(secrets.token_bytes(10)).decode()
    secret = secret or secrets.token_urlsafe(30)
    if not _ACCESS_KEY.fullmatch(access_key):
        raise RefusedInput("an access key id needs 1 to 128 of A-Z a-z 0-9 _ . + = @ -")
    if not _PRINTABLE.fullmatch(secret):
        raise RefusedInput("a secret access key needs 1 to 512 characters without blanks")
    if session.get(AccessKey, access_key) is not None:
        raise RefusedInput(f"access key {access_key} exists already")
    key = AccessKey(
        id=access_key,
        account=user.account,
        user=user.seq,
        sealed=sealing.seal(secret, access_key),
        role=role and check_role(role),
        origin=origin,
    )
    session.add(key)
    invalidate_caches(session)
    return key, secret


def create_api_key(
    session: Session,
    user: User,
    expires: datetime | None = None,
    label: str = "",
    key: str | None = None,
    origin: str = ISSUED,
    role: str | None = None,
) -> tuple[ApiKey, str]:
    """Create an API key and return the text, available only now."""
    text = key or f"sk-{secrets.token_urlsafe(36)}"
    if not _PRINTABLE.fullmatch(text) or text.startswith(SHORT_TERM):
        raise RefusedInput("an API key needs 1 to 512 characters without blanks, like sk-…")
    if session.scalar(select(ApiKey.id).where(ApiKey.digest == digest_of(text))) is not None:
        raise RefusedInput("this API key exists already")
    made = ApiKey(
        id=new_id(),
        digest=digest_of(text),
        # Short keys are the operator's own. Seven of twelve characters would leave few to guess.
        shown=text[:7] if len(text) >= 24 else text[:3],
        label=label,
        account=user.account,
        user=user.seq,
        role=role and check_role(role),
        origin=origin,
        expires=expires,
    )
    session.add(made)
    invalidate_caches(session)
    return made, text


def access_keys(session: Session, user: User) -> list[AccessKey]:
    """Return the access keys of a user, the oldest first."""
    query = select(AccessKey).where(AccessKey.user == user.seq)
    return list(session.scalars(query.order_by(AccessKey.created)))


def api_keys(session: Session, user: User) -> list[ApiKey]:
    """Return the API keys of a user, the oldest first."""
    query = select(ApiKey).where(ApiKey.user == user.seq)
    return list(session.scalars(query.order_by(ApiKey.created)))


def key_of(session: Session, identifier: str) -> AccessKey | ApiKey:
    """Return an access key or API key by its id; raises :class:`RefusedInput` for an unknown id."""
    found = session.get(AccessKey, identifier) or session.get(ApiKey, identifier)
    if found is None:
        raise RefusedInput(f"key {identifier} does not exist")
    return found


def disable_key(session: Session, key: AccessKey | ApiKey, disabled: bool = True) -> None:
    """Disable or enable a key."""
    key.disabled = disabled
    invalidate_caches(session)


def remove_key(session: Session, key: AccessKey | ApiKey) -> None:
    """Delete a key."""
    session.delete(key)
    invalidate_caches(session)
