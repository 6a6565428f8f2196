"""Prometheus metrics of generative models: token latencies and guessed tokens, by model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prometheus_client import Counter, Histogram

    from luthier.library.models import StoredModel
    from luthier.models.decoding.speculation import Speculation

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of the buckets of all histograms, in seconds."""
MAX_LABELS = 100
"""Maximum number of models with a separate label; all further models share :data:`OTHER`."""
OTHER = "other"


@dataclass(frozen=True)
class ModelMetrics:
    """Metrics of one label. Safe to share between threads."""

    first_token: Histogram
    between_tokens: Histogram
    proposed: Counter
    accepted: Counter

    def add_speculation(self, speculation: Speculation) -> None:
        """Count the guessed tokens of a finished reply."""
        self.proposed.inc(speculation.proposed)
        self.accepted.inc(speculation.accepted)


class LatencyTable:
    """Collector of the metrics of all models of a server. Safe to share between threads."""

    def __init__(self, label_of: Callable[[StoredModel], str] = lambda stored: OTHER) -> None:
        """``label_of`` returns the label of a model."""
        from prometheus_client import Counter, Histogram

        self._label_of = label_of
        self._lock = threading.Lock()
        self._labels: set[str] = set()
        # Outside the global registry, which rejects a second table of the same names in a process.
        like: Any = {"labelnames": ["model"], "registry": None}
        self._first_token = Histogram(
            "luthier_time_to_first_token_seconds",
            "Time from a request, its prompt tokenized, to the first token of its reply.",
            buckets=BUCKETS,
            **like,
        )
        self._between_tokens = Histogram(
            "luthier_inter_token_latency_seconds",
            "Time from one token of a reply to the next.",
            buckets=BUCKETS,
            **like,
        )
        self._proposed = Counter(
            "luthier_speculative_proposed_tokens", "Tokens guessed from earlier text.", **like
        )
        self._accepted = Counter(
            "luthier_speculative_accepted_tokens", "Guessed tokens that were chosen.", **like
        )

    def of(self, stored: StoredModel) -> ModelMetrics:
        """Return the metrics of the label of ``stored``, or of ``other`` beyond the limit."""
        label = self._label_of(stored)
        with self._lock:
            if label not in self._labels and len(self._labels) >= MAX_LABELS:
                label = OTHER
            self._labels.add(label)
        return ModelMetrics(
            self._first_token.labels(label),
            self._between_tokens.labels(label),
            self._proposed.labels(label),
            self._accepted.labels(label),
        )

    def collect(self) -> Iterator[Any]:
        """Yield the metric families for a Prometheus registry."""
        return chain(
            self._first_token.collect(),
            self._between_tokens.collect(),
            self._proposed.collect(),
            self._accepted.collect(),
        )
