"""Background work of accounts in the server process, such as batches and eval runs.

    lease → unfinished pieces, several concurrently → end

A transaction that requires the lease stores the result of each piece. After a crash, the next
server therefore continues without repeating completed pieces. Several servers may share a database;
a server without lease renewal loses the lease to another server.
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
from functools import partial
from itertools import islice
from typing import Any, Generic, TypeVar

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from luthier.errors import DoesNotFit, LeaseLost, LuthierError, QuotaExceeded
from luthier.inference.inference import meter
from luthier.inference.scheduler import working_for
from luthier.processes import CancelScope, cancelled_by
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
Answer = TypeVar("Answer")

IDLE = 2.0
"""Interval between searches for work of crashed servers, in seconds."""
LOOK = 1.0
"""Interval between checks of a row's state, in seconds: a piece may take minutes."""
MOMENT = 0.5
"""Time for running pieces to end before they are cancelled, in seconds."""
SLICE = 15.0
"""Maximum time for a row while other accounts wait, in seconds."""
_SWEEP = 600.0
"""Interval between calls of :meth:`BackgroundRunner.sweep`, in seconds."""
_log = logging.getLogger("luthier.server")


class BackgroundRunner(ABC, Generic[Work, Done]):
    """Thread that works on rows of a kind, in sequence. Start the runner with the server."""

    kind: type[Work]
    at_once: int = 8
    """Number of concurrent pieces of a row."""

    def __init__(self, database: Database, count: CountUsage) -> None:
        """Create the runner; ``count`` records the usage of accounts by user and model."""
        self.database, self.count = database, count
        self._token = secrets.token_hex(8)
        self.watch = LeaseWatch(self.kind.lease_time.total_seconds())
        """Detects servers that stopped renewing leases."""
        self.renewal = min(self.kind.lease_time.total_seconds() / 3, LOOK)
        """Interval of lease renewal while no piece ends, in seconds."""
        self._wake, self._closed = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    @abstractmethod
    def work(self, row: Work) -> None:
        """Work on the unfinished pieces of ``row``, as far as possible on this server."""

    @abstractmethod
    def record(self, session: Session, row: Work, number: int, done: Done) -> None:
        """Store the result of the piece ``number`` of ``row``."""

    @abstractmethod
    def state(self, row: Work) -> str:
        """Return the current state of ``row``. New pieces start only in the state :attr:`working`."""

    @abstractmethod
    def fail(self, row: Work, code: str, message: str) -> None:
        """End ``row`` without a result; ``code`` is OpenAI's error code."""

    action: str
    """Action that creates the work. The user's role must allow the action until the work ends."""
    working: str
    """The :meth:`state` of a row in progress."""
    gives_up: bool = False
    """True if running pieces are cancelled when the server stops. Otherwise the server waits for
    running pieces. If the row's state changes, running pieces are always cancelled."""

    def sweep(self) -> None:
        """Clean up; called every few minutes."""

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._run, name=self.kind.noun, daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Search for work now."""
        self._wake.set()

    def close(self) -> None:
        """Stop after the running pieces have ended or are cancelled. Any server can do the rest."""
        self._closed.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join()

    def run_once(self) -> bool:
        """Work on the next row; return False if no work exists."""
        row = self._claim()
        if row is None:
            return False
        try:
            self.work(row)
        except QuotaExceeded as error:
            self.fail(row, "insufficient_quota", str(error))
        except Fault as fault:
            code = "permission_denied" if fault.code == "AccessDenied" else "server_error"
            self.fail(row, code, fault.message)
        except (DoesNotFit, SQLAlchemyError):
            # A full disk or unreachable database is temporary: the row keeps its results and waits.
            raise
        except LuthierError as error:
            self.fail(row, "invalid_file", str(error))
        except Exception as error:
            # A retry would fail again and block all later rows.
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
        """Run ``do`` for the numbered pieces in ``left``; return True after the last piece.

        The result is False if another server continues, or if this server continues later, after
        work of other accounts. A large row therefore delays other accounts only for :data:`SLICE`
        seconds.
        """
        pieces, began, yields = iter(left), time.monotonic(), False
        running: dict[Future[Done], tuple[int, CancelScope]] = {}

        def work_on(piece: Piece, scope: CancelScope) -> Done:
            with cancelled_by(scope.register):
                return do(piece)

        with ThreadPoolExecutor(self.at_once, self.kind.noun) as threads:
            state = self._keep(row, {})
            while state is not None:
                continues = state == self.working and not self._closed.is_set()
                if continues and not yields:
                    for number, piece in islice(pieces, self.at_once - len(running)):
                        scope = CancelScope()
                        running[threads.submit(work_on, piece, scope)] = number, scope
                if not running or state != self.working or (self.gives_up and not continues):
                    break
                if not yields and time.monotonic() - began >= SLICE:
                    yields = self._give_way(row)
                ended, _ = wait(running, self.renewal, FIRST_COMPLETED)
                state = self._keep(row, {running.pop(each)[0]: each for each in ended})
            if running and state is not None:
                ended, _ = wait(running, MOMENT)
                state = self._keep(row, {running.pop(each)[0]: each for each in ended})
            for _, scope in running.values():
                scope.close()
        if yields and next(pieces, None) is not None:
            return False
        return state is not None and not self._closed.is_set()

    def lock_held(self, session: Session, row: Work) -> Work | None:
        """Return ``row``, locked until the end of the transaction; ``None`` if this server lost the
        lease."""
        with suppress(LeaseLost):
            return queue.lock_leased(session, self.kind, row.id, self._token)
        return None

    def attempt(
        self,
        row: Work,
        do: Callable[[], Answer],
        count: Callable[[str, int, int], None] | None = None,
    ) -> Answer:
        """Run ``do`` for the account of ``row``, count a request, and meter the tokens.

        ``count`` receives model, prompt tokens and generated tokens of each query.

        Raises:
            Fault: For all errors of ``do``.
        """
        self.count(row.account, row.caller["user"], "", Usage(requests=1))
        count = count or partial(self.count_tokens, row)
        with meter(count), working_for(row.account, background=True):
            try:
                return do()
            except Fault:
                raise
            except Exception as error:
                _log.exception("a piece of %s failed", row.id)
                text = f"The request failed: {type(error).__name__}."
                raise Fault("InternalServer", text) from error

    def caller_of(self, row: Work) -> Caller:
        """Return the user who created ``row``, with the current role.

        Raises:
            Fault: ``AccessDenied`` if the user is disabled or removed, or the role no longer allows
                the work.
        """
        account, user = row.caller["account"], row.caller["user"]
        with self.database.read() as session:
            role = active_role(session, account, user)
        caller = Caller(account, user, () if role is None else (role,))
        if role is None:
            text = f"User: {caller.arn} is disabled or removed."
            raise Fault("AccessDenied", text)
        authorize(caller, self.action, "*")
        return caller

    def count_tokens(self, row: Work, model: str, read: int, written: int) -> None:
        """Record the usage of tokens by the user who created ``row``."""
        used = Usage(prompt_tokens=read, generated_tokens=written)
        self.count(row.account, row.caller["user"], model, used)

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
                # The database is unreachable or the disk is full; the row is retried later.
                _log.exception("a %s could not be worked on", self.kind.noun)
            self._wake.wait(IDLE)
            self._wake.clear()

    def _claim(self) -> Work | None:
        with self.database.write() as session:
            leases = queue.leases(session, self.kind)
            silent = [each for each in leases if self.watch.is_silent(*each)]
            self.watch.forget_except({row_id for row_id, _ in leases})
            return queue.claim_next(session, self.kind, self._token, silent)

    def _give_way(self, row: Work) -> bool:
        """Let waiting rows of other accounts go first; return False if no such rows exist."""
        with suppress(LeaseLost), self.database.write() as session:
            return queue.yield_turn(session, self.kind, row.id, self._token)
        return False

    def _keep(self, row: Work, done: Mapping[int, Future[Done]]) -> str | None:
        """Renew the lease, store the results in ``done``, and return the state of the row.

        Returns None if another server works on the row.
        """
        with self.database.write() as session:
            # Only the holder of the lease stores results, so that no piece is stored twice.
            try:
                locked = queue.renew(session, self.kind, row.id, self._token)
            except LeaseLost:
                return None
            for number, piece in done.items():
                self.record(session, locked, number, piece.result())
            return self.state(locked)


def caller_fields(caller: Caller) -> dict[str, Any]:
    """Return the caller's fields for a row of work. The role is read again before each piece."""
    return {"account": caller.account, "user": caller.user}
