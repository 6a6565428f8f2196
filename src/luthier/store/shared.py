"""The shared store: what servers and workers on several machines have in common beside the database.

A folder, or a bucket of any S3 (``s3://bucket/prefix``), named by ``LUTHIER_SHARED_STORE`` or ``luthier
serve --shared-store``. Each machine has a ``LUTHIER_HOME`` of its own and fetches what it lacks.

    store-id                   which database it belongs to
    records/<name>.json        the files of a folder: names, SHA-256, sizes
    blobs/<name>/<sha256>      their bytes, as they lie on the disk: encrypted where the store is
    children/, removed/        which models stand on which, and whose deletion began
    objects/<account>/…        objects of the built-in buckets
    encryption.json            wrapped data keys, where the stores are encrypted

A record is written when all its blobs are there and is removed before them, so that a folder is there
whole or not at all. Blobs belong to one folder: what is deleted is gone whoever else has the same
bytes, and no deletion has to read all other records, or can race with one that is written.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from luthier.data.s3 import connection_settings, split_address
from luthier.errors import CorruptFile, LuthierError, RefusedInput, SharedStoreAway
from luthier.files import TEMPORARY, names_below, new_file, sha256_of, write_bytes

ENVIRONMENT = "LUTHIER_SHARED_STORE"
"""Variable with the address; nothing is shared where it is empty or missing."""
IDENTITY = "store-id"
"""Key of the id that it has in common with its database (:mod:`luthier.store.shared_identity`)."""
RECORDS, BLOBS, OBJECTS = "records", "blobs", "objects"
READ_SIZE = 1 << 20
_SMALL = 1 << 20
"""Bytes of a file that is hashed and put from one reading, as it may grow meanwhile."""
_RETRIES = {"max_retries": 5, "retry_timeout": timedelta(seconds=60)}
ONCE_SECONDS = 5.0
"""That a record may take to be put: a transaction of the database is open meanwhile."""
_TRIES = 3
"""How often a record, or a file that changes meanwhile, is put."""
_PAUSE = 1.0
"""Seconds between these tries."""
_VOLUME_AWAY = (
    errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH,
    errno.ECONNABORTED, errno.ECONNREFUSED, errno.ENETUNREACH, errno.EREMOTEIO,
)  # fmt: skip
"""What a mounted volume says that does not answer."""
LEFTOVER = timedelta(days=1)
"""Age of a blob that no record names, from which on no upload is at work on it."""

Fence = Callable[[Callable[[], None]], None]
"""Does something while the lease of the work is held for certain; raises where it is lost."""


@dataclass(frozen=True)
class SharedEntry:
    """What a key of the shared store names."""

    key: str
    size: int
    """Bytes."""
    modified: datetime


class SharedStore(Protocol):
    """Bytes by key. Everything raises :class:`SharedStoreAway` where the store cannot be reached."""

    def put(self, key: str, content: bytes | Path | Iterator[bytes]) -> None:
        """Let ``key`` name these bytes, those of a file or of pieces, whole or not at all."""

    def put_once(self, key: str, content: bytes) -> None:
        """The same in one try of ``ONCE_SECONDS``: while a transaction of the database is open."""

    def create(self, key: str, content: bytes) -> bool:
        """The same where it names nothing yet; whether it did not."""

    def pieces(self, key: str) -> Iterator[bytes]:
        """The bytes that ``key`` names.

        Raises:
            FileNotFoundError: where it names nothing.
        """

    def exists(self, key: str) -> bool:
        """Whether ``key`` names anything."""

    def list(self, prefix: str) -> Iterator[SharedEntry]:
        """All keys below ``prefix``, a whole part of their paths, in no order."""

    def delete(self, keys: Iterable[str]) -> None:
        """Let ``keys`` name nothing; those that do already are no error."""


def shared_store() -> SharedStore | None:
    """The shared store of this process; ``None`` where nothing is shared.

    Raises:
        RefusedInput: for an address that is none, or where obstore is missing.
    """
    address = os.environ.get(ENVIRONMENT)
    if not address:
        return None
    settings = connection_settings() if address.startswith("s3://") else {}
    return _open(address, settings.get("endpoint", ""), settings.get("region", ""))


@lru_cache(maxsize=4)
def _open(address: str, endpoint: str, region: str) -> SharedStore:
    if parts := split_address(address):
        bucket, prefix = parts
        return BucketStore(bucket, prefix.strip("/"))
    path = address.removeprefix("file://")
    if "://" in path or not path.startswith("/"):
        raise RefusedInput(
            f"the shared store {address!r} is no address: write s3://bucket/prefix, or the whole path "
            "of a folder that all machines see"
        )
    return DirectoryStore(Path(path))


def check_writable(store: SharedStore) -> None:
    """Refuse a shared store that cannot be written and read, at the start of a server.

    Raises:
        LuthierError: with the reason.
    """
    key, content = f"probe/{secrets.token_hex(8)}", secrets.token_bytes(16)
    store.put(key, content)
    try:
        if read_shared(store, key) != content:
            raise LuthierError("the shared store does not give back what was written to it")
    finally:
        store.delete([key])


def read_shared(store: SharedStore, key: str) -> bytes | None:
    """The bytes that ``key`` names; ``None`` where it names nothing."""
    try:
        return b"".join(store.pieces(key))
    except FileNotFoundError:
        return None


def fetch_shared(store: SharedStore, key: str, target: Path, expected: StoredFile | None) -> None:
    """Write what ``key`` names to ``target``, which is there whole or not at all.

    Raises:
        CorruptFile: where it is not the file that was ``expected``.
        FileNotFoundError: where it names nothing.
    """
    digest, size = hashlib.sha256(), 0
    with new_file(target) as file:
        for piece in store.pieces(key):
            digest.update(piece)
            size += len(piece)
            file.write(piece)
        if expected is not None and StoredFile(digest.hexdigest(), size) != expected:
            raise CorruptFile(
                f"{key} of the shared store is not what was put there: {size:,} bytes with SHA-256 "
                f"{digest.hexdigest()[:16]}…, not {expected.size:,} with {expected.sha256[:16]}…. "
                "Restore it from a backup of the store, or remove what it belongs to"
            )


class DirectoryStore:
    """A folder that all machines see at one path. It is never made: one that is missing is away.

    So is an empty one in its place, which a volume that is no longer mounted leaves.
    """

    def __init__(self, folder: Path) -> None:
        self._root = folder
        self._place: tuple[int, int] | None = None
        """Device and number of the folder that was written or read last."""

    @property
    def _folder(self) -> Path:
        try:
            found = self._root.stat()
        except (FileNotFoundError, NotADirectoryError):
            found = None
        if found is None or not stat.S_ISDIR(found.st_mode):
            raise SharedStoreAway(
                f"the folder {self._root} of the shared store is missing. Mount it, or create it where "
                "it is to be a new one"
            )
        place = (found.st_dev, found.st_ino)
        if self._place not in (None, place) and not (self._root / IDENTITY).is_file():
            raise SharedStoreAway(
                f"the folder {self._root} of the shared store is another one than before, without "
                f"{IDENTITY}. Mount what was mounted there"
            )
        self._place = place
        return self._root

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn what a volume says that does not answer into an error of ours.

        What is missing, full or not allowed stays as it is.
        """
        try:
            yield
        except OSError as error:
            if error.errno not in _VOLUME_AWAY:
                raise
            raise SharedStoreAway(
                f"the folder {self._root} of the shared store does not answer ({error.strerror}). "
                "Check its volume"
            ) from error

    def put(self, key: str, content: bytes | Path | Iterator[bytes]) -> None:
        """See :class:`SharedStore`."""
        with self._errors():
            if isinstance(content, bytes):
                write_bytes(self._folder / key, content)
            elif isinstance(content, Path):
                with content.open("rb") as source, new_file(self._folder / key) as file:
                    shutil.copyfileobj(source, file, READ_SIZE)
            else:
                with new_file(self._folder / key) as file:
                    file.writelines(content)

    def put_once(self, key: str, content: bytes) -> None:
        """See :class:`SharedStore`; how long a mounted volume takes is its own affair."""
        with self._errors():
            write_bytes(self._folder / key, content)

    def create(self, key: str, content: bytes) -> bool:
        """See :class:`SharedStore`."""
        with self._errors():
            path = self._folder / key
            fresh = path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")
            write_bytes(fresh, content)
            try:
                os.link(fresh, path)  # unlike a renaming, it replaces nothing
            except FileExistsError:
                return False
            finally:
                fresh.unlink()
            return True

    def pieces(self, key: str) -> Iterator[bytes]:
        """See :class:`SharedStore`."""
        with self._errors(), (self._folder / key).open("rb") as file:
            while piece := file.read(READ_SIZE):
                yield piece

    def exists(self, key: str) -> bool:
        """See :class:`SharedStore`."""
        with self._errors():
            try:
                return stat.S_ISREG((self._folder / key).stat().st_mode)
            except (FileNotFoundError, NotADirectoryError):
                return False

    def list(self, prefix: str) -> Iterator[SharedEntry]:
        """See :class:`SharedStore`."""
        with self._errors():
            folder = self._folder / prefix
            try:
                for name in names_below(folder):
                    if name.rpartition("/")[2].startswith(TEMPORARY):
                        continue
                    with suppress(FileNotFoundError):  # deleted meanwhile
                        found = (folder / name).stat()
                        modified = datetime.fromtimestamp(found.st_mtime, UTC)
                        key = f"{prefix}/{name}".lstrip("/")
                        yield SharedEntry(key, found.st_size, modified)
            except FileNotFoundError:
                _ = self._folder  # gone meanwhile, it is away as well

    def delete(self, keys: Iterable[str]) -> None:
        """See :class:`SharedStore`."""
        with self._errors():
            for key in keys:
                (self._folder / key).unlink(missing_ok=True)


