"""``/vector_stores``: stores, their files, batches of files, and search."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from fastapi import Query, Response
from pydantic import AfterValidator, BaseModel, Field
from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from luthier.server.background import caller_fields
from luthier.server.http.messages import Fault
from luthier.server.http.routes import MODEL_SLOT, Name
from luthier.server.openai.file_search import Scalar, SearchOptions, check_store
from luthier.server.openai.ingestion import ENCODER_KEY, local_encoders
from luthier.server.openai.operations import (
    Call,
    Limit,
    OpenAICall,
    Order,
    openai_router,
    page,
    row_before,
)
from luthier.server.openai.protocol import (
    METADATA_KEYS,
    JsonObject,
    Metadata,
    StrictBody,
    existing,
    invalid,
    missing,
    seconds,
)
from luthier.server.tables import storage
from luthier.server.tables.database import page_of
from luthier.server.tables.openai import vector_stores as table
from luthier.server.tables.openai.uploaded_files import UploadedFile
from luthier.server.tables.openai.vector_stores import (
    VectorStore,
    VectorStoreBatch,
    VectorStoreFile,
)

router = openai_router()
POLL = {"openai-poll-after-ms": "200"}
"""Header with the interval of the client's next poll; without it, the client waits a second."""
MOST_FILES, MOST_OF_BATCH = 500, 2_000
MOST_QUERIES = 32
"""Maximum number of queries of a search."""
RESULTS = 10
"""Default number of results of a search."""
Row = TypeVar("Row", VectorStore, VectorStoreFile)
Wanted = tuple[UploadedFile, Mapping[str, Any], Mapping[str, Any]]


def _attributes(value: dict[str, Scalar] | None) -> dict[str, Scalar] | None:
    if value is not None and len(value) > METADATA_KEYS:
        raise ValueError(f"at most {METADATA_KEYS} keys are allowed")
    for key, each in (value or {}).items():
        if len(key) > 64 or (isinstance(each, str) and len(each) > 512):
            raise ValueError("keys have at most 64 characters, texts 512")
    return value


Attributes = Annotated[dict[str, Scalar] | None, AfterValidator(_attributes)]


class Paging(BaseModel):
    """Parameters of a list."""

    limit: Limit = 20
    order: Order = "desc"
    after: str | None = None
    before: str | None = None

    def rows(
        self,
        session: Session,
        query: Select[Row],
        kind: type[Row],
        noun: str,
        find: Callable[[str], Row | None],
    ) -> tuple[list[Row], bool]:
        """Return the rows that follow ``after`` or precede ``before``, and whether more exist."""
        backward = self.after is None and self.before is not None
        end = row_before(self.before if backward else self.after, noun, find)
        rows = page_of(
            session,
            query,
            kind.seq,
            limit=self.limit + 1,
            position=None if end is None else end.seq,
            # A page before a row is read backwards from the row and then reversed; otherwise it
            # would be the first page of the list.
            ascending=(self.order == "asc") != backward,
        )
        kept = rows[: self.limit]
        return kept[::-1] if backward else kept, len(rows) > self.limit


class FilePaging(Paging):
    """Parameters of a list of files."""

    filter: Literal["in_progress", "completed", "failed", "cancelled"] | None = None


class ExpiresAfter(StrictBody):
    """Lifetime of a store after the last use."""

    anchor: Literal["last_active_at"]
    days: Annotated[int, Field(ge=1, le=365)]


class ChunkSizes(StrictBody):
    """Size and overlap of passages, in tokens of the embedding model."""

    max_chunk_size_tokens: Annotated[int, Field(ge=100, le=4096)]
    chunk_overlap_tokens: Annotated[int, Field(ge=0)]


class AutoChunking(StrictBody):
    """Passages along headings, paragraphs and tables."""

    type: Literal["auto"]


class StaticChunking(StrictBody):
    """Passages of equal size."""

    type: Literal["static"]
    static: ChunkSizes


Chunking = Annotated[AutoChunking | StaticChunking, Field(discriminator="type")] | None


