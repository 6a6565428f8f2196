"""Similarity search: the rows of a collection that are nearest to a query, by a model's embeddings.

The search is exact: one matrix product (:func:`luthier.evaluation.retrieval.nearest`). Embedding
the collection is the slow part, so an index file can store the embeddings. The index has the
embedding of each content by SHA-256, and no content. An index belongs to one model and its weights.
Renamed files are found in the index, changed content is embedded again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from luthier.data.shapes.media import MediaRow
from luthier.errors import CorruptFile, RecipeError, check_at_least_one
from luthier.files import write_bytes
from luthier.inference.embeddings import check_embeds

if TYPE_CHECKING:
    from luthier.inference.prediction import Predictor
    from luthier.library.models import StoredModel
    from luthier.types import Row

MAX_ROWS = 1_000_000
"""Maximum rows of a collection, because the embeddings are in memory."""
FORM = "luthier-embeddings-2"
"""Format name in the file's metadata."""


@dataclass(frozen=True)
class Neighbour:
    """A row of the collection, with its similarity to the query."""

    place: int
    """Index of the row in the collection, from 0."""
    name: str
    """Text of the row, or path of the image or audio clip."""
    score: float
    """Cosine with the query, from -1 to 1."""


@dataclass(frozen=True)
class NearestRows:
    """Nearest rows of each query."""

    neighbours: list[list[Neighbour]]
    """The nearest first; empty for a query whose words or items the model does not know."""
    embedded: int
    """Number of newly embedded contents; all further contents were in the index."""
    truncated: int
    """Number of truncated contents among the queries and the newly embedded."""


def find_nearest(
    predictor: Predictor,
    stored: StoredModel,
    queries: Sequence[Row],
    rows: Sequence[Row],
    count: int,
    index: Path | None = None,
    on_progress: Callable[[int], None] = lambda count: None,
) -> NearestRows:
    """Return the ``count`` rows nearest to each query.

    A query of several lines is a history of items, whose items are left out.

    Args:
        predictor: the model in memory.
        stored: the same model on disk, the owner of ``index``.
        queries: bare rows.
        rows: the collection.
        count: number of neighbours.
        index: file that stores embeddings of the collection.
        on_progress: receives the number of newly embedded contents.

    Raises:
        RecipeError: for an index of another model, or too large a collection.
        CorruptFile: for an unreadable index.
        DataError: for rows that the model cannot encode.
    """
    from luthier.evaluation.retrieval import nearest

    check_embeds(stored, predictor.objective)
    if not rows or not queries:
        raise RecipeError("The search needs at least one query and one row.")
    if len(rows) > MAX_ROWS:
        raise RecipeError(f"The collection has {len(rows):,} rows; the limit is {MAX_ROWS:,}.")
    check_at_least_one(count=count)
    queries, rows = [row.bare() for row in queries], [row.bare() for row in rows]
    embeddings = EmbeddingIndex.open(index, stored)
    query_QH, cut = predictor.embed_rows(queries)
    row_NH, embedded, truncated = embeddings.embeddings_of(predictor, rows, on_progress)
    of_items = predictor.network.model.config.model_type == "item_counts"
    seen = [_items(row.plain_text(), of_items) for row in queries]
    places_QK, scores_QK = nearest(query_QH, row_NH, count + max(map(len, seen)))
    neighbours = list[list[Neighbour]]()
    for is_known, items, places_K, scores_K in zip(
        np.any(query_QH, axis=1).tolist(), seen, places_QK.tolist(), scores_QK.tolist(), strict=True
    ):
        near = [
            Neighbour(place, rows[place].excerpt() or rows[place].plain_text(), score)
            for place, score in zip(places_K, scores_K, strict=True)
            if rows[place].plain_text() not in items
        ]
        neighbours.append(near[:count] if is_known else [])
    return NearestRows(neighbours, embedded, cut + truncated)


def _items(text: str, of_items: bool) -> frozenset[str]:
    """Return the items of a history; empty for other texts."""
    lines = text.splitlines()
    return frozenset(line.strip() for line in lines) if of_items or len(lines) > 1 else frozenset()


