"""Evaluation of an embedding model or a reranker as a search in a collection of documents.

The table has the ways that a user can choose from, on the same queries: BM25, the base, the model,
both orders fused, and the first documents reranked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from luthier.errors import RecipeError
from luthier.evaluation.evaluate import Evaluation
from luthier.evaluation.retrieval import (
    CUT,
    DEPTH,
    BM25Index,
    nearest,
    reciprocal_rank_fusion,
    search_scores,
)
from luthier.inference.embeddings import check_embeds, gives_embeddings
from luthier.inference.prediction import Predictor
from luthier.library.models import find

if TYPE_CHECKING:
    from luthier.data.search_sets import SearchSet
    from luthier.library.models import StoredModel

RERANKED = 20
"""Number of documents per query that a reranker orders."""
Orders = list[list[int]]
"""Indices of the found documents of each query, best first."""


def evaluate_search(
    stored: StoredModel,
    collection: SearchSet,
    reranker: StoredModel | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Return the scores of ``stored`` and of other ways to search ``collection``.

    Args:
        stored: an embedding model, or a reranker after BM25.
        collection: documents and queries.
        reranker: a reranker after BM25 fused with ``stored``.
        on_progress: called with the number of finished texts, and of all texts to read.

    Raises:
        RecipeError: for a model that is neither, or a ``reranker`` that cannot rank.
    """
    ranks = stored.objective.task.ranks
    if not ranks:
        check_embeds(stored, stored.objective)
    if reranker is not None:
        if ranks:
            raise RecipeError(f"{stored.id} is a reranker. Omit `reranker`.", setting="reranker")
        if not reranker.objective.task.ranks:
            raise RecipeError(f"{reranker.id} is not a reranker.", setting="reranker")
    embedders = {} if ranks else {stored.id: stored}
    base = stored.root
    if embedders and base != stored.id and gives_embeddings(find(base).objective):
        embedders = {f"{base} (base)": find(base), **embedders}
    size = len(collection.queries) + len(collection.documents)
    embedded = size * len(embedders)
    ranked = 0
    if ranks or reranker is not None:
        ranked = len(collection.queries) * min(RERANKED, len(collection.documents))
    total = embedded + ranked

    def report(before: int, count: int) -> None:
        on_progress(before + count, total)

    words = BM25Index(collection.documents)
    orders = {"BM25": [words.nearest(query, DEPTH) for query in collection.queries]}
    first = orders["BM25"]
    if ranks:
        reranker = stored
    else:
        for number, (name, each) in enumerate(embedders.items()):
            orders[name] = _by_meaning(each, collection, partial(report, size * number))
        first = _fuse(first, orders[stored.id])
        orders[f"BM25 fused with {stored.id}"] = first
    if reranker is not None:
        again = [*_rerank(reranker, collection, first, partial(report, embedded))]
        orders[f"reranked by {reranker.id}"] = again
        heads = [order[:RERANKED] for order in first], [order[:RERANKED] for order in again]
        fused = zip(_fuse(*heads), first, strict=True)
        orders[f"fused with {reranker.id}"] = [head + rest[RERANKED:] for head, rest in fused]
    systems = {name: search_scores(found, collection.gains) for name, found in orders.items()}
    own = f"reranked by {stored.id}" if ranks else stored.id
    records = [*_records(collection, orders[own], systems[own])]
    remarks = [f"each query searches {len(collection.documents):,} documents"]
    if reranker is not None:
        remarks.append(f"the reranker orders the first {RERANKED} documents of a query")
    if collection.added:
        remarks.append(f"{collection.added:,} relevant texts were missing in the corpus, and added")
    if collection.left_out:
        remarks.append(f"queries without a relevant document, left out: {collection.left_out:,}")
    return Evaluation(
        systems[own], collection.rows, remarks=remarks, records=records, systems=systems
    )


def _by_meaning(stored: StoredModel, collection: SearchSet, done: Callable[[int], None]) -> Orders:
    texts = [*collection.queries, *collection.documents]
    embedding_TH = Predictor.open(stored).embed(texts, done)
    size = len(collection.queries)
    found: Orders = nearest(embedding_TH[:size], embedding_TH[size:], DEPTH)[0].tolist()
    return found


def _fuse(first: Orders, second: Orders) -> Orders:
    return [reciprocal_rank_fusion(both) for both in zip(first, second, strict=True)]


def _rerank(
    reranker: StoredModel, collection: SearchSet, first: Orders, done: Callable[[int], None]
) -> Iterator[list[int]]:
    predictor = Predictor.open(reranker)
    scored = 0
    for query, order in zip(collection.queries, first, strict=True):
        head = order[:RERANKED]
        scores = predictor.rank(query, [collection.documents[place] for place in head])
        best = sorted(range(len(head)), key=lambda place: -scores[place])
        yield [head[place] for place in best] + order[RERANKED:]
        scored += len(head)
        done(scored)


def _records(
    collection: SearchSet, orders: Sequence[Sequence[int]], scores: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Yield each query with its relevant and its first documents, by id."""
    for number, (query, order) in enumerate(zip(collection.queries, orders, strict=True)):
        yield {
            "query": query,
            "expected": [collection.ids[place] for place in collection.gains[number]],
            "documents": [collection.ids[place] for place in order[:CUT]],
            **{name: float(each.parts_R[number]) for name, each in scores.items()},
        }
