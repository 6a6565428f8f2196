"""Thread for the files of vector stores, read into the indexes of the stores.

A file is read, divided into passages and embedded; one transaction stores the passages. A killed server
loses the current file, and another server reads the file again.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

from sqlalchemy.orm import Session

from luthier.data.languages import detect_languages
from luthier.documents.passages import Passage, cut, windows
from luthier.documents.readers import FORMATS, LANGUAGE_CHARACTERS, DocumentReader, ReadDocument
from luthier.errors import CorruptFile, DoesNotFit, RecipeError
from luthier.files import disk_errors
from luthier.gate.inspect import encoder_of_language
from luthier.inference.inference import InferenceFailed
from luthier.library.folders import is_base_here
from luthier.library.models import StoredModel
from luthier.models.catalog import CATALOG
from luthier.server.background import BackgroundRunner
from luthier.server.http.messages import Fault
from luthier.server.openai.file_search import FileSearch, token_offsets
from luthier.server.stores.uploaded_files import UploadedFiles
from luthier.server.tables import storage
from luthier.server.tables.database import Database
from luthier.server.tables.openai import vector_stores as table
from luthier.server.tables.openai.vector_stores import VectorStoreFile
from luthier.server.tables.usage import CountUsage

Ingested = tuple[str | None, str | None, int]
"""Error code, error message and number of stored bytes. A file without bytes has failed."""
ENCODER_KEY = "embedding_model"
"""Key of a store's metadata that names the embedding model."""
_CODES = ("unsupported_file", "invalid_file")


class IngestionRunner(BackgroundRunner[VectorStoreFile, Ingested]):
    """Thread for files of vector stores. Several servers may share a database."""

    kind, at_once, working = VectorStoreFile, 1, table.IN_PROGRESS
    action = "luthier:openai.vector_stores.files.create"
    gives_up = True

    def __init__(
        self,
        database: Database,
        files: UploadedFiles,
        search: FileSearch,
        count: CountUsage,
    ) -> None:
        super().__init__(database, count)
        self.files, self.search, self.indexes = files, search, search.indexes
        self._reader = DocumentReader()

    def sweep(self) -> None:
        """Remove expired stores, and passages of missing files."""
        with self.database.write() as session:
            table.end_expired(session)
        self.indexes.prune_all()

    def run_once(self) -> bool:
        """See :meth:`BackgroundRunner.run_once`. Without work, the process that reads files ends."""
        worked = super().run_once()
        if not worked:
            self._reader.close()
        return worked

    def work(self, row: VectorStoreFile) -> None:
        """Read a file and store the passages."""
        self.work_through(row, [(0, row)], self._ingest)
        with self.database.read() as session:
            after = table.find_file(session, row.store_id, row.file_id)
        if after is None or after.status in (table.FAILED, table.CANCELLED):
            self.indexes.prune(row.account, row.store_id)

    def record(self, session: Session, row: VectorStoreFile, number: int, done: Ingested) -> None:
        """Set the status, and charge the bytes to the account. A cancelled file stays cancelled."""
        if row.status != table.IN_PROGRESS:
            return
        row.error_code, row.error_message, row.stored_bytes = done
        row.status = table.COMPLETED if row.stored_bytes else table.FAILED
        session.flush()
        quotas = self.files.objects.quotas(session, row.account)
        storage.charge(session, row.account, quotas, stored_bytes=row.stored_bytes)

    def state(self, row: VectorStoreFile) -> str:
        """Return the status."""
        return row.status

    def fail(self, row: VectorStoreFile, code: str, message: str) -> None:
        """End the work on a file with an error."""
        with self.database.write() as session:
            locked = self.lock_held(session, row)
            if locked is not None and locked.status == table.IN_PROGRESS:
                locked.status, locked.error_message = table.FAILED, message
                locked.error_code = code if code in _CODES else "server_error"
        self.indexes.prune(row.account, row.store_id)

    def _ingest(self, row: VectorStoreFile) -> Ingested:
        self.caller_of(row)
        file = self.files.get(row.account, row.file_id)
        if file is None:
            return "invalid_file", "The file is deleted.", 0
        suffix = Path(row.filename).suffix.lower()
        if suffix not in FORMATS:
            formats = ", ".join(FORMATS)
            return "unsupported_file", f"'{suffix}' is not a supported format: {formats}.", 0
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"document{suffix}"
            with disk_errors(path.parent), path.open("wb") as copy:
                copy.writelines(self.files.read(file))
            try:
                read = self._reader.read(path)
            except RecipeError as error:
                text = (
                    "The server has no libraries for documents: pip install 'luthier[documents]'."
                )
                raise Fault("InternalServer", text) from error
        if read.refused:
            reason = read.refused.replace(str(path), row.filename)
            return "invalid_file", f"The file cannot be read: {reason}.", 0
        stored, language = self._encoder(row, read)
        passages = _passages(read, stored, row)
        if not passages:
            return "invalid_file", "The file has no text.", 0
        contents = [each.content for each in passages]
        try:
            vectors = self.attempt(row, partial(self.search.embed, stored, contents))
        except Fault as fault:
            cause = fault.__cause__
            passes = isinstance(cause, InferenceFailed) and Fault.of_inference(cause).details
            if passes or isinstance(cause, DoesNotFit):
                raise DoesNotFit(str(cause)) from fault  # the file waits for memory
            raise
        try:
            with self.indexes.update(row.account, row.store_id, stored, language) as index:
                about = (file.sha256, file.size, 0.0)
                index.put(row.file_id, about, read, passages, [*vectors])
        except (RecipeError, CorruptFile) as error:
            raise Fault("InternalServer", "The index of the vector store failed.") from error
        # Embeddings have two bytes for each number.
        size = sum(len(each.encode()) for each in contents) + 2 * vectors.size
        return "unsupported_file" if read.note else None, read.note or None, size

    def _encoder(self, row: VectorStoreFile, read: ReadDocument) -> tuple[StoredModel, str]:
        """Return the encoder of the store: of its metadata, or by the language of the first file."""
        if self.indexes.exists(row.account, row.store_id):
            with self.indexes.open(row.account, row.store_id) as index:
                return self.search.encoder(index.model, index.fingerprint), index.language
        text = " ".join(page.text for page in read.pages[:5])
        (language,) = detect_languages([text[:LANGUAGE_CHARACTERS]])
        with self.database.read() as session:
            store = table.find_store(session, row.account, row.store_id)
            named = store.user_metadata.get(ENCODER_KEY) if store else None
        return self.search.encoder(named or encoder_of_language(language, "")[0]), language


def local_encoders() -> list[str]:
    """Return the ids of the embedding models of the catalogue on this machine."""
    return [
        each.id for each in CATALOG.values() if each.kind == "encoder" and is_base_here(each.id)
    ]


def _passages(read: ReadDocument, stored: StoredModel, row: VectorStoreFile) -> list[Passage]:
    if not row.chunking:
        return [*cut(read.pages)]
    sizes = row.chunking["max_chunk_size_tokens"], row.chunking["chunk_overlap_tokens"]
    return [
        Passage(part, "", page.number)
        for page in read.pages
        for part in windows(page.text, token_offsets(stored, page.text), *sizes)
    ]
