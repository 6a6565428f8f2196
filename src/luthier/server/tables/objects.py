"""Built-in object store: buckets and objects of each account.

Two accounts may have buckets of the same name. The bytes of an object are one file, or the files of
its parts; see :mod:`luthier.server.tables.object_files`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from itertools import chain
from typing import Any, TypeVar

from sqlalchemy import BigInteger, ForeignKey, Index, Text, UniqueConstraint, delete, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Mapped, Session, mapped_column

from luthier.data.s3 import BUCKET
from luthier.errors import CorruptFile, ObjectRefused
from luthier.limits import AccountQuotas
from luthier.server.tables import storage
from luthier.server.tables.accounts import quotas_of
from luthier.server.tables.database import Base, Database, find_row, now
from luthier.server.tables.object_files import UNNAMED_SECONDS, FileWriter, ObjectFiles, WrittenFile
from luthier.server.tables.storage import FreedStorage

Key = Text().with_variant(Text(collation="C"), "postgresql")
"""Text type that the database orders by UTF-8 bytes."""
UPLOADS = "luthier-files"
"""Bucket of each account with the files of the OpenAI API."""
KEY_BYTES = 1024
"""Maximum length of a key in UTF-8, in bytes."""


class Bucket(Base):
    """Bucket of one account."""

    __tablename__ = "buckets"
    __table_args__ = (UniqueConstraint("account", "name"),)

    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    account: Mapped[str]
    name: Mapped[str] = mapped_column(Key)
    created: Mapped[datetime]


class StoredObject(Base):
    """An object of a bucket."""

    __tablename__ = "objects"
    __table_args__ = (UniqueConstraint("bucket_seq", "key"),)

    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    account: Mapped[str]
    bucket_seq: Mapped[int] = mapped_column(ForeignKey("buckets.seq"))
    key: Mapped[str] = mapped_column(Key)
    size: Mapped[int] = mapped_column(BigInteger)
    etag: Mapped[str]
    """MD5 in hexadecimal; for an object of parts, the MD5 of their MD5s, ``-`` and their number."""
    parts: Mapped[int] = mapped_column(default=0)
    """Number of parts; 0 for an object without a multipart upload."""
    headers: Mapped[dict[str, Any]]
    """Request headers such as ``Content-Type``."""
    user_metadata: Mapped[dict[str, Any]]
    """Values of headers ``x-amz-meta-*`` by the rest of the name."""
    checksums: Mapped[dict[str, Any]]
    """Checksums in base64 by algorithm, such as ``crc32``. Multipart checksums end with ``-`` and a
    number."""
    modified: Mapped[datetime]


class ObjectPiece(Base):
    """A file of an object, or of a part of an incomplete upload."""

    __tablename__ = "object_pieces"
    __table_args__ = (
        UniqueConstraint("upload_id", "number"),
        Index("object_pieces_of", "object_seq", "number"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    """Name of the file."""
    account: Mapped[str]
    object_seq: Mapped[int | None] = mapped_column(ForeignKey("objects.seq"))
    upload_id: Mapped[str | None] = mapped_column(ForeignKey("object_uploads.id"))
    number: Mapped[int]
    """Order of the parts, from 1 to 10,000, with gaps."""
    size: Mapped[int] = mapped_column(BigInteger)
    md5: Mapped[str]
    sha256: Mapped[str]
    checksums: Mapped[dict[str, Any]]
    modified: Mapped[datetime]

    @staticmethod
    def of(
        account: str, number: int, written: WrittenFile, checksums: Mapping[str, str]
    ) -> ObjectPiece:
        """Return a piece without an owner."""
        return ObjectPiece(
            id=written.id, account=account, number=number, size=written.size, md5=written.md5,
            sha256=written.sha256, checksums=dict(checksums), modified=now(),
        )  # fmt: skip


class Upload(Base):
    """An incomplete multipart upload."""

    __tablename__ = "object_uploads"

    id: Mapped[str] = mapped_column(primary_key=True)
    account: Mapped[str]
    bucket_seq: Mapped[int] = mapped_column(ForeignKey("buckets.seq"), index=True)
    key: Mapped[str] = mapped_column(Key)
    headers: Mapped[dict[str, Any]]
    user_metadata: Mapped[dict[str, Any]]
    checksum: Mapped[str]
    """Algorithm of the parts' checksums, such as ``crc32``; empty without checksums."""
    checksum_type: Mapped[str]
    """``COMPOSITE`` or ``FULL_OBJECT``; empty for none."""
    created: Mapped[datetime]


