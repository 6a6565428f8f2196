"""Selection of requests for the audit log.

The log contains each change, written before the response is sent, and each request that a role
forbids. Requests that read data or query models appear in the request log only.
"""

from __future__ import annotations

from luthier.server.http.messages import Caller
from luthier.server.roles import CHANGES
from luthier.server.tables.audit import Event, append
from luthier.server.tables.database import Database

FAILURES = ("InternalServer", "ServiceUnavailable")
"""Codes of service errors. After such an error, a part of the change may exist."""


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
        changed = outcome in ("ok", *FAILURES) and action in CHANGES
        if changed or outcome == "AccessDenied":
            account, user = caller.account, caller.user
            key = {"key": caller.key} if caller.key else {}
            event = Event(action, resource, outcome, account, user, request_id, address, key)
            with self._database.write() as session:
                append(session, event)
