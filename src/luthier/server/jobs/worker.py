"""The process that does one piece of leased work, of any kind (``luthier.server.jobs.kinds``).

    lock of the files → lease → the work of the kind → its end, in one transaction

It may be killed anywhere: the next worker goes on. SIGTERM makes it give its work back to the queue.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any, Generic, TypeVar

from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.orm import Session

from luthier.errors import (
    Interrupted,
    LeaseLost,
    LuthierError,
    RefusedInput,
)
from luthier.files import waits_for_disk
from luthier.limits import AccountQuotas
from luthier.server.jobs.admission import Capacity
from luthier.server.jobs.folders import JobFolders
from luthier.server.jobs.processes import LOST, NO_DISK, this_process
from luthier.server.jobs.runners import free
from luthier.server.tables import queue
from luthier.server.tables.arns import Arns
from luthier.server.tables.database import Database
from luthier.server.tables.locations import Locations
from luthier.server.tables.queue import QueuedWork

Work = TypeVar("Work", bound=QueuedWork)
Done = TypeVar("Done")

BEAT = 1.0
"""Seconds between two looks at work that may be stopped."""
AGAIN = 60.0
"""Seconds after which a worker that did not stop is asked again."""
RENEWAL = 5.0
"""Seconds between two renewals of a lease, where nothing else is to be written."""
SILENCE = 20.0
"""A worker that could not renew its lease for so many seconds takes it for lost: sooner than others."""
FILES_FREE = 30.0
"""Seconds that a worker waits for the one before it to be gone."""
TRIES = 5
"""How often reading and writing addresses is tried where that failed in passing."""

_log = logging.getLogger(__name__)


class Heartbeat(threading.Thread):
    """Keeps the lease of a worker, in a thread; when it is lost, the process ends where it stands."""

    def __init__(
        self,
        beat: Callable[[], None],
        seconds: float = RENEWAL,
        ask_again_seconds: float = AGAIN,
    ) -> None:
        """``beat`` renews the lease, or sees that it is still held, each so many ``seconds``."""
        super().__init__(name="heartbeat", daemon=True)
        self._beat, self._seconds = beat, seconds
        self._ask_again_seconds, self._asked = ask_again_seconds, -math.inf
        self._finished = threading.Event()

    def run(self) -> None:
        """Beat until :meth:`finish`."""
        heard = time.monotonic()
        while not self._finished.wait(self._seconds):
            try:
                self._beat()
            except LeaseLost:
                _log.error("the lease is lost; nothing more is written")
                os._exit(LOST)
            except Exception as error:
                # Such as a full disk: this thread must outlive every error.
                _log.warning("the lease could not be renewed: %s", error)
                if time.monotonic() - heard > SILENCE:
                    os._exit(LOST)
            else:
                heard = time.monotonic()

    def ask_to_stop(self) -> None:
        """Interrupt the main thread; where it was asked a moment ago, it is left in peace."""
        if time.monotonic() - self._asked > self._ask_again_seconds:
            self._asked = time.monotonic()
            os.kill(os.getpid(), signal.SIGTERM)

    def finish(self) -> None:
        """Stop beating, before the transaction that gives the lease back: it would look lost."""
        self._finished.set()
        self.join()


class Worker(ABC, Generic[Work]):
    """One worker and the row that it holds. A kind of work says what is done."""

    table: type[Work]
    folders_type: type[JobFolders] = JobFolders
    folders: JobFolders
    """The places of the work on disk."""
    given_back = "The worker gave it back."
    """Why it is in the queue again, where the worker was told to end."""

    def __init__(
        self,
        database: Database,
        locations: Locations,
        row_id: str,
        lease: str,
        *,
        arns: Arns | None = None,
        capacity: Capacity | None = None,
        quotas: AccountQuotas | None = None,
        processes: int = 1,
    ) -> None:
        """Prepare.

        Args:
            database: where the queue is.
            locations: reads and writes what addresses name.
            row_id: of the work.
            lease: token by which it is held.
            arns: those of the server.
            capacity: what all workers of the machine may take together.
            quotas: of accounts without quotas of their own.
            processes: of this machine, among which the work is shared where that can be.
        """
        self.database, self.locations = database, locations
        self.row_id, self.lease = row_id, lease
        self.arns, self.capacity = arns or Arns(), capacity or Capacity()
        self.quotas, self.processes = quotas or AccountQuotas(), processes
        self.folders = self.folders_type(row_id)
        self.ending = False
        """Whether the work is past being interrupted."""

    @abstractmethod
    def work(self, row: Work) -> int:
        """Do it, to its last transaction; the exit status."""

    def remove_ended(self) -> None:
        """Take away what was made here after the work had ended and was tidied."""

    def run(self) -> int:
        """Do the work; the exit status: 0 where it ended or was given back, else what happened.

        Call it from the main thread, whose signals it takes over.
        """
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        try:
            with ExitStack() as files:
                if not self._wait_for_files(files):
                    _log.error("another process still works on the files of %s", self.row_id)
                    return LOST
                try:
                    return self.work(self._begin())
                except LeaseLost:
                    self.remove_ended()
                    raise
        except LeaseLost as error:
            _log.error("%s", error)
            return LOST
        except (Interrupted, KeyboardInterrupt):
            # Before there was anything to give back but the lease.
            with suppress(LeaseLost):
                self.write(lambda session: self.give_back(session, self.given_back))
            return 0
        except Exception as error:
            if not waits_for_disk(error):
                raise
            _log.exception("what %s writes has no place now", self.row_id)
            message = explain_wait(error)
            with suppress(LeaseLost):
                self.write(lambda session: self.give_back(session, message))
            return NO_DISK

    def give_back(self, session: Session, message: str) -> None:
        """Let another worker go on, and say why."""
        queue.release(session, self.table, self.row_id, self.lease, message)

    def _begin(self) -> Work:
        process = this_process(self.processes)

        def begin(session: Session) -> Work:
            row = queue.renew(session, self.table, self.row_id, self.lease)
            row.worker = process
            return row

        return self.write(begin)

    def _wait_for_files(self, files: ExitStack) -> bool:
        """Hold the lock of the work until ``files`` is closed."""
        deadline = time.monotonic() + FILES_FREE
        while time.monotonic() < deadline:
            with ExitStack() as attempt:
                if attempt.enter_context(self.folders.hold()):
                    files.push(attempt.pop_all())
                    return True
            time.sleep(0.2)
        return False

    def write(self, change: Callable[[Session], Done]) -> Done:
        """One transaction, tried again for a while where the database is away."""
        deadline = time.monotonic() + SILENCE
        while True:
            try:
                with self.database.write() as session:
                    return change(session)
            except (OperationalError, InterfaceError) as error:
                if time.monotonic() > deadline:
                    raise
                _log.warning("the database does not answer: %s", error)
                time.sleep(1)

    def reserve_memory(self, size: int) -> None:
        """Let the work count ``size`` bytes among all work of this machine.

        Raises:
            Interrupted: where others have them: the work is started again when it fits.
        """
        with self.database.write() as session:
            left = free(session, self.capacity, but=self.row_id)
            queue.hold(session, self.table, self.row_id, self.lease).memory = size
        if not (left.idle or size <= left.memory):
            raise Interrupted(f"{size >> 20:,} MiB are not free; the work waits for them")

    def retry(self, action: Callable[[], Done]) -> Done:
        """``action``, tried again where it failed for a reason that may pass."""
        for number in range(1, TRIES + 1):
            try:
                return action()
            except (RefusedInput, Interrupted, LeaseLost):
                raise
            except (LuthierError, OSError) as error:
                if number == TRIES:
                    raise
                _log.warning("trying again: %s", error)
                time.sleep(0.2 * 2**number)
        raise AssertionError

    def _on_signal(self, number: int, frame: Any) -> None:
        # A training loop has a handler of its own between steps, which makes a checkpoint first.
        if not self.ending:
            raise Interrupted("stopped before the next step")


def explain_wait(error: Exception) -> str:
    """Why work is back in the queue, and what lets it go on."""
    return (
        f"The server's disk cannot take what the job writes ({str(error).rstrip('.')}). "
        "The job goes on from its last checkpoint when it can."
    )
