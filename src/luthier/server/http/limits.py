"""Limits of the server: concurrent requests, and requests per second of an account."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from weakref import WeakValueDictionary

from luthier.server.http.messages import Caller, Fault
from luthier.server.tables.accounts import PrincipalsWatch, quota_of
from luthier.server.tables.database import Database

BURST_SECONDS = 2.0
"""Burst of an account, as seconds of the account's rate."""


class Slots:
    """Slots for concurrent requests, with a maximum number per account.

    All tasks that use the slots belong to one event loop.
    """

    def __init__(self, capacity: int, per_account: int, waiting: int) -> None:
        """Create ``capacity`` slots, at most ``per_account`` for each account.

        At most ``waiting`` requests of an account wait for a slot.
        """
        self._all, self._per_account = asyncio.Semaphore(capacity), per_account
        # Accounts without a request leave the dictionary, which therefore stays small.
        self._own: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        self._most_waiting, self._waiting = waiting, Counter[str]()

    @asynccontextmanager
    async def turn(self, account: str, seconds: float | None = None) -> AsyncIterator[None]:
        """Occupy a slot of ``account``.

        Raises:
            Fault: ``Throttling`` if too many requests of the account wait, or no slot is free
                within
                ``seconds``.
        """
        # This local variable keeps the semaphore in the weak dictionary until the turn ends.
        own = self._own.setdefault(account, asyncio.Semaphore(self._per_account))
        if self._waiting[account] >= self._most_waiting:
            raise _busy()
        self._waiting[account] += 1
        try:
            async with asyncio.timeout(seconds):
                # The account's slot comes first: a request that waits for its own account must not
                # occupy a slot of all accounts.
                await own.acquire()
                try:
                    await self._all.acquire()
                except BaseException:
                    own.release()
                    raise
        except TimeoutError:
            raise _busy() from None
        finally:
            self._waiting[account] -= 1
            if not self._waiting[account]:
                del self._waiting[account]
        try:
            yield
        finally:
            self._all.release()
            own.release()


def _busy() -> Fault:
    text = "The account has too many active requests. Wait and try again."
    return Fault("Throttling", text, retry_after=2)


@dataclass
class _Bucket:
    rate: float
    """Rate in tokens per second; infinite without a limit."""
    tokens: float
    filled: float
    """Time of the last refill."""
    version: str
    """Version of the principals when the rate was read."""


class RateLimits:
    """Rate limits of accounts, from the account's quota or the server's default.

    Each process has separate buckets.
    """

    def __init__(
        self,
        database: Database,
        requests_per_second: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Set the default rate; ``None`` for no limit."""
        self._database, self._default, self._clock = database, requests_per_second, clock
        self._watch = PrincipalsWatch(database)
        self._lock = threading.Lock()
        self._buckets: dict[str, _Bucket] = {}

    def admit(self, caller: Caller) -> None:
        """Consume a token of the caller's account.

        Raises:
            Fault: ``Throttling``, with whole seconds in the detail ``retry_after``.
        """
        # Read the version before the rate: a later change of the quota then invalidates the rate.
        version = self._watch.token()
        known = self._buckets.get(caller.account)
        rate = known.rate if known and known.version == version else self._rate(caller.account)
        # Lock after the query of the rate: no request waits for the query of another request.
        with self._lock:
            missing = self._take(caller.account, rate, version)
        if missing > 0:
            text = "The account exceeds the rate limit. Wait and try again."
            wait = missing / rate if rate > 0 else 60
            raise Fault("Throttling", text, retry_after=max(1, round(wait + 0.5)))

    def _take(self, account: str, rate: float, version: str) -> float:
        """Consume a token and return 0, or return the missing part of a token."""
        moment = self._clock()
        size = max(1.0, rate * BURST_SECONDS) if rate > 0 else 0.0
        bucket = self._buckets.setdefault(account, _Bucket(rate, size, moment, version))
        # 0 seconds times an infinite rate would be NaN.
        grown = 0.0 if rate == float("inf") else (moment - bucket.filled) * rate
        if rate != bucket.rate:
            grown = size
        bucket.tokens = size if size == float("inf") else min(size, bucket.tokens + grown)
        bucket.rate, bucket.filled, bucket.version = rate, moment, version
        if bucket.tokens < 1:
            return 1 - bucket.tokens
        bucket.tokens -= 1
        return 0.0

    def _rate(self, account: str) -> float:
        with self._database.read() as session:
            own = quota_of(session, account).get("requests_per_second")
        rate = self._default if own is None else own
        return float("inf") if rate is None else float(rate)