class BucketStore:
    """A bucket of an S3, below a prefix; endpoint and credentials are those of the environment."""

    def __init__(self, bucket: str, prefix: str) -> None:
        try:
            from obstore.store import S3Store
        except ImportError:
            text = "a shared store at s3:// needs the package obstore: pip install 'luthier[s3]'"
            raise RefusedInput(text) from None
        self._name = f"s3://{bucket}/{prefix}".rstrip("/")
        self._prefix = f"{prefix}/" if prefix else ""
        settings = connection_settings()
        self._store = S3Store(bucket, **settings, retry_config=_RETRIES)
        limit = timedelta(seconds=ONCE_SECONDS)
        options = {**settings.pop("client_options", {}), "timeout": limit, "connect_timeout": limit}
        once = {"max_retries": 0, "retry_timeout": limit}
        self._once = S3Store(bucket, **settings, client_options=options, retry_config=once)

    def put(self, key: str, content: bytes | Path | Iterator[bytes]) -> None:
        """See :class:`SharedStore`."""
        import obstore

        with self._errors("written"):
            obstore.put(self._store, self._prefix + key, content)

    def put_once(self, key: str, content: bytes) -> None:
        """See :class:`SharedStore`."""
        import obstore

        with self._errors("written"):
            obstore.put(self._once, self._prefix + key, content)

    def create(self, key: str, content: bytes) -> bool:
        """See :class:`SharedStore`."""
        import obstore
        from obstore.exceptions import AlreadyExistsError

        with self._errors("written"):
            try:
                obstore.put(self._store, self._prefix + key, content, mode="create")
            except AlreadyExistsError:
                return False
            return True

    def pieces(self, key: str) -> Iterator[bytes]:
        """See :class:`SharedStore`."""
        import obstore

        with self._errors("read"):
            answer = obstore.get(self._store, self._prefix + key)
            for piece in answer.stream(min_chunk_size=8 * READ_SIZE):
                yield bytes(piece)

    def exists(self, key: str) -> bool:
        """See :class:`SharedStore`."""
        import obstore

        with self._errors("read"):
            try:
                obstore.head(self._store, self._prefix + key)
            except FileNotFoundError:
                return False
            return True

    def list(self, prefix: str) -> Iterator[SharedEntry]:
        """See :class:`SharedStore`."""
        import obstore

        with self._errors("read"):
            for batch in obstore.list(self._store, prefix=self._prefix + prefix):
                for each in batch:
                    key = str(each["path"]).removeprefix(self._prefix)
                    yield SharedEntry(key, int(each["size"]), each["last_modified"])

    def delete(self, keys: Iterable[str]) -> None:
        """See :class:`SharedStore`."""
        import obstore

        if paths := [self._prefix + key for key in keys]:
            with self._errors("written"):
                obstore.delete(self._store, paths)

    @contextmanager
    def _errors(self, done: str) -> Iterator[None]:
        """Turn what S3 says into an error of ours, without keys: what is missing stays as it is."""
        from obstore.exceptions import BaseError

        try:
            yield
        except FileNotFoundError as error:
            if "NoSuchBucket" not in str(error):
                raise
            raise SharedStoreAway(
                f"the shared store {self._name} could not be {done}: there is no such bucket. Create it"
            ) from None
        except (BaseError, OSError) as error:
            raise SharedStoreAway(
                f"the shared store {self._name} could not be {done} ({type(error).__name__}). Check "
                "bucket, endpoint (AWS_ENDPOINT_URL) and credentials (AWS_ACCESS_KEY_ID, …)"
            ) from error


