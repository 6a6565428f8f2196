"""Resident memory of a server with all its processes."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
from luthier_server import Served


def processes(server: Served) -> list[psutil.Process]:
    """Return the server's process and its descendants."""
    assert server.process is not None
    process = psutil.Process(server.process.pid)
    return [process, *process.children(recursive=True)]


def resident(server: Served, *, children: bool = True) -> int:
    """Return the resident memory in bytes, optionally without children.

    A child before exec shares all memory with its parent.
    """
    own, *others = processes(server)
    total = int(own.memory_info().rss)
    command = own.cmdline()
    for each in others if children else ():
        with suppress(psutil.NoSuchProcess):
            if each.cmdline() != command:
                total += int(each.memory_info().rss)
    return total


class Growth:
    """Maximum growth during a block.

    Includes files in ``folder``, which is in memory.
    """

    def __init__(
        self, server: Served, folder: Path | None = None, *, children: bool = True
    ) -> None:
        self.server, self.folder, self.children = server, folder, children
        self.rest, self.most = self._now(), 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def now(self) -> int:
        """Return the current growth in bytes."""
        return self._now() - self.rest

    def comes_back(self, within: int, seconds: float = 30) -> bool:
        """Return True if the growth falls to ``within`` bytes in time."""
        deadline = time.monotonic() + seconds
        while self.now() > within:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)
        return True

    def _now(self) -> int:
        total = resident(self.server, children=self.children)
        for path in self.folder.rglob("*") if self.folder else ():
            with suppress(FileNotFoundError):
                total += path.stat().st_size
        return total

    def _look(self) -> None:
        while not self._done.wait(0.02):
            self.most = max(self.most, self.now())

    def __enter__(self) -> Growth:
        self._thread.start()
        return self

    def __exit__(self, *reason: object) -> None:
        self._done.set()
        self._thread.join()
