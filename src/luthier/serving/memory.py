"""How much memory may hold the keys and values of sequences, and the kernels that read them."""

from __future__ import annotations

import os
import threading

KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""Variables that oneDNN, and PyTorch above it, read when torch is loaded."""
KERNELS = 128
"""Kernels that each of the two caches keeps."""


def bound_kernels() -> None:
    """Keep memory flat where products come in ever new sizes; to be called before torch is loaded.

    oneDNN makes a kernel for each number of sequences and each length, and keeps 1,024 of them: half a
    megabyte each. A step needs some dozens. Numbers that the user has set stay.
    """
    for name in KERNEL_CACHES:
        os.environ.setdefault(name, str(KERNELS))


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
