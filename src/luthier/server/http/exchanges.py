"""A request to a model with its response, as data for the capture."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

from starlette.types import Message

from luthier.server.http.messages import Caller
from luthier.server.http.metrics import RequestRecord
from luthier.server.tables.database import now


@dataclass
class Exchange:
    """A request to a model and the response."""

    request_id: str
    account: str
    user_arn: str
    operation: str
    model: str
    """Model as named in the path; empty if the body names the model."""
    request: Any
    """Body of the request: a JSON value, or bytes of JSON."""
    metadata: str = ""
    """``X-Amzn-Bedrock-Request-Metadata``, a JSON object; empty without the header."""
    received: datetime = field(default_factory=now)
    content_type: str = "application/json"
    pieces: list[bytes] = field(default_factory=list)
    """Body of the response, as sent."""
    error: str = ""
    """Code of the fault; empty for a successful request."""
    stored_id: str = ""
    input_tokens: int = 0
    output_tokens: int = 0
    milliseconds: int = 0
    size: int = 0
    """Approximate size in memory, in bytes."""

    def add(self, message: Message) -> None:
        """Store a message of the response."""
        if message["type"] == "http.response.start":
            headers = dict(message["headers"])
            self.content_type = headers.get(b"content-type", b"").decode("latin-1")
        elif piece := message.get("body"):
            self.pieces.append(piece)

    def finish(self, record: RequestRecord, began: float) -> None:
        """Add the outcome of the request; ``began`` is the start by the performance counter."""
        # A stream that failed after the head of the response has status 200.
        self.error = record.error or ("ModelError" if record.routing.failed else "")
        self.stored_id = record.model
        self.milliseconds = round((time.perf_counter() - began) * 1000)
        self.input_tokens = sum(read for _, read, _ in record.tokens)
        self.output_tokens = sum(written for _, _, written in record.tokens)
        self.size = record.bytes_in + record.bytes_out


class Recorder(Protocol):
    """Receiver of exchanges. The event loop calls the methods, so they must not wait."""

    def captures(self, account: str) -> bool:
        """Return True if the next request of the account is recorded."""
        ...

    def add(self, exchange: Exchange) -> None:
        """Accept a complete exchange."""
        ...


class RequestObservation:
    """Observation of a request by the application. Routes of models call :meth:`begin`."""

    def __init__(self, recorder: Recorder, record: RequestRecord, began: float) -> None:
        self._recorder, self._record, self._began = recorder, record, began
        self.exchange: Exchange | None = None

    def begin(self, caller: Caller, request: Any, model: str = "", metadata: str = "") -> None:
        """Record the request, if the capture settings of the account include the request."""
        self._record.routing.body, self._record.routing.metadata = request, metadata
        if self._recorder.captures(caller.account):
            record = self._record
            self.exchange = Exchange(
                record.request_id, caller.account, caller.arn, record.operation, model, request,
                metadata,
            )  # fmt: skip

    def end(self) -> None:
        """Pass a recorded exchange on."""
        if self.exchange is not None:
            self.exchange.finish(self._record, self._began)
            self._recorder.add(self.exchange)
