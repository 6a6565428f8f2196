"""How much memory may hold the keys and values of sequences."""

from __future__ import annotations

import threading


class CacheBudget:
    """Memory for the keys and values of all models together. Safe to share between threads."""

    def __init__(self, total: int) -> None:
        """``total`` bytes."""
        self.total, self.taken = total, 0
        self._lock = threading.Lock()

    def take(self, size: int) -> bool:
        """Reserve ``size`` bytes, where they are free."""
        with self._lock:
            fits = self.taken + size <= self.total
            self.taken += size if fits else 0
        return fits

    def give(self, size: int) -> None:
        """Give them back."""
        with self._lock:
            self.taken -= size
