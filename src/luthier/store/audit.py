"""The audit log: who did what, and what was refused. Entries are only ever added.

Each entry holds the hash of the one before, so that whoever changes, removes or inserts one has to
write all later ones anew; a hash that was noted elsewhere (``luthier audit verify`` prints the last)
shows even that. What stands in it:

- every change, before its answer leaves; and every refusal by a policy, soon after it;
- callers that were not let in, counted by address and reason;
- calls that only read or infer, counted by user, action and resource.

Counts are written once a minute, and when the service stops: a process that is killed loses the
counts of its last minute, and nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import func, insert, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from luthier.store.database import Base, now

GENESIS = "0" * 64
"""What stands before the first entry."""
LONGEST = 2048
"""Characters of a field at most."""
_PAGE = 1000


class AuditEntry(Base):
    """One entry."""

    __tablename__ = "audit_log"

    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    """1, 2, 3, …: none is left out."""
    at: Mapped[datetime]
    account: Mapped[str] = mapped_column(index=True)
    """Empty for a caller that was not let in."""
    user: Mapped[str]
    action: Mapped[str]
    resource: Mapped[str]
    outcome: Mapped[str]
    """``ok``, or the code of the refusal or failure."""
    request_id: Mapped[str]
    address: Mapped[str]
    details: Mapped[dict[str, Any]]
    previous: Mapped[str]
    """Hash of the entry before."""
    hash: Mapped[str]
    """SHA-256, hexadecimal, of all of the above as canonical JSON."""


class AuditHead(Base):
    """One row: the last entry. Who adds one holds it locked until its transaction ends."""

    __tablename__ = "audit_head"

    id: Mapped[int] = mapped_column(primary_key=True)
    seq: Mapped[int]
    hash: Mapped[str]


@dataclass(frozen=True)
class Event:
    """What is to be written."""

    action: str
    resource: str = "*"
    outcome: str = "ok"
    account: str = ""
    user: str = ""
    request_id: str = ""
    address: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    """Plain values: strings, whole numbers, booleans."""
    at: datetime = field(default_factory=now)


@dataclass(frozen=True)
class Broken:
    """Where the chain does not hold."""

    seq: int
    reason: str


def append(session: Session, *events: Event) -> None:
    """Add entries in the transaction of ``session``: they are there if and only if it is committed.

    Writers of other transactions wait for its end; on SQLite they do anyway.
    """
    head = session.get(AuditHead, 1, with_for_update=True, populate_existing=True)
    if head is None:
        head = _first_head(session)
    rows = []
    for event in events:
        row = {**_storable(asdict(event)), "seq": head.seq + 1, "previous": head.hash}
        row["hash"] = _hash(row)
        head.seq, head.hash = row["seq"], row["hash"]
        rows.append(row)
    session.execute(insert(AuditEntry), rows)
    session.flush()


def verify(session: Session, noted: str | None = None) -> Broken | None:
    """The first entry that is not as it was written; ``None`` where the whole chain holds.

    Args:
        session: one that reads.
        noted: a hash that was the last one once; it has to stand in the chain still.
    """
    # What is added while we read stands after this one.
    told = last(session)
    previous, seq, seen, anchored = GENESIS, 0, noted in (None, GENESIS), told == (0, GENESIS)
    for entry in _all(session):
        seq += 1
        if entry.seq != seq:
            return Broken(seq, f"entry {seq} is missing")
        if entry.previous != previous:
            return Broken(seq, "it does not hold the hash of the entry before")
        if _hash(_fields(entry)) != entry.hash:
            return Broken(seq, "its hash is not that of its content")
        previous = entry.hash
        seen = seen or previous == noted
        anchored = anchored or (seq, previous) == told
    if not anchored or seq > last(session)[0]:
        return Broken(seq + 1, f"the log ends at entry {seq} and should end at another one")
    return None if seen else Broken(seq, "the noted hash does not stand in the log")


def last(session: Session) -> tuple[int, str]:
    """Number and hash of the last entry."""
    head = session.get(AuditHead, 1, populate_existing=True)
    return (head.seq, head.hash) if head else (0, GENESIS)


def entries(
    session: Session,
    account: str | None = None,
    user: str | None = None,
    action: str | None = None,
    since: datetime | None = None,
    before: int | None = None,
    limit: int = 100,
) -> Sequence[AuditEntry]:
    """Entries, the newest first; ``before`` is the number of the last one that was seen."""
    query = select(AuditEntry).order_by(AuditEntry.seq.desc()).limit(limit)
    if account is not None:
        query = query.where(AuditEntry.account == account)
    if user is not None:
        query = query.where(AuditEntry.user == user)
    if action is not None:
        query = query.where(func.lower(AuditEntry.action).contains(action.lower(), autoescape=True))
    if since is not None:
        query = query.where(AuditEntry.at >= since)
    if before is not None:
        query = query.where(AuditEntry.seq < before)
    return session.scalars(query).all()


def shown(entry: AuditEntry) -> dict[str, Any]:
    """An entry as plain values."""
    return {**_plain(_fields(entry)), "hash": entry.hash}


def _first_head(session: Session) -> AuditHead:
    """Two may come to an empty log at once; one of them makes the row, and both lock it."""
    if session.get_bind().dialect.name == "postgresql":
        from sqlalchemy.dialects.postgresql import insert as insert_or_leave

        made = insert_or_leave(AuditHead).values(id=1, seq=0, hash=GENESIS)
        session.execute(made.on_conflict_do_nothing())
        return session.get_one(AuditHead, 1, with_for_update=True, populate_existing=True)
    head = AuditHead(id=1, seq=0, hash=GENESIS)
    session.add(head)
    return head


def _all(session: Session) -> Iterator[AuditEntry]:
    seq = 0
    while True:
        query = select(AuditEntry).where(AuditEntry.seq > seq).order_by(AuditEntry.seq).limit(_PAGE)
        page = session.scalars(query).all()
        yield from page
        session.expunge_all()
        if len(page) < _PAGE:
            return
        seq = page[-1].seq


def _storable(row: dict[str, Any]) -> dict[str, Any]:
    """Names come from requests: what a database cannot hold is replaced, what is endless is cut."""
    return {
        name: value.encode("utf-8", "replace").decode().replace("\0", "\ufffd")[:LONGEST]
        if isinstance(value, str)
        else value
        for name, value in row.items()
    }


def _fields(entry: AuditEntry) -> dict[str, Any]:
    names = (column.key for column in AuditEntry.__table__.columns)
    return {name: getattr(entry, name) for name in names if name != "hash"}


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "at": row["at"].astimezone(UTC).isoformat(timespec="microseconds")}


def _hash(row: dict[str, Any]) -> str:
    """SHA-256 of the fields as JSON: keys sorted, no blanks, ASCII."""
    text = json.dumps(_plain(row), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
