"""Indexes of vector stores: one file for each store, ``vector_stores/<account>/<store>.sqlite``.

The database decides what exists: a search is restricted to the files in the database, and
:meth:`StoreIndexes.prune` removes what a killed process left.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import select

from luthier.documents.index import DocumentIndex, create, open_file
from luthier.errors import LuthierError
from luthier.files import luthier_home
from luthier.library.models import StoredModel
from luthier.server.tables.database import Database
from luthier.server.tables.openai import vector_stores as table
from luthier.server.tables.openai.vector_stores import VectorStore

MOST_OPEN = 16
"""Maximum number of indexes whose embeddings stay in memory."""
_log = logging.getLogger("luthier.server")


@dataclass
class _Opened:
    index: DocumentIndex
    files: ExitStack
    lock: threading.Lock = field(default_factory=threading.Lock)


class StoreIndexes:
    """Indexes of all accounts. Safe to share between threads."""

    def __init__(self, database: Database, folder: Path | None = None) -> None:
        self.database, self.folder = database, folder or luthier_home() / "vector_stores"
        self._opened: OrderedDict[str, _Opened] = OrderedDict()
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        """Lock of changes: a file without passages is not removed while it gets passages."""

    def exists(self, account: str, store_id: str) -> bool:
        """Return whether the store has an index."""
        return self._path(account, store_id).is_file()

    @contextmanager
    def update(
        self, account: str, store_id: str, stored: StoredModel, language: str
    ) -> Iterator[DocumentIndex]:
        """Yield the index of a store to add documents, created for the embedding model ``stored``
        if missing."""
        path = self._path(account, store_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._writing, open_file(path, may_create=True) as connection:
            create(connection, stored.id, stored.content_hash, language)
            yield DocumentIndex(store_id, path, connection)

    @contextmanager
    def open(self, account: str, store_id: str) -> Iterator[DocumentIndex]:
        """Yield the existing index of a store for searches, to this thread alone."""
        while True:
            with self._lock:
                opened = self._opened.get(store_id)
                if opened is None:
                    files, path = ExitStack(), self._path(account, store_id)
                    index = DocumentIndex(store_id, path, files.enter_context(open_file(path)))
                    opened = self._opened[store_id] = _Opened(index, files)
                self._opened.move_to_end(store_id)
                full = len(self._opened) > MOST_OPEN
                late = self._opened.popitem(last=False)[1] if full else None
            if late is not None:
                _close(late)
            with opened.lock:
                if self._opened.get(store_id) is opened:  # nobody has closed the file since
                    yield opened.index
                    return

    def prune(self, account: str, store_id: str) -> None:
        """Remove documents without a row from the index, or the index of a deleted store."""
        path = self._path(account, store_id)
        with self._writing:
            if not path.is_file():
                return
            with self.database.read() as session:
                store = table.find_store(session, account, store_id)
                if store is None or not table.kept_files(session, store_id):
                    self._remove(path)
                    return
            with open_file(path) as connection:
                index = DocumentIndex(store_id, path, connection)
                found = index.paths()  # before the rows: another server may add a file meanwhile
                with self.database.read() as session:
                    kept = table.kept_files(session, store_id)
                index.delete(found - kept)

    def prune_all(self) -> None:
        """Prune the indexes of all stores, and queue the files of stores without an index."""
        with self.database.read() as session:
            lost = [
                store.id
                for store in session.scalars(select(VectorStore))
                if not self.exists(store.account, store.id) and table.searchable(session, store.id)
            ]
        for store_id in lost:
            with self.database.write() as session:
                table.requeue(session, store_id)
        for path in self.folder.glob("*/*.sqlite"):
            try:
                self.prune(path.parent.name, path.stem)
            except (LuthierError, OSError):
                _log.exception("the index %s could not be pruned", path)

    def close(self) -> None:
        """Close all files."""
        with self._lock:
            while self._opened:
                _close(self._opened.popitem()[1])

    def _remove(self, path: Path) -> None:
        while True:
            with self._lock:
                opened = self._opened.pop(path.stem, None)
                if opened is None:  # no search opens the file before the removal
                    for each in path.parent.glob(f"{path.name}*"):  # the log of SQLite, too
                        each.unlink(missing_ok=True)
                    return
            # Without the lock: the end of a search may take long, and other stores need the lock.
            _close(opened)

    def _path(self, account: str, store_id: str) -> Path:
        return self.folder / account / f"{store_id}.sqlite"


def _close(opened: _Opened) -> None:
    """Close an index after the last use."""
    with opened.lock:
        opened.files.close()
