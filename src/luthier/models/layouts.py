"""How the nodes of a token tree are laid out for a network: flat, padded, for an encoder-decoder, or
as images, which may have a decoder behind them or an encoder of texts beside them.

The flat layout is the fast one and the default: one sequence of nodes, the tree in the attention. It
needs a network whose attention can be replaced. Others (relative positions inside the attention,
recurrence, an encoder beside the decoder) get the rows of the tree as the rectangle they were written
for, and their states are put back in the order of the nodes. Objectives and heads cannot tell.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from luthier.models import heads
from luthier.models.attention import (
    NAME,
    Attends,
    AttentionPlan,
    plan_attention,
    register,
)
from luthier.models.frozen_layer_cache import new_activations
from luthier.models.modalities import (
    is_dual_encoder,
    media_config,
    reads_sound,
    run_media,
    text_config,
)

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from luthier.data.inputs import MediaInput
    from luthier.data.tree import TokenTree
    from luthier.models.network import Network, TreeBatch
    from luthier.types import Example, IntArray


SIZE_STEP = 32
"""Nodes and loss positions of a micro-batch are rounded up to a multiple of this."""


class Layout:
    """Brings the nodes of a tree through a network."""

    flat: ClassVar[bool] = False
    """Whether nodes run as one sequence: layers can be computed ahead, prefixes be shared."""
    reads_media: ClassVar[bool] = False
    """Whether rows are images or sounds, or have one beside them."""

    @cached_property
    def reader(self) -> MediaReader:
        """Decodes them."""
        return MediaReader()

    def read_ahead(self, examples: Sequence[Example]) -> None:
        """Begin to read the images of rows that a plan will soon be made of; of texts, nothing."""
        if self.reads_media:
            self.reader.read_ahead(examples)

    def plan(
        self, tree: TokenTree, device: torch.device, dtype: torch.dtype, before: int = 0
    ) -> Any:
        """What :meth:`run` needs of ``tree``, made once for each micro-batch.

        ``before`` is the length of a prefix of keys and values, which only the flat layout can have.
        """
        raise NotImplementedError

    def run(self, backbone: Any, batch: TreeBatch) -> Tensor:
        """Last hidden states ``[N, H]`` of the nodes of ``batch``."""
        raise NotImplementedError

    @property
    def size_step(self) -> int:
        """A tree is filled up to a multiple of so many nodes."""
        return SIZE_STEP


def layout_of(model: Any, both_ways: bool) -> Layout:
    """The layout ``model`` can take; its attention is replaced where it is the flat one."""
    if media_config(model.config) is not None:
        if text_config(model.config) is None:
            return MediaLayout()
        return (DualEncoder if is_dual_encoder(model.config) else ImageEncoderDecoder)(model)
    if heads.decoder_of(model) is not None:
        return EncoderDecoder(model)
    if not is_flat(model):
        return Padded(model)
    register()
    model.set_attn_implementation(NAME)
    return Flat(heads.first_position(model), both_ways)


def is_flat(model: Any) -> bool:
    """Whether ``model`` reads texts and can take the flat layout."""
    texts = media_config(model.config) is None and heads.decoder_of(model) is None
    return texts and bool(model._supports_attention_backend)


@dataclass(frozen=True)
class Flat(Layout):
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
    source: Tensor
    """What the encoder reads: ids ``[R, S]`` or images ``[R, C, H, W]``; empty without one."""
    source_mask_RS: Tensor | None
    """1 where there is a token; ``None`` where the encoder gives as many states for each row."""
    encoded_RSH: Tensor | None = None
    """What the encoder makes of it, where that was computed already."""

    def rows(self, ids_N: Tensor, fill: int) -> Tensor:
        """``ids_N`` as rows ``[R, T]``."""
        ids_RT = torch.full_like(self.mask_RT, fill)
        ids_RT.view(-1)[self.slot_M] = ids_N[: len(self.slot_M)]
        return ids_RT

    def nodes(self, states_RTH: Tensor, count: int) -> Tensor:
        """``states_RTH`` in the order of ``count`` nodes, ``[N, H]``; 0 for those that fill up."""
        real_MH = states_RTH.flatten(0, 1)[self.slot_M]
        return torch.nn.functional.pad(real_MH, (0, 0, 0, count - len(real_MH)))


class Padded(Layout):
    """Each row of the tree as a row of the rectangle, filled up at its end."""

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
        return Rectangle(sides.slot_M, sides.mask_RT, *_fill_up(sources, self.fill, device))

    def encode(self, backbone: Any, plan: Rectangle) -> Tensor:
        """States ``[R, S, H]`` of what the encoder reads."""
        encoded = backbone.get_encoder()(input_ids=plan.source, attention_mask=plan.source_mask_RS)
        states_RSH: Tensor = encoded.last_hidden_state
        return states_RSH

    def decoder_ids(self, batch: TreeBatch) -> Tensor:
        """What the decoder reads, ``[R, T]``."""
        plan: Rectangle = batch.plan
        ids_RT = plan.rows(batch.ids_N, self.fill)
        if batch.tree.examples[0].source_T is None:
            ids_RT = torch.nn.functional.pad(ids_RT[:, :-1], (1, 0), value=self.start)
        return ids_RT

    def run(self, backbone: Any, batch: TreeBatch) -> Tensor:
        """Encode the sources, then decode behind them."""
        plan: Rectangle = batch.plan
        decoded = heads.decoder_of(backbone)(  # type: ignore[misc]
            input_ids=self.decoder_ids(batch),
            attention_mask=plan.mask_RT,
            encoder_hidden_states=(
                self.encode(backbone, plan) if plan.encoded_RSH is None else plan.encoded_RSH
            ),
            encoder_attention_mask=plan.source_mask_RS,
            use_cache=False,
        )
        return plan.nodes(decoded.last_hidden_state, len(batch.ids_N))


class ImageEncoderDecoder(EncoderDecoder):
    """The tree holds what the decoder writes; rows carry the image that the encoder reads."""

    reads_media: ClassVar[bool] = True

    def plan(
        self, tree: TokenTree, device: torch.device, dtype: torch.dtype, before: int = 0
    ) -> Rectangle:
        """Where the nodes go, and the images, decoded now."""
        sides = Padded.plan(self, tree, device, dtype)
        pixels = self.reader.arrays(tree, device, dtype)
        return Rectangle(sides.slot_M, sides.mask_RT, pixels, None)

    def encode(self, backbone: Any, plan: Rectangle) -> Tensor:
        """States ``[R, S, H]`` of the images, of the width that the decoder reads."""
        states_RSH: Tensor = backbone.encoder(pixel_values=plan.source).last_hidden_state
        project = getattr(backbone, "enc_to_dec_proj", None)
        return states_RSH if project is None else project(states_RSH)

    def decoder_ids(self, batch: TreeBatch) -> Tensor:
        """The rows as they are: they begin with the token that the decoder starts from."""
        plan: Rectangle = batch.plan
        return plan.rows(batch.ids_N, self.fill)


@lru_cache(maxsize=1)
def _threads() -> ThreadPoolExecutor:
    """Those that decode, of this process."""
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), "luthier-decode")


MOST_IMAGES = 32
"""Images in a micro-batch: more are no faster, and each is some megabytes on its way."""
IMAGES_HELD = 8 * MOST_IMAGES
"""Images whose pixels are in memory at once: 150 MB where they are 224 x 224."""


class MediaReader:
    """Decodes the images and sounds of rows in threads, those of the next step while one computes."""

    def __init__(self) -> None:
        self._ahead: dict[int, tuple[MediaInput, Future[NDArray[np.float32]]]] = {}
        """By identity: equal rows may be changed otherwise."""

    def read_ahead(self, examples: Sequence[Example]) -> None:
        """Begin with ``examples``; what waits from before and was never asked for is not read."""
        for _, waiting in self._ahead.values():
            waiting.cancel()
        media = [each.media for each in examples[:IMAGES_HELD] if each.media is not None]
        self._ahead = {id(each): (each, _threads().submit(each.array)) for each in media}

    def arrays(self, tree: TokenTree, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The images or sounds of the rows of ``tree``: ``[R, C, H, W]``."""
        media = [each.media for each in tree.examples if each.media is not None]
        # Pillow lets go of Python's lock while it decodes.
        begun = [self._ahead.pop(id(each), None) for each in media]
        reading = [
            _threads().submit(each.array) if ahead is None else ahead[1]
            for each, ahead in zip(media, begun, strict=True)
        ]
        try:
            pixels = torch.from_numpy(np.stack([each.result() for each in reading]))
        finally:
            for each in reading:  # where one cannot be read, the others need not be
                each.cancel()
        return pixels.to(device, dtype).contiguous(memory_format=torch.channels_last)


