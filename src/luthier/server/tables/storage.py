"""Stored bytes of each account, updated in every changing transaction, and the quota.

Each account has one row, because counting objects at each PUT would be slow. The row stays locked
until the transaction ends, and is always locked last.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sqlalchemy import BigInteger, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from luthier.errors import QuotaExceeded
from luthier.limits import AccountQuotas
from luthier.server.tables.database import Base, dialect_insert, find_row


class Storage(Base):
    """Stored bytes of one account."""

    __tablename__ = "storage"

    account: Mapped[str] = mapped_column(primary_key=True)
    stored_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    """Size of objects, files, parts of uploads, custom models, evals, their runs, reports of
    measurements, and passages of vector stores."""


@dataclass
class FreedStorage:
    """Files and bytes that a transaction removes from an account's objects and uploads."""

    files: list[str] = field(default_factory=list)
    """Ids of files without a row after the transaction."""
    stored_bytes: int = 0

    def add(self, other: FreedStorage) -> None:
        """Add the files and bytes of ``other``."""
        self.files += other.files
        self.stored_bytes += other.stored_bytes


def stored_by(session: Session, account: str) -> int:
    """Return the account's number of stored bytes."""
    found = session.get(Storage, account)
    return 0 if found is None else found.stored_bytes


def check(session: Session, account: str, quotas: AccountQuotas, *, stored_bytes: int) -> None:
    """Raise :class:`QuotaExceeded` early if the account has no space for ``stored_bytes`` more."""
    _check(stored_by(session, account), quotas, stored_bytes)


def charge(session: Session, account: str, quotas: AccountQuotas, *, stored_bytes: int) -> None:
    """Add ``stored_bytes``, which may be negative. The row is locked until the transaction ends.

    An account above a lowered quota may still replace and delete data.

    Raises:
        QuotaExceeded: if the account has no space. The caller rolls back.
    """
    row = _lock(session, account)
    _check(row.stored_bytes, quotas, stored_bytes)
    row.stored_bytes = max(0, row.stored_bytes + stored_bytes)
    session.flush()


def release(session: Session, account: str, *, stored_bytes: int) -> None:
    """Subtract ``stored_bytes``."""
    if stored_bytes:
        charge(session, account, AccountQuotas(), stored_bytes=-stored_bytes)


def check_count(used: int, quotas: AccountQuotas, name: str, what: str, remedy: str) -> None:
    """Check the quota for one more resource.

    Args:
        used: current number of resources.
        quotas: quotas of the account.
        name: name of the quota.
        what: name of the resources, in the plural.
        remedy: advice to the user.

    Raises:
        QuotaExceeded: if the quota is used up.
    """
    quota = getattr(quotas, name)
    if used >= quota:
        raise QuotaExceeded(
            f"The account has {quota:,} {what} (quota {name}). {remedy}", setting=name
        )


def _check(used: int, quotas: AccountQuotas, more: int) -> None:
    if more > 0 and used + more > quotas.stored_bytes:
        raise QuotaExceeded(
            f"The account stores {used:,} of {quotas.stored_bytes:,} bytes (quota stored_bytes). "
            "Delete data, or ask the operator of the server for a higher quota.",
            setting="stored_bytes",
        )


def _lock(session: Session, account: str) -> Storage:
    """Return the row of an account, created if missing, locked until the transaction ends."""
    query = select(Storage).where(Storage.account == account)
    found = find_row(session, query, lock=True)
    if found is None:
        fresh = dialect_insert(session, Storage).values(account=account, stored_bytes=0)
        session.execute(fresh.on_conflict_do_nothing())
        found = find_row(session, query, lock=True)
    assert found is not None
    return found
