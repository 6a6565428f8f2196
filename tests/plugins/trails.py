"""An audit log that is only remembered."""

from __future__ import annotations

from luthier.api.wire import Caller
from luthier.store.audit import Event


class Remembered:
    """What would stand in the audit log, line by line."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, ...]] = []

    def changed(self, event: Event) -> None:
        self.lines.append(("changed", event.action, event.resource, event.user))

    def refused(self, caller: Caller, action: str, resource: str, code: str, **about: str) -> None:
        self.lines.append(("refused", action, resource, caller.user))

    def turned_away(self, code: str, address: str) -> None:
        self.lines.append(("turned away", code, address))

    def used(self, caller: Caller, action: str, resource: str, address: str = "") -> None:
        self.lines.append(("used", action, resource, caller.user))
