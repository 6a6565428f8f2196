"""Files of the OpenAI API: uploads of clients, and outputs of jobs and batches.

The bytes are objects in one bucket of the account's built-in store, and jobs use their addresses
``s3://luthier-files/<id>``. A row stores the members that only OpenAI clients use: label, purpose
and expiry. A deleted or expired file keeps an invisible row without bytes, so that a client can
continue to page through a list.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from datetime import timedelta
from itertools import chain, count
from pathlib import PurePath
from typing import Any

from sqlalchemy import Select, or_, select, update
from sqlalchemy.orm import Session

from luthier.errors import ObjectRefused
from luthier.server.stores.object_files import FileWriter, WrittenFile
from luthier.server.stores.objects import Objects
from luthier.server.tables.database import MIXED, Database, now, page_of, random_id
from luthier.server.tables.objects import UPLOADS, ObjectMetadata
from luthier.server.tables.openai import vector_stores
from luthier.server.tables.openai.uploaded_files import UploadedFile


class _IdInUse(Exception):
    """Error for an id that is or was in use."""


def file_address(file_id: str) -> str:
    """Return the address of a file for jobs."""
    return f"s3://{UPLOADS}/{file_id}"


class UploadedFiles:
    """Files of all accounts. Safe to share between threads and processes."""

    def __init__(self, database: Database, objects: Objects) -> None:
        self.database, self.objects = database, objects

    def add(
        self,
        account: str,
        pieces: Iterable[bytes],
        name: str,
        purpose: str,
        lifetime: timedelta | None = None,
        file_id: str | None = None,
    ) -> UploadedFile:
        """Store bytes as a file of ``account``, completely or not at all. The file expires after
        ``lifetime``.

        If ``file_id`` exists, the existing file is returned unchanged.
        """
        with self.begin(account) as file:
            for piece in pieces:
                file.write(piece)
            written = file.finish()
        return self.keep(account, written, name, purpose, lifetime, file_id)

    def begin(self, account: str, size: int | None = None) -> FileWriter:
        """Return a writer for a new file, to use with ``with``; :meth:`keep` gives the file a name.

        ``size`` is the number of bytes, if known.

        Raises:
            QuotaExceeded: if the account has no space; ``write`` raises the same error.
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
        lifetime: timedelta | None = None,
        file_id: str | None = None,
    ) -> UploadedFile:
        """Store a file that was written after :meth:`begin`; see :meth:`add`."""
        file_id, made = file_id or "file-" + random_id(24, MIXED), now()
        row = UploadedFile(
            id=file_id,
            account=account,
            name=name,
            purpose=purpose,
            size=written.size,
            sha256=written.sha256,
            created=made,
            expires=made + lifetime if lifetime else None,
        )
        known = select(UploadedFile).where(UploadedFile.id == file_id)

        def note(session: Session) -> None:
            if session.scalar(known) is not None:
                raise _IdInUse  # rolls back and removes the new bytes
            session.add(row)
            session.flush()

        try:
            self.objects.put(account, UPLOADS, file_id, written, ObjectMetadata(), also=note)
        except _IdInUse:
            with self.database.read() as session:
                return session.scalars(known).one()
        return row

    def get(self, account: str, file_id: str) -> UploadedFile | None:
        """Return a file of this account; ``None`` for a deleted, expired or foreign file."""
        with self.database.read() as session:
            found: UploadedFile | None = session.scalar(
                _visible(account).where(UploadedFile.id == file_id)
            )
            return found

    def free_name(self, account: str, name: str) -> str:
        """Return ``name``, with the first free number if a file of the account has the name."""
        path = PurePath(name)
        numbered = (f"{path.stem}-{number}{path.suffix}" for number in count(2))
        with self.database.read() as session:
            used = {*session.scalars(_visible(account).with_only_columns(UploadedFile.name))}
        return next(each for each in chain([name], numbered) if each not in used)

    def with_names(self, account: str, text: str) -> str:
        """Return ``text`` with names and ids of the account's files in place of addresses."""

        def shown(address: re.Match[str]) -> str:
            owned = UploadedFile.account == account, UploadedFile.id == address[1]
            with self.database.read() as session:
                # A deleted file keeps the name.
                name = session.scalar(select(UploadedFile.name).where(*owned))
            return address[0] if name is None else f"{name} ({address[1]})"

        return re.sub(rf"{re.escape(file_address(''))}([\w-]+)", shown, text)

    def existed(self, account: str, file_id: str) -> bool:
        """Return whether the file exists or existed."""
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
        """Return ``limit`` files after ``after``, by creation; ``None`` for an unknown ``after``."""
        wanted = _visible(account)
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
        """Yield the bytes of a file."""
        _, pieces = self.objects.open_range(
            row.account, UPLOADS, row.id, lambda found: (0, found.size)
        )
        return pieces

    def delete(self, account: str, file_id: str) -> bool:
        """Delete a file and its bytes. Returns False for an unknown file."""
        if self.get(account, file_id) is None:
            return False
        return self._delete(account, file_id)

    def remove_expired(self) -> int:
        """Delete expired files and return their number."""
        late = select(UploadedFile).where(
            UploadedFile.deleted.is_(None), UploadedFile.expires <= now()
        )
        with self.database.read() as session:
            rows = list(session.scalars(late))
        return sum(self._delete(row.account, row.id) for row in rows)

    def _delete(self, account: str, file_id: str) -> bool:
        """Delete the bytes of a file in one transaction. Returns False for an unknown file."""
        marked = 0

        def mark(session: Session) -> None:
            nonlocal marked
            mine = UploadedFile.id == file_id, UploadedFile.deleted.is_(None)
            done = (
                update(UploadedFile).where(*mine).values(deleted=now()).returning(UploadedFile.seq)
            )
            marked = len(session.execute(done).all())
            vector_stores.remove_everywhere(session, file_id)

        try:
            self.objects.delete(account, UPLOADS, [file_id], mark)
        except ObjectRefused:
            # The bucket and its objects were deleted before.
            with self.database.write() as session:
                mark(session)
        return bool(marked)


def _place(session: Session, account: str, file_id: str) -> int | None:
    mine = UploadedFile.account == account, UploadedFile.id == file_id
    return session.scalar(select(UploadedFile.seq).where(*mine))


def _visible(account: str) -> Select[Any]:
    """Return the query of an account's files that are neither deleted nor expired."""
    return select(UploadedFile).where(
        UploadedFile.account == account,
        UploadedFile.deleted.is_(None),
        or_(UploadedFile.expires.is_(None), UploadedFile.expires > now()),
    )
