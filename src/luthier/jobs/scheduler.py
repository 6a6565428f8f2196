"""Starts a worker for each job that fits, and notices those that die.

The scheduler keeps nothing that matters in memory: what it has to know is in the database. A server
that is killed leaves its workers at work; the next one finds them by their leases, and starts no
second worker beside a living one.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import psutil
from sqlalchemy import select

from luthier.encryption import keys
from luthier.errors import LeaseLost, LuthierError
from luthier.files import luthier_home, room
from luthier.jobs import processes
from luthier.jobs.admission import memory_of
from luthier.jobs.folders import JobFolders, tidy
from luthier.store import leases
from luthier.store.database import Database
from luthier.store.jobs import ENDED, QUEUED, Job

TICK = 1.0
"""Seconds between two looks at the queue, where nobody asks for one."""
SHARE = 0.9
"""Part of the machine's memory that workers may take together."""
ESTIMATES = 20
"""New jobs that are estimated at one look: those that are started next come first."""
LATER = 10.0
"""Seconds until the next try, where the machine cannot start a process."""
ROOM = 16_000_000
"""Bytes that are free on the disk of the store where a worker is started."""
FULL_LATER = (5.0, 300.0)
"""Seconds until a job that found the disk full is started again: at first, and at most."""
RETURN = 60.0
"""Seconds that workers are given to make a checkpoint when the server ends."""

_SECRETS = (
    "LUTHIER_SERVER_KEY", "LUTHIER_BOOTSTRAP", keys.ENVIRONMENT, keys.FILE, keys.HANDED,
)  # fmt: skip
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Capacity:
    """What workers of this machine may take together."""

    memory: int = field(default_factory=lambda: int(psutil.virtual_memory().total * SHARE))
    """Bytes, by the estimates of their jobs."""
    cores: int = field(default_factory=lambda: os.cpu_count() or 1)
    per_account: int | None = None
    """Jobs of one account at once; ``None`` for no limit."""


