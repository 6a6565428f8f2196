"""Multipart uploads of the object store."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from luthier.errors import ObjectRefused
from luthier.server.stores.object_files import WrittenFile
from luthier.server.stores.objects import Objects
from luthier.server.tables import storage
from luthier.server.tables.database import find_row, new_id, now
from luthier.server.tables.objects import (
    Bucket,
    Check,
    ObjectMetadata,
    ObjectPiece,
    StoredObject,
    Upload,
    check_key,
    get_bucket,
    new_object,
    pieces_of,
    remove_object,
    remove_upload,
)
from luthier.server.tables.storage import FreedStorage

LEAST_PART = 5 << 20
"""Minimum size of each part but the last, in bytes."""
MOST_PARTS = 10_000


@dataclass(frozen=True)
class CompletedPart:
    """Part in the request that completes an upload."""

    number: int
    etag: str
    checksums: dict[str, str]


class MultipartUploads:
    """Multipart uploads of an object store."""

    def __init__(self, objects: Objects) -> None:
        self.objects, self.database, self.files = objects, objects.database, objects.files

    def create(
        self,
        account: str,
        bucket: str,
        key: str,
        described: ObjectMetadata,
        checksum: tuple[str, str],
    ) -> Upload:
        """Create an upload; ``checksum`` is the algorithm and the type, or two empty strings."""
        check_key(key)
        with self.database.write() as session:
            found = get_bucket(session, account, bucket, lock=True)
            made = Upload(
                id=new_id() + new_id(), account=account, bucket_seq=found.seq, key=key,
                headers=dict(described.headers), user_metadata=dict(described.metadata),
                checksum=checksum[0], checksum_type=checksum[1], created=now(),
            )  # fmt: skip
            session.add(made)
            session.flush()
            quotas = self.objects.quotas(session, account)
            storage.check(session, account, quotas, stored_bytes=1)
        return made

    def put_part(
        self,
        account: str,
        bucket: str,
        key: str,
        upload_id: str,
        number: int,
        written: WrittenFile,
        checksums: dict[str, str],
    ) -> ObjectPiece:
        """Store a part, in place of a part of the same number; raises as :meth:`Objects.put`."""
        piece = ObjectPiece.of(account, number, written, checksums)
        with self.objects.name_files(account, [written.id]) as session:
            _upload(session, account, bucket, key, upload_id, lock=True)
            before = select(ObjectPiece).where(
                ObjectPiece.upload_id == upload_id, ObjectPiece.number == number
            )
            old = session.scalar(before)
            if old is not None:
                session.delete(old)
                session.flush()
            piece.upload_id = upload_id
            session.add(piece)
            session.flush()
            more = written.size - (0 if old is None else old.size)
            quotas = self.objects.quotas(session, account)
            storage.charge(session, account, quotas, stored_bytes=more)
        self.files.remove(account, [old.id] if old is not None else [])
        return piece

    def part(
        self, account: str, bucket: str, key: str, upload_id: str, number: int
    ) -> ObjectPiece | None:
        """Return the part with this number, or ``None``."""
        with self.database.read() as session:
            _upload(session, account, bucket, key, upload_id)
            query = select(ObjectPiece).where(
                ObjectPiece.upload_id == upload_id, ObjectPiece.number == number
            )
            found: ObjectPiece | None = session.scalar(query)
            return found

    def complete(
        self,
        account: str,
        bucket: str,
        key: str,
        upload_id: str,
        chosen: Sequence[CompletedPart],
        checksum: Callable[[Upload, Sequence[ObjectPiece]], dict[str, str]],
        check: Check | None = None,
    ) -> StoredObject:
        """Create the object of the chosen parts and remove the other parts.

        ``checksum`` returns the checksums of the object from those of the parts, and may raise. A
        client that repeats the request, because the response was lost, gets the same object.

        Raises:
            ObjectRefused: ``NoSuchUpload``, ``InvalidPart``, ``InvalidPartOrder``, ``EntityTooSmall``.
        """
        with self.database.write() as session:
            found = get_bucket(session, account, bucket, lock=True)
            try:
                upload = _upload(session, account, bucket, key, upload_id, lock=True)
            except ObjectRefused:
                made = _made_before(session, found, key, chosen)
                if made is None:
                    raise
                return made
            there = pieces_of(session, upload)
            pieces = _select_parts(there, chosen)
            taken = {piece.id for piece in pieces}
            gone = remove_object(session, found, key, check)
            left = [piece for piece in there if piece.id not in taken]
            gone.add(FreedStorage([piece.id for piece in left], sum(piece.size for piece in left)))
            described = ObjectMetadata(
                upload.headers, upload.user_metadata, checksum(upload, pieces)
            )
            etag = _etag([piece.md5 for piece in pieces])
            made = new_object(found, key, pieces, etag, len(pieces), described)
            session.add(made)
            session.flush()
            for piece in pieces:
                piece.object_seq, piece.upload_id = made.seq, None
            session.flush()
            session.execute(delete(ObjectPiece).where(ObjectPiece.upload_id == upload_id))
            session.delete(upload)
            session.flush()
            storage.release(session, account, stored_bytes=gone.stored_bytes)
        self.files.remove(account, gone.files)
        return made

    def abort(self, account: str, bucket: str, key: str, upload_id: str) -> None:
        """Remove an upload and its parts."""
        with self.database.write() as session:
            upload = _upload(session, account, bucket, key, upload_id, lock=True)
            gone = remove_upload(session, upload)
            storage.release(session, account, stored_bytes=gone.stored_bytes)
        self.files.remove(account, gone.files)


def _upload(
    session: Session, account: str, bucket: str, key: str, upload_id: str, *, lock: bool = False
) -> Upload:
    seq = get_bucket(session, account, bucket).seq
    query = select(Upload).where(
        Upload.id == upload_id, Upload.bucket_seq == seq, Upload.key == key
    )
    found = find_row(session, query, lock=lock)
    if found is None:
        text = (
            "The specified upload does not exist. The upload ID may be invalid, or the upload may "
            "have been aborted or completed."
        )
        raise ObjectRefused("NoSuchUpload", text)
    return found


def _select_parts(
    there: Sequence[ObjectPiece], chosen: Sequence[CompletedPart]
) -> list[ObjectPiece]:
    """Return the stored parts that the client names, after a comparison of the ETags."""
    numbers = [each.number for each in chosen]
    if numbers != sorted(set(numbers)):
        text = "The list of parts was not in ascending order. Parts must be ordered by part number."
        raise ObjectRefused("InvalidPartOrder", text)
    by_number = {piece.number: piece for piece in there}
    picked: list[ObjectPiece] = []
    for each in chosen:
        piece = by_number.get(each.number)
        checksums = each.checksums.items()
        if piece is None or piece.md5 != each.etag or not checksums <= piece.checksums.items():
            text = (
                "One or more of the specified parts could not be found. The part may not have been "
                "uploaded, or the specified entity tag may not match the part's entity tag."
            )
            raise ObjectRefused("InvalidPart", text)
        picked.append(piece)
    if any(piece.size < LEAST_PART for piece in picked[:-1]):
        text = "Your proposed upload is smaller than the minimum allowed size"
        raise ObjectRefused("EntityTooSmall", text)
    return picked


def _made_before(
    session: Session, bucket: Bucket, key: str, chosen: Sequence[CompletedPart]
) -> StoredObject | None:
    """Return the object if an earlier request already completed the upload."""
    try:
        etag = _etag([each.etag for each in chosen])
    except ValueError:
        return None
    query = select(StoredObject).where(
        StoredObject.bucket_seq == bucket.seq, StoredObject.key == key, StoredObject.etag == etag
    )
    return session.scalar(query)


def _etag(parts: Sequence[str]) -> str:
    """Return the ETag of an object from the MD5s of its parts."""
    digests = b"".join(bytes.fromhex(part) for part in parts)
    return f"{hashlib.md5(digests, usedforsecurity=False).hexdigest()}-{len(parts)}"
