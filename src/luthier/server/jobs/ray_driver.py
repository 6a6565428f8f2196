"""The process that stands on its starter's machine for a worker on a Ray cluster.

    lease → an actor on a node with room → the worker below it → its exit status

It holds the lease until the worker is there, and gives the work back where no node takes it. When it
dies Ray ends the actor, and the worker with it; when the actor or its node dies, it ends in turn, which
the scheduler sees as that of any worker.

Without a lease it stands for a process of a command (:mod:`luthier.server.jobs.ray_processes`): it
waits until a node has room, and ends its worker where its own standard input closes.
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

from luthier.cancellation import on_stdin_end
from luthier.errors import LeaseLost
from luthier.files import luthier_home
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
from luthier.server.jobs.ray_worker import RayWorker
from luthier.server.jobs.worker import RENEWAL
from luthier.server.tables import queue
from luthier.server.tables.database import Database

PLACEMENT_SECONDS = 60.0
"""Until work is given back that no node has taken."""
LOOK = 0.5
"""Seconds between two looks at the worker."""
ANSWER_SECONDS = 60.0
"""An actor that does not answer for so long is left to the lease, which its worker renews or loses."""
PASSED_ON = ("LUTHIER_", "HF_", "AWS_")
"""How the variables begin that workers have from the server; the others are their node's."""

_log = logging.getLogger("luthier.server.jobs.ray_driver")


class Starter:
    """Who has the work until its worker is there; this one waits, and keeps it where none takes it."""

    placement_seconds = math.inf
    """Until it is given back where no node has taken it."""

    def take(self) -> None:
        """Stand for the worker."""

    def renew(self) -> bool:
        """Whether the worker has taken over."""
        return True

    def give_back(self, message: str) -> None:
        """Say why no node takes the work."""
        _log.error("%s", message)


class LeaseHolder(Starter):
    """Holds the lease of a row until its worker has taken it over."""

    placement_seconds = PLACEMENT_SECONDS

    def __init__(self, database: Database, kind: str, row_id: str, lease: str) -> None:
        self.database, self.table = database, WORK_KINDS[kind].table
        self.row_id, self.lease = row_id, lease
        self._process = {**this_process(), "starting": True}
        self._renewed = 0.0

    def take(self) -> None:
        """Stand for the worker in place of the server, which may end meanwhile."""
        with self.database.write() as session:
            row = queue.renew(session, self.table, self.row_id, self.lease)
            row.worker = self._process
        self._renewed = time.monotonic()

    def renew(self) -> bool:
        """Renew the lease, when it is time; whether the worker has taken it over."""
        if time.monotonic() - self._renewed < RENEWAL:
            return False
        with self.database.write() as session:
            row = queue.hold(session, self.table, self.row_id, self.lease)
            if row.worker != self._process:
                return True
            queue.renew(session, self.table, self.row_id, self.lease)
        self._renewed = time.monotonic()
        return False

    def give_back(self, message: str) -> None:
        """Put the work back into the queue, and say why."""
        with suppress(LeaseLost), self.database.write() as session:
            queue.release(session, self.table, self.row_id, self.lease, message)


