"""Scheduler of worker processes: starts work within the free capacity and detects dead workers.

All state is in the database. The workers of a killed server continue, and the next server finds the
workers by their leases.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

from sqlalchemy.orm import Session

from luthier.errors import LeaseLost, LuthierError
from luthier.files import free_bytes, luthier_home
from luthier.processes import format_exit, python_command
from luthier.server.jobs import processes
from luthier.server.jobs.admission import Capacity
from luthier.server.jobs.folders import DEATH_TAIL, JobFolders
from luthier.server.jobs.forecast import QueuePlace, queue_places
from luthier.server.jobs.kinds import WORK_KINDS, WorkKind
from luthier.server.jobs.runners import Runner
from luthier.server.tables import queue
from luthier.server.tables.database import Database, now
from luthier.server.tables.queue import LEASE, LeaseWatch, QueuedWork

TICK = 1.0
"""Interval between two scheduling rounds, in seconds."""
RETURN = 60.0
"""Time limit for the end of workers when the server ends, in seconds."""
LATER = 10.0
"""Time until a runner starts workers again after a start failed or the disk was full, in seconds."""
ROOM = 16_000_000
"""Required disk space for the start of a worker, in bytes."""

_log = logging.getLogger(__name__)


class Scheduler:
    """Server thread that starts a worker process for each queued work."""

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
        """Prepare the scheduler; :meth:`start` starts the thread.

        Args:
            database: database of the queue.
            capacity: resources for workers; by default the resources of the machine.
            kinds: kinds of work, by falling priority.
            command: command of a worker, extended by ``--kind NAME --id ID --lease TOKEN``.
            options: additional options of each worker, such as ``--region NAME``.
            environment: additional environment variables of workers.
            runner: runner of kinds that support other machines; by default this machine.
            shared_by: number of processes per work, for kinds that support several processes.
        """
        self.database, self.kinds = database, kinds
        self._local = Runner()
        self._runner = runner or self._local
        self.capacity, self.shared_by = capacity or Capacity(), shared_by
        self.command = [*command, *options]
        self.environment = {**processes.database_environment(database), **(environment or {})}
        self.children: dict[str, subprocess.Popen[bytes]] = {}
        self._starts: dict[str, tuple[float, Runner]] = {}
        """Start time and runner of each running worker by lease."""
        self.watch = LeaseWatch(LEASE.total_seconds())
        self._not_before: dict[Runner, float] = {}
        """Earliest time of the next worker start, by runner."""
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()
        self._ending = False

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._loop, name="scheduler", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Start a scheduling round now."""
        self._wake.set()

    def stop(self, release_work: bool = False) -> None:
        """End the thread. Workers continue unless ``release_work`` is set.

        With ``release_work``, workers write a checkpoint and give their work back, for servers whose
        processes all end together, as in a container.
        """
        self._ending = True
        self.wake()
        if self._thread is not None:
            self._thread.join()
        if not release_work:
            return
        with self.database.read() as session:
            held = [(str(row.lease), row.worker) for row in self._leased_rows(session)]
        here, drivers = [], []
        for lease, worker in held:
            if worker and processes.is_here(worker):
                processes.send(worker, signal.SIGTERM)
                here.append(worker)
            elif lease in self.children:  # the child stands for a worker on another machine
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

    def count_local_workers(self) -> int:
        """Return the number of workers on this machine, which continue after :meth:`stop`."""
        with self.database.read() as session:
            workers = [row.worker for row in self._leased_rows(session)]
        return sum(worker is not None and processes.is_here(worker) for worker in workers)

    def queue_places(self, session: Session) -> dict[str, QueuePlace]:
        """Return positions and expected starts of waiting jobs, by id."""
        # Subclasses run jobs on other machines.
        capacity = self.capacity if type(self._runner) is Runner else None
        return queue_places(session, capacity, self.shared_by)

    def _loop(self) -> None:
        while not self._ending:
            try:
                self.tick()
            except Exception:
                # The database or the disk is unavailable: the next round sees the same rows.
                _log.exception("the scheduling round failed")
            self._wake.wait(TICK)
            self._wake.clear()

    def tick(self) -> None:
        """Run a scheduling round: expire dead workers, prepare the queue, start workers."""
        self.expire_dead()
        for kind in self.kinds:
            try:
                kind.prepare(self.database)
            except Exception:
                # An error in one kind of work must not stop the other kinds.
                _log.exception("%s cannot be prepared", kind.name)
            while not self._ending and self._start_next(kind):
                pass

    def _leased_rows(self, session: Session) -> list[QueuedWork]:
        return [row for kind in self.kinds for row in queue.leased_rows(session, kind.table)]

    def expire_dead(self) -> None:
        """Expire the leases of dead workers, and kill silent workers."""
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
                lease not in self.children  # for a child, the next round knows the exit status
                and worker
                and processes.is_here(worker)
                and not processes.is_alive(worker)
            ):
                why = "its worker does not run any more"
            elif self.watch.is_silent(lease, row.lease_ends):
                if worker and not worker.get("starting"):
                    # A hung worker would keep its file lock, which the next worker needs.
                    processes.send(worker, signal.SIGKILL)
                    if not processes.is_here(worker) and lease in self.children:
                        self.children[lease].kill()  # also ends the worker on another machine
                why = "its worker did not renew the lease"
            else:
                continue
            cause = _cause_of_death(ended.get(lease), row, folders[type(row)](row.id))
            with suppress(LeaseLost):  # the worker released the lease meanwhile
                with self.database.write() as session:
                    text = queue.expire(session, type(row), row.id, lease, why, cause)
                _log.warning("%s %s: %s; %s", row.noun, row.id, why, text)
        self.watch.forget_except({str(row.lease) for row in held})
        for lease, status in ended.items():
            if status is not None:
                del self.children[lease]
                _, runner = self._starts.pop(lease)
                if status in processes.NO_ROOM:
                    self._not_before[runner] = time.monotonic() + LATER

    def _renew_start(self, row: QueuedWork, lease: str) -> bool:
        """Renew the lease of a starting worker of this server.

        Returns False for workers of other servers, and after :data:`BEGIN_SECONDS`.
        """
        began, _ = self._starts.get(lease, (-math.inf, None))
        if time.monotonic() - began > processes.BEGIN_SECONDS:
            return False
        if row.lease_ends is not None and row.lease_ends - now() < LEASE / 2:
            with suppress(LeaseLost), self.database.write() as session:
                queue.renew(session, type(row), row.id, lease)
        return True

    def _start_next(self, kind: WorkKind) -> bool:
        """Start a worker for the next suitable work of ``kind``. Returns False if no work starts."""
        runner = self._runner if kind.distributed else self._local
        if time.monotonic() < self._not_before.get(runner, 0.0):
            return False
        row = None
        try:
            if free_bytes(luthier_home()) < ROOM:
                raise LuthierError(f"the disk of {luthier_home()} is full or read-only")
            # Before the transaction of the claim: other machines may take seconds to answer.
            runner.refresh()
            row = self._claim_next(kind, runner)
            if row is None:
                return False
            self._spawn(kind, row, runner)
        except (OSError, LuthierError) as error:
            _log.error("no worker is started for %s: %s", kind.name, error)
            self._not_before[runner] = time.monotonic() + LATER
            if row is not None:
                message = f"No worker could start: {error}"
                with self.database.write() as session:
                    # Released, not expired: a failed start does not count as a death of the worker.
                    queue.release(session, kind.table, row.id, str(row.lease), message)
            return False
        return True

    def _claim_next(self, kind: WorkKind, runner: Runner) -> QueuedWork | None:
        """Lease the next suitable work of ``kind``. Returns ``None`` if no work fits."""
        # The server owns the lease until the worker has started.
        among = self.shared_by if kind.distributed else 1
        process = {**processes.this_process(among), "starting": True}
        with self.database.write() as session:
            for left in runner.free(session, self.capacity):
                if kind.max_running is not None and left.at_work[kind.table] >= kind.max_running:
                    continue
                row = queue.claim(
                    session, kind.table, process, left.memory, left.cores, idle=left.idle
                )
                if row is not None:
                    return row
        return None

    def _spawn(self, kind: WorkKind, row: QueuedWork, runner: Runner) -> None:
        lease = str(row.lease)
        log = kind.folders(row.id).open_log()
        try:
            work = ["--kind", kind.name, "--id", row.id, "--lease", lease]
            if row.processes > 1:
                work += ["--processes", str(row.processes)]
            self.children[lease] = subprocess.Popen(
                runner.command([*self.command, *work], kind, row),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**processes.worker_environment(), **self.environment},
                # In its own session, a worker survives Ctrl+C in the server's terminal.
                start_new_session=True,
            )
            self._starts[lease] = time.monotonic(), runner
        finally:
            os.close(log)


def _cause_of_death(status: int | None, row: QueuedWork, folders: JobFolders) -> str:
    """Return the cause of a worker's death from the exit status and the log."""
    found = []
    if status == -signal.SIGKILL:
        found.append(
            f"If the system killed the worker because memory was short, {row.memory_advice}"
        )
    if lines := folders.log_tail(DEATH_TAIL):
        found.append("\n".join(["The log ends with:", *lines]))
    return " ".join(found)
