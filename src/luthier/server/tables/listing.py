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
class Page:
    """Some of the keys, in order."""

    entries: tuple[StoredObject | str, ...]
    """Objects, and common prefixes (as text) where they belong among them."""
    next: str | None
    """From which key the next page goes on; ``None`` where there is no more."""

    @property
    def objects(self) -> list[StoredObject]:
        """Without the common prefixes."""
        return [each for each in self.entries if isinstance(each, StoredObject)]

    @property
    def prefixes(self) -> list[str]:
        """The common prefixes."""
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
) -> Page:
    """At most ``limit`` keys and common prefixes of a bucket.

    Args:
        database: where the rows are.
        account: whose bucket it is.
        bucket: its name.
        prefix: what the keys begin with.
        delimiter: keys that hold it after the prefix are one entry: what stands up to its end.
        start: the first key that may be listed.
        limit: entries, 0 or more.

    Raises:
        ObjectRefused: ``NoSuchBucket``.
    """
    with database.read() as session:
        seq = get_bucket(session, account, bucket).seq
        entries: list[StoredObject | str] = []
        for entry, at in _walk(session, seq, prefix, delimiter, max(start, prefix), limit):
            if len(entries) == limit:
                return Page(tuple(entries), at)
            entries.append(entry)
        return Page(tuple(entries), None)


def after(key: str) -> str:
    """The first key that can come after ``key``: keys hold no NUL."""
    return key + "\1"


def beyond(prefix: str) -> str | None:
    """The first key after all that begin with ``prefix``; ``None`` where they are the last ones."""
    while prefix and ord(prefix[-1]) == 0x10FFFF:
        prefix = prefix[:-1]
    if not prefix:
        return None
    # Code points are in the order of their UTF-8; surrogates are none.
    following = ord(prefix[-1]) + 1
    return prefix[:-1] + chr(0xE000 if following == 0xD800 else following)


def rolled_up(key: str, prefix: str, delimiter: str) -> str | None:
    """The common prefix that stands for ``key`` in a listing, if one does."""
    if not delimiter or not key.startswith(prefix):
        return None
    end = key.find(delimiter, len(prefix))
    return key[: end + len(delimiter)] if end >= 0 else None


def _walk(
    session: Session, seq: int, prefix: str, delimiter: str, start: str, limit: int
) -> Iterator[tuple[StoredObject | str, str]]:
    """Each entry, and the key that a page which begins with it starts at."""
    at: str | None = start
    end = beyond(prefix)
    while at is not None:
        rows = _rows(session, seq, at, end, min(limit + 1, _BATCH))
        if not rows:
            return
        for row in rows:
            if row.key < at:
                continue  # of a common prefix that is already listed
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
