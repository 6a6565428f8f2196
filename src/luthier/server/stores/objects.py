"""Built-in object store: buckets and objects of each account.

Two accounts may have buckets of the same name. The bytes of an object are one file, or the files of
its parts; see :mod:`luthier.server.stores.object_files`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from luthier.data.files.s3 import BUCKET
from luthier.errors import CorruptFile, ObjectRefused
from luthier.limits import AccountQuotas
from luthier.server.stores.object_files import UNNAMED_SECONDS, FileWriter, ObjectFiles, WrittenFile
from luthier.server.tables import storage
from luthier.server.tables.accounts import quotas_of
from luthier.server.tables.database import Database, now
from luthier.server.tables.objects import (
    Bucket,
    Check,
    ObjectMetadata,
    ObjectPiece,
    StoredObject,
    check_key,
    get_bucket,
    new_object,
    pieces_of,
    remove_object,
    remove_uploads,
)
from luthier.server.tables.storage import FreedStorage

RESERVED = frozenset({"api", "console", "healthz", "metrics", "openai", "readyz"})
"""Path prefixes of other APIs on the same port."""
_MAX_ATTEMPTS = 5
"""Attempts to open an object during concurrent replacements."""


@dataclass(frozen=True)
class Content:
    """Object with its bytes at the time of opening."""

    found: StoredObject
    pieces: Sequence[ObjectPiece]
    read: Callable[[int, int], Iterator[bytes]]
    """Yields a number of bytes from a first byte."""

    @property
    def ids(self) -> list[str]:
        """Names of the files, which change when the object is replaced."""
        return [piece.id for piece in self.pieces]


Used = TypeVar("Used")


class Objects:
    """Buckets and objects. Safe to share between threads and processes."""

    def __init__(
        self,
        database: Database,
        files: ObjectFiles | None = None,
        quotas: AccountQuotas | None = None,
    ) -> None:
        """Set the files, and the quotas of accounts without own quotas."""
        self.database, self.files = database, files or ObjectFiles()
        self._defaults = quotas or AccountQuotas()

    def quotas(self, session: Session, account: str) -> AccountQuotas:
        """Return the quotas of the account."""
        return quotas_of(session, account, self._defaults)

    def check(self, account: str, stored_bytes: int) -> None:
        """Check the storage quota early; see :func:`luthier.server.tables.storage.check`."""
        with self.database.read() as session:
            quotas = self.quotas(session, account)
            storage.check(session, account, quotas, stored_bytes=stored_bytes)

    def begin(self, account: str, size: int | None = None, *, freed: int = 0) -> FileWriter:
        """Return a new file, for use in a ``with`` statement until a row names the file.

        ``size`` is the expected number of bytes, ``freed`` that of the replaced object or part.

        Raises:
            QuotaExceeded: if the account has no space.
        """
        self.check(account, (1 if size is None else size) - freed)
        return self.files.begin(account)

    # --- buckets

    def create_bucket(self, account: str, name: str) -> Bucket:
        """Create a bucket.

        Raises:
            ObjectRefused: ``InvalidBucketName``, ``BucketAlreadyOwnedByYou``.
        """
        if not _bucket_name(name):
            raise ObjectRefused("InvalidBucketName", "The specified bucket is not valid.")
        bucket = Bucket(account=account, name=name, created=now())
        try:
            with self.database.write() as session:
                session.add(bucket)
                session.flush()
        # The unique constraint decides between two requests, because a check before would be a
        # race.
        except IntegrityError:
            text = "Your previous request to create the named bucket succeeded and it is yours."
            raise ObjectRefused("BucketAlreadyOwnedByYou", text) from None
        return bucket

    def buckets(self, account: str) -> list[Bucket]:
        """Return the buckets of the account by name."""
        with self.database.read() as session:
            query = select(Bucket).where(Bucket.account == account).order_by(Bucket.name)
            return list(session.scalars(query))

    def bucket(self, account: str, name: str) -> Bucket:
        """Return the bucket; see :func:`get_bucket`."""
        with self.database.read() as session:
            return get_bucket(session, account, name)

    def delete_bucket(self, account: str, name: str) -> None:
        """Remove an empty bucket and its incomplete uploads.

        Raises:
            ObjectRefused: ``NoSuchBucket``, ``BucketNotEmpty``.
        """
        with self.database.write() as session:
            bucket = get_bucket(session, account, name, lock=True)
            held = select(StoredObject.seq).where(StoredObject.bucket_seq == bucket.seq).limit(1)
            if session.scalar(held) is not None:
                text = "The bucket you tried to delete is not empty."
                raise ObjectRefused("BucketNotEmpty", text)
            gone = remove_uploads(session, bucket)
            session.delete(bucket)
            session.flush()
            storage.release(session, account, stored_bytes=gone.stored_bytes)
        self.files.remove(account, gone.files)

    # --- objects

    def put(
        self,
        account: str,
        bucket: str,
        key: str,
        written: WrittenFile,
        described: ObjectMetadata,
        check: Check | None = None,
        also: Callable[[Session], None] | None = None,
    ) -> StoredObject:
        """Store a written file as the object ``key``, and replace an existing object.

        ``also`` writes additional rows in the same transaction.

        Raises:
            ObjectRefused: ``NoSuchBucket``, ``KeyTooLongError``, or the error of ``check``.
            QuotaExceeded: if the account has no space.
        """
        piece = ObjectPiece.of(account, 1, written, described.checksums)
        return self.place(account, bucket, key, [piece], written.md5, 0, described, check, also)

    def place(
        self,
        account: str,
        bucket: str,
        key: str,
        pieces: Sequence[ObjectPiece],
        etag: str,
        parts: int,
        described: ObjectMetadata,
        check: Check | None = None,
        also: Callable[[Session], None] | None = None,
    ) -> StoredObject:
        """Store new pieces as one object; see :meth:`put`."""
        with self.name_files(account, [piece.id for piece in pieces]) as session:
            found = get_bucket(session, account, bucket, lock=True)
            check_key(key)
            if also is not None:
                also(session)
            gone = remove_object(session, found, key, check)
            made = new_object(found, key, pieces, etag, parts, described)
            session.add(made)
            session.flush()
            # The rows of pieces need the number of the object, which the flush before assigned.
            for piece in pieces:
                piece.object_seq = made.seq
            session.add_all(pieces)
            session.flush()
            quotas = self.quotas(session, account)
            more = made.size - gone.stored_bytes
            storage.charge(session, account, quotas, stored_bytes=more)
        self.files.remove(account, gone.files)
        return made

    @contextmanager
    def name_files(self, account: str, ids: Sequence[str]) -> Iterator[Session]:
        """Open a transaction whose rows name new files. An error removes the files.

        After a failed commit the rows may exist. If the rows do not exist, :meth:`sweep` removes
        the files.
        """
        committing = False
        try:
            with self.database.write() as session:
                yield session
                session.flush()
                committing = True
        except Exception:
            # A commit that fails may still have happened, for example if the connection broke
            # before the reply.
            if not committing:
                self.files.remove(account, ids)
            raise

    def head(self, account: str, bucket: str, key: str) -> StoredObject:
        """Return the object of a key; raises ``NoSuchBucket`` or ``NoSuchKey``."""
        with self.database.read() as session:
            return _get_object(session, account, bucket, key)

    def open(self, account: str, bucket: str, key: str) -> Content:
        """Return the object of a key with its bytes; raises like :meth:`head`."""
        with self.database.read() as session:
            found = _get_object(session, account, bucket, key)
            pieces = pieces_of(session, found)
        files = [(piece.id, piece.size) for piece in pieces]
        return Content(found, pieces, lambda s, n: self.files.read(account, files, s, n))

    def open_range(
        self, account: str, bucket: str, key: str, span: Callable[[StoredObject], tuple[int, int]]
    ) -> tuple[StoredObject, Iterator[bytes]]:
        """Return an object and a range of its bytes, with open files.

        ``span`` returns the first byte and the number of bytes of the range, and may raise.
        """

        def start(content: Content) -> tuple[StoredObject, Iterator[bytes]]:
            pieces = content.read(*span(content.found))
            first = next(pieces, b"")  # opens the file
            return content.found, chain([first] if first else [], pieces)

        return self.use(account, bucket, key, start)

    def use(self, account: str, bucket: str, key: str, action: Callable[[Content], Used]) -> Used:
        """Return ``action`` of the object; repeat with the new object after a replacement.

        Raises:
            CorruptFile: if the bytes of the object are missing.
        """
        for _ in range(_MAX_ATTEMPTS):
            content = self.open(account, bucket, key)
            try:
                return action(content)
            except FileNotFoundError:
                # Either the object was replaced after the query, or the bytes are lost.
                if self.open(account, bucket, key).ids == content.ids:
                    break
        raise CorruptFile(f"the bytes of s3://{bucket}/{key} are missing")

    def copy(
        self,
        account: str,
        source: tuple[str, str],
        target: tuple[str, str],
        described: Callable[[StoredObject], ObjectMetadata],
    ) -> StoredObject:
        """Store the bytes of ``source`` (bucket, key) as ``target`` too, without a copy of the files.

        ``described`` returns the metadata of the copy, and may raise.
        """

        def place(content: Content) -> StoredObject:
            found, description = content.found, described(content.found)
            pieces: list[ObjectPiece] = []
            try:
                for piece in content.pieces:
                    # A hard link: the copy takes no space on the disk, and each file still has one
                    # row that names it.
                    link = self.files.link(account, piece.id)
                    written = WrittenFile(link, piece.size, piece.md5, piece.sha256)
                    pieces.append(ObjectPiece.of(account, piece.number, written, piece.checksums))
            except Exception:
                self.files.remove(account, [piece.id for piece in pieces])
                raise
            return self.place(account, *target, pieces, found.etag, found.parts, description)

        return self.use(account, *source, place)

    def delete(
        self,
        account: str,
        bucket: str,
        keys: Sequence[str],
        also: Callable[[Session], None] | None = None,
    ) -> None:
        """Remove the objects of ``keys``. A key without an object is no error.

        ``also`` writes additional rows in the same transaction.
        """
        gone = FreedStorage()
        with self.database.write() as session:
            found = get_bucket(session, account, bucket, lock=True)
            for key in keys:
                gone.add(remove_object(session, found, key, None))
            storage.release(session, account, stored_bytes=gone.stored_bytes)
            if also is not None:
                also(session)
        self.files.remove(account, gone.files)

    def sweep(self, older_than: float = UNNAMED_SECONDS) -> int:
        """Remove the files of killed processes and return their number."""
        return self.files.sweep(self._files_of_rows, older_than)

    def _files_of_rows(self, start: str) -> set[str]:
        with self.database.read() as session:
            # By the first characters of the ids: a set of all files of a large store would not fit
            # into memory.
            return set(
                session.scalars(select(ObjectPiece.id).where(ObjectPiece.id.startswith(start)))
            )


def _get_object(session: Session, account: str, bucket: str, key: str) -> StoredObject:
    seq = get_bucket(session, account, bucket).seq
    found = session.scalar(
        select(StoredObject).where(StoredObject.bucket_seq == seq, StoredObject.key == key)
    )
    if found is None:
        raise ObjectRefused("NoSuchKey", "The specified key does not exist.")
    return found


def _bucket_name(name: str) -> bool:
    if not re.fullmatch(BUCKET, name) or ".." in name or name in RESERVED:
        return False
    try:
        # AWS forbids such names, because clients could not tell them from the address of an
        # endpoint.
        ipaddress.IPv4Address(name)
    except ValueError:
        return True
    return False
