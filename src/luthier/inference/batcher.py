"""Dynamic batching for models that predict: rows of all waiting requests share a forward pass.

No request waits for a batch to fill. The request with the model's turn reads the rows that arrived
during the last pass, one row per request in turn until the pass is full. So a request of one row
finishes with the next pass, even next to a request of a thousand rows. Passes grow while a pass
takes less than :data:`PASS_SECONDS`.
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

from luthier.data.tree import READING_BUDGET
from luthier.inference.inference import InferenceFailed, InferenceRefused
from luthier.inference.memory import CacheBudget
from luthier.inference.scheduler import FairScheduler, WaitingRequests, current_client
from luthier.limits import ModelLimits
from luthier.models.networks.modalities import inner_size
from luthier.processes import Cancelled, KillHandle, cancellable

if TYPE_CHECKING:
    from luthier.inference.prediction import Predictor
    from luthier.models.networks.network import Network
    from luthier.types import Example

PASS_SECONDS = 0.2
"""Target duration of a pass. A slower pass halves the size of the next pass. A pass of less than
half of this time doubles the size."""
FEWEST_TOKENS = 32
"""Tokens of the smallest full pass: fewer tokens take as long because of padding."""


class Work:
    """Time limits of a request at a model with turns."""

    def __init__(self, seconds: float = math.inf, queue_seconds: float = math.inf) -> None:
        """Allow ``seconds`` of the model's time, and ``queue_seconds`` before the first turn.

        The work is cancelled when the client of the thread hangs up.
        """
        self._seconds, self._used, self._began = seconds, 0.0, 0.0
        self.queue_seconds = queue_seconds
        self._turn_until = time.monotonic() + queue_seconds
        self.has_begun = False
        """True if the first turn has started."""
        self._cancelled = threading.Event()
        cancellable(KillHandle(self._cancelled.set))

    @property
    def is_cancelled(self) -> bool:
        """True if the client hung up."""
        return self._cancelled.is_set()

    @property
    def is_late(self) -> bool:
        """True if the wait for the first turn exceeds the limit."""
        return not self.has_begun and time.monotonic() > self._turn_until

    @contextmanager
    def count_time(self) -> Iterator[None]:
        """Count the time of the block; raise :class:`InferenceFailed` if no time is left."""
        self._began, self.has_begun = time.monotonic(), True
        self.check_within(0)
        try:
            yield
        finally:
            self.spend(time.monotonic() - self._began)

    def check(self) -> None:
        """End a turn of cancelled or overdue work."""
        self.check_within(time.monotonic() - self._began)

    def check_within(self, seconds: float) -> None:
        """Raise if the work is cancelled, or overdue after ``seconds`` more."""
        if self.is_cancelled:
            raise Cancelled
        if self._used + seconds > self._seconds:
            raise InferenceFailed(
                "ModelTimeout",
                f"The request used the model for {self._seconds:g} seconds, the limit of a request. "
                "Send smaller requests.",
            )

    def spend(self, seconds: float) -> None:
        """Count ``seconds`` of the model's time."""
        self._used += seconds


class RowFailed(Exception):
    """A row of a request could not be read; the cause has the reason."""

    def __init__(self, place: int) -> None:
        super().__init__(place)
        self.place = place


