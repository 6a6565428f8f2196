"""Starts a process for each piece of work that fits, and notices those that die.

A scheduler keeps nothing that matters in memory: what it has to know is in the database. A server that
is killed leaves its workers at work; the next one finds them by their leases, and starts no second one
beside a living one.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from sqlalchemy.orm import Session

from luthier.child_python import python_command
from luthier.errors import LeaseLost, LuthierError
from luthier.escaping import format_exit
from luthier.files import luthier_home, room
from luthier.server.jobs import processes
from luthier.server.jobs.admission import Capacity
from luthier.server.jobs.folders import DEATH_TAIL, JobFolders
from luthier.server.jobs.kinds import WORK_KINDS, WorkKind
from luthier.server.jobs.runners import LocalRunner, Runner
from luthier.server.tables import queue
from luthier.server.tables.database import Database, now
from luthier.server.tables.queue import LEASE, LeaseWatch, QueuedWork

TICK = 1.0
"""Seconds between two looks at what waits, where nobody asks for one."""
RETURN = 60.0
"""Seconds that workers are given to come to an end when the server ends."""
LATER = 10.0
"""Seconds until the next try, where the machine cannot start a process."""
ROOM = 16_000_000
"""Bytes that are free on the disk of the store where a worker is started."""
FULL_LATER = (5.0, 300.0)
"""Seconds until work that found the disk full is started again: at first, and at most."""

_log = logging.getLogger(__name__)


class Scheduler:
    """The thread of a server that turns the queue into work, each by a process that holds its lease."""

    def __init__(
        self,
        database: Database,
        capacity: Capacity | None = None,
        *,
        kinds: Sequence[WorkKind] = tuple(WORK_KINDS.values()),
        command: Sequence[str] = tuple(python_command("luthier", "worker")),
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        runner: Runner | None = None,
        shared_by: int = 1,
    ) -> None:
        """Prepare; :meth:`start` begins.

        Args:
            database: where the queue is.
            capacity: what workers may take; the machine's when not given.
            kinds: of work that is done here, first come first.
            command: what starts a worker; ``--kind NAME --id ID --lease TOKEN`` follows.
            options: what every worker is told beside that, such as ``--region NAME``.
            environment: variables that workers have beside this process's own.
            runner: where work runs of the kinds that may run elsewhere; on this machine when not given.
            shared_by: among how many processes work is shared, of the kinds where it can be.
        """
        self.database, self.kinds = database, kinds
        self._local = LocalRunner()
        self._runner = runner or self._local
        self.capacity, self.shared_by = capacity or Capacity(), shared_by
        self.command = [*command, *options]
        self.environment = {**processes.database_environment(database), **(environment or {})}
        self.children: dict[str, subprocess.Popen[bytes]] = {}
        """Workers that were started here and not seen to end, by their leases."""
        self._began: dict[str, float] = {}
        """When these workers were started, by their leases."""
        self.watch = LeaseWatch(LEASE.total_seconds())
        self._waits = RoomWaits()
        self._not_before: dict[Runner, float] = {}
        """When workers may be started again, after one could not."""
        self._thread: threading.Thread | None = None
        self._wanted = threading.Event()
        self._ending = False

    def start(self) -> None:
        """Begin to look at what waits, in a thread."""
        self._thread = threading.Thread(target=self._loop, name="scheduler", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Look now: something was asked for."""
        self._wanted.set()

    def stop(self, give_back: bool = False) -> None:
        """End the thread. Workers go on, and the next server finds them.

        ``give_back`` makes those of this machine give back what they hold first, training at a
        checkpoint: for where all processes end with the server, as in a container.
        """
        self._ending = True
        self.wake()
        if self._thread is not None:
            self._thread.join()
        if not give_back:
            return
        with self.database.read() as session:
            held = [(str(row.lease), row.worker) for row in self._leased_rows(session)]
        here, drivers = [], []
        for lease, worker in held:
            if worker and processes.is_here(worker):
                processes.send(worker, signal.SIGTERM)
                here.append(worker)
            elif lease in self.children:  # which stands for a worker on another machine
                self.children[lease].terminate()
                drivers.append(self.children[lease])
        deadline = time.monotonic() + RETURN
        while time.monotonic() < deadline:
            ended = [child.poll() is not None for child in drivers]
            for child in self.children.values():
                child.poll()
            if all(ended) and not any(map(processes.is_alive, here)):
                break
            time.sleep(0.05)

    def _loop(self) -> None:
        while not self._ending:
            try:
                self.tick()
            except Exception:
                # The database or the disk is away: whatever is missed is found at the next look.
                _log.exception("nothing can be scheduled now")
            self._wanted.wait(TICK)
            self._wanted.clear()

    def tick(self) -> None:
        """One look: who died, what is left to tidy, what can be started."""
        self.expire_dead()
        for kind in self.kinds:
            try:
                kind.prepare(self.database)
            except Exception:
                # What is wrong with one kind of work keeps no other from going on.
                _log.exception("%s cannot be prepared now", kind.name)
            while not self._ending and self._start_next(kind):
                pass

    def _leased_rows(self, session: Session) -> list[QueuedWork]:
        return [row for kind in self.kinds for row in queue.leased_rows(session, kind.table)]

    def expire_dead(self) -> None:
        """Take the leases of workers that died, and end those that no longer answer."""
        with self.database.read() as session:
            held = self._leased_rows(session)
        ended = {lease: child.poll() for lease, child in self.children.items()}
        folders = {kind.table: kind.folders for kind in self.kinds}
        for row in held:
            lease, worker = str(row.lease), row.worker or {}
            if ended.get(lease) is not None:
                why = f"its worker ended {format_exit(ended[lease])}"
            elif worker.get("starting") and self._renew_start(row, lease):
                continue
            elif (
                lease not in self.children  # the status of a child says more, at the next look
                and worker
                and processes.is_here(worker)
                and not processes.is_alive(worker)
            ):
                why = "its worker is gone"
            elif self.watch.silent(lease, row.lease_ends):
                if worker and not worker.get("starting"):
                    processes.send(worker, signal.SIGKILL)
                    if not processes.is_here(worker) and lease in self.children:
                        self.children[lease].kill()  # and what it stands for on another machine
                why = "its worker was not heard from any more"
            else:
                continue
            cause = _cause_of_death(ended.get(lease), row, folders[type(row)](row.id))
            try:
                with self.database.write() as session:
                    text = queue.expire(session, type(row), row.id, lease, why, cause)
                _log.warning("%s %s: %s; %s", row.noun, row.id, why, text)
            except LeaseLost:
                pass  # it gave the lease back meanwhile
        self.watch.forget_others({str(row.lease) for row in held})
        for lease, status in ended.items():
            if status is not None:
                del self.children[lease]
                self._began.pop(lease, None)
                self._waits.end(lease, status in processes.NO_ROOM)

    def _renew_start(self, row: QueuedWork, lease: str) -> bool:
        """Renew the lease of a worker of this server that still starts.

        Returns False for workers of other servers, and after :data:`BEGIN_SECONDS`.
        """
        began = self._began.get(lease)
        if began is None or time.monotonic() - began > processes.BEGIN_SECONDS:
            return False
        if row.lease_ends is not None and row.lease_ends - now() < LEASE / 2:
            with suppress(LeaseLost), self.database.write() as session:
                queue.renew(session, type(row), row.id, lease)
        return True

    def _start_next(self, kind: WorkKind) -> bool:
        """Start a worker for the next work of a kind that fits; whether there was one."""
        runner = self._runner_of(kind)
        if time.monotonic() < self._not_before.get(runner, 0.0):
            return False
        if room(luthier_home()) < ROOM:
            _log.error("the disk of %s is full or read-only: no worker is started", luthier_home())
            self._not_before[runner] = time.monotonic() + LATER
            return False
        try:
            runner.refresh()
        except LuthierError as error:
            _log.error("no worker is started for %s: %s", kind.name, error)
            self._not_before[runner] = time.monotonic() + LATER
            return False
        row = self._claim_next(kind, runner)
        if row is None:
            return False
        lease = str(row.lease)
        try:
            self.children[lease] = self._spawn(kind, row, lease, runner)
            self._began[lease] = time.monotonic()
            self._waits.begin(lease, row.id)
        except (OSError, LuthierError) as error:
            _log.error("no worker could be started for %s %s: %s", kind.name, row.id, error)
            self._not_before[runner] = time.monotonic() + LATER
            with self.database.write() as session:
                queue.release(session, kind.table, row.id, lease, f"No worker could start: {error}")
            return False
        return True

    def _processes_of(self, kind: WorkKind) -> int:
        return self.shared_by if kind.shared else 1

    def _runner_of(self, kind: WorkKind) -> Runner:
        return self._runner if kind.elsewhere else self._local

    def _claim_next(self, kind: WorkKind, runner: Runner) -> QueuedWork | None:
        """The next work of a kind that fits, held by a lease of its own; ``None`` where none does."""
        # Until the worker is there, the server stands for it.
        process = {**processes.this_process(self._processes_of(kind)), "starting": True}
        with self.database.write() as session:
            for left in runner.free(session, self.capacity):
                if kind.at_once is not None and left.at_work[kind.table] >= kind.at_once:
                    continue
                row = queue.claim(
                    session,
                    kind.table,
                    process,
                    left.memory,
                    left.cores,
                    idle=left.idle,
                    passed_over=self._waits.backed_off(),
                )
                if row is not None:
                    return row
        return None

    def _spawn(
        self, kind: WorkKind, row: QueuedWork, lease: str, runner: Runner
    ) -> subprocess.Popen[bytes]:
        folders: JobFolders = kind.folders(row.id)
        log = folders.open_log()
        try:
            work = ["--kind", kind.name, "--id", row.id, "--lease", lease]
            if (among := self._processes_of(kind)) > 1:
                work += ["--processes", str(among)]
            return subprocess.Popen(
                runner.command([*self.command, *work], kind, row),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**processes.worker_environment(), **self.environment},
                start_new_session=True,
            )
        finally:
            os.close(log)


