"""The built-in object store: buckets and objects of each account.

A bucket belongs to one account, and its name is that account's alone: for any other the same name is
free. The bytes of an object are one file, or the files of its parts in their order; see
:mod:`luthier.store.object_files`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import ForeignKey, Index, Text, UniqueConstraint, delete, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from luthier.errors import ObjectRefused
from luthier.store.database import Base, Database, now
from luthier.store.object_files import UNNAMED_SECONDS, ObjectFiles, Written

Key = Text().with_variant(Text(collation="C"), "postgresql")
"""Names that are ordered by their UTF-8 bytes."""
KEY_BYTES = 1024
"""Of a key in UTF-8, at most."""
RESERVED = frozenset({"api", "console", "healthz", "metrics", "openai", "readyz"})
"""Names that are paths of the other faces on the same port."""
BUCKET = r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]"
_FOUND_AGAIN = 5
"""Times that an object is looked up again because it was replaced before its file was opened."""


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
    size: Mapped[int]
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


class Piece(Base):
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
    upload_id: Mapped[str | None] = mapped_column(ForeignKey("uploads.id"))
    number: Mapped[int]
    """1 to 10,000: the order of the parts, which may leave numbers out."""
    size: Mapped[int]
    md5: Mapped[str]
    sha256: Mapped[str]
    checksums: Mapped[dict[str, Any]]
    modified: Mapped[datetime]

    @staticmethod
    def of(account: str, number: int, written: Written, checksums: Mapping[str, str]) -> Piece:
        """A piece that nothing owns yet."""
        return Piece(
            id=written.id, account=account, number=number, size=written.size, md5=written.md5,
            sha256=written.sha256, checksums=dict(checksums), modified=now(),
        )  # fmt: skip


@dataclass(frozen=True)
class Described:
    """What a client says of an object beside its bytes."""

    headers: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    checksums: Mapping[str, str] = field(default_factory=dict)
    """Verified."""


@dataclass(frozen=True)
class Content:
    """The bytes of an object as they were when it was opened."""

    found: StoredObject
    pieces: Sequence[Piece]
    read: Callable[[int, int], Iterator[bytes]]
    """Given the first byte and a number of bytes, yields them; read once."""


Check = Callable[[StoredObject | None], None]
"""Given what a key names now; raises where the caller's condition does not hold."""


