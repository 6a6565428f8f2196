"""The actor that runs a worker as a child process on a node of a Ray cluster.

A worker needs the main thread for its signals and an environment without Ray's variables, which an
actor lacks. The worker reads from a pipe that the actor holds and ends when the pipe closes: with the
actor, which Ray ends together with its driver, its node or its raylet.
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
        """Start the worker, which appends its output to the file ``log``.

        ``python`` is the driver's interpreter, which the node's own interpreter replaces.

        Raises:
            FileNotFoundError: if this node does not see ``log`` or one of ``needs``.
        """
        for path in needs:
            os.stat(path)
        # Without O_CREAT: the driver has created the file, which shows a node with another file system.
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
        """Return the exit status of the worker; ``None`` while it works."""
        assert self._process is not None
        return self._process.poll()

    def send(self, number: int) -> None:
        """Send the worker a signal."""
        assert self._process is not None
        self._process.send_signal(number)
