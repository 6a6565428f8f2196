"""Bytes of objects: files with random names, by account. A key of a client never becomes a path.

Where there is a shared store (``luthier.store.shared``), each file is there as well, and a machine that
lacks one fetches it when it is read.

A file is on disk before a row of the database names it, and leaves the disk only after no row does, so
a process that dies in between leaves files that nobody names: :meth:`ObjectFiles.sweep` removes them.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType

from luthier.encryption.chunks import SealedReader
from luthier.encryption.files import new_data_file
from luthier.encryption.keys import keys_for, needed_keyring
from luthier.errors import CorruptFile, DiskFull, QuotaExceeded
from luthier.files import disk_errors, luthier_home, room
from luthier.store.shared import OBJECTS, StoredFile, fetch_shared, shared_store

READ_SIZE = 1 << 20
"""Bytes that are held of an object while it is read."""
SEALED = ".sealed"
"""Ending of the ids of encrypted files. Told by the row, as bytes of a client could look like one."""
LEAST_FREE = 16_000_000
"""Bytes that objects leave on their disk: the database needs some, to delete objects too."""
UNNAMED_SECONDS = 600.0
"""A file that no row names may belong to a request that is not done; one this old does not."""


@dataclass(frozen=True)
class WrittenFile:
    """A file that is whole and on disk."""

    id: str
    size: int
    """Bytes."""
    md5: str
    sha256: str
    """Both in hexadecimal."""


@dataclass(frozen=True)
class Room:
    """What an account had left when a file was begun."""

    quota: int
    """Bytes that it may store."""
    used: int
    """Bytes that it stores, those of files in the making not counted."""
    freed: int = 0
    """Bytes among them that go when this file gets its name."""


class InFlight:
    """Bytes of files in the making, by account, of this process: no row counts them yet."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes: Counter[str] = Counter()

    def add(self, account: str, size: int) -> int:
        """``size`` bytes more, or less; how many the account has then."""
        with self._lock:
            self._bytes[account] += size
            now = self._bytes[account]
            if not now:
                del self._bytes[account]
            return now


class FileWriter:
    """A file as it is being written: gone at the end of its ``with`` unless it was finished."""

    def __init__(
        self,
        folder: Path,
        file_id: str,
        take: Callable[[int], int] = lambda size: size,
        room: Room | None = None,
        share: Callable[[Path], None] = lambda path: None,
    ) -> None:
        """Begin.

        Args:
            folder: where the file is made.
            file_id: its name.
            take: counts bytes in flight and says how many there are.
            room: in which they have to fit, if given.
            share: lets other machines have the whole file.
        """
        self._id, self._folder, self._share = file_id, folder, share
        self._take, self._room, self._taken = take, room, 0
        self._size = 0
        self._md5 = hashlib.md5(usedforsecurity=False)
        self._sha256 = hashlib.sha256()
        self._context = new_data_file(folder / file_id)
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
        # Until here they were in flight: rows that name them are committed within the ``with``.
        self._take(-self._taken)
        self._taken = 0
        if self._open:
            self._open = False
            reason = error or _Abandoned()
            # The file is removed by passing on what ended the block.
            with suppress(_Abandoned):
                self._context.__exit__(type(reason), reason, trace)

    def write(self, data: bytes) -> None:
        """Add ``data``.

        Raises:
            DoesNotFit: where the disk is full.
            QuotaExceeded: where the account has no room for it beside its other files in flight.
        """
        self._taken += len(data)
        flying, left = self._take(len(data)), self._room
        # Who has more than a quota that was lowered may still replace what there is.
        if left is not None and flying > max(0, left.quota - left.used) + left.freed:
            raise QuotaExceeded(
                f"The account may have {left.quota:,} bytes (quota stored_bytes), has {left.used:,}, "
                f"and {flying:,} more are on their way. Delete some of what it stores, or have the "
                "operator of the server raise the quota.",
                "stored_bytes",
            )
        if room(self._folder) < LEAST_FREE + len(data):
            raise DiskFull(f"the disk of {self._folder} is full; no further objects are taken")
        with disk_errors(self._folder):
            self._file.write(data)
        self._size += len(data)
        self._md5.update(data)
        self._sha256.update(data)

    def finish(self) -> WrittenFile:
        """Force it to disk, give it its name, and let other machines have it."""
        self._open = False
        self._context.__exit__(None, None, None)
        try:
            self._share(self._folder / self._id)
        except BaseException:
            (self._folder / self._id).unlink(missing_ok=True)
            raise
        return WrittenFile(self._id, self._size, self._md5.hexdigest(), self._sha256.hexdigest())


