"""Who may use the service: users of accounts with their policies and keys, and IAM roles to assume.

The secret of an access key is kept sealed, because signatures need it; of an API key only the hash is
kept. Both are told once, when they are made. An IAM role is not to be taken for the built-in roles of
users (``policy_documents.ROLES``), which only name policies.
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
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, ForeignKey, UniqueConstraint, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from luthier.errors import CorruptFile, RefusedInput
from luthier.files import luthier_home
from luthier.printable import list_some
from luthier.store.accounts import Account, account_of, invalidate_caches
from luthier.store.database import Base, new_id, now
from luthier.store.policy_documents import ROLES, Document, check_document, check_role, check_trust
from luthier.store.sealing import ENVIRONMENT, KEY_FILE, Sealing, has_server_key, server_key

ISSUED, BOOTSTRAP = "issued", "bootstrap"
"""Where a key comes from."""
SHORT_TERM = "bedrock-api-key-"
"""Beginning of keys that are signed by a client and not issued here."""
_NAMED = 5
"""So many access keys that do not open are named; the others are counted."""
_log = logging.getLogger("luthier.server")
_NAME = re.compile(r"[A-Za-z0-9_+=,.@-]{1,64}")
_ACCESS_KEY = re.compile(r"[A-Za-z0-9_.+=@-]{1,128}")
_PRINTABLE = re.compile(r"[!-~]{1,512}")


class User(Base):
    """A principal: a person or a program of one account."""

    __tablename__ = "users"
    __table_args__ = (UniqueConstraint("account", "name"),)

    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    account: Mapped[str] = mapped_column(ForeignKey("accounts.id"), index=True)
    name: Mapped[str]
    role: Mapped[str | None]
    """One of ``ROLES``, beside the policies."""
    policies: Mapped[list[Any]]
    """IAM policy documents."""
    disabled: Mapped[bool] = mapped_column(default=False)
    created: Mapped[datetime]

    @property
    def documents(self) -> tuple[Document, ...]:
        """All policies: the role's and the user's own."""
        return (*([ROLES[self.role]] if self.role else []), *self.policies)

    @property
    def unique_id(self) -> str:
        """``AIDA…``, as AWS has it: a user made again under the name of an earlier one has another."""
        text = f"{self.seq} {self.account} {self.name} {self.created.isoformat()}"
        return "AIDA" + base64.b32encode(hashlib.sha256(text.encode()).digest()).decode()[:17]


class AccessKey(Base):
    """An access key that signs requests."""

    __tablename__ = "access_keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    account: Mapped[str] = mapped_column(index=True)
    user: Mapped[int] = mapped_column(ForeignKey("users.seq"), index=True)
    sealed: Mapped[bytes]
    origin: Mapped[str]
    disabled: Mapped[bool] = mapped_column(default=False)
    created: Mapped[datetime]


class ApiKey(Base):
    """A bearer key."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(unique=True)
    """SHA-256 of the key, hexadecimal. Keys are random: there is nothing to guess, nothing to salt."""
    shown: Mapped[str]
    """Its first letters, to be recognised by."""
    label: Mapped[str]
    account: Mapped[str] = mapped_column(index=True)
    user: Mapped[int] = mapped_column(ForeignKey("users.seq"), index=True)
    origin: Mapped[str]
    expires: Mapped[datetime | None]
    disabled: Mapped[bool] = mapped_column(default=False)
    created: Mapped[datetime]


Key = TypeVar("Key", AccessKey, ApiKey)


@dataclass(frozen=True)
class Principal:
    """A user as a key proves it."""

    account: str
    user: str
    policies: tuple[Document, ...]
    expires: datetime | None = None
    """After this moment the key proves nothing."""
    secret: str = field(default="", repr=False)
    """Of the access key; empty for an API key."""
    id: str = ""
    """``AIDA…`` of a user, ``AROA…:NAME`` of a session of a role."""


