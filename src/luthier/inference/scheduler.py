"""Whose work is next on a machine whose models several clients ask at the same time.

Every client has a counter of the seconds in which models worked for it. Whoever is behind goes
first, and whoever is ahead pauses until the others have caught up: a client with twenty long
prompts and one with a short chat have the same part of the machine, whether they ask one model or
two.

The idea is that of the virtual token counters of Sheng et al., "Fairness in Serving Large Language
Models" (OSDI 2024), with two differences. Seconds are counted instead of tokens: one of a prompt
costs a tenth of one that is written, or less. And work that has begun pauses too: else a short
answer would take its turns between chunks of long prompts.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Generic, Protocol, TypeVar

from luthier.inference.inference import InferenceFailed

LEAD_SECONDS = 0.1
"""By which a client may be ahead of another one: less, and they would seldom share a step."""
HEAD_START_SECONDS = 0.5
"""By which one that comes back is behind those at work, at most: a short answer is not
interrupted."""
CANCELLATION_SECONDS = 0.5
"""How often one that waits looks whether its client hung up."""

StepSize = tuple[int, int]
"""Rows of a step, and the tokens that they look at: each as a size class."""


_client: ContextVar[str] = ContextVar("client", default="")
_background: ContextVar[bool] = ContextVar("background", default=False)


@contextmanager
def working_for(client: str, background: bool = False) -> Iterator[None]:
    """What is done in the block is done for ``client``, such as an account.

    In the ``background`` nobody is there to ask again later: it waits for its turn as long as it
    takes.
    """
    token, background_token = _client.set(client), _background.set(background)
    try:
        yield
    finally:
        _client.reset(token)
        _background.reset(background_token)


def current_client() -> str:
    """Whom the thread is :func:`working_for`; empty where nobody has said."""
    return _client.get()


def in_background() -> bool:
    """Whether nobody is there to be told that a model is busy."""
    return _background.get()


def discount(counts: Counter[str], client: str, by: int = 1) -> None:
    """Take ``by`` from what ``client`` holds; who holds nothing is forgotten."""
    counts[client] -= by
    if not counts[client]:
        del counts[client]


class Cancelled(Exception):
    """Whoever waited does not want it any more."""


class ClientRequest(Protocol):
    """A request of a client."""

    @property
    def client(self) -> str:
        """Whose it is."""


R = TypeVar("R", bound=ClientRequest)


class WaitingRequests(Generic[R]):
    """Requests that wait for one model, those of each client in their order. Not safe to share."""

    def __init__(self, most: int) -> None:
        """``most`` of one client."""
        self._most = most
        self._queues: dict[str, deque[R]] = {}

    def __iter__(self) -> Iterator[R]:
        for queue in [*self._queues.values()]:
            yield from [*queue]

    def __bool__(self) -> bool:
        return bool(self._queues)

    @property
    def clients(self) -> Collection[str]:
        """Those who have any."""
        return self._queues.keys()

    def of(self, client: str) -> Collection[R]:
        """The requests of ``client``, the next one first."""
        return self._queues.get(client, ())

    def add(self, request: R) -> None:
        """Put it behind those of its client.

        Raises:
            InferenceFailed: where too many of them wait.
        """
        queue = self._queues.setdefault(request.client, deque())
        if len(queue) >= self._most:
            raise InferenceFailed(
                "Throttling", "Too many of your requests wait for this model. Try again soon."
            )
        queue.append(request)

    def remove(self, request: R) -> None:
        """Take it out."""
        queue = self._queues[request.client]
        queue.remove(request)
        if not queue:
            del self._queues[request.client]

    def move_to_end(self, request: R) -> None:
        """Put it behind the others of its client."""
        queue = self._queues[request.client]
        queue.remove(request)
        queue.append(request)

    def clear(self) -> None:
        """Forget all."""
        self._queues.clear()


class FairScheduler:
    """Counts what models did for their clients. Safe to share between threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._seconds: dict[str, float] = {}
        self._at_work: Counter[str] = Counter()
        self._waiting: dict[Hashable, Counter[str]] = {}
        """Who waits for a model that does one thing at a time."""
        self._busy: dict[Hashable, tuple[str, float]] = {}
        """Such models that are at work, for whom, and since when."""

    def enter(self, client: str) -> None:
        """A request of ``client`` is at work."""
        with self._changed:
            self._register(client)
            self._at_work[client] += 1

    def leave(self, client: str) -> None:
        """One of them has ended."""
        with self._changed:
            discount(self._at_work, client)
            self._changed.notify_all()

    @property
    def has_several_clients(self) -> bool:
        """Whether requests of more than one client are at work."""
        return len(self._at_work) > 1

    def seconds(self, client: str) -> float:
        """The counter of ``client``, as it would be if it came now."""
        with self._changed:
            present = self._present()
            if client in present:
                return self._now(client)
            return max(self._floor(present), self._seconds.get(client, 0.0))

    def runnable(self, clients: Collection[str]) -> set[str]:
        """Those of ``clients`` that go on now: whoever is too far ahead pauses, or is not at
        work."""
        with self._changed:
            limit = self._limit()
            known = [client for client in clients if client in self._seconds]
            return {client for client in known if self._now(client) <= limit}

    def charge(self, client: str, seconds: float) -> None:
        """A model worked ``seconds`` for ``client``, which is at work."""
        with self._changed:
            self._seconds[client] += seconds
            self._changed.notify_all()

    def wake(self) -> None:
        """End every :meth:`wait`."""
        with self._changed:
            self._changed.notify_all()

    def wait(self, seconds: float) -> None:
        """Wait until others may run than before, for ``seconds`` at most."""
        with self._changed:
            self._changed.wait(seconds)

    @contextmanager
    def work(
        self, client: str, model: Hashable, cancelled: Callable[[], bool] = lambda: False
    ) -> Iterator[Counter[str]]:
        """Let ``model``, which does one thing at a time, work for ``client`` when it is its turn.

        Where it works for others as well, the block puts the part of each into what it is given: as
        much of the time they pay.

        Raises:
            Cancelled: where ``cancelled`` says so first.
        """
        with self._changed:
            self._register(client)
            waiting = self._waiting.setdefault(model, Counter())
            waiting[client] += 1
            try:
                while not cancelled() and not self._is_next(client, model):
                    self._changed.wait(CANCELLATION_SECONDS)
                if cancelled():
                    raise Cancelled
                self._busy[model] = client, time.perf_counter()
                self._at_work[client] += 1
            finally:
                discount(waiting, client)
                if not waiting:
                    del self._waiting[model]
        parts = Counter[str]()
        try:
            yield parts
        finally:
            with self._changed:
                _, began = self._busy.pop(model)
                seconds = time.perf_counter() - began
                for each, part in parts.items() if parts else [(client, 1)]:
                    if each in self._seconds:  # it may have left already
                        self._seconds[each] += seconds * part / max(1, parts.total())
                self.leave(client)

    def _is_next(self, client: str, model: Hashable) -> bool:
        """Whether ``model`` is free, and of those that wait for it ``client`` is the next."""
        first = min(self._waiting[model], key=self._seconds.__getitem__)
        mine = self._seconds[client]
        return model not in self._busy and mine <= min(self._seconds[first], self._limit())

    def _limit(self) -> float:
        """The counter with which a client just goes on."""
        return min(map(self._now, self._at_work), default=float("inf")) + LEAD_SECONDS

    def _now(self, client: str) -> float:
        """The counter of one that is at work or waits, and what is not charged yet."""
        moment = time.perf_counter()
        running = sum(moment - since for other, since in self._busy.values() if other == client)
        return self._seconds[client] + running

    def _present(self) -> set[str]:
        return set(self._at_work).union(*self._waiting.values())

    def _floor(self, present: Collection[str]) -> float:
        """The counter of a client that comes now is at least this."""
        return min((self._seconds[each] for each in present), default=0.0) - HEAD_START_SECONDS

    def _register(self, client: str) -> None:
        """Give ``client`` a counter, and forget those that are no worse off than a new one."""
        present = self._present()
        if not present:
            self._seconds.clear()  # nobody has waited for anybody
        mine = self.seconds(client)
        floor = self._floor(present)
        self._seconds = {
            each: seconds
            for each, seconds in self._seconds.items()
            if seconds > floor or each in present
        }
        self._seconds[client] = mine


class StepCosts:
    """What a step of one model takes that has rows of several clients, client by client."""

    def __init__(self) -> None:
        self._alone: dict[StepSize, float] = {}

    def split(self, rows: Mapping[str, list[int]], seconds: float) -> dict[str, float]:
        """The seconds that each client pays for a step of ``seconds``, by the lengths of its rows.

        A client pays for what a step of its own would have taken, which is more than its part of
        this one: to write together is cheaper, and must not count as being behind. It is known from
        earlier steps of that size that a client had for itself.
        """
        if len(rows) == 1:
            ((client, lengths),) = rows.items()
            size = _size(lengths)
            self._alone[size] = (self._alone.get(size, seconds) + seconds) / 2
            return {client: seconds}
        count = sum(map(len, rows.values()))
        return {
            client: min(seconds, self._alone.get(_size(lengths), seconds * len(lengths) / count))
            for client, lengths in rows.items()
        }


def _size(lengths: list[int]) -> StepSize:
    # The next power of two: steps of a class take about the same time, and there are few of them.
    return (len(lengths) - 1).bit_length(), sum(lengths).bit_length()
