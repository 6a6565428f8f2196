"""Cancellation of work whose client disconnected.

A caller collects work with :func:`cancelled_by`. Long-running code (generation, a child process)
registers with :func:`cancellable`. Without a caller, as in training, registration does nothing.
:func:`on_stdin_end` ends a child process after its parent.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, TypeVar


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

    def take(self, work: Cancellable) -> None:
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


def on_stdin_end(end: Callable[[], object]) -> None:
    """Call ``end`` in a thread when standard input ends, because the parent process is gone.

    No signal reports the death of a parent, but the kernel closes the parent's end of a pipe.
    """

    def wait() -> None:
        while os.read(0, 1024):
            pass
        end()

    threading.Thread(target=wait, name="starter", daemon=True).start()