def signer(session: Session, access_key: str, sealing: Sealing) -> Principal | None:
    """Whose access key it is; ``None`` unless all may be used and its secret opens."""
    found = usable_access_key(session, access_key)
    if found is None:
        return None
    key, user = found
    try:
        secret = sealing.open(key.sealed, key.id)
    except CorruptFile as error:
        _log.warning("%s", error)
        return None
    return Principal(user.account, user.name, user.documents, secret=secret, id=user.unique_id)


def matching_server_key(session: Session) -> bytes:
    """The server's key, which opens the secrets of all access keys; made where there are none yet.

    Raises:
        CorruptFile: where there are secrets that it does not open, or no key for those that there are.
        LuthierError: as :func:`luthier.store.sealing.server_key`.
    """
    query = select(AccessKey.id, AccessKey.sealed).order_by(AccessKey.created)
    rows = session.execute(query).all()
    if rows and not has_server_key():
        raise CorruptFile(f"there is no server key, {_without_key([row.id for row in rows])}")
    key = server_key()
    sealing = Sealing(key)
    closed = [row.id for row in rows if not sealing.opens(row.sealed, row.id)]
    if closed:
        raise CorruptFile(f"the server key is another one, {_without_key(closed)}")
    return key


def _without_key(access_keys: Sequence[str]) -> str:
    """Which access keys need another key of the server, and what to do."""
    names = list_some(access_keys, _NAMED)
    return (
        f"and access keys do not open without the one they were made under ({names}): put the "
        f"{KEY_FILE} of that time back into {luthier_home()}, or give it in {ENVIRONMENT}. To go on "
        "without these access keys, remove each: luthier admin keys remove ID"
    )


def bearer(session: Session, digest: str) -> Principal | None:
    """Whose API key has this SHA-256; ``None`` unless key, user and account may be used."""
    found = _usable(session, ApiKey, ApiKey.digest == digest)
    if found is None:
        return None
    key, user = found
    return Principal(user.account, user.name, user.documents, key.expires, id=user.unique_id)


def usable_access_key(session: Session, access_key: str) -> tuple[AccessKey, User] | None:
    """The access key and its user; ``None`` unless key, user and account may be used."""
    return _usable(session, AccessKey, AccessKey.id == access_key)


def _usable(
    session: Session, table: type[Key], wanted: ColumnElement[bool]
) -> tuple[Key, User] | None:
    """The key and its user, unless one of them or their account is disabled."""
    row = session.execute(
        select(table, User, Account)
        .join(User, User.seq == table.user)
        .join(Account, Account.id == User.account)
        .where(wanted)
    ).one_or_none()
    if row is None or any(part.disabled for part in row):
        return None
    return row[0], row[1]


def active_policies(session: Session, account: str, name: str) -> tuple[Document, ...] | None:
    """What a user may do now; ``None`` where user or account is disabled, or gone."""
    row = session.execute(
        select(User, Account)
        .join(Account, Account.id == User.account)
        .where(User.account == account, User.name == name)
    ).one_or_none()
    if row is None or any(part.disabled for part in row):
        return None
    user: User = row[0]
    return user.documents


def digest_of(key: str) -> str:
    """SHA-256 of an API key, as it is kept."""
    return hashlib.sha256(key.encode()).hexdigest()


def create_user(
    session: Session,
    account: str,
    name: str,
    policies: Sequence[Any] = (),
    role: str | None = None,
) -> User:
    """Add a user; without policies and role it may do nothing."""
    account_of(session, account)
    _check_name(name, "user")
    if find_user(session, account, name) is not None:
        raise RefusedInput(f"account {account} has a user {name} already")
    user = User(account=account, name=name, policies=[], disabled=False, created=now())
    set_policies(session, user, policies, role)
    session.add(user)
    session.flush()
    return user


def user_of(session: Session, account: str, name: str) -> User:
    """A user; raises :class:`RefusedInput` where there is none."""
    found = find_user(session, account, name)
    if found is None:
        raise RefusedInput(f"account {account} has no user {name}")
    return found


