"""Work that ends when nobody waits for it any more.

Whoever has something done for a client sets :func:`cancelled_by`; whatever takes long and can be ended
(a model that writes, a process) says so with :func:`cancellable`. Where nobody listens, as in training,
nothing happens. A process whose starter is gone ends by itself (:func:`on_stdin_end`).
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
        """End it now. Any thread may, also when it has ended."""


class KillHandle:
    """Work that ``kill`` ends. Once it is finished nothing is killed: what did it, a process or its
    number, may be another's by then.
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
    """Work that is ended together by :meth:`close`: what has begun by then, and what begins later."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._works: list[Cancellable] = []
        self._closed = False

    def take(self, work: Cancellable) -> None:
        """What :func:`cancelled_by` is to tell: end ``work`` with the others, or at once."""
        with self._lock:
            closed = self._closed
            if not closed:
                self._works.append(work)
        if closed:
            work.close()

    def close(self) -> None:
        """End all of it. Any thread may."""
        with self._lock:
            self._closed = True
        for work in self._works:
            work.close()


Work = TypeVar("Work", bound=Cancellable)

_register: ContextVar[Callable[[Cancellable], None] | None] = ContextVar("register", default=None)


@contextmanager
def cancelled_by(register: Callable[[Cancellable], None]) -> Iterator[None]:
    """``register`` hears of all work that begins in the block, in its threads too where they have its
    context.
    """
    token = _register.set(register)
    try:
        yield
    finally:
        _register.reset(token)


def cancellable(work: Work) -> Work:
    """``work``, after whoever may cancel it was told of it."""
    if (register := _register.get()) is not None:
        register(work)
    return work


def on_stdin_end(end: Callable[[], object]) -> None:
    """Have ``end`` called, by a thread, when standard input ends: whoever holds its other end is gone.

    No signal tells a process that its starter was killed; of a pipe the kernel closes the other end.
    """

    def wait() -> None:
        while os.read(0, 1024):
            pass
        end()

    threading.Thread(target=wait, name="starter", daemon=True).start()
