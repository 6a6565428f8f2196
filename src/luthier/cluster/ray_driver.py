"""The local process that represents a process on a Ray cluster.

    lease → an actor on a node with room → the worker below the actor → the worker's exit status

For a job, the driver renews the lease until the worker has taken over, and returns the job to the
queue if no node accepts the worker. A process of a command (:mod:`luthier.cluster.ray_commands`)
has no lease: the driver waits until a node has room, and ends the process when its own standard
input closes.

When the driver dies, Ray ends the actor and the worker. When the actor or its node dies, the driver
ends with an exit status that the scheduler handles like the death of a worker.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import chdir, suppress
from typing import Any

from luthier.cluster.ray_worker import RayWorker
from luthier.errors import LeaseLost
from luthier.files import luthier_home
from luthier.processes import on_stdin_end
from luthier.server.jobs.kinds import WORK_KINDS
from luthier.server.jobs.processes import (
    BEGIN_SECONDS,
    LOG_FORMAT,
    LOST,
    NO_NODE,
    NODE_LOST,
    inherited_database,
    this_process,
)
from luthier.server.jobs.worker import RENEWAL
from luthier.server.tables import queue
from luthier.server.tables.database import Database

PLACEMENT_SECONDS = 60.0
"""Time until a job that no node has accepted returns to the queue, in seconds."""
POLL_SECONDS = 0.5
"""Interval between two polls of the worker, in seconds."""
REPLY_SECONDS = 60.0
"""Time limit for one reply of the actor, in seconds."""
INHERITED_PREFIXES = ("LUTHIER_", "HF_", "AWS_")
"""Prefixes of the variables that workers inherit from the server."""

_log = logging.getLogger("luthier.cluster.ray_driver")


class CommandWork:
    """Ownership of a command's work until the process starts. A command has no lease to renew."""

    placement_seconds = math.inf
    """Time until the work is given back, in seconds."""

    def acquire(self) -> None:
        """Acquire the work."""

    def renew(self) -> bool:
        """Renew the ownership. Returns whether the process has started."""
        return True

    def release(self, message: str) -> None:
        """Report why no node accepts the work."""
        _log.error("%s", message)


class JobWork(CommandWork):
    """Ownership of a job's lease until the worker has taken over."""

    placement_seconds = PLACEMENT_SECONDS

    def __init__(self, database: Database, kind: str, row_id: str, lease: str) -> None:
        self.database, self.table = database, WORK_KINDS[kind].table
        self.row_id, self.lease = row_id, lease
        self._process = {**this_process(), "starting": True}
        self._renewed = 0.0

    def acquire(self) -> None:
        """Acquire the lease from the server, which may end before the worker starts."""
        with self.database.write() as session:
            row = queue.renew(session, self.table, self.row_id, self.lease)
            row.worker = self._process
        self._renewed = time.monotonic()

    def renew(self) -> bool:
        """Renew the lease when due. Returns whether the worker has taken over."""
        if time.monotonic() - self._renewed < RENEWAL:
            return False
        with self.database.write() as session:
            row = queue.lock_leased(session, self.table, self.row_id, self.lease)
            if row.worker != self._process:
                return True
            queue.renew(session, self.table, self.row_id, self.lease)
        self._renewed = time.monotonic()
        return False

    def release(self, message: str) -> None:
        """Return the job to the queue with the reason."""
        with suppress(LeaseLost), self.database.write() as session:
            queue.release(session, self.table, self.row_id, self.lease, message)


