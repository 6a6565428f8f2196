"""Processes of workers: identity by host, pid and start time, exit statuses and environment.

A pid alone does not identify a process, because the system uses pids again.
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

NO_SPACE = 73
"""Exit status of a worker without memory or disk space. The work is queued again."""
NO_NODE = 74
"""Exit status of a driver without a node with capacity. The job is queued again."""
NO_ROOM = (NO_SPACE, NO_NODE)
"""Exit statuses after which the runner pauses."""
LOST = 75
"""Exit status of a worker whose lease was lost."""
NODE_LOST = 76
"""Exit status of a driver whose actor or node died."""
BEGIN_SECONDS = 300.0
"""Time limit for the start of a worker, in seconds."""
DATABASE = "LUTHIER_DATABASE"
"""Environment variable with the database URL, which may contain a password."""
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"
"""Format of log lines."""
_SECRETS = ("LUTHIER_SERVER_KEY", "LUTHIER_BOOTSTRAP")


def this_process(processes: int = 1) -> dict[str, Any]:
    """Return the record of this process for a lease."""
    among = {"processes": processes} if processes > 1 else {}
    return {"host": host(), "pid": os.getpid(), "born": psutil.Process().create_time(), **among}


def host() -> str:
    """Return this machine's host name and boot id."""
    return f"{socket.gethostname()}/{_boot()}"


def is_here(process: Mapping[str, Any]) -> bool:
    """Return whether a process belongs to this machine."""
    return str(process["host"]).partition("/")[0] == socket.gethostname()


def is_alive(process: Mapping[str, Any]) -> bool:
    """Return whether a process of this machine runs; a zombie does not."""
    # After a reboot, the boot id differs, and no process of the record runs.
    if process["host"] != host():
        return False
    try:
        found = psutil.Process(process["pid"])
        # psutil adds the boot time, which moves when the system clock is adjusted.
        same = abs(float(found.create_time()) - float(process["born"])) < 1
        return same and bool(found.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def send(process: Mapping[str, Any], number: signal.Signals) -> None:
    """Send a signal to a running process of this machine other than this process."""
    # The record of a starting worker names the server, which must not signal itself.
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
    """Return the environment variables that name the database."""
    # Not an argument: all users of a machine can read the arguments of processes.
    return {DATABASE: database.engine.url.render_as_string(hide_password=False)}


def inherited_database() -> Database:
    """Return the database of the server that started this process."""
    from luthier.server.tables.schema import METADATA

    assert METADATA.tables  # the import declares all tables
    return Database(os.environ.get(DATABASE) or None)


def worker_environment() -> dict[str, str]:
    """Return the environment for workers, without secrets and without the server's own limits.

    The limits suit single requests, and training has batches of many sizes.
    """
    limits = {*dict.fromkeys(KERNEL_CACHES, str(KERNELS)).items(), OWN_THREAD}
    kept = os.environ.items() - limits
    return {name: value for name, value in kept if name not in _SECRETS}
