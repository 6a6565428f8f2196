"""Search in vector stores, for ``/vector_stores/{id}/search`` and the tool ``file_search``."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from sqlalchemy import update

from luthier.documents.index import FoundPassage
from luthier.documents.passages import windows
from luthier.documents.retriever import calibrate
from luthier.inference.pool import ModelPool
from luthier.library.models import StoredModel, find
from luthier.server.http.messages import Fault
from luthier.server.openai.protocol import JsonObject, StrictBody, existing, invalid
from luthier.server.stores.store_indexes import StoreIndexes
from luthier.server.tables.database import Database, now
from luthier.server.tables.openai import vector_stores as table
from luthier.server.tables.openai.vector_stores import VectorStore, VectorStoreFile

MOST_RESULTS = 50
MARGIN = 32
"""Tokens of the encoder's context that a window of text leaves free, for special tokens and words
that the window divides."""
WINDOWS = 64
"""Number of windows that the encoder gets at once, so that other requests take turns."""
_SEEN = timedelta(minutes=1)
"""Interval of records of the last use of a store."""
_COMPARISONS: Mapping[str, Callable[[Any, Any], bool]] = {
    "eq": operator.eq, "ne": operator.ne, "gt": operator.gt, "gte": operator.ge,
    "lt": operator.lt, "lte": operator.le,
    "in": lambda value, values: value in values, "nin": lambda value, values: value not in values,
}  # fmt: skip
Scalar = str | float | int | bool


class ComparisonFilter(StrictBody):
    """A condition on an attribute of a file."""

    type: Literal["eq", "ne", "gt", "gte", "lt", "lte", "in", "nin"]
    key: str
    value: Scalar | list[Scalar]

    def check(self, where: str) -> None:
        """Reject a list for a value, and a value for a list."""
        if isinstance(self.value, list) != (self.type in ("in", "nin")):
            wanted = "a list" if self.type in ("in", "nin") else "a string, number or boolean"
            raise invalid(f"'{self.type}' needs {wanted}.", f"{where}.value", "invalid_value")

    def matches(self, attributes: Mapping[str, Any]) -> bool:
        """Return whether the attributes meet the condition; a missing attribute equals no value."""
        value = attributes.get(self.key)
        if value is None:
            return self.type in ("ne", "nin")
        try:
            return bool(_COMPARISONS[self.type](value, self.value))
        except TypeError:  # a number and a text have no order
            return False


class CompoundFilter(StrictBody):
    """Several conditions."""

    type: Literal["and", "or"]
    filters: Annotated[list[Filter], Field(min_length=1)]

    def check(self, where: str) -> None:
        """Check all conditions."""
        for index, each in enumerate(self.filters):
            each.check(f"{where}.filters[{index}]")

    def matches(self, attributes: Mapping[str, Any]) -> bool:
        """Return whether the attributes meet all conditions, or any condition."""
        met = (each.matches(attributes) for each in self.filters)
        return all(met) if self.type == "and" else any(met)


Filter = Annotated[ComparisonFilter | CompoundFilter, Field(discriminator="type")]


class HybridWeights(StrictBody):
    """Weights of the fusion of both orders."""

    embedding_weight: Annotated[float, Field(ge=0)]
    text_weight: Annotated[float, Field(ge=0)]


class RankingOptions(StrictBody):
    """Options of the order of results."""

    ranker: Literal["none", "auto"] | None = None
    """luthier has one order: words and embeddings."""
    score_threshold: Annotated[float, Field(ge=0, le=1)] = 0.0
    hybrid_search: HybridWeights | None = None


class SearchOptions(StrictBody):
    """Members of both a search and the tool."""

    filters: Filter | None = None
    max_num_results: Annotated[int, Field(ge=1, le=MOST_RESULTS)] | None = None
    ranking_options: RankingOptions | None = None


class FileSearchTool(SearchOptions):
    """The tool ``file_search`` of a response."""

    type: Literal["file_search"]
    vector_store_ids: Annotated[list[str], Field(min_length=1, max_length=50)]


@dataclass(frozen=True)
class FoundInFile:
    """A passage of a file."""

    file: VectorStoreFile
    found: FoundPassage

    @property
    def score(self) -> float:
        """Similarity of the embeddings of query and passage, from 0 to 1."""
        return min(1.0, max(0.0, self.found.cosine))

    @property
    def text(self) -> str:
        """Page, headings and text."""
        passage = self.found.passage
        page = f"Page {passage.page}\n" if passage.page is not None else ""
        return f"{page}{passage.content}"

    def to_dict(self) -> JsonObject:
        """Return file and score."""
        return {
            "file_id": self.file.file_id,
            "filename": self.file.filename,
            "score": round(self.score, 4),
            "attributes": self.file.attributes,
        }


class FileSearch:
    """Searches in the vector stores of all accounts."""

    def __init__(self, database: Database, pool: ModelPool, indexes: StoreIndexes) -> None:
        self.database, self.pool, self.indexes = database, pool, indexes
        self._encoders: dict[str, StoredModel] = {}

    def encoder(self, model_id: str, fingerprint: str | None = None) -> StoredModel:
        """Return an embedding model; the tokenizer stays in memory.

        Raises:
            Fault: 409 for weights other than those of an index with ``fingerprint``.
        """
        if model_id not in self._encoders:
            self._encoders[model_id] = find(model_id)
        stored = self._encoders[model_id]
        if fingerprint not in (None, stored.content_hash):
            text = (
                f"The vector store was built with other weights of {model_id}. Create a new store."
            )
            raise Fault("Conflict", text)
        return stored

    def embed(self, stored: StoredModel, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return embeddings ``[N, H]`` of texts of any length: the mean over windows of the encoder's
        context."""
        size = stored.objective.task.row_limit(stored.chat, stored.room) - MARGIN
        parts = [[*windows(text, token_offsets(stored, text), size)] for text in texts]
        flat = [part for each in parts for part in each]
        vectors: list[NDArray[np.float32]] = []
        for start in range(0, len(flat), WINDOWS):
            embeddings = self.pool.embed(stored.id, flat[start : start + WINDOWS])
            vectors += [np.asarray(each.vector, np.float32) for each in embeddings]
        rest = iter(vectors)
        means = [np.mean([next(rest) for _ in each], axis=0) for each in parts]
        mean_NH = np.array(means, np.float32)
        unit_NH: NDArray[np.float32] = mean_NH / np.linalg.norm(mean_NH, axis=1, keepdims=True)
        return unit_NH

    def search(
        self,
        account: str,
        store_ids: Sequence[str],
        queries: Sequence[str],
        options: SearchOptions,
        count: int,
        *,
        decide: bool = True,
    ) -> tuple[list[FoundInFile], bool]:
        """Return the ``count`` best passages, and whether the passages may answer a query.

        Without ``decide``, the limit of each index is not measured, and the second value is False.

        Raises:
            Fault: for an unknown or expired store, or an invalid filter.
        """
        if options.filters is not None:
            options.filters.check("filters")
        ranked: list[tuple[int, FoundInFile]] = []
        may_answer = False
        embedded: dict[str, NDArray[np.float32]] = {}
        for store_id in dict.fromkeys(store_ids):
            found, accepted = self._search_store(
                account, store_id, queries, options, count, embedded, decide
            )
            ranked += found
            may_answer |= accepted
        least = options.ranking_options.score_threshold if options.ranking_options else 0.0
        best: dict[tuple[str, str], FoundInFile] = {}
        for _, each in sorted(ranked, key=lambda entry: (entry[0], -entry[1].score)):
            if each.score >= least:
                best.setdefault((each.file.file_id, each.text), each)
        return [*best.values()][:count], may_answer

    def _search_store(
        self,
        account: str,
        store_id: str,
        queries: Sequence[str],
        options: SearchOptions,
        count: int,
        embedded: dict[str, NDArray[np.float32]],
        decide: bool,
    ) -> tuple[list[tuple[int, FoundInFile]], bool]:
        """Search a store. ``embedded`` has the embeddings of the queries by encoder."""
        with self.database.read() as session:
            store = check_store(table.find_store(session, account, store_id), store_id)
            files = {
                row.file_id: row
                for row in table.searchable(session, store_id)
                if options.filters is None or options.filters.matches(row.attributes)
            }
        if now() - store.last_active > _SEEN:
            with self.database.write() as session:
                # The row may have changed or be gone since it was read.
                mine = VectorStore.id == store_id
                session.execute(update(VectorStore).where(mine).values(last_active=now()))
        if not files or not self.indexes.exists(account, store_id):
            return [], False
        with self.indexes.open(account, store_id) as index:
            model, fingerprint = index.model, index.fingerprint
        stored = self.encoder(model, fingerprint)
        if model not in embedded:
            embedded[model] = self.embed(stored, queries)
        query_QH = embedded[model]
        weights = options.ranking_options and options.ranking_options.hybrid_search
        both = (weights.text_weight, weights.embedding_weight) if weights else (1.0, 1.0)
        ranked: list[tuple[int, FoundInFile]] = []
        with self.indexes.open(account, store_id) as index:
            for query, query_H in zip(queries, query_QH, strict=True):
                found = index.search(query, query_H, count, among=files, weights=both)
                ranked += [
                    (rank, FoundInFile(files[each.document], each))
                    for rank, each in enumerate(found)
                ]
            if not decide:
                return ranked, False
            limit = calibrate(index, lambda asked: index.best_cosines(self.embed(stored, asked)))
            accepted = index.best_cosines(query_QH, files).max() >= limit
        return ranked, bool(accepted)


def check_store(store: VectorStore | None, store_id: str) -> VectorStore:
    """Return a usable store.

    Raises:
        Fault: 404 for an unknown store, 400 for an expired store.
    """
    store = existing(store, "vector store", store_id, "vector_store_id")
    if store.is_expired:
        raise invalid(f"The vector store {store_id} is expired.", reason="expired")
    return store


def token_offsets(stored: StoredModel, text: str) -> list[tuple[int, int]]:
    """Return the first and last character (exclusive) of each token of ``text``."""
    encoded = stored.chat.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets: list[tuple[int, int]] = encoded["offset_mapping"]
    return offsets
