"""The backend of our own: networks run by torch.

On the flat layout all sequences take their steps together: their next tokens go through the layers as
the rows of one matrix, and each looks at its own keys and values. What a row gives must not depend on
the others, to the last bit. A prompt is therefore read alone, in chunks that depend on its own length;
and as a product's rows are computed alike for most numbers of rows, but not for all of them (with one
row, kernels of another kind may be taken), steps are filled up to numbers of rows that give the same
bits. A server probes the network for them. Others take those that pass wherever it was tried: they give
the server's bits where it finds them too, and run at full speed where it does not.

Networks that have no flat layout run by their own forward and cache.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from luthier.data.tree import build_tree, split_to_budget
from luthier.models import heads
from luthier.models.attention import AttentionPlan
from luthier.models.kv_cache import (
    CHUNK_STEP,
    STEP,
    Bank,
    Banks,
    ChunkAttention,
    Span,
    StepAttention,
    in_order,
    room_for,
)
from luthier.models.layouts import Flat
from luthier.models.modalities import text_config
from luthier.models.packing import packed_linears, packed_weight
from luthier.models.prefix import prefix_cache, prefix_tokens
from luthier.types import Example

if TYPE_CHECKING:
    from luthier.models.backends import Backend, State
    from luthier.models.network import Network
    from luthier.types import IntArray

SIZES = (4, 8, 16, 32, 64)
"""Numbers of rows that may run in one step. Products of one or two rows are made by other kernels."""
SMALL = 4096
"""Batched products of no more multiplications are made by another kernel, where numbers have 16 bits;
one sequence alone must not fall below it."""
CHUNK = 256
"""Tokens of a prompt that are read at once; between two chunks the others take a step."""
PROBES = 16
"""Rows that are compared when a network is probed."""
PREFILL_TOKENS = 8192
"""Tokens of prompts that run at once where many are read together."""


def torch_backend(network: Network, context: int, exact: bool = False) -> Backend:
    """See :data:`luthier.models.backends.OpenBackend`."""
    if isinstance(network.layout, Flat):
        return FlatBackend(network, context, exact)
    return ForwardBackend(network, context)


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


class _FlatSequence:
    """A sequence of :class:`FlatBackend`."""

    def __init__(self, ids_T: IntArray, span: Span) -> None:
        self.ids_T, self.span, self.read = ids_T, span, 0

    @property
    def unread(self) -> int:
        return len(self.ids_T) - self.read


class FlatBackend:
    """Networks on the flat layout: all sequences step together. Safe to share between threads."""

    def __init__(self, network: Network, context: int, exact: bool = False) -> None:
        window = getattr(network.model.config, "sliding_window", None)
        # Attention here sees everything; where a network would forget, a sequence ends.
        self.context = min(context, window) if isinstance(window, int) and window else context
        self.network, self._layout = network, network.layout
        assert isinstance(self._layout, Flat)
        self._first = self._layout.first_position
        self._before = prefix_tokens(network.model)
        self._open = ExitStack()
        self._open.enter_context(packed_linears(network.model))
        self._banks = Banks()
        config = network.model.config
        key_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        width = torch.empty(0, dtype=network.dtype).element_size()
        self._bytes = 2 * int(config.num_hidden_layers) * int(key_heads) * int(size) * width
        # A step moves sequences in the banks: no other thread may be looking.
        self._lock = threading.RLock()
        self.sizes: tuple[int, ...] = SIZES
        if exact:
            large = int(config.num_attention_heads) * int(size) * STEP > SMALL
            self.sizes = self._probe() if large or network.dtype == torch.float32 else (1,)
        self.rows = self.sizes[-1]

    def bytes_of(self, tokens: int) -> int:
        """Memory that a sequence of ``tokens`` takes at most."""
        return room_for(tokens + self._before + CHUNK_STEP) * self._bytes

    def open(self, ids_T: IntArray) -> State:
        """A sequence in a bank of its own until its prompt is read."""
        whole = -(-len(ids_T) // CHUNK_STEP) * CHUNK_STEP
        return _FlatSequence(ids_T, Bank(room_for(whole + self._before)).add())

    @torch.no_grad()
    def prefill(self, state: Any) -> Tensor | None:
        """Read the next chunk of the prompt."""
        ids_N = state.ids_T[state.read : state.read + CHUNK]
        size = -(-len(ids_N) // CHUNK_STEP) * CHUNK_STEP
        device = self.network.device
        chunk = ChunkAttention(state.span, size, self._before, device)
        padded_N = np.zeros(size, dtype=np.int64)
        padded_N[: len(ids_N)] = ids_N
        start = self._first + chunk.start + chunk.before
        hidden_NH = self._run(torch.from_numpy(padded_N), torch.arange(start, start + size), chunk)
        state.read += len(ids_N)
        state.span.length += chunk.before + len(ids_N)
        if state.unread:
            return None
        return self._logits(hidden_NH[len(ids_N) - 1 :][:1])[0]

    @torch.no_grad()
    def prefill_batch(self, prompts: Sequence[IntArray], copies: int) -> tuple[list[State], Tensor]:
        """Read them in the token tree, as training does: each distinct beginning is computed once."""
        network = self.network
        assert isinstance(self._layout, Flat)
        none_T = np.zeros(0, dtype=np.int64)
        read: dict[int, State] = {}
        rows = [
            Example(prompt_T, np.zeros(len(prompt_T), dtype=np.float32), index)
            for index, prompt_T in enumerate(prompts)
        ]
        last: dict[int, Tensor] = {}
        for part in split_to_budget(rows, PREFILL_TOKENS, network.shares):
            batch = network.batch(build_tree(part, network.shares))
            plan = _Recording(batch.plan)
            hidden_NH = self._layout.run_with(network.model.base_model, batch, plan)
            for row, leaf in zip(
                batch.tree.row_R.tolist(), batch.tree.leaf_R.tolist(), strict=True
            ):
                path = self._before + batch.tree.path(leaf)
                place_P = torch.from_numpy(np.concatenate([np.arange(self._before), path]))
                place_P = place_P.to(network.device)
                span = Bank(room_for(len(place_P))).add()
                span.length = len(place_P)
                for layer, (key, value) in plan.layers.items():
                    pair = span.bank.of(layer, key[None], value[None])
                    for mine, part_HND in zip(pair, (key, value), strict=True):
                        mine[span.slot, :, : span.length] = part_HND[:, place_P]
                read[row], last[row] = _FlatSequence(none_T, span), hidden_NH[leaf]
        logits_UV = self._logits(torch.stack([last[row] for row in range(len(prompts))]))
        states = [own for row in range(len(prompts)) for own in self.fork(read[row], copies)]
        return states, logits_UV.repeat_interleave(copies, 0)

    @torch.no_grad()
    def fork(self, state: Any, copies: int) -> list[State]:
        """Copies in the banks of those who step together."""
        span: Span = state.span
        with self._lock:
            made = [self._banks.keep(span, span.length + 1) for _ in range(copies)]
        span.bank.remove(span)
        none = np.zeros(0, dtype=np.int64)
        return [_FlatSequence(none, span) for span in made]

    @torch.no_grad()
    def step(self, states: Sequence[Any], tokens: Sequence[int]) -> Tensor:
        """One token for each, in as few steps as the numbers of rows allow."""
        with self._lock:
            for state in states:
                state.span = self._banks.grown(state.span)
            order = in_order([state.span for state in states])
            most = self.rows
            parts = [
                self._step([states[i].span for i in rows], [tokens[i] for i in rows])
                for rows in (order[first : first + most] for first in range(0, len(order), most))
            ]
        back = np.empty(len(order), dtype=np.int64)
        back[order] = np.arange(len(order))
        return torch.cat(parts)[torch.from_numpy(back).to(parts[0].device)]

    def free(self, state: Any) -> None:
        """Give its place in the bank back."""
        with self._lock, torch.no_grad():
            state.span.bank.remove(state.span)

    def close(self) -> None:
        """Let go of all keys and values, and of the packed weights."""
        self._open.close()
        self._banks = Banks()

    def _step(self, spans: Sequence[Span], tokens: Sequence[int]) -> Tensor:
        size = next(size for size in self.sizes if size >= len(spans))
        fill = [0] * (size - len(spans))
        positions = [self._first + span.length for span in spans]
        step = StepAttention(spans, self.network.device)
        hidden_NH = self._run(
            torch.tensor([*tokens, *fill]), torch.tensor([*positions, *fill]), step
        )
        for span in spans:
            span.length += 1
        return self._logits(hidden_NH)[: len(spans)]

    def _run(self, ids_N: Tensor, position_N: Tensor, attention: Any) -> Tensor:
        device = self.network.device
        output = self.network.model.base_model(
            input_ids=ids_N[None].to(device),
            position_ids=position_N[None].to(device),
            tree=attention,
            use_cache=False,
        )
        hidden_NH: Tensor = output.last_hidden_state[0]
        return hidden_NH

    def _logits(self, hidden_NH: Tensor) -> Tensor:
        head = packed_weight(self.network.model.get_output_embeddings())
        if head is None:
            return self.network.logits(hidden_NH)
        return head.product(self.network.before_vocabulary(hidden_NH))

    @torch.no_grad()
    def _probe(self) -> tuple[int, ...]:
        """The numbers of rows that give each row the same bits, whatever is beside it.

        Where none does, each sequence steps by itself.
        """
        size = int(self.network.model.config.vocab_size)
        ids = np.random.default_rng(0).integers(size // 2, size, SIZES[-1])
        whole = self._probe_logits(ids)
        moved = self._probe_logits(
            np.roll(ids, PROBES) + np.where(np.arange(len(ids)) < PROBES, -1, 0)
        )
        if not torch.equal(moved[PROBES : 2 * PROBES], whole[:PROBES]):
            return (1,)
        sizes = [SIZES[-1]]
        # From the largest down: a small one that agrees by luck below one that does not is left out.
        for count in reversed(SIZES[:-1]):
            parts = [self._probe_logits(ids[at : at + count]) for at in range(0, PROBES, count)]
            if not torch.equal(torch.cat(parts)[:PROBES], whole[:PROBES]):
                break
            sizes.insert(0, count)
        return tuple(sizes)

    def _probe_logits(self, ids: IntArray) -> Tensor:
        """Logits behind sequences of the same token twice."""
        banks = Banks()
        spans = [banks.keep(Bank(room_for(1)).add(), 1) for _ in ids]
        ids_N = torch.from_numpy(ids.astype(np.int64))
        for place in range(2):
            attention = StepAttention(spans, self.network.device)
            hidden_NH = self._run(ids_N, torch.full_like(ids_N, self._first + place), attention)
            for span in spans:
                span.length += 1
        return self._logits(hidden_NH)


class _ForwardSequence:
    """A sequence of :class:`ForwardBackend`, a row of its group once it is read."""

    def __init__(self, ids_T: IntArray) -> None:
        self.ids_T, self.unread = ids_T, len(ids_T)
        self.group: _Group | None = None


class _Group:
    """Sequences that were read together: one batch of the network's own cache."""

    def __init__(self, cache: Any, rows: Sequence[_ForwardSequence]) -> None:
        self.cache = cache
        self.encoded_RSH: Tensor | None = None
        """What an encoder made of the prompts."""
        self.mask_RS: Tensor | None = None
        self._hold(rows)

    def select(self, places: Sequence[int], rows: Sequence[_ForwardSequence]) -> None:
        """Go on with ``rows``, whose caches are those at ``places`` now."""
        if self.encoded_RSH is not None:
            index_R = torch.tensor(places, device=self.encoded_RSH.device)
            self.cache.reorder_cache(index_R)
            self.encoded_RSH = self.encoded_RSH[index_R]
            self.mask_RS = None if self.mask_RS is None else self.mask_RS[index_R]
        else:
            self.cache = self.cache.select(torch.tensor(places))
        self._hold(rows)

    def _hold(self, rows: Sequence[_ForwardSequence]) -> None:
        self.rows = list(rows)
        for row in rows:
            row.group, row.unread = self, 0