class Scheduler:
    """The thread of a server that turns the queue into work."""

    def __init__(
        self,
        database: Database,
        capacity: Capacity | None = None,
        *,
        command: Sequence[str] = (sys.executable, "-m", "luthier", "worker"),
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Prepare; :meth:`start` begins.

        Args:
            database: where the queue is.
            capacity: what workers may take; the machine's when not given.
            command: what starts a worker; ``--job ID --lease TOKEN`` follows.
            options: what every worker is told beside that, such as ``--file-root DIR``.
            environment: variables that workers have beside this process's own.
        """
        self.database, self.capacity = database, capacity or Capacity()
        self.command = [*command, *options]
        self.environment = {**address_of(database), **(environment or {})}
        self.children: dict[str, subprocess.Popen[bytes]] = {}
        """Workers that this scheduler started and has not seen end, by their leases."""
        self._disk = DiskWaits()
        self._watch = Watch(leases.LEASE.total_seconds())
        self._thread: threading.Thread | None = None
        self._wanted = threading.Event()
        self._ending = False
        self._not_before = 0.0
        """When workers may be started again, after one could not."""

    def start(self) -> None:
        """Begin to look at the queue, in a thread."""
        self._thread = threading.Thread(target=self._loop, name="scheduler", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Look at the queue now: something was put into it."""
        self._wanted.set()

    def stop(self, give_back: bool = False) -> None:
        """End the thread. Workers go on, and the next server finds them.

        ``give_back`` makes those of this machine write a checkpoint and give their jobs back to the
        queue first: for where all processes end with the server, as in a container.
        """
        self._ending = True
        self.wake()
        if self._thread is not None:
            self._thread.join()
        if give_back:
            self._give_back()

    def drain(self, seconds: float) -> bool:
        """Wait until no job is queued or worked on; whether that came to be in time."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with self.database.read() as session:
                waiting = select(Job.id).where((Job.state == QUEUED) | Job.lease.is_not(None))
                if session.scalar(waiting.limit(1)) is None:
                    return True
            time.sleep(0.05)
        return False

    def tick(self) -> None:
        """One look: who died, what is left to tidy, what can be started."""
        self._bury()
        self._tidy()
        self._estimate()
        while not self._ending and self._start_next():
            pass

    def _loop(self) -> None:
        while not self._ending:
            try:
                self.tick()
            except Exception:
                # The database or the disk is away: whatever is missed is found at the next look.
                _log.exception("the queue cannot be worked on now")
            self._wanted.wait(TICK)
            self._wanted.clear()

    def _bury(self) -> None:
        """Take the leases of workers that died, and end those that no longer answer."""
        with self.database.read() as session:
            held = leases.held(session)
        ended = {lease: child.poll() for lease, child in self.children.items()}
        for job in held:
            lease, worker = str(job.lease), job.worker or {}
            if ended.get(lease) is not None:
                self._expire(job, f"its worker ended {how_it_ended(ended[lease])}")
            elif worker and processes.is_here(worker) and not processes.is_alive(worker):
                self._expire(job, "its worker is gone")
            elif self._watch.silent(lease, job.lease_ends):
                if worker and not worker.get("starting"):
                    processes.send(worker, signal.SIGKILL)
                self._expire(job, "its worker was not heard from any more")
        self._watch.forget({str(job.lease) for job in held})
        for lease, status in ended.items():
            if status is not None:
                del self.children[lease]
                self._disk.ended(lease, status == processes.NO_DISK)

    def _expire(self, job: Job, why: str) -> None:
        try:
            with self.database.write() as session:
                left = leases.expire(session, job.id, str(job.lease), why)
            _log.warning("job %s: %s; it is %s", job.id, why, left.state)
        except LeaseLost:
            pass  # it gave the lease back meanwhile

    def _tidy(self) -> None:
        """Remove what workers left that died as their jobs ended."""
        with self.database.read() as session:
            left = select(Job).where(Job.littered, Job.state.in_(ENDED), Job.lease.is_(None))
            jobs = list(session.scalars(left))
        for job in jobs:
            folders = JobFolders(job.id)
            with folders.locked() as free:
                if free:
                    tidy(self.database, job, folders)

    def _estimate(self) -> None:
        """Estimate the memory of jobs that are new."""
        with self.database.read() as session:
            new = select(Job).where(Job.state == QUEUED, Job.memory == 0)
            jobs = list(
                session.scalars(new.order_by(Job.priority.desc(), Job.seq).limit(ESTIMATES))
            )
        for job in jobs:
            try:
                memory = memory_of(job.command, job.recipe)
            except Exception as error:
                _log.info("job %s has no estimate: %s", job.id, error)
                memory = 1  # its worker finds the same, and says it to whoever asked
            with self.database.write() as session:
                found = session.get(Job, job.seq, with_for_update=True)
                if found is not None:
                    found.memory = memory

    def _start_next(self) -> bool:
        """Start a worker for the next job that fits; whether there was one."""
        if time.monotonic() < self._not_before:
            return False
        if room(luthier_home()) < ROOM:
            _log.error("the disk of %s is full or read-only: no worker is started", luthier_home())
            self._not_before = time.monotonic() + LATER
            return False
        # Until the worker is there, the server stands for it.
        process = {**processes.this_process(), "starting": True}
        with self.database.write() as session:
            here = [job for job in leases.held(session) if processes.is_here(job.worker or process)]
            job = leases.claim(
                session,
                process,
                self.capacity.memory - sum(job.memory for job in here),
                self.capacity.cores - sum(job.cores for job in here),
                idle=not here,
                per_account=self.capacity.per_account,
                passed_over=self._disk.waiting(),
            )
        if job is None:
            return False
        try:
            self.children[str(job.lease)] = self._spawn(job)
            self._disk.started(str(job.lease), job.id)
        except (OSError, LuthierError) as error:
            _log.error("no worker could be started for job %s: %s", job.id, error)
            self._not_before = time.monotonic() + LATER
            with self.database.write() as session:
                leases.release(session, job.id, str(job.lease), f"No worker could start: {error}")
            return False
        return True

    def _spawn(self, job: Job) -> subprocess.Popen[bytes]:
        with ExitStack() as opened:
            handed, files = opened.enter_context(keys.handed_over())
            if handed:
                # The worker writes the log itself, encrypted.
                log = os.open(os.devnull, os.O_WRONLY)
            else:
                log = JobFolders(job.id).open_log()
            opened.callback(os.close, log)
            return subprocess.Popen(
                [*self.command, "--job", job.id, "--lease", str(job.lease)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=files,
                env={**inherited(), **self.environment, **handed},
                start_new_session=True,
            )

    def _give_back(self) -> None:
        with self.database.read() as session:
            workers = [job.worker for job in leases.held(session) if job.worker]
        here = [worker for worker in workers if processes.is_here(worker)]
        for worker in here:
            processes.send(worker, signal.SIGTERM)
        deadline = time.monotonic() + RETURN
        while time.monotonic() < deadline and any(map(processes.is_alive, here)):
            for child in self.children.values():
                child.poll()
            time.sleep(0.05)


class DiskWaits:
    """Which jobs found no room on the disk, and when each is tried again: later each time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._of_lease: dict[str, str] = {}
        self._waits: dict[str, tuple[float, float]] = {}
        """By job: seconds of its last wait, and when that ends."""

    def started(self, lease: str, job_id: str) -> None:
        """A worker began with this lease."""
        self._of_lease[lease] = job_id

    def ended(self, lease: str, no_disk: bool) -> None:
        """It ended, for want of room or otherwise."""
        job_id = self._of_lease.pop(lease, None)
        if job_id is None:
            return
        before, _ = self._waits.pop(job_id, (0.0, 0.0))
        if no_disk:
            first, most = FULL_LATER
            seconds = min(most, max(first, 2 * before))
            self._waits[job_id] = seconds, self.clock() + seconds

    def waiting(self) -> set[str]:
        """Ids of jobs that are not to be started yet."""
        return {job_id for job_id, (_, until) in self._waits.items() if until > self.clock()}


class Watch:
    """Tells which leases are no longer renewed, by this process's own clock.

    Whether ``lease_ends`` changes is what counts, not what it says: a clock that is set forward makes
    no worker look dead, and one that is set back keeps no dead one alive.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.clock = seconds, clock
        self._seen: dict[str, tuple[object, float]] = {}

    def silent(self, lease: str, ends: object) -> bool:
        """Whether ``ends`` of this lease has been the same for too long."""
        before, since = self._seen.get(lease, (None, 0.0))
        if before != ends:
            self._seen[lease] = (ends, self.clock())
            return False
        return self.clock() - since > self.seconds

    def forget(self, kept: set[str]) -> None:
        """Drop what is known of leases that are no more."""
        self._seen = {lease: seen for lease, seen in self._seen.items() if lease in kept}


def address_of(database: Database) -> dict[str, str]:
    """The database for a worker: not in its command line, which everybody on the machine can read."""
    return {"LUTHIER_DATABASE": database.engine.url.render_as_string(hide_password=False)}


def inherited() -> dict[str, str]:
    """Variables of this process that workers have, too: not those that open the service."""
    return {name: value for name, value in os.environ.items() if name not in _SECRETS}


def how_it_ended(status: int | None) -> str:
    """An exit status in words."""
    if status is not None and status < 0:
        return f"by signal {-status} ({signal.strsignal(-status)})"
    return f"with status {status}"
