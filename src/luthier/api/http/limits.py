"""Who may have how much of the server at once: threads, turns, requests a second, bodies read in vain.

One account never holds all of it.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import (
    AbstractAsyncContextManager,
    asynccontextmanager,
    contextmanager,
    nullcontext,
)
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from luthier.api.http.messages import Caller, Fault, Response
from luthier.api.http.metrics import RequestRecord
from luthier.api.http.routing import Operation
from luthier.api.http.streams import Run
from luthier.errors import RefusedInput
from luthier.limits import ServerLimits
from luthier.serving.prompts import on_prompt_tokenized
from luthier.serving.scheduler import discount
from luthier.store.accounts import PrincipalsWatch, quota_of
from luthier.store.database import Database

T = TypeVar("T")

SHORT_REQUESTS = 16
"""Threads beside those for what takes long: they answer what is short, and close streams."""
SHORT_REQUESTS_PER_CLIENT = 2
"""Of those, for one key from one address."""
REST_FACTOR = 4.0
"""For so many times the processor time of a short request its slot takes no other one of its client
while others are at work: they all compute in Python, one at a time. Forty connections that listed 400
files made a neighbour's chat take 3.6 times as long, and 1.5 times with this."""
LONGEST_REST = 1.0
"""Seconds."""
USELESS_BODY_BYTES = 1 << 20
"""Larger bodies that cannot be used are counted: to read and parse them takes time of all others."""
UNUSABLE = frozenset({"Validation", "Serialization", "RequestEntityTooLarge"})
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


class Threads:
    """Calls functions in threads, with the context of the task that asks.

    A plain executor: anyio's costs a fifth of a short request, in finding out which loop runs.
    """

    def __init__(self, most: int, name: str) -> None:
        """At most ``most`` at once; what is beyond waits for its turn."""
        self._pool = ThreadPoolExecutor(most, name)

    async def __call__(self, function: Callable[..., T], *arguments: Any) -> T:
        """What ``function`` returns, or raises."""
        context = contextvars.copy_context()
        work = partial(context.run, function, *arguments)
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)


