"""Layouts of a token tree as network input: flat, padded, encoder-decoder, images.

The flat layout is the default and the fastest: one sequence of nodes, with the tree in the
attention mask. It requires replaceable attention. Other networks (relative positions inside the
attention, recurrence, an encoder next to the decoder) get a padded rectangle, and their states are
scattered back to the nodes. Objectives and heads are independent of the layout.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from luthier.models.networks import heads
from luthier.models.networks.attention import (
    NAME,
    Attends,
    AttentionPlan,
    plan_attention,
    register,
)
from luthier.models.networks.frozen_layer_cache import new_activations
from luthier.models.networks.head_forward import classifier_input
from luthier.models.networks.modalities import (
    is_dual_encoder,
    is_recurrent,
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
    from luthier.models.networks.network import Network, TreeBatch
    from luthier.types import Example, IntArray


SIZE_STEP = 32
"""Nodes and loss positions of a micro-batch are rounded up to a multiple of this."""


class Layout:
    """Brings the nodes of a tree through a network."""

    flat: ClassVar[bool] = False
    """True if nodes form one sequence. Required for the frozen-layer cache and shared prefixes."""
    has_media: ClassVar[bool] = False
    """True if rows contain images or audio."""

    @cached_property
    def reader(self) -> MediaReader:
        """Decoder of images and audio."""
        return MediaReader()

    def read_ahead(self, examples: Sequence[Example]) -> None:
        """Start decoding the media of future micro-batches. Does nothing for text."""
        if self.has_media:
            self.reader.read_ahead(examples)

    def plan(
        self, tree: TokenTree, device: torch.device, dtype: torch.dtype, before: int = 0
    ) -> Any:
        """Return the network input for ``tree``, computed once per micro-batch.

        Args:
            before: Length of a key-value prefix. Flat layout only.
        """
        raise NotImplementedError

    def run(self, backbone: Any, batch: TreeBatch) -> Tensor:
        """Last hidden states ``[N, H]`` of the nodes of ``batch``."""
        raise NotImplementedError

    @property
    def size_step(self) -> int:
        """Multiple to which trees are padded, in nodes."""
        return SIZE_STEP


def layout_of(model: Any, is_bidirectional: bool) -> Layout:
    """Return the layout of ``model``. For the flat layout, the model's attention is replaced."""
    if media_config(model.config) is not None:
        if heads.scores_letters(model):
            return ImageColumns()
        if text_config(model.config) is None:
            return MediaLayout(model)
        return (DualEncoder if is_dual_encoder(model.config) else ImageEncoderDecoder)(model)
    if heads.decoder_of(model) is not None:
        return EncoderDecoder(model)
    if not is_flat(model):
        return Padded(model)
    register()
    model.set_attn_implementation(NAME)
    for module in model.modules():
        # Llama 4 would scale queries by the position in the flat sequence. Within the context, the
        # scale is 1 (modalities.context_length).
        if hasattr(module, "attn_temperature_tuning"):
            module.attn_temperature_tuning = False
    return Flat(heads.first_position(model), is_bidirectional)


def is_flat(model: Any) -> bool:
    """Return True if ``model`` is a text network with support for the flat layout."""
    texts = media_config(model.config) is None and heads.decoder_of(model) is None
    return texts and bool(model._supports_attention_backend) and not is_recurrent(model.config)


@dataclass(frozen=True)
class Flat(Layout):
    """All nodes in one sequence. The attention mask represents the tree."""

    first_position: int
    is_bidirectional: bool
    flat: ClassVar[bool] = True

    def plan(
        self, tree: TokenTree, device: torch.device, dtype: torch.dtype, before: int = 0
    ) -> AttentionPlan:
        """The attention over ``tree``."""
        return plan_attention(tree, device, dtype, self.is_bidirectional, before)

    def run(self, backbone: Any, batch: TreeBatch) -> Tensor:
        """Run one forward pass over the flat sequence."""
        return self.run_with(backbone, batch, batch.plan)

    def run_with(self, backbone: Any, batch: TreeBatch, attention: Attends) -> Tensor:
        """Run the forward pass with another ``attention`` than the batch's plan."""
        segments = {} if batch.segment_N is None else {"token_type_ids": batch.segment_N[None]}
        output = backbone(
            input_ids=batch.ids_N[None],
            # Behind a prefix, positions start at its length, like in transformers and PEFT.
            position_ids=batch.depth_N[None] + self.first_position + batch.plan.before,
            tree=attention,
            use_cache=False,
            **segments,
        )
        hidden_NH: Tensor = output.last_hidden_state[0]
        return hidden_NH


