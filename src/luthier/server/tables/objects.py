"""Buckets, objects and incomplete uploads of each account, as rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import BigInteger, ForeignKey, Index, Text, UniqueConstraint, delete, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from luthier.errors import ObjectRefused
from luthier.server.tables.database import Base, find_row, now
from luthier.server.tables.storage import FreedStorage

if TYPE_CHECKING:
    from luthier.server.stores.object_files import WrittenFile

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
