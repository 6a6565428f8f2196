"""Turns at something scarce, for threads that work for clients: no client has all of it."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_client: ContextVar[str] = ContextVar("client", default="")


@contextmanager
def working_for(client: str) -> Iterator[None]:
    """What is done in the block is done for ``client``, such as an account."""
    token = _client.set(client)
    try:
        yield
    finally:
        _client.reset(token)


def current_client() -> str:
    """Whom the thread is :func:`working_for`; empty where nobody has said."""
    return _client.get()


def discount(counts: Counter[str], client: str, by: int = 1) -> None:
    """Take ``by`` from what ``client`` holds; who holds nothing is forgotten."""
    counts[client] -= by
    if not counts[client]:
        del counts[client]


class NoTurn(Exception):
    """A thread's turn has not come in time."""


class FairTurns:
    """Turns of threads, at most half of them for one client (but one at least).

    Next is the client that has the fewest, and among those the one whose last turn is longest ago.
    """

    def __init__(self, most: int, seconds: float) -> None:
        """``most`` turns at once, for each of which a thread waits ``seconds`` at most."""
        self._most, self._each, self._seconds = most, max(1, most // 2), seconds
        self._active: Counter[str] = Counter()
        self._waiting: OrderedDict[str, deque[object]] = OrderedDict()
        self._changed = threading.Condition()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """A turn of the client that the thread is :func:`working_for`.

        Raises:
            NoTurn: where it has not come within the seconds.
        """
        client, ticket = current_client(), object()
        with self._changed:
            self._waiting.setdefault(client, deque()).append(ticket)
            came = self._changed.wait_for(lambda: self._next() is ticket, self._seconds)
            self._leave(client, ticket)
            if came:
                self._active[client] += 1
            self._changed.notify_all()
        if not came:
            raise NoTurn
        try:
            yield
        finally:
            with self._changed:
                discount(self._active, client)
                if client in self._waiting:
                    self._waiting.move_to_end(client)
                self._changed.notify_all()

    def _next(self) -> object | None:
        """The ticket whose turn it is."""
        if self._active.total() >= self._most:
            return None
        able = [client for client in self._waiting if self._active[client] < self._each]
        client = min(able, key=lambda client: self._active[client], default=None)
        return None if client is None else self._waiting[client][0]

    def _leave(self, client: str, ticket: object) -> None:
        """Take ``ticket`` out; its client goes behind the others."""
        self._waiting[client].remove(ticket)
        self._waiting.move_to_end(client)
        if not self._waiting[client]:
            del self._waiting[client]
