"""Data of clients by ``s3://`` address, in the built-in object store or at an S3 endpoint.

An account reads and writes with its own rights: buckets of other accounts do not exist for the account.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from luthier.data.files.s3 import connection_settings, is_file_name, local_name, split_address
from luthier.data.files.sources import choose_data_files, is_clutter, other_files_problem
from luthier.data.inputs import MOST_MEDIA_BYTES, is_media
from luthier.errors import (
    CorruptFile,
    DataError,
    DownloadError,
    LocationRefused,
    ObjectRefused,
    QuotaExceeded,
)
from luthier.files import new_file
from luthier.limits import AccountQuotas
from luthier.server.stores.listing import page
from luthier.server.stores.object_files import READ_SIZE, ObjectFiles
from luthier.server.stores.objects import Content, Objects
from luthier.server.stores.uploaded_files import UploadedFiles
from luthier.server.tables.database import Database
from luthier.server.tables.objects import UPLOADS, ObjectMetadata, ObjectPiece, check_key

ROWS = ".jsonl"
"""Suffix of the files that an address with a final ``/`` selects."""
NAMES_BYTES = 255
"""Space for names below an address, in bytes of a key."""
MOST_ENTRIES = 10_000
"""Maximum number of files below a folder."""
MOST_MEDIA_FILES = 100_000
"""Maximum number of files below a folder of images or audio."""

Entry = TypeVar("Entry")


class Locations:
    """Access to data by address.

    All methods raise :class:`LocationRefused` for a wrong address, and
    :class:`luthier.errors.DownloadError` if an endpoint does not answer.
    """

    def __init__(
        self,
        database: Database,
        s3_endpoint: str | None = None,
        files: ObjectFiles | None = None,
        quotas: AccountQuotas | None = None,
    ) -> None:
        """Set the meaning of ``s3://``: an S3 endpoint, or else the built-in object store.

        ``quotas`` are those of accounts without own quotas.
        """
        objects = Objects(database, files, quotas)
        self._built_in = BuiltInBuckets(objects)
        self.uploads = UploadedFiles(database, objects)
        """Uploaded files of all accounts."""
        self._default = ExternalBuckets(s3_endpoint) if s3_endpoint else self._built_in

    def check(self, account: str, uri: str) -> None:
        """Check the form of an address and the account's right to read the data."""
        self._keys(account, _address(uri))

    def check_writable(self, account: str, uri: str) -> None:
        """Check the account's right to write below an address."""
        # With room for the longest name: an export must not fail after hours because its keys are
        # too long.
        bucket = _writable(f"{uri.rstrip('/')}/{'n' * NAMES_BYTES}").bucket
        self._buckets(bucket).check_bucket(account, bucket)

    def fetch(self, account: str, uri: str, folder: Path) -> list[tuple[str, Path]]:
        """Copy the objects of an address into ``folder``. Returns addresses and copies.

        An address with a final ``/`` selects all ``.jsonl`` files below the address, without
        clutter; training next to test files are refused. A folder of images or audio only is
        fetched as one folder. Objects of the built-in store are compared
        with their recorded hashes.

        Raises:
            LocationRefused: if there is no object.
            CorruptFile: if the bytes differ from the recorded hash.
        """
        fetched: list[tuple[str, Path]] = []
        address = _address(uri)
        keys = self._keys(account, address)
        # Media are read as one folder, because the folders of the keys are the labels.
        if address.folder and is_media(keys[0]):
            return [(uri, self._fetch_tree(account, address, keys, folder))]
        for key in keys:
            name = self._file_name(account, address.bucket, key)
            target = _unused_path(folder, name, len(fetched))
            self._buckets(address.bucket).fetch(account, address.bucket, key, target)
            fetched.append((f"s3://{address.bucket}/{key}", target))
        return fetched

    def peek(self, account: str, uri: str, folder: Path, most: int) -> tuple[str, Path]:
        """Copy the first ``most`` bytes of the first object of an address into ``folder``.

        Returns the address of the object and the copy; raises like :meth:`fetch`. The bytes are not
        compared with their hash.
        """
        address = _address(uri)
        bucket, key = address.bucket, self._keys(account, address)[0]
        target = folder / self._file_name(account, bucket, key)
        self._buckets(bucket).fetch(account, bucket, key, target, most)
        return f"s3://{bucket}/{key}", target

    def _file_name(self, account: str, bucket: str, key: str) -> str:
        """Return a file name for an object: the reader needs the ending of an uploaded file's name."""
        uploaded = self.uploads.get(account, key) if bucket == UPLOADS else None
        return local_name(uploaded.name if uploaded else key)

    def _fetch_tree(self, account: str, address: _Address, keys: list[str], folder: Path) -> Path:
        """Copy the objects below an address into a folder, in subfolders by their keys."""
        root = _unused_path(folder, local_name(address.key.rstrip("/") or address.bucket), 0)
        names = {key: PurePosixPath(key.removeprefix(address.key)) for key in keys}
        # In S3, `a` and `a/b` can both be objects; on a disk, `a` cannot be a file and a folder.
        taken = {parent for name in names.values() for parent in name.parents}
        for key, name in names.items():
            parts = key.removeprefix(address.key).split("/")
            # A key may contain "..", or name a file that is also a folder.
            if name in taken or not all(is_file_name(part) for part in parts):
                where = f"s3://{address.bucket}/{key}"
                raise LocationRefused(f"The key of {where} is not a valid file path.")
        for key, name in names.items():
            self._buckets(address.bucket).fetch(account, address.bucket, key, root / name)
        return root

    def folder(self, account: str, uri: str) -> list[tuple[str, int]]:
        """Return names and sizes of the files directly below an address, sorted.

        Raises:
            LocationRefused: without a file, or for too many files.
        """
        address = _address(uri)
        prefix = f"{address.key.rstrip('/')}/".lstrip("/")
        buckets = self._buckets(address.bucket)
        buckets.check_bucket(account, address.bucket)
        found = []
        below = buckets.below(account, address.bucket, prefix, MOST_ENTRIES + 1)
        for key, size in _at_most(below, f"objects below {uri}"):
            if (name := key.removeprefix(prefix)) and "/" not in name:
                found.append((name, size))
        if not found:
            raise LocationRefused(f"There is no file directly below {uri}.")
        return found

    def fetch_from(self, account: str, uri: str, name: str, target: Path) -> None:
        """Copy the file ``name`` directly below an address to ``target``."""
        address = _address(uri)
        key = f"{address.key.rstrip('/')}/{name}".lstrip("/")
        self._buckets(address.bucket).fetch(account, address.bucket, key, target)

    def write(self, account: str, uri: str, name: str, data: bytes | Path) -> str:
        """Write bytes or a file as ``name``, a relative path, below an address. Returns the address."""
        address = _writable(uri)
        key = f"{address.key.rstrip('/')}/{name}".lstrip("/")
        self._buckets(address.bucket).write(account, address.bucket, key, data)
        return f"s3://{address.bucket}/{key}"

    def _buckets(self, bucket: str) -> BuiltInBuckets | ExternalBuckets:
        """Return the buckets of a name. Files of the OpenAI API are always in the built-in store."""
        return self._built_in if bucket == UPLOADS else self._default

    def _keys(self, account: str, address: _Address) -> list[str]:
        """Return the keys of the objects of an address."""
        bucket, key = address.bucket, address.key
        buckets = self._buckets(bucket)
        buckets.check_bucket(account, bucket)
        if not key and not address.folder:
            raise LocationRefused(
                f"s3://{bucket} names a bucket, not an object. Did you mean s3://{bucket}/?"
            )
        if not address.folder:
            if not buckets.exists(account, bucket, key):
                is_folder = any(buckets.below(account, bucket, f"{key}/", 1))
                hint = f" Did you mean s3://{bucket}/{key}/?" if is_folder else ""
                raise LocationRefused(f"There is no object s3://{bucket}/{key}.{hint}")
            return [key]
        what = f"objects below s3://{bucket}/{key}"
        # One more than the limit tells that there are more, without listing a bucket of millions of
        # objects.
        below = buckets.below(account, bucket, key, MOST_MEDIA_FILES + 1)
        found = [*_at_most(below, what, MOST_MEDIA_FILES)]
        names = {each: each.removeprefix(key) for each, _ in found if not each.endswith("/")}
        files = [
            (each, size) for each, size in found if each in names and not is_clutter(names[each])
        ]
        media = [(each, size) for each, size in files if is_media(each)]
        rows = [(names[each], each) for each, _ in files if each.endswith(ROWS)]
        if rows or not media:
            [*_at_most(found, what)]
        if rows:
            try:
                return [each for _, each in choose_data_files(rows, f"s3://{bucket}/{key}")]
            except DataError as bad:
                text = f"s3://{bucket}/{key}: {bad.problem.message} {bad.problem.advice}"
                raise LocationRefused(text) from None
        # A folder with some files that are no media is an error, because leaving out files without
        # a word spoils a model.
        if media and len(media) < len(files):
            others = [names[each] for each, _ in files if not is_media(each)]
            raise LocationRefused(" ".join(other_files_problem(len(media), others)))
        for each, size in media:
            if size > MOST_MEDIA_BYTES:
                text = (
                    f"s3://{bucket}/{each} has {size:,} bytes; the limit is {MOST_MEDIA_BYTES:,}."
                )
                raise LocationRefused(text)
        if not media:
            text = f"There is no object below s3://{bucket}/{key} whose key ends with {ROWS}"
            raise LocationRefused(f"{text}, and no image or audio file.")
        return [each for each, _ in media]


