"""The token tree: a micro-batch with every distinct prefix stored once.

Rows are sorted and merged into a trie of token ids, laid out depth-first in one flat sequence of
``N`` nodes. A node attends to its ancestors and itself, and its position is its depth. Because a
subtree is a contiguous range, "``a`` is an ancestor of ``q`` or ``q`` itself" is ``a <= q <
subtree_end_N[a]``: a single array is the whole attention mask.

Loss is a property of *edges* ``parent -> child``. Rows that share an edge add their weights, so
gradients equal the gradients of the padded computation. Only dropout differs, because shared nodes
share a dropout mask.

Bidirectional networks cannot share prefixes. For these networks, the layout has one chain per row
(``share=False``): flat, without padding, with full attention inside each row.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from luthier.types import Example, FloatArray, IntArray

READING_BUDGET = 2048
"""Tokens per pass without gradients; training steps have less free memory for such a pass."""

Count = TypeVar("Count", int, IntArray)


def round_up(count: Count, step: int) -> Count:
    """Round ``count`` up to a multiple of ``step``."""
    return -(-count // step) * step


@dataclass(frozen=True)
class TokenTree:
    """A forest of token ids in depth-first order. ``N`` nodes, ``E`` edges with loss, ``R`` rows."""

    ids_N: IntArray
    depth_N: IntArray
    """Position of each node: the number of ancestors."""
    parent_N: IntArray
    """Flat index of the parent, -1 at a root."""
    subtree_end_N: IntArray
    """Flat index after the last descendant."""
    edge_child_E: IntArray
    """Flat index of each predicted node, ascending."""
    edge_weight_E: FloatArray
    """Summed weight of all rows with this edge; never 0."""
    row_R: IntArray
    """Data-set index of each row, in the order of the tree."""
    leaf_R: IntArray
    """Flat index of the last token of each row, in the same order."""
    node_M: IntArray
    """Flat index of every token of every row, in tree order."""
    examples: tuple[Example, ...] = ()
    """The rows themselves, in the order of the tree."""
    segment_N: IntArray | None = None
    """Segment of each token; ``None`` if all tokens are in segment 0."""
    source_before: tuple[int, ...] = ()
    """Ids before the encoder's input: a soft prompt. Not part of any row."""

    def __len__(self) -> int:
        return len(self.ids_N)

    @cached_property
    def weight(self) -> float:
        """Sum of all row weights, the engine's divisor."""
        return math.fsum(example.weight for example in self.examples)

    @cached_property
    def root_R(self) -> IntArray:
        """Flat index of the first token of each row."""
        lengths = np.array([len(example) for example in self.examples], dtype=np.int64)
        first: IntArray = self.node_M[np.cumsum(lengths) - lengths]
        return first

    @property
    def targets(self) -> list[NDArray[Any]]:
        """Targets of the rows, in tree order."""
        return [e.target for e in self.examples if e.target is not None]

    def place_of(self, node: int) -> tuple[int, int]:
        """Return the data-set index of the first row with ``node``, and the node's token index."""
        row = int(np.searchsorted(self.leaf_R, node))  # nodes are ordered by row
        return int(self.row_R[row]), int(self.depth_N[node])

    def path(self, node: int) -> IntArray:
        """Flat indices from the root down to ``node``, itself included."""
        path = np.empty(int(self.depth_N[node]) + 1, dtype=np.int64)
        for slot in range(len(path) - 1, -1, -1):
            path[slot] = node
            node = int(self.parent_N[node])
        return path


