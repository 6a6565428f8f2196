"""Start of child processes, and cancellation of work whose client disconnected.

A caller collects work with :func:`cancelled_by`. Long-running code (generation, a child process)
registers with :func:`cancellable`. Without a caller, as in training, registration does nothing.

Python child processes never import from the working directory, which often contains downloaded
data: a file such as ``random.py`` would replace a module of the standard library.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Protocol, TypeVar


def python_command(module: str, *arguments: str) -> list[str]:
    """Return the command to run ``module`` with this interpreter and the safe path."""
    return [sys.executable, "-P", "-m", module, *arguments]


def use_safe_path() -> None:
    """Set the safe path for all children, including children of multiprocessing and libraries.

    Multiprocessing starts its processes with ``python -c``, which puts the working directory first.
    """
    os.environ["PYTHONSAFEPATH"] = "1"


def format_exit(status: int | None) -> str:
    """Return an exit status as text; a negative ``status`` is minus the number of a signal."""
    if status is not None and status < 0:
        return f"by signal {-status} ({signal.strsignal(-status)})"
    return f"with status {status}"


class Cancellable(Protocol):
    """Work under way."""

    def close(self) -> None:
        """End the work. May be called from any thread, also after the end of the work."""


class KillHandle:
    """Work that ``kill`` ends.

    After :meth:`finish`, :meth:`close` does nothing, because the system may have reused the process
    id.
    """

    def __init__(self, kill: Callable[[], object]) -> None:
        self._kill, self._finished = kill, False
        self._lock = threading.Lock()

    def close(self) -> None:
        """See :meth:`Cancellable.close`."""
        with self._lock:
            if not self._finished:
                self._kill()

    def finish(self) -> None:
        """The work is done; a kill under way has ended when this returns."""
        with self._lock:
            self._finished = True


class CancelScope:
    """Group of work for a common :meth:`close`, also for work registered after :meth:`close`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._works: list[Cancellable] = []
        self._closed = False

    def register(self, work: Cancellable) -> None:
        """Register ``work``; after :meth:`close`, end ``work`` at once."""
        with self._lock:
            closed = self._closed
            if not closed:
                self._works.append(work)
        if closed:
            work.close()

    def close(self) -> None:
        """End all work. May be called from any thread."""
        with self._lock:
            self._closed = True
        for work in self._works:
            work.close()


Work = TypeVar("Work", bound=Cancellable)

_register: ContextVar[Callable[[Cancellable], None] | None] = ContextVar("register", default=None)


@contextmanager
def cancelled_by(register: Callable[[Cancellable], None]) -> Iterator[None]:
    """Pass work that starts in the block to ``register``, including threads with a copied context."""
    token = _register.set(register)
    try:
        yield
    finally:
        _register.reset(token)


def cancellable(work: Work) -> Work:
    """Register ``work`` with the current :func:`cancelled_by` block; return ``work``."""
    if (register := _register.get()) is not None:
        register(work)
    return work


class Cancelled(Exception):
    """Cancellation of work, for example by a disconnected client."""


def run_cancellable(
    command: Sequence[str], seconds: float, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run a command like ``subprocess.run``. A cancellation or the time limit kills all processes.

    Raises:
        subprocess.TimeoutExpired: after ``seconds``.
        Cancelled: after a cancellation.
    """
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    cancelled = threading.Event()

    def kill() -> None:
        cancelled.set()
        _kill_tree(process.pid)

    work = cancellable(KillHandle(kill))
    with process:
        try:
            output, errors = process.communicate(timeout=seconds)
        except BaseException:
            work.close()
            raise
        finally:
            work.finish()
    if cancelled.is_set():
        raise Cancelled("The command was cancelled.")
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def _kill_tree(process_id: int) -> None:
    import psutil

    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(process_id)
        # Processes of a pool would wait for their killed parent forever.
        for each in (process, *process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                each.kill()


def on_stdin_end(end: Callable[[], object]) -> None:
    """Call ``end`` in a thread when standard input ends, because the parent process is gone.

    No signal reports the death of a parent, but the kernel closes the parent's end of a pipe.
    """

    def wait() -> None:
        while os.read(0, 1024):
            pass
        end()

    threading.Thread(target=wait, name="starter", daemon=True).start()
