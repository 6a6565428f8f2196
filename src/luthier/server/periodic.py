"""Threads that repeat a task, such as the delivery of alerts."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

_log = logging.getLogger("luthier.server")


class PeriodicThread:
    """Thread that calls ``task`` every ``seconds`` until :meth:`close`.

    After an error, such as an unreachable database, the next call tries again.
    """

    def __init__(
        self,
        name: str,
        task: Callable[[], None],
        seconds: float,
        failure: str,
        *,
        first: float | None = None,
        once_more: bool = False,
    ) -> None:
        """Create the thread.

        Args:
            failure: Line of the log for an error of ``task``.
            first: Seconds until the first call, if other than ``seconds``.
            once_more: Call ``task`` once more after :meth:`close`.
        """
        self.closed = threading.Event()
        self._task, self._seconds, self._failure = task, seconds, failure
        self._first, self._once_more = seconds if first is None else first, once_more
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self, *, wait: bool = True) -> None:
        """Stop the thread; with ``wait``, after the end of a call in progress."""
        self.closed.set()
        if wait and self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        seconds = self._first
        while not self.closed.wait(seconds):
            self._call()
            seconds = self._seconds
        if self._once_more:
            self._call()

    def _call(self) -> None:
        try:
            self._task()
        except Exception:
            _log.exception(self._failure)
