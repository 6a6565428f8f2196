"""Accounts (tenants), quotas, and the version for caches of principals."""

from __future__ import annotations

import re
import threading
import time
from datetime import datetime
from itertools import count
from typing import Any

from sqlalchemy import BigInteger, ForeignKey, delete, event, func, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from luthier.errors import RefusedInput
from luthier.limits import AccountQuotas
from luthier.server.tables.database import Base, Database, new_id, now
from luthier.server.tables.idempotency import AnsweredRequest
from luthier.server.tables.live.alerts import Alert
from luthier.server.tables.live.captures import CaptureSettings
from luthier.server.tables.openai.batches import Batch
from luthier.server.tables.storage import Storage

FRESH_SECONDS = 1.0
"""Maximum delay until other processes notice a change, in seconds."""
_IDENTITY_TABLES = (
    "accounts", "quotas", "access_keys", "api_keys", "audit_log", "storage", "usage",
    "capture_settings", "alerts",
)  # fmt: skip
"""Tables with an account's identity and history, not property."""


class Account(Base):
    """A tenant."""

    __tablename__ = "accounts"

    id: Mapped[str] = mapped_column(primary_key=True)
    """Twelve digits."""
    name: Mapped[str]
    disabled: Mapped[bool] = mapped_column(default=False)
    created: Mapped[datetime] = mapped_column(default=now)


class Quota(Base):
    """Quotas of an account; ``None`` for the server's default."""

    __tablename__ = "quotas"

    account: Mapped[str] = mapped_column(ForeignKey("accounts.id"), primary_key=True)
    jobs_in_flight: Mapped[int | None]
    custom_models: Mapped[int | None]
    deployments: Mapped[int | None]
    requests_per_second: Mapped[float | None]
    stored_bytes: Mapped[int | None] = mapped_column(BigInteger)
    provisioned_throughputs: Mapped[int | None]


QUOTAS = (*AccountQuotas.model_fields, "requests_per_second")
"""Columns of :class:`Quota`; see :class:`luthier.limits.AccountQuotas`."""
_MAX_VALUES = {"stored_bytes": 2**63 - 1}
"""Maximum values of columns wider than 32 bits."""


class PrincipalsVersion(Base):
    """Single row with a token, new after each change of accounts, users, keys and quotas."""

    __tablename__ = "principals_version"

    id: Mapped[int] = mapped_column(primary_key=True)
    token: Mapped[str]


_commits = count(1)
_last_commit = 0


def invalidate_caches(session: Session) -> None:
    """Invalidate caches of principals: in this process at the commit, in other processes by the
    row."""
    session.merge(PrincipalsVersion(id=1, token=new_id()))
    event.listen(session, "after_commit", _note_commit, once=True)


def _note_commit(session: Session) -> None:
    global _last_commit
    _last_commit = next(_commits)


def version(session: Session) -> str:
    """Return the token of the last change; empty before the first change."""
    return session.scalar(select(PrincipalsVersion.token)) or ""