@dataclass(frozen=True)
class StoredFile:
    """What a record says of one file, as it lies on the disk."""

    sha256: str
    size: int
    """Bytes."""


@dataclass(frozen=True)
class FolderRecord:
    """The files of a folder in the shared store."""

    files: Mapping[str, StoredFile]
    """By their paths below the folder."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What else is to be known of it."""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(each.size for each in self.files.values())

    def plain(self) -> dict[str, Any]:
        """Ready for JSON."""
        files = {name: [each.sha256, each.size] for name, each in sorted(self.files.items())}
        return {"format": 1, "files": files, "about": dict(self.about)}

    @staticmethod
    def parse(content: bytes, key: str) -> FolderRecord:
        """From its JSON; raises :class:`CorruptFile` where it is none, or names a file elsewhere."""
        try:
            record = json.loads(content)
            if record["format"] != 1:
                raise CorruptFile(f"{key} of the shared store is of a newer version of luthier")
            files = {str(n): StoredFile(str(f[0]), int(f[1])) for n, f in record["files"].items()}
            about = dict(record["about"])
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise CorruptFile(f"{key} of the shared store is no record of a folder") from error
        for name in files:
            if name.startswith("/") or ".." in PurePosixPath(name).parts:
                raise CorruptFile(f"{key} of the shared store names a file outside: {name!r}")
        return FolderRecord(files, about)