class EmbeddingIndex:
    """Embeddings of contents by a single model, in memory and optionally in a file."""

    def __init__(self, file: Path | None, model: str, fingerprint: str) -> None:
        self.file, self.model, self.fingerprint = file, model, fingerprint
        self._places: dict[bytes, int] = {}
        self._known_NH: NDArray[np.float32] = np.empty((0, 0), np.float32)

    @staticmethod
    def open(file: Path | None, stored: StoredModel) -> EmbeddingIndex:
        """Read the index in ``file``, or create an empty index.

        Raises:
            RecipeError: for an index of another model, or of changed weights.
            CorruptFile: for an unreadable index.
        """

        index = EmbeddingIndex(file, stored.id, stored.content_hash)
        if file is not None and file.exists():
            index._read(file)
        return index

    def _read(self, file: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(file), framework="np") as tensors:
                about = tensors.metadata() or {}
                if about.get("form") != FORM:
                    raise CorruptFile(
                        f"{file} is not an index of embeddings. Name a different file."
                    )
                if about.get("fingerprint") != self.fingerprint:
                    raise RecipeError(
                        f"{file} has embeddings of {about.get('model', 'an unknown model')} with "
                        f"different weights than {self.model}. Remove the file."
                    )
                digests, known_NH = tensors.get_tensor("sha256"), tensors.get_tensor("embeddings")
        except (SafetensorError, OSError, KeyError) as error:
            raise CorruptFile(f"{file} is not a readable index of embeddings: {error}") from error
        # A user may name any file, so types and shapes are checked before use.
        fits = digests.dtype == np.uint8 and digests.shape == (len(known_NH), 32)
        if not fits or known_NH.ndim != 2 or known_NH.dtype != np.float32:
            raise CorruptFile(f"{file} has no matching embeddings and hashes. Remove the file.")
        self._places = {digest.tobytes(): place for place, digest in enumerate(digests)}
        self._known_NH = known_NH

    def embeddings_of(
        self, predictor: Predictor, rows: Sequence[Row], on_progress: Callable[[int], None]
    ) -> tuple[NDArray[np.float32], int, int]:
        """Return embeddings ``[N, H]`` of ``rows``, and the numbers of newly embedded contents and of
        truncated contents."""
        digests = [_digest(row) for row in rows]
        # A dictionary, so that equal contents are embedded once.
        new = {
            digest: row
            for digest, row in zip(digests, rows, strict=True)
            if digest not in self._places
        }
        truncated = 0
        if new:
            new_NH, truncated = predictor.embed_rows([*new.values()], on_progress)
            self._add([*new], new_NH)
        known_NH = self._known_NH[[self._places[digest] for digest in digests]]
        return known_NH, len(new), truncated

    def _add(self, digests: Sequence[bytes], new_NH: NDArray[np.float32]) -> None:
        from safetensors.numpy import save

        if len(self._places) + len(digests) > MAX_ROWS:  # keep only the requested rows
            self._places, self._known_NH = {}, self._known_NH[:0]
        before = len(self._places)
        self._known_NH = np.concatenate([self._known_NH, new_NH]) if before else new_NH
        self._places |= {digest: before + place for place, digest in enumerate(digests)}
        if self.file is None:
            return
        # A dictionary keeps the order of insertion, which is the order of the places.
        digests_N32 = np.frombuffer(b"".join(self._places), np.uint8).reshape(-1, 32)
        tensors: dict[str, NDArray[Any]] = {"sha256": digests_N32, "embeddings": self._known_NH}
        about = {"form": FORM, "model": self.model, "fingerprint": self.fingerprint}
        write_bytes(self.file, save(tensors, about))


def _digest(row: Row) -> bytes:
    if isinstance(row, MediaRow):
        return bytes.fromhex(row.media.digest())
    # JSON rows may contain lone surrogates, which strict UTF-8 rejects.
    return hashlib.sha256(row.plain_text().encode("utf-8", "surrogatepass")).digest()