class Driver:
    """Runs one worker on the cluster."""

    def __init__(self, options: argparse.Namespace, work: CommandWork) -> None:
        self.options, self.work = options, work
        self.ending = False
        self.actor: Any = None

    def run(self) -> int:
        """Run the worker and return the exit status."""
        try:
            self.work.acquire()
            connect(self.options.address)
            # Ray's own handlers would end this process at once.
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._on_signal)
            refusal = self._place()
        except LeaseLost as error:
            _log.error("%s", error)
            return LOST
        except Exception as error:
            # The error is one of Ray or the network: the job was not tried, so no attempt counts.
            _log.exception("the cluster did not accept the worker")
            refusal = f"The Ray cluster did not accept the worker: {_first_line(error)}"
        if refusal is not None:
            self.work.release(refusal)
            return 0 if self.ending else NO_NODE
        return self._wait()

    def _on_signal(self, number: int, frame: Any) -> None:
        self.ending = True

    def end(self) -> None:
        """End the worker because the command has ended."""
        self.ending = True
        if self.actor is None:
            os._exit(0)  # connecting to a head that is gone would block until its time limit

    def _place(self) -> str | None:
        """Start an actor and the worker. Returns the reason if no node accepts the worker."""
        import ray

        options = self.options
        actor = ray.remote(RayWorker).options(
            num_cpus=options.cores,
            num_gpus=options.gpus,
            memory=options.memory,
            max_restarts=0,  # the scheduler starts workers again, with another lease
        )
        self.actor = actor.remote()
        environment = {
            name: value for name, value in os.environ.items() if name.startswith(INHERITED_PREFIXES)
        }
        environment["LUTHIER_HOME"] = str(luthier_home().absolute())
        log = options.log or WORK_KINDS[options.kind].folders(options.id).log.absolute()
        started = self.actor.start.remote(
            options.command, environment, sys.executable, str(log), options.needs
        )
        deadline = time.monotonic() + self.work.placement_seconds
        while not ray.wait([started], timeout=POLL_SECONDS)[0]:
            self.work.renew()
            if self.ending or time.monotonic() > deadline:
                ray.kill(self.actor)
                if self.ending:
                    return "The worker was ended before a node had room."
                seconds = self.work.placement_seconds
                return f"No node of the Ray cluster had room within {seconds:g} seconds."
        try:
            ray.get(started)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, FileNotFoundError):
                return (
                    f"A node of the Ray cluster cannot read {error.cause.filename}. Data, local base "
                    "models and LUTHIER_HOME must be on shared storage with equal paths."
                )
            raise
        return None

    def _wait(self) -> int:
        """Return the exit status of the worker."""
        import ray

        begun, signalled = False, False
        deadline = time.monotonic() + BEGIN_SECONDS
        while True:
            if self.ending and not signalled:
                signalled = True
                self.actor.send.remote(signal.SIGTERM)
            if not begun:
                try:
                    begun = self.work.renew()
                except LeaseLost as error:
                    # The worker may have begun and ended between two polls: its exit status tells.
                    _log.info("%s", error)
                    begun = True
                except Exception as error:
                    _log.warning("the lease could not be renewed: %s", error)
                if not begun and time.monotonic() > deadline:
                    _log.error("the worker did not begin within %g seconds", BEGIN_SECONDS)
                    return 1
            try:
                status = ray.get(self.actor.poll.remote(), timeout=REPLY_SECONDS)
            except ray.exceptions.GetTimeoutError:
                _log.warning("the worker's node does not respond")
                continue
            except ray.exceptions.RayError as error:
                _log.error("the worker's actor or its node died: %s", _first_line(error))
                return NODE_LOST
            if status is not None:
                return int(status)
            time.sleep(POLL_SECONDS)


def connect(address: str) -> None:
    """Make this process a driver of the cluster at ``address``."""
    import ray

    # Ray lets actors import from the working directory of their driver, which may hold any file.
    with chdir(sys.prefix):
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.WARNING,
            configure_logging=False,
        )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def main(arguments: Sequence[str]) -> int:
    """Run ``python -m luthier.cluster.ray_driver`` and return the exit status of the worker."""
    parser = argparse.ArgumentParser(prog="ray_driver")
    parser.add_argument("--address", required=True, help="HOST:PORT of the head")
    parser.add_argument("--probe", action="store_true", help="only connect")
    parser.add_argument("--cores", type=float, default=1.0)
    parser.add_argument("--memory", type=int, default=0, help="bytes")
    parser.add_argument("--gpus", type=float, default=0.0)
    parser.add_argument("--kind")
    parser.add_argument("--id")
    parser.add_argument("--lease")
    parser.add_argument("--log", help="output file of a worker without a lease")
    parser.add_argument("--needs", action="append", default=[], help="path visible to the node")
    parser.add_argument("command", nargs="*", help="command of the worker, after --")
    options = parser.parse_args(arguments)
    os.umask(0o077)
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    if options.probe:
        connect(options.address)
        return 0
    if options.lease is None:
        driver = Driver(options, CommandWork())
        on_stdin_end(driver.end)
        return driver.run()
    work = JobWork(inherited_database(), options.kind, options.id, options.lease)
    return Driver(options, work).run()


if __name__ == "__main__":
    _status = main(sys.argv[1:])
    if _status < 0:  # end by the worker's signal, so that the scheduler can report the signal
        signal.signal(-_status, signal.SIG_DFL) if -_status != signal.SIGKILL else None
        os.kill(os.getpid(), -_status)
    sys.exit(_status)
