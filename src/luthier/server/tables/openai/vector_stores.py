"""Vector stores of the OpenAI API, their files and batches of files.

A file of a store is background work until its passages are in the index of the store. The bytes of the
passages count towards the account's storage.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import BigInteger, ForeignKey, UniqueConstraint, delete, func, select
from sqlalchemy.orm import InstrumentedAttribute, Mapped, Session, mapped_column

from luthier.server.tables import storage
from luthier.server.tables.database import (
    MIXED,
    Base,
    JSONText,
    QuotingText,
    find_row,
    now,
    random_id,
)
from luthier.server.tables.openai.uploaded_files import UploadedFile
from luthier.server.tables.queue import BackgroundWork, next_turn

IN_PROGRESS, COMPLETED, FAILED, CANCELLED = "in_progress", "completed", "failed", "cancelled"
ENDED = (COMPLETED, FAILED, CANCELLED)


class VectorStore(Base):
    """Documents with an index."""

    __tablename__ = "vector_stores"

    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    account: Mapped[str] = mapped_column(index=True)
    name: Mapped[str]
    description: Mapped[str | None]
    user_metadata: Mapped[dict[str, Any]]
    expires_days: Mapped[int | None]
    """Lifetime after the last use, in days."""
    last_active: Mapped[datetime]
    created: Mapped[datetime]

    @property
    def expires(self) -> datetime | None:
        """End of the lifetime."""
        return self.last_active + timedelta(self.expires_days) if self.expires_days else None

    @property
    def is_expired(self) -> bool:
        """Whether the lifetime has ended."""
        return self.expires is not None and self.expires <= now()


class VectorStoreBatch(Base):
    """Files added to a store together."""

    __tablename__ = "vector_store_batches"

    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    account: Mapped[str] = mapped_column(index=True)
    store_id: Mapped[str] = mapped_column(ForeignKey("vector_stores.id"), index=True)
    cancelled: Mapped[bool] = mapped_column(default=False)
    created: Mapped[datetime]


class VectorStoreFile(BackgroundWork, Base):
    """File of a store."""

    __tablename__ = "vector_store_files"
    __table_args__ = (UniqueConstraint("store_id", "file_id"),)
    noun = "vector store file"
    ended = ENDED

    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    store_id: Mapped[str] = mapped_column(ForeignKey("vector_stores.id"), index=True)
    file_id: Mapped[str] = mapped_column(index=True)
    filename: Mapped[str]
    batch_id: Mapped[str | None] = mapped_column(index=True)
    attributes: Mapped[dict[str, Any]] = mapped_column(JSONText)
    chunking: Mapped[dict[str, Any]]
    """Size and overlap of passages in tokens; empty for passages along headings."""
    error_code: Mapped[str | None]
    error_message: Mapped[str | None] = mapped_column(QuotingText)
    stored_bytes: Mapped[int] = mapped_column(BigInteger, default=0)


def find_store(
    session: Session, account: str, store_id: str, *, lock: bool = False
) -> VectorStore | None:
    """Return a store of the account; ``lock`` locks the row until the transaction ends."""
    found = select(VectorStore).where(VectorStore.account == account, VectorStore.id == store_id)
    return find_row(session, found, lock=lock)


def find_file(
    session: Session, store_id: str, file_id: str, *, lock: bool = False
) -> VectorStoreFile | None:
    """Return a file of the store; ``lock`` locks the row until the transaction ends."""
    mine = VectorStoreFile.store_id == store_id, VectorStoreFile.file_id == file_id
    return find_row(session, select(VectorStoreFile).where(*mine), lock=lock)


def find_batch(session: Session, store_id: str, batch_id: str) -> VectorStoreBatch | None:
    """Return a batch of the store."""
    mine = VectorStoreBatch.store_id == store_id, VectorStoreBatch.id == batch_id
    return session.scalar(select(VectorStoreBatch).where(*mine))


def create_store(
    session: Session,
    account: str,
    name: str,
    description: str | None,
    metadata: Mapping[str, str],
    expires_days: int | None,
) -> VectorStore:
    """Create an empty store."""
    moment = now()
    store = VectorStore(
        id="vs_" + random_id(24, MIXED), account=account, name=name, description=description,
        user_metadata=dict(metadata), expires_days=expires_days, last_active=moment, created=moment,
    )  # fmt: skip
    session.add(store)
    session.flush()
    return store


def create_batch(session: Session, store: VectorStore) -> VectorStoreBatch:
    """Create a batch without files."""
    batch = VectorStoreBatch(
        id="vsfb_" + random_id(24, MIXED), account=store.account, store_id=store.id, created=now()
    )
    session.add(batch)
    session.flush()
    return batch


def add_files(
    session: Session,
    store: VectorStore,
    caller: dict[str, Any],
    files: Sequence[tuple[UploadedFile, Mapping[str, Any], Mapping[str, Any]]],
    batch_id: str | None = None,
) -> list[VectorStoreFile]:
    """Queue files with attributes and chunking. A file of the store is read again."""
    store.last_active = now()
    turn = next_turn(session, VectorStoreFile, store.account)
    added = []
    for place, (file, attributes, chunking) in enumerate(files):
        before = find_file(session, store.id, file.id, lock=True)
        if before is not None:
            remove_file(session, before)
        row = VectorStoreFile(
            id="vsf_" + random_id(24, MIXED), account=store.account, caller=caller,
            store_id=store.id, file_id=file.id, filename=file.name, batch_id=batch_id,
            attributes=dict(attributes), chunking=dict(chunking), status=IN_PROGRESS,
            turn=turn + place, created=now(),
        )  # fmt: skip
        session.add(row)
        session.flush()
        added.append(row)
    return added


def remove_file(session: Session, row: VectorStoreFile) -> None:
    """Remove a file from the store. The caller has locked the row."""
    session.delete(row)
    session.flush()
    storage.release(session, row.account, stored_bytes=row.stored_bytes)


def stores_of(session: Session, file_id: str) -> list[str]:
    """Return the ids of the stores with a file."""
    mine = VectorStoreFile.file_id == file_id
    return list(session.scalars(select(VectorStoreFile.store_id).where(mine)))


def remove_everywhere(session: Session, file_id: str) -> None:
    """Remove a file from all stores."""
    rows = select(VectorStoreFile).where(VectorStoreFile.file_id == file_id).with_for_update()
    for row in session.scalars(rows).all():
        remove_file(session, row)


def remove_files(session: Session, store: VectorStore) -> None:
    """Remove all files from a store."""
    mine = VectorStoreFile.store_id == store.id
    size = session.scalar(select(func.sum(VectorStoreFile.stored_bytes)).where(mine))
    session.execute(delete(VectorStoreFile).where(mine))
    storage.release(session, store.account, stored_bytes=int(size or 0))


def remove_store(session: Session, store: VectorStore) -> None:
    """Delete a store and the batches. The uploaded files stay."""
    remove_files(session, store)
    session.execute(delete(VectorStoreBatch).where(VectorStoreBatch.store_id == store.id))
    session.delete(store)
    session.flush()


def cancel_batch(session: Session, batch: VectorStoreBatch) -> None:
    """Cancel the unfinished files of a batch."""
    batch.cancelled = True
    mine = VectorStoreFile.batch_id == batch.id, VectorStoreFile.status == IN_PROGRESS
    for row in session.scalars(select(VectorStoreFile).where(*mine).with_for_update()):
        row.status = CANCELLED


def requeue(session: Session, store_id: str) -> None:
    """Queue the complete files of a store without an index, such as after a restored backup."""
    mine = VectorStoreFile.store_id == store_id, VectorStoreFile.status == COMPLETED
    for row in session.scalars(select(VectorStoreFile).where(*mine).with_for_update()):
        storage.release(session, row.account, stored_bytes=row.stored_bytes)
        row.status, row.stored_bytes = IN_PROGRESS, 0


def searchable(session: Session, store_id: str) -> list[VectorStoreFile]:
    """Return the files of a store whose passages are complete."""
    mine = VectorStoreFile.store_id == store_id, VectorStoreFile.status == COMPLETED
    return list(session.scalars(select(VectorStoreFile).where(*mine)))


def kept_files(session: Session, store_id: str) -> set[str]:
    """Return the ids of the files of a store that have passages, or will have passages."""
    status = VectorStoreFile.status.in_((IN_PROGRESS, COMPLETED))
    mine = select(VectorStoreFile.file_id).where(VectorStoreFile.store_id == store_id, status)
    return set(session.scalars(mine))


def end_expired(session: Session) -> None:
    """Remove the files of expired stores."""
    for store in session.scalars(select(VectorStore).where(VectorStore.expires_days.is_not(None))):
        if store.is_expired:
            remove_files(session, store)


def file_counts(
    session: Session, column: InstrumentedAttribute[Any], ids: Sequence[str]
) -> dict[str, tuple[Counter[str], int]]:
    """Return the number of files by status, and their bytes, by id of the store or batch in
    ``column``."""
    counted: dict[str, tuple[Counter[str], int]] = {each: (Counter(), 0) for each in ids}
    columns = column, VectorStoreFile.status, func.count(), func.sum(VectorStoreFile.stored_bytes)
    query = select(*columns).where(column.in_(ids)).group_by(column, VectorStoreFile.status)
    for owner, status, count, size in session.execute(query):
        counts, total = counted[owner]
        counts[status] = count
        counted[owner] = counts, total + int(size)
    return counted
