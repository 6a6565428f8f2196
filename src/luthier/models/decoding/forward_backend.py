"""The PyTorch backend of networks without the flat layout, based on their own forward and cache."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from luthier.models.networks import heads
from luthier.models.networks.modalities import text_config
from luthier.models.networks.prefix import prefix_cache

if TYPE_CHECKING:
    from luthier.models.decoding.backends import State
    from luthier.models.networks.network import Network
    from luthier.types import IntArray


class _ForwardSequence:
    """A sequence of :class:`ForwardBackend`; a row of a group after the prefill."""

    def __init__(self, ids_T: IntArray) -> None:
        self.ids_T, self.unread = ids_T, len(ids_T)
        self.group: _Group | None = None


class _Group:
    """Sequences with a common prefill: one batch of the network's cache."""

    def __init__(self, cache: Any, rows: Sequence[_ForwardSequence]) -> None:
        self.cache = cache
        """The network's own cache, or all token ids ``[R, T]`` if the network has none."""
        self.length = 0
        """Number of tokens in the cache."""
        self.encoded_RSH: Tensor | None = None
        """Encoder states of the prompts."""
        self.mask_RS: Tensor | None = None
        self._hold(rows)

    def select(self, places: Sequence[int], rows: Sequence[_ForwardSequence]) -> None:
        """Reduce the group to ``rows``, whose caches are at the batch indices ``places``."""
        index_R = torch.tensor(places)
        if hasattr(self.cache, "reorder_cache"):
            # transformers' method for beam search also selects and repeats rows.
            self.cache.reorder_cache(index_R)
        else:  # luthier's own networks
            self.cache = self.cache.select(index_R)
        if self.encoded_RSH is not None:
            index_R = index_R.to(self.encoded_RSH.device)
            self.encoded_RSH = self.encoded_RSH[index_R]
            self.mask_RS = None if self.mask_RS is None else self.mask_RS[index_R]
        self._hold(rows)

    def _hold(self, rows: Sequence[_ForwardSequence]) -> None:
        self.rows = list(rows)
        for row in rows:
            row.group, row.unread = self, 0


