"""Whose work a network does next, where several clients ask it at the same time.

Every client has a counter of the seconds that the network worked for it. Whoever is behind goes first,
and whoever is ahead pauses until the others have caught up: a client with twenty long prompts and one
with a short chat have the same part of the machine. The idea is that of the virtual token counters of
Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024), with two differences. Seconds are
counted instead of tokens: one of a prompt costs a tenth of one that is written, or less. And work
that has begun pauses too: else a short answer would take its turns between chunks of long prompts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

LEAD_SECONDS = 0.1
"""By which a client may be ahead of another one: less, and they would seldom share a step."""
HEAD_START_SECONDS = 0.5
"""By which one that comes back is behind those at work, at most: a short answer is not interrupted."""

StepSize = tuple[int, int]
"""Rows of a step, and the tokens that they look at: each as a size class."""


class FairScheduler:
    """Counts what a network did for its clients; used by the one thread that runs it."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._requests: Counter[str] = Counter()
        self._alone: dict[StepSize, float] = {}

    def begin(self, client: str) -> None:
        """A request of ``client`` is at work."""
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
        self._requests[client] -= 1
        if not self._requests[client]:
            del self._requests[client]

    @property
    def shared(self) -> bool:
        """Whether requests of more than one client are at work."""
        return len(self._requests) > 1

    def seconds(self, client: str) -> float:
        """The counter of ``client``, as it would be if it came now."""
        if self._requests[client]:
            return self._seconds[client]
        return max(self._floor(), self._seconds.get(client, 0.0))

    def turn(self) -> set[str]:
        """The clients whose requests go on now: those at work that are not too far ahead."""
        if not self._requests:
            return set()
        limit = min(self._seconds[client] for client in self._requests) + LEAD_SECONDS
        return {client for client in self._requests if self._seconds[client] <= limit}

    def charge(self, client: str, seconds: float) -> None:
        """The network worked ``seconds`` for ``client`` alone."""
        self._seconds[client] += seconds

    def charge_step(self, rows: Mapping[str, list[int]], seconds: float) -> None:
        """It took a step of ``seconds`` with rows of several clients, each a length in tokens.

        A client pays for what a step of its own would have taken, which is more than its part of this
        one: to write together is cheaper, and must not count as being behind. It is known from earlier
        steps of that size that the client, or another one, had for itself.
        """
        if len(rows) == 1:
            ((client, lengths),) = rows.items()
            size = _size(lengths)
            self._alone[size] = (self._alone.get(size, seconds) + seconds) / 2
            self.charge(client, seconds)
            return
        count = sum(map(len, rows.values()))
        for client, lengths in rows.items():
            alone = self._alone.get(_size(lengths), seconds * len(lengths) / count)
            self.charge(client, min(seconds, alone))

    def _floor(self) -> float:
        """What the counter of a client is at least that comes now."""
        at_work: Iterable[float] = (self._seconds[client] for client in self._requests)
        return min(at_work, default=HEAD_START_SECONDS) - HEAD_START_SECONDS


def _size(lengths: list[int]) -> StepSize:
    # The next power of two: steps of a class take about the same time, and there are few of them.
    return (len(lengths) - 1).bit_length(), sum(lengths).bit_length()
