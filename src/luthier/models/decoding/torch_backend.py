"""The PyTorch backend.

On the flat layout, the next tokens of all sequences form the rows of one matrix, and each row
attends to its own keys and values. Prompts are prefilled in chunks, several prompts at once. With
few sequences, additional rows verify guesses of the next tokens
(:mod:`luthier.models.decoding.speculation`): a correct guess saves a step.

Kernels may sum in another order for other numbers of rows, so a sequence can round differently in a
batch. A sequence alone always has the same shapes.

Networks without the flat layout use :mod:`luthier.models.decoding.forward_backend`.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from luthier.data.tree import build_tree, split_to_budget
from luthier.models.decoding.backends import read_prompts
from luthier.models.decoding.forward_backend import ForwardBackend
from luthier.models.decoding.kv_cache import (
    CHUNK,
    Bank,
    Banks,
    Chunk,
    ChunkAttention,
    KeyValues,
    Span,
    StepAttention,
    keys_for,
    room_for,
    step_order,
)
from luthier.models.decoding.lora_batch import Adapter, LoraBatch
from luthier.models.decoding.packing import PackedLinears, packed_weight
from luthier.models.decoding.speculation import PromptLookup, Speculation
from luthier.models.networks.attention import RecordingAttention
from luthier.models.networks.layers import first_layer_alone
from luthier.models.networks.layouts import Flat
from luthier.models.networks.llama_forward import LlamaForward
from luthier.models.networks.long_rope import LONG_ROW
from luthier.models.networks.modalities import cached_numbers, layer_configs
from luthier.models.networks.prefix import prefix_tokens
from luthier.types import Example

if TYPE_CHECKING:
    from luthier.models.decoding.backends import Backend, State
    from luthier.models.networks.network import Network
    from luthier.types import IntArray

ROWS = 64
"""Maximum number of sequences per step."""
GUESSING = 8
"""Number of rows up to which a step takes little longer than one row. Guesses fill the step."""
PREFILL_TOKENS = 8192
"""Maximum number of prompt tokens per batched prefill."""
TRIAL_ROWS = (2, 8, 64)
"""Row counts for the comparison of :class:`LlamaForward` with the modules."""


NOTHING: IntArray = np.zeros(0, dtype=np.int64)


def torch_backend(network: Network, context: int, packs: bool = True) -> Backend:
    """Open a network; see :data:`luthier.models.decoding.backends.OpenBackend`.

    Without ``packs`` there is no second copy of the weights, and steps take twice as long.
    """
    if not isinstance(network.layout, Flat):
        return ForwardBackend(network, context)
    if network.base is None:
        return FlatBackend(network, context, packs)
    alone = FlatBackend(network.base, context, packs)
    return AdaptedBackend(alone, network, context, alone=True)


class _FlatSequence:
    """A sequence of :class:`FlatBackend`."""

    def __init__(
        self, ids_T: IntArray, span: Span, lookup: PromptLookup, adapter: Adapter, is_long: bool
    ) -> None:
        """``ids_T`` is to be read; ``lookup`` knows the whole prompt; ``is_long`` for LongRoPE's
        long factors (:mod:`luthier.models.networks.long_rope`)."""
        self.ids_T, self.span, self.read, self.lookup = ids_T, span, 0, lookup
        self.adapter, self.is_long = adapter, is_long
        self.guess: list[int] = []
        """Guessed tokens, with keys and values after the sequence's own."""
        self.logits: list[Tensor] = []
        """``[V]`` behind each guessed token."""
        self.right = 0
        """Number of accepted tokens of the last guess."""
        self.proposed = self.accepted = 0
        """Total numbers of guessed and of accepted tokens."""

    @property
    def unread(self) -> int:
        return len(self.ids_T) - self.read

    def accept(self, token: int) -> Tensor | None:
        """Append ``token``; return the next logits if the token was guessed."""
        self.lookup.append(token)
        if self.guess and self.guess[0] == token:
            # The step that checked the guess already stored its keys, values and logits.
            self.span.length += 1
            self.right += 1
            self.accepted += 1
            del self.guess[0]
            return self.logits.pop(0)
        # Keys and values of wrong guesses lie behind `span.length` and are overwritten.
        if self.logits or self.right:
            self.lookup.learn(self.right)
        self.guess, self.logits, self.right = [], [], 0
        return None


