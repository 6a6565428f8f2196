"""How well the partner of each text is found among all partners of a file."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

K1, B = 1.2, 0.75
"""How soon a word that is repeated counts no more, and how much the length of a text counts."""
_WORD = re.compile(r"\w+")
_AT_ONCE = 1024


def partner_ranks(anchors: Any, partners: Any, texts: Sequence[str]) -> NDArray[np.int64]:
    """The place of each anchor's own partner, ``[P]`` from 1, by cosine of embeddings of length 1.

    ``texts`` are those of the partners; one that stands in several pairs is one partner. A partner as
    near as the own one counts as nearer, so that equal embeddings find nothing.
    """
    anchor_PH, all_PH = np.asarray(anchors), np.asarray(partners)
    places, own_P = _distinct(texts)
    partner_UH = all_PH[places]
    parts = []
    for start in range(0, len(anchor_PH), _AT_ONCE):
        scores_CU = anchor_PH[start : start + _AT_ONCE] @ partner_UH.T
        parts.append(_ranks(scores_CU, own_P[start : start + _AT_ONCE]))
    return np.concatenate(parts)


def bm25_ranks(anchors: Sequence[str], texts: Sequence[str]) -> NDArray[np.int64]:
    """As :func:`partner_ranks`, by the words they share (BM25, Robertson & Zaragoza 2009)."""
    places, own_P = _distinct(texts)
    words = [Counter(_WORD.findall(texts[place].lower())) for place in places]
    lengths_U = np.array([max(1, each.total()) for each in words], dtype=np.float64)
    norm_U = K1 * (1 - B + B * lengths_U / lengths_U.mean())
    postings: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
    for index, each in enumerate(words):
        for word, count in each.items():
            postings[word].append((index, count))
    weights = {}
    for word, found in postings.items():
        rarity = math.log(1 + (len(words) - len(found) + 0.5) / (len(found) + 0.5))
        index_D, count_D = np.array(found).T
        weights[word] = index_D, rarity * count_D * (K1 + 1) / (count_D + norm_U[index_D])
    ranks = []
    for anchor, own in zip(anchors, own_P, strict=True):
        scores_U = np.zeros(len(words))
        for word in set(_WORD.findall(anchor.lower())) & weights.keys():
            index_D, weight_D = weights[word]
            scores_U[index_D] += weight_D
        ranks.append(_ranks(scores_U[None], np.array([own])))
    return np.concatenate(ranks)


def retrieval_scores(ranks: Sequence[int] | NDArray[np.int64]) -> dict[str, float]:
    """Recall at 1 and 10, and the mean reciprocal rank."""
    ranks_P = np.asarray(ranks)
    return {
        "recall_at_1": float((ranks_P <= 1).mean()),
        "recall_at_10": float((ranks_P <= 10).mean()),
        "mean_reciprocal_rank": float((1.0 / ranks_P).mean()),
    }


def _distinct(texts: Sequence[str]) -> tuple[list[int], NDArray[np.int64]]:
    """Where each distinct text stands first, and which of these each text is."""
    known: dict[str, int] = {}
    own_P = np.array([known.setdefault(text, len(known)) for text in texts])
    first = {text: place for place, text in reversed(list(enumerate(texts)))}
    return [first[text] for text in known], own_P


def _ranks(scores_CU: NDArray[Any], own_C: NDArray[np.int64]) -> NDArray[np.int64]:
    own_score_C = scores_CU[np.arange(len(own_C)), own_C]
    ranks_C: NDArray[np.int64] = (scores_CU >= own_score_C[:, None]).sum(1)
    return ranks_C
