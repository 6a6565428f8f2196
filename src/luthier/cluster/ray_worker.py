"""The actor that runs a worker as a child process on a node of a Ray cluster.

A worker needs the main thread for signals and an environment without Ray's variables, so an actor
cannot run the worker itself. The worker's standard input is a pipe of the actor. The worker ends
when the pipe closes, so the worker ends with the actor, the driver, the node or the raylet.
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
        """Start the worker.

        Args:
            command: the command of the worker.
            environment: variables in addition to the node's environment.
            python: the driver's interpreter, which is replaced by the node's interpreter.
            log: the output file, to which the worker appends.
            needs: paths that the node must see.

        Raises:
            FileNotFoundError: if the node does not see ``log`` or a path in ``needs``.
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
