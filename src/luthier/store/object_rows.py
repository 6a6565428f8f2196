"""Tables of the object store, and what is done with their rows inside one transaction."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Index, Text, UniqueConstraint, delete, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from luthier.errors import ObjectRefused
from luthier.store.database import Base, now
from luthier.store.object_files import Written
from luthier.store.storage import Removed

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
    upload_id: Mapped[str | None] = mapped_column(ForeignKey("object_uploads.id"))
    number: Mapped[int]
    """1 to 10,000: the order of the parts, which may leave numbers out."""
    size: Mapped[int] = mapped_column(BigInteger)
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
class Described:
    """What a client says of an object beside its bytes."""

    headers: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    checksums: Mapping[str, str] = field(default_factory=dict)
    """Verified."""


Check = Callable[[StoredObject | None], None]
"""Given what a key names now; raises where the caller's condition does not hold."""


def owned(session: Session, account: str, name: str, *, lock: bool = False) -> Bucket:
    """The account's bucket; with ``lock``, nobody else changes what is in it meanwhile.

    Raises:
        ObjectRefused: ``NoSuchBucket``.
    """
    bucket = _bucket(session, account, name, lock)
    if bucket is None:
        raise ObjectRefused("NoSuchBucket", "The specified bucket does not exist")
    return bucket


def replace(session: Session, bucket: Bucket, key: str, check: Check | None) -> Removed:
    """Remove the rows of what ``key`` names, if anything."""
    found = session.scalar(
        select(StoredObject).where(StoredObject.bucket_seq == bucket.seq, StoredObject.key == key)
    )
    if check is not None:
        check(found)
    if found is None:
        return Removed()
    gone = list(session.scalars(select(Piece.id).where(Piece.object_seq == found.seq)))
    session.execute(delete(Piece).where(Piece.object_seq == found.seq))
    session.delete(found)
    session.flush()
    return Removed(gone, found.size, objects=1)


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


def forget_uploads(session: Session, bucket: Bucket) -> Removed:
    """Remove the uploads of a bucket that is to go."""
    gone = Removed()
    for upload in session.scalars(select(Upload).where(Upload.bucket_seq == bucket.seq)).all():
        gone.add(forget_upload(session, upload))
    return gone


def forget_upload(session: Session, upload: Upload) -> Removed:
    """Remove an upload and its parts."""
    pieces = session.execute(select(Piece.id, Piece.size).where(Piece.upload_id == upload.id)).all()
    session.execute(delete(Piece).where(Piece.upload_id == upload.id))
    session.delete(upload)
    session.flush()
    ids, sizes = [piece.id for piece in pieces], sum(piece.size for piece in pieces)
    return Removed(ids, sizes, uploads_in_progress=1)


def _bucket(session: Session, account: str, name: str, lock: bool = False) -> Bucket | None:
    wanted = select(Bucket).where(Bucket.account == account, Bucket.name == name)
    return session.scalar(wanted.with_for_update() if lock else wanted)
