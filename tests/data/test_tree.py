"""Tests of the token tree against a slow trie of tuples."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from luthier.data.tree import TokenTree, build_tree, pad_tree, split_to_budget
from luthier.types import Example

PROPERTY = settings(max_examples=60, deadline=None, database=None)
Ids = tuple[int, ...]
IdsAndWeights = list[tuple[Ids, tuple[float, ...]]]

# 255, 256 and 65536 differ in the order of their bytes; few tokens make prefixes collide.
token = st.sampled_from([0, 1, 255, 256, 65536])
token_list = st.lists(token, min_size=1, max_size=7).map(tuple)


@st.composite
def weighted_row(draw: st.DrawFn) -> tuple[Ids, tuple[float, ...]]:
    ids = draw(token_list)
    weights = draw(
        st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=len(ids) - 1, max_size=len(ids) - 1)
    )
    return ids, (0.0, *weights)


rows_of_data = st.lists(weighted_row(), min_size=1, max_size=9)

SAME = [((1, 0, 1), (0.0, 0.0, 1.0))] * 3
PREFIX = [((1, 0, 1, 0), (0.0, 1.0, 1.0, 1.0)), ((1, 0), (0.0, 0.5)), ((1,), (0.0,))]
ONE_TOKEN_REPLIES = [((7, 8, reply), (0.0, 0.0, 1.0)) for reply in (3, 1, 2, 1)]


def examples_of(rows: IdsAndWeights) -> list[Example]:
    return [
        Example(np.array(ids, dtype=np.int64), np.array(weights, dtype=np.float32), index)
        for index, (ids, weights) in enumerate(rows)
    ]


def prefixes_of(tree: TokenTree) -> list[Ids]:
    """The token ids from the root down to each node, found by depth alone."""
    prefixes: list[Ids] = []
    open_path: list[int] = []
    for token_id, depth in zip(tree.ids_N.tolist(), tree.depth_N.tolist(), strict=True):
        open_path[depth:] = [token_id]
        assert len(open_path) == depth + 1
        prefixes.append(tuple(open_path))
    return prefixes


@PROPERTY
@given(rows_of_data)
@example(SAME)
@example(PREFIX)
@example(ONE_TOKEN_REPLIES)
def test_row_equals_tree_path_to_leaf(rows: IdsAndWeights) -> None:
    tree = build_tree(examples_of(rows))
    assert sorted(tree.row_R.tolist()) == list(range(len(rows)))
    for row, leaf in zip(tree.row_R, tree.leaf_R, strict=True):
        path = tree.path(int(leaf))
        assert tuple(tree.ids_N[path].tolist()) == rows[row][0]
        assert path[-1] == leaf and sorted(set(path.tolist())) == path.tolist()
        # The tree stores a shared node for one of the rows, at the same position.
        for node in path.tolist():
            first, at = tree.place_of(node)
            assert rows[first][0][: at + 1] == rows[row][0][: at + 1]
            assert len(path) > at == path.tolist().index(node)


@PROPERTY
@given(rows_of_data)
@example(SAME)
@example(PREFIX)
@example(ONE_TOKEN_REPLIES)
def test_nodes_are_the_distinct_prefixes(rows: IdsAndWeights) -> None:
    tree = build_tree(examples_of(rows))
    prefixes = prefixes_of(tree)
    expected = {ids[:size] for ids, _ in rows for size in range(1, len(ids) + 1)}
    assert len(prefixes) == len(expected) and set(prefixes) == expected
    node_of = {prefix: node for node, prefix in enumerate(prefixes)}
    for node, prefix in enumerate(prefixes):
        assert tree.parent_N[node] == node_of.get(prefix[:-1], -1)
        below = [n for n, p in enumerate(prefixes) if p[: len(prefix)] == prefix]
        assert below == list(range(node, tree.subtree_end_N[node]))


@PROPERTY
@given(rows_of_data)
def test_subtree_ends_encode_ancestor_relation(rows: IdsAndWeights) -> None:
    tree = build_tree(examples_of(rows))
    prefixes = prefixes_of(tree)
    for query, prefix in enumerate(prefixes):
        seen = [a for a in range(len(tree)) if a <= query < tree.subtree_end_N[a]]
        assert [prefixes[a] for a in seen] == [prefix[:n] for n in range(1, len(prefix) + 1)]


@PROPERTY
@given(rows_of_data)
@example(SAME)
@example(PREFIX)
@example(ONE_TOKEN_REPLIES)
def test_edge_weights_are_sums_over_rows(rows: IdsAndWeights) -> None:
    tree = build_tree(examples_of(rows))
    expected: Counter[Ids] = Counter()
    for ids, weights in rows:
        for size, weight in enumerate(weights, start=1):
            expected[ids[:size]] += weight  # type: ignore[assignment]
    prefixes = prefixes_of(tree)
    found = {
        prefixes[child]: weight
        for child, weight in zip(tree.edge_child_E, tree.edge_weight_E.tolist(), strict=True)
    }
    assert found == {prefix: weight for prefix, weight in expected.items() if weight}
    assert tree.weight == sum(sum(weights) for _, weights in rows)
    assert tree.edge_child_E.tolist() == sorted(tree.edge_child_E.tolist())


def test_equal_rows_are_stored_once_with_summed_weight() -> None:
    tree = build_tree(examples_of(SAME))
    assert tree.ids_N.tolist() == [1, 0, 1]
    assert tree.leaf_R.tolist() == [2, 2, 2]
    assert tree.edge_child_E.tolist() == [2] and tree.edge_weight_E.tolist() == [3.0]


def test_single_token_replies_are_siblings() -> None:
    tree = build_tree(examples_of(ONE_TOKEN_REPLIES))
    assert tree.ids_N.tolist() == [7, 8, 1, 2, 3]
    assert tree.depth_N.tolist() == [0, 1, 2, 2, 2]
    assert tree.parent_N.tolist() == [-1, 0, 1, 1, 1]
    assert tree.subtree_end_N.tolist() == [5, 5, 3, 4, 5]
    assert tree.edge_weight_E.tolist() == [2.0, 1.0, 1.0]


def test_a_first_token_cannot_carry_loss() -> None:
    with pytest.raises(ValueError):
        build_tree(examples_of([((1, 2), (1.0, 1.0))]))


@PROPERTY
@given(rows_of_data, st.integers(1, 16))
def test_tree_padding_adds_only_single_roots(rows: IdsAndWeights, multiple: int) -> None:
    tree = build_tree(examples_of(rows))
    wide = pad_tree(tree, multiple)
    size = len(tree)
    assert len(wide) % multiple == 0 and size <= len(wide) < size + multiple
    for name in ("ids_N", "depth_N", "parent_N", "subtree_end_N"):
        assert getattr(wide, name)[:size].tolist() == getattr(tree, name).tolist()
    for name in ("edge_child_E", "edge_weight_E", "row_R", "leaf_R"):
        assert getattr(wide, name).tolist() == getattr(tree, name).tolist()
    assert wide.weight == tree.weight
    for node in range(size, len(wide)):
        assert (wide.depth_N[node], wide.parent_N[node]) == (0, -1)
        assert wide.subtree_end_N[node] == node + 1


@PROPERTY
@given(rows_of_data, st.integers(1, 25))
@example([((0, 0), (0.0,) * 2), ((9,) * 5, (0.0,) * 5), ((1,), (0.0,)), ((1, 0), (0.0,) * 2)], 2)
def test_micro_batches_hold_each_row_once_within_the_budget(
    rows: IdsAndWeights, budget: int
) -> None:
    parts = split_to_budget(examples_of(rows), budget)
    assert sorted(e.row for part in parts for e in part) == list(range(len(rows)))
    for part in parts:
        distinct = {rows[e.row][0][:size] for e in part for size in range(1, len(e) + 1)}
        assert part and (len(distinct) <= budget or len(part) == 1)
        assert len(distinct) == len(build_tree(part))


def test_micro_batches_are_of_even_size() -> None:
    rows = [((start, *range(9)), (0.0,) * 10) for start in range(10, 14)]
    parts = split_to_budget(examples_of(rows), 30)
    assert [len(part) for part in parts] == [2, 2]


def test_rows_with_equal_prompt_share_a_micro_batch() -> None:
    prompts = [tuple(range(20)), tuple(range(100, 120))]
    rows = [((*prompts[i % 2], 200 + i), (0.0,) * 20 + (1.0,)) for i in range(8)]
    parts = split_to_budget(examples_of(rows), 24)
    assert sorted(sorted(e.row for e in part) for part in parts) == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_split_to_budget_counts_whole_rows() -> None:
    examples = examples_of([((n,) * (n + 3), (0.0,) * (n + 3)) for n in range(6)])
    parts = split_to_budget(examples, 2, whole_rows=True)
    assert [len(part) for part in parts] == [2, 2, 2]
    assert max(len(part) for part in split_to_budget(examples, 12, share=False)) < 3


def test_a_group_is_never_parted() -> None:
    rng = np.random.default_rng(0)
    rows = []
    for number in range(12):
        ids_T = rng.integers(3, 9, size=int(rng.integers(2, 9)))
        weight_T = np.ones(len(ids_T), dtype=np.float32)
        rows.append(Example(ids_T, weight_T, number, group=number // 2 if number < 10 else None))
    for budget in (1, 9, 16, 40, 1000):
        parts = split_to_budget(rows, budget)
        assert sorted(row.row for part in parts for row in part) == list(range(12))
        homes = [{row.group for row in part} - {None} for part in parts]
        assert sum(map(len, homes)) == 5
        for part in parts:
            alone = len({row.group for row in part}) == 1 and part[0].group is not None
            assert alone or len(part) == 1 or distinct_tokens(part) <= budget


def distinct_tokens(rows: list[Example]) -> int:
    return len({tuple(row.ids_T[: size + 1]) for row in rows for size in range(len(row))})