class _Abandoned(Exception):
    """A file was not finished."""


class ObjectFiles:
    """The files of all accounts below one folder: ``<account>/<first two of the id>/<id>``."""

    def __init__(self, folder: Path | None = None) -> None:
        """``folder`` is ``objects`` in the store unless said otherwise; only that one is shared."""
        self.folder = folder or luthier_home() / "objects"
        self.shared = shared_store() if folder is None else None
        """Where its files are, too; ``None`` where nothing is shared."""
        self._in_flight = InFlight()

    def begin(self, account: str, room: Room | None = None) -> FileWriter:
        """A new file, to be used in a ``with``; without a ``room`` as large as the disk."""
        file_id = secrets.token_hex(16) + (SEALED if keys_for(self.folder) else "")
        take = partial(self._in_flight.add, account)
        share = partial(self._put, account)
        return FileWriter(self.path(account, file_id).parent, file_id, take, room, share)

    def _put(self, account: str, path: Path) -> None:
        if self.shared is not None:
            self.shared.put(_key(account, path.name), path)

    def _fetch(self, account: str, file_id: str, expected: StoredFile | None) -> Path:
        """Where a file is on this machine, fetched if it has to be."""
        path = self.path(account, file_id)
        if self.shared is None:
            return path
        try:
            os.utime(path)  # its last use, of which the oldest are dropped first
        except FileNotFoundError:
            fetch_shared(self.shared, _key(account, file_id), path, expected)
        return path

    def is_shared(self, account: str, file_id: str) -> bool:
        """Whether the shared store has a file, so that this machine need not."""
        return self.shared is not None and self.shared.exists(_key(account, file_id))

    def exists(self, account: str, file_id: str) -> bool:
        """Whether a file is here, or in the shared store."""
        return self.path(account, file_id).exists() or self.is_shared(account, file_id)

    def path(self, account: str, file_id: str) -> Path:
        """Where a file is."""
        return self.folder / account / file_id[:2] / file_id

    def link(self, account: str, file_id: str, size: int, digest: str) -> str:
        """Id of a second name for the bytes of a file, which live as long as either.

        Args:
            account: whose it is.
            file_id: its id.
            size: of its content, in bytes.
            digest: SHA-256 of its content, which is compared as in :meth:`read`.

        Raises:
            FileNotFoundError: where the file has been removed in the meantime.
            CorruptFile: where it had to be fetched, and is not what the shared store was given.
        """
        sealed = file_id.endswith(SEALED)
        copy = secrets.token_hex(16) + (SEALED if sealed else "")
        target = self.path(account, copy)
        with disk_errors(target.parent):
            target.parent.mkdir(parents=True, exist_ok=True)
            source = self._fetch(account, file_id, None if sealed else StoredFile(digest, size))
            os.link(source, target)
        try:
            self._put(account, target)
        except BaseException:
            target.unlink(missing_ok=True)
            raise
        return copy

    def remove(self, account: str, file_ids: Iterable[str]) -> None:
        """Remove files that no row names any more."""
        gone = [*file_ids]
        for file_id in gone:
            self.path(account, file_id).unlink(missing_ok=True)
        if self.shared is not None:
            self.shared.delete([_key(account, file_id) for file_id in gone])

    def read(
        self,
        account: str,
        files: Sequence[tuple[str, int]],
        start: int,
        length: int,
        hashes: Mapping[str, str] | None = None,
    ) -> Iterator[bytes]:
        """``length`` bytes from ``start`` of files that stand one after the other.

        Args:
            account: whose they are.
            files: ids and sizes in bytes, in order.
            start: first byte, counted from 0.
            length: bytes at most; the files hold as many from ``start``.
            hashes: SHA-256 of their contents by id; what is fetched is compared with them, where it is
                not encrypted and so says itself that it is whole.

        Raises:
            FileNotFoundError: before the first piece, where a file was removed in the meantime.
            CorruptFile: for a file that is shorter than recorded, does not open, or is not what the
                shared store was given.
            WrongKey: for an encrypted file without its key.
        """
        for file_id, size in files:
            if start >= size:
                start -= size
                continue
            left = min(size - start, length)
            length -= left
            digest = None if file_id.endswith(SEALED) else (hashes or {}).get(file_id)
            path = self._fetch(account, file_id, StoredFile(digest, size) if digest else None)
            for data in _bytes(path, size, start, left):
                left -= len(data)
                yield data
            if left:
                raise CorruptFile(f"{self.path(account, file_id)} is shorter than it was recorded")
            start = 0
            if not length:
                return

    def sweep(self, named: Callable[[str], set[str]], older_than: float = UNNAMED_SECONDS) -> int:
        """Remove files that no row names; how many there were.

        Args:
            named: given the first two of their ids, the ids that rows name.
            older_than: seconds since a file was last changed.
        """
        removed = self._sweep_shared(named, time.time() - older_than)
        return removed + self.sweep_here(lambda start, ids: named(start), older_than)

    def sweep_here(
        self, named: Callable[[str, Set[str]], set[str]], older_than: float = UNNAMED_SECONDS
    ) -> int:
        """The same on this machine alone; ``named`` is also given the ids that are asked for."""
        newest, removed = time.time() - older_than, 0
        for folder in sorted(self.folder.glob("*/??")):
            # Seen before the rows are asked: what is named by then is kept.
            seen = [path for path in folder.iterdir() if _change_time(path) <= newest]
            known = named(folder.name, {path.name for path in seen}) if seen else set()
            for path in seen:
                if path.name not in known:
                    path.unlink(missing_ok=True)
                    removed += 1
        return removed

    def _sweep_shared(self, named: Callable[[str], set[str]], newest: float) -> int:
        """The same in the shared store; what rows name and only this machine has is put there."""
        if self.shared is None:
            return 0
        present: dict[str, dict[str, str]] = {}
        for entry in self.shared.list(OBJECTS):
            start, file_id = entry.key.split("/")[-2:]
            if entry.modified.timestamp() <= newest:
                present.setdefault(start, {})[file_id] = entry.key
        removed = 0
        for start, keys in present.items():
            known = named(start)
            gone = [key for file_id, key in keys.items() if file_id not in known]
            self.shared.delete(gone)
            removed += len(gone)
        for folder in sorted(self.folder.glob("*/??")):
            local = {path.name for path in folder.iterdir()} - present.get(folder.name, {}).keys()
            for file_id in local & named(folder.name) if local else ():
                account = folder.parent.name
                if not self.is_shared(account, file_id):
                    self._put(account, folder / file_id)
        return removed


def _key(account: str, file_id: str) -> str:
    """Of a file in the shared store."""
    return f"{OBJECTS}/{account}/{file_id[:2]}/{file_id}"


def _bytes(path: Path, size: int, start: int, length: int) -> Iterator[bytes]:
    """``length`` bytes of a file from ``start``, or as many as there are."""
    if path.name.endswith(SEALED):
        with SealedReader(path, needed_keyring(path)) as reader:
            if reader.size == size:
                yield from reader.pieces(start, length)
        return
    with path.open("rb") as file:
        file.seek(start)
        while length and (data := file.read(min(length, READ_SIZE))):
            length -= len(data)
            yield data


def _change_time(path: Path) -> float:
    """When a file was written, renamed or given a second name; never, for one that is gone."""
    try:
        return path.stat().st_ctime
    except FileNotFoundError:
        return float("inf")
