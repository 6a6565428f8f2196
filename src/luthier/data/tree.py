"""The token tree: one micro-batch in which every distinct prefix is stored once.

Rows are sorted and merged into a trie of token ids, laid out depth-first in one flat sequence of
``N`` nodes. A node attends to its ancestors and itself, and its position is its depth. Because a
subtree is a contiguous range, "``a`` is an ancestor of ``q`` or ``q`` itself" is just
``a <= q < subtree_end_N[a]``: that one array is the whole attention mask.

Loss lives on *edges* ``parent -> child``. Rows that share an edge add their weights, so gradients
are those of the padded computation; only dropout differs, since shared nodes share their mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from luthier.types import Example, FloatArray, IntArray


@dataclass(frozen=True)
class TokenTree:
    """A forest of token ids in depth-first order. ``N`` nodes, ``E`` edges with loss, ``R`` rows."""

    ids_N: IntArray
    depth_N: IntArray
    """Position of each node: the number of its ancestors."""
    parent_N: IntArray
    """Flat index of the parent, -1 at a root."""
    subtree_end_N: IntArray
    """One past the last descendant."""
    edge_child_E: IntArray
    """Flat index of the node that is predicted, from its parent. Ascending."""
    edge_weight_E: FloatArray
    """Summed weight of all rows that train this edge; never 0."""
    row_R: IntArray
    """Data-set index of each row, in the order of the tree."""
    leaf_R: IntArray
    """Flat index of the last token of each row, in the same order."""

    def __len__(self) -> int:
        return len(self.ids_N)

    @cached_property
    def weight(self) -> float:
        """Sum of all edge weights: what the engine divides by."""
        return float(self.edge_weight_E.sum(dtype=np.float64))

    def path(self, node: int) -> IntArray:
        """Flat indices from the root down to ``node``, itself included."""
        path = np.empty(int(self.depth_N[node]) + 1, dtype=np.int64)
        for slot in range(len(path) - 1, -1, -1):
            path[slot] = node
            node = int(self.parent_N[node])
        return path


def build_tree(examples: Sequence[Example]) -> TokenTree:
    """Merge ``examples`` (at least one, none empty) into one token tree."""
    rows = sorted(examples, key=_sort_key)
    shared_R = _shared_prefixes(rows)
    kept = [example.ids_T[shared:] for example, shared in zip(rows, shared_R, strict=True)]
    ids_N = np.concatenate(kept).astype(np.int64)
    depth_N = np.concatenate(
        [np.arange(shared, len(row)) for row, shared in zip(rows, shared_R, strict=True)]
    )
    parent_N, node_of = _link(rows, shared_R, len(ids_N))
    weight_N = np.zeros(len(ids_N), dtype=np.float64)
    for example, nodes_T in zip(rows, node_of, strict=True):
        np.add.at(weight_N, nodes_T, example.weight_T)
    edge_child_E = np.flatnonzero(weight_N)
    if len(edge_child_E) and depth_N[edge_child_E].min() == 0:
        raise ValueError("the first token of a row has nothing before it and cannot carry loss")
    return TokenTree(
        ids_N=ids_N,
        depth_N=depth_N,
        parent_N=parent_N,
        subtree_end_N=_subtree_ends(depth_N),
        edge_child_E=edge_child_E,
        edge_weight_E=weight_N[edge_child_E].astype(np.float32),
        row_R=np.array([example.row for example in rows], dtype=np.int64),
        leaf_R=np.array([nodes_T[-1] for nodes_T in node_of], dtype=np.int64),
    )


def padded(tree: TokenTree, multiple: int) -> TokenTree:
    """``tree`` with lone roots appended until its size is a multiple of ``multiple``.

    Matrix kernels are made for one size each; rounding up keeps their number small.
    """
    size, extra = len(tree), -len(tree) % multiple
    zeros = np.zeros(extra, dtype=np.int64)
    return TokenTree(
        ids_N=np.concatenate([tree.ids_N, zeros]),
        depth_N=np.concatenate([tree.depth_N, zeros]),
        parent_N=np.concatenate([tree.parent_N, zeros - 1]),
        subtree_end_N=np.concatenate([tree.subtree_end_N, np.arange(size, size + extra) + 1]),
        edge_child_E=tree.edge_child_E,
        edge_weight_E=tree.edge_weight_E,
        row_R=tree.row_R,
        leaf_R=tree.leaf_R,
    )


def split_to_budget(examples: Sequence[Example], budget: int) -> list[list[Example]]:
    """Cut a batch into micro-batches of at most ``budget`` distinct tokens each.

    Rows are sorted first, so neighbours share their prefixes; a row longer than the budget gets a
    micro-batch of its own. The pieces are evened out, as the largest decides the peak memory.
    """
    rows = sorted(examples, key=_sort_key)
    shared_R = _shared_prefixes(rows)
    parts = _fill(rows, shared_R, budget)
    even = sum(map(len, rows)) - sum(shared_R)
    for step in range(8):
        smaller = even // len(parts) + (budget - even // len(parts)) * step // 8
        candidate = _fill(rows, shared_R, smaller)
        if len(candidate) == len(parts):
            return candidate
    return parts


def _fill(rows: Sequence[Example], shared_R: Sequence[int], budget: int) -> list[list[Example]]:
    parts: list[list[Example]] = []
    used = 0
    for row, shared in zip(rows, shared_R, strict=True):
        added = len(row) - shared
        if not parts or used + added > budget:
            parts.append([])
            used, added = 0, len(row)
        parts[-1].append(row)
        used += added
    return parts


def _sort_key(example: Example) -> tuple[bytes, int]:
    # Big-endian bytes sort as the numbers do, and far faster than a tuple of them.
    return example.ids_T.astype(">u4").tobytes(), example.row


def _shared_prefixes(rows: Sequence[Example]) -> list[int]:
    """Length of the prefix that each sorted row shares with the row before it."""
    shared = [0]
    for before, row in pairwise(rows):
        width = min(len(before), len(row))
        differs = np.flatnonzero(before.ids_T[:width] != row.ids_T[:width])
        shared.append(int(differs[0]) if len(differs) else width)
    return shared


def _link(
    rows: Sequence[Example], shared_R: Sequence[int], size: int
) -> tuple[IntArray, list[IntArray]]:
    """Parents of all nodes, and for each row the nodes of its tokens."""
    parent_N = np.full(size, -1, dtype=np.int64)
    node_of: list[IntArray] = []
    start = 0
    nodes_T = np.empty(0, dtype=np.int64)
    for row, shared in zip(rows, shared_R, strict=True):
        fresh = np.arange(start, start + len(row) - shared)
        nodes_T = np.concatenate([nodes_T[:shared], fresh])
        parent_N[fresh] = np.concatenate([[-1], nodes_T])[shared : len(row)]
        node_of.append(nodes_T)
        start += len(fresh)
    return parent_N, node_of


def _subtree_ends(depth_N: IntArray) -> IntArray:
    """A subtree ends at the next node that is not deeper than its root."""
    end_N = np.full(len(depth_N), len(depth_N), dtype=np.int64)
    # Inside a run of consecutive descents nothing ends; only the drops need the stack.
    open_nodes: list[int] = []
    depths = depth_N.tolist()
    for node, depth in enumerate(depths):
        while open_nodes and depths[open_nodes[-1]] >= depth:
            end_N[open_nodes.pop()] = node
        open_nodes.append(node)
    return end_N
