"""Selection of requests for the audit log.

The log contains each change, written before the response is sent, and each request that a role
forbids. Requests that read data or query models appear in the request log only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from luthier.server.http.messages import Caller
from luthier.server.tables.audit import Event, append
from luthier.server.tables.database import Database

READ_ONLY = re.compile(
    r"(bedrock|s3):(Get|List|Head|Invoke|Converse|Count|Apply)\w*"
    r"|sts:GetCallerIdentity"
    r"|luthier:openai\.(chat|completions|embeddings|images|responses)\..*"
    r"|luthier:(Get|List|Inspect|Estimate|Predict|SampleImages|ReconstructImages)\w*"
    r"|luthier:.*\.(get|list\w*|retrieve|content|run|validate)"
)
"""Actions without changes."""

FAILURES = ("InternalServer", "ServiceUnavailable")
"""Codes of service errors. After such an error, a part of the change may exist."""

_actions: ContextVar[list[tuple[str, str]] | None] = ContextVar("actions", default=None)


@contextmanager
def record_actions() -> Iterator[list[tuple[str, str]]]:
    """Collect the calls of :func:`record_action` in the block and in threads of the block."""
    actions: list[tuple[str, str]] = []
    token = _actions.set(actions)
    try:
        yield actions
    finally:
        _actions.reset(token)


def record_action(action: str, resource: str) -> None:
    """Record that the request performs ``action`` (``bedrock:InvokeModel``) on ``resource`` (an ARN
    or ``*``)."""
    if (actions := _actions.get()) is not None:
        actions.append((action, resource))


class AuditTrail:
    """Writer of the audit log."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def record(
        self,
        caller: Caller,
        action: str,
        resource: str,
        outcome: str = "ok",
        request_id: str = "",
        address: str = "",
    ) -> None:
        """Write an entry for a change, a failed change, or a request that a role forbids.

        Args:
            caller: Sender of the request.
            action: Action such as ``bedrock:DeleteCustomModel``.
            resource: ARN, name or path.
            outcome: ``ok``, or the code of the fault.
            request_id: Request id in the response.
            address: IP address of the client.
        """
        changed = outcome in ("ok", *FAILURES) and not READ_ONLY.fullmatch(action)
        if changed or outcome == "AccessDenied":
            account, user = caller.account, caller.user
            event = Event(action, resource, outcome, account, user, request_id, address)
            with self._database.write() as session:
                append(session, event)
