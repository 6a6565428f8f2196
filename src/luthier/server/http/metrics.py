"""Request log as JSON lines, Prometheus metrics, and usage of accounts.

Logs and metrics contain no headers, queries or bodies, and therefore no keys, signatures or user
data. The server writes usage to the database once a minute; a killed process loses the last minute.
Training workers write training seconds themselves (``luthier.server.tables.jobs``).
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import TYPE_CHECKING, Any

from sqlalchemy import select
from starlette.types import Message, Receive, Send

from luthier.inference.latency import BUCKETS, MAX_LABELS, OTHER
from luthier.models.catalog import CATALOG
from luthier.server.routing import Routing
from luthier.server.tables.custom_models import IMPORTED
from luthier.server.tables.database import Database, now
from luthier.server.tables.storage import Storage
from luthier.server.tables.usage import CountUsage, Usage, add_usage

if TYPE_CHECKING:
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
    )
    from prometheus_client.registry import Collector

WRITE_SECONDS = 60.0
"""Interval between two writes of usage, in seconds."""

_NOT_LOGGED = (
    "actions", "body_requested", "model", "tokens", "of_console", "queue_seconds", "routing",
)  # fmt: skip
"""Fields of :class:`RequestRecord` that are not logged."""
_RANDOM_ID = re.compile(r"(job|model)-[a-z0-9]{12}")
"""Names of models of jobs and imports in the library."""
Gauges = Callable[[], Mapping[str, Mapping[str, float]]]
"""Return the values of each gauge by label. A gauge without labels has the label ``""``."""

_log = logging.getLogger("luthier.server")


@dataclass
class RequestRecord:
    """Data about a request for the log, metrics and usage."""

    request_id: str
    method: str
    address: str
    """Address of the client."""
    api: str = ""
    operation: str = ""
    """Name of the operation; empty for an unknown path, because clients choose paths."""
    account: str = ""
    user: str = ""
    key: str = ""
    """Id of the key that authenticated the request."""
    status: int = 0
    """HTTP status; 499 for a client that disconnected, as in nginx."""
    error: str = ""
    """Code of the fault, or ``ClientDisconnected``."""
    bytes_in: int = 0
    """Size of the received part of the request body, in bytes."""
    bytes_out: int = 0
    """Size of the response body in bytes."""
    model: str = ""
    """Library id of the first queried model."""
    tokens: list[tuple[str, int, int]] = field(default_factory=list)
    """Library ids of queried models, with prompt and generated tokens."""
    queue_seconds: float | None = None
    """Wait for a free slot, in seconds; None for a request without a slot."""
    of_console: bool = False
    """True if a console page reads data. Usage does not count the request."""
    body_requested: bool = False
    """True if the server has started to read the body, and so has sent ``100 Continue``."""
    actions: list[tuple[str, str]] = field(default_factory=list)
    """Actions and resources for the audit log."""
    routing: Routing = field(init=False)
    """Choice of the model."""

    def __post_init__(self) -> None:
        self.routing = Routing(self.request_id)

    def add_model(self, model: str) -> None:
        """Store the first queried model, which the request counts for."""
        self.model = self.model or model

    def add_tokens(self, model: str, read: int, written: int) -> None:
        """Add the prompt and generated tokens of a model."""
        self.tokens.append((model, read, written))

    def count_bytes(self, receive: Receive, send: Send) -> tuple[Receive, Send]:
        """Return ``receive`` and ``send`` functions that count body bytes."""

        async def count_received() -> Message:
            self.body_requested = True
            message = await receive()
            self.bytes_in += len(message.get("body", b""))
            return message

        async def count_sent(message: Message) -> None:
            self.bytes_out += len(message.get("body", b""))
            await send(message)

        return count_received, count_sent


def model_label(model_id: str) -> str:
    """Return the label of a model: the library id, or ``other`` for names of a client's choice.

    Any client can read ``/metrics``, and names of custom models are private to accounts. Models of
    jobs and imports have random ids, which are the last part of the ARN of the job or import.
    """
    base, _, name = model_id.partition(":")
    catalog = base in CATALOG
    public = (catalog or base == IMPORTED) and _RANDOM_ID.fullmatch(name) if name else catalog
    return model_id if public else OTHER


class Metrics:
    """Counters and log of requests."""

    def __init__(
        self,
        gauges: Gauges,
        count: CountUsage | None = None,
        latencies: Collector | None = None,
    ) -> None:
        """Create the metrics.

        Args:
            gauges: Returns the current values of gauges.
            count: Records the usage of accounts.
            latencies: Collector of model latencies.
        """
        from prometheus_client import (
            CollectorRegistry,
            Counter,
            Histogram,
            disable_created_metrics,
        )

        # The time of the first use would be one more series per label.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "luthier_requests", "Requests that were answered.", ["api", "operation", "status"],
            registry=self._registry,
        )  # fmt: skip
        self._seconds = Histogram(
            "luthier_request_seconds", "From the first byte of a request to the last of its answer.",
            ["api", "operation"], buckets=BUCKETS, registry=self._registry,
        )  # fmt: skip
        self._queue = Histogram(
            "luthier_queue_seconds", "Wait of admitted requests for a free slot.", ["api"],
            buckets=BUCKETS, registry=self._registry,
        )  # fmt: skip
        self._model_requests = Counter(
            "luthier_model_requests", "Requests to a model.", ["model", "status"],
            registry=self._registry,
        )  # fmt: skip
        self._model_seconds = Histogram(
            "luthier_model_request_seconds", "Duration of successful requests to a model.",
            ["model"], buckets=BUCKETS, registry=self._registry,
        )  # fmt: skip
        self._models: set[str] = set()
        self._registry.register(_Gauges(gauges))
        self._count = count
        if latencies is not None:
            self._registry.register(latencies)

    def count_request(self, record: RequestRecord, seconds: float) -> None:
        """Count and log a request."""
        self._requests.labels(record.api, record.operation, str(record.status)).inc()
        self._seconds.labels(record.api, record.operation).observe(seconds)
        if record.queue_seconds is not None:
            self._queue.labels(record.api).observe(record.queue_seconds)
        if record.model:
            self._count_model(record.model, record.status, seconds)
        if self._count is not None and record.account:
            for model, read, written in record.tokens:
                tokens = Usage(prompt_tokens=read, generated_tokens=written)
                self._count(record.account, record.user, model, tokens)
            size = {"bytes_in": record.bytes_in, "bytes_out": record.bytes_out}
            requests = 0 if record.of_console else 1
            used = Usage(requests=requests, **size)
            self._count(record.account, record.user, record.model, used)
        fields = {**vars(record), "milliseconds": round(seconds * 1000, 2)}
        fields = {
            key: value for key, value in fields.items() if key not in _NOT_LOGGED and value != ""
        }
        _log.info("request", extra={"fields": fields})

    def _count_model(self, model_id: str, status: int, seconds: float) -> None:
        label = model_label(model_id)
        if label not in self._models and len(self._models) >= MAX_LABELS:
            label = OTHER
        self._models.add(label)
        self._model_requests.labels(label, str(status)).inc()
        if status < 400:
            self._model_seconds.labels(label).observe(seconds)

    def exposition(self) -> tuple[bytes, dict[str, str]]:
        """Return the metrics in Prometheus's format, and the headers."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self._registry), {"Content-Type": CONTENT_TYPE_LATEST}


