"""How well the partner of each text is found among all partners of a file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from luthier.evaluation.significance import RowScores

_AT_ONCE = 1024
"""Anchors whose scores are held at once: with 100,000 partners, 400 MB."""


def partner_ranks(
    anchors: ArrayLike, partners: ArrayLike, texts: Sequence[str]
) -> NDArray[np.int64]:
    """The place of each anchor's own partner, ``[P]`` from 1, by cosine of embeddings of length 1.

    ``texts`` are those of the partners; one that stands in several pairs is one partner. A partner as
    near as the own one counts as nearer, so that equal embeddings find nothing.
    """
    anchor_PH, all_PH = np.asarray(anchors), np.asarray(partners)
    _, places, own_P = np.unique(
        np.array(texts, dtype=object), return_index=True, return_inverse=True
    )
    partner_UH = all_PH[places]
    parts = []
    for start in range(0, len(anchor_PH), _AT_ONCE):
        scores_CU = anchor_PH[start : start + _AT_ONCE] @ partner_UH.T
        parts.append(_ranks(scores_CU, own_P[start : start + _AT_ONCE]))
    return np.concatenate(parts)


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
        """Numbers of the ``count`` texts nearest to ``query``, the nearest last.

        In a prompt what stands last is heeded most.
        """
        most = min(count, self.size)
        if self._index is None:
            return [*range(most)][::-1]
        found, _ = self._index.retrieve(_words([query]), k=most, show_progress=False)
        return [int(number) for number in found[0]][::-1]


def _words(texts: Sequence[str], ids: bool = True) -> Any:
    import bm25s

    return bm25s.tokenize(list(texts), stopwords=None, return_ids=ids, show_progress=False)


def bm25_ranks(anchors: Sequence[str], texts: Sequence[str]) -> NDArray[np.int64]:
    """As :func:`partner_ranks`, by the words they share."""
    distinct, own_P = np.unique(np.array(texts, dtype=object), return_inverse=True)
    index = BM25Index(distinct.tolist())
    scores_PU = np.stack([index.scores(anchor) for anchor in anchors])
    return _ranks(scores_PU, own_P)


def recall_at_1(ranks: ArrayLike) -> RowScores:
    """Whether the own partner of each is the first, row by row."""
    return RowScores.of(np.asarray(ranks) <= 1)


def retrieval_scores(ranks: ArrayLike) -> dict[str, float]:
    """Recall at 1 and 10, and the mean reciprocal rank."""
    ranks_P = np.asarray(ranks)
    return {
        "recall_at_1": float((ranks_P <= 1).mean()),
        "recall_at_10": float((ranks_P <= 10).mean()),
        "mean_reciprocal_rank": float((1.0 / ranks_P).mean()),
    }


def _ranks(scores_CU: NDArray[Any], own_C: NDArray[np.int64]) -> NDArray[np.int64]:
    own_score_C = scores_CU[np.arange(len(own_C)), own_C]
    ranks_C: NDArray[np.int64] = (scores_CU >= own_score_C[:, None]).sum(1)
    return ranks_C
