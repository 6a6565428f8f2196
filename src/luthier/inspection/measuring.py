"""Measuring batches, in this process or in others; what was measured comes back in order.

Reading and taking stay in one process, so that a report does not depend on how many measure.
"""

from __future__ import annotations

import multiprocessing
import pickle
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.context import BaseContext
from typing import Any

from luthier.inspection.check import Batch, Check

AHEAD = 3
"""Batches that wait for each process: enough that none is idle while rows are read."""

Measured = tuple[Batch, list[Any]]
"""A batch, and what each check measured of it."""


class Measuring:
    """Hands batches to the checks; with one process, at once."""

    def __init__(self, checks: Sequence[Check], processes: int = 1) -> None:
        self.checks, self.processes = checks, processes
        self._pool: ProcessPoolExecutor | None = None
        self._waiting: deque[tuple[Batch, Future[list[Any]]]] = deque()

    def close(self) -> None:
        """End the other processes; what is not taken yet is lost."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def push(self, batch: Batch) -> Iterator[Measured]:
        """Take a batch on; those that are measured by now, in the order they came."""
        if self.processes == 1:
            yield batch, [check.measure(batch) for check in self.checks]
            return
        if self._pool is None:
            checks = pickle.dumps(self.checks)  # They have begun by now.
            self._pool = ProcessPoolExecutor(self.processes, _context(), _hold, (checks,))
        self._waiting.append((batch, self._pool.submit(_measure, batch)))
        while self._waiting:
            crowded = len(self._waiting) > AHEAD * self.processes
            if not (crowded or self._waiting[0][1].done()):
                return
            yield self._next()

    def rest(self) -> Iterator[Measured]:
        """Those that are not measured yet, in order."""
        while self._waiting:
            yield self._next()

    def _next(self) -> Measured:
        batch, future = self._waiting.popleft()
        return batch, future.result()


def _context() -> BaseContext:
    """Not forked from this process, as the tokenizer may hold threads; where there is none that only
    imports, each starts anew."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["luthier.inspection.preloaded"])
    return context


_held: Sequence[Check] = ()
"""The checks of a measuring process."""


def _hold(checks: bytes) -> None:
    global _held
    _held = pickle.loads(checks)  # noqa: S301 - what our own parent has just made


def _measure(batch: Batch) -> list[Any]:
    return [check.measure(batch) for check in _held]
