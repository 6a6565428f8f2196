"""Process of a leased work of any kind (:mod:`luthier.server.jobs.kinds`).

    lock of the files → lease → work → end, in one transaction

A worker may be killed anywhere: the next worker continues. After SIGTERM, a worker releases its
work.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any, Generic, TypeVar

from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.orm import Session

from luthier.errors import (
    Interrupted,
    LeaseLost,
    LuthierError,
    QuotaExceeded,
    RefusedInput,
    is_out_of_memory,
)
from luthier.files import is_disk_error, luthier_home
from luthier.limits import AccountQuotas
from luthier.server.jobs.admission import Capacity
from luthier.server.jobs.folders import JobFolders
from luthier.server.jobs.processes import LOST, NO_SPACE, this_process
from luthier.server.jobs.runners import free
from luthier.server.stores.locations import Locations
from luthier.server.tables import queue, results
from luthier.server.tables.arns import Arns
from luthier.server.tables.database import Database
from luthier.server.tables.jobs import STOPPING
from luthier.server.tables.queue import QueuedWork
from luthier.server.tables.results import ResultWork

Work = TypeVar("Work", bound=QueuedWork)
Ended = TypeVar("Ended", bound=ResultWork)
Done = TypeVar("Done")

BEAT = 1.0
"""Interval between two checks whether the work was stopped, in seconds."""
AGAIN = 60.0
"""Time until a second signal to a worker, in seconds."""
RENEWAL = 5.0
"""Interval between two renewals of a lease, in seconds."""
SILENCE = 20.0
"""Time without a renewal after which a worker ends, in seconds. Shorter than a lease."""
FILES_FREE = 30.0
"""Time limit for the end of the previous worker, in seconds."""
TRIES = 5
"""Number of attempts to read or write an address."""
NO_DISK = (
    "The server's disk is full or read-only. The job resumes from its last checkpoint when the disk "
    "is writable."
)
"""Message of work that waits for disk space."""
NO_MEMORY = "its worker found too little free memory"
"""Cause of a death in the events of the work."""

_log = logging.getLogger(__name__)


class Heartbeat(threading.Thread):
    """Thread that renews the lease of a worker. A lost lease ends the process at once."""

    def __init__(
        self,
        beat: Callable[[], None],
        seconds: float = RENEWAL,
        repeat_seconds: float = AGAIN,
    ) -> None:
        """Call ``beat``, which renews or checks the lease, at an interval of ``seconds``."""
        super().__init__(name="heartbeat", daemon=True)
        self._beat, self._seconds = beat, seconds
        self._repeat_seconds, self._asked = repeat_seconds, -math.inf
        self._finished = threading.Event()

    def run(self) -> None:
        """Call ``beat`` until :meth:`finish`."""
        heard = time.monotonic()
        while not self._finished.wait(self._seconds):
            try:
                self._beat()
            except LeaseLost:
                _log.error("the lease is lost: the worker ends")
                # sys.exit would end only this thread, and the main thread would go on writing.
                os._exit(LOST)
            except Exception as error:
                # This thread must survive every error, such as a full disk.
                _log.warning("the lease could not be renewed: %s", error)
                if time.monotonic() - heard > SILENCE:
                    os._exit(LOST)
            else:
                heard = time.monotonic()

    def interrupt(self) -> None:
        """Interrupt the main thread, at most once per ``repeat_seconds``."""
        if time.monotonic() - self._asked > self._repeat_seconds:
            self._asked = time.monotonic()
            # Python runs signal handlers in the main thread, where training writes a checkpoint.
            os.kill(os.getpid(), signal.SIGTERM)

    def finish(self) -> None:
        """Stop the thread, before the transaction that releases the lease."""
        # After that transaction, a beat would find no lease and end the process.
        self._finished.set()
        self.join()


class Worker(ABC, Generic[Work]):
    """Base class of workers, with the lease of one row."""

    table: type[Work]
    folders_type: type[JobFolders] = JobFolders
    folders: JobFolders
    """Folders of the work."""
    release_message = "The worker released the work."
    """Message of work that was released after a signal."""

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
            database: database of the queue.
            locations: data by address.
            row_id: id of the work.
            lease: token of the lease.
            arns: ARNs of the server.
            capacity: resources for all workers of the machine.
            quotas: quotas of accounts without own quotas.
            processes: number of processes that share the work.
        """
        self.database, self.locations = database, locations
        self.row_id, self.lease = row_id, lease
        self.arns, self.capacity = arns or Arns(), capacity or Capacity()
        self.quotas, self.processes = quotas or AccountQuotas(), processes
        self.folders = self.folders_type(row_id)
        self.ending = False
        """Flag that disables interruptions during the last transaction."""

    @abstractmethod
    def work(self, row: Work) -> int:
        """Run the work including its last transaction. Returns the exit status."""

    def remove_ended(self) -> None:
        """Remove files that this worker created after the work had ended."""

    def run(self) -> int:
        """Do the work in the main thread and return the exit status: 0 for an end or a return."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        try:
            with ExitStack() as files:
                # The lock comes before the lease: a silent worker may still write to the files.
                if not self._wait_for_files(files):
                    _log.error("another process still uses the files of %s", self.row_id)
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
            # Training has not begun, and other work starts again: only the lease must be released.
            with suppress(LeaseLost):
                self.write(lambda session: self.release(session, self.release_message))
            return 0
        except Exception as error:
            if not is_shortage(error):
                raise
            _log.exception("no memory or disk space for %s", self.row_id)
            with suppress(LeaseLost):
                self.write(partial(self.give_back, error=error))
            return NO_SPACE

    def release(self, session: Session, message: str) -> None:
        """Give the work back with a reason."""
        queue.release(session, self.table, self.row_id, self.lease, message)

    def give_back(self, session: Session, error: Exception) -> None:
        """Give the work back until memory or disk space is free.

        A shortage of memory counts as a death of the worker: work that never fits fails.
        """
        if is_out_of_memory(error):
            advice = f"If memory stays short, {self.table.memory_advice}"
            queue.expire(session, self.table, self.row_id, self.lease, NO_MEMORY, advice)
        else:
            _log.warning("the work waits for disk space: %s", error)
            self.release(session, NO_DISK)

    def _begin(self) -> Work:
        process = this_process(self.processes)

        def begin(session: Session) -> Work:
            row = queue.renew(session, self.table, self.row_id, self.lease)
            row.worker = process
            return row

        return self.write(begin)

    def _wait_for_files(self, files: ExitStack) -> bool:
        """Acquire the lock of the work until ``files`` is closed."""
        deadline = time.monotonic() + FILES_FREE
        while time.monotonic() < deadline:
            with ExitStack() as attempt:
                if attempt.enter_context(self.folders.lock()):
                    files.push(attempt.pop_all())
                    return True
            time.sleep(0.2)
        return False

    def write(self, change: Callable[[Session], Done]) -> Done:
        """Run one transaction, and repeat the transaction while the database is unavailable."""
        # Later, the lease expires, and another worker owns the work.
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
        """Reserve ``size`` bytes of this machine for the work.

        Raises:
            Interrupted: if other work has the memory: the work starts again when it fits.
        """
        with self.database.write() as session:
            left = free(session, self.capacity, ignored=self.row_id)
            # Stored in either case: the scheduler then starts the work only when the size fits.
            queue.lock_leased(session, self.table, self.row_id, self.lease).memory = size
        if not (left.idle or size <= left.memory):
            raise Interrupted(f"{size >> 20:,} MiB are not free; the work waits")

    def retry(self, action: Callable[[], Done]) -> Done:
        """Run ``action``, and repeat after failures that may be temporary."""
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
        # During training the loop has its own handler, which writes a checkpoint first.
        if not self.ending:
            raise Interrupted("stopped before the next step")


def is_shortage(error: Exception) -> bool:
    """Return whether work failed only because memory or disk space is short now."""
    return is_disk_error(error) or is_out_of_memory(error)


class ResultWorker(Worker[Ended]):
    """Base class of workers of :class:`luthier.server.tables.results.ResultWork`.

    The worker may be killed anywhere: the next worker starts again.
    """

    progress: dict[str, Any] | None = None
    """Written by the main thread, stored by the heartbeat."""
    _ends = math.inf
    """Time at which the worker gives up, by the monotonic clock."""

    @abstractmethod
    def produce(self, row: Ended) -> Any:
        """Do the work and return the result."""

    def time_limit(self, row: Ended) -> float:
        """Return the time limit of the work in seconds."""
        return math.inf

    def explain(self, error: Exception, row: Ended) -> str:
        """Return the failure for the owner, without paths and names of the server."""
        return explain_error(error, {})

    def finish(self, session: Session, end: Any) -> None:
        """End the row with a result, or with a failure (text)."""
        results.finish(session, self.table, self.row_id, self.lease, end)

    def work(self, row: Ended) -> int:
        """Produce the result and end the row."""
        self._renewed = time.monotonic()
        limit = self.time_limit(row)
        self._ends = self._renewed + limit
        self.heartbeat = Heartbeat(self.beat, BEAT)
        self.heartbeat.start()
        try:
            shutil.rmtree(self.folders.data, ignore_errors=True)  # files of a killed worker
            end: Any = self.produce(row)
        except (Interrupted, KeyboardInterrupt, LeaseLost, OperationalError):
            # Not failures of the work: another worker starts again, or the work was stopped.
            if time.monotonic() < self._ends:
                raise
            end = (
                f"The time limit of {limit:,.0f} seconds was reached. Use fewer rows, or set a higher "
                "`time_limit`."
            )
        except Exception as error:
            if is_shortage(error):
                raise
            _log.exception("%s %s failed", row.noun, self.row_id)
            end = self.explain(error, row)
        finally:
            self.ending = True
            self.heartbeat.finish()
        # The row ends first. If the worker dies now, the scheduler removes the files of ended work.
        try:
            self.write(lambda session: self.finish(session, end))
        except QuotaExceeded as error:
            failure = self.explain(error, row)
            self.write(lambda session: self.finish(session, failure))
        self.folders.remove_working_files()
        self.folders.log.unlink(missing_ok=True)
        return 0

    def beat(self) -> None:
        """Renew the lease, store the progress, and interrupt stopped or late work."""
        progress = self.progress
        # Most beats only read, because SQLite allows one writer at a time.
        with self.database.read() as session:
            row = queue.read_leased(session, self.table, self.row_id, self.lease)
            state, written = row.state, row.progress
        if progress != written or time.monotonic() - self._renewed > RENEWAL:
            with self.database.write() as session:
                row = results.renew(session, self.table, self.row_id, self.lease, progress)
                state = row.state
            self._renewed = time.monotonic()
        if (state == STOPPING or time.monotonic() > self._ends) and not self.ending:
            self.heartbeat.interrupt()

    def show(self, phase: str, done: int, total: int) -> None:
        """Show the progress to clients."""
        self.progress = {"phase": phase, "done": done, "total": total}


def explain_error(error: Exception, names: Mapping[str, str]) -> str:
    """Return the text of an error with ``names`` and without the path of LUTHIER_HOME."""
    text = str(error) if isinstance(error, LuthierError) else f"{type(error).__name__}: {error}"
    return rename(text, {**names, f"{luthier_home()}/": ""})


def rename(text: str, names: Mapping[str, str]) -> str:
    """Replace each of ``names`` by its value, in order."""
    for name, shown in names.items():
        text = text.replace(name, shown)
    return text
