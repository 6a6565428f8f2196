"""The built-in object store: buckets and objects of each account.

A bucket belongs to one account, and its name is that account's alone: for any other the same name is
free. The bytes of an object are one file, or the files of its parts in their order; see
:mod:`luthier.server.tables.object_files`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from itertools import chain
from typing import Any

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
"""Names that are ordered by their UTF-8 bytes."""
UPLOADS = "luthier-files"
"""Bucket of each account with what was uploaded through the OpenAI API."""
KEY_BYTES = 1024
"""Of a key in UTF-8, at most."""


class Bucket(Base):
    """A bucket of one account."""

    __tablename__ = "buckets"
    __table_args__ = (UniqueConstraint("account", "name"),)

    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    account: Mapped[str]
    name: Mapped[str] = mapped_column(Key)
    created: Mapped[datetime]


class StoredObject(Base):
    """An object: what a key of a bucket names."""

    __tablename__ = "objects"
    __table_args__ = (UniqueConstraint("bucket_seq", "key"),)

    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    account: Mapped[str]
    bucket_seq: Mapped[int] = mapped_column(ForeignKey("buckets.seq"))
    key: Mapped[str] = mapped_column(Key)
    size: Mapped[int] = mapped_column(BigInteger)
    """Bytes."""
    etag: Mapped[str]
    """MD5 in hexadecimal; of an object made of parts, the MD5 of their MD5s, ``-`` and their number."""
    parts: Mapped[int] = mapped_column(default=0)
    """Parts that it was uploaded in; 0 for one that came as a whole."""
    headers: Mapped[dict[str, Any]]
    """``Content-Type`` and the like, to be given back as they came."""
    user_metadata: Mapped[dict[str, Any]]
    """Values of ``x-amz-meta-*`` by the rest of the name."""
    checksums: Mapped[dict[str, Any]]
    """Base64 by algorithm, such as ``crc32``; of parts, with ``-`` and their number."""
    modified: Mapped[datetime]


class ObjectPiece(Base):
    """A file of bytes: of an object, or of a part whose upload is not complete."""

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
    """1 to 10,000: the order of the parts, which may leave numbers out."""
    size: Mapped[int] = mapped_column(BigInteger)
    md5: Mapped[str]
    sha256: Mapped[str]
    checksums: Mapped[dict[str, Any]]
    modified: Mapped[datetime]

    @staticmethod
    def of(
        account: str, number: int, written: WrittenFile, checksums: Mapping[str, str]
    ) -> ObjectPiece:
        """A piece that nothing owns yet."""
        return ObjectPiece(
            id=written.id, account=account, number=number, size=written.size, md5=written.md5,
            sha256=written.sha256, checksums=dict(checksums), modified=now(),
        )  # fmt: skip


class Upload(Base):
    """A multipart upload that was neither completed nor aborted."""

    __tablename__ = "object_uploads"

    id: Mapped[str] = mapped_column(primary_key=True)
    account: Mapped[str]
    bucket_seq: Mapped[int] = mapped_column(ForeignKey("buckets.seq"), index=True)
    key: Mapped[str] = mapped_column(Key)
    headers: Mapped[dict[str, Any]]
    user_metadata: Mapped[dict[str, Any]]
    checksum: Mapped[str]
    """Algorithm of its parts' checksums, such as ``crc32``; empty for none."""
    checksum_type: Mapped[str]
    """``COMPOSITE`` or ``FULL_OBJECT``; empty for none."""
    created: Mapped[datetime]


@dataclass(frozen=True)
class ObjectMetadata:
    """What a client says of an object beside its bytes."""

    headers: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    checksums: Mapping[str, str] = field(default_factory=dict)
    """Verified."""


Check = Callable[[StoredObject | None], None]
"""Given what a key names now; raises where the caller's condition does not hold."""