class ForwardBackend:
    """Networks that need their own forward and cache.

    Each sequence runs by itself; those whose prompts are read together step together, where the cache
    can be parted again (an encoder-decoder's, and those of networks of ours).
    """

    rows = 1

    def __init__(self, network: Network, context: int, encoded_RSH: Tensor | None = None) -> None:
        """``encoded_RSH`` are prompts that the encoder has read: one is then the number of its row."""
        self.network, self.context = network, context
        self._encoded_RSH = encoded_RSH
        model = network.model
        self._beside = heads.decoder_of(model) is not None
        config = text_config(model.config)
        layers = int(getattr(config, "num_hidden_layers", 1))
        width = torch.empty(0, dtype=network.dtype).element_size()
        self._bytes = 2 * layers * int(config.hidden_size) * width * (2 if self._beside else 1)

    def bytes_of(self, tokens: int) -> int:
        """Memory that a sequence of ``tokens`` takes, by the size of the network's states."""
        return tokens * self._bytes

    def open(self, ids_T: IntArray) -> State:
        """A sequence with nothing read."""
        return _ForwardSequence(ids_T)

    def prefill(self, state: Any) -> Tensor | None:
        """Read the whole prompt."""
        return self._read([state])[0]

    def prefill_batch(self, prompts: Sequence[IntArray], copies: int) -> tuple[list[State], Tensor]:
        """Read them as one rectangle, where the cache can be parted again."""
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
        """The prompt is read again for each further copy: not all of these caches can be copied."""
        made: list[State] = [state]
        for _ in range(copies - 1):
            again = self.open(state.ids_T)
            self.prefill(again)
            made.append(again)
        return made

    @torch.no_grad()
    def step(self, states: Sequence[Any], tokens: Sequence[int]) -> Tensor:
        """One group after the other; rows of a group that take no step here are let go of."""
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
        """Forget its cache; what it is in a group goes with the next step of the others."""
        state.group = None

    def close(self) -> None:
        """Nothing is kept here."""

    @torch.no_grad()
    def _read(self, rows: list[_ForwardSequence], group: _Group | None = None) -> Tensor:
        """Logits ``[R, V]`` behind the prompts of ``rows``, which are a group from now on."""
        model, device = self.network.model, self.network.device
        group = group or _Group(None, rows)
        group.cache = prefix_cache(model, rows=len(rows))
        # Beside a decoder a prompt is filled up at its end, else before its first token.
        width = max(len(row.ids_T) for row in rows)
        ids_RT = np.full((len(rows), width), heads.filling_id(model), dtype=np.int64)
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
        return self._forward(group, torch.full((len(rows), 1), heads.decoder_start(model)))

    def _forward(self, group: _Group, ids_RT: Tensor, mask_RT: Tensor | None = None) -> Tensor:
        backbone: Any = self.network.model.base_model
        further: dict[str, Any] = {} if mask_RT is None else {"attention_mask": mask_RT}
        if group.encoded_RSH is not None:
            backbone = heads.decoder_of(self.network.model)
            further["encoder_hidden_states"] = group.encoded_RSH
            further["encoder_attention_mask"] = group.mask_RS
        out = backbone(
            input_ids=ids_RT.to(self.network.device),
            past_key_values=group.cache,
            use_cache=True,
            **further,
        )
        group.cache = out.past_key_values
        return self.network.logits(out.last_hidden_state[:, -1])
