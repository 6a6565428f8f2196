"""Writes the audit log of a running service: many entries in one transaction, by one thread.

What was changed is in the log before its answer leaves; refusals, and changes that failed half-way,
follow at once without anybody waiting; what only reads or infers is counted.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

from luthier.api.http.messages import Caller
from luthier.files import luthier_home
from luthier.store.audit import MARK, Event, append, write_mark
from luthier.store.database import Database, now

COUNT_SECONDS = 60.0
"""How often counts are written, and where the log ends is noted in the store."""
MOST_COUNTS = 5000
"""Different things that are counted in that time; further addresses are counted together."""
MOST_WAITING = 20_000
"""Refusals that wait to be written; beyond it they are only counted."""

READ_ONLY = re.compile(
    r"(bedrock|s3):(Get|List|Head|Invoke|Converse|Count|Apply)\w*"
    r"|sts:GetCallerIdentity"
    r"|luthier:openai\.(chat|completions|embeddings|images|responses)\..*"
    r"|luthier:(Get|List|Inspect|Estimate|Predict|SampleImages|ReconstructImages)\w*"
    r"|luthier:.*\.(get|list\w*|retrieve|content|run|validate)"
)
"""Actions that change nothing."""

FAILURES = ("InternalServer", "ServiceUnavailable")
"""Codes of what failed in the service: what was asked for may have been done all the same."""

_log = logging.getLogger("luthier.api")
_actions: ContextVar[list[tuple[str, str]] | None] = ContextVar("actions", default=None)


@contextmanager
def record_actions() -> Iterator[list[tuple[str, str]]]:
    """Collect what :func:`record_action` notes in the block and its threads."""
    actions: list[tuple[str, str]] = []
    token = _actions.set(actions)
    try:
        yield actions
    finally:
        _actions.reset(token)


def record_action(action: str, resource: str) -> None:
    """Note what a request does (``bedrock:InvokeModel``) to which ``resource`` (an ARN or ``*``)."""
    if (actions := _actions.get()) is not None:
        actions.append((action, resource))


@dataclass(frozen=True)
class _Counted:
    action: str
    resource: str
    outcome: str
    account: str
    user: str
    address: str


class AuditTrail:
    """The audit log as the application writes it. Close it, or counts are lost."""

    def __init__(self, database: Database, count_seconds: float = COUNT_SECONDS) -> None:
        """``count_seconds`` is how often counts are written."""
        self._database, self._count_seconds = database, count_seconds
        self._ready = threading.Condition()
        self._waiting: list[tuple[Event, Future[None] | None]] = []
        self._counts: Counter[_Counted] = Counter()
        self._since = now()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="audit", daemon=True)
        self._thread.start()

    def record(
        self,
        caller: Caller,
        action: str,
        resource: str,
        outcome: str = "ok",
        request_id: str = "",
        address: str = "",
    ) -> None:
        """Note a call that has been handled, before its answer leaves, as its kind asks for.

        Args:
            caller: who sent it.
            action: such as ``bedrock:DeleteCustomModel``.
            resource: what it acted on.
            outcome: ``ok``, or the code of the fault.
            request_id: as the client is told.
            address: of the client.
        """
        event = Event(action, resource, outcome, caller.account, caller.user, request_id, address)
        changes = not READ_ONLY.fullmatch(action)
        if outcome == "ok" and changes:
            self.write(event)
        elif outcome == "AccessDenied" or (outcome in FAILURES and changes):
            self._write_later(event)
        else:
            self._count(event)

    def write(self, event: Event) -> None:
        """Write ``event``; back when it is on disk. Raises what kept it from there."""
        written: Future[None] = Future()
        with self._ready:
            if self._closing:
                raise RuntimeError("the audit log is closed")
            self._waiting.append((event, written))
            self._ready.notify()
        written.result()

    def reject_unknown(self, code: str, address: str) -> None:
        """Somebody unknown was not let in."""
        self._count(Event("luthier:authenticate", outcome=code, address=address))

    def close(self) -> None:
        """Write all that is left; what comes later is refused."""
        with self._ready:
            self._closing = True
            self._ready.notify()
        self._thread.join()

    def _write_later(self, event: Event) -> None:
        """Of refusals, and of what failed: nobody waits for them."""
        with self._ready:
            if len(self._waiting) < MOST_WAITING:
                self._waiting.append((event, None))
                self._ready.notify()
                return
        self._count(event)

    def _count(self, event: Event) -> None:
        what = _Counted(
            event.action, event.resource, event.outcome, event.account, event.user, event.address
        )
        with self._ready:
            if what not in self._counts and len(self._counts) >= MOST_COUNTS:
                what = replace(what, address="", resource="*")
            self._counts[what] += 1

    def _run(self) -> None:
        due = time.monotonic() + self._count_seconds
        self._mark()
        while True:
            with self._ready:
                while not (self._waiting or self._closing or time.monotonic() >= due):
                    self._ready.wait(max(0.0, due - time.monotonic()))
                taken, self._waiting = self._waiting, []
                counted: list[Event] = []
                closing = self._closing
                minute = closing or time.monotonic() >= due
                if minute:
                    counted, due = self._take_counts(), time.monotonic() + self._count_seconds
            self._append(taken, counted)
            if minute:
                self._mark()
            if closing and not self._waiting:
                return

    def _mark(self) -> None:
        """Note in the store where the log ends."""
        try:
            with self._database.read() as session:
                whole = write_mark(session, luthier_home())
        except Exception:
            # The database or the disk is away; the next minute comes.
            _log.exception("where the audit log ends could not be noted")
            return
        if not whole:
            _log.error("the audit log does not hold what %s notes; see luthier audit verify", MARK)

    def _take_counts(self) -> list[Event]:
        since, self._since = self._since, now()
        counts, self._counts = self._counts, Counter()
        return [
            Event(**vars(what), details={"count": number, "since": since.isoformat()})
            for what, number in counts.items()
        ]

    def _append(self, taken: list[tuple[Event, Future[None] | None]], counted: list[Event]) -> None:
        events = [event for event, _ in taken] + counted
        if not events:
            return
        failed: Exception | None = None
        try:
            with self._database.write() as session:
                append(session, *events)
        except Exception as error:
            # Whoever waits is told; the thread goes on, the next entries may be written.
            _log.exception("the audit log could not be written")
            failed = error
        for _, written in taken:
            if written is not None and failed is not None:
                written.set_exception(failed)
            elif written is not None:
                written.set_result(None)
