"""Starts a worker for each job that fits, and notices those that die (``luthier.jobs.supervisor``)."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from luthier.errors import LuthierError
from luthier.files import luthier_home, room
from luthier.jobs import processes
from luthier.jobs.admission import Capacity, free, memory_of
from luthier.jobs.folders import JobFolders, tidy
from luthier.jobs.supervisor import Supervisor
from luthier.store import imports, leases
from luthier.store.database import Database
from luthier.store.jobs import ENDED, QUEUED, Job

ESTIMATES = 20
"""New jobs that are estimated at one look: those that are started next come first."""
LATER = 10.0
"""Seconds until the next try, where the machine cannot start a process."""
ROOM = 16_000_000
"""Bytes that are free on the disk of the store where a worker is started."""
FULL_LATER = (5.0, 300.0)
"""Seconds until a job that found the disk full is started again: at first, and at most."""

_log = logging.getLogger(__name__)


class Scheduler(Supervisor[Job]):
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
        super().__init__(database, [*command, *options], "scheduler")
        self.capacity = capacity or Capacity()
        self.environment |= environment or {}
        self._disk = DiskWaits()
        self._not_before = 0.0
        """When workers may be started again, after one could not."""

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

    def _held(self, session: Session) -> list[Job]:
        return leases.held(session)

    def _lapse(self, session: Session, found: Job, why: str) -> str:
        left = leases.expire(session, found.id, str(found.lease), why)
        return f"job {found.id}: {why}; it is {left.state}"

    def _ended(self, lease: str, status: int) -> None:
        self._disk.ended(lease, status == processes.NO_DISK)

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
                session.scalars(
                    new.order_by(Job.priority.desc(), Job.turn, Job.seq).limit(ESTIMATES)
                )
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
            left = free(session, self.capacity)
            job = leases.claim(
                session,
                process,
                left.memory,
                left.cores,
                idle=left.idle,
                per_account=self.capacity.per_account,
                passed_over=self._disk.waiting(),
                # With one at work here, the next import waits for its turn, and not for memory.
                before=None if left.imports else imports.overdue(session),
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
        return self._run(["--job", job.id, "--lease", str(job.lease)], JobFolders(job.id))


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