class CreateStore(StrictBody):
    """Body of a request for a new store."""

    name: str | None = None
    description: str | None = None
    file_ids: Annotated[list[str], Field(max_length=MOST_FILES)] | None = None
    chunking_strategy: Chunking = None
    expires_after: ExpiresAfter | None = None
    metadata: Metadata = None


class UpdateStore(StrictBody):
    """Body of an update. Omitted members stay."""

    name: str | None = None
    expires_after: ExpiresAfter | None = None
    metadata: Metadata = None


class AddFile(StrictBody):
    """A file for a store."""

    file_id: str
    attributes: Attributes = None
    chunking_strategy: Chunking = None


class UpdateFile(StrictBody):
    """Body of an update of a file."""

    attributes: Attributes


class CreateFileBatch(StrictBody):
    """Body of a request for a batch of files."""

    file_ids: Annotated[list[str], Field(min_length=1, max_length=MOST_OF_BATCH)] | None = None
    files: Annotated[list[AddFile], Field(min_length=1, max_length=MOST_OF_BATCH)] | None = None
    attributes: Attributes = None
    chunking_strategy: Chunking = None


class SearchStore(SearchOptions):
    """Body of a search."""

    unsupported: ClassVar[Mapping[str, str]] = {
        "rewrite_query": "The server does not rewrite queries. Send the query as 'query'",
    }
    query: str | list[str]


@router.post("/vector_stores", name="vector_stores.create")
def create(call: OpenAICall, body: CreateStore) -> JsonObject:
    """Create a vector store."""
    call.record("vector_store")
    added = [AddFile(file_id=each) for each in body.file_ids or ()]
    files = _files_to_add(call, added, {}, body.chunking_strategy, "file_ids")
    days = body.expires_after.days if body.expires_after else None
    encoder = (body.metadata or {}).get(ENCODER_KEY)
    if encoder is not None and encoder not in (known := local_encoders()):
        text = f"{encoder!r} is no embedding model of this server. Use {', '.join(known)}."
        raise Fault("Validation", text, parameter=f"metadata.{ENCODER_KEY}")
    with call.context.database.write() as session:
        store = table.create_store(
            session, call.account, body.name or "", body.description, body.metadata or {}, days
        )
        _add(call, session, store, files)
        view = _store_views(session, [store])[0]
    call.record_created("vector_store", store.id)
    call.context.ingestion.wake()
    return view


@router.get("/vector_stores", name="vector_stores.list")
def list_stores(call: OpenAICall, paging: Annotated[Paging, Query()]) -> JsonObject:
    """List the stores, newest first."""
    with call.context.database.read() as session:

        def find(store_id: str) -> VectorStore | None:
            return table.find_store(session, call.account, store_id)

        query = select(VectorStore).where(VectorStore.account == call.account)
        rows, more = paging.rows(session, query, VectorStore, "vector store", find)
        return {**page(_store_views(session, rows), paging.limit), "has_more": more}


@router.get("/vector_stores/{store}", name="vector_stores.retrieve")
def retrieve(call: OpenAICall, store: Name) -> JsonObject:
    """Return a store."""
    with call.context.database.read() as session:
        return _store_views(session, [_find(call, session, store)])[0]


@router.post("/vector_stores/{store}", name="vector_stores.update")
def update(call: OpenAICall, store: Name, body: UpdateStore) -> JsonObject:
    """Change name, lifetime or metadata of a store."""
    call.record("vector_store", store)
    # An omitted member stays, and `null` clears it: pydantic gives None for both.
    given = body.model_fields_set
    with call.context.database.write() as session:
        row = check_store(table.find_store(session, call.account, store, lock=True), store)
        if "name" in given:
            row.name = body.name or ""
        if "metadata" in given:
            row.user_metadata = dict(body.metadata or {})
        if "expires_after" in given:
            row.expires_days = body.expires_after.days if body.expires_after else None
        return _store_views(session, [row])[0]


