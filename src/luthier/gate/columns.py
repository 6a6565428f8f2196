"""Numbers of each row, in memory while they are few and in a temporary file beyond."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

MEMORY_LIMIT = 4 << 20
"""Maximum size of all columns of a table in memory, in bytes."""


class Column:
    """An append-only column of numbers, in memory or in a temporary file."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = np.dtype(dtype)
        self.length = 0
        self._parts: list[NDArray[Any]] = []
        self._file: IO[bytes] | None = None

    def append(self, values: NDArray[Any]) -> None:
        """Add numbers at the end."""
        self._parts.append(np.ascontiguousarray(values, self.dtype))
        self.length += len(values)

    def spill(self) -> None:
        """Move all values to an unnamed file, which disappears with the column or the process."""
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the column
            weakref.finalize(self, self._file.close)
        self._file.seek(0, os.SEEK_END)
        for part in self._parts:
            self._file.write(part.data)
        self._parts = []

    def read(self) -> NDArray[Any]:
        """All numbers, in memory."""
        if self._file is None:
            self._parts = [np.concatenate(self._parts)] if self._parts else []
            return self._parts[0] if self._parts else np.zeros(0, self.dtype)
        self.spill()
        self._file.flush()
        self._file.seek(0)
        return np.fromfile(self._file, self.dtype, self.length)

    def gather(self, starts_N: NDArray[np.int64], counts_N: NDArray[np.int64]) -> NDArray[Any]:
        """Return the concatenation of the runs that start at ``starts_N``."""
        if self._file is None:
            firsts_N = np.cumsum(counts_N) - counts_N
            within = np.arange(counts_N.sum()) + np.repeat(starts_N - firsts_N, counts_N)
            found: NDArray[Any] = self.read()[within]
            return found
        if self._parts:
            self.spill()
        self._file.flush()
        return np.frombuffer(b"".join(self._runs(starts_N, counts_N)), self.dtype)

    def _runs(self, starts_N: Any, counts_N: Any) -> Iterator[bytes]:
        # Not by a memory map: the pages that it touches would count as memory of the process.
        handle, size = self._file.fileno(), self.dtype.itemsize  # type: ignore[union-attr]
        for start, count in zip(
            (starts_N * size).tolist(), (counts_N * size).tolist(), strict=True
        ):
            yield os.pread(handle, count, start)


class ColumnStore:
    """Named columns that move to disk together beyond ``limit`` bytes."""

    def __init__(self, limit: int = MEMORY_LIMIT) -> None:
        self.limit = limit
        self._columns: dict[str, Column] = {}
        self._held = 0

    def append(self, name: str, values: NDArray[Any]) -> None:
        """Append values to a column. The first call creates the column."""
        if name not in self._columns:
            self._columns[name] = Column(values.dtype)
        self._columns[name].append(values)
        self._held += values.nbytes
        if self._held > self.limit:
            for column in self._columns.values():
                column.spill()
            self._held = 0

    def __getitem__(self, name: str) -> Column:
        return self._columns[name]

    def read(self, name: str) -> NDArray[Any]:
        """All numbers of a column, in memory."""
        return self._columns[name].read()
