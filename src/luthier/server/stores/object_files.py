"""Files with the bytes of objects, with random names, by account.

A client's key never becomes a path. A file is on disk before a database row names the file, and is
deleted only after no row does. A killed process therefore leaves unnamed files, which
:meth:`ObjectFiles.sweep` removes.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from luthier.errors import CorruptFile, DiskFull
from luthier.files import disk_errors, free_bytes, luthier_home, new_file

READ_SIZE = 1 << 20
"""Size of a piece of an object in memory, in bytes."""
LEAST_FREE = 16_000_000
"""Free disk space after a write, in bytes: the database needs space, also to delete objects."""
UNNAMED_SECONDS = 600.0
"""Age of unnamed files before removal, in seconds. Newer files may belong to a running request."""


@dataclass(frozen=True)
class WrittenFile:
    """A complete file on disk."""

    id: str
    size: int
    md5: str
    sha256: str


class FileWriter:
    """Context manager of a new file, which is deleted unless finished."""

    def __init__(self, folder: Path, file_id: str) -> None:
        """Begin the file ``file_id`` in ``folder``."""
        self._id, self._folder = file_id, folder
        self._size = 0
        self._md5 = hashlib.md5(usedforsecurity=False)
        self._sha256 = hashlib.sha256()
        self._context = new_file(folder / file_id)
        self._file = self._context.__enter__()
        self._open = True

    def __enter__(self) -> FileWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._open:
            self._open = False
            reason = error or _Abandoned()
            # new_file removes the file when its context ends with an exception.
            with suppress(_Abandoned):
                self._context.__exit__(type(reason), reason, trace)

    def write(self, data: bytes) -> None:
        """Append ``data``.

        Raises:
            DoesNotFit: if the disk is full.
        """
        if free_bytes(self._folder) < LEAST_FREE + len(data):
            raise DiskFull(f"the disk of {self._folder} is full")
        with disk_errors(self._folder):
            self._file.write(data)
        self._size += len(data)
        self._md5.update(data)
        self._sha256.update(data)

    def finish(self) -> WrittenFile:
        """Flush the file to disk and rename the file to its final name."""
        self._open = False
        self._context.__exit__(None, None, None)
        return WrittenFile(self._id, self._size, self._md5.hexdigest(), self._sha256.hexdigest())


class _Abandoned(Exception):
    """A file was not finished."""


class ObjectFiles:
    """Files of all accounts below one folder: ``<account>/<first two of the id>/<id>``."""

    def __init__(self, folder: Path | None = None) -> None:
        """``folder`` is ``objects`` in the store by default."""
        self.folder = folder or luthier_home() / "objects"

    def begin(self, account: str) -> FileWriter:
        """Return a new file, to be used in a ``with``."""
        file_id = secrets.token_hex(16)
        return FileWriter(self.path(account, file_id).parent, file_id)

    def path(self, account: str, file_id: str) -> Path:
        """Return the path of a file."""
        return self.folder / account / file_id[:2] / file_id

    def link(self, account: str, file_id: str) -> str:
        """Create a second name for the bytes of a file and return its id.

        Raises:
            FileNotFoundError: if the file was removed meanwhile.
        """
        copy = secrets.token_hex(16)
        target = self.path(account, copy)
        with disk_errors(target.parent):
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(self.path(account, file_id), target)
        return copy

    def remove(self, account: str, file_ids: Iterable[str]) -> None:
        """Remove files that no row names."""
        for file_id in file_ids:
            self.path(account, file_id).unlink(missing_ok=True)

    def read(
        self,
        account: str,
        files: Sequence[tuple[str, int]],
        start: int,
        length: int,
    ) -> Iterator[bytes]:
        """Yield ``length`` bytes from ``start`` of concatenated files.

        Args:
            account: account that owns the files.
            files: ids and sizes in bytes, in order.
            start: first byte, counted from 0.
            length: number of bytes, at most the number of bytes after ``start``.

        Raises:
            FileNotFoundError: before the first piece, if a file was removed meanwhile.
            CorruptFile: if a file is shorter than recorded or cannot be opened.
        """
        for file_id, size in files:
            if start >= size:
                start -= size
                continue
            left = min(size - start, length)
            length -= left
            path = self.path(account, file_id)
            for data in _bytes(path, start, left):
                left -= len(data)
                yield data
            if left:
                raise CorruptFile(f"{path} is shorter than recorded")
            start = 0
            if not length:
                return

    def sweep(self, named: Callable[[str], set[str]], older_than: float = UNNAMED_SECONDS) -> int:
        """Remove files that no row names, and return their number.

        Args:
            named: returns the ids in rows that begin with the given two characters.
            older_than: age of removed files since the last change, in seconds.
        """
        newest, removed = time.time() - older_than, 0
        for folder in sorted(self.folder.glob("*/??")):
            # List files before rows: a file that gets a row in between stays.
            seen = [path for path in folder.iterdir() if _change_time(path) <= newest]
            known = named(folder.name) if seen else set()
            for path in seen:
                if path.name not in known:
                    path.unlink(missing_ok=True)
                    removed += 1
        return removed


def _bytes(path: Path, start: int, length: int) -> Iterator[bytes]:
    """Yield at most ``length`` bytes of a file from ``start``."""
    with path.open("rb") as file:
        file.seek(start)
        while length and (data := file.read(min(length, READ_SIZE))):
            length -= len(data)
            yield data


def _change_time(path: Path) -> float:
    """Return the time of a file's last write, rename or link; infinity for a removed file."""
    try:
        return path.stat().st_ctime
    except FileNotFoundError:
        return float("inf")
