"""Processes of workers: told apart by machine, number and time of birth, as numbers come again; and
what they inherit of the server.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import psutil

from luthier.engine.machine import KERNEL_CACHES, KERNELS
from luthier.inference.prompt_limits import OWN_THREAD
from luthier.server.tables.database import Database

NO_DISK = 73
"""Exit status of a worker that gave its job back because the disk is full or read-only."""
NO_NODE = 74
"""Exit status of a driver that gave its job back because no node of its cluster took it."""
NO_ROOM = (NO_DISK, NO_NODE)
"""Those after which work is tried again, later each time."""
LOST = 75
"""Exit status of a worker that lost its lease."""
NODE_LOST = 76
"""Exit status of a driver whose actor, or the node below it, died."""
BEGIN_SECONDS = 300.0
"""Time limit for the start of a worker, in seconds: a slow disk has its libraries to read."""
DATABASE = "LUTHIER_DATABASE"
"""Variable with the address of the database: it may hold a password, which no command line may."""
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"
"""Of messages of workers."""
_SECRETS = ("LUTHIER_SERVER_KEY", "LUTHIER_BOOTSTRAP")


def this_process(processes: int = 1) -> dict[str, Any]:
    """What a lease records of the process that holds it, and shares the work among ``processes``."""
    among = {"processes": processes} if processes > 1 else {}
    return {"host": host(), "pid": os.getpid(), "born": psutil.Process().create_time(), **among}


def host() -> str:
    """Name of this machine, and of the boot it runs since: nothing lives through another one."""
    return f"{socket.gethostname()}/{_boot()}"


def is_here(process: Mapping[str, Any]) -> bool:
    """Whether a process belongs to this machine, and can be asked whether it lives."""
    return str(process["host"]).partition("/")[0] == socket.gethostname()


def is_alive(process: Mapping[str, Any]) -> bool:
    """Whether a process of this machine still runs; one that only waits to be reaped does not."""
    if process["host"] != host():
        return False
    try:
        found = psutil.Process(process["pid"])
        same = abs(float(found.create_time()) - float(process["born"])) < 1
        return same and bool(found.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def send(process: Mapping[str, Any], number: signal.Signals) -> None:
    """Send a signal to a process of this machine, if it still runs and is not this one."""
    if is_here(process) and is_alive(process) and process["pid"] != os.getpid():
        with suppress(ProcessLookupError):
            os.kill(process["pid"], number)


def _boot() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def database_environment(database: Database) -> dict[str, str]:
    """The database for a worker."""
    return {DATABASE: database.engine.url.render_as_string(hide_password=False)}


def inherited_database() -> Database:
    """The database that the server gave this process; every table is declared."""
    from luthier.server.tables.schema import METADATA

    assert METADATA.tables  # importing it has declared them
    return Database(os.environ.get(DATABASE) or None)


def worker_environment() -> dict[str, str]:
    """Variables of this process that workers have, too: not those that open the service.

    Nor the limits that a server gives itself: training has more sizes in turn, and many texts at once.
    """
    limits = {*dict.fromkeys(KERNEL_CACHES, str(KERNELS)).items(), OWN_THREAD}
    kept = os.environ.items() - limits
    return {name: value for name, value in kept if name not in _SECRETS}
