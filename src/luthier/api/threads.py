"""Threads for what blocks, and who may hold how many of them: one account never holds them all."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any, TypeVar

from luthier.api.sending import Run
from luthier.api.wire import Fault
from luthier.limits import ServerLimits
from luthier.serving.prompts import when_read

T = TypeVar("T")
WAITING = 256
"""Requests of one account that wait for their turn; further ones are told to come again."""


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
    """Turns at something scarce: whoever holds the fewest is next, and nobody holds more than a share.

    To be used by the tasks of one event loop.
    """

    def __init__(self, most: int, each: int, waiting: int = WAITING) -> None:
        """``most`` turns at once, ``each`` of them for one account at most.

        ``waiting`` of an account may wait for theirs.
        """
        self.most, self.each, self.waiting = most, each, waiting
        self._held: Counter[str] = Counter()
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    @asynccontextmanager
    async def turn(self, account: str) -> AsyncIterator[None]:
        """Hold one, when it is the account's turn.

        Raises:
            Fault: ``Throttling`` where too many of the account wait already.
        """
        if self._may(account):
            self._held[account] += 1
        else:
            await self._wait(account)
        try:
            yield
        finally:
            self._release(account)

    @contextmanager
    def now(self, account: str) -> Iterator[None]:
        """Hold one at once; ``Throttling`` where there is none for the account."""
        if not self._may(account):
            raise _busy()
        self._held[account] += 1
        try:
            yield
        finally:
            self._release(account)

    def _may(self, account: str) -> bool:
        return self._held.total() < self.most and self._held[account] < self.each

    async def _wait(self, account: str) -> None:
        queue = self._waiting.setdefault(account, deque())
        if len(queue) >= self.waiting:
            raise _busy()
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue.append(mine)
        try:
            await mine
        except asyncio.CancelledError:
            if not mine.cancelled():
                self._release(account)  # it was given in the same moment
            raise

    def _release(self, account: str) -> None:
        self._held[account] -= 1
        if not self._held[account]:
            del self._held[account]
        while next_ := self._next():
            queue = self._waiting[next_]
            mine = queue.popleft()
            self._waiting.move_to_end(next_)
            if not queue:
                del self._waiting[next_]
            if not mine.done():
                self._held[next_] += 1
                mine.set_result(None)

    def _next(self) -> str | None:
        able = [account for account in self._waiting if self._may(account)]
        return min(able, key=lambda account: self._held[account], default=None)


class LargeBodies:
    """Turns of large requests while they are parsed and tokenized, which takes most memory and time.

    A thread waits for its turn where it is: the requests of an account that wait have a thread each, of
    which it has no more than its share. Small requests wait for none of this.
    """

    def __init__(self, most: int, each: int, size: int) -> None:
        """``most`` turns at once, ``each`` for one account, for bodies of more than ``size`` bytes."""
        self.most, self.each, self.size = most, each, size
        self._held: Counter[str] = Counter()
        self._waiting: list[str] = []
        """Accounts of those who wait, the longest first."""
        self._changed = threading.Condition()

    @staticmethod
    def of(limits: ServerLimits) -> LargeBodies:
        """As many as ``limits`` say."""
        return LargeBodies(
            limits.large_bodies, limits.large_bodies_per_account, limits.large_body_bytes
        )

    @contextmanager
    def turn(self, account: str, size: int) -> Iterator[None]:
        """Hold one for a body of ``size``, until its prompt is tokens or the block ends."""
        if size <= self.size:
            yield
            return
        with self._changed:
            self._waiting.append(account)
            self._changed.wait_for(lambda: self._next() == account)
            self._waiting.remove(account)
            self._held[account] += 1
        held = [account]

        def release() -> None:
            with self._changed:
                if held:
                    self._held[held.pop()] -= 1
                    self._changed.notify_all()

        try:
            with when_read(release):
                yield
        finally:
            release()

    def _may(self, account: str) -> bool:
        return self._held.total() < self.most and self._held[account] < self.each

    def _next(self) -> str | None:
        """Whose turn it is: who holds the fewest, and among those who has waited longest."""
        able = [account for account in self._waiting if self._may(account)]
        return min(able, key=lambda account: self._held[account], default=None)


class FairThreads:
    """Threads at which accounts take turns call by call: for work that comes in many small pieces.

    A request holds no thread while it waits for its client, and one account with many requests has no
    more than its share of what is worked on. To be used by the tasks of one event loop.
    """

    def __init__(self, most: int, each: int, name: str) -> None:
        """``most`` threads, ``each`` of them for one account at most."""
        self._threads = Threads(most, name)
        # A request waits for one call, and for one more where its client hangs up meanwhile.
        self._slots = FairSlots(most, each, 2 * WAITING)
        self._open: Counter[str] = Counter()

    @contextmanager
    def request(self, account: str) -> Iterator[Run]:
        """What calls functions in threads, for one request.

        Raises:
            Fault: ``Throttling`` where too many of the account are open.
        """
        if self._open[account] >= WAITING:
            raise _busy()
        self._open[account] += 1

        async def run(function: Callable[..., T], *arguments: Any) -> T:
            async with self._slots.turn(account):
                return await self._threads(function, *arguments)

        try:
            yield run
        finally:
            self._open[account] -= 1
            if not self._open[account]:
                del self._open[account]


def _busy() -> Fault:
    text = "Too many requests of this account are being answered. Please wait and try again."
    return Fault("Throttling", text, retry_after=2)
