"""A causal language model run over token trees.

:class:`Network` hides which class of transformers is inside: objectives ask it for hidden states
and for the output head, and never see padding, masks or a ``[B, T, V]`` tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from luthier.data.tree import TokenTree, padded
from luthier.models.attention import AttentionPlan, plan_attention

SIZE_STEP = 32
"""Nodes and loss positions of a micro-batch are rounded up to a multiple of this."""


@dataclass(frozen=True)
class TreeBatch:
    """One micro-batch on a device. ``N`` nodes, ``E`` edges with loss, ``S`` distinct parents."""

    tree: TokenTree
    ids_N: Tensor
    depth_N: Tensor
    plan: AttentionPlan
    source_S: Tensor
    """Flat index of each node whose next token carries loss, ascending; padded with index 0."""
    edge_source_E: Tensor
    """For each edge, the index of its parent in ``source_S``, ascending."""
    target_E: Tensor
    weight_E: Tensor

    @property
    def weight(self) -> float:
        """Sum of all edge weights."""
        return self.tree.weight

    @staticmethod
    def of(tree: TokenTree, device: torch.device, dtype: torch.dtype) -> TreeBatch:
        """Put ``tree`` on ``device`` and plan its attention for ``dtype``."""
        tree = padded(tree, SIZE_STEP)
        parent_E = tree.parent_N[tree.edge_child_E]
        # Children of one parent are not neighbours in depth-first order.
        order = np.argsort(parent_E, kind="stable")
        source_S, edge_source_E = np.unique(parent_E[order], return_inverse=True)
        source_S = np.pad(source_S, (0, -len(source_S) % SIZE_STEP))
        child_E = tree.edge_child_E[order]

        def put(array: np.ndarray[Any, Any]) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        return TreeBatch(
            tree=tree,
            ids_N=put(tree.ids_N),
            depth_N=put(tree.depth_N),
            plan=plan_attention(tree, device, dtype),
            source_S=put(source_S),
            edge_source_E=put(edge_source_E),
            target_E=put(tree.ids_N[child_E]),
            weight_E=put(tree.edge_weight_E[order]),
        )


class Network:
    """A causal language model of transformers on the flat layout."""

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        self.model: Any = model
        self.device = device
        self.dtype = dtype

    @cached_property
    def _backbone(self) -> Any:
        return self.model.base_model

    def hidden(self, batch: TreeBatch) -> Tensor:
        """Last hidden states ``[N, H]``, one for each node of the tree."""
        output = self._backbone(
            input_ids=batch.ids_N[None],
            position_ids=batch.depth_N[None],
            tree=batch.plan,
            use_cache=False,
        )
        hidden_NH: Tensor = output.last_hidden_state[0]
        return hidden_NH

    @property
    def head_VH(self) -> Tensor:
        """Weight of the output head, ``[V, H]``; possibly the input embedding itself."""
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight

    def close(self) -> None:
        """Let go of the weights, so that their memory can be used again."""
        self.model = None
        self.__dict__.pop("_backbone", None)

    def batch(self, tree: TokenTree) -> TreeBatch:
        """``tree`` on this network's device."""
        return TreeBatch.of(tree, self.device, self.dtype)