class MediaLayout(Layout):
    """Each image or sound of the tree, one node, as an array; its state is what the head reads.

    Where nothing below the head trains and rows are never changed, states are computed once for all
    rows (:meth:`compute_ahead`): then none is decoded again.
    """

    reads_media: ClassVar[bool] = True

    def __init__(self) -> None:
        self._states_NH: Tensor | None = None
        self._places: dict[int, int] = {}

    def read_ahead(self, examples: Sequence[Example]) -> None:
        """Begin to decode, where states are not known."""
        if self._states_NH is None:
            super().read_ahead(examples)

    @torch.no_grad()
    def compute_ahead(
        self, network: Network, examples: Sequence[Example], budget: int, file: Path | None
    ) -> None:
        """The states of ``examples``; with ``file`` they live there, not in memory."""
        network.model.eval()
        unique = [*{int(example.ids_T[0]): example for example in examples}.values()]
        states_NH = new_activations((len(unique), network.width), network.dtype, file)
        places: dict[int, int] = {}
        for batch in network.batches(unique, budget):
            states_RH = read_states(network.model.base_model, batch.plan)
            for example, state_H in zip(batch.tree.examples, states_RH, strict=True):
                states_NH[len(places)] = state_H.cpu()
                places[int(example.ids_T[0])] = len(places)
        self._states_NH, self._places = states_NH, places

    def forget(self) -> None:
        """Let go of what was computed ahead."""
        self._states_NH, self._places = None, {}

    def plan(
        self, tree: TokenTree, device: torch.device, dtype: torch.dtype, before: int = 0
    ) -> Tensor:
        """The arrays ``[R, C, H, W]``, decoded now; or the states ``[R, H]`` that are known."""
        places = [self._places.get(int(each.ids_T[0]), -1) for each in tree.examples]
        if self._states_NH is not None and min(places) >= 0:
            return self._states_NH[torch.tensor(places)].to(device)
        return self.reader.arrays(tree, device, dtype)

    def run(self, backbone: Any, batch: TreeBatch) -> Tensor:
        """One forward pass; states ``[N, H]`` of the images, 0 for nodes that only fill the tree up."""
        known = batch.plan.dim() == 2
        state_RH = batch.plan if known else read_states(backbone, batch.plan)
        state_NH = state_RH.new_zeros(len(batch.ids_N), state_RH.shape[1])
        nodes = torch.from_numpy(batch.tree.leaf_R).to(state_RH.device)
        return state_NH.index_copy(0, nodes, state_RH)