class ForwardBackend:
    """A backend based on the network's own forward and cache.

    Sequences with a common prefill share each step, if the cache supports row selection: prompts of
    encoder-decoders and of luthier's own networks, and the completions of one prompt in other
    networks. All other sequences run separately.
    """

    rows, sequences = 1, sys.maxsize

    def __init__(self, network: Network, context: int, encoded_RSH: Tensor | None = None) -> None:
        """Initialize the backend. ``encoded_RSH`` are precomputed encoder states; each prompt is
        then the index of one of their rows."""
        self.network, self.context, self.device = network, context, network.device
        self._encoded_RSH = encoded_RSH
        model = network.model
        self._beside = heads.decoder_of(model) is not None
        config = text_config(model.config)
        layers = int(getattr(config, "num_hidden_layers", 1))
        # Keys and values per layer. A decoder next to an encoder also caches its cross-attention.
        numbers = 2 * layers * int(config.hidden_size) * (2 if self._beside else 1)
        self._bytes = numbers * network.dtype.itemsize
        known = inspect.signature(model.base_model.forward).parameters
        # State-space models and RWKV have other names for their cache.
        names = ("past_key_values", "cache_params", "state")
        self._cache = next((name for name in names if name in known), names[0])
        self._has_positions = "position_ids" in known and not self._beside

    def bytes_of(self, tokens: int) -> int:
        """Return the memory of ``tokens`` tokens, estimated from the size of the network's states."""
        return tokens * self._bytes

    def open(self, ids_T: IntArray) -> State:
        """A sequence with nothing read."""
        return _ForwardSequence(ids_T)

    def prefill(self, states: Sequence[Any]) -> list[Tensor | None]:
        """Prefill the whole prompts, one after the other."""
        return [self._read([state])[0] for state in states]

    def prefill_batch(self, prompts: Sequence[IntArray], copies: int) -> tuple[list[State], Tensor]:
        """Prefill the prompts as one padded batch if the cache supports row selection."""
        rows = [_ForwardSequence(prompt_T) for prompt_T in prompts]
        if not (self._beside or getattr(self.network.model.base_model, "selects_rows", False)):
            logits_UV = torch.stack([self._read([row])[0] for row in rows])
            states = [own for row in rows for own in self.fork(row, copies)]
            return states, logits_UV.repeat_interleave(copies, 0)
        group = _Group(None, rows)
        logits_UV = self._read(rows, group)
        places = [place for place in range(len(rows)) for _ in range(copies)]
        group.select(places, [_ForwardSequence(prompts[place]) for place in places])
        return [*group.rows], logits_UV.repeat_interleave(copies, 0)

    def fork(self, state: Any, copies: int) -> list[State]:
        """Return copies of a sequence, as one group if the cache supports row selection.

        Otherwise each copy repeats the prefill.
        """
        if hasattr(state.group.cache, "reorder_cache") and not self._beside:
            rows = [_ForwardSequence(state.ids_T) for _ in range(copies)]
            state.group.select([0] * copies, rows)
            return [*rows]
        made: list[State] = [state]
        for _ in range(copies - 1):
            again = self.open(state.ids_T)
            self.prefill([again])
            made.append(again)
        return made

    @torch.no_grad()
    def step(self, states: Sequence[Any], tokens: Sequence[int]) -> Tensor:
        """Step each group. Rows without a step here are removed from the group."""
        logits: dict[int, Tensor] = {}
        for group in dict.fromkeys(state.group for state in states):
            places = [place for place, state in enumerate(states) if state.group is group]
            rows = [states[place] for place in places]
            if rows != group.rows:
                group.select([group.rows.index(row) for row in rows], rows)
            ids_R1 = torch.tensor([[tokens[place]] for place in places])
            logits.update(zip(places, self._forward(group, ids_R1), strict=True))
        return torch.stack([logits[place] for place in range(len(states))])

    def free(self, state: Any) -> None:
        """Free a sequence. The memory is released with the group's next step."""
        state.group = None

    def close(self) -> None:
        """Do nothing: each sequence owns a cache."""

    @torch.no_grad()
    def _read(self, rows: list[_ForwardSequence], group: _Group | None = None) -> Tensor:
        """Prefill ``rows`` as a new group and return the logits ``[R, V]`` of the next tokens."""
        model, device = self.network.model, self.network.device
        group = group or _Group(None, rows)
        group.cache = prefix_cache(model, rows=len(rows))
        # Encoder prompts are padded at the end, decoder prompts at the start.
        width = max(len(row.ids_T) for row in rows)
        ids_RT = np.full((len(rows), width), heads.padding_id(model), dtype=np.int64)
        mask_RT = np.zeros_like(ids_RT)
        for index, row in enumerate(rows):
            size = len(row.ids_T)
            place = slice(0, size) if self._beside else slice(width - size, width)
            ids_RT[index, place], mask_RT[index, place] = row.ids_T, 1
        ids, mask = torch.from_numpy(ids_RT), torch.from_numpy(mask_RT).to(device)
        if not self._beside:
            return self._forward(group, ids, mask if len(rows) > 1 else None)
        if self._encoded_RSH is None:
            encoder = model.base_model.get_encoder()
            encoded = encoder(input_ids=ids.to(device), attention_mask=mask)
            group.encoded_RSH, group.mask_RS = encoded.last_hidden_state, mask
        else:
            group.encoded_RSH = self._encoded_RSH[ids[:, 0].to(device)]
        opening_R = torch.tensor([heads.decoder_opening(model)]).expand(len(rows), -1)
        return self._forward(group, opening_R)

    def _forward(self, group: _Group, ids_RT: Tensor, mask_RT: Tensor | None = None) -> Tensor:
        backbone: Any = self.network.model.base_model
        further: dict[str, Any] = {} if mask_RT is None else {"attention_mask": mask_RT}
        if group.encoded_RSH is not None:
            backbone = heads.decoder_of(self.network.model)
            further["encoder_hidden_states"] = group.encoded_RSH
            further["encoder_attention_mask"] = group.mask_RS
        device, start = self.network.device, group.length
        if isinstance(group.cache, Tensor):
            ids_RT, start = torch.cat([group.cache, ids_RT], 1), 0
        else:
            further[self._cache] = group.cache
        group.length = start + ids_RT.shape[1]
        if self._has_positions and mask_RT is None:
            # Bamba would count each step from 0.
            further["position_ids"] = torch.arange(start, group.length, device=device)[None]
        out = backbone(input_ids=ids_RT.to(device), use_cache=self._cache in further, **further)
        # RecurrentGemma keeps one state in its modules, which all sequences would share: each step
        # reads all tokens again.
        group.cache = getattr(out, self._cache, ids_RT)
        return self.network.logits(out.last_hidden_state[:, -1].to(self.network.dtype))
