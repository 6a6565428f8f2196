"""Retrieval with embeddings: nearest rows, and ranks of matching rows.

Scores are exact cosines of unit embeddings, computed in blocks to bound memory. In pairs, each
anchor has one partner among all partners. In rows with classes, each row is a query among all
remaining rows, as in metric learning (Oh Song et al. 2016, arXiv:1511.06452, section 6). Recall at
k is the share of queries with a row of the same class among the first k.

Ties count against the match, so equal embeddings find nothing. nDCG follows Järvelin and Kekäläinen
2002 with a gain of 1 for every match.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from luthier.data.spelling import unify_spelling
from luthier.evaluation.significance import RowScores
from luthier.graders.base import Embedder

if TYPE_CHECKING:
    from scipy.sparse import csr_array

Item = TypeVar("Item", bound=Hashable)

MOST_SCORES = 50_000_000
"""Maximum number of scores in memory: 200 MB."""
CUT = 10
"""Number of ranks in nDCG."""
DEPTH = 100
"""Number of ranks per list in reciprocal rank fusion."""
MARGIN = 0.05
"""Default margin of :class:`NegativeMiner`, the best in the paper."""
MARGIN_REASON = (
    "scores within 5 % of the positive's score are left out, because many of these texts are "
    "unlabelled positives (arXiv:2407.15831)"
)
RANK_CONSTANT = 60
"""Constant added to a rank in reciprocal rank fusion, from the paper."""


def number_keys(keys: Sequence[Hashable]) -> NDArray[np.int64]:
    """Number the distinct ``keys`` in order of first appearance; return the number of each key."""
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return np.array([numbers[key] for key in keys], dtype=np.int64)


def partner_ranks(
    anchors: ArrayLike,
    partners: ArrayLike,
    texts: Sequence[str],
    others: ArrayLike | None = None,
    seen_PU: csr_array | None = None,
) -> NDArray[np.int64]:
    """Return the rank of each anchor's partner, ``[P]`` from 1, by cosine of unit embeddings.

    Args:
        texts: texts of the partners; equal texts are one partner.
        others: embeddings ``[N, H]`` of additional candidates.
        seen_PU: true for candidates to leave out: distinct partners, then ``others``.
    """
    anchor_PH, all_PH = np.asarray(anchors), np.asarray(partners)
    own_P = number_keys(texts)
    partner_UH = all_PH[np.unique(own_P, return_index=True)[1]]
    if others is not None and len(np.asarray(others)):
        partner_UH = np.concatenate([partner_UH, np.asarray(others)])
    ranks = []
    for part, scores_CU in blocks(anchor_PH, partner_UH):
        if seen_PU is not None:
            scores_CU = np.where(seen_PU[part].toarray(), -np.inf, scores_CU)
        ranks.append(_ranks(scores_CU, own_P[part]))
    return np.concatenate(ranks)


def seen_items(
    histories: Sequence[Sequence[str]], texts: Sequence[str], others: Sequence[str] = ()
) -> csr_array:
    """Return which candidates, distinct ``texts`` and ``others``, each history has, ``[P, U]``.

    A next item, in ``texts``, that the history has is not recommended either.
    """
    from scipy.sparse import csr_array

    place = {text: number for number, text in enumerate([*dict.fromkeys(texts), *others])}
    seen = [sorted({place[item] for item in items if item in place}) for items in histories]
    start_P = np.cumsum([0, *map(len, seen)])
    item_K = np.fromiter(chain.from_iterable(seen), np.int64, start_P[-1])
    # Sparse: 100,000 users and 10,000 items would fill 1 GB, and have a few hundred items each.
    return csr_array((np.ones(len(item_K), bool), item_K, start_P), (len(seen), len(place)))


def row_parts(rows: int, width: int) -> Iterator[slice]:
    """Yield parts of the rows of a score matrix, each of at most :data:`MOST_SCORES` scores."""
    size = max(1, MOST_SCORES // max(1, width))
    for start in range(0, rows, size):
        yield slice(start, start + size)


def blocks(query_QH: NDArray[Any], item_NH: NDArray[Any]) -> Iterator[tuple[slice, NDArray[Any]]]:
    """Some queries at a time, and their scores ``[C, N]`` with all items."""
    for part in row_parts(len(query_QH), len(item_NH)):
        yield part, query_QH[part] @ item_NH.T


def nearest(
    queries: ArrayLike, items: ArrayLike, count: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Numbers and scores ``[Q, K]`` of the ``count`` items nearest to each query, the nearest first.

    Of items as near as each other the first comes first. There may be fewer than ``count`` items.
    """
    query_QH, item_NH = np.asarray(queries, np.float32), np.asarray(items, np.float32)
    count = min(count, len(item_NH))
    places, scores = [np.empty((0, count), np.int64)], [np.empty((0, count), np.float32)]
    for _, scores_CN in blocks(query_QH, item_NH):
        near_CK = np.sort(np.argpartition(-scores_CN, count - 1, axis=1)[:, :count], axis=1)
        score_CK = np.take_along_axis(scores_CN, near_CK, axis=1)
        order_CK = np.argsort(-score_CK, axis=1, kind="stable")
        places.append(np.take_along_axis(near_CK, order_CK, axis=1))
        scores.append(np.take_along_axis(score_CK, order_CK, axis=1))
    return np.concatenate(places), np.concatenate(scores)