class Driver:
    """Runs one worker on the cluster."""

    def __init__(self, options: argparse.Namespace, starter: Starter) -> None:
        self.options, self.starter = options, starter
        self.asked_to_end = False
        self.actor: Any = None

    def run(self) -> int:
        """Start the worker and wait for its end; its exit status."""
        try:
            self.starter.take()
            self._connect()
            refusal = self._place()
        except LeaseLost as error:
            _log.error("%s", error)
            return LOST
        except Exception as error:
            # Of Ray, or of the way to it: nothing of the job was tried, so it costs the job nothing.
            _log.exception("the cluster took no worker")
            refusal = f"The Ray cluster took no worker: {_first_line(error)}"
        if refusal is not None:
            self.starter.give_back(refusal)
            return 0 if self.asked_to_end else NO_NODE
        return self._wait()

    def _connect(self) -> None:
        connect(self.options.address)
        # Ray has handlers of its own, which end the process where it stands.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        self.asked_to_end = True

    def end(self) -> None:
        """Have the worker end: nobody waits for it."""
        self.asked_to_end = True
        if self.actor is None:
            os._exit(0)  # nothing runs yet, and a head that is gone is waited for

    def _place(self) -> str | None:
        """Have the worker started by an actor; why not, where no node took it."""
        import ray

        options = self.options
        made = ray.remote(RayWorker).options(
            num_cpus=options.cores,
            num_gpus=options.gpus,
            memory=options.memory,
            # Whoever goes on holds another lease: new starts are the scheduler's.
            max_restarts=0,
        )
        self.actor = made.remote()
        environment = {
            name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)
        }
        environment["LUTHIER_HOME"] = str(luthier_home().absolute())
        log = options.log or WORK_KINDS[options.kind].folders(options.id).log.absolute()
        started = self.actor.start.remote(
            options.command, environment, sys.executable, str(log), options.needs
        )
        deadline = time.monotonic() + self.starter.placement_seconds
        while not ray.wait([started], timeout=LOOK)[0]:
            self.starter.renew()
            if self.asked_to_end or time.monotonic() > deadline:
                ray.kill(self.actor)
                if self.asked_to_end:
                    return "It was to end before a node had room."
                seconds = self.starter.placement_seconds
                return f"No node of the Ray cluster had room within {seconds:g} seconds."
        try:
            ray.get(started)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, FileNotFoundError):
                return (
                    f"A node of the Ray cluster does not see {cause.filename}: data, local base models "
                    "and the store (LUTHIER_HOME) have to be on storage that all nodes share, at the "
                    "same path."
                )
            raise
        return None

    def _wait(self) -> int:
        """The exit status of the worker."""
        import ray

        begun, passed_on = False, False
        deadline = time.monotonic() + BEGIN_SECONDS
        while True:
            if self.asked_to_end and not passed_on:
                passed_on = True
                self.actor.send.remote(signal.SIGTERM)
            if not begun:
                try:
                    begun = self.starter.renew()
                except LeaseLost as error:
                    # Its worker may have begun and ended between two looks, which its status tells.
                    _log.info("%s", error)
                    begun = True
                except Exception as error:
                    _log.warning("the lease could not be renewed: %s", error)
                if not begun and time.monotonic() > deadline:
                    _log.error("the worker did not begin within %g seconds", BEGIN_SECONDS)
                    return 1
            try:
                status = ray.get(self.actor.poll.remote(), timeout=ANSWER_SECONDS)
            except ray.exceptions.GetTimeoutError:
                _log.warning("the worker's node does not answer")
                continue
            except ray.exceptions.RayError as error:
                _log.error("the worker's actor or its node died: %s", _first_line(error))
                return NODE_LOST
            if status is not None:
                return int(status)
            time.sleep(LOOK)


def connect(address: str) -> None:
    """Make this process a driver of the cluster at ``address``."""
    import ray

    # Ray lets actors import from the working directory of their driver, which may hold anything.
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
    """Run by ``python -m luthier.server.jobs.ray_driver``; the exit status of the worker."""
    parser = argparse.ArgumentParser(prog="ray_driver")
    parser.add_argument("--address", required=True, help="HOST:PORT of the head")
    parser.add_argument("--probe", action="store_true", help="only try to connect")
    parser.add_argument("--cores", type=float, default=1.0)
    parser.add_argument("--memory", type=int, default=0, help="bytes")
    parser.add_argument("--gpus", type=float, default=0.0)
    parser.add_argument("--kind")
    parser.add_argument("--id")
    parser.add_argument("--lease")
    parser.add_argument("--log", help="file of a worker without a lease, for what it prints")
    parser.add_argument("--needs", action="append", default=[], help="a path its node has to see")
    parser.add_argument("command", nargs="*", help="of the worker, after --")
    options = parser.parse_args(arguments)
    os.umask(0o077)
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    if options.probe:
        connect(options.address)
        return 0
    if options.lease is None:
        driver = Driver(options, Starter())
        on_stdin_end(driver.end)
        return driver.run()
    holder = LeaseHolder(inherited_database(), options.kind, options.id, options.lease)
    return Driver(options, holder).run()


if __name__ == "__main__":
    _status = main(sys.argv[1:])
    if _status < 0:  # as the worker ended, so that the scheduler can say it
        signal.signal(-_status, signal.SIG_DFL) if -_status != signal.SIGKILL else None
        os.kill(os.getpid(), -_status)
    sys.exit(_status)
