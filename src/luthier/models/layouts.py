"""How the nodes of a token tree are laid out for a network: flat, padded, or for an encoder-decoder.

The flat layout is the fast one and the default: one sequence of nodes, the tree in the attention. It
needs a network whose attention can be replaced. Others (relative positions inside the attention,
recurrence, an encoder beside the decoder) get the rows of the tree as the rectangle they were written
for, and their states are put back in the order of the nodes. Objectives and heads cannot tell.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from luthier.models import heads
from luthier.models.attention import NAME, Attends, AttentionPlan, plan_attention, register

if TYPE_CHECKING:
    from luthier.data.tree import TokenTree
    from luthier.models.network import TreeBatch
    from luthier.types import IntArray


class Layout(Protocol):
    """Brings the nodes of a tree through a network."""

    @property
    def flat(self) -> bool:
        """Whether nodes run as one sequence: layers can be computed ahead, prefixes be shared."""
        ...

    def plan(
        self, tree: TokenTree, device: torch.device, dtype: torch.dtype, before: int = 0
    ) -> Any:
        """What :meth:`run` needs of ``tree``, made once for each micro-batch.

        ``before`` is the length of a prefix of keys and values, which only the flat layout can have.
        """

    def run(self, backbone: Any, batch: TreeBatch) -> Tensor:
        """Last hidden states ``[N, H]`` of the nodes of ``batch``."""


def layout_of(model: Any, both_ways: bool) -> Layout:
    """The layout ``model`` can take; its attention is replaced where it is the flat one."""
    if heads.decoder_of(model) is not None:
        return EncoderDecoder(model)
    if not model._supports_attention_backend:
        return Padded(model)
    register()
    model.set_attn_implementation(NAME)
    return Flat(heads.first_position(model), both_ways)


@dataclass(frozen=True)
class Flat:
    """All nodes in one sequence; the attention knows which sees which."""

    first_position: int
    both_ways: bool
    flat: ClassVar[bool] = True

    def plan(
        self, tree: TokenTree, device: torch.device, dtype: torch.dtype, before: int = 0
    ) -> AttentionPlan:
        """The attention over ``tree``."""
        return plan_attention(tree, device, dtype, self.both_ways, before)

    def run(self, backbone: Any, batch: TreeBatch) -> Tensor:
        """One forward pass over the flat sequence."""
        return self.run_with(backbone, batch, batch.plan)

    def run_with(self, backbone: Any, batch: TreeBatch, attention: Attends) -> Tensor:
        """The same with another ``attention`` in the place of the batch's plan."""
        output = backbone(
            input_ids=batch.ids_N[None],
            position_ids=batch.depth_N[None] + self.first_position + batch.plan.before,
            tree=attention,
            use_cache=False,
        )
        hidden_NH: Tensor = output.last_hidden_state[0]
        return hidden_NH


@dataclass(frozen=True)
class Rectangle:
    """Where the nodes of a forest of chains lie in ``R`` padded rows of ``T`` tokens."""

    slot_M: Tensor
    """Index of each node, but for those that only fill the tree up, in the flattened rectangle."""
    mask_RT: Tensor
    """1 where there is a token."""
    source_RS: Tensor
    """What the encoder reads; empty without one."""
    source_mask_RS: Tensor

    def rows(self, ids_N: Tensor, fill: int) -> Tensor:
        """``ids_N`` as rows ``[R, T]``."""
        ids_RT = torch.full_like(self.mask_RT, fill)
        ids_RT.view(-1)[self.slot_M] = ids_N[: len(self.slot_M)]
        return ids_RT

    def nodes(self, states_RTH: Tensor, count: int) -> Tensor:
        """``states_RTH`` in the order of ``count`` nodes, ``[N, H]``; 0 for those that fill up."""
        real_MH = states_RTH.flatten(0, 1)[self.slot_M]
        return torch.nn.functional.pad(real_MH, (0, 0, 0, count - len(real_MH)))


