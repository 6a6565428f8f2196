"""Rows by the nearness of their embeddings: the nearest, and how well what belongs together is found.

Scores are cosines of embeddings of length 1, exact, and a block at a time, so that memory does not
grow with the product of both sides. Of pairs each anchor has one partner, looked for among all
partners; of rows with classes each row is looked up among all others, as in metric learning (Oh Song
et al. 2016, arXiv:1511.06452, section 6): recall at k is the share of rows with one of their class
among the first k. What is as near as what is looked for counts as nearer, so that equal embeddings
find nothing. nDCG is that of Järvelin and Kekäläinen 2002 with a gain of 1 for all that belongs.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from luthier.evaluation.significance import RowScores
from luthier.graders.base import Embedder

MOST_SCORES = 50_000_000
"""Scores that are held at once: 200 MB."""
CUT = 10
"""Places that nDCG looks at."""
DEPTH = 100
"""Places of an order that count where several are joined."""
RANK_CONSTANT = 60
"""Added to a place in reciprocal rank fusion, as its authors have it."""


def number_keys(keys: Sequence[Hashable]) -> NDArray[np.int64]:
    """A number for each of ``keys``, the same where they are equal, in the order of their first."""
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return np.array([numbers[key] for key in keys], dtype=np.int64)


def partner_ranks(
    anchors: ArrayLike,
    partners: ArrayLike,
    texts: Sequence[str],
    others: ArrayLike | None = None,
) -> NDArray[np.int64]:
    """The place of each anchor's own partner, ``[P]`` from 1, by cosine of embeddings of length 1.

    ``texts`` are those of the partners; one that stands in several pairs is one partner. ``others`` are
    embeddings ``[N, H]`` among which it is looked for, too.
    """
    anchor_PH, all_PH = np.asarray(anchors), np.asarray(partners)
    own_P = number_keys(texts)
    partner_UH = all_PH[np.unique(own_P, return_index=True)[1]]
    if others is not None and len(np.asarray(others)):
        partner_UH = np.concatenate([partner_UH, np.asarray(others)])
    scored = blocks(anchor_PH, partner_UH)
    return np.concatenate([_ranks(scores_CU, own_P[part]) for part, scores_CU in scored])


def blocks(query_QH: NDArray[Any], item_NH: NDArray[Any]) -> Iterator[tuple[slice, NDArray[Any]]]:
    """Some queries at a time, and their scores ``[C, N]`` with all items."""
    size = max(1, MOST_SCORES // max(1, len(item_NH)))
    for start in range(0, len(query_QH), size):
        part = slice(start, start + size)
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


def pair_ranks(
    queries: ArrayLike, items: ArrayLike, query_keys: Sequence[str], item_keys: Sequence[str]
) -> NDArray[np.int64]:
    """The place of the nearest item that belongs to each different query, ``[U]`` from 1, by its first.

    Pairs ``[P]`` say what belongs together: a query may stand in several with other items, as an image
    with all its captions (Karpathy and Fei-Fei 2015), and an item with several queries.
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
    """How well rows find others of their class; rows that are alone in theirs are not looked up."""

    rank_R: NDArray[np.int64]
    """The place of the first row of the same class, from 1."""
    ndcg_R: NDArray[np.float64]
    """nDCG at :data:`CUT` of each row."""

    @staticmethod
    def of(embeddings: ArrayLike, classes: Sequence[str]) -> ClassRetrieval:
        """Each row among all others; ``embeddings`` are of length 1."""
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


def _ndcg(
    scores_CR: NDArray[Any], alike_CR: NDArray[np.bool_], others_C: NDArray[np.int64]
) -> NDArray[np.float64]:
    """nDCG at :data:`CUT`; of rows as near as each other those of the class come last."""
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
    """BM25 (Robertson and Zaragoza 2009) over texts, by the library bm25s."""

    def __init__(self, texts: Sequence[str]) -> None:
        import bm25s

        self.size = len(texts)
        words = _words(texts)
        # Words of one letter are none, and neither an index nor a query may be without words.
        self._index = bm25s.BM25() if any(words.ids) else None
        if self._index is not None:
            self._index.index(words, show_progress=False)

    def scores(self, query: str) -> NDArray[np.float32]:
        """How well each text answers ``query``, ``[N]``; 0 where they share no word."""
        words = _words([query], ids=False)[0]
        if self._index is None or not words:
            return np.zeros(self.size, dtype=np.float32)
        found: NDArray[np.float32] = self._index.get_scores(words)
        return found

    def nearest(self, query: str, count: int) -> list[int]:
        """Numbers of the ``count`` texts nearest to ``query``, the nearest first."""
        most = min(count, self.size)
        if self._index is None:
            return [*range(most)]
        found, _ = self._index.retrieve(_words([query]), k=most, show_progress=False)
        return [int(number) for number in found[0]]