@router.delete("/vector_stores/{store}", name="vector_stores.delete")
def delete(call: OpenAICall, store: Name) -> JsonObject:
    """Delete a store. The files stay."""
    call.record("vector_store", store)
    with call.context.database.write() as session:
        table.remove_store(session, _find(call, session, store, lock=True))
    call.context.indexes.prune(call.account, store)
    return {"id": store, "object": "vector_store.deleted", "deleted": True}


@router.post(
    "/vector_stores/{store}/search", name="vector_stores.search", dependencies=[MODEL_SLOT]
)
def search(call: OpenAICall, store: Name, body: SearchStore) -> JsonObject:
    """Return the passages of a store for a query."""
    queries = [body.query] if isinstance(body.query, str) else body.query
    if not queries or not all(each.strip() for each in queries):
        raise invalid("'query' or a text in 'query' is empty.", "query")
    if len(queries) > MOST_QUERIES:
        raise invalid(f"'query' has at most {MOST_QUERIES} texts.", "query")
    count = body.max_num_results or RESULTS
    search = call.context.inference.documents.search
    # Without the limit of `file_search`: this client wants the most similar passages, also if they
    # answer nothing.
    found, _ = search(call.account, [store], queries, body, count, decide=False)
    return {
        "object": "vector_store.search_results.page",
        "search_query": queries,
        "data": [
            {**each.to_dict(), "content": [{"type": "text", "text": each.text}]} for each in found
        ],
        "has_more": False,
        "next_page": None,
    }


@router.post("/vector_stores/{store}/files", name="vector_stores.files.create")
def add_file(call: OpenAICall, store: Name, body: AddFile) -> JsonObject:
    """Add an uploaded file to a store. The server reads the file in the background."""
    call.record("vector_store", store)
    files = _files_to_add(call, [body], {}, None, "file_id")
    with call.context.database.write() as session:
        row = check_store(table.find_store(session, call.account, store, lock=True), store)
        (added,) = _add(call, session, row, files)
    call.context.ingestion.wake()
    return file_object(added)


@router.get("/vector_stores/{store}/files", name="vector_stores.files.list")
def list_files(call: OpenAICall, store: Name, paging: Annotated[FilePaging, Query()]) -> JsonObject:
    """List the files of a store, newest first."""
    with call.context.database.read() as session:
        _find(call, session, store)
        return _file_page(session, store, None, paging)


@router.get("/vector_stores/{store}/files/{file}", name="vector_stores.files.retrieve")
def retrieve_file(call: OpenAICall, store: Name, file: Name, response: Response) -> JsonObject:
    """Return a file of a store."""
    response.headers.update(POLL)
    with call.context.database.read() as session:
        return file_object(_find_file(call, session, store, file))


@router.post("/vector_stores/{store}/files/{file}", name="vector_stores.files.update")
def update_file(call: OpenAICall, store: Name, file: Name, body: UpdateFile) -> JsonObject:
    """Replace the attributes of a file."""
    call.record("vector_store", store)
    with call.context.database.write() as session:
        row = _find_file(call, session, store, file, lock=True)
        row.attributes = dict(body.attributes or {})
        return file_object(row)


@router.delete("/vector_stores/{store}/files/{file}", name="vector_stores.files.delete")
def remove_file(call: OpenAICall, store: Name, file: Name) -> JsonObject:
    """Remove a file from a store. The uploaded file stays."""
    call.record("vector_store", store)
    with call.context.database.write() as session:
        table.remove_file(session, _find_file(call, session, store, file, lock=True))
    call.context.indexes.prune(call.account, store)
    return {"id": file, "object": "vector_store.file.deleted", "deleted": True}


@router.get("/vector_stores/{store}/files/{file}/content", name="vector_stores.files.content")
def content(call: OpenAICall, store: Name, file: Name) -> JsonObject:
    """Return the passages of a file."""
    with call.context.database.read() as session:
        row = _find_file(call, session, store, file)
    texts: list[str] = []
    # The index may be missing after a restored backup, until it is built again.
    if row.status == table.COMPLETED and call.context.indexes.exists(call.account, store):
        with call.context.indexes.open(call.account, store) as index:
            texts = [each.content for each in index.passages(file)]
    return {
        "object": "vector_store.file_content.page",
        "data": [{"type": "text", "text": text} for text in texts],
        "has_more": False,
        "next_page": None,
    }