@dataclass(frozen=True)
class Rectangle:
    """Positions of a forest's chains in ``R`` padded rows of ``T`` tokens."""

    slot_M: Tensor
    """Index of each node in the flattened rectangle, without padding nodes."""
    mask_RT: Tensor
    """Attention mask: 1 for tokens, 0 for padding."""
    source: Tensor
    """Encoder input: ids ``[R, S]`` or images ``[R, C, H, W]``; empty without an encoder."""
    source_mask_RS: Tensor | None
    """Attention mask of the encoder input; ``None`` for fixed-size inputs."""
    encoded_RSH: Tensor | None = None
    """Encoder states, if already computed."""

    def rows(self, ids_N: Tensor, fill: int) -> Tensor:
        """``ids_N`` as rows ``[R, T]``."""
        ids_RT = torch.full_like(self.mask_RT, fill)
        # Padding nodes are behind all nodes of rows (see pad_tree).
        ids_RT.view(-1)[self.slot_M] = ids_N[: len(self.slot_M)]
        return ids_RT

    def nodes(self, states_RTH: Tensor, count: int) -> Tensor:
        """Return ``states_RTH`` in node order, ``[N, H]``; 0 for padding nodes."""
        real_MH = states_RTH.flatten(0, 1)[self.slot_M]
        return torch.nn.functional.pad(real_MH, (0, 0, 0, count - len(real_MH)))


class Padded(Layout):
    """Each row of the tree as a row of a rectangle, padded at the end."""

    def __init__(self, model: Any) -> None:
        self.fill = heads.padding_id(model)
        known = inspect.signature(model.base_model.forward).parameters
        self._options = {"use_cache": False} if "use_cache" in known else {}

    def plan(
        self, tree: TokenTree, device: torch.device, dtype: torch.dtype, before: int = 0
    ) -> Rectangle:
        """Return the rectangle for ``tree`` (chains only)."""
        mask_RT, slot_M = _rectangle(tree)
        none = torch.empty(len(mask_RT), 0, dtype=torch.int64, device=device)
        put = [torch.from_numpy(array).to(device) for array in (slot_M, mask_RT)]
        return Rectangle(put[0], put[1], none, none)

    def run(self, backbone: Any, batch: TreeBatch) -> Tensor:
        """Run one forward pass over the rectangle."""
        plan: Rectangle = batch.plan
        ids_RT = plan.rows(batch.ids_N, self.fill)
        options: dict[str, Any] = {**self._options}
        if batch.segment_N is not None:
            options["token_type_ids"] = plan.rows(batch.segment_N, 0)
        output = backbone(input_ids=ids_RT, attention_mask=plan.mask_RT, **options)
        return plan.nodes(output.last_hidden_state, len(batch.ids_N))


class EncoderDecoder(Padded):
    """Decoder input in the tree, encoder input in the examples.

    A row without a source is input of both: the encoder gets the row, and the decoder gets the row
    shifted by one token, like in transformers' classifiers on encoder-decoders.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.start = heads.decoder_start(model)

    def plan(
        self, tree: TokenTree, device: torch.device, dtype: torch.dtype, before: int = 0
    ) -> Rectangle:
        """Return the rectangle and the encoder input."""
        sides = super().plan(tree, device, dtype)
        prompt = np.array(tree.source_before, dtype=np.int64)
        sources = [
            np.concatenate([prompt, e.ids_T if e.source_T is None else e.source_T])
            for e in tree.examples
        ]
        return Rectangle(sides.slot_M, sides.mask_RT, *_fill_up(sources, self.fill, device))

    def encode(self, backbone: Any, plan: Rectangle) -> Tensor:
        """Return the encoder states ``[R, S, H]``."""
        encoded = backbone.get_encoder()(input_ids=plan.source, attention_mask=plan.source_mask_RS)
        states_RSH: Tensor = encoded.last_hidden_state
        return states_RSH

    def decoder_ids(self, batch: TreeBatch) -> Tensor:
        """Return the decoder input ``[R, T]``."""
        plan: Rectangle = batch.plan
        ids_RT = plan.rows(batch.ids_N, self.fill)
        if batch.tree.examples[0].source_T is None:
            ids_RT = torch.nn.functional.pad(ids_RT[:, :-1], (1, 0), value=self.start)
        return ids_RT

    def run(self, backbone: Any, batch: TreeBatch) -> Tensor:
        """Run the encoder, then the decoder."""
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
    """Decoder input in the tree, images as encoder input in the examples."""

    has_media: ClassVar[bool] = True

    def plan(
        self, tree: TokenTree, device: torch.device, dtype: torch.dtype, before: int = 0
    ) -> Rectangle:
        """Return the rectangle and the decoded images."""
        sides = Padded.plan(self, tree, device, dtype)
        pixels = self.reader.arrays(tree, device, dtype)
        return Rectangle(sides.slot_M, sides.mask_RT, pixels, None)

    def encode(self, backbone: Any, plan: Rectangle) -> Tensor:
        """Return the encoder states ``[R, S, H]``, projected to the decoder's width."""
        states_RSH: Tensor = backbone.encoder(pixel_values=plan.source).last_hidden_state
        project = getattr(backbone, "enc_to_dec_proj", None)
        return states_RSH if project is None else project(states_RSH)

    def decoder_ids(self, batch: TreeBatch) -> Tensor:
        """Return the rows unchanged: each row starts with the decoder's start token."""
        plan: Rectangle = batch.plan
        return plan.rows(batch.ids_N, self.fill)


