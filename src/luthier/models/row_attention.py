"""Attention of rows side by side: what a row gives does not depend on those that are read with it.

The tiles of :mod:`luthier.models.attention` begin wherever rows happen to lie, and their sums are taken
in another order beside other rows. Here the keys of a row begin at its own first token, and rows are
computed together by their length, rounded up: each has the same bits alone and beside others, where the
products of the layers keep rows apart, too (:mod:`luthier.models.packing`). Nothing is shared between
rows, and there is no backward pass: it is for reading what many clients ask at once, on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from luthier.data.tree import TokenTree, round_up
from luthier.types import IntArray

LENGTH_STEP = 16
"""Lengths of rows are rounded up to a multiple of this, so that many are computed together."""


@dataclass(frozen=True)
class RowGroup:
    """``R`` rows of at most ``T`` tokens, ``M`` in all, behind ``P`` tokens of a prefix."""

    query_RT: Tensor
    """Flat index of each token; those that fill a row up are its first one again."""
    key_RK: Tensor
    """The same of the keys, ``K = P + T``, counted with the prefix in front."""
    mask_RQK: Tensor | None
    """What is added to the scores: 0 where a token sees a key and -inf elsewhere; ``Q`` is 1 where all
    tokens of a row see the same. ``None`` where each sees what came before it."""
    real_M: Tensor
    """Which of the ``R * T`` places are tokens of rows."""


@dataclass(frozen=True)
class RowAttention:
    """What a layer needs to attend over the rows of a forest of chains."""

    groups: tuple[RowGroup, ...]
    longest: int
    """Length of the longest row, for networks whose attention has a window."""
    before: int = 0
    """Keys and values of a layer's own that stand before those of each row."""

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """Query ``[1, Hq, N, D]``, key and value ``[1, Hk, N, D]`` to ``[1, N, Hq, D]``."""
        if self.before:
            key, value = module.key_value_prefix(key, value)
        if len(self.groups) == 1 and self.groups[0].query_RT.shape == (1, query.shape[2]):
            # A single row has its place already; nodes that fill the tree up are masked as keys.
            return _attend(query, key, value, self.groups[0].mask_RQK, scale).transpose(1, 2)
        # Nodes that only fill the tree up see nothing.
        out_NHD = query.new_zeros(query.shape[2], query.shape[1], value.shape[-1])
        for group in self.groups:
            attended = _attend(
                query[0][:, group.query_RT].transpose(0, 1),
                key[0][:, group.key_RK].transpose(0, 1),
                value[0][:, group.key_RK].transpose(0, 1),
                group.mask_RQK,
                scale,
            )
            nodes_M = group.query_RT.flatten()[group.real_M]
            out_NHD[nodes_M] = attended.transpose(1, 2).flatten(0, 1)[group.real_M]
        return out_NHD[None]


def _attend(
    query_b: Tensor, key_b: Tensor, value_b: Tensor, mask_RQK: Tensor | None, scale: float
) -> Tensor:
    """Queries ``[R, Hq, T, D]``, keys and values ``[R, Hk, K, D]`` to ``[R, Hq, T, D]``."""
    return scaled_dot_product_attention(
        query_b,
        key_b,
        value_b,
        attn_mask=None if mask_RQK is None else mask_RQK[:, None].to(query_b.dtype),
        is_causal=mask_RQK is None,
        scale=scale,
        enable_gqa=query_b.shape[1] != key_b.shape[1],
    )


def plan_rows(tree: TokenTree, both_ways: bool = False, before: int = 0) -> RowAttention:
    """Group the rows of ``tree``, a forest of chains, by their length.

    ``both_ways``, ``before``: as of :func:`luthier.models.attention.plan_attention`.
    """
    length_R = tree.depth_N[tree.leaf_R] + 1
    start_R = tree.leaf_R + 1 - length_R
    size_R = round_up(length_R, LENGTH_STEP)
    groups = tuple(
        _group(start_R[size_R == size], length_R[size_R == size], int(size), both_ways, before)
        for size in np.unique(size_R)
    )
    return RowAttention(groups, before + int(length_R.max()), before)


def _group(
    start_R: IntArray, length_R: IntArray, size: int, both_ways: bool, before: int
) -> RowGroup:
    place_T = np.arange(size)
    real_RT = place_T < length_R[:, None]
    query_RT = start_R[:, None] + np.where(real_RT, place_T, 0)
    prefix_RP = np.broadcast_to(np.arange(before), (len(start_R), before))
    key_RK = np.concatenate([prefix_RP, before + query_RT], 1)
    mask = None
    if both_ways or before:
        seen_RQK = np.concatenate([prefix_RP >= 0, real_RT], 1)[:, None]
        if not both_ways:
            earlier_TK = np.arange(before + size) <= before + place_T[:, None]
            seen_RQK = seen_RQK & earlier_TK
        mask = torch.zeros(seen_RQK.shape).masked_fill_(~torch.from_numpy(seen_RQK), float("-inf"))
    return RowGroup(
        torch.from_numpy(query_RT),
        torch.from_numpy(key_RK),
        mask,
        torch.from_numpy(np.flatnonzero(real_RT)),
    )