class NegativeMiner(Generic[Item]):
    """Search for hard negatives: the items with the highest scores that are not relevant.

    Relevant items that nobody labelled are frequent among the best items. An item whose score is
    within a margin of the positive's score therefore counts as relevant (TopK-PercPos, Moreira et
    al. 2024, arXiv:2407.15831).
    """

    def __init__(
        self, pairs: Sequence[tuple[Hashable, Item]], further: Iterable[Item] = ()
    ) -> None:
        """Collect the items of ``pairs`` of a query and a positive, and ``further`` items."""
        self.items: list[Item] = [*dict.fromkeys([*(item for _, item in pairs), *further])]
        """Distinct items, in the order of their scores in :meth:`negatives`."""
        self._place = {item: number for number, item in enumerate(self.items)}
        self._positives = defaultdict[Hashable, set[int]](set)
        for query, item in pairs:
            self._positives[query].add(self._place[item])

    def negatives(
        self,
        query: Hashable,
        positive: Item,
        score_N: NDArray[Any],
        count: int,
        margin: float = MARGIN,
    ) -> list[Item]:
        """Return at most ``count`` negatives of a pair, the best first.

        Args:
            score_N: scores of :attr:`items` for ``query``.
            margin: share of the positive's score.
        """
        own, relevant = score_N[self._place[positive]], self._positives[query]
        limit = own - margin * abs(own)
        best = np.argsort(-score_N, kind="stable").tolist()
        found = (self.items[n] for n in best if n not in relevant and score_N[n] < limit)
        return [*islice(found, count)]


def pair_ranks(
    queries: ArrayLike, items: ArrayLike, query_keys: Sequence[str], item_keys: Sequence[str]
) -> NDArray[np.int64]:
    """Return the rank of the nearest matching item of each distinct query, ``[U]`` from 1.

    Queries and items ``[P]`` are pairs that match. A query may match several items, such as an
    image with several captions (Karpathy and Fei-Fei 2015), and an item several queries.
    """
    query_P, item_P = number_keys(query_keys), number_keys(item_keys)
    first_U, place_N = (np.unique(each, return_index=True)[1] for each in (query_P, item_P))
    ranks = [np.empty(0, np.int64)]
    for part, scores_CN in blocks(np.asarray(queries)[first_U], np.asarray(items)[place_N]):
        asked_P = (query_P >= part.start) & (query_P < part.stop)
        own_CN = np.zeros(scores_CN.shape, dtype=bool)
        own_CN[query_P[asked_P] - part.start, item_P[asked_P]] = True
        ranks.append(_first_ranks(scores_CN, own_CN))
    return np.concatenate(ranks)