class Padded:
    """Each row of the tree as a row of the rectangle, filled up at its end."""

    flat: ClassVar[bool] = False

    def __init__(self, model: Any) -> None:
        self.fill = heads.filling_id(model)

    def plan(
        self, tree: TokenTree, device: torch.device, dtype: torch.dtype, before: int = 0
    ) -> Rectangle:
        """Where the nodes of ``tree`` (chains only) go."""
        mask_RT, slot_M = _rectangle(tree)
        none = torch.empty(len(mask_RT), 0, dtype=torch.int64, device=device)
        put = [torch.from_numpy(array).to(device) for array in (slot_M, mask_RT)]
        return Rectangle(put[0], put[1], none, none)

    def run(self, backbone: Any, batch: TreeBatch) -> Tensor:
        """One forward pass over the rectangle."""
        plan: Rectangle = batch.plan
        ids_RT = plan.rows(batch.ids_N, self.fill)
        output = backbone(input_ids=ids_RT, attention_mask=plan.mask_RT)
        return plan.nodes(output.last_hidden_state, len(batch.ids_N))


class EncoderDecoder(Padded):
    """The tree holds what the decoder reads; rows carry what the encoder reads.

    A row without a source is read as a whole: by the encoder as it is, and by the decoder one token
    late, as transformers' classifiers on such networks do.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.start = heads.decoder_start(model)

    def plan(
        self, tree: TokenTree, device: torch.device, dtype: torch.dtype, before: int = 0
    ) -> Rectangle:
        """Where the nodes go, and what the encoder reads."""
        sides = super().plan(tree, device, dtype)
        prompt = np.array(tree.source_before, dtype=np.int64)
        sources = [
            np.concatenate([prompt, e.ids_T if e.source_T is None else e.source_T])
            for e in tree.examples
        ]
        longest = max(map(len, sources))
        source_RS = np.full((len(sides.mask_RT), longest), self.fill, dtype=np.int64)
        mask_RS = np.zeros_like(source_RS)
        for row, source in enumerate(sources):
            source_RS[row, : len(source)] = source
            mask_RS[row, : len(source)] = 1
        read = torch.from_numpy(source_RS).to(device)
        return Rectangle(sides.slot_M, sides.mask_RT, read, torch.from_numpy(mask_RS).to(device))

    def run(self, backbone: Any, batch: TreeBatch) -> Tensor:
        """Encode the sources, then decode behind them."""
        plan: Rectangle = batch.plan
        encoded = backbone.get_encoder()(
            input_ids=plan.source_RS, attention_mask=plan.source_mask_RS
        )
        ids_RT = plan.rows(batch.ids_N, self.fill)
        if batch.tree.examples[0].source_T is None:
            ids_RT = torch.nn.functional.pad(ids_RT[:, :-1], (1, 0), value=self.start)
        decoded = backbone.get_decoder()(
            input_ids=ids_RT,
            attention_mask=plan.mask_RT,
            encoder_hidden_states=encoded.last_hidden_state,
            encoder_attention_mask=plan.source_mask_RS,
            use_cache=False,
        )
        return plan.nodes(decoded.last_hidden_state, len(batch.ids_N))


def _rectangle(tree: TokenTree) -> tuple[IntArray, IntArray]:
    """Mask ``[R, T]`` of the rows of ``tree``, and the flattened index of each of their nodes."""
    lengths_R = tree.depth_N[tree.leaf_R] + 1
    count = int(lengths_R.sum())
    row_M = np.repeat(np.arange(len(lengths_R)), lengths_R)
    slot_M = row_M * int(lengths_R.max()) + tree.depth_N[:count]
    mask_RT = np.zeros((len(lengths_R), int(lengths_R.max())), dtype=np.int64)
    mask_RT.reshape(-1)[slot_M] = 1
    return mask_RT, slot_M
