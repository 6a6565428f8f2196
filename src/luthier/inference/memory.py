"""Memory for keys, values and activations, and the return of freed memory to the system.

The allocator keeps freed memory in one heap per thread, and returns only the end of each heap.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from luthier.engine.machine import return_freed_memory, set_malloc_threshold
from luthier.inference.scheduler import decrement

LARGE_BLOCK = 4 << 20
"""Size in bytes from which the allocator maps a block separately and returns the block when freed."""
GROWTH = 32 << 20
"""Growth of the process, in bytes, that counts as a load."""
ROUNDS = 10
"""Number of times freed memory is returned after a load."""


def resident_bytes() -> int:
    """Return the resident memory of the process in bytes, or 0 if the system does not report the
    size."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


class FreedMemory:
    """A thread that returns freed memory to the system after a load.

    Works with the GNU C library only, because no other library has the call.
    """

    def __init__(self, seconds: float = 1.0) -> None:
        """Check the process every ``seconds``."""
        self.seconds = seconds
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread and map large blocks separately."""
        # By default glibc serves blocks of up to 32 MiB from its heaps after the first such free,
        # keeps up to 64 MiB at the end of each heap, and has eight heaps per core.
        if set_malloc_threshold(LARGE_BLOCK):
            self._thread = threading.Thread(target=self._run, name="freed-memory", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Stop."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        lowest, rounds = resident_bytes(), 0
        while not self._closed.wait(self.seconds):
            now = resident_bytes()
            if now > lowest + GROWTH:
                rounds = ROUNDS
            if not rounds:
                lowest = min(lowest, now)
                continue
            # Repeated, because memory freed later does not trigger a check by growth.
            return_freed_memory()
            lowest, rounds = resident_bytes(), rounds - 1


RETRY_SECONDS = 0.05
"""Retry interval in seconds for memory or time of another model: models send no notification."""


class CacheBudget:
    """Memory budget for the keys and values of all models. Safe to share between threads.

    The only request of a client may exceed the client's share.
    """

    def __init__(self, total: int, per_client: int | None = None) -> None:
        """Create a budget of ``total`` bytes, at most ``per_client`` bytes for one client."""
        self.total, self.per_client = total, total if per_client is None else per_client
        self._reserved: Counter[str] = Counter()
        self._spare = 0
        self._reclaim: Callable[[int], None] = lambda size: None
        self._lock = threading.Lock()

    def on_shortage(self, reclaim: Callable[[int], None]) -> None:
        """Call ``reclaim`` with the number of bytes to free from :meth:`reserve_spare`."""
        self._reclaim = reclaim

    @property
    def reserved_bytes(self) -> int:
        """Number of reserved bytes."""
        with self._lock:
            return self._reserved.total()

    def allows(self, client: str, size: int) -> bool:
        """Return whether the share of ``client`` allows ``size`` more bytes."""
        # The first request always passes; otherwise one larger than the share would never run.
        return not self._reserved[client] or self._reserved[client] + size <= self.per_client

    def reserve(self, client: str, size: int) -> bool:
        """Reserve ``size`` bytes if the total and the share of ``client`` allow the reservation."""
        with self._lock:
            if not self.allows(client, size) or self._reserved.total() + size > self.total:
                return False
            # Before the cache shrinks, so that no other request can take the freed bytes.
            self._reserved[client] += size
            shortage = self._reserved.total() + self._spare - self.total
        if shortage > 0:
            # Outside the lock: the prefix cache acquires its own lock first and this lock second.
            self._reclaim(shortage)
        return True

    def release(self, client: str, size: int) -> None:
        """Return ``size`` reserved bytes."""
        with self._lock:
            decrement(self._reserved, client, size)

    def reserve_spare(self, size: int) -> bool:
        """Reserve ``size`` free bytes until a request needs the memory."""
        with self._lock:
            fits = self._reserved.total() + self._spare + size <= self.total
            self._spare += size if fits else 0
        return fits

    def release_spare(self, size: int) -> None:
        """Return ``size`` spare bytes."""
        with self._lock:
            self._spare -= size
