"""Pages of the keys of a bucket, by their UTF-8 bytes, with common prefixes rolled up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from luthier.server.tables.database import Database
from luthier.server.tables.objects import StoredObject, get_bucket

_BATCH = 1000


@dataclass(frozen=True)
class KeyPage:
    """Page of keys, in order."""

    entries: tuple[StoredObject | str, ...]
    """Objects, and common prefixes as text, in order."""
    next: str | None
    """First key of the next page; ``None`` on the last page."""

    @property
    def objects(self) -> list[StoredObject]:
        """Objects without the common prefixes."""
        return [each for each in self.entries if isinstance(each, StoredObject)]

    @property
    def prefixes(self) -> list[str]:
        """Common prefixes."""
        return [each for each in self.entries if isinstance(each, str)]


def page(
    database: Database,
    account: str,
    bucket: str,
    *,
    prefix: str = "",
    delimiter: str = "",
    start: str = "",
    limit: int = 1000,
) -> KeyPage:
    """Return at most ``limit`` keys and common prefixes of a bucket.

    Args:
        database: database of the rows.
        account: account that owns the bucket.
        bucket: name of the bucket.
        prefix: prefix of the keys.
        delimiter: separator after which keys with a common prefix are one entry.
        start: lower bound of the keys.
        limit: maximum number of entries, 0 or more.

    Raises:
        ObjectRefused: ``NoSuchBucket``.
    """
    with database.read() as session:
        seq = get_bucket(session, account, bucket).seq
        entries: list[StoredObject | str] = []
        for entry, at in _walk(session, seq, prefix, delimiter, max(start, prefix), limit):
            if len(entries) == limit:
                return KeyPage(tuple(entries), at)
            entries.append(entry)
        return KeyPage(tuple(entries), None)


def after(key: str) -> str:
    """Return the smallest text after ``key``. Keys contain no NUL."""
    return key + "\1"


def beyond(prefix: str) -> str | None:
    """Return the first key after all keys with ``prefix``; ``None`` if no such key exists."""
    while prefix and ord(prefix[-1]) == 0x10FFFF:
        prefix = prefix[:-1]
    if not prefix:
        return None
    # Code points sort like UTF-8. Surrogates are not valid.
    following = ord(prefix[-1]) + 1
    return prefix[:-1] + chr(0xE000 if following == 0xD800 else following)


def rolled_up(key: str, prefix: str, delimiter: str) -> str | None:
    """Return the common prefix that replaces ``key`` in a listing, or ``None``."""
    if not delimiter or not key.startswith(prefix):
        return None
    end = key.find(delimiter, len(prefix))
    return key[: end + len(delimiter)] if end >= 0 else None


def _walk(
    session: Session, seq: int, prefix: str, delimiter: str, start: str, limit: int
) -> Iterator[tuple[StoredObject | str, str]]:
    """Yield each entry with the start key of a page that begins with the entry."""
    at: str | None = start
    end = beyond(prefix)
    while at is not None:
        rows = _rows(session, seq, at, end, min(limit + 1, _BATCH))
        if not rows:
            return
        for row in rows:
            if row.key < at:
                continue  # below a listed common prefix
            group = rolled_up(row.key, prefix, delimiter)
            yield (row if group is None else group), row.key
            following = beyond(group) if group is not None else after(row.key)
            if following is None:
                return
            at = following


def _rows(session: Session, seq: int, at: str, end: str | None, limit: int) -> list[StoredObject]:
    query = select(StoredObject).where(StoredObject.bucket_seq == seq, StoredObject.key >= at)
    if end is not None:
        query = query.where(StoredObject.key < end)
    return list(session.scalars(query.order_by(StoredObject.key).limit(limit)))
