"""How much memory may hold the keys and values of sequences, and the kernels that read them.

And how it is given back: what is freed stays with the allocator, which keeps a heap for each of
many threads, and gives back of each only what lies at its end.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from luthier.engine.machine import return_freed_memory, set_malloc_threshold
from luthier.inference.scheduler import discount

LARGE_BLOCK = 4 << 20
"""Bytes of a block that the system gives alone, and has back as soon as it is freed."""
GROWTH = 32 << 20
"""Bytes by which a load has grown the process."""
ROUNDS = 10
"""How often freed memory is given back after a load has grown the process."""


def resident_bytes() -> int:
    """Memory that this process holds now; 0 where the system does not tell."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


class FreedMemory:
    """Gives memory that was freed back to the system, soon after a load has grown the process.

    For the GNU C library: others have no such call, and nothing is done there.
    """

    def __init__(self, seconds: float = 1.0) -> None:
        """Look every ``seconds``, and act where there are ``GROWTH`` bytes more than before."""
        self.seconds = seconds
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to look; from here on large blocks lie apart from others."""
        # By default the library takes blocks of up to 32 MiB from its heaps once it has seen such a one
        # freed, keeps up to 64 MiB at the end of each heap, and there are eight for each core.
        if set_malloc_threshold(LARGE_BLOCK):
            self._thread = threading.Thread(target=self._run, name="freed-memory", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Stop."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        least, rounds = resident_bytes(), 0
        while not self._closed.wait(self.seconds):
            now = resident_bytes()
            if now > least + GROWTH:
                rounds = ROUNDS
            if not rounds:
                least = min(least, now)
                continue
            # Again for a while: what is freed later grows nothing, and stays as well.
            return_freed_memory()
            least, rounds = resident_bytes(), rounds - 1


RETRY_SECONDS = 0.05
"""How often memory, or time, that other models have is asked for again: they do not tell."""


class CacheBudget:
    """Memory for the keys and values of all models together. Safe to share between threads.

    What a client's only request takes may be more than the client's part.
    """

    def __init__(self, total: int, per_client: int | None = None) -> None:
        """``total`` bytes, ``per_client`` of them for one client at most."""
        self.total, self.per_client = total, total if per_client is None else per_client
        self._held: Counter[str] = Counter()
        self._spare = 0
        self._reclaim: Callable[[int], None] = lambda size: None
        self._lock = threading.Lock()

    def on_shortage(self, reclaim: Callable[[int], None]) -> None:
        """``reclaim`` is asked to give back so many of the bytes of :meth:`take_spare`."""
        self._reclaim = reclaim

    @property
    def reserved_bytes(self) -> int:
        """Bytes that are reserved."""
        with self._lock:
            return self._held.total()

    def allows(self, client: str, size: int) -> bool:
        """Whether ``client`` may have ``size`` bytes more, as far as its own part goes."""
        return not self._held[client] or self._held[client] + size <= self.per_client

    def take(self, client: str, size: int) -> bool:
        """Reserve ``size`` bytes, where they are free and ``client`` may have them."""
        with self._lock:
            if not self.allows(client, size) or self._held.total() + size > self.total:
                return False
            self._held[client] += size
            shortage = self._held.total() + self._spare - self.total
        if shortage > 0:
            self._reclaim(shortage)
        return True

    def give(self, client: str, size: int) -> None:
        """Give them back."""
        with self._lock:
            discount(self._held, client, size)

    def take_spare(self, size: int) -> bool:
        """Have ``size`` bytes until a request needs them, where they are free."""
        with self._lock:
            fits = self._held.total() + self._spare + size <= self.total
            self._spare += size if fits else 0
        return fits

    def give_back_spare(self, size: int) -> None:
        """Give them back."""
        with self._lock:
            self._spare -= size