def find_user(session: Session, account: str, name: str) -> User | None:
    """A user; ``None`` where there is none."""
    return session.scalar(select(User).where(User.account == account, User.name == name))


def users(session: Session, account: str | None = None) -> list[User]:
    """Users of one account, or of all."""
    query = select(User).order_by(User.account, User.name)
    return list(session.scalars(query if account is None else query.where(User.account == account)))


def set_policies(
    session: Session, user: User, policies: Sequence[Any], role: str | None = None
) -> None:
    """Replace what a user may do."""
    user.policies, user.role = _checked_policies(policies), role and check_role(role)
    invalidate_caches(session)


def _checked_policies(policies: Sequence[Any]) -> list[dict[str, Any]]:
    """The same as plain objects; the refusal of one that is no policy says which."""
    return [
        dict(check_document(each, f"policies[{number}]")) for number, each in enumerate(policies)
    ]


def _check_name(name: str, kind: str) -> None:
    if not _NAME.fullmatch(name):
        raise RefusedInput(f"{name!r} is no {kind} name: 1 to 64 of A-Z a-z 0-9 _ + = , . @ -")


def disable_user(session: Session, user: User, disabled: bool = True) -> None:
    """Let no key of the user in any more, or let them in again."""
    user.disabled = disabled
    invalidate_caches(session)


def remove_user(session: Session, user: User) -> None:
    """Remove a user and all its keys."""
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
) -> tuple[AccessKey, str]:
    """A new access key and its secret; both are drawn unless they are given."""
    access_key = access_key or "AKIA" + base64.b32encode(secrets.token_bytes(10)).decode()
    secret = secret or secrets.token_urlsafe(30)
    if not _ACCESS_KEY.fullmatch(access_key):
        raise RefusedInput("an access key id is 1 to 128 of A-Z a-z 0-9 _ . + = @ -")
    if not _PRINTABLE.fullmatch(secret):
        raise RefusedInput("a secret access key is 1 to 512 letters without blanks")
    if session.get(AccessKey, access_key) is not None:
        raise RefusedInput(f"there is an access key {access_key} already")
    key = AccessKey(
        id=access_key,
        account=user.account,
        user=user.seq,
        sealed=sealing.seal(secret, access_key),
        origin=origin,
        disabled=False,
        created=now(),
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
) -> tuple[ApiKey, str]:
    """A new API key, and its text, which nobody can tell again."""
    text = key or f"sk-{secrets.token_urlsafe(36)}"
    if not _PRINTABLE.fullmatch(text) or text.startswith(SHORT_TERM):
        raise RefusedInput("an API key is 1 to 512 letters without blanks, such as sk-…")
    if session.scalar(select(ApiKey.id).where(ApiKey.digest == digest_of(text))) is not None:
        raise RefusedInput("this API key is in use already")
    made = ApiKey(
        id=new_id(),
        digest=digest_of(text),
        shown=text[:7] if len(text) >= 24 else text[:3],
        label=label,
        account=user.account,
        user=user.seq,
        origin=origin,
        expires=expires,
        disabled=False,
        created=now(),
    )
    session.add(made)
    invalidate_caches(session)
    return made, text


def access_keys(session: Session, user: User) -> list[AccessKey]:
    """Access keys of a user, the oldest first."""
    query = select(AccessKey).where(AccessKey.user == user.seq)
    return list(session.scalars(query.order_by(AccessKey.created)))


def api_keys(session: Session, user: User) -> list[ApiKey]:
    """API keys of a user, the oldest first."""
    query = select(ApiKey).where(ApiKey.user == user.seq)
    return list(session.scalars(query.order_by(ApiKey.created)))


def key_of(session: Session, identifier: str) -> AccessKey | ApiKey:
    """A key of either kind by its id; raises :class:`RefusedInput` where there is none."""
    found = session.get(AccessKey, identifier) or session.get(ApiKey, identifier)
    if found is None:
        raise RefusedInput(f"there is no key {identifier}")
    return found


