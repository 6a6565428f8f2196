"""How many requests an account may send, and how many bodies are read for nobody: in memory."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from luthier.api.wire import Caller, Fault
from luthier.store.accounts import PrincipalsWatch, quota_of
from luthier.store.database import Database

WINDOW_SECONDS = 60.0
BURST_SECONDS = 2.0
"""A bucket holds the tokens of this long: what an idle account may send at once."""
ADDRESS_BURST_SECONDS = 0.5
"""The same for all requests of an address: what comes in at once delays whoever comes behind it."""
REFUSALS = frozenset({400, 401, 403, 413, 499})
"""Statuses that say the request was at fault, or its client gone. Not 404: clients ask whether things
exist; and not 429, which the server's load may cause."""
REFUSAL_COST = 4
"""Requests that a refused one counts as: 250 refused bodies of 24 MB a second made a neighbour's chat
take 1.4 to 2.7 times as long on one core, and 66 of them 1.6 times."""
WAIT_SECONDS = 2.0
"""For which a request waits at most: what waits takes memory, also when its client has left."""
SPENT_SECONDS = 1.0
"""For which an address whose request would wait too long opens no connection. To look at its pace alone
let sixteen connections in whenever there was time for one request."""
PACED_ADDRESSES = 10_000
"""Addresses that are remembered, until those that wait for nothing are forgotten."""


@dataclass
class _Bucket:
    rate: float
    """Tokens a second; infinite for no limit."""
    tokens: float
    filled: float
    """When it was filled last."""
    version: str
    """Of the principals, when the rate was read."""


class RateLimits:
    """Admits callers; each account has its rate from its quota, or the server's default.

    A bucket is kept by each process of its own.
    """

    def __init__(
        self,
        database: Database,
        requests_per_second: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``requests_per_second`` is the default; ``None`` for no limit."""
        self._database, self._default, self._clock = database, requests_per_second, clock
        self._watch = PrincipalsWatch(database)
        self._lock = threading.Lock()
        self._buckets: dict[str, _Bucket] = {}

    def admit(self, caller: Caller) -> None:
        """Take a token of the caller's account.

        Raises:
            Fault: ``Throttling``, with whole seconds in ``retry_after`` of its details.
        """
        version = self._watch.token()
        known = self._buckets.get(caller.account)
        rate = known.rate if known and known.version == version else self._rate(caller.account)
        with self._lock:
            missing = self._take(caller.account, rate, version)
        if missing > 0:
            wait = max(1, round(missing / rate + 0.5)) if rate > 0 else 60
            text = "Too many requests, please wait before trying again."
            raise Fault("Throttling", text, retry_after=wait)

    def _take(self, account: str, rate: float, version: str) -> float:
        """Take a token; tokens that are missing, 0 where there was one."""
        moment = self._clock()
        size = max(1.0, rate * BURST_SECONDS) if rate > 0 else 0.0
        bucket = self._buckets.setdefault(account, _Bucket(rate, size, moment, version))
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


class RequestPace:
    """Lets each address begin so many requests a second; further ones wait for their moment.

    Whatever a request is answered, it takes time of the one thread that reads all connections, which a
    client that is refused over and over would else take from the others.
    """

    def __init__(self, per_second: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval, self._clock = 1 / per_second, clock
        self._next: dict[str, float] = {}
        """When the next request of an address may begin, those of a burst aside."""
        self._spent_until: dict[str, float] = {}

    def delay(self, address: str) -> float:
        """Seconds that a request that comes now has to wait.

        Raises:
            Fault: ``Throttling`` where that would be too long; then the request does not count.
        """
        moment = self._clock()
        if (wait := self._next.get(address, 0.0) - moment - ADDRESS_BURST_SECONDS) > WAIT_SECONDS:
            self._spent_until[address] = moment + SPENT_SECONDS
            text = "Too many requests from this address, please wait before trying again."
            raise Fault("Throttling", text, retry_after=max(1, round(wait + 0.5)))
        if len(self._next) > PACED_ADDRESSES:
            self._next = {each: at for each, at in self._next.items() if at > moment}
            self._spent_until = {k: at for k, at in self._spent_until.items() if at > moment}
        at = max(self._next.get(address, 0.0), moment)
        self._next[address] = at + self._interval
        return max(0.0, at - moment - ADDRESS_BURST_SECONDS)

    def charge_refusal(self, address: str) -> None:
        """A request of ``address`` was refused: its next ones wait longer."""
        moment = self._clock()
        later = max(self._next.get(address, 0.0), moment) + self._interval * (REFUSAL_COST - 1)
        self._next[address] = min(later, moment + ADDRESS_BURST_SECONDS + 2 * WAIT_SECONDS)

    def is_spent(self, address: str) -> bool:
        """Whether a request of ``address`` was refused just now because it would wait too long."""
        return self._spent_until.get(address, 0.0) > self._clock()


class WrongBodies:
    """Counts bodies that were read for nothing, by the address and the key or account they came under.

    Whoever knows the name of a key, which is no secret, could else have bodies read and hashed without
    end, and who has an account could have them parsed. By both, so that nobody keeps the owner of a key
    from using it elsewhere.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._clock = per_minute, clock
        self._lock = threading.Lock()
        self._since, self._counts = clock(), Counter[tuple[str, str]]()

    def check(self, address: str, sender: str) -> None:
        """Refuse a body before it is read; ``Throttling`` where too many of them were wrong."""
        with self._lock:
            wait = WINDOW_SECONDS - (self._clock() - self._since)
            if wait <= 0:
                self._counts.clear()
                self._since = self._clock()
            count = self._counts.get((address, sender), 0)
        if count >= self._most:
            text = (
                "Too many large requests whose signature was wrong, or that could not be used. Please "
                "wait before trying again."
            )
            raise Fault("Throttling", text, retry_after=max(1, round(wait + 0.5)))

    def count(self, address: str, sender: str) -> None:
        """A body was read for nothing."""
        with self._lock:
            self._counts[address, sender] += 1
