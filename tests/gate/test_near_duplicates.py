"""Recall and precision against exact Jaccard similarity on sets of strings; the same from disk."""

from __future__ import annotations

import random
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.gate.columns import Column, ColumnStore
from luthier.gate.near_duplicates import (
    LEAST_SIMILARITY,
    LENGTH,
    NEIGHBOURS,
    SKETCH_SIZE,
    Groups,
    NearDuplicates,
    common_shingles,
    first_rows,
    normalize,
    pad,
    rows_by_value,
    similarity,
    sketch,
)

PROPERTY = settings(max_examples=60, deadline=None)
TEXT = st.text(st.sampled_from("abc 的ไệ1"), max_size=40)


def grams(text: str) -> set[str]:
    return {text[i : i + LENGTH] for i in range(max(1, len(text) - LENGTH + 1))}


def jaccard(one: str, other: str) -> float:
    return len(grams(one) & grams(other)) / len(grams(one) | grams(other))


def measured(texts: list[str]) -> np.ndarray:
    found = sketch(texts)
    filled = pad(found.hashes_M, found.counts_N)
    pairs = np.array(list(combinations(range(len(texts)), 2)))
    return similarity(filled[pairs[:, 0]], filled[pairs[:, 1]], found.whole_N[pairs])


@PROPERTY
@given(st.lists(TEXT, min_size=2, max_size=6))
def test_of_small_sets_the_similarity_is_exact(texts: list[str]) -> None:
    texts = [normalize(text) for text in texts]
    expected = [jaccard(one, other) for one, other in combinations(texts, 2)]
    assert measured(texts).tolist() == pytest.approx(expected, abs=1e-12)


def edited(rng: random.Random, words: list[str], count: int) -> str:
    words = list(words)
    for _ in range(count):
        words[rng.randrange(len(words))] = str(rng.randrange(3000))
    return " ".join(words)


def test_of_large_sets_the_similarity_is_estimated_without_bias() -> None:
    rng = random.Random(0)
    errors = []
    for _ in range(60):
        words = [f"w{rng.randrange(10**6)}" for _ in range(400)]
        pair = [normalize(" ".join(words)), normalize(edited(rng, words, 25))]
        errors.append(measured(pair)[0] - jaccard(*pair))
    assert len(grams(pair[0])) > 4 * SKETCH_SIZE
    assert abs(np.mean(errors)) < 0.01 and np.std(errors) < 0.035


def test_long_text_with_few_shingles_is_sketched_whole() -> None:
    found = sketch(["ab" * 5000, "x" * 9000, "plain"])
    assert found.counts_N.tolist() == [2, 1, 1] and found.whole_N.all()


def test_short_texts_are_similar_only_if_equal() -> None:
    assert measured(["yes", "no", "yes", "yes!", ""]).tolist() == [0, 1, 0, 0, 0, 0, 0, 0, 0, 0]


@PROPERTY
@given(st.lists(TEXT, min_size=1, max_size=8), st.integers(0, 8))
def test_sketch_is_independent_of_batch(texts: list[str], at: int) -> None:
    whole, parts = sketch(texts), [sketch(part) for part in (texts[:at], texts[at:]) if part]
    for name in ("bands_NB", "hashes_M", "counts_N", "whole_N"):
        joined = np.concatenate([getattr(part, name) for part in parts])
        assert np.array_equal(getattr(whole, name), joined)


def test_normalize_unifies_case_width_and_white_space() -> None:
    assert normalize("Ｈｅｌｌｏ \u2003 WORLD\n") == "hello world"
    assert normalize("Việt") == normalize("Vie\u0323\u0302t")


