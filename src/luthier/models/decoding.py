"""Running a network token by token behind prompts that several rows share.

Each distinct prompt goes through the network once, as it would in training: in the token tree, so that
what prompts have in common is computed once too. Its keys and values are kept once for all of its
rows; a row keeps those of its own tokens. A layer's scores over both parts go through one softmax: the
prompt's part is one product for all rows, and its memory is read once in a step (Juravsky et al. 2024,
"Hydragen", arXiv:2402.05099, who join two softmaxes instead). Every step runs the ``R`` next tokens as
one flat sequence through the layers that training uses, adapters and all.

Networks without the flat layout decode with the cache of their own forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from luthier.errors import RecipeError
from luthier.models import heads
from luthier.models.attention import AttentionPlan
from luthier.models.layouts import Flat
from luthier.models.prefix import prefix_tokens
from luthier.types import Example

if TYPE_CHECKING:
    from luthier.models.network import Network
    from luthier.types import IntArray

GROWTH = 32
"""Room for keys and values is made for so many tokens at once: few sizes, few kernels."""
PREFILL_TOKENS = 8192
"""Tokens of prompts that run at once."""


class Decoding(Protocol):
    """Rows that are written token by token; ``R`` of them, those of a prompt side by side."""

    def step(self, ids_R: Tensor) -> Tensor:
        """Append a token to each row; the last hidden states ``[R, H]`` there."""

    def keep(self, alive_R: IntArray) -> IntArray:
        """Let go of rows that are not ``alive_R`` (booleans); indices of those that stay, in order.

        Some that ended may stay beside others of their prompt.
        """


def begin(
    network: Network, prompts: Sequence[IntArray], copies: int, max_tokens: int
) -> tuple[Decoding, Tensor]:
    """``copies`` rows behind each of ``prompts``, and the hidden states ``[R, H]`` they start from.

    For a network that writes text, in eval mode and without gradients only.

    Raises:
        RecipeError: where the network's own cache is not known here.
    """
    model = network.model
    if isinstance(network.layout, Flat):
        return _begin_flat(network, network.layout, prompts, copies, max_tokens)
    soft = np.array(heads.prompt_ids(model), dtype=np.int64)
    whole = [np.concatenate([soft, prompt_T]) for prompt_T in prompts]
    if heads.decoder_of(model) is not None:
        return _EncoderDecoder.begin(network, whole, copies)
    return _Cached.begin(network, whole, copies)


class _Recording:
    """Attention over a tree that keeps the keys and values of each layer, ``[Hk, before + N, D]``."""

    def __init__(self, plan: AttentionPlan) -> None:
        self.plan, self.longest = plan, plan.longest
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        key, value = self.plan.with_prefix(module, key, value)
        self.layers[module.layer_idx] = key[0], value[0]
        return self.plan.over(query, key, value, scale)


def _begin_flat(
    network: Network, layout: Flat, prompts: Sequence[IntArray], copies: int, max_tokens: int
) -> tuple[Decoding, Tensor]:
    before = prefix_tokens(network.model) + len(heads.prompt_ids(network.model))
    length_U = np.array([before + len(prompt_T) for prompt_T in prompts])
    rows = [
        Example(prompt_T, np.zeros(len(prompt_T), dtype=np.float32), index)
        for index, prompt_T in enumerate(prompts)
    ]
    room = -(-int(length_U.max()) // GROWTH) * GROWTH
    shared: dict[int, tuple[Tensor, Tensor]] = {}
    last_UH = None
    for batch in network.batches(rows, PREFILL_TOKENS):
        plan = _Recording(batch.plan)
        hidden_NH = layout.run_with(network.model.base_model, batch, plan)
        if last_UH is None:
            last_UH = hidden_NH.new_empty(len(prompts), hidden_NH.shape[-1])
            shared = {
                layer: tuple(  # type: ignore[misc]
                    part.new_zeros(len(prompts), part.shape[0], room, part.shape[-1])
                    for part in pair
                )
                for layer, pair in plan.layers.items()
            }
        for row, leaf in zip(batch.tree.row_R, batch.tree.leaf_R, strict=True):
            last_UH[row] = hidden_NH[leaf]
            place_P = np.arange(batch.plan.before)
            place_P = np.concatenate([place_P, batch.plan.before + batch.tree.path(int(leaf))])
            index_P = torch.from_numpy(place_P).to(network.device)
            for layer, pair in plan.layers.items():
                for kept, part in zip(shared[layer], pair, strict=True):
                    kept[row, :, : len(place_P)] = part[:, index_P]
    assert last_UH is not None
    decoding = _FlatRows(network, layout, shared, length_U, copies, max_tokens)
    return decoding, last_UH.repeat_interleave(copies, 0)


class _FlatRows:
    """``U`` prompts of up to ``P`` tokens with ``C`` rows each, ``R = U C``, of ``T`` tokens so far.

    What attention sees of a prompt is kept as ``[U, Hk, P, D]``, of a row as ``[R, Hk, T, D]``.
    """

    def __init__(
        self,
        network: Network,
        layout: Flat,
        shared: dict[int, tuple[Tensor, Tensor]],
        length_U: IntArray,
        copies: int,
        max_tokens: int,
    ) -> None:
        self._backbone = network.model.base_model
        self._first, self._device = layout.first_position, network.device
        self._shared = shared
        self._own: dict[int, tuple[Tensor, Tensor]] = {}
        self._prompts, self._copies = len(length_U), copies
        self._tokens = self._room = 0
        self.longest = int(length_U.max()) + max_tokens
        self._length_R = torch.from_numpy(np.repeat(length_U, copies)).to(self._device)
        width = next(iter(shared.values()))[0].shape[2]
        sees_UP = np.arange(width) < length_U[:, None]
        self._mask_UP = torch.zeros(sees_UP.shape, dtype=network.dtype)
        self._mask_UP.masked_fill_(~torch.from_numpy(sees_UP), -torch.inf)
        self._mask_UP = self._mask_UP.to(self._device)
        self._mask: Tensor = self._mask_UP

    def step(self, ids_R: Tensor) -> Tensor:
        """One forward pass over the flat sequence of the rows' next tokens."""
        if self._tokens == self._room:
            self._grow()
        self._mask[..., self._mask_UP.shape[1] + self._tokens] = 0
        output = self._backbone(
            input_ids=ids_R[None],
            position_ids=self._length_R[None] + (self._first + self._tokens),
            tree=self,
            use_cache=False,
        )
        self._tokens += 1
        hidden_RH: Tensor = output.last_hidden_state[0]
        return hidden_RH

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """Keep the new tokens' keys and values, then attend to the prompt's and the row's own."""
        layer = module.layer_idx
        own_k, own_v = self._own[layer]
        own_k[:, :, self._tokens] = key[0].transpose(0, 1)
        own_v[:, :, self._tokens] = value[0].transpose(0, 1)
        shared_k, shared_v = (part.flatten(0, 1) for part in self._shared[layer])
        rows, heads_k, room, _ = own_k.shape
        prompt = shared_k.shape[1]
        # Query heads that share a key head, and rows that share a prompt, are stacked as queries.
        q_UCHGD = (
            query[0]
            .transpose(0, 1)
            .reshape(self._prompts, self._copies, heads_k, -1, query.shape[-1])
        )
        groups = q_UCHGD.shape[3]
        by_prompt = q_UCHGD.transpose(1, 2).reshape(len(shared_k), -1, query.shape[-1])
        by_row = q_UCHGD.reshape(rows * heads_k, groups, -1)
        far = torch.bmm(by_prompt, shared_k.mT)
        near = torch.bmm(by_row, own_k.flatten(0, 1).mT)
        far = far.view(self._prompts, heads_k, self._copies, groups, prompt).transpose(1, 2)
        near = near.view(self._prompts, self._copies, heads_k, groups, room)
        scores = torch.cat([far, near], -1).mul_(scale).add_(self._mask)
        p_far, p_near = torch.softmax(scores, -1).split([prompt, room], -1)
        p_far = p_far.transpose(1, 2).reshape(len(shared_k), -1, prompt)
        from_prompt = torch.bmm(p_far, shared_v)
        from_row = torch.bmm(p_near.reshape(rows * heads_k, groups, room), own_v.flatten(0, 1))
        shape = (self._prompts, heads_k, self._copies, groups, -1)
        out = from_row.view(q_UCHGD.shape).add_(from_prompt.view(shape).transpose(1, 2))
        return out.view(1, rows, heads_k * groups, -1)

    def keep(self, alive_R: IntArray) -> IntArray:
        """Prompts without a living row go, and as many rows of each as ended in all of them."""
        alive_UC = alive_R.reshape(self._prompts, self._copies)
        prompts = np.flatnonzero(alive_UC.any(1))
        copies = int(alive_UC.sum(1).max())
        # The living first, in their order.
        order_UC = np.argsort(~alive_UC[prompts], axis=1, kind="stable")[:, :copies]
        chosen_R = (prompts[:, None] * self._copies + np.sort(order_UC, axis=1)).reshape(-1)
        if len(prompts) < self._prompts:
            index_U = torch.from_numpy(prompts).to(self._device)
            self._shared = {n: (k[index_U], v[index_U]) for n, (k, v) in self._shared.items()}
            self._mask_UP, self._mask = self._mask_UP[index_U], self._mask[index_U]
        index_R = torch.from_numpy(chosen_R).to(self._device)
        self._own = {n: (k[index_R], v[index_R]) for n, (k, v) in self._own.items()}
        self._length_R = self._length_R[index_R]
        self._prompts, self._copies = len(prompts), copies
        return chosen_R

    def _grow(self) -> None:
        """Room for :data:`GROWTH` more tokens. Zeros: what is masked is still multiplied."""
        rows = self._prompts * self._copies
        for layer, pair in self._shared.items():
            before = self._own.get(layer)
            grown = []
            for index, part in enumerate(pair):
                _, heads_k, _, size = part.shape
                room = part.new_zeros(rows, heads_k, self._room + GROWTH, size)
                if before is not None:
                    room[:, :, : self._room] = before[index]
                grown.append(room)
            self._own[layer] = grown[0], grown[1]
        self._room += GROWTH
        unseen = self._mask_UP.new_full((self._prompts, self._room), -torch.inf)
        unseen[:, : self._tokens] = 0
        self._mask = torch.cat([self._mask_UP, unseen], 1)[:, None, None, None]


