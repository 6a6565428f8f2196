"""The audit log: who did what, and what was refused. Entries are only ever added.

Each entry holds the hash of the one before, so that whoever changes, removes or inserts one has to
write all later ones anew; a hash that was noted elsewhere (``luthier audit verify`` prints the last)
shows even that. A running server notes the last one in the store by itself (:func:`write_mark`), so
that a log that is emptied or cut in the database alone is noticed. What stands in it:

- every change, before its answer leaves; and every refusal by a role, soon after it;
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
from pathlib import Path
from typing import Any

from sqlalchemy import func, insert, select, table
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Mapped, Session, mapped_column

from luthier.errors import CorruptFile
from luthier.files import lock, read_json, write_json
from luthier.store.database import Base, dialect_insert, now
from luthier.store.text import storable_value

GENESIS = "0" * 64
"""What stands before the first entry."""
LONGEST = 2048
"""Characters of a field at most."""
MARK = "audit.json"
"""File of the store that says where the log ended when a server last looked."""
_PAGE = 1000
_AUDITED = ("users", "jobs", "buckets", "custom_models")
"""Tables whose rows were made by something that has an entry."""


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
        # Names come from requests: what is endless is cut. Details are hashed as they will be read.
        fields = {
            name: value[:LONGEST] if isinstance(value, str) else value
            for name, value in storable_value(asdict(event)).items()
        }
        row: dict[str, Any] = {**fields, "seq": head.seq + 1, "previous": head.hash}
        row["hash"] = _hash(row)
        head.seq, head.hash = row["seq"], row["hash"]
        rows.append(row)
    session.execute(insert(AuditEntry), rows)
    session.flush()


@dataclass(frozen=True)
class Mark:
    """An entry that was the last one once."""

    seq: int
    hash: str


def verify(session: Session, noted: str | None = None, mark: Mark | None = None) -> Broken | None:
    """The first entry that is not as it was written; ``None`` where the whole chain holds.

    Without ``noted`` and ``mark`` a log that was cut at its end, with its head, is whole in itself; one
    that was emptied is not, where the store holds what has entries.

    Args:
        session: one that reads.
        noted: a hash that was the last one once; it has to stand in the chain still.
        mark: the same with its number, as the store notes it.
    """
    # What is added while we read stands after this one.
    try:
        end = last(session)
    except CorruptFile as error:
        return Broken(1, str(error))
    previous, seq, seen, anchored = GENESIS, 0, noted in (None, GENESIS), end == (0, GENESIS)
    for number, entry in _all(session):
        seq += 1
        if number != seq:
            return Broken(seq, f"entry {seq} is missing")
        try:
            changed = entry is None or _hash(_fields(entry)) != entry.hash
        except (AttributeError, OverflowError, RecursionError, TypeError, ValueError):
            entry = None
        if entry is None:
            return Broken(seq, "it cannot be read: its fields are not as they were written")
        if entry.previous != previous:
            return Broken(seq, "it does not hold the hash of the entry before")
        if changed:
            return Broken(seq, "its hash is not that of its content")
        if mark is not None and mark.seq == seq and mark.hash != entry.hash:
            return Broken(seq, f"it is another one than {MARK} in the store notes")
        previous = entry.hash
        seen = seen or previous == noted
        anchored = anchored or (seq, previous) == end
    if not anchored or seq > last(session)[0]:
        return Broken(seq + 1, f"the log ends at entry {seq} and should end at another one")
    if mark is not None and mark.seq > seq:
        text = f"the log ends at entry {seq}, and {MARK} in the store notes entry {mark.seq}"
        return Broken(
            seq + 1, f"{text}: later entries were removed, or the database is another one"
        )
    if not seq and (rows := _rows_with_entries(session)):
        return Broken(1, f"the log is empty, and the store holds {rows}: its entries were removed")
    return None if seen else Broken(seq, "the noted hash does not stand in the log")


def write_mark(session: Session, home: Path) -> bool:
    """Note in the store where the log ends; whether what was noted before stands in it still.

    If not, that stays noted: a log that was cut and goes on is not taken for whole later. Nothing was
    read by ``session`` before, or it may not see what another server noted meanwhile.
    """
    with lock(home / f"{MARK}.lock", wait=True):
        seq, digest = last(session)
        before = read_mark(home)
        if before is not None and before.seq:
            known = select(AuditEntry.hash).where(AuditEntry.seq == before.seq)
            if session.scalar(known) != before.hash:
                return False
        if before is None or seq > before.seq:
            write_json(home / MARK, {"seq": seq, "hash": digest, "at": now().isoformat()})
    return True


def read_mark(home: Path) -> Mark | None:
    """What :func:`write_mark` noted last.

    Raises:
        CorruptFile: where it cannot be read.
    """
    path = home / MARK
    if not path.exists():
        return None
    found = read_json(path)
    try:
        return Mark(int(found["seq"]), str(found["hash"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFile(f"{path} does not say where the audit log ended") from error


def last(session: Session) -> tuple[int, str]:
    """Number and hash of the last entry.

    Raises:
        CorruptFile: where the row that says so was changed into something else.
    """
    try:
        head = session.get(AuditHead, 1, populate_existing=True)
    except Exception as error:
        if not _unreadable(error):
            raise
        head = AuditHead(seq="", hash="")
    if head is None:
        return 0, GENESIS
    if not (isinstance(head.seq, int) and isinstance(head.hash, str)):
        raise CorruptFile(
            "the number and the hash of the last entry of the audit log cannot be read"
        )
    return head.seq, head.hash


def entries(
    session: Session,
    account: str | None = None,
    user: str | None = None,
    action: str | None = None,
    since: datetime | None = None,
    before: int | None = None,
    limit: int = 100,
) -> Sequence[AuditEntry]:
    """Entries, the newest first; ``before`` is the number of the last one that was seen.

    Raises:
        CorruptFile: where one of them cannot be read.
    """
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
    try:
        return session.scalars(query).all()
    except Exception as error:
        if not _unreadable(error):
            raise
        raise CorruptFile(
            "an entry of the audit log cannot be read: it was changed. `luthier audit verify` names "
            "it; --before and --since pass it over"
        ) from error


def entry_values(entry: AuditEntry) -> dict[str, Any]:
    """An entry as plain values."""
    return {**_plain(_fields(entry)), "hash": entry.hash}


def _first_head(session: Session) -> AuditHead:
    """Two may come to an empty log at once; one of them makes the row, and both lock it."""
    made = dialect_insert(session, AuditHead).values(id=1, seq=0, hash=GENESIS)
    session.execute(made.on_conflict_do_nothing())
    return session.get_one(AuditHead, 1, with_for_update=True, populate_existing=True)


def _all(session: Session) -> Iterator[tuple[int, AuditEntry | None]]:
    """Numbers and entries, in order; ``None`` for one whose columns hold what nobody wrote there."""
    seq = 0
    while True:
        numbers = select(AuditEntry.seq).where(AuditEntry.seq > seq).order_by(AuditEntry.seq)
        page = session.scalars(numbers.limit(_PAGE)).all()
        if not page:
            return
        try:
            read = select(AuditEntry).where(AuditEntry.seq.between(page[0], page[-1]))
            found = {entry.seq: entry for entry in session.scalars(read)}
        except Exception as error:
            if not _unreadable(error):
                raise
            found = {number: entry for number in page if (entry := _entry(session, number))}
        for number in page:
            yield number, found.get(number)
        session.expunge_all()
        seq = page[-1]


def _entry(session: Session, seq: int) -> AuditEntry | None:
    try:
        return session.get(AuditEntry, seq)
    except Exception as error:
        if not _unreadable(error):
            raise
        return None


def _unreadable(error: Exception) -> bool:
    """Whether a value was read that its column cannot hold, and not the database is away."""
    if isinstance(error, DBAPIError):
        # SQLite says so of texts that are no UTF-8, PostgreSQL's driver of times without end.
        return "decode" in str(error) or type(error.orig).__name__ == "DataError"
    values = (OverflowError, RecursionError, TypeError, ValueError)
    return isinstance(error, values) or type(error).__name__ == "DataError"


def _rows_with_entries(session: Session) -> str:
    """What the store holds that has entries in the log, in words."""
    counts = {
        name: session.scalar(select(func.count()).select_from(table(name))) for name in _AUDITED
    }
    return ", ".join(
        f"{name.replace('_', ' ')} ({count})" for name, count in counts.items() if count
    )


def _fields(entry: AuditEntry) -> dict[str, Any]:
    names = (column.key for column in AuditEntry.__table__.columns)
    return {name: getattr(entry, name) for name in names if name != "hash"}


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "at": row["at"].astimezone(UTC).isoformat(timespec="microseconds")}


def _hash(row: dict[str, Any]) -> str:
    """SHA-256 of the fields as JSON: keys sorted, no blanks, ASCII."""
    text = json.dumps(_plain(row), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