def texts_with_copies(rng: random.Random, count: int) -> list[str]:
    base = [
        [f"{rng.randrange(3000)}" for _ in range(rng.randint(4, 40))] for _ in range(count // 4)
    ]
    return [normalize(edited(rng, rng.choice(base), rng.randint(0, 3))) for _ in range(count)]


def grouped(texts: list[str], limit: int = 1 << 30, batch: int = 100) -> Groups:
    near, groups = NearDuplicates(limit), Groups(len(texts))
    for start in range(0, len(texts), batch):
        near.add(sketch(texts[start : start + batch]))
    known = {text: number for number, text in enumerate(sorted(set(texts)))}
    keys = np.array([known[text] for text in texts], np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    near.find(keys, lambda a, b: ~groups.together(a, b), groups.join)
    return groups


def test_grouping_has_high_recall_and_precision() -> None:
    texts = sorted(set(texts_with_copies(random.Random(1), 600)))
    roots = grouped(texts).roots_N
    sets = list(map(grams, texts))
    alike = [
        (i, j)
        for (i, one), (j, other) in combinations(enumerate(sets), 2)
        if len(one & other) >= LEAST_SIMILARITY * len(one | other)
    ]
    assert len(alike) > 150
    assert np.mean([roots[i] == roots[j] for i, j in alike]) > 0.98
    partners = {i for pair in alike for i in pair}
    wrong = [row for row, root in enumerate(roots) if root != row and row not in partners]
    assert len(wrong) <= 0.01 * len(texts)


@pytest.mark.parametrize(("limit", "batch"), [(1, 100), (30_000, 7), (1 << 30, 1000)])
def test_memory_batches_and_order_change_nothing(limit: int, batch: int) -> None:
    texts = sorted(set(texts_with_copies(random.Random(2), 600)))
    expected = grouped(texts).roots_N
    assert np.array_equal(grouped(texts, limit, batch).roots_N, expected)
    order = np.random.default_rng(0).permutation(len(texts))
    shuffled = grouped([texts[i] for i in order], limit, batch)
    as_sets = {frozenset(order[group].tolist()) for group in shuffled.members()}
    assert as_sets == {frozenset(group.tolist()) for group in grouped(texts).members()}


def test_crowded_bucket_is_grouped_in_linear_time() -> None:
    words = " ".join(f"word{i}" for i in range(40))
    texts = [normalize(f"{words} {i}") for i in range(5000)]
    near, groups, asked = NearDuplicates(), Groups(len(texts)), [0]
    near.add(sketch(texts))

    def wanted(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        asked[0] += len(one)
        return ~groups.together(one, other)

    near.find(np.arange(len(texts), dtype=np.uint64), wanted, groups.join)
    assert (groups.roots_N == 0).all()
    assert asked[0] <= 14 * (NEIGHBOURS + 1) * len(texts)


def test_common_shingles_are_left_out_of_sketches() -> None:
    frame = "Tell the intent of the customer's message, one of: " + ", ".join("abcdefghij" * 3)
    rng = random.Random(0)
    inside = [" ".join(f"{rng.random():.4f}" for _ in range(4)) for _ in range(50)]
    texts = [normalize(f"{frame} {each} Answer:") for each in inside]
    assert measured(texts[:5]).min() > 0.5
    common = common_shingles(texts)
    found = sketch(texts, common)
    filled = pad(found.hashes_M, found.counts_N)
    assert similarity(filled[:-1], filled[1:], np.ones((49, 2), bool)).max() < 0.4
    assert not len(common_shingles(inside))
    bare = sketch([normalize(frame)], common)
    assert bare.counts_N[0] > 50  # a text of common shingles only keeps them


@PROPERTY
@given(st.integers(1, 30), st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=40))
def test_groups_are_connected_components(rows: int, pairs: list[tuple[int, int]]) -> None:
    pairs = [(a, b) for a, b in pairs if a < rows and b < rows]
    groups = Groups(rows)
    groups.join(np.array([a for a, _ in pairs], int), np.array([b for _, b in pairs], int))
    expected = list(range(rows))  # the first reachable row, by relaxation
    for _ in range(rows):
        for a, b in pairs:
            expected[a] = expected[b] = min(expected[a], expected[b])
    assert groups.roots_N.tolist() == expected


@PROPERTY
@given(st.lists(st.integers(0, 5), max_size=20))
def test_runs_and_firsts_of_keys(keys: list[int]) -> None:
    expected = [[i for i, k in enumerate(keys) if k == key] for key in dict.fromkeys(keys)]
    assert [run.tolist() for run in rows_by_value(np.array(keys, int))] == [
        e for e in expected if len(e) > 1
    ]
    assert first_rows(np.array(keys, int)).tolist() == [keys.index(key) for key in keys]


@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_columns_from_memory_and_from_disk(limit: int) -> None:
    table = ColumnStore(limit)
    for start in range(0, 100, 10):
        table.append("a", np.arange(start, start + 10, dtype=np.uint32))
        table.append("b", np.full(1, start, np.int64))
    assert table.read("a").tolist() == list(range(100)) == table.read("a").tolist()
    assert table.read("b").tolist() == list(range(0, 100, 10))
    found = table["a"].gather(np.array([90, 3, 50]), np.array([2, 0, 3]))
    assert found.tolist() == [90, 91, 50, 51, 52]
    assert Column(np.int8).read().tolist() == []
