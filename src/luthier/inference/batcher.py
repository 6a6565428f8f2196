"""Dynamic batching for models that read: rows of all who wait go through the network together.

Nobody waits for a batch to fill. Whoever has the model's turn reads what has come while the last
pass ran, one row of each request after the other until the pass is full: of a request of a thousand
rows and one of a single row, the latter is answered with the next pass. Passes grow as long as they
take less than :data:`PASS_SECONDS`, so that who comes next need not wait long for the end of one.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.cancellation import KillHandle, cancellable
from luthier.data.tree import READING_BUDGET
from luthier.inference.inference import InferenceFailed, InferenceRefused
from luthier.inference.memory import CacheBudget
from luthier.inference.scheduler import Cancelled, FairScheduler, WaitingRequests, current_client
from luthier.limits import ModelLimits

if TYPE_CHECKING:
    from luthier.inference.prediction import Predictor
    from luthier.models.network import Network
    from luthier.types import Example

PASS_SECONDS = 0.2
"""What a pass takes at most, about: one of half its size comes next, and one of twice its size
behind one that took less than half of this."""
FEWEST_TOKENS = 32
"""Of a pass that is full: fewer take as long, as they are filled up."""


class Work:
    """What a model does for one request: in turns, and for so many seconds in all."""

    def __init__(self, seconds: float = math.inf, queue_seconds: float = math.inf) -> None:
        """It is given up when the client of the thread hangs up, or its first turn has not come
        within ``queue_seconds``."""
        self._seconds, self._used, self._began = seconds, 0.0, 0.0
        self.queue_seconds = queue_seconds
        self._turn_until = time.monotonic() + queue_seconds
        self.has_begun = False
        """Whether its first turn has come."""
        self._gone = threading.Event()
        cancellable(KillHandle(self._gone.set))

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody waits for it any more."""
        return self._gone.is_set()

    @property
    def is_late(self) -> bool:
        """Whether it has waited too long for its first turn."""
        return not self.has_begun and time.monotonic() > self._turn_until

    @contextmanager
    def count_time(self) -> Iterator[None]:
        """Count the time of the block, unless all is used up.

        Raises:
            InferenceFailed: where it is.
        """
        self._began, self.has_begun = time.monotonic(), True
        self.check_within(0)
        try:
            yield
        finally:
            self.spend(time.monotonic() - self._began)

    def check(self) -> None:
        """End it within a turn where it has taken too long, or nobody waits for it."""
        self.check_within(time.monotonic() - self._began)

    def check_within(self, seconds: float) -> None:
        """The same, ``seconds`` after what it has spent."""
        if self.is_cancelled:
            raise Cancelled
        if self._used + seconds > self._seconds:
            raise InferenceFailed(
                "ModelTimeout",
                f"The model has worked on this request for {self._seconds:g} seconds, which is what "
                "one has. Ask for less at once.",
            )

    def spend(self, seconds: float) -> None:
        """Count ``seconds`` of the model's time."""
        self._used += seconds


class RowFailed(Exception):
    """One row of a request could not be read; the cause says why."""

    def __init__(self, place: int) -> None:
        super().__init__(place)
        self.place = place


class ReadRequest:
    """A request while its rows are read."""

    def __init__(self, examples: Sequence[Example], work: Work) -> None:
        """``Example.row`` is the place of each among them."""
        self.client, self.work = current_client(), work
        self.unread = deque(examples)
        self._answers: list[dict[str, Any]] = [{} for _ in examples]
        self._missing = len(examples)
        self._failure: tuple[int, Exception] | None = None

    @property
    def is_done(self) -> bool:
        """Whether there is an answer to each row, or none is looked for any more."""
        return self._failure is not None or not self._missing

    def settle(self, place: int, answer: dict[str, Any] | Exception) -> None:
        """The answer to one of its rows; with an exception the others fall away."""
        if isinstance(answer, Exception):
            self._failure = self._failure or (place, answer)
            self.unread.clear()
        else:
            self._answers[place] = answer
            self._missing -= 1

    def answers(self) -> list[dict[str, Any]]:
        """Those to all rows, in their order.

        Raises:
            InferenceFailed, Cancelled: where its time is used up, or nobody waits for it.
            RowFailed: for a row that could not be read.
        """
        if self._failure is not None:
            place, error = self._failure
            if isinstance(error, InferenceFailed | Cancelled):
                raise error
            raise RowFailed(place) from error
        return self._answers


@dataclass(frozen=True)
class PassRow:
    """A row in a pass."""

    request: ReadRequest
    example: Example
    cost: int
    """Tokens; of an image or a sound 1."""
    nbytes: int

    def settle(self, answer: dict[str, Any] | Exception) -> None:
        """See :meth:`ReadRequest.settle`."""
        self.request.settle(self.example.row, answer)


