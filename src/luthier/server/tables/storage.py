"""Bytes that each account stores, counted in the transactions that change them, and their quota.

Each account has one row: to count the objects of an account at each PUT would take long. A transaction
that changes the row locks it until the transaction ends, after all other locks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sqlalchemy import BigInteger, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from luthier.errors import QuotaExceeded
from luthier.limits import AccountQuotas
from luthier.server.tables.database import Base, dialect_insert, find_row


class Storage(Base):
    """Bytes that one account stores."""

    __tablename__ = "storage"

    account: Mapped[str] = mapped_column(primary_key=True)
    stored_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    """Size of objects, files, parts of uploads, custom models, evals and their runs."""


@dataclass
class FreedStorage:
    """Files and bytes that a transaction removes from an account's objects and uploads."""

    files: list[str] = field(default_factory=list)
    """Ids of the files that no row names after the transaction."""
    stored_bytes: int = 0

    def add(self, other: FreedStorage) -> None:
        """Add the files and bytes of ``other``."""
        self.files += other.files
        self.stored_bytes += other.stored_bytes


def stored_by(session: Session, account: str) -> int:
    """Return the number of bytes that the account stores."""
    found = session.get(Storage, account)
    return 0 if found is None else found.stored_bytes


def check(session: Session, account: str, quotas: AccountQuotas, *, stored_bytes: int) -> None:
    """Check early whether the account has room for more bytes.

    Raises:
        QuotaExceeded: if the account has no room for ``stored_bytes`` more.
    """
    _check(stored_by(session, account), quotas, stored_bytes)


def charge(session: Session, account: str, quotas: AccountQuotas, *, stored_bytes: int) -> None:
    """Count ``stored_bytes`` more, or less if negative; the row is locked until the transaction ends.

    An account above a quota that was lowered keeps what it stores, and may replace and delete.

    Raises:
        QuotaExceeded: if the account has no room for them; the caller rolls back.
    """
    row = _lock(session, account)
    _check(row.stored_bytes, quotas, stored_bytes)
    row.stored_bytes = max(0, row.stored_bytes + stored_bytes)
    session.flush()


def release(session: Session, account: str, *, stored_bytes: int) -> None:
    """Count ``stored_bytes`` less."""
    if stored_bytes:
        charge(session, account, AccountQuotas(), stored_bytes=-stored_bytes)


def check_count(used: int, quotas: AccountQuotas, name: str, what: str, remedy: str) -> None:
    """Check whether an account may have one more thing.

    Args:
        used: number of things that the account has.
        quotas: of the account.
        name: of the quota.
        what: name of the things, in the plural.
        remedy: advice to the user.

    Raises:
        QuotaExceeded: if the account has as many as the quota allows.
    """
    quota = getattr(quotas, name)
    if used >= quota:
        raise QuotaExceeded(
            f"The account has {quota:,} {what} (quota {name}). {remedy}", setting=name
        )


def _check(used: int, quotas: AccountQuotas, more: int) -> None:
    if more > 0 and used + more > quotas.stored_bytes:
        raise QuotaExceeded(
            f"The account may have {quotas.stored_bytes:,} bytes (quota stored_bytes) and has "
            f"{used:,}. Delete some of what it stores, or have the operator of the server raise the "
            "quota.",
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
