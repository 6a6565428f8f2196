"""Whose work is next on a machine whose models several clients ask at the same time.

Every client has a counter of the seconds in which models worked for it. Whoever is behind goes first,
and whoever is ahead pauses until the others have caught up: a client with twenty long prompts and one
with a short chat have the same part of the machine, whether they ask one model or two.

The idea is that of the virtual token counters of Sheng et al., "Fairness in Serving Large Language
Models" (OSDI 2024), with two differences. Seconds are counted instead of tokens: one of a prompt
costs a tenth of one that is written, or less. And work that has begun pauses too: else a short
answer would take its turns between chunks of long prompts.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager

LEAD_SECONDS = 0.1
"""By which a client may be ahead of another one: less, and they would seldom share a step."""
HEAD_START_SECONDS = 0.5
"""By which one that comes back is behind those at work, at most: a short answer is not interrupted."""

StepSize = tuple[int, int]
"""Rows of a step, and the tokens that they look at: each as a size class."""


class FairScheduler:
    """Counts what models did for their clients. Safe to share between threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.RLock())
        self._seconds: dict[str, float] = {}
        self._requests: Counter[str] = Counter()

    def begin(self, client: str) -> None:
        """A request of ``client`` is at work."""
        with self._changed:
            if not self._requests:
                self._seconds.clear()  # nobody has waited for anybody
            if not self._requests[client]:
                self._seconds[client] = self.seconds(client)
            self._requests[client] += 1
            floor = self._floor()
            self._seconds = {
                each: seconds
                for each, seconds in self._seconds.items()
                if seconds > floor or self._requests[each]
            }

    def end(self, client: str) -> None:
        """One of them has ended."""
        with self._changed:
            self._requests[client] -= 1
            if not self._requests[client]:
                del self._requests[client]
            self._changed.notify_all()

    @property
    def shared(self) -> bool:
        """Whether requests of more than one client are at work."""
        return len(self._requests) > 1

    def seconds(self, client: str) -> float:
        """The counter of ``client``, as it would be if it came now."""
        with self._changed:
            if self._requests[client]:
                return self._seconds[client]
            return max(self._floor(), self._seconds.get(client, 0.0))

    def turn(self, clients: Collection[str]) -> set[str]:
        """Those of ``clients``, all at work, whose requests go on now: who is too far ahead pauses."""
        with self._changed:
            limit = min((self._seconds[each] for each in self._requests), default=0) + LEAD_SECONDS
            return {client for client in clients if self._seconds[client] <= limit}

    def wait(self, seconds: float) -> None:
        """Wait until turns may have changed, for ``seconds`` at most."""
        with self._changed:
            self._changed.wait(seconds)

    @contextmanager
    def work(self, client: str) -> Iterator[None]:
        """Work for ``client`` alone, begun when it is its turn, and charged to it."""
        self.begin(client)
        try:
            with self._changed:
                self._changed.wait_for(lambda: self.turn([client]))
            began = time.perf_counter()
            yield
            self.charge(client, time.perf_counter() - began)
        finally:
            self.end(client)

    def charge(self, client: str, seconds: float) -> None:
        """A model worked ``seconds`` for ``client`` alone."""
        with self._changed:
            self._seconds[client] += seconds
            self._changed.notify_all()

    def _floor(self) -> float:
        """What the counter of a client is at least that comes now."""
        at_work: Iterable[float] = (self._seconds[client] for client in self._requests)
        return min(at_work, default=HEAD_START_SECONDS) - HEAD_START_SECONDS


class StepCosts:
    """What a step of one model takes that has rows of several clients, client by client."""

    def __init__(self) -> None:
        self._alone: dict[StepSize, float] = {}

    def of(self, rows: Mapping[str, list[int]], seconds: float) -> dict[str, float]:
        """The seconds that each client pays for a step of ``seconds``, by the lengths of its rows.

        A client pays for what a step of its own would have taken, which is more than its part of this
        one: to write together is cheaper, and must not count as being behind. It is known from earlier
        steps of that size that a client had for itself.
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
