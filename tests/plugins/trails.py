"""An audit log in memory."""

from __future__ import annotations

from luthier.server.http.messages import Caller


class Remembered:
    """Lines of the audit log."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, ...]] = []

    def record(
        self,
        caller: Caller,
        action: str,
        resource: str,
        outcome: str = "ok",
        request_id: str = "",
        address: str = "",
    ) -> None:
        self.lines.append((outcome, action, resource, caller.user))
