"""Accounts (tenants), their quotas, and the counter that tells caches of any change to principals."""

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
from luthier.server.tables.storage import Storage

FRESH_SECONDS = 1.0
"""How long another process may go on with what was changed here; this one notices at once."""
_OWN = (
    "accounts", "quotas", "access_keys", "api_keys", "audit_log", "storage", "usage",
)  # fmt: skip
"""Tables that say who an account is or what it did, and not what it owns."""


class Account(Base):
    """A tenant."""

    __tablename__ = "accounts"

    id: Mapped[str] = mapped_column(primary_key=True)
    """Twelve digits."""
    name: Mapped[str]
    disabled: Mapped[bool] = mapped_column(default=False)
    created: Mapped[datetime]


class Quota(Base):
    """What one account may have; ``None`` leaves it to the server's default."""

    __tablename__ = "quotas"

    account: Mapped[str] = mapped_column(ForeignKey("accounts.id"), primary_key=True)
    jobs_in_flight: Mapped[int | None]
    custom_models: Mapped[int | None]
    deployments: Mapped[int | None]
    requests_per_second: Mapped[float | None]
    stored_bytes: Mapped[int | None] = mapped_column(BigInteger)
    provisioned_throughputs: Mapped[int | None]


QUOTAS = (*AccountQuotas.model_fields, "requests_per_second")
"""Columns of :class:`Quota`; :class:`luthier.limits.AccountQuotas` says what they mean."""
_MOST = {"stored_bytes": 2**63 - 1}
"""What a column can hold, where that is not 32 bits."""


class PrincipalsVersion(Base):
    """One row, whose token is another one after each change to accounts, users, keys and quotas."""

    __tablename__ = "principals_version"

    id: Mapped[int] = mapped_column(primary_key=True)
    token: Mapped[str]


_commits = count(1)
_last_commit = 0


def invalidate_caches(session: Session) -> None:
    """Tell caches: other processes by the row, this one as soon as ``session`` is committed."""
    session.merge(PrincipalsVersion(id=1, token=new_id()))
    event.listen(session, "after_commit", _note_commit, once=True)


def _note_commit(session: Session) -> None:
    global _last_commit
    _last_commit = next(_commits)


def version(session: Session) -> str:
    """Token of the last change; empty where there was none."""
    return session.scalar(select(PrincipalsVersion.token)) or ""


class PrincipalsWatch:
    """The version of the principals as a cache needs it: no query for most looks.

    What :meth:`token` gives is at most ``FRESH_SECONDS`` old where another process made the change,
    and never old where this one did.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._token, self._seen, self._until = "", -1, 0.0

    def token(self) -> str:
        """The token of the last change that is known of."""
        with self._lock:
            seen = _last_commit
            if seen != self._seen or time.monotonic() >= self._until:
                until = time.monotonic() + FRESH_SECONDS
                with self._database.read() as session:
                    self._token = version(session)
                self._seen, self._until = seen, until
            return self._token


def create_account(session: Session, account: str, name: str = "") -> Account:
    """Add an account; raises :class:`RefusedInput` where it is there, or its id is not 12 digits."""
    if not re.fullmatch("[0-9]{12}", account):
        raise RefusedInput(f"{account!r} is no account: it has twelve digits")
    if session.get(Account, account) is not None:
        raise RefusedInput(f"there is an account {account} already")
    made = Account(id=account, name=name, disabled=False, created=now())
    session.add(made)
    session.flush()
    invalidate_caches(session)
    return made


def account_of(session: Session, account: str) -> Account:
    """The account; raises :class:`RefusedInput` where there is none."""
    found = session.get(Account, account)
    if found is None:
        raise RefusedInput(
            f"there is no account {account}: `luthier admin accounts list` shows those there are, and "
            "the first start of `luthier serve` makes 000000000000"
        )
    return found


def accounts(session: Session) -> list[Account]:
    """All accounts, by id."""
    return list(session.scalars(select(Account).order_by(Account.id)))


def disable_account(session: Session, account: str, disabled: bool = True) -> Account:
    """Let no key of the account in any more, or let them in again."""
    found = account_of(session, account)
    found.disabled = disabled
    invalidate_caches(session)
    return found


def remove_account(session: Session, account: str) -> None:
    """Remove an account that has no users and owns nothing; its audit log stays.

    Raises:
        RefusedInput: where it has or does: who came by that number later would own it.
    """
    found = account_of(session, account)
    owned = {name: number for name, number in _count_owned(session, account) if number}
    if owned:
        text = ", ".join(f"{number} in {name}" for name, number in owned.items())
        raise RefusedInput(f"account {account} still has {text}; disable it, or remove those first")
    if (quota := session.get(Quota, account)) is not None:
        session.delete(quota)
        session.flush()
    session.execute(delete(Storage).where(Storage.account == account))
    session.delete(found)
    invalidate_caches(session)


def set_quota(session: Session, account: str, **values: float | None) -> Quota:
    """Change quotas of ``QUOTAS`` by name; ``None`` goes back to the server's default."""
    account_of(session, account)
    quota = session.get(Quota, account) or Quota(account=account)
    for name, value in values.items():
        if name not in QUOTAS:
            raise RefusedInput(f"there is no quota {name}; there are {', '.join(QUOTAS)}")
        most = _MOST.get(name, 2**31 - 1)
        if value is not None and not 0 <= value <= most:  # so NaN is refused, which is neither
            raise RefusedInput(f"{name} is a number from 0 to {most:,}, not {value:,}")
        setattr(quota, name, value)
    session.add(quota)
    invalidate_caches(session)
    return quota


def quota_of(session: Session, account: str) -> dict[str, Any]:
    """What the account's own quotas are, by the names of ``QUOTAS``; those that are set."""
    quota = session.get(Quota, account)
    given = {name: getattr(quota, name) for name in QUOTAS} if quota else {}
    return {name: value for name, value in given.items() if value is not None}


def quotas_of(session: Session, account: str, defaults: AccountQuotas) -> AccountQuotas:
    """What the account may have: its own quotas, and ``defaults`` where it has none."""
    own = quota_of(session, account)
    own.pop("requests_per_second", None)
    return defaults.model_copy(update=own) if own else defaults


def _count_owned(session: Session, account: str) -> list[tuple[str, int]]:
    from luthier.server.tables.schema import METADATA  # imports the modules of all tables

    owning = [t for t in METADATA.sorted_tables if "account" in t.c and t.name not in _OWN]
    counted = {
        table.name: select(func.count()).select_from(table).where(table.c.account == account)
        for table in owning
    }
    return [(name, session.scalar(query) or 0) for name, query in counted.items()]
