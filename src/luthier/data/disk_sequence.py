"""Sequences that move to disk when they grow, for data sets larger than memory.

A small sequence is a list. Beyond :data:`MEMORY_LIMIT`, the items are pickled to an unnamed
temporary file, which disappears with the sequence or the process. Each access of an item on disk
returns a new object.
"""

from __future__ import annotations

import io
import os
import pickle
import tempfile
import weakref
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import IO, Any, TypeVar, overload

from luthier.data.inputs import Media, Processor
from luthier.errors import LuthierError
from luthier.files import disk_errors
from luthier.types import IntArray

T = TypeVar("T")
MEMORY_LIMIT = 16 << 20
"""Most pickled bytes of a sequence in memory; the objects take two to three times as much."""
SAMPLE_EVERY = 32
"""At least every N-th item is pickled to estimate the size."""
BUFFER = 1 << 20
"""Bytes per write and per sequential read."""


def spool(items: Iterable[T], limit: int | None = None) -> Sequence[T]:
    """Return all ``items``: a list up to about ``limit`` bytes (:data:`MEMORY_LIMIT`), else on
    disk.

    Raises:
        DiskFull: if the temporary folder has no space.
    """
    limit = MEMORY_LIMIT if limit is None else limit
    in_memory, size, measured, step = list[T](), 0, 0, 1
    source = iter(items)
    for item in source:
        in_memory.append(item)
        if len(in_memory) == measured + step:
            one = len(pickle.dumps(item))
            size, measured = size + step * one, len(in_memory)
            if size > limit:
                return _OnDisk(chain(_drain(in_memory), source))
            step = max(1, min(SAMPLE_EVERY, limit // (64 * one)))  # every item if items are large
    return in_memory


def select(items: Sequence[T], rows: IntArray) -> Sequence[T]:
    """Return a lazy view of the items at ``rows``, like torch's ``Subset``."""
    return (
        [items[row] for row in rows.tolist()] if isinstance(items, list) else _Subset(items, rows)
    )


def concatenate(parts: Iterable[Sequence[T]]) -> Sequence[T]:
    """Return a lazy concatenation of ``parts``, like torch's ``ConcatDataset``."""
    filled = [part for part in parts if len(part)]
    if len(filled) == 1:
        return filled[0]
    return [*chain(*filled)] if all(isinstance(part, list) for part in filled) else _Concat(filled)


def _drain(items: list[T]) -> Iterator[T]:
    """Yield the items in order and release each item."""
    items.reverse()
    while items:
        yield items.pop()


class _Lazy(Sequence[T]):
    """A sequence by :meth:`item`."""

    def item(self, index: int) -> T:
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self.item(each) for each in range(*index.indices(len(self)))]
        index += len(self) if index < 0 else 0
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.item(index)

    def __iter__(self) -> Iterator[T]:
        return map(self.item, range(len(self)))


class _Subset(_Lazy[T]):
    def __init__(self, items: Sequence[T], rows: IntArray) -> None:
        self._items, self._rows = items, rows

    def __len__(self) -> int:
        return len(self._rows)

    def item(self, index: int) -> T:
        return self._items[int(self._rows[index])]


class _Concat(_Lazy[T]):
    def __init__(self, parts: Sequence[Sequence[T]]) -> None:
        self._parts, self._ends = parts, [*accumulate(map(len, parts))]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def item(self, index: int) -> T:
        part = bisect_right(self._ends, index)
        return self._parts[part][index - (self._ends[part - 1] if part else 0)]

    def __iter__(self) -> Iterator[T]:
        return chain(*self._parts)


class _OnDisk(_Lazy[T]):
    """Pickled items in an unnamed temporary file.

    Objects that many items share (processors, and arrays of some inputs) stay in memory.
    """

    def __init__(self, items: Iterable[T]) -> None:
        try:
            self._folder = Path(tempfile.gettempdir())
        except FileNotFoundError as error:
            raise LuthierError(
                "the rows do not fit into memory, and no temporary folder is writable. Set TMPDIR"
            ) from error
        with disk_errors(self._folder):
            # Unbuffered: after a full disk, closing a buffered file would write the rest again.
            self._file: IO[bytes] = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - lives as long
        weakref.finalize(self, self._file.close)
        self._ends = array("Q")
        self._shared: list[Any] = []
        numbers: dict[int, int] = {}
        scratch, written = io.BytesIO(), 0
        for item in items:
            _Pickler(scratch, self._shared, numbers).dump(item)
            self._ends.append(written + scratch.tell())
            if scratch.tell() >= BUFFER:
                written = self._append(scratch)
        self._append(scratch)

    def _append(self, scratch: io.BytesIO) -> int:
        """Append ``scratch`` to the file; return the file size."""
        written, size = 0, scratch.tell()
        with scratch.getbuffer() as data, disk_errors(self._folder):
            while written < size:
                # After an error, no slice may remain: Python 3.13 then cannot free the buffer.
                written += self._file.write(data[written:size])
        scratch.seek(0)
        return self._ends[-1] if self._ends else 0

    def __len__(self) -> int:
        return len(self._ends)

    def item(self, index: int) -> T:
        start = self._ends[index - 1] if index else 0
        return self._load(os.pread(self._file.fileno(), self._ends[index] - start, start))

    def __iter__(self) -> Iterator[T]:
        first = 0
        while first < len(self._ends):
            start = self._ends[first - 1] if first else 0
            last = max(first + 1, bisect_right(self._ends, start + BUFFER))
            data = memoryview(os.pread(self._file.fileno(), self._ends[last - 1] - start, start))
            at = 0
            for index in range(first, last):
                yield self._load(data[at : (at := self._ends[index] - start)])
            first = last

    def _load(self, data: bytes | memoryview) -> T:
        item: T = _Unpickler(io.BytesIO(data), self._shared).load()
        return item


class _Pickler(pickle.Pickler):
    def __init__(self, file: IO[bytes], shared: list[Any], numbers: dict[int, int]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._shared, self._numbers = shared, numbers

    def persistent_id(self, obj: Any) -> int | None:
        """Return the index of an object that stays in memory."""
        if not isinstance(obj, Media | Processor) or (isinstance(obj, Media) and obj.array is None):
            return None
        number = self._numbers.setdefault(id(obj), len(self._shared))
        if number == len(self._shared):
            self._shared.append(obj)
        return number


class _Unpickler(pickle.Unpickler):
    """Unpickler for the process's own unnamed file."""

    def __init__(self, file: IO[bytes], shared: list[Any]) -> None:
        super().__init__(file)
        self._shared = shared

    def persistent_load(self, pid: Any) -> Any:
        """Return an object that stayed in memory."""
        return self._shared[pid]