def get_bucket(session: Session, account: str, name: str, *, lock: bool = False) -> Bucket:
    """The account's bucket; with ``lock``, nobody else changes what is in it meanwhile.

    Raises:
        ObjectRefused: ``NoSuchBucket``.
    """
    query = select(Bucket).where(Bucket.account == account, Bucket.name == name)
    bucket = find_row(session, query, lock=lock)
    if bucket is None:
        raise ObjectRefused("NoSuchBucket", "The specified bucket does not exist")
    return bucket


def remove_object(session: Session, bucket: Bucket, key: str, check: Check | None) -> FreedStorage:
    """Remove the rows of what ``key`` names, if anything."""
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
    """The row of an object, not yet in the database."""
    return StoredObject(
        account=bucket.account, bucket_seq=bucket.seq, key=key,
        size=sum(piece.size for piece in pieces), etag=etag, parts=parts,
        headers=dict(described.headers), user_metadata=dict(described.metadata),
        checksums=dict(described.checksums), modified=now(),
    )  # fmt: skip


def pieces_of(session: Session, owner: StoredObject | Upload) -> list[ObjectPiece]:
    """The files of an object, or of an upload's parts, in order."""
    if isinstance(owner, Upload):
        own = ObjectPiece.upload_id == owner.id
    else:
        own = ObjectPiece.object_seq == owner.seq
    return list(session.scalars(select(ObjectPiece).where(own).order_by(ObjectPiece.number)))


def check_key(key: str) -> None:
    """Refuse what cannot be a key: ``KeyTooLongError``, ``InvalidArgument``."""
    if len(key.encode()) > KEY_BYTES:
        raise ObjectRefused("KeyTooLongError", "Your key is too long")
    if not key or "\0" in key:
        raise ObjectRefused("InvalidArgument", "A key is not empty and holds no NUL.")


def remove_uploads(session: Session, bucket: Bucket) -> FreedStorage:
    """Remove the uploads of a bucket that is to go."""
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
"""Names that are paths of the other faces on the same port."""
_FOUND_AGAIN = 5
"""Times that an object is looked up again because it was replaced before its file was opened."""


@dataclass(frozen=True)
class Content:
    """The bytes of an object as they were when it was opened."""

    found: StoredObject
    pieces: Sequence[ObjectPiece]
    read: Callable[[int, int], Iterator[bytes]]
    """Given the first byte and a number of bytes, yields them; read once."""

    @property
    def ids(self) -> list[str]:
        """Names of its files, which tell it from what the key named before and names after."""
        return [piece.id for piece in self.pieces]


