"""What each account stores, counted in the transactions that change it, and held below its quotas.

One row for each account: to count anew at each PUT would cost as much as the account is large. Whoever
changes it holds its lock until the transaction ends, after all other locks, so two transactions cannot
both take the last byte. ``luthier.store.quota_usage`` makes the rows right at each start of a server.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sqlalchemy import BigInteger, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from luthier.errors import QuotaExceeded
from luthier.limits import AccountQuotas
from luthier.store.database import Base, dialect_insert, find_row

COUNTED = {
    "stored_bytes": "bytes",
    "objects": "objects",
    "files": "files",
    "buckets": "buckets",
    "uploads_in_progress": "uploads in progress",
}
"""Columns of :class:`Storage`, which are quotas as well, and what they count."""


class Storage(Base):
    """What one account stores."""

    __tablename__ = "storage"

    account: Mapped[str] = mapped_column(primary_key=True)
    stored_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    """Of objects, files, parts of uploads, custom models, evals and their runs."""
    objects: Mapped[int] = mapped_column(default=0)
    files: Mapped[int] = mapped_column(default=0)
    buckets: Mapped[int] = mapped_column(default=0)
    uploads_in_progress: Mapped[int] = mapped_column(default=0)

    def counts(self) -> dict[str, int]:
        """By the names of :data:`COUNTED`."""
        return {name: getattr(self, name) for name in COUNTED}


@dataclass
class FreedStorage:
    """What a transaction takes away of an account's objects and uploads."""

    files: list[str] = field(default_factory=list)
    """Ids of the files that no row names then."""
    stored_bytes: int = 0
    objects: int = 0
    uploads_in_progress: int = 0

    def add(self, other: FreedStorage) -> None:
        """Take ``other`` away as well."""
        self.files += other.files
        self.stored_bytes += other.stored_bytes
        self.objects += other.objects
        self.uploads_in_progress += other.uploads_in_progress


def stored_by(session: Session, account: str) -> dict[str, int]:
    """What the account stores now, by the names of :data:`COUNTED`."""
    found = session.get(Storage, account)
    return dict.fromkeys(COUNTED, 0) if found is None else found.counts()


def check(session: Session, account: str, quotas: AccountQuotas, **adds: int) -> None:
    """Refuse early what would be refused by :func:`charge`; nobody is kept from anything by it.

    Raises:
        QuotaExceeded: where the account has no room for what is added.
    """
    _check(stored_by(session, account), quotas, adds)


def charge(session: Session, account: str, quotas: AccountQuotas, **changes: int) -> None:
    """Count ``changes``, by the names of :data:`COUNTED`; the row is locked until the transaction ends.

    What an account has beyond a quota that was lowered stays, and may shrink.

    Raises:
        QuotaExceeded: where something grows beyond its quota; the transaction is to be given up.
    """
    row = lock(session, account)
    _check(row.counts(), quotas, changes)
    for name, by in changes.items():
        setattr(row, name, max(0, getattr(row, name) + by))
    session.flush()


def release(
    session: Session, account: str, removed: FreedStorage | None = None, **counts: int
) -> None:
    """Count what is taken away: what was ``removed``, and ``counts`` of other things."""
    taken = dict(counts)
    if removed is not None:
        for name in ("stored_bytes", "objects", "uploads_in_progress"):
            taken[name] = taken.get(name, 0) + getattr(removed, name)
    if any(taken.values()):
        charge(session, account, AccountQuotas(), **{name: -by for name, by in taken.items()})


def _check(used: Mapping[str, int], quotas: AccountQuotas, adds: Mapping[str, int]) -> None:
    for name, by in adds.items():
        quota = getattr(quotas, name)
        if by > 0 and used[name] + by > quota:
            raise quota_exceeded(name, quota, used[name])


def check_count(used: int, quotas: AccountQuotas, name: str, what: str, remedy: str) -> None:
    """Refuse one more of what is no column of :class:`Storage`, and counted by the rows there are.

    Args:
        used: how many the account has.
        quotas: what it may have.
        name: of the quota.
        what: is counted, in the plural.
        remedy: what its people can do.

    Raises:
        QuotaExceeded: where it has as many as it may have.
    """
    quota = getattr(quotas, name)
    if used >= quota:
        raise QuotaExceeded(f"The account has {quota:,} {what} (quota {name}). {remedy}", name)


def quota_exceeded(name: str, quota: int, used: int) -> QuotaExceeded:
    """The refusal of what would be more of ``name`` than ``quota``."""
    return QuotaExceeded(
        f"The account may have {quota:,} {COUNTED[name]} (quota {name}) and has {used:,}. Delete some "
        "of what it stores, or have the operator of the server raise the quota.",
        name,
    )


def lock(session: Session, account: str) -> Storage:
    """The row of an account, made where it is not there yet, locked until the transaction ends."""
    query = select(Storage).where(Storage.account == account)
    found = find_row(session, query, lock=True)
    if found is None:
        fresh = dialect_insert(session, Storage).values(
            account=account, **dict.fromkeys(COUNTED, 0)
        )
        session.execute(fresh.on_conflict_do_nothing())
        found = find_row(session, query, lock=True)
    assert found is not None
    return found