@router.post("/vector_stores/{store}/file_batches", name="vector_stores.file_batches.create")
def create_batch(call: OpenAICall, store: Name, body: CreateFileBatch) -> JsonObject:
    """Add several files to a store."""
    call.record("vector_store", store)
    if body.file_ids is None and body.files is None:
        raise missing("file_ids")
    if body.file_ids is not None and body.files is not None:
        raise invalid("Send either 'file_ids' or 'files'.", "files")
    if body.files is not None and (body.attributes or body.chunking_strategy):
        text = "With 'files', each file has its own attributes and chunking strategy."
        raise invalid(text, "attributes" if body.attributes else "chunking_strategy")
    added = body.files or [AddFile(file_id=each) for each in body.file_ids or ()]
    where = "files" if body.files else "file_ids"
    files = _files_to_add(call, added, body.attributes or {}, body.chunking_strategy, where)
    with call.context.database.write() as session:
        row = check_store(table.find_store(session, call.account, store, lock=True), store)
        batch = table.create_batch(session, row)
        _add(call, session, row, files, batch.id)
        view = _batch_view(session, batch)
    call.context.ingestion.wake()
    return view


@router.get(
    "/vector_stores/{store}/file_batches/{batch}", name="vector_stores.file_batches.retrieve"
)
def retrieve_batch(call: OpenAICall, store: Name, batch: Name, response: Response) -> JsonObject:
    """Return a batch."""
    response.headers.update(POLL)
    with call.context.database.read() as session:
        return _batch_view(session, _find_batch(call, session, store, batch))


@router.post(
    "/vector_stores/{store}/file_batches/{batch}/cancel", name="vector_stores.file_batches.cancel"
)
def cancel_batch(call: OpenAICall, store: Name, batch: Name) -> JsonObject:
    """Cancel the unfinished files of a batch."""
    call.record("vector_store", store)
    with call.context.database.write() as session:
        row = _find_batch(call, session, store, batch)
        table.cancel_batch(session, row)
        return _batch_view(session, row)


@router.get(
    "/vector_stores/{store}/file_batches/{batch}/files",
    name="vector_stores.file_batches.list_files",
)
def list_batch_files(
    call: OpenAICall, store: Name, batch: Name, paging: Annotated[FilePaging, Query()]
) -> JsonObject:
    """List the files of a batch, newest first."""
    with call.context.database.read() as session:
        _find_batch(call, session, store, batch)
        return _file_page(session, store, batch, paging)


def _find(call: Call, session: Session, store_id: str, *, lock: bool = False) -> VectorStore:
    found = table.find_store(session, call.account, store_id, lock=lock)
    return existing(found, "vector store", store_id, "vector_store_id")


def _find_file(
    call: Call, session: Session, store_id: str, file_id: str, *, lock: bool = False
) -> VectorStoreFile:
    _find(call, session, store_id)
    found = table.find_file(session, store_id, file_id, lock=lock)
    return existing(found, "file in the vector store", file_id, "file_id")


def _find_batch(call: Call, session: Session, store_id: str, batch_id: str) -> VectorStoreBatch:
    _find(call, session, store_id)
    return existing(
        table.find_batch(session, store_id, batch_id), "file batch", batch_id, "batch_id"
    )


def _files_to_add(
    call: Call,
    files: Sequence[AddFile],
    attributes: Mapping[str, Any],
    chunking: Chunking,
    where: str,
) -> list[Wanted]:
    """Return the uploaded files with the attributes and chunking of each, or of all."""
    found: dict[str, Wanted] = {}
    for each in files:
        found_file = call.context.files.get(call.account, each.file_id)
        file = existing(found_file, "File object", each.file_id, where)
        own = each.chunking_strategy or chunking
        sizes = own.static if isinstance(own, StaticChunking) else None
        # OpenAI's limit. With more overlap, the number of passages grows without bound.
        if sizes and 2 * sizes.chunk_overlap_tokens > sizes.max_chunk_size_tokens:
            text = "'chunk_overlap_tokens' is at most half of 'max_chunk_size_tokens'."
            raise invalid(text, "chunking_strategy.static.chunk_overlap_tokens", "invalid_value")
        # By id: a file that is listed twice is read once.
        found[file.id] = file, each.attributes or attributes, sizes.model_dump() if sizes else {}
    return [*found.values()]