class RowBatcher:
    """Requests that wait to be read by one model, and what it reads next. Safe to share."""

    def __init__(
        self,
        predictor: Predictor,
        limits: ModelLimits,
        scheduler: FairScheduler,
        memory: CacheBudget,
        deterministic: bool = False,
    ) -> None:
        """What a pass keeps between layers is taken from ``memory``; one row if
        ``deterministic``."""
        from luthier.models.layouts import MOST_IMAGES

        network = predictor.network
        self._predictor, self._scheduler, self._memory = predictor, scheduler, memory
        self._deterministic = deterministic
        self._media = network.layout.reads_media
        self._most = MOST_IMAGES if self._media else READING_BUDGET
        self._row_bytes = 0 if self._media else _bytes_per_token(network)
        self._fewest = 1 if self._media else FEWEST_TOKENS
        self._size = self._fewest
        """What a full pass costs now; see :attr:`PassRow.cost`."""
        self._waiting: WaitingRequests[ReadRequest] = WaitingRequests(limits.waiting_requests)
        self._lock = threading.Lock()

    def add(self, request: ReadRequest) -> None:
        """Have ``request`` wait.

        Raises:
            InferenceRefused: where one of its rows takes more memory than there is.
            InferenceFailed: where too many requests of its client wait.
        """
        for example in request.unread:
            needed = self._row(request, example).nbytes
            if needed > self._memory.total:
                raise InferenceRefused(
                    f"To read this text may need {needed >> 20} MiB of memory, and there are "
                    f"{self._memory.total >> 20} MiB. Send a shorter one.",
                    "input",
                )
        with self._lock:
            self._waiting.add(request)

    def remove(self, request: ReadRequest) -> None:
        """It waits no longer; what is not read of it is not read any more."""
        with self._lock:
            self._waiting.remove(request)

    @contextmanager
    def next_pass(self, first: ReadRequest) -> Iterator[list[PassRow]]:
        """The rows that are read next, those of ``first`` among them; to be asked in the model's
        turn.

        There are none as long as others have all the memory.
        """
        rows = self._choose(first)
        try:
            yield rows
        except BaseException:
            for row in rows:  # else those who wait for them would wait for ever
                row.settle(InferenceFailed("ModelError", "The model failed."))
            raise
        finally:
            for row in rows:
                self._memory.give(row.request.client, row.nbytes)

    def read(self, rows: Sequence[PassRow]) -> None:
        """Read ``rows`` together; where that fails each by itself, as only one of them may be
        wrong."""
        answers = self._try(rows)
        if not isinstance(answers, Exception):
            for row, answer in zip(rows, answers, strict=True):
                row.settle(answer)
        elif len(rows) == 1:
            rows[0].settle(answers)
        else:
            for row in rows:
                if not row.request.is_done:
                    self.read([row])

    def _try(self, rows: Sequence[PassRow]) -> list[dict[str, Any]] | Exception:
        """Answers to ``rows``, whose time is counted; or what went wrong."""
        began, cost = time.monotonic(), sum(row.cost for row in rows)

        def check(*_: Any) -> None:
            # A model that takes many passes for an image is ended between two of them.
            seconds, failure = time.monotonic() - began, Exception()
            for row in rows:
                try:
                    return row.request.work.check_within(seconds * row.cost / cost)
                except (Cancelled, InferenceFailed) as error:
                    failure = error
            raise failure

        hook = self._predictor.network.model.register_forward_pre_hook(check)
        try:
            check()
            answers = self._predictor.read([row.example for row in rows])
        except Exception as error:
            return error
        finally:
            hook.remove()
            seconds = time.monotonic() - began
            for row in rows:
                row.request.work.spend(seconds * row.cost / cost)
        if cost > self._size // 2:
            if seconds > PASS_SECONDS:
                self._size = max(self._fewest, self._size // 2)
            elif seconds < PASS_SECONDS / 2:
                self._size = min(self._most, 2 * self._size)
        return answers

    def _choose(self, first: ReadRequest) -> list[PassRow]:
        rows: list[PassRow] = []
        with self._lock:
            room, able = self._size, self._able(first)
            read = set[ReadRequest]()
            while able:
                for request in [*able]:
                    row = self._row(request, request.unread[0]) if request.unread else None
                    if (
                        row is None
                        or (rows and (row.cost > room or self._deterministic))
                        or not self._memory.take(request.client, row.nbytes)
                    ):
                        able.remove(request)
                        continue
                    rows.append(row)
                    read.add(request)
                    request.unread.popleft()
                    request.work.has_begun = True
                    room -= row.cost
            for request in read:
                self._waiting.move_to_end(request)
        return rows

    def _able(self, first: ReadRequest) -> list[ReadRequest]:
        """Requests that may be in a pass with ``first``: of clients that are not ahead of
        others."""
        scheduler = self._scheduler
        clients = sorted(scheduler.runnable(self._waiting.clients), key=scheduler.seconds)
        others = [
            request
            for client in clients
            for request in self._waiting.of(client)
            if request is not first and not request.work.is_cancelled
        ]
        return [first, *others]

    def _row(self, request: ReadRequest, example: Example) -> PassRow:
        cost = 1 if self._media else example.tokens
        return PassRow(request, example, cost, cost * self._row_bytes)


def _bytes_per_token(network: Network) -> int:
    """About what a layer keeps of a token until it is done: states, queries, keys, values, and the
    widened state twice."""
    config = network.model.config
    widened = getattr(config, "intermediate_size", None) or 4 * network.width
    return int((8 * network.width + 2 * int(widened)) * network.dtype.itemsize)
