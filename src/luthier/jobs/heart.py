"""The thread of a worker that speaks to the database: it keeps the lease, and hears what is wanted."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable

from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from luthier.errors import LeaseLost
from luthier.jobs.folders import JobFolders
from luthier.jobs.journal import Journal, Pending
from luthier.store.database import Database
from luthier.store.jobs import PAUSED, RUNNING, STOPPING, Job
from luthier.store.leases import renew

BEAT = 1.0
"""Seconds between two looks at the job."""
RENEWAL = 5.0
"""Seconds between two renewals of the lease, where nothing else is to be written."""
SILENCE = 20.0
"""A worker that could not renew its lease for so many seconds takes it for lost: sooner than others."""
AGAIN = 60.0
"""Seconds after which a worker that did not stop is asked again."""
LOST = 75
"""Exit status of a worker that lost its lease."""

_log = logging.getLogger(__name__)


class Heart(threading.Thread):
    """Beats until :meth:`finish`. When the lease is lost, the process ends where it stands."""

    def __init__(
        self,
        database: Database,
        job: Job,
        lease: str,
        journal: Journal,
        interrupt: Callable[[], None],
    ) -> None:
        """``interrupt`` makes the main thread stop at the next step."""
        super().__init__(name="heart", daemon=True)
        self.database, self.journal, self.interrupt = database, journal, interrupt
        self.job_id, self.lease = job.id, lease
        self.limit, self.before = job.time_limit, job.worked
        self.started = time.monotonic()
        self.reason: str | None = None
        """Why the work is interrupted: ``stop``, ``pause`` or ``time``; ``None`` while it is not."""
        self._done = threading.Event()
        self._asked = 0.0
        self._heard = self._renewed = self.started

    @property
    def worked(self) -> float:
        """Seconds of work on the job, those of earlier workers included."""
        return self.before + time.monotonic() - self.started

    def run(self) -> None:
        """Beat, each second."""
        while not self._done.wait(BEAT):
            self.beat()

    def finish(self) -> None:
        """Stop beating; what is pending is for whoever writes last."""
        self._done.set()
        self.join()

    def beat(self) -> None:
        """Write what is pending, renew the lease, and do what is wanted."""
        taken = self.journal.take()
        due = time.monotonic() - self._renewed > RENEWAL
        try:
            job = self._renew(taken) if taken or due else self._look()
        except LeaseLost:
            _log.error("the lease is lost; nothing more is written")
            os._exit(LOST)
        except SQLAlchemyError as error:
            self.journal.give_back(taken)
            _log.warning("the database does not answer: %s", error)
            if time.monotonic() - self._heard > SILENCE:
                os._exit(LOST)
        else:
            self._heard = time.monotonic()
            self._obey(job)
            JobFolders(self.job_id).trim_log()

    def _renew(self, taken: Pending) -> Job:
        with self.database.write() as session:
            job = renew(session, self.job_id, self.lease, worked=self.worked, **taken.details)
            session.add_all(taken.events)
        self._renewed = time.monotonic()
        return job

    def _look(self) -> Job:
        with self.database.read() as session:
            found = select(Job).where(Job.id == self.job_id, Job.lease == self.lease)
            job = session.scalars(found).first()
        if job is None:
            raise LeaseLost(f"the lease of job {self.job_id} is lost")
        return job

    def _obey(self, job: Job) -> None:
        wanted = {STOPPING: "stop", PAUSED: "pause"}.get(job.state)
        if wanted is None and job.state != RUNNING:
            wanted = "pause"  # resumed already, while this worker was still letting go
        if wanted is None and self.limit is not None and self.worked > self.limit:
            wanted = "time"
        if wanted is None:
            return
        self.reason = wanted
        if time.monotonic() - self._asked > AGAIN:
            self._asked = time.monotonic()
            self.interrupt()