def build_tree(
    examples: Sequence[Example], share: bool = True, before: tuple[int, ...] = ()
) -> TokenTree:
    """Merge ``examples`` (not empty) into a token tree.

    Edges carry the weights of rows whose target is the next token; other rows have no edges with
    loss. ``before`` are ids in front of every row: a soft prompt.
    """
    sorted_examples = tuple(sorted(examples, key=_sort_key))
    rows = (
        [_with_prefix(example, before) for example in sorted_examples]
        if before
        else list(sorted_examples)
    )
    shared_R = _shared_prefixes(rows, share)
    new_ids = [example.ids_T[shared:] for example, shared in zip(rows, shared_R, strict=True)]
    ids_N = np.concatenate(new_ids).astype(np.int64)
    depth_N = np.concatenate(
        [np.arange(shared, len(row)) for row, shared in zip(rows, shared_R, strict=True)]
    )
    parent_N, node_of = _link(rows, shared_R, len(ids_N))
    weight_N = np.zeros(len(ids_N), dtype=np.float64)
    for example, nodes_T in zip(rows, node_of, strict=True):
        if example.target is None:
            np.add.at(weight_N, nodes_T, example.weight_T)
    edge_child_E = np.flatnonzero(weight_N)
    if len(edge_child_E) and depth_N[edge_child_E].min() == 0:
        raise ValueError("the first token of a row has no context and cannot carry loss")
    return TokenTree(
        ids_N=ids_N,
        depth_N=depth_N,
        parent_N=parent_N,
        subtree_end_N=_subtree_ends(depth_N),
        edge_child_E=edge_child_E,
        edge_weight_E=weight_N[edge_child_E].astype(np.float32),
        row_R=np.array([example.row for example in rows], dtype=np.int64),
        leaf_R=np.array([nodes_T[-1] for nodes_T in node_of], dtype=np.int64),
        node_M=np.concatenate([nodes_T[len(before) :] for nodes_T in node_of]),
        examples=sorted_examples,
        segment_N=None if share else _segments(rows),
    )


def _segments(rows: Sequence[Example]) -> IntArray | None:
    """Return the segments of the tokens of separate ``rows``; ``None`` without segments."""
    if all(row.segment_T is None for row in rows):
        return None
    return np.concatenate(
        [np.zeros(len(r), dtype=np.int64) if r.segment_T is None else r.segment_T for r in rows]
    )


def _with_prefix(example: Example, before: tuple[int, ...]) -> Example:
    """``example`` with the ids ``before`` in front, of no weight."""
    ids_T = np.concatenate([np.array(before, dtype=np.int64), example.ids_T])
    weight_T = np.concatenate([np.zeros(len(before), dtype=np.float32), example.weight_T])
    segment_T = example.segment_T
    if segment_T is not None:
        segment_T = np.concatenate([np.zeros(len(before), dtype=np.int64), segment_T])
    return replace(example, ids_T=ids_T, weight_T=weight_T, segment_T=segment_T)


def pad_tree(tree: TokenTree, multiple: int) -> TokenTree:
    """Append single-node trees until the size is a multiple of ``multiple``.

    Matrix kernels are compiled per size; rounding limits the number of sizes.
    """
    size, extra = len(tree), -len(tree) % multiple
    zeros = np.zeros(extra, dtype=np.int64)
    return replace(
        tree,
        ids_N=np.concatenate([tree.ids_N, zeros]),
        depth_N=np.concatenate([tree.depth_N, zeros]),
        parent_N=np.concatenate([tree.parent_N, zeros - 1]),
        subtree_end_N=np.concatenate([tree.subtree_end_N, np.arange(size, size + extra) + 1]),
        segment_N=None if tree.segment_N is None else np.concatenate([tree.segment_N, zeros]),
    )


