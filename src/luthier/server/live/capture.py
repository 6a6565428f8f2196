"""Capture of requests to models: a bounded queue, and one thread that writes all records.

Requests only append to the queue. The thread writes the records of each account every
:data:`FLUSH_SECONDS` as one object of the built-in store, in one transaction with the rows of the
index. A killed server therefore loses at most the records of the last second, and leaves no partial
record.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial

from sqlalchemy import ColumnElement, and_, delete, func, select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from luthier.errors import DoesNotFit, ObjectRefused, QuotaExceeded, ReadOnlyDisk
from luthier.server.http.exchanges import Exchange
from luthier.server.live.records import (
    BODY_KEY,
    encode_record,
    folder_of,
    hour_folder,
    move_large_bodies,
    object_name,
    record_of,
)
from luthier.server.stores.objects import Objects
from luthier.server.tables.database import now
from luthier.server.tables.live.captures import CapturedRequest, CaptureSettings, Feedback
from luthier.server.tables.objects import Bucket, ObjectMetadata, StoredObject

FLUSH_SECONDS = 0.5
"""Interval between two writes of records, in seconds."""
EXPIRY_SECONDS = 60.0
"""Interval between two deletions of expired records, in seconds."""
QUEUE_BYTES = 64_000_000
"""Maximum size of waiting exchanges. Further exchanges are dropped and counted."""
OUTAGES = (DoesNotFit, ReadOnlyDisk, OperationalError)
"""Errors of a write that succeeds after the outage."""
_BATCH = 500
"""Number of objects per transaction of a deletion."""
_log = logging.getLogger("luthier.server")


class Capture:
    """Writer of captured requests. Safe to share between threads."""

    def __init__(self, objects: Objects, region: str = "us-east-1") -> None:
        self.objects, self.region = objects, region
        self.counts: Counter[str] = Counter(written=0, dropped=0)
        """Number of records by outcome, for the metrics."""
        self.on_expiry: Callable[[], None] = lambda: None
        """Called after expired records are deleted."""
        self._settings: Mapping[str, CaptureSettings] = {}
        self._queue: deque[Exchange] = deque()
        self._size = 0
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="capture", daemon=True)

    def start(self) -> None:
        """Read the settings and start the thread."""
        self.reload()
        self._thread.start()

    def close(self) -> None:
        """Write the waiting records and stop the thread."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()
        self.flush()

    def reload(self) -> None:
        """Read the settings of all accounts. Other servers notice a change within a second."""
        with self.objects.database.read() as session:
            rows = session.scalars(select(CaptureSettings).where(CaptureSettings.enabled)).all()
        self._settings = {row.account: row for row in rows}

    def captures(self, account: str) -> bool:
        """Return True if the next request of the account is captured."""
        found = self._settings.get(account)
        return found is not None and (found.share >= 1 or random.random() < found.share)

    def add(self, exchange: Exchange) -> None:
        """Queue an exchange; a full queue drops and counts the exchange."""
        with self._lock:
            # A request never waits for its capture, so memory is bounded by dropping.
            if self._size + exchange.size > QUEUE_BYTES:
                self.counts["dropped"] += 1
                return
            self._size += exchange.size
            self._queue.append(exchange)

    def flush(self) -> None:
        """Write all waiting records now."""
        with self._writing:
            with self._lock:
                # Taken out under the lock and written without the lock, so that requests do not
                # wait for the disk.
                waiting, self._queue, self._size = [*self._queue], deque(), 0
            groups: defaultdict[str, list[Exchange]] = defaultdict(list)
            for exchange in waiting:
                groups[exchange.account].append(exchange)
            for account, exchanges in groups.items():
                settings = self._settings.get(account)
                if settings is None:  # capture was disabled meanwhile
                    continue
                try:
                    self._write(settings, exchanges)
                except OUTAGES as error:
                    # The outage may end: the records wait, until the queue is full.
                    _log.warning("captured requests wait: %s", error)
                    for exchange in exchanges:
                        self.add(exchange)
                except (QuotaExceeded, ObjectRefused) as error:
                    self.counts["dropped"] += len(exchanges)
                    _log.warning("captured requests of account %s were dropped: %s", account, error)
                except Exception:
                    self.counts["dropped"] += len(exchanges)
                    _log.exception("captured requests of account %s were dropped", account)

    def _write(self, settings: CaptureSettings, exchanges: Sequence[Exchange]) -> None:
        moment = now()
        folder = hour_folder(settings, self.region, moment)
        key = f"{folder}/{object_name(moment)}"
        rows: list[CapturedRequest] = []
        members: list[bytes] = []
        offset = 0
        for exchange in exchanges:
            try:
                record, row = record_of(exchange, settings, self.region)
                bodies = [*move_large_bodies(record, settings.bucket, folder)]
                member = encode_record(record)
            except Exception:
                _log.exception("a request could not be captured")
                self.counts["dropped"] += 1
                continue
            # Before the record that names them: after a crash, a body may lack its record, but no
            # record lacks its body.
            for body_key, body in bodies:
                self._put(settings, body_key, [body], [])
            row.bucket, row.key, row.offset, row.size = settings.bucket, key, offset, len(member)
            offset += len(member)
            rows.append(row)
            members.append(member)
        if rows:
            self._put(settings, key, members, rows)
            self.counts["written"] += len(rows)

    def _put(
        self,
        settings: CaptureSettings,
        key: str,
        pieces: Sequence[bytes],
        rows: Sequence[CapturedRequest],
    ) -> None:
        """Write an object, and the rows in the same transaction."""
        account = settings.account
        with self.objects.begin(account) as file:
            for piece in pieces:
                file.write(piece)
            written = file.finish()
        self.objects.put(
            account, settings.bucket, key, written, ObjectMetadata(),
            also=lambda session: session.add_all(rows),
        )  # fmt: skip

    def _run(self) -> None:
        expired = time.monotonic()
        while not self._closed.wait(FLUSH_SECONDS):
            try:
                self.reload()
                self.flush()
                if time.monotonic() - expired > EXPIRY_SECONDS:
                    expired = time.monotonic()
                    remove_expired(self.objects)
                    self.on_expiry()
            except Exception:
                # The database is unreachable; the next pass tries again.
                _log.exception("captured requests could not be written")


