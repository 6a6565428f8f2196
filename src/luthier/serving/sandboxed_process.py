"""A process with limits that works on what strangers send, and is started again where it ended.

Whoever asks it learns whether a request took too much, which it would do again, or whether the process
was ended for another reason, and the same request may succeed.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from luthier.child_python import python_command
from luthier.errors import RecipeError
from luthier.serving.sandboxed_process_child import LONGEST, READ_SECONDS, receive, send

PATIENCE = 120.0
"""Seconds of the clock for one request; its processor time ends it before, unless others compute."""
_KEPT = (
    "PATH", "PYTHONPATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR", "LUTHIER_HOME"
)  # fmt: skip
"""Variables that the process has of this one: none with a secret."""
_SET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP)
"""Statuses that no request causes: a cancellation sends these signals, the kernel where the machine has
no memory left, or whoever ends the service."""


class TakesTooMuch(RecipeError):
    """A request reached a limit of its process, or brought it down. It would do so again."""


class WorkInterrupted(RecipeError):
    """A request was not worked on to its end, for a reason that is not in it: its process could not
    start, was killed, or had no time on a busy machine. Asked again, it may be answered.
    """


class SandboxedProcess:
    """A process with limits that answers one request at a time, and is started again where it ended.

    Its module answers by :func:`luthier.serving.sandboxed_process_child.serve`. Safe to share between
    threads, which are answered in turns.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        seconds: int,
        subject: str,
        task: str,
        closed: str,
    ) -> None:
        """``module`` is run with a connection's descriptor, ``seconds``, and ``arguments``.

        A refusal says that ``subject`` takes too much ``task``, and ``closed`` to whoever asks after
        the process was closed. Raises :class:`RecipeError` where the process cannot begin.
        """
        self._command = python_command(module)
        self._arguments = (str(seconds), *arguments)
        self._seconds, self._subject, self._task = seconds, subject, task
        self._closed_because = closed
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._finally: Callable[[], object] = lambda: None
        self._closed = False
        with self._lock:
            self.about: dict[str, Any] = self._start()

    @property
    def alive(self) -> bool:
        """Whether the process is there: it was not ended by what it was asked last."""
        return self._child is not None

    def ask(self, call: str, **given: Any) -> Any:
        """What the process says to ``call``.

        Raises:
            TakesTooMuch: where ``call`` reaches a limit.
            WorkInterrupted: where the process ended for another reason, or cannot start.
            RecipeError: where it refuses.
        """
        with self._lock:
            if self._child is None:
                self._start()
            return self._exchange({"call": call, "given": given})

    def kill(self) -> None:
        """End what is under way; whoever asked is refused. Any thread may, without its turn."""
        if (child := self._child) is not None:
            child.kill()

    def close(self) -> None:
        """End the process; whoever asks later is refused."""
        with self._lock:
            self._closed = True
            self._end()

    def _start(self) -> dict[str, Any]:
        if self._closed:
            raise WorkInterrupted(self._closed_because)
        try:
            child, ours = self._spawn()
        except OSError as error:
            text = f"the process for {self._subject} cannot start: {error.strerror}"
            raise WorkInterrupted(text) from error
        self._child, self._connection = child, ours
        self._finally = weakref.finalize(self, _close_process, child, ours)
        about: dict[str, Any] = self._exchange(None)
        return about

    def _spawn(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                child = subprocess.Popen(
                    [*self._command, str(theirs.fileno()), *self._arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    env={name: os.environ[name] for name in _KEPT if name in os.environ} | _SET,
                    start_new_session=True,
                )
            except BaseException:
                ours.close()
                raise
        return child, ours

    def _exchange(self, message: Mapping[str, Any] | None) -> Any:
        connection = self._connection
        assert connection is not None
        began = time.monotonic()
        try:
            connection.settimeout(PATIENCE)
            if message is not None:
                send(connection, message)
            reply = receive(connection, LONGEST + 1024)
        except (OSError, EOFError, ValueError) as error:
            waited = time.monotonic() - began
            raise self._failure(waited, reading=message is None) from error
        if "error" in reply:
            if message is None:
                self._end()
            raise RecipeError(reply["error"])
        return reply["result"]

    def _failure(self, waited: float, reading: bool) -> TakesTooMuch | WorkInterrupted:
        """End the process; what is raised for it."""
        assert self._child is not None
        if waited < PATIENCE:
            with suppress(subprocess.TimeoutExpired):
                self._child.wait(1)  # it is about to end by itself, and says why
        status = self._child.poll()
        self._end()
        if status == -signal.SIGXCPU:
            seconds = READ_SECONDS if reading else self._seconds
            why = f"takes more than {seconds} seconds of processor time"
        elif status == -signal.SIGABRT:
            why = "takes more memory than it may have"  # libraries in Rust and C++ end so
        elif status == -signal.SIGSEGV:
            why = "brings its process down, as deep nesting does,"
        elif status is None:
            why = f"has not answered after {waited:.0f} seconds"
        else:
            why = f"ended its process (status {status})"
        text = f"{self._subject} {why} {'to be read' if reading else self._task}"
        # Before it has read anything of a request, the request cannot be the cause.
        by_request = not reading and status not in (None, 0, *_OUTSIDE)
        return TakesTooMuch(text) if by_request else WorkInterrupted(text)

    def _end(self) -> None:
        self._finally()
        self._child = self._connection = None


def _close_process(child: subprocess.Popen[bytes], connection: socket.socket) -> None:
    connection.close()
    child.kill()
    child.wait()
