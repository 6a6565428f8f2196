"""Threads for what blocks, and who may hold how many of them: one account never holds them all."""

from __future__ import annotations

import asyncio
import contextvars
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any, TypeVar

from luthier.api.sending import Run
from luthier.api.wire import Fault
from luthier.serving.scheduler import discount

T = TypeVar("T")


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
