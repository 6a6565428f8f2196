"""What the people who run the service see: a line of JSON for each request, Prometheus metrics, usage.

None of it holds headers, queries or bodies: keys, signatures and data never reach a log. What each
account uses is counted in memory and written to the database once a minute: a process that is killed
loses the counts of its last minute. Seconds of training are written by the workers themselves, as they
renew their leases (``luthier.server.tables.jobs``).
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import TYPE_CHECKING, Any

from sqlalchemy import select
from starlette.types import Message, Receive, Send

from luthier.inference.latency import BUCKETS
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
"""How often counts are written."""

_NOT_LOGGED = ("actions", "body_requested", "tokens", "of_console")
"""Of :class:`RequestRecord`, what is not in the log."""
Gauges = Callable[[], Mapping[str, Mapping[str, float]]]
"""Gives values by label, by the name of the gauge; one without labels has its value under ``""``."""

_log = logging.getLogger("luthier.server")


@dataclass
class RequestRecord:
    """What is told of one request."""

    request_id: str
    method: str
    address: str
    """Of the client."""
    face: str = ""
    operation: str = ""
    """Empty where nothing answers to the path: paths are chosen by clients, and would fill memory."""
    account: str = ""
    user: str = ""
    status: int = 0
    """499 for a client that hung up, as nginx logs it."""
    error: str = ""
    """Code of the refusal, or ``ClientDisconnected``."""
    bytes_in: int = 0
    """Of the body of the request, as far as it was read."""
    bytes_out: int = 0
    """Of the body of the answer."""
    tokens: list[tuple[str, int, int]] = field(default_factory=list)
    """Models that answered, by their stored ids, with tokens that they read and wrote."""
    of_console: bool = False
    """Whether a page of the console reads data: usage does not count such a request."""
    body_requested: bool = False
    """Whether the server has begun to read the body, and so has sent ``100 Continue``."""
    actions: list[tuple[str, str]] = field(default_factory=list)
    """Actions and resources that the audit log names."""

    def add_tokens(self, model: str, read: int, written: int) -> None:
        """A model read and wrote so many tokens for it."""
        self.tokens.append((model, read, written))

    def count_bytes(self, receive: Receive, send: Send) -> tuple[Receive, Send]:
        """The same, with the bytes of both bodies counted here."""

        async def count_received() -> Message:
            self.body_requested = True
            message = await receive()
            self.bytes_in += len(message.get("body", b""))
            return message

        async def count_sent(message: Message) -> None:
            self.bytes_out += len(message.get("body", b""))
            await send(message)

        return count_received, count_sent


class Metrics:
    """Counts and logs requests; ``gauges`` are read when somebody looks."""

    def __init__(
        self,
        gauges: Gauges,
        count: CountUsage | None = None,
        latencies: Collector | None = None,
    ) -> None:
        """Begin to count.

        Args:
            gauges: gives values by label, by the name of the gauge: ``jobs`` by state, ...
            count: told what each account used.
            latencies: times of the models that write.
        """
        from prometheus_client import CollectorRegistry, Counter, Histogram

        self._registry = CollectorRegistry()
        self._requests = Counter(
            "luthier_requests", "Requests that were answered.", ["face", "operation", "status"],
            registry=self._registry,
        )  # fmt: skip
        self._seconds = Histogram(
            "luthier_request_seconds", "From the first byte of a request to the last of its answer.",
            ["face", "operation"], buckets=BUCKETS, registry=self._registry,
        )  # fmt: skip
        self._registry.register(_Gauges(gauges))
        self._count = count
        if latencies is not None:
            self._registry.register(latencies)

    def count_request(self, record: RequestRecord, seconds: float) -> None:
        """Count and log a request that was answered."""
        self._requests.labels(record.face, record.operation, str(record.status)).inc()
        self._seconds.labels(record.face, record.operation).observe(seconds)
        if self._count is not None and record.account:
            # A request stands beside the first model that answered it.
            for model, read, written in record.tokens:
                self._count(
                    record.account, model, Usage(prompt_tokens=read, generated_tokens=written)
                )
            first = record.tokens[0][0] if record.tokens else ""
            size = {"bytes_in": record.bytes_in, "bytes_out": record.bytes_out}
            requests = 0 if record.of_console else 1
            self._count(record.account, first, Usage(requests=requests, **size))
        fields = {**vars(record), "milliseconds": round(seconds * 1000, 2)}
        fields = {
            key: value for key, value in fields.items() if key not in _NOT_LOGGED and value != ""
        }
        _log.info("request", extra={"fields": fields})

    def exposition(self) -> tuple[bytes, dict[str, str]]:
        """The metrics as Prometheus reads them, and their content type."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self._registry), {"Content-Type": CONTENT_TYPE_LATEST}


class _Gauges:
    """What is there now, asked for when it is read."""

    def __init__(self, read: Gauges) -> None:
        self._read = read

    def collect(self) -> list[GaugeMetricFamily | CounterMetricFamily]:
        """Families of prometheus_client, one for each name."""
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
    """One line of JSON for each record."""

    def format(self, record: logging.LogRecord) -> str:
        """Time (UTC), level and message, then the record's own fields."""
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
    """Let the service's own loggers and uvicorn's write lines of JSON to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    for name, least in (("luthier", logging.INFO), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(least)


class Meter:
    """What accounts use of this server. Close it, or the counts of its last minute are lost."""

    def __init__(self, database: Database, write_seconds: float = WRITE_SECONDS) -> None:
        """``write_seconds`` is how often counts are written."""
        self._database, self._write_seconds = database, write_seconds
        self._lock = threading.Lock()
        self._used: dict[tuple[date, str, str], Usage] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="meter", daemon=True)
        self._thread.start()

    def count(self, account: str, model: str, used: Usage) -> None:
        """Add what ``account`` used, of the model with this stored id; empty for none.

        It is called in the event loop, and so never writes.
        """
        with self._lock:
            self._used.setdefault((now().date(), account, model), Usage()).add(used)

    def write(self) -> None:
        """Write what was counted; where that fails it is written with the next."""
        with self._lock:
            used, self._used = self._used, {}
        try:
            with self._database.write() as session:
                stored = session.execute(select(Storage.account, Storage.stored_bytes)).all()
                today = now().date()
                for account, size in stored:
                    if size:
                        peak = Usage(stored_bytes=size)
                        used.setdefault((today, account, ""), Usage()).add(peak)
                add_usage(session, used)
        except Exception:
            _log.exception("usage could not be written; it is tried again")
            with self._lock:
                for key, each in used.items():
                    self._used.setdefault(key, Usage()).add(each)

    def close(self) -> None:
        """Write all that is left."""
        self._closing.set()
        self._thread.join()
        self.write()

    def _run(self) -> None:
        while not self._closing.wait(self._write_seconds):
            self.write()