class BuiltInBuckets:
    """The buckets of this service."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    def check_bucket(self, account: str, bucket: str) -> None:
        """Raise :class:`LocationRefused` if the account has no such bucket."""
        try:
            self._objects.bucket(account, bucket)
        except ObjectRefused:
            raise LocationRefused(f"There is no bucket {bucket}.") from None

    def exists(self, account: str, bucket: str, key: str) -> bool:
        """Return whether the key names an object."""
        try:
            self._objects.head(account, bucket, key)
        except ObjectRefused:
            return False
        return True

    def below(
        self, account: str, bucket: str, prefix: str, most: int | None = None
    ) -> Iterator[tuple[str, int]]:
        """Yield the keys with ``prefix`` in order, and their sizes."""
        start: str | None = ""
        while start is not None:
            found = page(self._objects.database, account, bucket, prefix=prefix, start=start)
            yield from ((each.key, each.size) for each in found.objects)
            start = found.next

    def fetch(
        self, account: str, bucket: str, key: str, target: Path, most: int | None = None
    ) -> None:
        """Copy an object, or its first ``most`` bytes, to a file. The bytes of each complete part
        are compared with their recorded hash."""

        def copy(content: Content) -> None:
            # A piece is checked only after its last byte, so the file appears under its name only
            # if all pieces match.
            verified = (self._verify(account, piece) for piece in content.pieces)
            with new_file(target) as file:
                file.writelines(_first(chain.from_iterable(verified), most))

        try:
            self._objects.use(account, bucket, key, copy)
        except ObjectRefused:
            raise LocationRefused(f"The object s3://{bucket}/{key} is deleted.") from None

    def write(self, account: str, bucket: str, key: str, content: bytes | Path) -> None:
        """Write bytes or a file as an object."""
        self.check_bucket(account, bucket)
        try:
            check_key(key)
            # The size is known, so a full quota refuses before the bytes are written.
            with self._objects.begin(account, _size(content)) as writing:
                for data in _pieces(content):
                    writing.write(data)
                written = writing.finish()
            self._objects.put(account, bucket, key, written, ObjectMetadata())
        except ObjectRefused as refused:
            text = f"s3://{bucket}/{key} cannot be written: {refused.problem.message}"
            raise LocationRefused(text) from None
        except QuotaExceeded as refused:
            text = f"s3://{bucket}/{key} cannot be written: {refused}"
            raise QuotaExceeded(text, setting=refused.setting) from None

    def _verify(self, account: str, piece: ObjectPiece) -> Iterator[bytes]:
        digest = hashlib.sha256()
        files = [(piece.id, piece.size)]
        for data in self._objects.files.read(account, files, 0, piece.size):
            digest.update(data)
            yield data
        if digest.hexdigest() != piece.sha256:
            raise CorruptFile(
                "an object no longer has the bytes that were stored (SHA-256 differs)"
            )


@dataclass(frozen=True)
class _Address:
    bucket: str
    key: str
    folder: bool
    """Whether the address ends with ``/``."""


def _address(uri: str) -> _Address:
    parts = split_address(uri)
    if parts is None:
        text = "A location is s3://bucket/key."
        raise LocationRefused(text)
    bucket, key = parts
    try:
        if key:
            check_key(key)
    except ObjectRefused as refused:
        raise LocationRefused(refused.problem.message) from None
    return _Address(bucket, key, uri.endswith("/"))


def _writable(uri: str) -> _Address:
    """Parse an address that jobs may write below."""
    address = _address(uri)
    if address.bucket == UPLOADS:
        text = f"The bucket {UPLOADS} is reserved for the OpenAI API. Name a different bucket."
        raise LocationRefused(text)
    return address


def _at_most(below: Iterable[Entry], what: str, most: int | None = None) -> Iterator[Entry]:
    """Yield ``below``; raises :class:`LocationRefused` for more than ``most`` entries."""
    most = MOST_ENTRIES if most is None else most
    for number, each in enumerate(below, 1):
        if number > most:
            raise LocationRefused(f"There are more than {most:,} {what}.")
        yield each


def _unused_path(folder: Path, name: str, number: int) -> Path:
    """Return a free path in ``folder``: two keys may end with the same name."""
    path = folder / name
    while path.exists():
        number += 1
        path = folder / f"{number}-{name}"
    return path


def _first(pieces: Iterable[bytes], most: int | None) -> Iterator[bytes]:
    """Yield the first ``most`` bytes of ``pieces``; all bytes without ``most``."""
    for data in pieces:
        yield data[:most]
        if most is not None and (most := most - len(data)) <= 0:
            return


def _size(content: bytes | Path) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _pieces(content: bytes | Path) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    with content.open("rb") as file:
        while data := file.read(READ_SIZE):
            yield data


class ExternalBuckets:
    """Buckets of an S3 endpoint, shared by all accounts."""

    def __init__(self, endpoint: str) -> None:
        try:
            import obstore.store  # noqa: F401
        except ImportError:
            text = "An S3 endpoint needs the package obstore: pip install 'luthier[s3]'."
            raise LocationRefused(text) from None
        self._endpoint = endpoint

    def check_bucket(self, account: str, bucket: str) -> None:
        """Raise :class:`LocationRefused` if the bucket cannot be listed."""
        import obstore

        with _translate_errors(f"s3://{bucket}"):
            next(iter(obstore.list(self._store(bucket), chunk_size=1)), None)

    def exists(self, account: str, bucket: str, key: str) -> bool:
        """Return whether the key names an object."""
        import obstore

        with _translate_errors(f"s3://{bucket}/{key}"):
            try:
                obstore.head(self._store(bucket), key)
            except FileNotFoundError:
                return False
        return True

    def below(
        self, account: str, bucket: str, prefix: str, most: int | None = None
    ) -> list[tuple[str, int]]:
        """Return at most ``most`` keys with ``prefix``, empty or with a final ``/``, and sizes."""
        import obstore

        with _translate_errors(f"s3://{bucket}/{prefix}"):
            batches = obstore.list(self._store(bucket), prefix=prefix.rstrip("/") or None)
            every = (each for batch in batches for each in batch)
            found = [(str(each["path"]), int(each["size"])) for each in islice(every, most)]
            return sorted(found, key=lambda each: each[0].encode())

    def fetch(
        self, account: str, bucket: str, key: str, target: Path, most: int | None = None
    ) -> None:
        """Copy an object, or its first ``most`` bytes, to a file."""
        import obstore

        with _translate_errors(f"s3://{bucket}/{key}"), new_file(target) as file:
            answer = obstore.get(self._store(bucket), key)
            pieces = (bytes(piece) for piece in answer.stream(min_chunk_size=1 << 23))
            done = sum(map(file.write, _first(pieces, most)))
            if most is None and done != answer.meta["size"]:
                raise OSError(f"received {done} of {answer.meta['size']} bytes")

    def write(self, account: str, bucket: str, key: str, content: bytes | Path) -> None:
        """Write bytes or a file as an object."""
        import obstore

        with _translate_errors(f"s3://{bucket}/{key}"):
            obstore.put(self._store(bucket), key, content)

    def _store(self, bucket: str) -> Any:
        from obstore.store import S3Store

        return S3Store(bucket, **connection_settings(self._endpoint))


@contextmanager
def _translate_errors(what: str) -> Iterator[None]:
    """Translate errors of the endpoint and remove the endpoint's address and the server's keys."""
    from obstore.exceptions import BaseError

    try:
        yield
    except (BaseError, OSError) as error:
        # obstore reports the status of some operations only in the text.
        status = re.search(r"status code: (4[0-9]{2})\b", str(error))
        if isinstance(error, FileNotFoundError) or (status and status[1] == "404"):
            raise LocationRefused(f"{what} does not exist.") from None
        if isinstance(error, PermissionError) or (status and status[1] in ("401", "403")):
            raise LocationRefused(f"The service may not read or write {what}.") from None
        raise DownloadError(f"{what} could not be reached ({type(error).__name__}).") from error
