"""Counts what each account uses, in memory, and writes it to the database once a minute.

A process that is killed loses the counts of its last minute. Seconds of training are written by the
workers themselves, as they renew their leases (``luthier.store.jobs``).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from datetime import date
from typing import TYPE_CHECKING

from sqlalchemy import select

from luthier.store.database import Database, now
from luthier.store.storage import Storage
from luthier.store.usage import Used, add_usage, training_seconds

if TYPE_CHECKING:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

WRITE_SECONDS = 60.0
"""How often counts are written."""
MOST_ACCOUNTS = 1000
"""Accounts that metrics tell apart; all others are one, so that no scrape grows without end."""
OTHER = "other"

_log = logging.getLogger("luthier.api")


class Meter:
    """What accounts use of this server. Close it, or the counts of its last minute are lost."""

    def __init__(self, database: Database, write_seconds: float = WRITE_SECONDS) -> None:
        """``write_seconds`` is how often counts are written."""
        self._database, self._write_seconds = database, write_seconds
        self._lock = threading.Lock()
        self._used: dict[tuple[date, str, str], Used] = {}
        self._totals: dict[str, Used] = {}
        """By account, since the start."""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="meter", daemon=True)
        self._thread.start()

    def count(self, account: str, model: str, used: Used) -> None:
        """Add what ``account`` used, of the model with this stored id; empty for none.

        It is called in the event loop, and so never writes.
        """
        with self._lock:
            self._used.setdefault((now().date(), account, model), Used()).add(used)
            known = account in self._totals or len(self._totals) < MOST_ACCOUNTS
            self._totals.setdefault(account if known else OTHER, Used()).add(used)

    def write(self) -> None:
        """Write what was counted; where that fails it is written with the next."""
        with self._lock:
            used, self._used = self._used, {}
        try:
            with self._database.write() as session:
                stored = session.execute(select(Storage.account, Storage.stored_bytes)).all()
                today = now().date()
                for account, size in stored:
                    if size:
                        peak = Used(stored_bytes=size)
                        used.setdefault((today, account, ""), Used()).add(peak)
                add_usage(session, used)
        except Exception:
            _log.exception("usage could not be written; it is tried again")
            with self._lock:
                for key, each in used.items():
                    self._used.setdefault(key, Used()).add(each)

    def close(self) -> None:
        """Write all that is left."""
        self._closing.set()
        self._thread.join()
        self.write()

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """Metrics by account for Prometheus: of this process since its start, but for what is stored
        and trained, which all processes share.
        """
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        with self._lock:
            totals = {account: Used(**vars(used)) for account, used in self._totals.items()}
        for name, about in _COUNTERS.items():
            family = CounterMetricFamily(f"luthier_account_{name}", about, labels=["account"])
            for account, used in totals.items():
                family.add_metric([account], getattr(used, name))
            yield family
        with self._database.read() as session:
            largest = select(Storage.account, Storage.stored_bytes)
            ordered = largest.order_by(Storage.stored_bytes.desc())
            stored = {account: float(size) for account, size in session.execute(ordered)}
            trained = training_seconds(session)
        family = CounterMetricFamily(
            "luthier_account_training_seconds", "Seconds of work on jobs.", labels=["account"]
        )
        for account, seconds in _bounded(trained):
            family.add_metric([account], seconds)
        yield family
        gauge = GaugeMetricFamily(
            "luthier_account_stored_bytes", "Bytes that are stored now.", labels=["account"]
        )
        for account, size in _bounded(stored):
            gauge.add_metric([account], size)
        yield gauge

    def _run(self) -> None:
        while not self._closing.wait(self._write_seconds):
            self.write()


_COUNTERS = {
    "requests": "Requests of the account's keys, and lines of its batches.",
    "prompt_tokens": "Tokens that models read for the account.",
    "generated_tokens": "Tokens that models wrote for the account.",
    "bytes_in": "Bytes of the bodies of its requests.",
    "bytes_out": "Bytes of the bodies of its answers.",
}


def _bounded(values: dict[str, float]) -> Iterator[tuple[str, float]]:
    """The largest ``MOST_ACCOUNTS`` by name, all others as one."""
    ordered = sorted(values.items(), key=lambda pair: -pair[1])
    yield from ordered[:MOST_ACCOUNTS]
    if ordered[MOST_ACCOUNTS:]:
        yield OTHER, sum(value for _, value in ordered[MOST_ACCOUNTS:])