@dataclass(frozen=True)
class ImagesAndTexts:
    """Rows of a tree, each an image or a text."""

    image_I: Tensor
    """Numbers of the rows that are images."""
    text_T: Tensor
    """Numbers of those that are texts."""
    pixels: Tensor
    """The images, ``[I, C, H, W]``."""
    ids_TS: Tensor
    """The texts, filled up at their end."""
    mask_TS: Tensor
    """1 where there is a token."""
    node_M: Tensor
    """Each token of each row, one row after the other."""
    row_M: Tensor
    """The row of each."""


class DualEncoder(Layout):
    """Rows are images or texts, each kind for an encoder of its own (CLIP, Radford et al. 2021).

    Both embed into one space. All nodes of a row have its embedding, so it is the same however a row
    is read.
    """

    reads_media: ClassVar[bool] = True

    def __init__(self, model: Any) -> None:
        self.fill = heads.filling_id(model)

    def plan(
        self, tree: TokenTree, device: torch.device, dtype: torch.dtype, before: int = 0
    ) -> ImagesAndTexts:
        """The images, decoded now, and the texts as a rectangle."""
        rows = tree.examples
        images = [number for number, row in enumerate(rows) if row.media is not None]
        texts = [number for number, row in enumerate(rows) if row.media is None]
        ids_TS, mask_TS = _fill_up([rows[number].ids_T for number in texts], self.fill, device)
        row_M = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
        put = [
            torch.from_numpy(np.asarray(array, dtype=np.int64)).to(device)
            for array in (images, texts, tree.node_M, row_M)
        ]
        pixels = torch.empty(0, device=device)
        if images:
            pixels = self.reader.arrays(tree, device, dtype)
        return ImagesAndTexts(put[0], put[1], pixels, ids_TS, mask_TS, *put[2:])

    def run(self, backbone: Any, batch: TreeBatch) -> Tensor:
        """Embeddings ``[N, H]``, not yet of length 1; 0 for nodes that only fill the tree up."""
        plan: ImagesAndTexts = batch.plan
        parts, rows = list[Tensor](), list[Tensor]()
        if len(plan.image_I):
            parts.append(backbone.get_image_features(pixel_values=plan.pixels).pooler_output)
            rows.append(plan.image_I)
        if len(plan.text_T):
            texts = backbone.get_text_features(input_ids=plan.ids_TS, attention_mask=plan.mask_TS)
            parts.append(texts.pooler_output)
            rows.append(plan.text_T)
        embedded_RH = torch.cat(parts)[torch.cat(rows).argsort()]
        state_NH = embedded_RH.new_zeros(len(batch.ids_N), embedded_RH.shape[1])
        return state_NH.index_copy(0, plan.node_M, embedded_RH[plan.row_M])