def _cause_of_death(status: int | None, row: QueuedWork, folders: JobFolders) -> str:
    """Return what the exit status and the log of a worker that died tell of the reason."""
    found = []
    if status == -signal.SIGKILL:
        found.append(f"If memory was short and the system ended the worker, {row.memory_advice}")
    if lines := folders.log_tail(DEATH_TAIL):
        found.append("\n".join(["The log ends with:", *lines]))
    return " ".join(found)


class RoomWaits:
    """Work that found no room, on disk or in a cluster, and when it is tried next: later each time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._of_lease: dict[str, str] = {}
        self._waits: dict[str, tuple[float, float]] = {}
        """By id: seconds of its last wait, and when that ends."""

    def begin(self, lease: str, row_id: str) -> None:
        """A worker began with this lease."""
        self._of_lease[lease] = row_id

    def end(self, lease: str, no_room: bool) -> None:
        """It ended, for want of room or otherwise."""
        row_id = self._of_lease.pop(lease, None)
        if row_id is None:
            return
        before, _ = self._waits.pop(row_id, (0.0, 0.0))
        if no_room:
            first, most = FULL_LATER
            seconds = min(most, max(first, 2 * before))
            self._waits[row_id] = seconds, self.clock() + seconds

    def backed_off(self) -> set[str]:
        """Ids of work that is not to be started yet."""
        return {row_id for row_id, (_, until) in self._waits.items() if until > self.clock()}