class FlatBackend:
    """A network on the flat layout: all sequences step together. Safe to share between threads."""

    rows, sequences = ROWS, sys.maxsize

    def __init__(self, network: Network, context: int, packs: bool = True) -> None:
        self.network, self.context, self._layout = network, context, network.layout
        self.device = network.device
        assert isinstance(self._layout, Flat)
        self._first = self._layout.first_position
        self._last = self._first + network.context - 1
        self._before = prefix_tokens(network.model)
        self._border = network.longrope_border or sys.maxsize
        self._packed = PackedLinears(network.model) if packs else nullcontext()
        self._packed.__enter__()
        self._banks = Banks()
        layers = layer_configs(network.model.config)
        numbers = sum(cached_numbers(layer) for layer in layers)
        self._bytes = numbers * network.dtype.itemsize
        # A step moves sequences between banks, which other threads must not observe.
        self._lock = threading.RLock()
        self._base, self._batch = Adapter(), LoraBatch(network)
        self._llama: LlamaForward | None = None
        # Helium and Ernie 4.5 have Llama's module names but other rotary embeddings, so equal
        # names are no proof.
        if self.device.type == "cpu" and LlamaForward.fits(network.model):
            uses = network.uses_llama_forward if packs else None
            if uses is None:
                uses = self._equals_modules()
            if packs:  # results can differ without packing, and while a probe computes in float32
                network.uses_llama_forward = uses
            self._llama = LlamaForward(network.model) if uses else None

    def with_adapter(self, network: Network, context: int) -> Backend:
        """Return a backend for ``network``, an adapter on this backend's network."""
        return AdaptedBackend(self, network, context)

    def add_adapter(self, network: Network) -> Adapter:
        """Add the adapter of ``network``."""
        adapter = Adapter.of(network, self.network)
        with self._lock:
            self._batch.add(adapter)
        return adapter

    def remove_adapter(self, adapter: Adapter) -> None:
        """Remove an adapter once it has no open sequences."""
        with self._lock:
            adapter.is_closed = True
            self._batch.remove_unused(adapter)

    def bytes_of(self, tokens: int) -> int:
        """Return the maximum memory of a sequence of ``tokens`` tokens, in bytes."""
        return room_for(tokens + self._before) * self._bytes

    def open(
        self, ids_T: IntArray, start: KeyValues | None = None, adapter: Adapter | None = None
    ) -> State:
        """Open a sequence after the cached prefix ``start``, in its own bank until the prefill
        ends."""
        adapter = adapter or self._base
        span = Bank(keys_for(self._before + len(ids_T))).add()
        is_long = self._before + len(ids_T) > self._border
        state = _FlatSequence(ids_T, span, PromptLookup(ids_T.tolist()), adapter, is_long)
        if start is not None:
            state.read = span.length = len(start)
            for layer, (key, value) in start.layers.items():
                all_k, all_v = span.bank.of(layer, key[None], value[None])
                all_k[span.slot, :, : state.read], all_v[span.slot, :, : state.read] = key, value
        with self._lock:
            adapter.sequences += 1  # last, so that an earlier error leaves no open sequence
        return state

    @property
    def reuses(self) -> bool:
        """See :attr:`luthier.models.decoding.backends.ReusesKeyValues.reuses`."""
        # Keys of a short prompt have other LongRoPE factors than keys of a long prompt.
        return not self._before and self._border == sys.maxsize

    def key_values(self, state: Any, start: int, end: int) -> KeyValues:
        """Copy the keys and values of a prompt from token ``start`` to ``end``."""
        span: Span = state.span
        return KeyValues(
            {
                layer: (
                    key[span.slot, :, start:end].clone(),
                    value[span.slot, :, start:end].clone(),
                )
                for layer, (key, value) in span.bank.layers.items()
            }
        )

    @torch.no_grad()
    def prefill(self, states: Sequence[Any]) -> list[Tensor | None]:
        """Read the next chunk of each prompt; neighbours of up to ``CHUNK`` tokens run at once."""
        logits: list[Tensor | None] = []
        part: list[Any] = []
        rows = 0
        for state in states:
            size = Chunk.of(state.span, 0, state.unread, self._before).count
            if part and rows + size > CHUNK:
                logits += self._prefill(part)
                part, rows = [], 0
            part.append(state)
            rows += size
        return logits + self._prefill(part)

    def _prefill(self, states: Sequence[Any]) -> list[Tensor | None]:
        chunks: list[Chunk] = []
        for state in states:
            first = chunks[-1].first + chunks[-1].count if chunks else 0
            chunks.append(Chunk.of(state.span, first, state.unread, self._before))
        ids_N = np.concatenate(
            [
                state.ids_T[state.read : state.read + chunk.count]
                for state, chunk in zip(states, chunks, strict=True)
            ]
        )
        position_N = self._first + np.concatenate(
            [
                np.arange(chunk.start, chunk.end) + LONG_ROW * state.is_long
                for state, chunk in zip(states, chunks, strict=True)
            ]
        )
        attention = ChunkAttention(chunks, self.network.device, self.network.dtype)
        # Another thread may add an adapter, which replaces the network.
        with self._lock:
            model = self._batch.model_of(
                [
                    state.adapter
                    for state, chunk in zip(states, chunks, strict=True)
                    for _ in range(chunk.count)
                ]
            )
            hidden_NH = self._run(
                model, torch.from_numpy(ids_N), torch.from_numpy(position_N), attention
            )
        for state, chunk in zip(states, chunks, strict=True):
            state.read += chunk.count
            state.span.length = chunk.end
        last = [
            chunk.first + chunk.count - 1
            for state, chunk in zip(states, chunks, strict=True)
            if not state.unread
        ]
        if not last:
            return [None] * len(states)
        logits = iter(self._logits(hidden_NH[last]))
        return [None if state.unread else next(logits) for state in states]

    @torch.no_grad()
    def prefill_batch(self, prompts: Sequence[IntArray], copies: int) -> tuple[list[State], Tensor]:
        """Prefill the prompts as a token tree: each distinct prefix is computed once."""
        network, before = self.network, self._before
        assert isinstance(self._layout, Flat)
        read: dict[int, State] = {}
        rows = [
            Example(prompt_T, np.zeros(len(prompt_T), dtype=np.float32), index)
            for index, prompt_T in enumerate(prompts)
        ]
        last: dict[int, Tensor] = {}
        for part in (
            part
            for kind in network.split_by_factors(rows)
            for part in split_to_budget(kind, PREFILL_TOKENS, network.shares)
        ):
            batch = network.batch(build_tree(part, network.shares))
            plan = RecordingAttention(batch.plan)
            hidden_NH = self._layout.run_with(network.model.base_model, batch, plan)
            for row, leaf in zip(
                batch.tree.row_R.tolist(), batch.tree.leaf_R.tolist(), strict=True
            ):
                # Recorded keys begin with the prefix, which all rows share.
                path = before + batch.tree.path(leaf)
                place_P = torch.from_numpy(np.concatenate([np.arange(before), path]))
                place_P = place_P.to(network.device)
                span = Bank(room_for(len(place_P))).add()
                span.length = len(place_P)
                for layer, (key, value) in plan.layers.items():
                    pair = span.bank.of(layer, key[None], value[None])
                    for mine, part_HND in zip(pair, (key, value), strict=True):
                        mine[span.slot, :, : span.length] = part_HND[:, place_P]
                lookup = PromptLookup(prompts[row].tolist())
                is_long = span.length > self._border
                read[row] = _FlatSequence(NOTHING, span, lookup, self._base, is_long)
                last[row] = hidden_NH[leaf]
        logits_UV = self._logits(torch.stack([last[row] for row in range(len(prompts))]))
        states = [own for row in range(len(prompts)) for own in self.fork(read[row], copies)]
        return states, logits_UV.repeat_interleave(copies, 0)

    @torch.no_grad()
    def fork(self, state: Any, copies: int) -> list[State]:
        """Copy a sequence into the shared banks."""
        span: Span = state.span
        made: list[Span] = []
        with self._lock:
            try:
                for _ in range(copies):
                    made.append(self._banks.copy(span, span.length + 1))
            except BaseException:  # out of memory
                for own in made:
                    own.bank.remove(own)
                raise
            # The copies replace the original sequence.
            state.adapter.sequences += copies - 1
        span.bank.remove(span)
        return [
            _FlatSequence(NOTHING, own, state.lookup.copy(), state.adapter, state.is_long)
            for own in made
        ]

    @torch.no_grad()
    def step(self, states: Sequence[Any], tokens: Sequence[int]) -> Tensor:
        """Append a token to each sequence, in steps of up to :data:`ROWS` rows."""
        with self._lock:
            logits = [state.accept(token) for state, token in zip(states, tokens, strict=True)]
            left = [place for place, row in enumerate(logits) if row is None]
            for place in left:
                self._lengthen(states[place])
                states[place].span = self._banks.with_room(states[place].span)
            # Sorted before the split, so that each part covers adjacent slots of few banks.
            left = [left[i] for i in step_order([(states[place].span, 0) for place in left])]
            for first in range(0, len(left), self.rows):
                part = left[first : first + self.rows]
                found = self._step([states[i] for i in part], [tokens[i] for i in part])
                for place, row_V in zip(part, found, strict=True):
                    logits[place] = row_V
        return torch.stack([row_V for row_V in logits if row_V is not None])

    def _lengthen(self, state: Any) -> None:
        """Encode a sequence again that exceeds the short LongRoPE factors with its last token."""
        if state.is_long or state.span.length < self._border:
            return
        state.ids_T, state.read, state.is_long = np.array(state.lookup.ids[:-1]), 0, True
        state.span.length = 0
        while state.unread:
            self._prefill([state])

    def speculation(self, state: Any) -> Speculation:
        """Return the counts of guesses for a sequence so far."""
        return Speculation(state.proposed, state.accepted)

    def free(self, state: Any) -> None:
        """Free the slot of a sequence."""
        with self._lock, torch.no_grad():
            try:  # shrinking a bank allocates memory and may fail
                state.span.bank.remove(state.span)
            finally:
                state.adapter.sequences -= 1
                self._batch.remove_unused(state.adapter)

    def close(self) -> None:
        """Drop all keys and values, the adapters, and the packed weights."""
        self._packed.__exit__(None, None, None)
        self._banks, self._batch = Banks(), LoraBatch(self.network)

    def _step(self, states: Sequence[Any], tokens: Sequence[int]) -> list[Tensor]:
        """Return the next logits ``[V]`` of each sequence. Logits after guesses are stored in the
        states."""
        self._guess(states)
        rows, row_tokens = [(state.span, 0) for state in states], [*tokens]
        adapters = [state.adapter for state in states]
        for state in states:
            rows += [(state.span, ahead) for ahead in range(1, len(state.guess) + 1)]
            row_tokens += state.guess
            adapters += [state.adapter] * len(state.guess)
        order = step_order(rows)
        long = [state.is_long for state in states]
        long += [state.is_long for state in states for _ in state.guess]
        # Guesses may exceed the position table.
        positions = [
            min(self._first + rows[i][0].length + rows[i][1], self._last) + LONG_ROW * long[i]
            for i in order
        ]
        hidden_NH = self._run(
            self._batch.model_of([adapters[i] for i in order]),
            torch.tensor([row_tokens[i] for i in order]),
            torch.tensor(positions),
            StepAttention([rows[i] for i in order], self.network.device, self.network.dtype),
        )
        row_of = dict(zip(order, self._logits(hidden_NH), strict=True))
        behind = iter(range(len(states), len(rows)))
        for state in states:
            state.span.length += 1
            state.logits = [row_of[next(behind)] for _ in state.guess]
        return [row_of[place] for place in range(len(states))]

    def _guess(self, states: Sequence[Any]) -> None:
        """Guess the next tokens of ``states`` for the unused rows of the step."""
        spare = GUESSING - len(states)
        if spare < 1:
            return
        for place, state in enumerate(states):
            # Guesses use free room only: a wrong guess must not move a sequence to a larger bank.
            room = state.span.bank.room - state.span.length - 1
            if not state.is_long:
                room = min(room, self._border - state.span.length - 1)
            # Rows that one sequence leaves unused remain for the following sequences.
            state.guess = state.lookup.guess(min(spare // (len(states) - place), room))
            spare -= len(state.guess)
            state.proposed += len(state.guess)

    def _run(self, model: Any, ids_N: Tensor, position_N: Tensor, attention: Any) -> Tensor:
        device = self.network.device
        ids_N, position_N = ids_N.to(device), position_N.to(device)
        if self._llama:
            return self._llama(model.base_model, ids_N, position_N, attention)
        output = model.base_model(
            input_ids=ids_N[None], position_ids=position_N[None], tree=attention, use_cache=False
        )
        hidden_NH: Tensor = output.last_hidden_state[0]
        return hidden_NH

    @torch.no_grad()
    def _equals_modules(self) -> bool:
        """Return True if :class:`LlamaForward` and the modules give bitwise equal states."""
        network = self.network
        fast_forward = LlamaForward(network.model)
        vocabulary = int(network.model.config.vocab_size)
        with first_layer_alone(network.model):
            for count in TRIAL_ROWS:
                # Different tokens per position: equal values would hide errors in rotary embeddings.
                ids = np.random.default_rng(count).integers(0, vocabulary, (4, count))
                self._llama = None
                expected = self._trial_states(ids)
                self._llama = fast_forward
                # Equal, because similar networks may differ little (a layer without positions).
                if not torch.equal(self._trial_states(ids), expected):
                    return False
        return True

    def _logits(self, hidden_NH: Tensor) -> Tensor:
        head = packed_weight(self.network.model.get_output_embeddings())
        if head is None:
            return self.network.logits(hidden_NH)
        return self.network.cap_logits(head.product(self.network.before_vocabulary(hidden_NH)))

    def _trial_states(self, ids_TN: IntArray) -> Tensor:
        """Return states ``[N, H]`` behind the last tokens of short sequences.

        The positions are spread over the whole context: Ministral 3 scales queries at far positions.
        """
        last = min(self.network.context, 1 << 20) - 1
        banks = Banks()
        spans = [banks.copy(Bank(room_for(1)).add(), 1) for _ in ids_TN[0]]
        for place, ids in enumerate(ids_TN):
            ids_N = torch.from_numpy(ids.astype(np.int64))
            attention = StepAttention(
                [(span, 0) for span in spans], self.network.device, self.network.dtype
            )
            position = place if place < len(ids_TN) - 2 else last >> (len(ids_TN) - 1 - place)
            positions_N = torch.full_like(ids_N, self._first + position)
            next_N = (ids_N + place) % int(self.network.model.config.vocab_size)
            hidden_NH = self._run(self.network.model, next_N, positions_N, attention)
            for span in spans:
                span.length += 1
        return hidden_NH


class AdaptedBackend:
    """A view of :class:`FlatBackend` for an adapter. Sequences of all views share steps."""

    def __init__(
        self, base: FlatBackend, network: Network, context: int, alone: bool = False
    ) -> None:
        """Initialize the view. ``alone`` if nothing else uses ``base``."""
        self.network, self.device = network, base.device
        self.rows, self.sequences = base.rows, base.sequences
        self.context = min(context, base.context)
        self._base, self._alone = base, alone
        self._adapter = base.add_adapter(network)
        self.bytes_of, self.reuses = base.bytes_of, base.reuses
        self.key_values, self.prefill, self.fork = base.key_values, base.prefill, base.fork
        self.step, self.speculation, self.free = base.step, base.speculation, base.free

    def open(self, ids_T: IntArray, start: KeyValues | None = None) -> State:
        """Open a sequence with the adapter."""
        return self._base.open(ids_T, start, self._adapter)

    def prefill_batch(self, prompts: Sequence[IntArray], copies: int) -> tuple[list[State], Tensor]:
        """See :meth:`luthier.models.decoding.backends.Backend.prefill_batch`."""
        # The token tree of FlatBackend runs the base network without adapters.
        return read_prompts(self, prompts, copies)

    def close(self) -> None:
        """Remove the adapter, and all keys and values if nothing else uses the base."""
        if self._alone:
            self._base.close()
        else:
            self._base.remove_adapter(self._adapter)