class _HashedPieces:
    """The bytes of a file as they are sent, and then what they were."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.stored: StoredFile | None = None

    def __iter__(self) -> Iterator[bytes]:
        digest, size = hashlib.sha256(), 0
        with self._path.open("rb") as file:
            while piece := file.read(8 * READ_SIZE):
                digest.update(piece)
                size += len(piece)
                yield piece
        self.stored = StoredFile(digest.hexdigest(), size)


class SharedFolders:
    """Folders in a shared store by name, such as ``models/<base>/<name>``: whole or not there."""

    def __init__(self, store: SharedStore) -> None:
        self.store = store
        self._uploaded: set[str] = set()
        """Blobs that were put here, so that what failed goes on where it stood."""

    def upload(
        self,
        name: str,
        files: Mapping[str, Path],
        hash_of: Callable[[Path], str] = sha256_of,
        **about: Any,
    ) -> FolderRecord:
        """Put the bytes of ``files`` that are not there yet; :meth:`commit` makes them the folder.

        Blobs of an earlier record stay until then, as it may be the one that is gone on from. What is
        neither named by it nor put by this object is put anew: somebody may be about to delete it.

        Raises:
            CorruptFile: where a file changes all the time.
        """
        before = self._read_whole(name)
        own = self._uploaded | (self._blobs(name, before) if before else set())
        present = {each.key for each in self.store.list(f"{BLOBS}/{name}") if each.key in own}
        found: dict[str, StoredFile] = {}
        for path_below, path in files.items():
            found[path_below] = self._put_file(name, path, hash_of, present)
        return FolderRecord(found, about)

    def _put_file(
        self, name: str, path: Path, hash_of: Callable[[Path], str], present: set[str]
    ) -> StoredFile:
        """Put a file unless ``present`` has its blob; a blob is under the hash of what was sent."""
        for _ in range(_TRIES):
            size = path.stat().st_size
            content = path.read_bytes() if size <= _SMALL else None
            if content is not None:
                stored = StoredFile(hashlib.sha256(content).hexdigest(), len(content))
            else:
                stored = StoredFile(hash_of(path), size)
            key = self._blob(name, stored)
            if key in present:
                return stored
            sent = _HashedPieces(path)
            self.store.put(key, iter(sent) if content is None else content)
            if content is not None or sent.stored == stored:
                present.add(key)
                self._uploaded.add(key)
                return stored
            self.store.delete([key])
        raise CorruptFile(
            f"{path} changes while it is put into the shared store; end what writes it"
        )

    def commit(
        self, name: str, record: FolderRecord, fence: Fence = lambda action: action()
    ) -> None:
        """Let the folder be what was uploaded; blobs of the record before it that it lacks go.

        Within the ``fence`` is one put of the record, which is tried again outside of it. Other blobs
        stay, as they may be those of somebody who uploads now: see :meth:`drop_unnamed`.

        Raises:
            SharedStoreAway: where it could not be put, or blobs went meanwhile: upload it again.
        """
        key, content = self._record(name), json.dumps(record.plain(), indent=1).encode()
        before = self._read_whole(name)
        for left in reversed(range(_TRIES)):
            try:
                fence(lambda: self.store.put_once(key, content))
                break
            except SharedStoreAway:
                if not left:
                    raise
                time.sleep(_PAUSE)
        needed = self._blobs(name, record)
        self._uploaded -= needed
        if self._read_whole(name) != record:
            return  # another is next, and may need what this one replaced
        if before is not None:
            self.store.delete(self._blobs(name, before) - needed)
        if needed - {each.key for each in self.store.list(f"{BLOBS}/{name}")}:
            raise SharedStoreAway(
                f"blobs of {name} were removed from the shared store by another server"
            )

    def old_blobs(self) -> dict[str, set[str]]:
        """Keys of the blobs that nobody uploads any more, by the names of their folders."""
        newest, found = datetime.now(UTC) - LEFTOVER, dict[str, set[str]]()
        for each in self.store.list(BLOBS):
            if each.modified < newest:
                name = each.key.removeprefix(f"{BLOBS}/").rpartition("/")[0]
                found.setdefault(name, set()).add(each.key)
        return found

    def drop_unnamed(self, name: str, blobs: set[str], has_row: bool) -> int:
        """Delete those of these blobs that the record does not name; how many.

        Where there is no record, all: unless the folder ``has_row``, as they may be all that is left.
        """
        try:
            record = self.read(name)
        except CorruptFile:
            return 0  # it may name them
        if record is None and has_row:
            return 0
        gone = blobs - (self._blobs(name, record) if record else set())
        self.store.delete(gone)
        return len(gone)

    def _read_whole(self, name: str) -> FolderRecord | None:
        """As :meth:`read`; ``None`` for what is no record, too, which is replaced."""
        try:
            return self.read(name)
        except CorruptFile:
            return None

    def read(self, name: str) -> FolderRecord | None:
        """The record of a folder; ``None`` where it is not there.

        Raises:
            CorruptFile: for what is no record.
        """
        key = self._record(name)
        content = read_shared(self.store, key)
        return None if content is None else FolderRecord.parse(content, key)

    def fetch(self, name: str, record: FolderRecord, target_of: Callable[[str], Path]) -> bool:
        """Copy the files of ``record`` to where ``target_of`` says; whether they were all there.

        False where the folder was removed or replaced meanwhile.

        Raises:
            CorruptFile: where a blob is missing though its record is there, or has other bytes.
        """
        for path_below, stored in record.files.items():
            key = self._blob(name, stored)
            try:
                fetch_shared(self.store, key, target_of(path_below), stored)
            except FileNotFoundError:
                if self.read(name) != record:
                    return False
                raise CorruptFile(
                    f"{key} of the shared store is missing: {path_below} of {name}. Restore it from a "
                    "backup of the store, or remove what it belongs to"
                ) from None
        return True

    def names(self, below: str) -> set[str]:
        """Names of the folders below a part of a name."""
        prefix, ending = f"{RECORDS}/", ".json"
        keys = (each.key for each in self.store.list(f"{RECORDS}/{below}"))
        return {key.removeprefix(prefix).removesuffix(ending) for key in keys}

    def remove(self, name: str) -> None:
        """Remove a folder: its record, then its blobs. What is gone already is no error."""
        self.store.delete([self._record(name)])
        self.store.delete([each.key for each in self.store.list(f"{BLOBS}/{name}")])

    @staticmethod
    def _record(name: str) -> str:
        return f"{RECORDS}/{name}.json"

    def _blobs(self, name: str, record: FolderRecord) -> set[str]:
        return {self._blob(name, each) for each in record.files.values()}

    @staticmethod
    def _blob(name: str, stored: StoredFile) -> str:
        return f"{BLOBS}/{name}/{stored.sha256}"


def shared_folders() -> SharedFolders | None:
    """The folders in the shared store of this process; ``None`` where nothing is shared."""
    store = shared_store()
    return None if store is None else SharedFolders(store)
