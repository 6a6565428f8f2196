"""Sequences that go to disk when they grow: a data set need not fit into memory.

A list stays a list while it is small. Beyond :data:`MEMORY_LIMIT` its items lie in a temporary file,
which has no name and is gone with the sequence or the process, and are read when they are asked for.
Whoever takes rows by ``Sequence`` sees no difference but that an item asked for twice is two objects.
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
"""Bytes, pickled, of a sequence that stays in memory, where it takes two or three times as many."""
SAMPLE_EVERY = 32
"""At least one item in so many is pickled to see how large they are."""
BUFFER = 1 << 20
"""Bytes that are written, and read in order, at once."""


def spool(items: Iterable[T], limit: int | None = None) -> Sequence[T]:
    """All ``items`` in order: a list up to about ``limit`` bytes (:data:`MEMORY_LIMIT`), else on disk.

    Raises:
        DiskFull: where the temporary file finds no room.
    """
    limit = MEMORY_LIMIT if limit is None else limit
    held, size, weighed, step = list[T](), 0, 0, 1
    source = iter(items)
    for item in source:
        held.append(item)
        if len(held) == weighed + step:
            one = len(pickle.dumps(item))
            size, weighed = size + step * one, len(held)
            if size > limit:
                return _OnDisk(chain(_drain(held), source))
            step = max(1, min(SAMPLE_EVERY, limit // (64 * one)))  # each of large ones
    return held


def select(items: Sequence[T], rows: IntArray) -> Sequence[T]:
    """The items at ``rows``, in that order: torch's ``Subset``."""
    return (
        [items[row] for row in rows.tolist()] if isinstance(items, list) else _Subset(items, rows)
    )


def concatenate(parts: Iterable[Sequence[T]]) -> Sequence[T]:
    """The items of all ``parts``, one after the other: torch's ``ConcatDataset``."""
    filled = [part for part in parts if len(part)]
    if len(filled) == 1:
        return filled[0]
    return [*chain(*filled)] if all(isinstance(part, list) for part in filled) else _Concat(filled)


def _drain(items: list[T]) -> Iterator[T]:
    """The items in order, each let go of when it is taken."""
    items.reverse()
    while items:
        yield items.pop()


class _Lazy(Sequence[T]):
    """A sequence by :meth:`item`."""

    def item(self, index: int) -> T:
        """The item at ``index``, which there is."""
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
    """Pickled items in a temporary file that this process alone can open.

    What many items share stays in memory: processors of images and sounds, and the arrays that some of
    those are.
    """

    def __init__(self, items: Iterable[T]) -> None:
        try:
            self._folder = Path(tempfile.gettempdir())
        except FileNotFoundError as error:
            raise LuthierError(
                "the rows are too many for memory, and no folder for temporary files can be written. "
                "Set TMPDIR to one"
            ) from error
        with disk_errors(self._folder):
            # Not buffered: what a full disk refused would be written once more when the file is closed.
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
        """Move what ``scratch`` holds to the end of the file; the size of the file."""
        with scratch.getbuffer() as data, disk_errors(self._folder):
            left = data[: scratch.tell()]
            while left:
                left = left[self._file.write(left) :]
            left.release()
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
        found: T = _Unpickler(io.BytesIO(data), self._shared).load()
        return found


class _Pickler(pickle.Pickler):
    def __init__(self, file: IO[bytes], shared: list[Any], numbers: dict[int, int]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._shared, self._numbers = shared, numbers

    def persistent_id(self, obj: Any) -> int | None:
        """The place among the shared objects of one that stays in memory."""
        if not isinstance(obj, Media | Processor) or (isinstance(obj, Media) and obj.array is None):
            return None
        number = self._numbers.setdefault(id(obj), len(self._shared))
        if number == len(self._shared):
            self._shared.append(obj)
        return number


class _Unpickler(pickle.Unpickler):
    """Reads what this process wrote to a file that nobody else can open."""

    def __init__(self, file: IO[bytes], shared: list[Any]) -> None:
        super().__init__(file)
        self._shared = shared

    def persistent_load(self, pid: Any) -> Any:
        """The object that stayed in memory."""
        return self._shared[pid]
