"""Work for a request ends when its client hangs up, also where nothing is sent yet.

A stream is watched while it is sent (``luthier.api.sending``). An answer that is sent whole is worked
on in a thread that waits for a model or a process; here its connection is watched meanwhile, from the
moment that work begins: all other requests cost nothing.
"""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress

from luthier.api.sending import Receive, Run, hung_up
from luthier.cancellation import Cancellable


class Attendant:
    """Stands beside one request. Make it in the event loop; :meth:`take` is called by any thread."""

    def __init__(self, receive: Receive, run: Run) -> None:
        """``run`` calls what may block, in a thread."""
        self._loop = asyncio.get_running_loop()
        self._receive, self._run = receive, run
        self._lock = threading.Lock()
        self._works: list[Cancellable] = []
        self._gone = self._ended = False
        self._watching: asyncio.Task[None] | None = None

    def take(self, work: Cancellable) -> None:
        """Close ``work`` when the client hangs up, or at once where it has."""
        with self._lock:
            self._works.append(work)
            gone, first = self._gone, len(self._works) == 1
        if gone:
            work.close()
        elif first:
            self._loop.call_soon_threadsafe(self._watch)

    async def end(self) -> bool:
        """Watch no longer: the answer is there. Whether the client is gone."""
        self._ended = True
        if self._watching is not None:
            if not self._gone:
                self._watching.cancel()
            with suppress(asyncio.CancelledError):
                await self._watching
        return self._gone

    def _watch(self) -> None:
        if not self._ended:
            self._watching = asyncio.ensure_future(self._wait())

    async def _wait(self) -> None:
        await hung_up(self._receive)
        with self._lock:
            self._gone, works = True, list(self._works)
        for work in works:
            await self._run(work.close)