def read_states(backbone: Any, pixels: Tensor) -> Tensor:
    """What the head of a classifier reads of images or sounds ``[R, C, H, W]``: ``[R, H]``."""
    output = run_media(backbone, pixels)
    pooled: Tensor | None = getattr(output, "pooler_output", None)
    if pooled is not None:
        return pooled.flatten(1)
    if reads_sound(backbone.config):  # Wav2Vec2 is read by the mean
        mean_RH: Tensor = output.last_hidden_state.mean(1)
        return mean_RH
    # Vision transformers are read at their first token, convolutions by the mean of their maps.
    first_RH: Tensor = output.last_hidden_state[:, 0]
    return first_RH


def _fill_up(texts: Sequence[IntArray], fill: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """``texts`` as rows ``[R, S]`` that are filled up at their end, and 1 where there is a token."""
    ids_RS = np.full((len(texts), max(map(len, texts), default=0)), fill, dtype=np.int64)
    mask_RS = np.zeros_like(ids_RS)
    for row, ids_S in enumerate(texts):
        ids_RS[row, : len(ids_S)], mask_RS[row, : len(ids_S)] = ids_S, 1
    return torch.from_numpy(ids_RS).to(device), torch.from_numpy(mask_RS).to(device)


def _rectangle(tree: TokenTree) -> tuple[IntArray, IntArray]:
    """Mask ``[R, T]`` of the rows of ``tree``, and the flattened index of each of their nodes."""
    lengths_R = tree.depth_N[tree.leaf_R] + 1
    count = int(lengths_R.sum())
    row_M = np.repeat(np.arange(len(lengths_R)), lengths_R)
    slot_M = row_M * int(lengths_R.max()) + tree.depth_N[:count]
    mask_RT = np.zeros((len(lengths_R), int(lengths_R.max())), dtype=np.int64)
    mask_RT.reshape(-1)[slot_M] = 1
    return mask_RT, slot_M
