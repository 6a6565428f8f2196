"""What the threads of a server have in common that start processes and notice those that die.

A supervisor keeps nothing that matters in memory: what it has to know is in the database. A server
that is killed leaves its processes at work; the next one finds them by their leases, and starts no
second one beside a living one.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Generic, TypeVar

from sqlalchemy.orm import Session

from luthier.encryption import keys
from luthier.errors import LeaseLost
from luthier.jobs import processes
from luthier.jobs.folders import JobFolders
from luthier.serving.memory import KERNEL_CACHES, KERNELS
from luthier.serving.prompts import OWN_THREAD
from luthier.store.database import Database
from luthier.store.imports import ModelImport
from luthier.store.jobs import Job
from luthier.store.leases import LEASE

TICK = 1.0
"""Seconds between two looks at what waits, where nobody asks for one."""
RETURN = 60.0
"""Seconds that processes are given to come to an end when the server ends."""

_SECRETS = (
    "LUTHIER_SERVER_KEY", "LUTHIER_BOOTSTRAP", keys.ENVIRONMENT, keys.FILE, keys.HANDED,
)  # fmt: skip
_log = logging.getLogger(__name__)


Row = TypeVar("Row", Job, ModelImport)


class Supervisor(ABC, Generic[Row]):
    """A thread that turns rows into work, each by a process of its own that holds it by a lease."""

    who = "its worker"
    """The process, in the reasons that are told when it died."""

    def __init__(self, database: Database, command: Sequence[str], thread: str) -> None:
        """Prepare; :meth:`start` begins. ``command`` starts a process, ``thread`` is a name."""
        self.database, self.command = database, [*command]
        self.environment = address_of(database)
        self.children: dict[str, subprocess.Popen[bytes]] = {}
        """Processes that were started here and not seen to end, by their leases."""
        self._watch = Watch(LEASE.total_seconds())
        self._name = thread
        self._thread: threading.Thread | None = None
        self._wanted = threading.Event()
        self._ending = False

    @abstractmethod
    def tick(self) -> None:
        """One look: who died, what is left to tidy, what can be started."""

    @abstractmethod
    def _held(self, session: Session) -> Sequence[Row]:
        """Every row that a process holds."""

    @abstractmethod
    def _lapse(self, session: Session, found: Row, why: str) -> str:
        """Take the lease of one that died; what became of the row, for the log."""

    def _ended(self, lease: str, status: int) -> None:
        """A child is gone, and its exit status is known."""

    def start(self) -> None:
        """Begin to look at what waits, in a thread."""
        self._thread = threading.Thread(target=self._loop, name=self._name, daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Look now: something was asked for."""
        self._wanted.set()

    def stop(self, give_back: bool = False) -> None:
        """End the thread. Processes go on, and the next server finds them.

        ``give_back`` makes those of this machine give back what they hold first (a worker writes a
        checkpoint): for where all processes end with the server, as in a container.
        """
        self._ending = True
        self.wake()
        if self._thread is not None:
            self._thread.join()
        if give_back:
            self._give_back()

    def _loop(self) -> None:
        while not self._ending:
            try:
                self.tick()
            except Exception:
                # The database or the disk is away: whatever is missed is found at the next look.
                _log.exception("%s: nothing can be done now", self._name)
            self._wanted.wait(TICK)
            self._wanted.clear()

    def _bury(self) -> None:
        """Take the leases of processes that died, and end those that no longer answer."""
        with self.database.read() as session:
            held = self._held(session)
        ended = {lease: child.poll() for lease, child in self.children.items()}
        for found in held:
            lease, worker = str(found.lease), found.worker or {}
            if ended.get(lease) is not None:
                self._expire(found, f"{self.who} ended {how_it_ended(ended[lease])}")
            elif worker and processes.is_here(worker) and not processes.is_alive(worker):
                self._expire(found, f"{self.who} is gone")
            elif self._watch.silent(lease, found.lease_ends):
                if worker and not worker.get("starting"):
                    processes.send(worker, signal.SIGKILL)
                self._expire(found, f"{self.who} was not heard from any more")
        self._watch.forget({str(found.lease) for found in held})
        for lease, status in ended.items():
            if status is not None:
                del self.children[lease]
                self._ended(lease, status)

    def _expire(self, found: Row, why: str) -> None:
        try:
            with self.database.write() as session:
                told = self._lapse(session, found, why)
            _log.warning("%s", told)
        except LeaseLost:
            pass  # it gave the lease back meanwhile

    def _run(self, arguments: Sequence[str], folders: JobFolders) -> subprocess.Popen[bytes]:
        """Start a process that writes to the log of ``folders``."""
        with ExitStack() as opened:
            handed, files = opened.enter_context(keys.handed_over())
            # With keys, it writes the log itself, encrypted.
            log = os.open(os.devnull, os.O_WRONLY) if handed else folders.open_log()
            opened.callback(os.close, log)
            return subprocess.Popen(
                [*self.command, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=files,
                env={**inherited(), **self.environment, **handed},
                start_new_session=True,
            )

    def _give_back(self) -> None:
        with self.database.read() as session:
            workers = [found.worker for found in self._held(session) if found.worker]
        here = [worker for worker in workers if processes.is_here(worker)]
        for worker in here:
            processes.send(worker, signal.SIGTERM)
        deadline = time.monotonic() + RETURN
        while time.monotonic() < deadline and any(map(processes.is_alive, here)):
            for child in self.children.values():
                child.poll()
            time.sleep(0.05)


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
    """Variables of this process that workers have, too: not those that open the service.

    Nor the limits that a server gives itself: training has more sizes in turn, and many texts at once.
    """
    limits = {*dict.fromkeys(KERNEL_CACHES, str(KERNELS)).items(), OWN_THREAD}
    kept = os.environ.items() - limits
    return {name: value for name, value in kept if name not in _SECRETS}


def how_it_ended(status: int | None) -> str:
    """An exit status in words."""
    if status is not None and status < 0:
        return f"by signal {-status} ({signal.strsignal(-status)})"
    return f"with status {status}"
