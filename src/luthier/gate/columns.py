"""Numbers of each row, in memory while they are few and in a temporary file beyond."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable, Iterator
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from luthier.types import IntArray

MEMORY_LIMIT = 4 << 20
"""Bytes of all columns of a table that stay in memory."""
CHUNK = 1 << 20
"""Numbers of a column that are read at once."""
PART = 1 << 20
"""Rows, about, of which all columns are in memory at once when rows are brought together by a key."""


class Column:
    """Numbers of one type that are appended and then read."""

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
        """Move all to the file, which has no name and is gone with the column or the process."""
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

    def chunks(self, size: int = CHUNK) -> Iterator[NDArray[Any]]:
        """All numbers in pieces of ``size``, so that a column on disk is never in memory as a whole."""
        if self._file is None:
            whole = self.read()
            yield from (whole[start : start + size] for start in range(0, self.length, size))
            return
        self.spill()
        self._file.flush()
        handle, width = self._file.fileno(), self.dtype.itemsize
        for start in range(0, self.length, size):
            count = min(size, self.length - start)
            yield np.frombuffer(os.pread(handle, count * width, start * width), self.dtype)

    def gather(self, starts_N: NDArray[np.int64], counts_N: NDArray[np.int64]) -> NDArray[Any]:
        """The runs that begin at ``starts_N``, one after the other."""
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
    """Columns that go to disk together when they have grown beyond ``limit`` bytes."""

    def __init__(self, limit: int = MEMORY_LIMIT) -> None:
        self.limit = limit
        self._columns: dict[str, Column] = {}
        self._held = 0

    def append(self, name: str, values: NDArray[Any]) -> None:
        """Add numbers to a column, which is made when it is first named."""
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

    def chunks(self, *names: str) -> Iterator[tuple[NDArray[Any], ...]]:
        """Columns of the same length side by side, in pieces."""
        return zip(*(self._columns[name].chunks() for name in names), strict=True)


Chunks = Callable[[], Iterator[tuple[NDArray[Any], ...]]]
"""Columns side by side in pieces, as often as they are asked for."""


def partition(
    chunks: Chunks, total: int, size: int = PART
) -> Iterator[tuple[IntArray, list[NDArray[Any]]]]:
    """Rows in parts of about ``size``: those with the same value of the first column are in one.

    Each part is the numbers of its rows, ascending, and their columns. The first column holds keys
    whose lower bits are evenly spread; the others may be of any type.
    """
    parts = max(1, -(-total // size))
    for part in range(parts):
        numbers, held, start = [], [], 0
        for columns in chunks():
            here = np.flatnonzero(columns[0] % np.uint64(parts) == np.uint64(part))
            numbers.append(here + start)
            held.append([column[here] for column in columns])
            start += len(columns[0])
        if numbers:
            yield (
                np.concatenate(numbers),
                [np.concatenate(each) for each in zip(*held, strict=True)],
            )