class Objects:
    """Buckets and objects. Safe to share between threads and processes."""

    def __init__(
        self,
        database: Database,
        files: ObjectFiles | None = None,
        quotas: AccountQuotas | None = None,
    ) -> None:
        """``files`` are below the store unless said otherwise.

        ``quotas`` are those of accounts without quotas of their own.
        """
        self.database, self.files = database, files or ObjectFiles()
        self._defaults = quotas or AccountQuotas()

    def quotas(self, session: Session, account: str) -> AccountQuotas:
        """What the account may store."""
        return quotas_of(session, account, self._defaults)

    def check(self, account: str, stored_bytes: int) -> None:
        """Refuse early what has no room; see :func:`luthier.server.tables.storage.check`."""
        with self.database.read() as session:
            quotas = self.quotas(session, account)
            storage.check(session, account, quotas, stored_bytes=stored_bytes)

    def begin(self, account: str, size: int | None = None, *, freed: int = 0) -> FileWriter:
        """Return a new file for bytes of the account, to be used in a ``with`` until rows name it.

        Args:
            account: owner of the bytes.
            size: number of bytes that will come, if known.
            freed: bytes of the object or part that the new one replaces.

        Raises:
            QuotaExceeded: if the account has no room.
        """
        self.check(account, (1 if size is None else size) - freed)
        return self.files.begin(account)

    # --- buckets

    def create_bucket(self, account: str, name: str) -> Bucket:
        """A new, empty bucket.

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
        """Those of the account, by name."""
        with self.database.read() as session:
            query = select(Bucket).where(Bucket.account == account).order_by(Bucket.name)
            return list(session.scalars(query))

    def bucket(self, account: str, name: str) -> Bucket:
        """The bucket; ``NoSuchBucket`` for one that is not there or is another account's."""
        with self.database.read() as session:
            return get_bucket(session, account, name)

    def delete_bucket(self, account: str, name: str) -> None:
        """Remove an empty bucket, with the uploads in it that were never completed.

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
        """Let ``key`` name what was written; what it named before is gone.

        ``also`` writes what is to be there with the object or not at all.

        Raises:
            ObjectRefused: ``NoSuchBucket``, ``KeyTooLongError``, or what ``check`` raises.
            QuotaExceeded: where the account has no room for it.
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
        """As :meth:`put`, for new pieces that are to stand one after the other."""
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
        """A transaction whose rows name new files, which are removed after an error.

        After a failed commit the rows may exist: :meth:`sweep` removes the files later if not.
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
        """What a key names; ``NoSuchBucket`` or ``NoSuchKey`` where it names nothing."""
        with self.database.read() as session:
            return _get_object(session, account, bucket, key)

    def open(self, account: str, bucket: str, key: str) -> Content:
        """What a key names, with its bytes, in one consistent state; raises as :meth:`head`."""
        with self.database.read() as session:
            found = _get_object(session, account, bucket, key)
            pieces = pieces_of(session, found)
        files = [(piece.id, piece.size) for piece in pieces]
        return Content(found, pieces, lambda s, n: self.files.read(account, files, s, n))

    def open_range(
        self, account: str, bucket: str, key: str, span: Callable[[StoredObject], tuple[int, int]]
    ) -> tuple[StoredObject, Iterator[bytes]]:
        """An object and some of its bytes: the first piece is read, so that the rest will come too.

        Args:
            account: whose it is.
            bucket: name.
            key: name.
            span: first byte and number of bytes that are wanted of the object; may raise.
        """
        for last in range(_FOUND_AGAIN):
            content = self.open(account, bucket, key)
            pieces = content.read(*span(content.found))
            try:
                first = next(pieces, b"")
            except FileNotFoundError:
                # Replaced since it was looked up: the new one is meant then.
                if last == _FOUND_AGAIN - 1:
                    raise
                continue
            return content.found, chain([first] if first else [], pieces)
        raise AssertionError("not reached")

    def copy(
        self,
        account: str,
        source: tuple[str, str],
        target: tuple[str, str],
        described: Callable[[StoredObject], ObjectMetadata],
    ) -> StoredObject:
        """Let ``target`` (bucket, key) name the same bytes as ``source``, without copying them.

        ``described`` says what the copy is described by, given the source; it may raise.
        """
        content = self.open(account, *source)
        description = described(content.found)
        pieces: list[ObjectPiece] = []
        try:
            for piece in content.pieces:
                written = WrittenFile(
                    self.files.link(account, piece.id),
                    piece.size,
                    piece.md5,
                    piece.sha256,
                )
                pieces.append(ObjectPiece.of(account, piece.number, written, piece.checksums))
        except Exception as error:
            self.files.remove(account, [piece.id for piece in pieces])
            if not isinstance(error, FileNotFoundError):
                raise
            # Replaced since it was looked up: the new one is meant. If not, the bytes are lost.
            if self.open(account, *source).ids == content.ids:
                raise CorruptFile(f"the bytes of {'/'.join(source)} are missing") from None
            return self.copy(account, source, target, described)
        found = content.found
        return self.place(account, *target, pieces, found.etag, found.parts, description)

    def delete(
        self,
        account: str,
        bucket: str,
        keys: Sequence[str],
        also: Callable[[Session], None] | None = None,
    ) -> None:
        """Remove what the keys name; a key that names nothing is no error.

        ``also`` writes what is to be known when they are gone, and not before.
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
        """Remove files that a killed process left, and return their number."""
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
