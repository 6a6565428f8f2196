"""The actor of Ray that runs a worker as its child process, on the node that has room for it.

A process of its own has what a worker needs and an actor's has not: the main thread for its signals,
the environment of a worker and nothing of Ray's. It reads from a pipe whose other end the actor holds,
and ends where that closes: with the actor, which Ray ends with its driver, its node or its raylet.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence


class RayWorker:
    """A worker on a node of the cluster."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def start(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        python: str,
        log: str,
        needs: Sequence[str] = (),
    ) -> None:
        """Start the worker; it appends what it prints to the file ``log``.

        ``python`` is the starter's interpreter: in its place the node's own is taken.

        Raises:
            FileNotFoundError: this node does not see the store that the log is in, or one of ``needs``.
        """
        for path in needs:
            os.stat(path)
        # Without O_CREAT: the starter has made the file, so that a node with a store of its own shows.
        opened = os.open(log, os.O_WRONLY | os.O_APPEND)
        program = [sys.executable if part == python else part for part in command]
        try:
            self._process = subprocess.Popen(
                program,
                stdin=subprocess.PIPE,
                stdout=opened,
                stderr=opened,
                env={**os.environ, **environment},
                cwd=environment["LUTHIER_HOME"],
                start_new_session=True,
            )
        finally:
            os.close(opened)

    def poll(self) -> int | None:
        """How the worker ended; ``None`` while it works."""
        assert self._process is not None
        return self._process.poll()

    def send(self, number: int) -> None:
        """Send the worker a signal."""
        assert self._process is not None
        self._process.send_signal(number)