class _Gauges:
    """Collector of gauges with values read on demand."""

    def __init__(self, read: Gauges) -> None:
        self._read = read

    def collect(self) -> list[GaugeMetricFamily | CounterMetricFamily]:
        """Return one prometheus_client family for each gauge."""
        from prometheus_client.core import GaugeMetricFamily

        families: list[GaugeMetricFamily | CounterMetricFamily] = []
        for name, values in self._read().items():
            labels = ["kind"] if any(values) else []
            family = GaugeMetricFamily(f"luthier_{name}", name.replace("_", " "), labels=labels)
            for label, value in values.items():
                family.add_metric([label] if labels else [], value)
            families.append(family)
        return families


class JsonLines(logging.Formatter):
    """Formatter of log records as JSON lines."""

    def format(self, record: logging.LogRecord) -> str:
        """Return time (UTC), level, message and fields of the record."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if request_id := getattr(record, "request_id", None):
            line["request_id"] = request_id
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def log_as_json() -> None:
    """Write the logs of the service and of uvicorn to standard error as JSON lines."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    for name, least in (("luthier", logging.INFO), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(least)


class Meter:
    """Usage of accounts on this server. :meth:`close` writes the last counts."""

    def __init__(self, database: Database, write_seconds: float = WRITE_SECONDS) -> None:
        """Start a thread that writes counts every ``write_seconds``."""
        self._database, self._write_seconds = database, write_seconds
        self._lock = threading.Lock()
        self._used: dict[tuple[date, str, str, str], Usage] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="meter", daemon=True)
        self._thread.start()

    def count(self, account: str, user: str, model: str, used: Usage) -> None:
        """Add usage of ``user`` with a model, by library id; empty for usage without a model.

        The event loop calls this method, so the method does not access the database.
        """
        with self._lock:
            self._used.setdefault((now().date(), account, user, model), Usage()).add(used)

    def write(self) -> None:
        """Write the counts to the database. After an error, the counts are kept for the next write."""
        with self._lock:
            # The event loop waits for this lock in `count`, so the lock ends before the write.
            used, self._used = self._used, {}
        try:
            with self._database.write() as session:
                stored = session.execute(select(Storage.account, Storage.stored_bytes)).all()
                today = now().date()
                for account, size in stored:
                    if size:
                        peak = Usage(stored_bytes=size)
                        used.setdefault((today, account, "", ""), Usage()).add(peak)
                add_usage(session, used)
        except Exception:
            _log.exception("usage could not be written; it is tried again")
            with self._lock:
                for key, each in used.items():
                    # Peaks of stored bytes may be added twice, because Usage.add keeps the maximum.
                    self._used.setdefault(key, Usage()).add(each)

    def close(self) -> None:
        """Stop the thread and write the last counts."""
        self._closing.set()
        self._thread.join()
        self.write()

    def _run(self) -> None:
        while not self._closing.wait(self._write_seconds):
            self.write()
