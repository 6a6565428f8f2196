"""Which process does what: told apart by machine, number and time of birth, as numbers come again."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import psutil

NO_DISK = 73
"""Exit status of a worker that gave its job back because the disk is full or read-only."""


def this_process() -> dict[str, Any]:
    """What a lease records of the process that holds it."""
    return {"host": host(), "pid": os.getpid(), "born": psutil.Process().create_time()}


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