def _add(
    call: Call,
    session: Session,
    store: VectorStore,
    files: Sequence[Wanted],
    batch_id: str | None = None,
) -> list[VectorStoreFile]:
    quotas = call.context.files.objects.quotas(session, call.account)
    # Passages take space: reject accounts without space before the work.
    storage.check(session, call.account, quotas, stored_bytes=1)
    return table.add_files(session, store, caller_fields(call.caller), files, batch_id)


def _file_page(
    session: Session, store_id: str, batch_id: str | None, paging: FilePaging
) -> JsonObject:
    def find(file_id: str) -> VectorStoreFile | None:
        return table.find_file(session, store_id, file_id)

    query = select(VectorStoreFile).where(VectorStoreFile.store_id == store_id)
    if batch_id is not None:
        query = query.where(VectorStoreFile.batch_id == batch_id)
    if paging.filter is not None:
        query = query.where(VectorStoreFile.status == paging.filter)
    rows, more = paging.rows(session, query, VectorStoreFile, "file", find)
    return {**page(rows, paging.limit, file_object), "has_more": more}


def _counts(found: tuple[Mapping[str, int], int]) -> JsonObject:
    counts, _ = found
    return {
        **{status: counts.get(status, 0) for status in (table.IN_PROGRESS, *table.ENDED)},
        "total": sum(counts.values()),
    }


def _store_views(session: Session, stores: Sequence[VectorStore]) -> list[JsonObject]:
    """Return stores as OpenAI's objects."""
    counted = table.file_counts(session, VectorStoreFile.store_id, [each.id for each in stores])
    views = []
    for store in stores:
        counts = _counts(counted[store.id])
        days = store.expires_days
        # Derived from the files and not stored, so that no process has to notice the end of the
        # last file.
        status = table.IN_PROGRESS if counts[table.IN_PROGRESS] else table.COMPLETED
        views.append(
            {
                "id": store.id,
                "object": "vector_store",
                "created_at": seconds(store.created),
                "name": store.name,
                "description": store.description,
                "usage_bytes": counted[store.id][1],
                "file_counts": counts,
                "status": "expired" if store.is_expired else status,
                "expires_after": {"anchor": "last_active_at", "days": days} if days else None,
                "expires_at": seconds(store.expires),
                "last_active_at": seconds(store.last_active),
                "metadata": store.user_metadata,
            }
        )
    return views


def _batch_view(session: Session, batch: VectorStoreBatch) -> JsonObject:
    """Return a batch as OpenAI's object."""
    counted = table.file_counts(session, VectorStoreFile.batch_id, [batch.id])
    counts = _counts(counted[batch.id])
    status = table.CANCELLED if batch.cancelled else table.COMPLETED
    return {
        "id": batch.id,
        "object": "vector_store.files_batch",
        "created_at": seconds(batch.created),
        "vector_store_id": batch.store_id,
        "status": table.IN_PROGRESS if counts[table.IN_PROGRESS] else status,
        "file_counts": counts,
    }


def file_object(row: VectorStoreFile) -> JsonObject:
    """Return a file of a store as OpenAI's object."""
    error = {"code": row.error_code, "message": row.error_message} if row.error_code else None
    chunking: JsonObject = {"type": "static", "static": row.chunking}
    return {
        "id": row.file_id,
        "object": "vector_store.file",
        "created_at": seconds(row.created),
        "vector_store_id": row.store_id,
        "status": row.status,
        "last_error": error,
        "usage_bytes": row.stored_bytes,
        "attributes": row.attributes,
        "chunking_strategy": chunking if row.chunking else {"type": "other"},
    }
