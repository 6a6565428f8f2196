"""Ranks of partners, counted by hand."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence

import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from luthier.evaluation import retrieval
from luthier.evaluation.retrieval import (
    CUT,
    BM25Index,
    ClassRetrieval,
    bm25_ranks,
    item_ranks,
    nearest,
    pair_ranks,
    partner_ranks,
    popularity_ranks,
    reciprocal_rank_fusion,
    retrieval_scores,
    search_scores,
)
from luthier.evaluation.significance import values

AXES = [[1.0, 0.0], [0.0, 1.0]]


def test_ranks_and_scores_by_hand() -> None:
    assert partner_ranks(AXES, AXES, ["a", "b"]).tolist() == [1, 1]
    assert partner_ranks(AXES, AXES[::-1], ["a", "b"]).tolist() == [2, 2]
    found = values(retrieval_scores([1, 2, 20, 1]))
    assert found == {
        "recall_at_1": 0.5,
        "recall_at_5": 0.75,
        "recall_at_10": 0.75,
        "mean_reciprocal_rank": pytest.approx((1 + 1 / 2 + 1 / 20 + 1) / 4),
        "ndcg_at_10": pytest.approx((1 + 1 / math.log2(3) + 0 + 1) / 4),
    }


def test_search_scores_of_several_relevant_documents() -> None:
    gains = [{0: 2.0, 1: 1.0, 5: 1.0}, {9: 1.0}]
    orders = [[3, 0, 1, 4], [*range(20, 30), 9]]
    ndcg, recall = search_scores(orders, gains).values()
    scores_N, gain_N = np.full(40, -50.0), np.zeros(40)
    scores_N[orders[0]] = -np.arange(4)
    gain_N[[0, 1, 5]] = 2, 1, 1
    # sklearn ranks all documents: the third relevant document comes after the cut.
    scores_N[6:20] = -10
    expected = ndcg_score([gain_N], [scores_N], k=CUT)
    assert ndcg.parts_R.tolist() == [pytest.approx(expected), 0.0]
    assert recall.parts_R.tolist() == [pytest.approx(2 / 3), 0.0]


def test_partner_ranks_with_equal_embeddings_and_texts() -> None:
    same = [[1.0, 0.0]] * 2
    assert partner_ranks(same, same, ["a", "b"]).tolist() == [2, 2]
    assert partner_ranks(same, same, ["a", "a"]).tolist() == [1, 1]
    # Three anchors, two partners: the first partner is in two pairs.
    anchors = [AXES[0], AXES[1], AXES[0]]
    assert partner_ranks(anchors, anchors, ["a", "b", "a"]).tolist() == [1, 1, 1]
    assert partner_ranks(anchors[::-1], anchors, ["a", "b", "a"]).tolist() == [1, 1, 1]


def test_nearest_items_match_brute_force_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    items, queries = random.standard_normal((50, 4)), random.standard_normal((7, 4))
    places, scores = nearest(queries, items, 5)
    whole = queries.astype(np.float32) @ items.astype(np.float32).T
    assert places.tolist() == np.argsort(-whole, axis=1, kind="stable")[:, :5].tolist()
    assert np.allclose(scores, -np.sort(-whole, axis=1)[:, :5])
    monkeypatch.setattr(retrieval, "MOST_SCORES", 100)
    assert nearest(queries, items, 5)[0].tolist() == places.tolist()
    assert nearest(queries, items, 99)[0].shape == (7, 50)
    assert nearest([[1.0]], [[0.5]] * 4, 2)[0].tolist() == [[0, 1]]  # the first of equal ones


def test_class_retrieval_matches_manual_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    angles = np.radians([0, 10, 25, 45, 85, 200])
    rows = np.stack([np.cos(angles), np.sin(angles)], 1)
    found = ClassRetrieval.of(rows, list("ababac"))  # c is alone
    assert found.rank_R.tolist() == [2, 3, 3, 2, 2]
    discount = [1 / math.log2(place + 1) for place in range(1, 6)]
    # The nearest to 0 degrees are 10 (b), 25 (a), 45 (b), 85 (a), 200 (c): places 2 and 4.
    assert found.ndcg_R[0] == pytest.approx((discount[1] + discount[3]) / sum(discount[:2]))
    # To 10 degrees: 0 (a), 25 (a), 45 (b): place 3 of the only match.
    assert found.ndcg_R[1] == pytest.approx(discount[2])
    scores = values(found.scores)
    assert scores["recall_at_1"] == 0 and scores["recall_at_5"] == 1
    assert scores["ndcg_at_10"] == pytest.approx(found.ndcg_R.mean())
    monkeypatch.setattr(retrieval, "MOST_SCORES", 6)
    assert ClassRetrieval.of(rows, list("ababac")).rank_R.tolist() == found.rank_R.tolist()
    same = ClassRetrieval.of(np.ones((4, 1)), list("aabb"))
    assert same.rank_R.tolist() == [3] * 4  # equal embeddings find nothing
    assert same.ndcg_R == pytest.approx([discount[2]] * 4)


def test_many_anchors_are_ranked_in_parts() -> None:
    count = 2500
    turned = [[math.cos(x), math.sin(x)] for x in (i / count for i in range(count))]
    assert set(partner_ranks(turned, turned, [str(i) for i in range(count)])) == {1}


def bm25(query: str, texts: Sequence[str]) -> list[float]:
    """Compute BM25 as in Lucene (k1 = 1.5, b = 0.75). Single-letter words are ignored."""
    documents = [[word for word in text.split() if len(word) > 1] for text in texts]
    average = sum(map(len, documents)) / len(documents)
    found = []
    for document in documents:
        score = 0.0
        for word in query.split():
            holding = sum(word in each for each in documents)
            idf = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
            count = document.count(word)
            score += idf * count / (count + 1.5 * (1 - 0.75 + 0.75 * len(document) / average))
        found.append(score)
    return found


def test_bm25_index_matches_formula() -> None:
    texts = [
        "the cat sat on the mat and the cat slept",
        "a dog sat by the river",
        "the river is long and the boat is small",
        "cat and dog",
    ]
    asked = ["the cat on the river", "dog river boat", "long long way", "nothing known"]
    index = BM25Index(texts)
    for query in asked:
        scores = bm25(query, texts)
        assert index.scores(query).tolist() == pytest.approx(scores, rel=1e-5)
        expected = [sum(score >= own for score in scores) for own in scores]
        assert bm25_ranks([query] * 4, texts).tolist() == expected
    assert bm25_ranks(["Boat!"], ["a BOAT, small"]).tolist() == [1]
    texts = ["h\u00f2a nh\u1ea1c", "ph\u1edf b\u00f2"]
    spellings = ["ho\u00e0 nh\u1ea1c", unicodedata.normalize("NFD", texts[1])]
    assert bm25_ranks(spellings, texts).tolist() == [1, 1]


def test_texts_without_words_share_none() -> None:
    assert bm25_ranks(["?", "boat"], ["a boat", "a cat"]).tolist() == [2, 2]
    assert bm25_ranks(["x", "我"], ["?", "y"]).tolist() == [2, 2]
    assert BM25Index(["?", "y", "我"]).nearest("a boat", 2) == [0, 1]


def test_reciprocal_rank_fusion_joins_orders() -> None:
    # 1/61 + 1/63 is more than 1/62 + 1/62, and items in a single order come last.
    assert reciprocal_rank_fusion([[0, 1, 2], [2, 1, 0]]) == [0, 2, 1]
    assert reciprocal_rank_fusion([[5, 1], [1]]) == [1, 5]


def test_popularity_and_cooccurrence_ranks() -> None:
    known = ["tea", "cake", "tea", "ale"]
    wanted = ["tea", "cake", "ale", "pie"]
    assert popularity_ranks(known, wanted, [[]] * 4).tolist() == [1, 3, 3, 4]
    seen = [["tea"], ["tea"], ["tea", "cake"], ["gin"]]  # tea again is not recommended
    assert popularity_ranks(known, wanted, seen).tolist() == [4, 2, 1, 4]
    histories = [["tea", "cake"], ["tea", "cake", "jam"], ["ale", "pie"]]
    asked, wanted = [["tea"], ["ale"], ["tea", "jam"], ["gin"]], ["cake", "pie", "cake", "jam"]
    # Tea occurs with cake (2 of 2 and 2) and jam (1 of 2 and 1); gin is unknown.
    assert item_ranks(histories, asked, wanted).tolist() == [1, 1, 1, 3]
    assert item_ranks(histories, [["tea"]] * 2, ["jam", "cake"]).tolist() == [2, 1]
    # Further items of the catalogue are candidates, too.
    assert item_ranks(histories, [["tea"]], ["jam"], ["cake", "tea"]).tolist() == [2]
    assert popularity_ranks(known, ["cake"], [["ale"]], ["ale", "tea"]).tolist() == [2]


def test_partner_ranks_count_extra_candidates() -> None:
    between = [[0.8, 0.6], [0.6, 0.8]]
    assert partner_ranks([[1.0, 0.0]], [[0.7, 0.7]], ["a"], between).tolist() == [2]


def test_pair_ranks_with_several_captions_per_image() -> None:
    # Images a, b; a has two captions, "shared" belongs to both.
    images = [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]
    texts = [[0.0, -1.0], [0.8, 0.6], [0.8, 0.6], [-1.0, 0.0]]
    keys, captions = ["a", "a", "b", "b"], ["far", "shared", "shared", "other"]
    assert pair_ranks(images, texts, keys, captions).tolist() == [1, 1]
    assert pair_ranks(texts, images, captions, keys).tolist() == [1, 1, 1]
    moved = [[0.6, 0.8], [0.6, 0.8], [0.0, 1.0], [0.0, 1.0]]
    apart = [[0.0, -1.0], [-1.0, 0.0], [-1.0, 0.0], [0.6, 0.8]]
    assert pair_ranks(moved, apart, keys, captions).tolist() == [2, 1]
    # In the order of the rows, whatever the keys are.
    assert pair_ranks(moved, apart, ["z", "z", "a", "a"], captions).tolist() == [2, 1]
    equal = [[1.0, 0.0]] * 4
    assert pair_ranks(equal, equal, keys, captions).tolist() == [2, 2]
