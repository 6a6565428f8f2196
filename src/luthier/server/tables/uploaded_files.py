"""Files that clients of the OpenAI API uploaded, and those that jobs and batches wrote for them.

The bytes are objects of the built-in object store, in one bucket of the account: jobs read and write
them as they do any other data, by ``s3://luthier-files/<id>``. What only OpenAI's clients know of a
file (its label, purpose and end) is a row here. A file that is deleted or whose time is over keeps its
row without its bytes, so that a list which is being read page by page finds its place again; clients
see neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import BigInteger, Select, or_, select, update
from sqlalchemy.orm import Mapped, Session, mapped_column

from luthier.errors import ObjectRefused
from luthier.ids import random_id
from luthier.server.tables.database import Base, Database, now, page_of
from luthier.server.tables.object_files import FileWriter, WrittenFile
from luthier.server.tables.objects import UPLOADS, ObjectMetadata, Objects


class UploadedFile(Base):
    """One file."""

    __tablename__ = "uploaded_files"

    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    """``file-`` and letters and digits, drawn at random; the key of its object."""
    account: Mapped[str] = mapped_column(index=True)
    name: Mapped[str]
    """As the client called it: a label, never a path."""
    purpose: Mapped[str]
    size: Mapped[int] = mapped_column(BigInteger)
    """Bytes."""
    sha256: Mapped[str]
    created: Mapped[datetime]
    expires: Mapped[datetime | None]
    deleted: Mapped[datetime | None]


class _AlreadyThere(Exception):
    """There is, or was, a file with this id."""


def file_address(file_id: str) -> str:
    """How jobs name the bytes of a file."""
    return f"s3://{UPLOADS}/{file_id}"


class UploadedFiles:
    """The files of all accounts. Safe to share between threads and processes."""

    def __init__(self, database: Database, objects: Objects) -> None:
        self.database, self.objects = database, objects

    def add(
        self,
        account: str,
        pieces: Iterable[bytes],
        name: str,
        purpose: str,
        lives: timedelta | None = None,
        file_id: str | None = None,
    ) -> UploadedFile:
        """Keep bytes as a file of ``account``, whole or not at all; it is gone after ``lives``.

        With a ``file_id`` that is there already, what is there stays and is returned.
        """
        with self.begin(account) as file:
            for piece in pieces:
                file.write(piece)
            written = file.finish()
        return self.keep(account, written, name, purpose, lives, file_id)

    def begin(self, account: str, size: int | None = None) -> FileWriter:
        """Where the bytes of a new file go, to be used in a ``with``; :meth:`keep` gives it a name.

        ``size`` is how many will come, where that is known.

        Raises:
            QuotaExceeded: where the account has no room for them; ``write`` raises it as well.
        """
        try:
            self.objects.create_bucket(account, UPLOADS)
        except ObjectRefused as refused:
            if refused.rule != "BucketAlreadyOwnedByYou":
                raise
        return self.objects.begin(account, size)

    def keep(
        self,
        account: str,
        written: WrittenFile,
        name: str,
        purpose: str,
        lives: timedelta | None = None,
        file_id: str | None = None,
    ) -> UploadedFile:
        """As :meth:`add`, of what was written after :meth:`begin`."""
        file_id, made = file_id or "file-" + random_id(24), now()
        row = UploadedFile(
            id=file_id,
            account=account,
            name=name,
            purpose=purpose,
            size=written.size,
            sha256=written.sha256,
            created=made,
            expires=made + lives if lives else None,
            deleted=None,
        )
        known = select(UploadedFile).where(UploadedFile.id == file_id)

        def note(session: Session) -> None:
            if session.scalar(known) is not None:
                raise _AlreadyThere  # ends the transaction, and the new bytes go
            session.add(row)
            session.flush()

        try:
            self.objects.put(account, UPLOADS, file_id, written, ObjectMetadata(), also=note)
        except _AlreadyThere:
            with self.database.read() as session:
                return session.scalars(known).one()
        return row

    def get(self, account: str, file_id: str) -> UploadedFile | None:
        """The file of this account; ``None`` for what is gone or another's."""
        with self.database.read() as session:
            found: UploadedFile | None = session.scalar(
                _there(account).where(UploadedFile.id == file_id)
            )
            return found

    def ever(self, account: str, file_id: str) -> bool:
        """Whether there is or was such a file."""
        with self.database.read() as session:
            return _place(session, account, file_id) is not None

    def list(
        self,
        account: str,
        limit: int,
        *,
        after: str | None = None,
        purpose: str | None = None,
        ascending: bool = False,
    ) -> list[UploadedFile] | None:
        """``limit`` files behind ``after``, by creation; ``None`` where ``after`` never was."""
        wanted = _there(account)
        if purpose is not None:
            wanted = wanted.where(UploadedFile.purpose == purpose)
        with self.database.read() as session:
            place = None if after is None else _place(session, account, after)
            if place is None and after is not None:
                return None
            return page_of(
                session, wanted, UploadedFile.seq, limit=limit, position=place, ascending=ascending
            )

    def read(self, row: UploadedFile) -> Iterator[bytes]:
        """The bytes of a file, in pieces."""
        _, pieces = self.objects.open_range(
            row.account, UPLOADS, row.id, lambda found: (0, found.size)
        )
        return pieces

    def delete(self, account: str, file_id: str) -> bool:
        """Forget a file and its bytes; whether there was one."""
        if self.get(account, file_id) is None:
            return False
        return self._forget(account, file_id)

    def remove_expired(self) -> int:
        """Delete what is past its time; how many files that were."""
        late = select(UploadedFile).where(
            UploadedFile.deleted.is_(None), UploadedFile.expires <= now()
        )
        with self.database.read() as session:
            rows = list(session.scalars(late))
        return sum(self._forget(row.account, row.id) for row in rows)

    def _forget(self, account: str, file_id: str) -> bool:
        """Let row and object go in one transaction; whether they were there."""
        marked = 0

        def mark(session: Session) -> None:
            nonlocal marked
            mine = UploadedFile.id == file_id, UploadedFile.deleted.is_(None)
            done = (
                update(UploadedFile).where(*mine).values(deleted=now()).returning(UploadedFile.seq)
            )
            marked = len(session.execute(done).all())

        try:
            self.objects.delete(account, UPLOADS, [file_id], mark)
        except ObjectRefused:
            # The bucket was deleted, and its objects before it.
            with self.database.write() as session:
                mark(session)
        return bool(marked)


def _place(session: Session, account: str, file_id: str) -> int | None:
    mine = UploadedFile.account == account, UploadedFile.id == file_id
    return session.scalar(select(UploadedFile.seq).where(*mine))


def _there(account: str) -> Select[Any]:
    """Files of an account that are neither deleted nor past their time."""
    return select(UploadedFile).where(
        UploadedFile.account == account,
        UploadedFile.deleted.is_(None),
        or_(UploadedFile.expires.is_(None), UploadedFile.expires > now()),
    )