class PrincipalsWatch:
    """Cached version of the principals, without a query per request.

    The token is at most :data:`FRESH_SECONDS` old. Changes of this process are visible at once.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._token, self._seen, self._until = "", -1, 0.0

    def token(self) -> str:
        """Return the token of the last change."""
        with self._lock:
            seen = _last_commit
            if seen != self._seen or time.monotonic() >= self._until:
                until = time.monotonic() + FRESH_SECONDS
                with self._database.read() as session:
                    self._token = version(session)
                self._seen, self._until = seen, until
            return self._token


def create_account(session: Session, account: str, name: str = "") -> Account:
    """Add an account.

    Raises:
        RefusedInput: if the account exists, or if its id is not 12 digits.
    """
    if not re.fullmatch("[0-9]{12}", account):
        raise RefusedInput(f"{account!r} is not an account id of twelve digits")
    if session.get(Account, account) is not None:
        raise RefusedInput(f"account {account} exists already")
    made = Account(id=account, name=name)
    session.add(made)
    session.flush()
    invalidate_caches(session)
    return made


def account_of(session: Session, account: str) -> Account:
    """Return the account; raises :class:`RefusedInput` if the account does not exist."""
    found = session.get(Account, account)
    if found is None:
        raise RefusedInput(
            f"account {account} does not exist. See `luthier admin accounts list`. The first start of "
            "`luthier serve` creates 000000000000"
        )
    return found


def accounts(session: Session) -> list[Account]:
    """Return all accounts, by id."""
    return list(session.scalars(select(Account).order_by(Account.id)))


def disable_account(session: Session, account: str, disabled: bool = True) -> Account:
    """Disable or enable an account with all keys."""
    found = account_of(session, account)
    found.disabled = disabled
    invalidate_caches(session)
    return found


def remove_account(session: Session, account: str) -> None:
    """Remove an account without users and resources. The audit log stays.

    Ended batches, ended exports and answered requests are removed with the account.

    Raises:
        RefusedInput: if the account has users or resources, which a later account of the same
            number would inherit.
    """
    from luthier.server.tables.exports import ModelExport  # imports this module

    found = account_of(session, account)
    session.execute(delete(AnsweredRequest).where(AnsweredRequest.account == account))
    for kind in (Batch, ModelExport):  # clients cannot delete ended batches and exports
        session.execute(delete(kind).where(kind.account == account, ~kind.is_unfinished()))
    owned = {name: number for name, number in _count_owned(session, account) if number}
    if owned:
        text = ", ".join(f"{number} in {name}" for name, number in owned.items())
        raise RefusedInput(
            f"account {account} still has {text}. Remove these first, or disable the account"
        )
    if (quota := session.get(Quota, account)) is not None:
        session.delete(quota)
        session.flush()
    session.execute(delete(Storage).where(Storage.account == account))
    session.execute(delete(CaptureSettings).where(CaptureSettings.account == account))
    session.execute(delete(Alert).where(Alert.account == account))
    session.delete(found)
    invalidate_caches(session)


def set_quota(session: Session, account: str, **values: float | None) -> Quota:
    """Change quotas by name; ``None`` restores the server's default."""
    account_of(session, account)
    quota = session.get(Quota, account) or Quota(account=account)
    for name, value in values.items():
        if name not in QUOTAS:
            raise RefusedInput(f"unknown quota {name}. Choose one of {', '.join(QUOTAS)}")
        most = _MAX_VALUES.get(name, 2**31 - 1)
        if value is not None and not 0 <= value <= most:  # False for NaN, too
            raise RefusedInput(f"{name} must be from 0 to {most:,}, not {value:,}")
        setattr(quota, name, value)
    session.add(quota)
    invalidate_caches(session)
    return quota


def quota_of(session: Session, account: str) -> dict[str, Any]:
    """Return the account's own quotas by the names of :data:`QUOTAS`, without unset quotas."""
    quota = session.get(Quota, account)
    given = {name: getattr(quota, name) for name in QUOTAS} if quota else {}
    return {name: value for name, value in given.items() if value is not None}


def quotas_of(session: Session, account: str, defaults: AccountQuotas) -> AccountQuotas:
    """Return the quotas of the account, and ``defaults`` for unset quotas."""
    own = quota_of(session, account)
    own.pop("requests_per_second", None)
    return defaults.model_copy(update=own) if own else defaults


def _count_owned(session: Session, account: str) -> list[tuple[str, int]]:
    from luthier.server.tables.schema import METADATA  # imports the modules of all tables

    owning = [
        t for t in METADATA.sorted_tables if "account" in t.c and t.name not in _IDENTITY_TABLES
    ]
    counted = {
        table.name: select(func.count()).select_from(table).where(table.c.account == account)
        for table in owning
    }
    return [(name, session.scalar(query) or 0) for name, query in counted.items()]