@dataclass(frozen=True)
class ClassRetrieval:
    """Retrieval of rows of the same class. Rows without a second row of the class are no queries."""

    rank_R: NDArray[np.int64]
    """The place of the first row of the same class, from 1."""
    ndcg_R: NDArray[np.float64]
    """nDCG at :data:`CUT` of each row."""

    @staticmethod
    def of(embeddings: ArrayLike, classes: Sequence[str]) -> ClassRetrieval:
        """Rank all remaining rows for each row. ``embeddings`` have length 1."""
        row_RH = np.asarray(embeddings, dtype=np.float32)
        class_R = number_keys(classes)
        others_R = np.bincount(class_R)[class_R] - 1
        asked_Q = np.flatnonzero(others_R)
        ranks, gains = [np.empty(0, np.int64)], [np.empty(0)]
        for part, scores_CR in blocks(row_RH[asked_Q], row_RH):
            own_C = asked_Q[part]
            alike_CR = class_R[own_C][:, None] == class_R
            itself = (np.arange(len(own_C)), own_C)
            alike_CR[itself], scores_CR[itself] = False, -np.inf
            ranks.append(_first_ranks(scores_CR, alike_CR))
            gains.append(_ndcg(scores_CR, alike_CR, others_R[own_C]))
        return ClassRetrieval(np.concatenate(ranks), np.concatenate(gains))

    @property
    def scores(self) -> dict[str, RowScores]:
        """Recall at 1, 5 and 10, the mean reciprocal rank of the first, and nDCG at 10."""
        return retrieval_scores(self.rank_R, self.ndcg_R)


@dataclass(frozen=True)
class Ranking:
    """A query's documents in the order of their scores."""

    rank: int
    """Rank of the first relevant document, from 1."""
    ndcg: float
    """nDCG at :data:`CUT`."""

    @staticmethod
    def of(scores: Sequence[float], labels: Sequence[float]) -> Ranking | None:
        """Rank documents with a relevance from 0 to 1, which is the gain.

        Ties count against relevant documents. ``None`` if all documents are alike: relevant (above
        0.5), or not.
        """
        label_N = np.asarray(labels, dtype=np.float64)
        order_N = np.lexsort((label_N, -np.asarray(scores)))
        relevant_N = label_N[order_N] > 0.5
        if relevant_N.all() or not relevant_N.any():
            return None
        discount_K = 1 / np.log2(np.arange(min(CUT, len(label_N))) + 2)
        gain = float(label_N[order_N][:CUT] @ discount_K)
        ideal = float(np.sort(label_N)[::-1][:CUT] @ discount_K)
        return Ranking(int(relevant_N.argmax()) + 1, gain / ideal)