@lru_cache(maxsize=1)
def _threads() -> ThreadPoolExecutor:
    """Return the process-wide pool of decoding threads."""
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), "luthier-decode")


MOST_IMAGES = 32
"""Maximum number of images per micro-batch. More are not faster, and each needs several megabytes."""
IMAGES_HELD = 8 * MOST_IMAGES
"""Maximum number of decoded images in memory: 150 MB for 224 x 224 pixels."""


class MediaReader:
    """Decoding of images and audio in threads, one step ahead of the computation."""

    def __init__(self) -> None:
        self._ahead: dict[int, tuple[MediaInput, Future[NDArray[np.float32]]]] = {}
        """Decoding tasks by identity of the input: equal inputs may have different augmentations."""

    def read_ahead(self, examples: Sequence[Example]) -> None:
        """Start decoding ``examples``. Unused tasks of earlier calls are cancelled."""
        for _, waiting in self._ahead.values():
            waiting.cancel()
        media = [each.media for each in examples[:IMAGES_HELD] if each.media is not None]
        # The entry keeps the input alive: Python reuses the ids of deleted objects.
        self._ahead = {id(each): (each, _threads().submit(each.array)) for each in media}

    def arrays(self, tree: TokenTree, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the images or audio of the rows of ``tree``: ``[R, C, H, W]``."""
        media = [each.media for each in tree.examples if each.media is not None]
        # Pillow releases the GIL while decoding.
        begun = [self._ahead.pop(id(each), None) for each in media]
        reading = [
            _threads().submit(each.array) if ahead is None else ahead[1]
            for each, ahead in zip(media, begun, strict=True)
        ]
        try:
            pixels = torch.from_numpy(np.stack([each.result() for each in reading]))
        finally:
            for each in reading:  # after an error, the remaining media are not needed
                each.cancel()
        # With channels_last, convolutions on a CPU are a quarter faster. Weights have this format too.
        return pixels.to(device, dtype).contiguous(memory_format=torch.channels_last)


class MediaLayout(Layout):
    """One node per image or audio clip. The node's state is the head's input.

    With a frozen network and without augmentation, :meth:`compute_ahead` computes the states of all
    rows once.
    """

    has_media: ClassVar[bool] = True

    def __init__(self, model: Any) -> None:
        self._model = model
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
            states_RH = self._states(batch.plan)
            for example, state_H in zip(batch.tree.examples, states_RH, strict=True):
                states_NH[len(places)] = state_H.cpu()
                places[int(example.ids_T[0])] = len(places)
        self._states_NH, self._places = states_NH, places

    def _states(self, arrays: Tensor) -> Tensor:
        if heads.head_kind(self._model) == "sequence_classification":
            return classifier_input(self._model, arrays)
        return pooled_states(self._model, arrays)

    def forget(self) -> None:
        """Free the precomputed states."""
        self._states_NH, self._places = None, {}

    def plan(
        self, tree: TokenTree, device: torch.device, dtype: torch.dtype, before: int = 0
    ) -> Tensor:
        """Return the decoded arrays ``[R, C, H, W]``, or the precomputed states ``[R, H]``."""
        places = [self._places.get(int(each.ids_T[0]), -1) for each in tree.examples]
        if self._states_NH is not None and min(places) >= 0:
            return self._states_NH[torch.tensor(places)].to(device)
        return self.reader.arrays(tree, device, dtype)

    def run(self, backbone: Any, batch: TreeBatch) -> Tensor:
        """Return the states ``[N, H]`` of one forward pass; 0 for padding nodes."""
        known = batch.plan.dim() == 2
        state_RH = batch.plan if known else self._states(batch.plan)
        state_NH = state_RH.new_zeros(len(batch.ids_N), state_RH.shape[1])
        nodes = torch.from_numpy(batch.tree.leaf_R).to(state_RH.device)
        return state_NH.index_copy(0, nodes, state_RH)


class ImageColumns(Layout):
    """One node per text line, whose output is a score of each letter for each column."""

    has_media: ClassVar[bool] = True

    def plan(
        self, tree: TokenTree, device: torch.device, dtype: torch.dtype, before: int = 0
    ) -> Tensor:
        """Return the decoded images ``[R, C, H, W]``."""
        return self.reader.arrays(tree, device, dtype)

    def scores(self, model: Any, pixels: Tensor) -> Tensor:
        """Return the scores ``[R, S, V]`` of blank and letters; transformers returns probabilities."""
        maps = run_media(model.base_model, pixels).last_hidden_state
        scores_RSV: Tensor = model.head.head(model.head.encoder(maps).last_hidden_state)
        return scores_RSV


@dataclass(frozen=True)
class ImagesAndTexts:
    """Rows of a tree, each an image or a text."""

    image_I: Tensor
    """Indices of the image rows."""
    text_T: Tensor
    """Indices of the text rows."""
    pixels: Tensor
    """The images, ``[I, C, H, W]``."""
    ids_TS: Tensor
    """Token ids, padded at the end."""
    mask_TS: Tensor
    """Attention mask: 1 for tokens, 0 for padding."""
    node_M: Tensor
    """Nodes of each row, concatenated."""
    row_M: Tensor
    """The row of each."""


class DualEncoder(Layout):
    """Rows of images or text, with one encoder each (CLIP, Radford et al. 2021).

    Both encoders share an embedding space. All nodes of a row have the row's embedding, so the
    result is independent of the pooling.
    """

    has_media: ClassVar[bool] = True

    def __init__(self, model: Any) -> None:
        self.fill = heads.padding_id(model)

    def plan(
        self, tree: TokenTree, device: torch.device, dtype: torch.dtype, before: int = 0
    ) -> ImagesAndTexts:
        """Return the decoded images and the padded texts."""
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
        """Return unnormalized embeddings ``[N, H]``; 0 for padding nodes."""
        plan: ImagesAndTexts = batch.plan
        parts, rows = list[Tensor](), list[Tensor]()
        if len(plan.image_I):
            parts.append(backbone.get_image_features(pixel_values=plan.pixels).pooler_output)
            rows.append(plan.image_I)
        if len(plan.text_T):
            texts = backbone.get_text_features(input_ids=plan.ids_TS, attention_mask=plan.mask_TS)
            parts.append(texts.pooler_output)
            rows.append(plan.text_T)
        # Images come before texts in `parts`; argsort restores the order of the rows.
        embedded_RH = torch.cat(parts)[torch.cat(rows).argsort()]
        state_NH = embedded_RH.new_zeros(len(batch.ids_N), embedded_RH.shape[1])
        return state_NH.index_copy(0, plan.node_M, embedded_RH[plan.row_M])


def pooled_states(model: Any, pixels: Tensor) -> Tensor:
    """Return the embeddings ``[R, H]`` of images or audio ``[R, C, H, W]``, not normalized."""
    # `base_model` of DINOv3 without a head is a part of the network.
    backbone = model if heads.head_kind(model) == "embedding" else model.base_model
    output = run_media(backbone, pixels)
    pooled: Tensor | None = getattr(output, "pooler_output", None)
    if pooled is not None:
        return pooled.flatten(1)
    if reads_sound(backbone.config):  # Wav2Vec2
        mean_RH: Tensor = output.last_hidden_state.mean(1)
        return mean_RH
    states: Tensor = output.last_hidden_state
    # Convolutional networks return maps [R, H, Y, X], transformers [R, T, H].
    return states.mean((2, 3)) if states.dim() == 4 else states[:, 0]


def _fill_up(texts: Sequence[IntArray], fill: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ``texts`` as padded rows ``[R, S]`` and the attention mask."""
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
    # The nodes of the chains come first, in row order; padding nodes follow.
    slot_M = row_M * int(lengths_R.max()) + tree.depth_N[:count]
    mask_RT = np.zeros((len(lengths_R), int(lengths_R.max())), dtype=np.int64)
    mask_RT.reshape(-1)[slot_M] = 1
    return mask_RT, slot_M
