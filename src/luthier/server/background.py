"""Work of accounts that a server does itself, in the background: its models answer for it.

    lease → what is left of the work, several pieces side by side → its end

Each piece is written down by itself, in a transaction that only who still holds the lease can make:
what a killed server had done is not done again, and nothing is done twice. Several servers may share a
database; one that falls silent loses its lease to another.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from itertools import islice
from typing import Any, Generic, TypeVar

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from luthier.cancellation import CancelScope, cancelled_by
from luthier.errors import DoesNotFit, LeaseLost, LuthierError, QuotaExceeded
from luthier.server.http.messages import Caller, Fault
from luthier.server.roles import authorize
from luthier.server.tables import queue
from luthier.server.tables.database import Database
from luthier.server.tables.principals import active_role
from luthier.server.tables.queue import BackgroundWork, LeaseWatch
from luthier.server.tables.usage import CountUsage, Usage

Work = TypeVar("Work", bound=BackgroundWork)
Piece = TypeVar("Piece")
Done = TypeVar("Done")

IDLE = 2.0
"""Seconds between two looks for work of other servers that fell silent."""
LOOK = 1.0
"""Seconds between two looks whether a row is still to be worked on: a piece may take minutes."""
MOMENT = 0.5
"""Seconds for pieces in hand that are about to end, before they are given up."""
SLICE = 15.0
"""Seconds that a row is worked on while others wait: then it gives way to those of other accounts."""
_SWEEP = 600.0
"""Seconds between two calls of :meth:`BackgroundRunner.sweep`."""
_log = logging.getLogger("luthier.server")


class BackgroundRunner(ABC, Generic[Work, Done]):
    """Does one kind of work, one row after the other. Start it with the server."""

    kind: type[Work]
    at_once: int = 8
    """Pieces of a row that are worked on side by side."""

    def __init__(self, database: Database, count: CountUsage) -> None:
        """``count`` is told what an account used, of which model."""
        self.database, self.count = database, count
        self._token = secrets.token_hex(8)
        self.watch = LeaseWatch(self.kind.lease_time.total_seconds())
        """Tells which servers fell silent."""
        self.renewal = min(self.kind.lease_time.total_seconds() / 3, LOOK)
        """Seconds after which the lease is renewed where no piece is done."""
        self._wake, self._closed = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    @abstractmethod
    def work(self, row: Work) -> None:
        """Do what is left of ``row``, as far as this server can."""

    @abstractmethod
    def record(self, session: Session, row: Work, number: int, done: Done) -> None:
        """Write down what came of the piece ``number`` of ``row``."""

    @abstractmethod
    def state(self, row: Work) -> str:
        """Where ``row`` stands now; further pieces are begun in the state :attr:`working` alone."""

    @abstractmethod
    def fail(self, row: Work, code: str, message: str) -> None:
        """End ``row`` without a result; ``code`` is OpenAI's word for why."""

    action: str
    """Action that creates such work: the role of the user has to allow it until the work ends."""
    working: str
    """The :meth:`state` of a row whose pieces are worked on."""
    gives_up: bool = False
    """Whether pieces in hand are ended at once, and not written down, where the server ends; else they
    are waited for. Where the row is not worked on any more they always are."""

    def sweep(self) -> None:
        """What else is done every few minutes."""

    def start(self) -> None:
        """Begin to work."""
        self._thread = threading.Thread(target=self._run, name=self.kind.noun, daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Look for work now."""
        self._wake.set()

    def close(self) -> None:
        """Stop after the pieces in hand, or by giving them up; the rest can be done anywhere."""
        self._closed.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join()

    def run_once(self) -> bool:
        """Work on one row as far as possible; whether there was one."""
        row = self._claim()
        if row is None:
            return False
        try:
            self.work(row)
        except QuotaExceeded as error:
            self.fail(row, "insufficient_quota", str(error))
        except Fault as fault:
            self.fail(row, "server_error", fault.message)
        except (DoesNotFit, SQLAlchemyError):
            # A full disk or a database that is away pass: the row keeps what is done, and waits.
            raise
        except LuthierError as error:
            self.fail(row, "invalid_file", str(error))
        except Exception as error:
            # Tried again it would fail again, and all rows after it would wait for ever.
            _log.exception("%s failed", row.id)
            noun = self.kind.noun
            self.fail(row, "server_error", f"The {noun} failed: {type(error).__name__}.")
        finally:
            with suppress(LeaseLost), self.database.write() as session:
                queue.release(session, self.kind, row.id, self._token)
        return True

    def work_through(
        self,
        row: Work,
        left: Iterable[tuple[int, Piece]],
        do: Callable[[Piece], Done],
    ) -> bool:
        """Do the pieces that are ``left``, by their numbers; whether that is all.

        It is not where another server goes on with them, or this one after a turn of other accounts: no
        row keeps them waiting for longer than a moment, however much is left of it.
        """
        pieces, began, gives_way = iter(left), time.monotonic(), False
        running: dict[Future[Done], tuple[int, CancelScope]] = {}

        def work_on(piece: Piece, scope: CancelScope) -> Done:
            with cancelled_by(scope.take):
                return do(piece)

        with ThreadPoolExecutor(self.at_once, self.kind.noun) as threads:
            state = self._keep(row, {})
            while state is not None:
                goes_on = state == self.working and not self._closed.is_set()
                if goes_on and not gives_way:
                    for number, piece in islice(pieces, self.at_once - len(running)):
                        scope = CancelScope()
                        running[threads.submit(work_on, piece, scope)] = number, scope
                if not running or state != self.working or (self.gives_up and not goes_on):
                    break
                if not gives_way and time.monotonic() - began >= SLICE:
                    gives_way = self._give_way(row)
                ended, _ = wait(running, self.renewal, FIRST_COMPLETED)
                state = self._keep(row, {running.pop(each)[0]: each for each in ended})
            if running and state is not None:
                ended, _ = wait(running, MOMENT)
                state = self._keep(row, {running.pop(each)[0]: each for each in ended})
            for _, scope in running.values():
                scope.close()
        if gives_way and next(pieces, None) is not None:
            return False
        return state is not None and not self._closed.is_set()

    def lock_held(self, session: Session, row: Work) -> Work | None:
        """``row`` until the transaction ends; ``None`` where this server no longer works on it."""
        with suppress(LeaseLost):
            return queue.hold(session, self.kind, row.id, self._token)
        return None

    def caller_of(self, row: Work) -> Caller:
        """Return the user who created ``row``, with the role of this moment.

        Raises:
            Fault: ``AccessDenied`` for a user who is disabled or removed, or whose role no longer
                allows such work.
        """
        account, user = row.caller["account"], row.caller["user"]
        with self.database.read() as session:
            role = active_role(session, account, user)
        caller = Caller(account, user, () if role is None else (role,))
        if role is None:
            text = f"User: {caller.arn} is disabled or removed, so the work cannot continue."
            raise Fault("AccessDenied", text)
        authorize(caller, self.action, "*")
        return caller

    def count_tokens(self, account: str, model: str, read: int, written: int) -> None:
        """A model read and wrote so many tokens for ``account``."""
        self.count(account, model, Usage(prompt_tokens=read, generated_tokens=written))

    def _run(self) -> None:
        swept = -_SWEEP
        while not self._closed.is_set():
            try:
                if time.monotonic() - swept > _SWEEP:
                    swept = time.monotonic()
                    self.sweep()
                while not self._closed.is_set() and self.run_once():
                    pass
            except Exception:
                # The database may be away, or the disk full; the row is found again.
                _log.exception("a %s could not be worked on", self.kind.noun)
            self._wake.wait(IDLE)
            self._wake.clear()

    def _claim(self) -> Work | None:
        with self.database.write() as session:
            held = queue.leases(session, self.kind)
            silent = [each for each in held if self.watch.silent(*each)]
            self.watch.forget_others({row_id for row_id, _ in held})
            return queue.claim_next(session, self.kind, self._token, silent)

    def _give_way(self, row: Work) -> bool:
        """Whether rows of other accounts wait, before which this one does not come again."""
        with suppress(LeaseLost), self.database.write() as session:
            return queue.give_way(session, self.kind, row.id, self._token)
        return False

    def _keep(self, row: Work, done: Mapping[int, Future[Done]]) -> str | None:
        """Go on holding the row and write down what is done, by its numbers.

        Gives where the row stands now; ``None`` where another server works on it.
        """
        with self.database.write() as session:
            # Written only by who still holds the row: nothing is done twice.
            try:
                held = queue.renew(session, self.kind, row.id, self._token)
            except LeaseLost:
                return None
            for number, piece in done.items():
                self.record(session, held, number, piece.result())
            return self.state(held)


def caller_fields(caller: Caller) -> dict[str, Any]:
    """Return the caller as a row of work stores it: the role is read again when its turn comes."""
    return {"account": caller.account, "user": caller.user}