class FairSlots:
    """Turns at something scarce: whoever holds the least is next, and nobody holds more than a share.

    What is scarce is counted in slots, or in bytes: a turn takes a number of them, its weight. To be
    used by the tasks of one event loop.
    """

    def __init__(self, capacity: int, per_client: int, waiting: int) -> None:
        """``capacity`` slots, ``per_client`` of them for one client at most.

        ``waiting`` turns of a client may wait; further ones are told to come again.
        """
        self.capacity, self.per_client, self.waiting = capacity, min(capacity, per_client), waiting
        self._held: Counter[str] = Counter()
        self._resting: Counter[str] = Counter()
        self._waiting: OrderedDict[str, deque[tuple[asyncio.Future[None], int]]] = OrderedDict()

    @asynccontextmanager
    async def turn(
        self, client: str, weight: int = 1, seconds: float | None = None
    ) -> AsyncIterator[None]:
        """Hold ``weight`` slots, or the client's share if that is less, when it is the client's turn.

        Raises:
            Fault: ``Throttling`` where too many of the client wait already, or its turn has not come
                within ``seconds``.
        """
        release = await self.acquire(client, weight, seconds)
        try:
            yield
        finally:
            release()

    async def acquire(
        self, client: str, weight: int = 1, seconds: float | None = None
    ) -> Callable[..., None]:
        """The same as :meth:`turn`; what is returned ends it, and does nothing when called again.

        It may be given seconds: for so long the slots count for the share of the client still, and
        are free for others.
        """
        weight = min(weight, self.per_client)
        if self._next() is None and self._may(client, weight):
            self._held[client] += weight
        else:
            try:
                async with asyncio.timeout(seconds):
                    await self._wait(client, weight)
            except TimeoutError:
                raise _busy() from None
        taken = [weight]

        def release(rest: float = 0.0) -> None:
            if taken:
                weight = taken.pop()
                if rest > 0:
                    self._resting[client] += weight
                    asyncio.get_running_loop().call_later(rest, self._end_rest, client, weight)
                self._release(client, weight)

        return release

    def used_by_others(self, client: str) -> bool:
        """Whether anybody but ``client`` has a turn, or waits for one."""
        waits = len(self._waiting) > (client in self._waiting)
        return waits or self._held.total() > self._held[client]

    @contextmanager
    def try_turn(self, client: str) -> Iterator[None]:
        """Hold one at once; ``Throttling`` where there is none for the client."""
        if not self._may(client, 1):
            raise _busy()
        self._held[client] += 1
        try:
            yield
        finally:
            self._release(client, 1)

    def _end_rest(self, client: str, weight: int) -> None:
        discount(self._resting, client, weight)
        self._give()

    def _within_share(self, client: str, weight: int) -> bool:
        return self._held[client] + self._resting[client] + weight <= self.per_client

    def _may(self, client: str, weight: int) -> bool:
        share = self._within_share(client, weight)
        return share and self._held.total() + weight <= self.capacity

    async def _wait(self, client: str, weight: int) -> None:
        queue = self._waiting.setdefault(client, deque())
        if len(queue) >= self.waiting:
            raise _busy()
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue.append((mine, weight))
        try:
            await mine
        except asyncio.CancelledError:
            if not mine.cancelled():
                self._release(client, weight)  # it was given in the same moment
            else:
                self._leave(client, mine)
            raise

    def _leave(self, client: str, given_up: asyncio.Future[None]) -> None:
        # Its entry may be gone already: whoever released a slot skipped it in the same moment.
        left = deque(entry for entry in self._waiting.pop(client, ()) if entry[0] is not given_up)
        if left:
            self._waiting[client] = left
        self._give()

    def _release(self, client: str, weight: int) -> None:
        discount(self._held, client, weight)
        self._give()

    def _give(self) -> None:
        """Give turns to those that wait, as long as there is enough for the next."""
        while (client := self._next()) is not None:
            queue = self._waiting[client]
            mine, weight = queue[0]
            if not self._may(client, weight):
                # Nobody passes it: light turns would keep a heavy one waiting without end.
                return
            queue.popleft()
            self._waiting.move_to_end(client)
            if not queue:
                del self._waiting[client]
            if not mine.done():
                self._held[client] += weight
                mine.set_result(None)

    def _next(self) -> str | None:
        """Of those that wait and whose share allows a turn, the client that holds the least."""
        able = [
            client
            for client, queue in self._waiting.items()
            if self._within_share(client, queue[0][1])
        ]
        return min(able, key=lambda client: self._held[client], default=None)


class FairThreads:
    """Threads at which accounts take turns call by call: for work that comes in many small pieces.

    A request holds no thread while it waits for its client, and one account with many requests has no
    more than its share of what is worked on. To be used by the tasks of one event loop.
    """

    def __init__(self, most: int, each: int, waiting: int, name: str) -> None:
        """``most`` threads, ``each`` of them for one account, which may have ``waiting`` requests."""
        self._threads = Threads(most, name)
        # A request waits for one call, and for one more where its client hangs up meanwhile.
        self._slots = FairSlots(most, each, 2 * waiting)
        self._waiting = waiting
        self._open: Counter[str] = Counter()

    @contextmanager
    def request(self, account: str) -> Iterator[Run]:
        """What calls functions in threads, for one request.

        Raises:
            Fault: ``Throttling`` where too many of the account are open.
        """
        if self._open[account] >= self._waiting:
            raise _busy()
        self._open[account] += 1

        async def run(function: Callable[..., T], *arguments: Any) -> T:
            async with self._slots.turn(account):
                return await self._threads(function, *arguments)

        try:
            yield run
        finally:
            discount(self._open, account)


def _busy() -> Fault:
    text = "Too many requests of this account or address are at work. Please wait and try again."
    return Fault("Throttling", text, retry_after=2)


def _throttling_fault(text: str, wait: float) -> Fault:
    """The refusal of who has to ``wait`` so many seconds, which clients are told in whole ones."""
    return Fault("Throttling", text, retry_after=max(1, round(wait + 0.5)))


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
            text = "Too many requests, please wait before trying again."
            raise _throttling_fault(text, missing / rate if rate > 0 else 60)

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
            raise _throttling_fault(text, wait)
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