class _EncoderDecoder:
    """The decoder with transformers' own cache; each prompt is encoded once."""

    def __init__(self, decoder: Any, cache: Any, states_RSH: Tensor, mask_RS: Tensor) -> None:
        self._decoder, self._cache = decoder, cache
        self._states_RSH, self._mask_RS = states_RSH, mask_RS

    @staticmethod
    def begin(
        network: Network, prompts: Sequence[IntArray], copies: int
    ) -> tuple[Decoding, Tensor]:
        """Encode, and let the decoder read the token it starts from."""
        backbone = network.model.base_model
        ids_US, mask_US = _rectangle(prompts, heads.filling_id(network.model), at_end=True)
        ids_US, mask_US = ids_US.to(network.device), mask_US.to(network.device)
        encoded = backbone.get_encoder()(input_ids=ids_US, attention_mask=mask_US)
        rows = _EncoderDecoder(backbone.get_decoder(), None, encoded.last_hidden_state, mask_US)
        start = heads.decoder_start(network.model)
        hidden_UH = rows.step(torch.full((len(prompts),), start, device=network.device))
        rows._select(_each(len(prompts), copies, network.device))
        return rows, hidden_UH.repeat_interleave(copies, 0)

    def step(self, ids_R: Tensor) -> Tensor:
        """One step of the decoder."""
        output = self._decoder(
            input_ids=ids_R[:, None],
            encoder_hidden_states=self._states_RSH,
            encoder_attention_mask=self._mask_RS,
            past_key_values=self._cache,
            use_cache=True,
        )
        self._cache = output.past_key_values
        hidden_RH: Tensor = output.last_hidden_state[:, -1]
        return hidden_RH

    def keep(self, alive_R: IntArray) -> IntArray:
        """The living rows."""
        chosen_R = np.flatnonzero(alive_R)
        self._select(torch.from_numpy(chosen_R).to(self._mask_RS.device))
        return chosen_R

    def _select(self, index_R: Tensor) -> None:
        self._cache.reorder_cache(index_R)
        self._states_RSH, self._mask_RS = self._states_RSH[index_R], self._mask_RS[index_R]