@dataclass(frozen=True)
class ObjectMetadata:
    """Headers, metadata and checksums of an object."""

    headers: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    checksums: Mapping[str, str] = field(default_factory=dict)
    """Verified checksums by algorithm."""


Check = Callable[[StoredObject | None], None]
"""Condition of a client on the current object of a key. Raises if the condition fails."""


def get_bucket(session: Session, account: str, name: str, *, lock: bool = False) -> Bucket:
    """Return the account's bucket; ``lock`` blocks other changes of its objects.

    Raises:
        ObjectRefused: ``NoSuchBucket``.
    """
    query = select(Bucket).where(Bucket.account == account, Bucket.name == name)
    bucket = find_row(session, query, lock=lock)
    if bucket is None:
        raise ObjectRefused("NoSuchBucket", "The specified bucket does not exist")
    return bucket


def remove_object(session: Session, bucket: Bucket, key: str, check: Check | None) -> FreedStorage:
    """Remove the rows of the object ``key``, if the object exists."""
    found = session.scalar(
        select(StoredObject).where(StoredObject.bucket_seq == bucket.seq, StoredObject.key == key)
    )
    if check is not None:
        check(found)
    if found is None:
        return FreedStorage()
    gone = list(session.scalars(select(ObjectPiece.id).where(ObjectPiece.object_seq == found.seq)))
    session.execute(delete(ObjectPiece).where(ObjectPiece.object_seq == found.seq))
    session.delete(found)
    session.flush()
    return FreedStorage(gone, found.size)


def new_object(
    bucket: Bucket,
    key: str,
    pieces: Sequence[ObjectPiece],
    etag: str,
    parts: int,
    described: ObjectMetadata,
) -> StoredObject:
    """Return a new row of an object."""
    return StoredObject(
        account=bucket.account, bucket_seq=bucket.seq, key=key,
        size=sum(piece.size for piece in pieces), etag=etag, parts=parts,
        headers=dict(described.headers), user_metadata=dict(described.metadata),
        checksums=dict(described.checksums), modified=now(),
    )  # fmt: skip


def pieces_of(session: Session, owner: StoredObject | Upload) -> list[ObjectPiece]:
    """Return the pieces of an object or an upload in order."""
    if isinstance(owner, Upload):
        own = ObjectPiece.upload_id == owner.id
    else:
        own = ObjectPiece.object_seq == owner.seq
    return list(session.scalars(select(ObjectPiece).where(own).order_by(ObjectPiece.number)))


def check_key(key: str) -> None:
    """Raise :class:`ObjectRefused` for an invalid key."""
    if len(key.encode()) > KEY_BYTES:
        raise ObjectRefused("KeyTooLongError", "Your key is too long")
    if not key or "\0" in key:
        raise ObjectRefused("InvalidArgument", "A key must not be empty or contain NUL.")


def remove_uploads(session: Session, bucket: Bucket) -> FreedStorage:
    """Remove all uploads of a bucket."""
    gone = FreedStorage()
    for upload in session.scalars(select(Upload).where(Upload.bucket_seq == bucket.seq)).all():
        gone.add(remove_upload(session, upload))
    return gone


def remove_upload(session: Session, upload: Upload) -> FreedStorage:
    """Remove an upload and its parts."""
    pieces = session.execute(
        select(ObjectPiece.id, ObjectPiece.size).where(ObjectPiece.upload_id == upload.id)
    ).all()
    session.execute(delete(ObjectPiece).where(ObjectPiece.upload_id == upload.id))
    session.delete(upload)
    session.flush()
    ids, sizes = [piece.id for piece in pieces], sum(piece.size for piece in pieces)
    return FreedStorage(ids, sizes)


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
        ipaddress.IPv4Address(name)
    except ValueError:
        return True
    return False