class Retriever:
    """Texts by the words they share with a query, and with ``embed`` by what both mean, too.

    Both orders are joined by reciprocal rank fusion (Cormack, Clarke and Buettcher 2009).
    """

    def __init__(self, texts: Sequence[str], embed: Embedder | None = None) -> None:
        self._words, self._embed = BM25Index(texts), embed
        self._text_NH = None if embed is None else embed(texts)

    def nearest(self, queries: Sequence[str], count: int) -> list[list[int]]:
        """Numbers of the ``count`` texts nearest to each query, the nearest first."""
        if self._embed is None or self._text_NH is None:
            return [self._words.nearest(query, count) for query in queries]
        by_meaning, _ = nearest(self._embed(queries), self._text_NH, DEPTH)
        both = zip(queries, by_meaning.tolist(), strict=True)
        return [
            reciprocal_rank_fusion([self._words.nearest(query, DEPTH), places])[:count]
            for query, places in both
        ]


def reciprocal_rank_fusion(orders: Sequence[Sequence[int]]) -> list[int]:
    """All numbers of several orders, the best first, by the sum of 1 / (60 + rank)."""
    scores: defaultdict[int, float] = defaultdict(float)
    for order in orders:
        for rank, number in enumerate(order, 1):
            scores[number] += 1 / (RANK_CONSTANT + rank)
    return sorted(scores, key=lambda number: (-scores[number], number))


def _words(texts: Sequence[str], ids: bool = True) -> Any:
    import bm25s

    return bm25s.tokenize(list(texts), stopwords=None, return_ids=ids, show_progress=False)


def bm25_ranks(anchors: Sequence[str], texts: Sequence[str]) -> NDArray[np.int64]:
    """As :func:`partner_ranks`, by the words they share."""
    index = BM25Index([*dict.fromkeys(texts)])
    both = zip(map(index.scores, anchors), number_keys(texts), strict=True)
    return np.array([_rank(scores_U, own) for scores_U, own in both], dtype=np.int64)


def popularity_ranks(known: Sequence[str], texts: Sequence[str]) -> NDArray[np.int64]:
    """As :func:`partner_ranks`, by how often each text is among ``known``, whoever asks."""
    seen = Counter(known)
    count_U = np.sort([seen[text] for text in dict.fromkeys(texts)])
    ranks_P: NDArray[np.int64] = len(count_U) - np.searchsorted(count_U, [seen[t] for t in texts])
    return ranks_P


def item_ranks(
    histories: Sequence[Sequence[str]], asked: Sequence[Sequence[str]], texts: Sequence[str]
) -> NDArray[np.int64]:
    """Return ranks as :func:`partner_ranks`, by how often items occur together in ``histories``.

    Item-to-item collaborative filtering (Linden et al. 2003): the cosine of two items over the
    histories that have them, summed over the items of ``asked``.
    """
    from sklearn.preprocessing import MultiLabelBinarizer, normalize

    distinct = [*dict.fromkeys(texts)]
    items = MultiLabelBinarizer(sparse_output=True).fit([*histories, *asked, distinct])
    known_NI = normalize(items.transform(histories).astype(float), axis=0)
    asked_PI = items.transform(asked)
    place_U = np.searchsorted(items.classes_, distinct)
    scores_PU = asked_PI @ known_NI.T @ known_NI[:, place_U]
    # An item is not its own company. Rounded: sums in another order must not tell equal items apart.
    scores_PU -= asked_PI[:, place_U].multiply(known_NI[:, place_U].max(0).toarray() > 0)
    return _ranks(scores_PU.toarray().round(9), number_keys(texts))


def retrieval_scores(ranks: ArrayLike, ndcg: ArrayLike | None = None) -> dict[str, RowScores]:
    """Recall at 1, 5 and 10, the mean reciprocal rank, and nDCG at 10; recall at 1 comes first.

    ``ndcg`` is that of each row; of rows with one partner it follows from the ranks.
    """
    ranks_P = np.asarray(ranks)
    if ndcg is None:
        ndcg = (ranks_P <= CUT) / np.log2(ranks_P + 1)
    return {
        **{f"recall_at_{k}": RowScores.of(ranks_P <= k) for k in (1, 5, 10)},
        "mean_reciprocal_rank": RowScores.of(1.0 / ranks_P),
        f"ndcg_at_{CUT}": RowScores.of(ndcg),
    }


def _rank(scores_U: NDArray[Any], own: int) -> int:
    return int((scores_U >= scores_U[own]).sum())


def _first_ranks(scores_CN: NDArray[Any], own_CN: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The place, from 1, of the nearest item that belongs to each query among all that do not."""
    best_C = np.where(own_CN, scores_CN, -np.inf).max(1)
    ranks_C: NDArray[np.int64] = 1 + ((scores_CN >= best_C[:, None]) & ~own_CN).sum(1)
    return ranks_C


def _ranks(scores_CU: NDArray[Any], own_C: NDArray[np.int64]) -> NDArray[np.int64]:
    own_score_C = scores_CU[np.arange(len(own_C)), own_C]
    ranks_C: NDArray[np.int64] = (scores_CU >= own_score_C[:, None]).sum(1)
    return ranks_C
