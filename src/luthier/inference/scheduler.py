"""Fair scheduling between clients.

Each client has a counter of model seconds. Clients with a low counter run first, and clients with a
high counter pause: twenty long prompts and a short chat get equal parts of the machine, with one
model or several.

This is the virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI
2024), with two differences. The counter has seconds, because a prompt token costs a tenth of a
generated token or less. Running work pauses too, so that a short answer does not alternate with
chunks of long prompts.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Generic, Protocol, TypeVar

from luthier.inference.inference import InferenceFailed
from luthier.processes import Cancelled

LEAD_SECONDS = 0.1
"""Lead in seconds after which a client pauses; with a smaller lead, clients would seldom share a
step."""
# Lead of a new or returning client in seconds; more idle time earns no further credit.
HEAD_START_SECONDS = 0.5
CANCELLATION_SECONDS = 0.5
"""Interval at which waiting work checks whether its client hung up."""

_client: ContextVar[str] = ContextVar("client", default="")
_background: ContextVar[bool] = ContextVar("background", default=False)


@contextmanager
def working_for(client: str, background: bool = False) -> Iterator[None]:
    """Run the block for ``client``, such as an account.

    ``background`` work waits for a turn without limit, because no client would retry.
    """
    token, background_token = _client.set(client), _background.set(background)
    try:
        yield
    finally:
        _client.reset(token)
        _background.reset(background_token)


def current_client() -> str:
    """Return the client of :func:`working_for`, or an empty string."""
    return _client.get()


def in_background() -> bool:
    """Return whether the work runs in the background."""
    return _background.get()


def decrement(counts: Counter[str], client: str, by: int = 1) -> None:
    """Subtract ``by`` from the count of ``client``, and drop a count of 0."""
    counts[client] -= by
    if not counts[client]:
        del counts[client]


class ClientRequest(Protocol):
    """A request of a client."""

    @property
    def client(self) -> str:
        """Name of the client."""


R = TypeVar("R", bound=ClientRequest)


class WaitingRequests(Generic[R]):
    """Queues of a model, one queue per client. Not safe to share between threads."""

    def __init__(self, most: int) -> None:
        """Allow at most ``most`` requests per client."""
        self._most = most
        self._queues: dict[str, deque[R]] = {}

    def __iter__(self) -> Iterator[R]:
        # Copies, because callers remove requests during the iteration.
        for queue in [*self._queues.values()]:
            yield from [*queue]

    def __bool__(self) -> bool:
        return bool(self._queues)

    @property
    def clients(self) -> Collection[str]:
        """Clients with waiting requests."""
        return self._queues.keys()

    def of(self, client: str) -> Collection[R]:
        """Return the queue of ``client``, first request first."""
        return self._queues.get(client, ())

    def add(self, request: R) -> None:
        """Append a request; raise :class:`InferenceFailed` if too many wait."""
        queue = self._queues.setdefault(request.client, deque())
        if len(queue) >= self._most:
            raise InferenceFailed(
                "Throttling", "Too many of your requests wait for this model. Try again soon."
            )
        queue.append(request)

    def remove(self, request: R) -> None:
        """Remove a request."""
        queue = self._queues[request.client]
        queue.remove(request)
        # `clients` and `bool()` must not report clients without requests.
        if not queue:
            del self._queues[request.client]

    def move_to_end(self, request: R) -> None:
        """Move a request to the end of its queue."""
        queue = self._queues[request.client]
        queue.remove(request)
        queue.append(request)

    def clear(self) -> None:
        """Remove all requests."""
        self._queues.clear()


class FairScheduler:
    """Counters of the seconds of each client. Safe to share between threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._seconds: dict[str, float] = {}
        self._at_work: Counter[str] = Counter()
        self._waiting: dict[Hashable, Counter[str]] = {}
        """Number of waiting requests by client, for each model with turns."""
        self._busy: dict[Hashable, tuple[str, float]] = {}
        """Client and start time of the running turn, for each model with turns."""

    def enter(self, client: str) -> None:
        """Register a running request of ``client``."""
        with self._changed:
            self._register(client)
            self._at_work[client] += 1

    def leave(self, client: str) -> None:
        """Unregister a running request of ``client``."""
        with self._changed:
            decrement(self._at_work, client)
            self._changed.notify_all()

    @property
    def has_several_clients(self) -> bool:
        """True if several clients have running requests."""
        return len(self._at_work) > 1

    def seconds(self, client: str) -> float:
        """Return the counter of ``client``, or the start value of a new client."""
        with self._changed:
            present = self._present()
            if client in present:
                return self._now(client)
            # A returning client keeps a higher counter, so that leaving does not erase used time.
            return max(self._floor(present), self._seconds.get(client, 0.0))

    def runnable(self, clients: Collection[str]) -> set[str]:
        """Return the ``clients`` with a counter below the limit."""
        with self._changed:
            limit = self._limit()
            registered = [client for client in clients if client in self._seconds]
            return {client for client in registered if self._now(client) <= limit}

    def charge(self, client: str, seconds: float) -> None:
        """Add ``seconds`` to the counter of a running client."""
        with self._changed:
            self._seconds[client] += seconds
            self._changed.notify_all()

    def wake(self) -> None:
        """End every :meth:`wait`."""
        with self._changed:
            self._changed.notify_all()

    def wait(self, seconds: float) -> None:
        """Wait until other clients may run, at most ``seconds``."""
        with self._changed:
            self._changed.wait(seconds)

    @contextmanager
    def work(
        self, client: str, model: Hashable, cancelled: Callable[[], bool] = lambda: False
    ) -> Iterator[Counter[str]]:
        """Wait for the turn of ``client`` at ``model``, which has one turn at a time.

        The block may also work for several clients. The yielded counter then receives the part of
        each client, and the time is charged by parts.

        Raises:
            Cancelled: if ``cancelled`` returns True before the turn.
        """
        with self._changed:
            self._register(client)
            waiting = self._waiting.setdefault(model, Counter())
            waiting[client] += 1
            try:
                while not cancelled() and not self._is_next(client, model):
                    # A hang-up sends no notification, hence the interval.
                    self._changed.wait(CANCELLATION_SECONDS)
                if cancelled():
                    raise Cancelled
                self._busy[model] = client, time.perf_counter()
                self._at_work[client] += 1
            finally:
                decrement(waiting, client)
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
                    if each in self._seconds:  # the client may be gone
                        self._seconds[each] += seconds * part / max(1, parts.total())
                # `leave` acquires the lock again: the default lock of a Condition is re-entrant.
                self.leave(client)

    def _is_next(self, client: str, model: Hashable) -> bool:
        first = min(self._waiting[model], key=self._seconds.__getitem__)
        own = self._seconds[client]
        return model not in self._busy and own <= min(self._seconds[first], self._limit())

    def _limit(self) -> float:
        """Return the limit for the counter of a running client."""
        # Only clients at work count: a client that waits without getting a turn holds up nobody.
        return min(map(self._now, self._at_work), default=float("inf")) + LEAD_SECONDS

    def _now(self, client: str) -> float:
        """Return the counter of a client, including the time of running turns."""
        # A turn counts while it runs: counted at its end, one long turn held all other clients back.
        moment = time.perf_counter()
        running = sum(moment - since for other, since in self._busy.values() if other == client)
        return self._seconds[client] + running

    def _present(self) -> set[str]:
        return set(self._at_work).union(*self._waiting.values())

    def _floor(self, present: Collection[str]) -> float:
        """Return the lowest counter of a new client."""
        return min((self._seconds[each] for each in present), default=0.0) - HEAD_START_SECONDS

    def _register(self, client: str) -> None:
        """Create the counter of ``client``, and drop counters equal to the start value."""
        present = self._present()
        if not present:
            self._seconds.clear()  # past counters favor nobody: no client has waited for another
        own = self.seconds(client)
        floor = self._floor(present)
        self._seconds = {
            each: seconds
            for each, seconds in self._seconds.items()
            if seconds > floor or each in present
        }
        self._seconds[client] = own