def remove_expired(objects: Objects) -> None:
    """Delete the expired records of all accounts."""
    with objects.database.read() as session:
        settings = session.scalars(select(CaptureSettings)).all()
    for each in settings:
        remove_records(objects, each.account, each.days, each.most_bytes)


def remove_records(objects: Objects, account: str, days: float, most_bytes: int) -> int:
    """Delete records older than ``days``, and the oldest beyond ``most_bytes``.

    Returns:
        The number of deleted objects.
    """
    size, created = func.sum(CapturedRequest.size), func.max(CapturedRequest.created)
    records = (
        select(CapturedRequest.bucket, CapturedRequest.key, size, created)
        .where(CapturedRequest.account == account)
        .group_by(CapturedRequest.bucket, CapturedRequest.key)
        # Newest first, so that the running total decides which oldest records exceed the size.
        .order_by(created.desc(), CapturedRequest.key.desc())
    )
    oldest, total, deleted = now() - timedelta(days=days), 0, 0
    expired: defaultdict[str, list[tuple[str, list[str]]]] = defaultdict(list)
    with objects.database.read() as session:
        bodies = _bodies(session, account)
        for bucket, key, size_of_records, last in session.execute(records):
            own = bodies.get((bucket, key), {})
            total += size_of_records + sum(own.values())
            if total > most_bytes or last <= oldest:
                expired[bucket].append((key, [*own]))
    for bucket, found in expired.items():
        for first in range(0, len(found), _BATCH):
            part = found[first : first + _BATCH]
            keys = [key for key, _ in part]
            every = [*keys, *(body for _, own in part for body in own)]
            named = and_(CapturedRequest.bucket == bucket, CapturedRequest.key.in_(keys))
            forget = partial(_forget, account=account, condition=named)
            try:
                objects.delete(account, bucket, every, forget)
            except ObjectRefused:  # a client deleted the bucket
                with objects.database.write() as session:
                    forget(session)
            deleted += len(every)
    return deleted


def _bodies(session: Session, account: str) -> Mapping[tuple[str, str], dict[str, int]]:
    """Return sizes of large bodies by key, by bucket and key of the object with the record.

    Objects of clients, such as logs copied from AWS, are not in the result.
    """
    stored = (
        select(Bucket.name, StoredObject.key, StoredObject.size)
        .join(Bucket, Bucket.seq == StoredObject.bucket_seq)
        .where(
            StoredObject.account == account,
            StoredObject.key.contains(folder_of(account), autoescape=True),
        )
    )
    request_ids: dict[str, list[tuple[str, str, int]]] = {}
    for bucket, key, size in session.execute(stored):
        if match := BODY_KEY.search(key):
            request_ids.setdefault(match["request"], []).append((bucket, key, size))
    found: dict[tuple[str, str], dict[str, int]] = {}
    ids = [*request_ids]
    columns = CapturedRequest.id, CapturedRequest.bucket, CapturedRequest.key
    for first in range(0, len(ids), _BATCH):
        part = CapturedRequest.id.in_(ids[first : first + _BATCH])
        query = select(*columns).where(CapturedRequest.account == account, part)
        for request, record_bucket, record in session.execute(query):
            folder = record.rpartition("/")[0]
            for bucket, key, size in request_ids[request]:
                if (bucket, key.rpartition("/data/")[0]) == (record_bucket, folder):
                    found.setdefault((bucket, record), {})[key] = size
    return found


def _forget(session: Session, account: str, condition: ColumnElement[bool]) -> None:
    """Delete index rows of an account, with their feedback."""
    mine = CapturedRequest.account == account, condition
    rows = select(CapturedRequest.seq).where(*mine)
    session.execute(delete(Feedback).where(Feedback.request_seq.in_(rows)))
    session.execute(delete(CapturedRequest).where(*mine))