class ReadRequest:
    """A request with unread rows and finished predictions."""

    def __init__(self, examples: Sequence[Example], work: Work) -> None:
        """``Example.row`` is the place of each row in the request."""
        self.client, self.work = current_client(), work
        self.unread = deque(examples)
        self._answers: list[dict[str, Any]] = [{} for _ in examples]
        self._missing = len(examples)
        self._failure: tuple[int, Exception] | None = None

    @property
    def is_done(self) -> bool:
        """True if every row has a prediction, or a row failed."""
        return self._failure is not None or not self._missing

    def settle(self, place: int, answer: dict[str, Any] | Exception) -> None:
        """Store the prediction for a row; an exception ends the request."""
        if isinstance(answer, Exception):
            # The first failure counts; other rows of the request are not read any more.
            self._failure = self._failure or (place, answer)
            self.unread.clear()
        else:
            self._answers[place] = answer
            self._missing -= 1

    def answers(self) -> list[dict[str, Any]]:
        """Return the predictions in the order of the rows.

        Raises:
            InferenceFailed, Cancelled: if the request is overdue or cancelled.
            RowFailed: for an unreadable row.
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
    """Tokens; 1 for an image or audio clip."""
    nbytes: int

    def settle(self, answer: dict[str, Any] | Exception) -> None:
        """Store the prediction in the request."""
        self.request.settle(self.example.row, answer)


class RowBatcher:
    """Waiting requests of a model. Safe to share between threads."""

    def __init__(
        self,
        predictor: Predictor,
        limits: ModelLimits,
        scheduler: FairScheduler,
        memory: CacheBudget,
        deterministic: bool = False,
    ) -> None:
        """Reserve activations in ``memory``; ``deterministic`` passes have a single row."""
        from luthier.models.networks.layouts import MOST_IMAGES

        network = predictor.network
        self._predictor, self._scheduler, self._memory = predictor, scheduler, memory
        self._deterministic = deterministic
        self._media = network.layout.has_media
        self._most = MOST_IMAGES if self._media else READING_BUDGET
        self._row_bytes = 0 if self._media else _bytes_per_token(network)
        self._fewest = 1 if self._media else FEWEST_TOKENS
        self._size = self._fewest
        """Cost of a full pass now."""
        self._waiting: WaitingRequests[ReadRequest] = WaitingRequests(limits.waiting_requests)
        self._lock = threading.Lock()

    def add(self, request: ReadRequest) -> None:
        """Queue ``request``.

        Raises:
            InferenceRefused: for a row that needs more memory than the budget.
            InferenceFailed: if too many requests of the client wait.
        """
        for example in request.unread:
            needed = self._row(request, example).nbytes
            # A row above the whole budget would wait forever.
            if needed > self._memory.total:
                raise InferenceRefused(
                    f"This text may need {needed >> 20} MiB of memory, and {self._memory.total >> 20} "
                    "MiB are available. Send a shorter text.",
                    "input",
                )
        with self._lock:
            self._waiting.add(request)

    def remove(self, request: ReadRequest) -> None:
        """Remove ``request``."""
        with self._lock:
            self._waiting.remove(request)

    @contextmanager
    def next_pass(self, first: ReadRequest) -> Iterator[list[PassRow]]:
        """Yield the rows of the next pass, with rows of ``first``; call during the model's turn.

        The list is empty while other models use the memory.
        """
        rows = self._choose(first)
        try:
            yield rows
        except BaseException:
            for row in rows:  # or their requests would wait forever
                row.settle(InferenceFailed("ModelError", "The model failed."))
            raise
        finally:
            for row in rows:
                self._memory.release(row.request.client, row.nbytes)

    def read(self, rows: Sequence[PassRow]) -> None:
        """Read ``rows`` together; after a failure row by row, to find the failing row."""
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
        began, cost = time.monotonic(), sum(row.cost for row in rows)

        def check(*_: Any) -> None:
            # The hook also runs between the passes of a model that needs several per image. The pass
            # ends when no request needs the result any more.
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
                # A failed pass used the model, too.
                row.request.work.spend(seconds * row.cost / cost)
        # Small passes say little: on a busy machine they look slow, and the size would shrink to 2
        # or 3 rows.
        if cost > self._size // 2:
            if seconds > PASS_SECONDS:
                self._size = max(self._fewest, self._size // 2)
            elif seconds < PASS_SECONDS / 2:
                self._size = min(self._most, 2 * self._size)
        return answers

    def _choose(self, first: ReadRequest) -> list[PassRow]:
        rows: list[PassRow] = []
        with self._lock:
            room, requests = self._size, self._runnable_requests(first)
            read = set[ReadRequest]()
            while requests:
                for request in [*requests]:
                    row = self._row(request, request.unread[0]) if request.unread else None
                    if (
                        row is None
                        # The first row is read even if larger than the pass; otherwise the request
                        # would never end.
                        or (rows and (row.cost > room or self._deterministic))
                        or not self._memory.reserve(request.client, row.nbytes)
                    ):
                        requests.remove(request)
                        continue
                    rows.append(row)
                    read.add(request)
                    request.unread.popleft()
                    # `queue_seconds` limits the wait for the first row only.
                    request.work.has_begun = True
                    room -= row.cost
            # Requests in this pass go behind other requests of their client.
            for request in read:
                self._waiting.move_to_end(request)
        return rows

    def _runnable_requests(self, first: ReadRequest) -> list[ReadRequest]:
        """Return ``first`` and the requests of clients that may run now."""
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
    """Estimate a layer's activations per token: states, queries, keys, values, and the MLP twice."""
    config = network.model.config
    widened = inner_size(config) or 4 * network.width
    return int((8 * network.width + 2 * int(widened)) * network.dtype.itemsize)
