"""Choice of a model per request while a deployment has a canary."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

SESSION_HEADER = "x-session-id"
"""Header with the session of a request, for bodies without a member for users or sessions."""
_USERS = ("safety_identifier", "user")
_SESSIONS = ("session_id", "user_id")
"""Keys of ``metadata`` or ``requestMetadata``."""


@dataclass
class Routing:
    """The answering model of a request to a deployment with a canary."""

    request_id: str
    session: str = ""
    """Value of :data:`SESSION_HEADER`."""
    body: Any = None
    """Body of a request to a model: a JSON value, or bytes of JSON."""
    metadata: str = ""
    """``X-Amzn-Bedrock-Request-Metadata``."""
    deployment: str = ""
    """Id of the deployment; empty without a canary."""
    canary: str = ""
    """ARN of the canary."""
    model: str = ""
    """Name of the answering model; empty without a canary."""
    unit: str = ""
    """Hash of the user, session or request."""
    is_new: bool = False
    """True if the canary answers."""
    failed: bool = False
    """True if a stream has failed after the head of the response."""

    def choose(self, deployment: str, canary: str, share: float) -> bool:
        """Return True if the model ``canary`` answers: for a ``share`` of users and sessions.

        All requests of a user or session have one model. A request without both counts alone.
        """
        digest = hashlib.sha256(f"{deployment} {canary} {self._user()}".encode()).digest()
        self.deployment, self.canary, self.unit = deployment, canary, digest[:12].hex()
        self.is_new = int.from_bytes(digest[:8]) < share * 2**64
        return self.is_new

    def _user(self) -> str:
        body, metadata = self.body, None
        try:
            body = json.loads(body) if isinstance(body, bytes) else body
            metadata = json.loads(self.metadata or "null")
        except ValueError:
            pass  # the operation rejects the body
        body = body if isinstance(body, Mapping) else {}
        metadata = metadata or body.get("requestMetadata") or body.get("metadata")
        metadata = metadata if isinstance(metadata, Mapping) else {}
        found = [body.get(name) for name in _USERS] + [metadata.get(name) for name in _SESSIONS]
        return self.session or next((str(each) for each in found if each), self.request_id)


_routing: ContextVar[Routing | None] = ContextVar("routing", default=None)


@contextmanager
def route(routing: Routing) -> Iterator[None]:
    """Route the model of the block and of the block's threads with ``routing``."""
    token = _routing.set(routing)
    try:
        yield
    finally:
        _routing.reset(token)


def current_routing() -> Routing | None:
    """Return the routing of a request to a model; None outside, such as for batches."""
    routing = _routing.get()
    return routing if routing is not None and routing.body is not None else None


def answering_model(name: str) -> str:
    """Return the name of the answering model while a deployment has a canary, else ``name``."""
    routing = _routing.get()
    return (routing and routing.model) or name


def report_failure() -> None:
    """Record that the stream of the request has failed."""
    if (routing := _routing.get()) is not None:
        routing.failed = True
