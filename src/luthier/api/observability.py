"""What the people who run the service see: one line of JSON for each request, and Prometheus metrics.

Neither holds headers, queries or bodies: keys, signatures and data never reach a log.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from luthier.api.sending import Receive, Send
from luthier.api.wire import Caller, Fault
from luthier.store.usage import CountUsage, Used

if TYPE_CHECKING:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    from prometheus_client.registry import Collector

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
"""Seconds: from a read of the control plane to a long answer of a model."""

_UNTOLD = ("asked", "tokens")
"""Of :class:`Observed`, what is not in the log."""
Gauges = Callable[[], Mapping[str, Mapping[str, float]]]
"""Gives values by label, by the name of the gauge; one without labels has its value under ``""``."""

log = logging.getLogger("luthier.api")


@dataclass
class Observed:
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
    bytes_in: int = 0
    """Of the body of the request, as far as it was read."""
    bytes_out: int = 0
    """Of the body of the answer."""
    tokens: list[tuple[str, int, int]] = field(default_factory=list)
    """Models that answered, by their stored ids, with tokens that they read and wrote."""
    asked: list[tuple[str, str]] = field(default_factory=list)
    """Actions and resources that the policies were asked for: what the audit log names."""

    def let_in(self, face: str, caller: Caller) -> None:
        """Who sends it is known."""
        self.face, self.account, self.user = face, caller.account, caller.user

    def spend(self, model: str, read: int, written: int) -> None:
        """A model read and wrote so many tokens for it."""
        self.tokens.append((model, read, written))

    def counted(self, receive: Receive, send: Send) -> tuple[Receive, Send]:
        """The same, with the bytes of both bodies counted here."""

        async def receiving() -> MutableMapping[str, Any]:
            message = await receive()
            self.bytes_in += len(message.get("body", b""))
            return message

        async def sending(message: MutableMapping[str, Any]) -> None:
            self.bytes_out += len(message.get("body", b""))
            await send(message)

        return receiving, sending

    def refused(self, fault: Fault) -> None:
        """It ends with ``fault``."""
        self.error = fault.code


class Observer:
    """Counts and logs requests; ``gauges`` are read when somebody looks."""

    def __init__(
        self, gauges: Gauges, count: CountUsage | None = None, collector: Collector | None = None
    ) -> None:
        """Begin to count.

        Args:
            gauges: gives values by label, by the name of the gauge: ``jobs`` by state, ...
            count: told what each account used.
            collector: further metrics.
        """
        from prometheus_client import CollectorRegistry, Counter, Histogram

        self._registry = CollectorRegistry()
        self._requests = Counter(
            "luthier_requests", "Requests that were answered.", ["face", "operation", "status"],
            registry=self._registry,
        )  # fmt: skip
        self._seconds = Histogram(
            "luthier_request_seconds", "From the first byte of a request to the last of its answer.",
            ["face", "operation"], buckets=_BUCKETS, registry=self._registry,
        )  # fmt: skip
        self._registry.register(_Gauges(gauges))
        self._count = count
        if collector is not None:
            self._registry.register(collector)

    def finished(self, seen: Observed, seconds: float) -> None:
        """Count and log a request that was answered."""
        self._requests.labels(seen.face, seen.operation, str(seen.status)).inc()
        self._seconds.labels(seen.face, seen.operation).observe(seconds)
        if self._count is not None and seen.account:
            # A request stands beside the first model that answered it.
            for model, read, written in seen.tokens:
                self._count(seen.account, model, Used(prompt_tokens=read, generated_tokens=written))
            first = seen.tokens[0][0] if seen.tokens else ""
            size = {"bytes_in": seen.bytes_in, "bytes_out": seen.bytes_out}
            self._count(seen.account, first, Used(requests=1, **size))
        fields = {**vars(seen), "milliseconds": round(seconds * 1000, 2)}
        told = {key: value for key, value in fields.items() if key not in _UNTOLD and value != ""}
        log.info("request", extra={"fields": told})

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


def log_as_json(level: int = logging.INFO) -> None:
    """Let the service's own loggers and uvicorn's write lines of JSON to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    for name, least in (("luthier", level), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(least)