def split_to_budget(
    examples: Sequence[Example],
    budget: int,
    share: bool = True,
    whole_rows: bool = False,
    processes: int = 1,
) -> list[list[Example]]:
    """Split a batch into micro-batches of at most ``budget`` distinct tokens each.

    With ``whole_rows``, a row counts as one token regardless of its text, for rows with images.
    With several ``processes``, the number of micro-batches is at most the next multiple of
    ``processes``, and sizes are as even as possible.

    Rows are sorted first, so neighbours share prefixes. A row longer than the budget gets its own
    micro-batch. A group (``Example.group``) is never split. Micro-batches have similar sizes,
    because the largest determines the peak memory.
    """
    if not examples:
        return []
    rows = _by_group(sorted(examples, key=_sort_key))
    tokens_R = [1 if whole_rows else row.tokens for row in rows]
    shared_R = _shared_prefixes(rows, share and not whole_rows)
    parts = _fill(rows, tokens_R, shared_R, budget)
    if processes > 1:
        target_parts = round_up(len(parts), processes)
        # The smallest budget for this number of parts gives the most even sizes.
        size = bisect_left(
            range(budget),
            True,
            key=lambda s: len(_fill(rows, tokens_R, shared_R, s)) <= target_parts,
        )
        return _fill(rows, tokens_R, shared_R, size)
    # Rows longer than the budget may raise the mean above the budget.
    even = min(budget, (sum(tokens_R) - sum(shared_R)) // len(parts))
    for step in range(8):
        smaller = even + (budget - even) * step // 8
        candidate = _fill(rows, tokens_R, shared_R, smaller)
        if len(candidate) == len(parts):
            return candidate
    return parts


def _fill(
    rows: Sequence[Example], tokens_R: Sequence[int], shared_R: Sequence[int], budget: int
) -> list[list[Example]]:
    parts: list[list[Example]] = []
    used = 0
    for unit in _units(rows):
        # The first row of a unit shares a prefix with the row before only inside a micro-batch.
        rest = sum(tokens_R[at] - shared_R[at] for at in unit[1:])
        added = tokens_R[unit[0]] - shared_R[unit[0]] + rest
        if not parts or used + added > budget:
            parts.append([])
            used, added = 0, tokens_R[unit[0]] + rest
        parts[-1] += [rows[at] for at in unit]
        used += added
    return parts


def _by_group(rows: list[Example]) -> list[Example]:
    """Move the rows of each group to the position of the group's first row."""
    if all(row.group is None for row in rows):
        return rows
    first: dict[int, int] = {}
    for place, row in enumerate(rows):
        if row.group is not None:
            first.setdefault(row.group, place)
    places = [place if r.group is None else first[r.group] for place, r in enumerate(rows)]
    return [rows[at] for at in sorted(range(len(rows)), key=places.__getitem__)]


def _units(rows: Sequence[Example]) -> list[list[int]]:
    """Return indices of inseparable rows; a row without a group is alone."""
    units: list[list[int]] = []
    for place, row in enumerate(rows):
        if row.group is not None and place and rows[place - 1].group == row.group:
            units[-1].append(place)
        else:
            units.append([place])
    return units


def _sort_key(example: Example) -> tuple[bytes, int]:
    # Big-endian bytes sort like the ids, and much faster than a tuple of ids.
    source = b"" if example.source_T is None else example.source_T.astype(">u4").tobytes()
    return source + example.ids_T.astype(">u4").tobytes(), example.row


def _shared_prefixes(rows: Sequence[Example], share: bool) -> list[int]:
    """Return the length of each row's common prefix with the previous row; 0 without sharing."""
    if not share:
        return [0] * len(rows)
    shared = [0]
    for before, row in pairwise(rows):
        width = min(len(before), len(row))
        differs = np.flatnonzero(before.ids_T[:width] != row.ids_T[:width])
        shared.append(int(differs[0]) if len(differs) else width)
    return shared


def _link(
    rows: Sequence[Example], shared_R: Sequence[int], size: int
) -> tuple[IntArray, list[IntArray]]:
    """Return the parents of all nodes, and the nodes of each row's tokens."""
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
    end_N = np.full(len(depth_N), len(depth_N), dtype=np.int64)
    # A subtree ends at the next node that is not deeper than its root.
    open_nodes: list[int] = []
    depths = depth_N.tolist()
    for node, depth in enumerate(depths):
        while open_nodes and depths[open_nodes[-1]] >= depth:
            end_N[open_nodes.pop()] = node
        open_nodes.append(node)
    return end_N