class Objects:
    """Buckets and objects. Safe to share between threads and processes."""

    def __init__(self, database: Database, files: ObjectFiles | None = None) -> None:
        """``files`` are below the store unless said otherwise."""
        self.database, self.files = database, files or ObjectFiles()

    # --- buckets

    def create_bucket(self, account: str, name: str) -> Bucket:
        """A new, empty bucket.

        Raises:
            ObjectRefused: ``InvalidBucketName``, ``BucketAlreadyOwnedByYou``.
        """
        if not _bucket_name(name):
            raise ObjectRefused("InvalidBucketName", "The specified bucket is not valid.")
        with self.database.write() as session:
            if _bucket(session, account, name) is not None:
                text = "Your previous request to create the named bucket succeeded and it is yours."
                raise ObjectRefused("BucketAlreadyOwnedByYou", text)
            bucket = Bucket(account=account, name=name, created=now())
            session.add(bucket)
        return bucket

    def buckets(self, account: str) -> list[Bucket]:
        """Those of the account, by name."""
        with self.database.read() as session:
            wanted = select(Bucket).where(Bucket.account == account).order_by(Bucket.name)
            return list(session.scalars(wanted))

    def bucket(self, account: str, name: str) -> Bucket:
        """The bucket; ``NoSuchBucket`` for one that is not there or is another account's."""
        with self.database.read() as session:
            return owned(session, account, name)

    def delete_bucket(self, account: str, name: str) -> None:
        """Remove an empty bucket, with the uploads in it that were never completed.

        Raises:
            ObjectRefused: ``NoSuchBucket``, ``BucketNotEmpty``.
        """
        from luthier.store.uploads import forget_uploads

        with self.database.write() as session:
            bucket = owned(session, account, name, lock=True)
            held = select(StoredObject.seq).where(StoredObject.bucket_seq == bucket.seq).limit(1)
            if session.scalar(held) is not None:
                text = "The bucket you tried to delete is not empty."
                raise ObjectRefused("BucketNotEmpty", text)
            gone = forget_uploads(session, bucket)
            session.delete(bucket)
        self.files.remove(account, gone)

    # --- objects

    def put(
        self,
        account: str,
        bucket: str,
        key: str,
        written: Written,
        described: Described,
        check: Check | None = None,
    ) -> StoredObject:
        """Let ``key`` name what was written; what it named before is gone.

        Raises:
            ObjectRefused: ``NoSuchBucket``, ``KeyTooLongError``, or what ``check`` raises. The file
                that was written is removed then.
        """
        piece = Piece.of(account, 1, written, described.checksums)
        return self.place(account, bucket, key, [piece], written.md5, 0, described, check)

    def place(
        self,
        account: str,
        bucket: str,
        key: str,
        pieces: Sequence[Piece],
        etag: str,
        parts: int,
        described: Described,
        check: Check | None = None,
    ) -> StoredObject:
        """As :meth:`put`, for new pieces that are to stand one after the other."""
        try:
            check_key(key)
            with self.database.write() as session:
                found = owned(session, account, bucket, lock=True)
                gone = replace(session, found, key, check)
                made = new_object(found, key, pieces, etag, parts, described)
                session.add(made)
                session.flush()
                for piece in pieces:
                    piece.object_seq = made.seq
                session.add_all(pieces)
        except BaseException:
            self.files.remove(account, [piece.id for piece in pieces])
            raise
        self.files.remove(account, gone)
        return made

    def head(self, account: str, bucket: str, key: str) -> StoredObject:
        """What a key names; ``NoSuchBucket`` or ``NoSuchKey`` where it names nothing."""
        with self.database.read() as session:
            return _named(session, account, bucket, key)

    def open(self, account: str, bucket: str, key: str) -> Content:
        """What a key names, with its bytes, in one consistent state; raises as :meth:`head`."""
        with self.database.read() as session:
            found = _named(session, account, bucket, key)
            pieces = pieces_of(session, found)
        files = [(piece.id, piece.size) for piece in pieces]
        return Content(found, pieces, lambda s, n: self.files.read(account, files, s, n))

    def reading(
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
            return content.found, _joined(first, pieces)
        raise AssertionError("not reached")

    def copy(
        self,
        account: str,
        source: tuple[str, str],
        target: tuple[str, str],
        described: Callable[[StoredObject], Described],
    ) -> StoredObject:
        """Let ``target`` (bucket, key) name the same bytes as ``source``, without copying them.

        ``described`` says what the copy is described by, given the source; it may raise.
        """
        content = self.open(account, *source)
        told = described(content.found)
        pieces: list[Piece] = []
        try:
            for piece in content.pieces:
                written = Written(
                    self.files.link(account, piece.id), piece.size, piece.md5, piece.sha256
                )
                pieces.append(Piece.of(account, piece.number, written, piece.checksums))
        except FileNotFoundError:
            self.files.remove(account, [piece.id for piece in pieces])
            return self.copy(account, source, target, described)
        found = content.found
        return self.place(account, *target, pieces, found.etag, found.parts, told)

    def delete(self, account: str, bucket: str, keys: Sequence[str]) -> None:
        """Remove what the keys name; a key that names nothing is no error."""
        gone: list[str] = []
        with self.database.write() as session:
            found = owned(session, account, bucket, lock=True)
            for key in keys:
                gone += replace(session, found, key, None)
        self.files.remove(account, gone)

    def sweep(self, older_than: float = UNNAMED_SECONDS) -> int:
        """Remove the files that a killed process left; how many there were. Done at each start."""
        return self.files.sweep(self._named_files, older_than)

    def _named_files(self, start: str) -> set[str]:
        with self.database.read() as session:
            return set(session.scalars(select(Piece.id).where(Piece.id.startswith(start))))


def owned(session: Session, account: str, name: str, *, lock: bool = False) -> Bucket:
    """The account's bucket; with ``lock``, nobody else changes what is in it meanwhile.

    Raises:
        ObjectRefused: ``NoSuchBucket``.
    """
    bucket = _bucket(session, account, name, lock)
    if bucket is None:
        raise ObjectRefused("NoSuchBucket", "The specified bucket does not exist")
    return bucket


def replace(session: Session, bucket: Bucket, key: str, check: Check | None) -> list[str]:
    """Remove the rows of what ``key`` names, if anything; the files that nothing names then."""
    found = session.scalar(
        select(StoredObject).where(StoredObject.bucket_seq == bucket.seq, StoredObject.key == key)
    )
    if check is not None:
        check(found)
    if found is None:
        return []
    gone = list(session.scalars(select(Piece.id).where(Piece.object_seq == found.seq)))
    session.execute(delete(Piece).where(Piece.object_seq == found.seq))
    session.delete(found)
    session.flush()
    return gone


def new_object(
    bucket: Bucket,
    key: str,
    pieces: Sequence[Piece],
    etag: str,
    parts: int,
    described: Described,
) -> StoredObject:
    """The row of an object, not yet in the database."""
    return StoredObject(
        account=bucket.account, bucket_seq=bucket.seq, key=key,
        size=sum(piece.size for piece in pieces), etag=etag, parts=parts,
        headers=dict(described.headers), user_metadata=dict(described.metadata),
        checksums=dict(described.checksums), modified=now(),
    )  # fmt: skip


def pieces_of(session: Session, found: StoredObject) -> list[Piece]:
    """The files of an object, in order."""
    wanted = select(Piece).where(Piece.object_seq == found.seq).order_by(Piece.number)
    return list(session.scalars(wanted))


def check_key(key: str) -> None:
    """Refuse what cannot be a key: ``KeyTooLongError``, ``InvalidArgument``."""
    if len(key.encode()) > KEY_BYTES:
        raise ObjectRefused("KeyTooLongError", "Your key is too long")
    if not key or "\0" in key:
        raise ObjectRefused("InvalidArgument", "A key is not empty and holds no NUL.")


def _bucket(session: Session, account: str, name: str, lock: bool = False) -> Bucket | None:
    wanted = select(Bucket).where(Bucket.account == account, Bucket.name == name)
    return session.scalar(wanted.with_for_update() if lock else wanted)


def _named(session: Session, account: str, bucket: str, key: str) -> StoredObject:
    seq = owned(session, account, bucket).seq
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


def _joined(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    if first:
        yield first
    yield from rest