class UselessBodies:
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
            raise _throttling_fault(text, wait)

    def count(self, address: str, sender: str) -> None:
        """A body was read for nothing."""
        with self._lock:
            self._counts[address, sender] += 1


class Admission:
    """Whose turn it is at all that a server has too little of."""

    def __init__(self, limits: ServerLimits) -> None:
        self._limits = limits

        def slots(capacity: int, per_client: int) -> FairSlots:
            return FairSlots(capacity, per_client, limits.waiting_requests)

        self._long = slots(limits.model_requests, limits.share_of(limits.model_requests))
        self._gradings = slots(limits.grading_requests, max(1, limits.grading_requests // 4))
        self.streams = slots(limits.streams, limits.share_of(limits.streams))
        """Threads for responses that are sent piece by piece."""
        most, each = limits.transfers, limits.share_of(limits.transfers)
        self.transfers = FairThreads(most, each, limits.waiting_requests, "transfer")
        self.useless_bodies = UselessBodies(limits.wrong_bodies_per_minute)
        # They compute in Python one after the other: more at once would only keep others waiting.
        self._short = slots(SHORT_REQUESTS, SHORT_REQUESTS_PER_CLIENT)
        # Apart: a client that sends its body slowly keeps nobody from working on theirs.
        self._receiving = slots(limits.body_memory, limits.body_memory_per_client)
        self._large = slots(limits.large_bodies, limits.large_bodies_per_client)

    def slots(self, operation: Operation | None) -> FairSlots | None:
        """The turns that an operation takes; ``None`` for a short one."""
        if operation is None or not (operation.long or operation.grading):
            return None
        return self._gradings if operation.grading else self._long

    async def short_request(
        self, client: str, run: Run, work: Callable[[], Response], record: RequestRecord
    ) -> Response:
        """What a short request is answered; its client's next ones wait a little beside others."""
        release = await self._short.acquire(client)
        seconds = 0.0

        def timed_work() -> Response:
            nonlocal seconds
            began = time.thread_time()
            try:
                return work()
            finally:
                seconds = time.thread_time() - began

        try:
            response: Response = await run(timed_work)
            return response
        finally:
            # A model works for accounts; who sends a short request is known once it is answered.
            shared = self._short.used_by_others(client) or any(
                each.used_by_others(record.account) for each in (self._long, self.streams)
            )
            release(min(REST_FACTOR * seconds, LONGEST_REST) if shared else 0.0)

    def body_memory(
        self, client: str, length: int | None, size: int
    ) -> AbstractAsyncContextManager[None]:
        """Hold ``size`` bytes of memory for a body, unless its ``length`` says that it is small."""
        if length is not None and length <= self._limits.unknown_body_bytes:
            return nullcontext()
        return self._receiving.turn(client, size, self._limits.idle_seconds)

    @contextmanager
    def count_if_useless(self, size: int, sender: Callable[[], tuple[str, str]]) -> Iterator[None]:
        """Remember the sender of a body of ``size`` bytes that turns out to be read for nothing."""
        try:
            yield
        except (Fault, RefusedInput) as refusal:
            code = (refusal if isinstance(refusal, Fault) else Fault.of(refusal)).code
            unsigned = code == "InvalidSignature"
            least = self._limits.unknown_body_bytes if unsigned else USELESS_BODY_BYTES
            if size > least and (unsigned or code in UNUSABLE):
                self.useless_bodies.count(*sender())
            raise

    @asynccontextmanager
    async def large_body(self, client: str, size: int) -> AsyncIterator[None]:
        """A turn for a body of ``size`` bytes, if that is large, until its prompt is tokens."""
        if size <= self._limits.large_body_bytes:
            yield
            return
        release = await self._large.acquire(client, seconds=self._limits.idle_seconds)
        loop = asyncio.get_running_loop()

        def in_loop() -> None:
            loop.call_soon_threadsafe(release)

        try:
            with on_prompt_tokenized(in_loop):
                yield
        finally:
            release()