class _Cached:
    """A network whose own forward keeps what its next tokens need, as Transformer-XL does."""

    def __init__(self, backbone: Any, memory: Any) -> None:
        self._backbone, self._memory = backbone, memory

    @staticmethod
    def begin(
        network: Network, prompts: Sequence[IntArray], copies: int
    ) -> tuple[Decoding, Tensor]:
        """Read the prompts, filled up before their first token."""
        backbone = network.model.base_model
        ids_UT, mask_UT = _rectangle(prompts, heads.filling_id(network.model), at_end=False)
        output = backbone(
            input_ids=ids_UT.to(network.device),
            attention_mask=mask_UT.to(network.device),
            use_cache=True,
        )
        memory = output.past_key_values
        if not hasattr(memory, "select"):
            raise RecipeError(
                f"networks of type {network.model.config.model_type} cannot be sampled from yet: "
                "their cache is not known here"
            )
        index_R = _each(len(prompts), copies, network.device)
        return _Cached(backbone, memory.select(index_R)), output.last_hidden_state[:, -1][index_R]

    def step(self, ids_R: Tensor) -> Tensor:
        """One step of the network's own forward."""
        output = self._backbone(
            input_ids=ids_R[:, None], past_key_values=self._memory, use_cache=True
        )
        self._memory = output.past_key_values
        hidden_RH: Tensor = output.last_hidden_state[:, -1]
        return hidden_RH

    def keep(self, alive_R: IntArray) -> IntArray:
        """The living rows."""
        chosen_R = np.flatnonzero(alive_R)
        index_R = torch.from_numpy(chosen_R).to(self._memory.position_BK.device)
        self._memory = self._memory.select(index_R)
        return chosen_R


def _each(count: int, copies: int, device: torch.device) -> Tensor:
    """``0, 0, 1, 1, ...``: each of ``count`` rows ``copies`` times."""
    return torch.arange(count, device=device).repeat_interleave(copies)


def _rectangle(rows: Sequence[IntArray], fill: int, at_end: bool) -> tuple[Tensor, Tensor]:
    """``rows`` filled up to the longest, and a mask that is 1 where there is a token."""
    width = max(map(len, rows))
    ids_RT = np.full((len(rows), width), fill, dtype=np.int64)
    mask_RT = np.zeros_like(ids_RT)
    for index, row_T in enumerate(rows):
        place = slice(0, len(row_T)) if at_end else slice(width - len(row_T), width)
        ids_RT[index, place] = row_T
        mask_RT[index, place] = 1
    return torch.from_numpy(ids_RT), torch.from_numpy(mask_RT)