def _ndcg(
    scores_CR: NDArray[Any], alike_CR: NDArray[np.bool_], others_C: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return nDCG at :data:`CUT`. Ties count against rows of the class."""
    # Less than two float32 numbers near 1 differ by, so it decides only between equal ones.
    scores_CR = scores_CR.astype(np.float64) - 1e-9 * alike_CR
    cut = min(CUT, scores_CR.shape[1])
    near_CK = np.argpartition(-scores_CR, cut - 1, axis=1)[:, :cut]
    order_CK = np.argsort(-np.take_along_axis(scores_CR, near_CK, axis=1), axis=1)
    near_CK = np.take_along_axis(near_CK, order_CK, axis=1)
    discount_K = 1 / np.log2(np.arange(cut) + 2)
    gain_C = (np.take_along_axis(alike_CR, near_CK, axis=1) * discount_K).sum(1)
    ideal_K = np.cumsum(discount_K)
    found: NDArray[np.float64] = gain_C / ideal_K[np.minimum(others_C, cut) - 1]
    return found


class BM25Index:
    """BM25 index of texts (Robertson and Zaragoza 2009), with the library bm25s."""

    def __init__(self, texts: Sequence[str]) -> None:
        import bm25s

        self.size = len(texts)
        words = _words(texts)
        # Words of one letter are none, and neither an index nor a query may be without words.
        self._index = bm25s.BM25() if any(words.ids) else None
        if self._index is not None:
            self._index.index(words, show_progress=False)

    def scores(self, query: str) -> NDArray[np.float32]:
        """Return the BM25 score of each text for ``query``, ``[N]``; 0 without a common word."""
        words = _words([query], ids=False)[0]
        if self._index is None or not words:
            return np.zeros(self.size, dtype=np.float32)
        found: NDArray[np.float32] = self._index.get_scores(words)
        return found

    def nearest(self, query: str, count: int) -> list[int]:
        """Return the indices of the ``count`` best texts for ``query``, best first."""
        most = min(count, self.size)
        if self._index is None:
            return [*range(most)]
        found, _ = self._index.retrieve(_words([query]), k=most, show_progress=False)
        return [int(number) for number in found[0]]


class TextSearch:
    """Text search by words and, with ``embed``, by meaning.

    Reciprocal rank fusion combines both orders (Cormack, Clarke and Buettcher 2009).
    """

    def __init__(self, texts: Sequence[str], embed: Embedder | None = None) -> None:
        self._words, self._embed = BM25Index(texts), embed
        self._text_NH = None if embed is None else embed(texts)

    def nearest(self, queries: Sequence[str], count: int) -> list[list[int]]:
        """Return the indices of the ``count`` best texts for each query, best first."""
        if self._embed is None or self._text_NH is None:
            return [self._words.nearest(query, count) for query in queries]
        by_meaning, _ = nearest(self._embed(queries), self._text_NH, DEPTH)
        both = zip(queries, by_meaning.tolist(), strict=True)
        return [
            reciprocal_rank_fusion([self._words.nearest(query, DEPTH), places])[:count]
            for query, places in both
        ]


def reciprocal_rank_fusion(
    orders: Sequence[Sequence[int]], weights: Sequence[float] | None = None
) -> list[int]:
    """All numbers of several orders, the best first, by the weighted sum of 1 / (60 + rank)."""
    scores: defaultdict[int, float] = defaultdict(float)
    for order, weight in zip(orders, weights or [1.0] * len(orders), strict=True):
        for rank, number in enumerate(order, 1):
            scores[number] += weight / (RANK_CONSTANT + rank)
    return sorted(scores, key=lambda number: (-scores[number], number))


def _words(texts: Sequence[str], ids: bool = True) -> Any:
    import bm25s

    unified = [*map(unify_spelling, texts)]
    return bm25s.tokenize(unified, stopwords=None, return_ids=ids, show_progress=False)


def bm25_ranks(
    anchors: Sequence[str],
    texts: Sequence[str],
    others: Sequence[str] = (),
    seen_PU: csr_array | None = None,
) -> NDArray[np.int64]:
    """Return ranks as :func:`partner_ranks`, by BM25. ``others`` are additional candidates."""
    index = BM25Index([*dict.fromkeys(texts), *others])
    if seen_PU is not None:
        return _unseen_ranks(
            seen_PU, texts, lambda part: np.stack([*map(index.scores, anchors[part])])
        )
    both = zip(map(index.scores, anchors), number_keys(texts), strict=True)
    return np.array([_rank(scores_U, own) for scores_U, own in both], dtype=np.int64)


def popularity_ranks(
    known: Sequence[str],
    texts: Sequence[str],
    histories: Sequence[Sequence[str]],
    others: Sequence[str] = (),
) -> NDArray[np.int64]:
    """Return ranks as :func:`partner_ranks`, by the frequency of each text in ``known``, without the
    items of ``histories``."""
    counts = Counter(known)
    count_U = np.array([counts[text] for text in (*dict.fromkeys(texts), *others)], float)
    return _unseen_ranks(seen_items(histories, texts, others), texts, lambda _: count_U)


def item_ranks(
    histories: Sequence[Sequence[str]],
    queries: Sequence[Sequence[str]],
    texts: Sequence[str],
    others: Sequence[str] = (),
) -> NDArray[np.int64]:
    """Return ranks as :func:`partner_ranks`, by co-occurrence of items in ``histories``.

    Item-to-item collaborative filtering (Linden et al. 2003): the cosine of two items over the
    histories, summed over the items of ``queries``, which are left out.
    """
    from sklearn.preprocessing import MultiLabelBinarizer, normalize

    distinct = [*dict.fromkeys(texts), *others]
    items = MultiLabelBinarizer(sparse_output=True).fit([*histories, *queries, distinct])
    known_NI = normalize(items.transform(histories).astype(float), axis=0)
    query_PI = items.transform(queries)
    place_U = np.searchsorted(items.classes_, distinct)
    known_NU = known_NI[:, place_U]
    # An item is not its own company.
    own_PU = query_PI[:, place_U].multiply(known_NU.max(0).toarray() > 0).tocsr()

    def scores(part: slice) -> NDArray[np.float64]:
        found_CU = query_PI[part] @ known_NI.T @ known_NU - own_PU[part]
        # Rounded: sums in another order must not tell equal items apart.
        rounded_CU: NDArray[np.float64] = found_CU.toarray().round(9)
        return rounded_CU

    return _unseen_ranks(seen_items(queries, texts, others), texts, scores)


def _unseen_ranks(
    seen_PU: csr_array, texts: Sequence[str], scores: Callable[[slice], NDArray[np.float64]]
) -> NDArray[np.int64]:
    """Return the ranks of ``texts`` by the scores ``[C, U]`` of some rows, without seen items."""
    own_P = number_keys(texts)
    rows, width = seen_PU.shape
    # A quarter of the usual rows: scores are doubles here, and copied while they are rounded.
    ranks = [
        _ranks(np.where(seen_PU[part].toarray(), -np.inf, scores(part)), own_P[part])
        for part in row_parts(rows, 4 * width)
    ]
    return np.concatenate(ranks)


def retrieval_scores(ranks: ArrayLike, ndcg: ArrayLike | None = None) -> dict[str, RowScores]:
    """Return recall at 1, 5 and 10, the mean reciprocal rank, and nDCG at 10; recall at 1 comes
    first.

    Args:
        ndcg: nDCG of each row; computed from the ranks for rows with one partner.
    """
    ranks_P = np.asarray(ranks)
    if ndcg is None:
        ndcg = (ranks_P <= CUT) / np.log2(ranks_P + 1)
    return {
        **{f"recall_at_{k}": RowScores.of(ranks_P <= k) for k in (1, 5, 10)},
        "mean_reciprocal_rank": RowScores.of(1.0 / ranks_P),
        f"ndcg_at_{CUT}": RowScores.of(ndcg),
    }


def search_scores(
    orders: Sequence[Sequence[int]], gains: Sequence[Mapping[int, float]]
) -> dict[str, RowScores]:
    """Return nDCG at 10 and recall at 10 of each query, as BEIR and trec_eval define them.

    Args:
        orders: found documents of each query, best first.
        gains: relevance of the relevant documents of each query.
    """
    discount_K = 1 / np.log2(np.arange(CUT) + 2)
    ndcg, recall = [], []
    for order, gain in zip(orders, gains, strict=True):
        found = [gain.get(number, 0.0) for number in order[:CUT]]
        best = sorted(gain.values(), reverse=True)[:CUT]
        ndcg.append(found @ discount_K[: len(found)] / (best @ discount_K[: len(best)]))
        recall.append(np.count_nonzero(found) / len(gain))
    return {f"ndcg_at_{CUT}": RowScores.of(ndcg), f"recall_at_{CUT}": RowScores.of(recall)}


def _rank(scores_U: NDArray[Any], own: int) -> int:
    return int((scores_U >= scores_U[own]).sum())


def _first_ranks(scores_CN: NDArray[Any], own_CN: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the rank of the nearest matching item of each query, from 1, among non-matching items."""
    best_C = np.where(own_CN, scores_CN, -np.inf).max(1)
    ranks_C: NDArray[np.int64] = 1 + ((scores_CN >= best_C[:, None]) & ~own_CN).sum(1)
    return ranks_C


def _ranks(scores_CU: NDArray[Any], own_C: NDArray[np.int64]) -> NDArray[np.int64]:
    own_score_C = scores_CU[np.arange(len(own_C)), own_C]
    ranks_C: NDArray[np.int64] = (scores_CU >= own_score_C[:, None]).sum(1)
    return ranks_C
