"""What monitoring reads of models by label: the latency of their tokens, and how many of the tokens
that were proposed ahead (speculative decoding) the model accepted.

Labels are few whatever clients ask for: who makes the table says which model has which, and those
beyond :data:`MOST_LABELS` are counted together.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable
from typing import TYPE_CHECKING

from luthier.models.speculation import Speculation

if TYPE_CHECKING:
    from luthier.store.models import StoredModel

BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of the buckets of all histograms, in seconds: from a token that was guessed right, or a
read of the control plane, to a long answer of a model."""
MOST_LABELS = 100
OTHER = "other"


class LatencyHistogram:
    """How often something took how long. Safe to share between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = [0] * (len(BOUNDS) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        """It took so long once more."""
        place = bisect_left(BOUNDS, seconds)
        with self._lock:
            self._counts[place] += 1
            self._sum += seconds

    def read(self) -> tuple[list[int], float]:
        """How often it took up to each of ``BOUNDS`` and more than the last, and all seconds."""
        with self._lock:
            return [*self._counts], self._sum


class AnswerLatency:
    """What is measured of all answers of one label. Safe to share between threads."""

    def __init__(self) -> None:
        self.first_token = LatencyHistogram()
        """From a request, its prompt tokenized, to its first token: it waits, its prompt is read."""
        self.between_tokens = LatencyHistogram()
        """From one token of an answer to its next; no pause while its client reads too slowly."""
        self._lock = threading.Lock()
        self._speculation = Speculation()

    @property
    def speculation(self) -> Speculation:
        """Of all answers that have ended."""
        return self._speculation

    def add_speculation(self, found: Speculation) -> None:
        """An answer has ended for which so much was guessed."""
        with self._lock:
            self._speculation += found


class LatencyTable:
    """The measurements of all models of a server by label. Safe to share between threads."""

    def __init__(self, label_of: Callable[[StoredModel], str] = lambda stored: OTHER) -> None:
        """``label_of`` says under which label a model is measured; by default all are one."""
        self._label_of = label_of
        self._lock = threading.Lock()
        self._labels: dict[str, AnswerLatency] = {}

    def of(self, stored: StoredModel) -> AnswerLatency:
        """That of the label of ``stored``, which is ``other`` where there are too many."""
        label = self._label_of(stored)
        with self._lock:
            if label not in self._labels and len(self._labels) >= MOST_LABELS:
                label = OTHER
            return self._labels.setdefault(label, AnswerLatency())

    def by_label(self) -> dict[str, AnswerLatency]:
        """All there are."""
        with self._lock:
            return {**self._labels}