def disable_key(session: Session, key: AccessKey | ApiKey, disabled: bool = True) -> None:
    """Let the key in no more, or again."""
    key.disabled = disabled
    invalidate_caches(session)


def remove_key(session: Session, key: AccessKey | ApiKey) -> None:
    """Forget the key."""
    session.delete(key)
    invalidate_caches(session)


SHORTEST_MAXIMUM, LONGEST_MAXIMUM = 3600, 43_200
"""Seconds: between these AWS lets a role's longest session be."""


class IamRole(Base):
    """A role of an account. It has no keys: who its trust policy names may assume it."""

    __tablename__ = "iam_roles"
    __table_args__ = (UniqueConstraint("account", "name"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    """``AROA…``: another one where a role is made again, so that old sessions do not return."""
    account: Mapped[str] = mapped_column(ForeignKey("accounts.id"), index=True)
    name: Mapped[str]
    trust: Mapped[dict[str, Any]]
    """The trust policy: who may assume it."""
    policies: Mapped[list[Any]]
    """IAM policy documents: what its sessions may do."""
    max_session_seconds: Mapped[int]
    origin: Mapped[str]
    created: Mapped[datetime]

    @property
    def arn(self) -> str:
        """As clients name it."""
        return role_arn(self.account, self.name)


def role_arn(account: str, name: str) -> str:
    """ARN of a role."""
    return f"arn:aws:iam::{account}:role/{name}"


def create_role(
    session: Session,
    account: str,
    name: str,
    trust: Any,
    policies: Sequence[Any] = (),
    max_session_seconds: int = SHORTEST_MAXIMUM,
    origin: str = ISSUED,
) -> IamRole:
    """Add a role; without policies its sessions may do nothing."""
    account_of(session, account)
    _check_name(name, "role")
    if find_role(session, account, name) is not None:
        raise RefusedInput(f"account {account} has an IAM role {name} already")
    role = IamRole(
        id="AROA" + base64.b32encode(secrets.token_bytes(11)).decode()[:17],
        account=account,
        name=name,
        origin=origin,
        created=now(),
    )
    update_role(session, role, trust, policies, max_session_seconds)
    session.add(role)
    session.flush()
    return role


def update_role(
    session: Session,
    role: IamRole,
    trust: Any | None = None,
    policies: Sequence[Any] | None = None,
    max_session_seconds: int | None = None,
) -> None:
    """Replace what is given; sessions that there are have the new policies at once."""
    if trust is not None:
        role.trust = dict(check_trust(trust))
    if policies is not None:
        role.policies = _checked_policies(policies)
    if max_session_seconds is not None:
        if not SHORTEST_MAXIMUM <= max_session_seconds <= LONGEST_MAXIMUM:
            raise RefusedInput(
                f"the longest session of a role takes {SHORTEST_MAXIMUM} to {LONGEST_MAXIMUM} "
                f"seconds, not {max_session_seconds}"
            )
        role.max_session_seconds = max_session_seconds
    invalidate_caches(session)


def remove_role(session: Session, role: IamRole) -> None:
    """Remove a role; its sessions end at once."""
    session.delete(role)
    invalidate_caches(session)


def iam_roles(session: Session, account: str | None = None) -> list[IamRole]:
    """IAM roles of one account, or of all."""
    query = select(IamRole).order_by(IamRole.account, IamRole.name)
    if account is not None:
        query = query.where(IamRole.account == account)
    return list(session.scalars(query))


def role_of(session: Session, account: str, name: str) -> IamRole:
    """An IAM role; raises :class:`RefusedInput` where there is none."""
    found = find_role(session, account, name)
    if found is None:
        raise RefusedInput(f"account {account} has no IAM role {name}")
    return found


def find_role(session: Session, account: str, name: str) -> IamRole | None:
    """An IAM role; ``None`` where there is none."""
    return session.scalar(select(IamRole).where(IamRole.account == account, IamRole.name == name))
