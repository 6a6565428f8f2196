"""The backend of our own: networks run by torch.

On the flat layout all sequences take their steps together: their next tokens go through the layers as
the rows of one matrix, and each looks at its own keys and values. What a row gives must not depend on
the others, to the last bit. As a product's rows are computed alike for most numbers of rows, but not
for all of them (with one row, kernels of another kind may be taken), steps are filled up to numbers of
rows that give the same bits. A server probes the network for them. Others take those that pass wherever
it was tried: they give the server's bits where it finds them too, and run at full speed where it does
not. Prompts are read in chunks, several prompts at once, and from where an earlier one parts from them,
if that gives the same bits; else each alone, from multiples of :data:`CHUNK` on.

The rows that fill up a step of few sequences check guesses of what these write next
(:mod:`luthier.models.speculation`): a token that was guessed right costs no step of its own.

Networks that have no flat layout run by their own forward and cache
(:mod:`luthier.models.forward_backend`).
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from luthier.data.tree import build_tree, round_up, split_to_budget
from luthier.models.attention import AttentionPlan
from luthier.models.forward_backend import ForwardBackend
from luthier.models.kv_cache import (
    CHUNK,
    CHUNK_STEP,
    STEP,
    Bank,
    Banks,
    Chunk,
    ChunkAttention,
    KeyValues,
    Span,
    StepAttention,
    StepRow,
    keys_for,
    room_for,
    step_order,
)
from luthier.models.layers import first_layer_alone
from luthier.models.layouts import Flat
from luthier.models.llama_forward import LlamaForward
from luthier.models.modalities import head_size, key_heads
from luthier.models.packing import packed_linears, packed_weight
from luthier.models.row_adapters import Adapter, SharedBase
from luthier.models.speculation import PromptLookup, Speculation
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
GUESSING = 8
"""Rows of a step of fewer sequences, where guesses fill them: they take little more time than one."""
PROBES = 16
"""Rows that are compared when a network is probed."""
PREFILL_TOKENS = 8192
"""Tokens of prompts that run at once where many are read together."""


NOTHING: IntArray = np.zeros(0, dtype=np.int64)


def torch_backend(
    network: Network, context: int, exact: bool = False, packs: bool = True
) -> Backend:
    """See :data:`luthier.models.backends.OpenBackend`.

    Without ``packs`` there is no second copy of the weights, and steps take twice as long.
    """
    if not isinstance(network.layout, Flat):
        return ForwardBackend(network, context)
    if network.base is None:
        return FlatBackend(network, context, exact, packs)
    alone = FlatBackend(network.base, context, exact, packs)
    return AdaptedBackend(alone, network, context, alone=True)


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

    def __init__(self, ids_T: IntArray, span: Span, lookup: PromptLookup, adapter: Adapter) -> None:
        """``ids_T`` is to be read; ``lookup`` knows the whole prompt."""
        self.ids_T, self.span, self.read, self.lookup = ids_T, span, 0, lookup
        self.adapter = adapter
        """What its keys and values are made with; the base itself is one without layers."""
        self.guess: list[int] = []
        """Tokens whose keys and values stand behind its own, in case that they are written next."""
        self.logits: list[Tensor] = []
        """``[V]`` behind each of them."""
        self.right = 0
        """How many of the guess were written."""
        self.proposed = self.accepted = 0
        """Of all guesses, the tokens and those of them that were written."""

    @property
    def unread(self) -> int:
        return len(self.ids_T) - self.read

    def accept(self, token: int) -> Tensor | None:
        """Logits behind ``token``, which is written now, where it was guessed."""
        self.lookup.append(token)
        if self.guess and self.guess[0] == token:
            self.span.length += 1
            self.right += 1
            self.accepted += 1
            del self.guess[0]
            return self.logits.pop(0)
        if self.logits or self.right:
            self.lookup.learn(self.right)
        self.guess, self.logits, self.right = [], [], 0
        return None


class FlatBackend:
    """Networks on the flat layout: all sequences step together. Safe to share between threads."""

    sequences = sys.maxsize

    def __init__(
        self, network: Network, context: int, exact: bool = False, packs: bool = True
    ) -> None:
        window = getattr(network.model.config, "sliding_window", None)
        # Attention here sees everything; where a network would forget, a sequence ends.
        self.context = min(context, window) if isinstance(window, int) and window else context
        self.network, self._layout = network, network.layout
        self.device = network.device
        assert isinstance(self._layout, Flat)
        self._first = self._layout.first_position
        # Rows that fill up, guesses and probes may stand behind it, where a table of positions ends.
        self._last = self._first + network.context - 1
        self._open = ExitStack()
        if packs:
            self._open.enter_context(packed_linears(network.model))
        self._banks = Banks()
        config = network.model.config
        numbers = 2 * int(config.num_hidden_layers) * key_heads(config) * head_size(config)
        self._bytes = numbers * network.dtype.itemsize
        # A step moves sequences in the banks: no other thread may be looking.
        self._lock = threading.RLock()
        self._base = Adapter.base(network)
        self._llama: LlamaForward | None = None
        self._llama = self._llama_forward(grouped=not exact)
        self.sizes: tuple[int, ...] = SIZES
        self.divisible = True
        """Whether a prompt has the same bits wherever its chunks begin, whatever is read beside it."""
        if exact:
            self.sizes = self._exact_sizes()
        self.rows, self._exact = self.sizes[-1], exact
        self._shared = SharedBase(network, self.sizes)
        if exact:
            with first_layer_alone(network.model):
                self.divisible = len(self.sizes) > 1 and self._probe_chunks()

    def with_adapter(self, network: Network, context: int) -> Backend:
        """A backend for ``network``, which is this one's with an adapter; both step together."""
        return AdaptedBackend(self, network, context)

    def add_adapter(self, network: Network) -> Adapter:
        """Take in what makes ``network`` another one than the base."""
        adapter = self._shared.adapter_of(network)
        with self._lock:
            self._shared.add(adapter)
        return adapter

    def remove_adapter(self, adapter: Adapter) -> None:
        """Let go of an adapter that nothing new is asked of."""
        with self._lock:
            self._shared.remove(adapter)

    def bytes_of(self, tokens: int, adapter: Adapter | None = None) -> int:
        """Memory that a sequence of ``tokens`` takes at most."""
        adapter = adapter or self._base
        tokens += adapter.before + CHUNK_STEP
        return max(room_for(tokens), keys_for(tokens)) * self._bytes

    def open(
        self, ids_T: IntArray, start: KeyValues | None = None, adapter: Adapter | None = None
    ) -> State:
        """A sequence in a bank of its own until its prompt is read, which goes on behind ``start``."""
        adapter = adapter or self._base
        span = Bank(keys_for(adapter.before + len(ids_T))).add()
        state = _FlatSequence(ids_T, span, PromptLookup(ids_T.tolist()), adapter)
        if start is not None:
            state.read = span.length = len(start)
            for layer, (key, value) in start.layers.items():
                all_k, all_v = span.bank.of(layer, key[None], value[None])
                all_k[span.slot, :, : state.read], all_v[span.slot, :, : state.read] = key, value
        with self._lock:
            self._shared.enter(adapter)  # last: what fails before has begun no sequence
        return state

    def reusable(self, tokens: int, adapter: Adapter | None = None) -> int:
        """Behind how many of so many tokens another prompt can go on with the bits it has alone."""
        adapter = adapter or self._base
        if adapter.before:
            return 0
        return tokens if self._divides(adapter) else tokens // CHUNK * CHUNK

    def _divides(self, adapter: Adapter) -> bool:
        """Whether a prompt that ``adapter`` reads has the same bits however it is divided."""
        return self.divisible and (adapter.bits is None or adapter.bits.divides)

    def key_values(self, state: Any, start: int, end: int) -> KeyValues:
        """A copy of those of a prompt that was read, from the token ``start`` on."""
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
        """Read the next chunk of each prompt; neighbours of ``CHUNK`` tokens together at once."""
        logits: list[Tensor | None] = []
        part: list[Any] = []
        rows = 0
        for state in states:
            size = Chunk.of(state.span, 0, state.unread, state.adapter.before).size
            if part and not (rows + size <= CHUNK and self._may_share_pass(state, part[0])):
                logits += self._prefill(part)
                part, rows = [], 0
            part.append(state)
            rows += size
        return logits + self._prefill(part)

    def _may_share_pass(self, one: Any, other: Any) -> bool:
        """Whether two prompts have the same bits beside each other as alone."""
        if one.adapter is other.adapter:
            return self._divides(one.adapter)
        return self.divisible and all(
            self._shared.mixes_prompts(each.adapter) for each in (one, other)
        )

    def _prefill(self, states: Sequence[Any]) -> list[Tensor | None]:
        # Another thread that takes in an adapter changes the network of all rows. What runs, and the
        # adapters' places in their stacks, stay as they are until the pass has ended.
        with self._lock:
            hidden_NH, chunks = self._run_chunks(
                [(state.span, state.ids_T[state.read :], state.adapter) for state in states]
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
        logits = iter(self._logits_of([hidden_NH[place] for place in last]))
        return [None if state.unread else next(logits) for state in states]

    def _run_chunks(
        self, prompts: Sequence[tuple[Span, IntArray, Adapter]]
    ) -> tuple[Tensor, list[Chunk]]:
        """States ``[N, H]`` of the next chunk of what each prompt still has."""
        chunks: list[Chunk] = []
        for span, ids_T, adapter in prompts:
            first = chunks[-1].first + chunks[-1].size if chunks else 0
            chunks.append(Chunk.of(span, first, len(ids_T), adapter.before))
        size = round_up(chunks[-1].first + chunks[-1].size, 2 * CHUNK_STEP)
        ids_N, position_N = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
        for chunk, (_, ids_T, _) in zip(chunks, prompts, strict=True):
            ids_N[chunk.first : chunk.first + chunk.count] = ids_T[: chunk.count]
            place = slice(chunk.first, chunk.first + chunk.size)
            position_N[place] = self._first + chunk.start + np.arange(chunk.size)
        attention = ChunkAttention(chunks, self.network.device)
        ids, positions = torch.from_numpy(ids_N), torch.from_numpy(position_N)
        model = prompts[0][2].model
        if self._shared.mixes_prompts(prompts[0][2]):
            model = self._shared.model_of_prompts(
                [
                    (adapter, slice(chunk.first, chunk.first + chunk.size))
                    for chunk, (*_, adapter) in zip(chunks, prompts, strict=True)
                ]
            )
        return self._run(model, ids, positions, attention), chunks

    def _logits_of(self, hidden_RH: Sequence[Tensor]) -> Tensor:
        """Logits of a few states, with the bits that each has alone."""
        parts = []
        for first in range(0, len(hidden_RH), self.rows):
            rows = [*hidden_RH[first : first + self.rows]]
            fill = [rows[0]] * (self._size_for(len(rows)) - len(rows))
            parts.append(self._logits(torch.stack([*rows, *fill]))[: len(rows)])
        return torch.cat(parts)

    def _size_for(self, count: int) -> int:
        return next(size for size in self.sizes if size >= count)

    @torch.no_grad()
    def prefill_batch(
        self, prompts: Sequence[IntArray], copies: int, adapter: Adapter | None = None
    ) -> tuple[list[State], Tensor]:
        """Read them in the token tree, as training does: each distinct beginning is computed once."""
        adapter = adapter or self._base
        network, before = adapter.network, adapter.before
        assert isinstance(self._layout, Flat)
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
                read[row] = _FlatSequence(NOTHING, span, lookup, adapter)
                with self._lock:
                    self._shared.enter(adapter)
                last[row] = hidden_NH[leaf]
        logits_UV = self._logits(torch.stack([last[row] for row in range(len(prompts))]))
        states = [own for row in range(len(prompts)) for own in self.fork(read[row], copies)]
        return states, logits_UV.repeat_interleave(copies, 0)

    @torch.no_grad()
    def fork(self, state: Any, copies: int) -> list[State]:
        """Copies in the banks of those who step together."""
        span: Span = state.span
        made: list[Span] = []
        with self._lock:
            try:
                for _ in range(copies):
                    made.append(self._banks.copy(span, span.length + 1))
            except BaseException:  # there was no memory for all of them
                for own in made:
                    own.bank.remove(own)
                raise
            self._shared.enter(state.adapter, copies - 1)
        span.bank.remove(span)
        return [_FlatSequence(NOTHING, own, state.lookup.copy(), state.adapter) for own in made]

    @torch.no_grad()
    def step(self, states: Sequence[Any], tokens: Sequence[int]) -> Tensor:
        """One token for each, in as few steps as the numbers of rows allow."""
        with self._lock:
            logits = [state.accept(token) for state, token in zip(states, tokens, strict=True)]
            left = [place for place, row in enumerate(logits) if row is None]
            for place in left:
                states[place].span = self._banks.with_room(states[place].span)
            left = [left[i] for i in step_order([(states[place].span, 0) for place in left])]
            for first in range(0, len(left), self.rows):
                part = left[first : first + self.rows]
                found = self._step([states[i] for i in part], [tokens[i] for i in part])
                for place, row_V in zip(part, found, strict=True):
                    logits[place] = row_V
        return torch.stack([row_V for row_V in logits if row_V is not None])

    def speculation(self, state: Any) -> Speculation:
        """What was guessed for a sequence so far."""
        return Speculation(state.proposed, state.accepted)

    def free(self, state: Any) -> None:
        """Give its place in the bank back."""
        with self._lock, torch.no_grad():
            try:  # to give the place back takes memory, and may fail
                state.span.bank.remove(state.span)
            finally:
                self._shared.leave(state.adapter)

    def close(self) -> None:
        """Let go of all keys and values, and of the packed weights."""
        self._open.close()
        self._banks, self._shared = Banks(), SharedBase(self.network, self.sizes)

    def _step(self, states: Sequence[Any], tokens: Sequence[int]) -> list[Tensor]:
        """Logits ``[V]`` behind a token of each; those behind what is guessed stay with the states."""
        self._guess(states)
        rows, row_tokens = [(state.span, 0) for state in states], [*tokens]
        adapters = [state.adapter for state in states]
        for state in states:
            rows += [(state.span, ahead) for ahead in range(1, len(state.guess) + 1)]
            row_tokens += state.guess
            adapters += [state.adapter] * len(state.guess)
        logits = self._step_rows(rows, row_tokens, adapters)
        behind = iter(logits[len(states) :])
        for state in states:
            state.span.length += 1
            state.logits = [next(behind) for _ in state.guess]
        return logits[: len(states)]

    def _step_rows(
        self, rows: Sequence[StepRow], tokens: Sequence[int], adapters: Sequence[Adapter]
    ) -> list[Tensor]:
        """Return logits ``[V]`` behind a token in each row, and store its keys and values.

        The lengths of the sequences do not change. There are at most ``self.rows``, and room for them.
        """
        order = step_order(rows)
        size = self._size_for(len(rows))
        fill = [0] * (size - len(rows))
        positions = [self._first + rows[i][0].length + rows[i][1] for i in order]
        hidden_NH = self._run(
            self._shared.model_of_step([adapters[i] for i in order], size),
            torch.tensor([*(tokens[i] for i in order), *fill]),
            torch.tensor([*positions, *fill]),
            StepAttention([rows[i] for i in order], self.network.device, self.network.dtype),
        )
        # Rows that only fill the step up stand behind the others.
        row_of = dict(zip(order, self._logits(hidden_NH), strict=False))
        return [row_of[place] for place in range(len(rows))]

    def _guess(self, states: Sequence[Any]) -> None:
        """Have ``states`` guess their next tokens, in rows that the step has to spare."""
        spare = GUESSING - len(states)
        if spare < 1 or GUESSING not in self.sizes:
            return
        for place, state in enumerate(states):
            room = state.span.bank.room - state.span.length - 1
            state.guess = state.lookup.guess(min(spare // (len(states) - place), room))
            spare -= len(state.guess)
            state.proposed += len(state.guess)

    def _run(self, model: Any, ids_N: Tensor, position_N: Tensor, attention: Any) -> Tensor:
        device = self.network.device
        ids_N, position_N = ids_N.to(device), position_N.clamp(max=self._last).to(device)
        # An adapter's own network may have other parts.
        if self._llama and (model is self.network.model or model is self._shared.mixed):
            return self._llama(model.base_model, ids_N, position_N, attention)
        output = model.base_model(
            input_ids=ids_N[None], position_ids=position_N[None], tree=attention, use_cache=False
        )
        hidden_NH: Tensor = output.last_hidden_state[0]
        return hidden_NH

    @torch.no_grad()
    def _llama_forward(self, grouped: bool) -> LlamaForward | None:
        """A faster forward pass with the same bits, where the network has one."""
        network = self.network
        if self.device.type != "cpu" or not LlamaForward.fits(network.model):
            return None
        made = LlamaForward(network.model, grouped)
        vocabulary = int(network.model.config.vocab_size)
        with first_layer_alone(network.model):
            # Of steps, and of the chunks of prompts that are no larger: kernels differ by the rows.
            for count in {*SIZES, *range(2 * CHUNK_STEP, SIZES[-1], 2 * CHUNK_STEP)}:
                ids = np.random.default_rng(count).integers(0, vocabulary, count)
                self._llama = None
                expected = self._probe_states(ids)
                self._llama = made
                try:
                    same = torch.equal(self._probe_states(ids), expected)
                except RuntimeError:  # Ernie 4.5 has the same names, and rotates in float32
                    same = False
                if not same:
                    return None
        return made

    def _logits(self, hidden_NH: Tensor) -> Tensor:
        head = packed_weight(self.network.model.get_output_embeddings())
        if head is None:
            return self.network.logits(hidden_NH)
        return head.product(self.network.before_vocabulary(hidden_NH))

    def _exact_sizes(self) -> tuple[int, ...]:
        """The numbers of rows that a step may have where no row may have other bits by it."""
        config = self.network.model.config
        large = int(config.num_attention_heads) * head_size(config) * STEP > SMALL
        if not large and self.network.dtype != torch.float32:
            return (1,)
        with first_layer_alone(self.network.model):
            return self._probe()

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
        """Return logits behind the sequences of :meth:`_probe_states`."""
        return self._logits(self._probe_states(ids))

    def _probe_states(self, ids: IntArray) -> Tensor:
        """Return states ``[N, H]`` behind sequences of a token of ``ids`` and the token after it.

        Two equal tokens would have equal values, and what the attention makes of positions (the
        interleaved rotation of Helium) would not show.
        """
        banks = Banks()
        spans = [banks.copy(Bank(room_for(1)).add(), 1) for _ in ids]
        ids_N = torch.from_numpy(ids.astype(np.int64))
        for place in range(2):
            attention = StepAttention(
                [(span, 0) for span in spans], self.network.device, self.network.dtype
            )
            positions_N = torch.full_like(ids_N, self._first + place)
            next_N = (ids_N + place) % int(self.network.model.config.vocab_size)
            hidden_NH = self._run(self.network.model, next_N, positions_N, attention)
            for span in spans:
                span.length += 1
        return hidden_NH

    @torch.no_grad()
    def _probe_chunks(self) -> bool:
        """Whether a chunk behind others has the same bits in parts, and beside another prompt."""
        size = int(self.network.model.config.vocab_size)
        ids = np.random.default_rng(1).integers(0, size, CHUNK)
        long = Bank(2 * CHUNK).add()
        self._run_chunks([(long, ids[:CHUNK_STEP], self._base)])  # makes its layers
        generator = torch.Generator(self.network.device).manual_seed(0)
        for pair in long.bank.layers.values():
            for part in pair:
                part.normal_(generator=generator)

        def read(parts: Sequence[int], beside: int = 0) -> Tensor:
            found, at = [], 0
            for count in parts:
                other = Bank(CHUNK).add()
                long.length = CHUNK + at
                prompts = [(long, ids[at : at + count], self._base)]
                if beside:
                    prompts.insert(0, (other, ids[:beside], self._base))
                hidden_NH, chunks = self._run_chunks(prompts)
                found.append(hidden_NH[chunks[-1].first :][:count])
                at += count
            return torch.cat(found)

        whole = read([64])
        return all(
            torch.equal(other, whole)
            for other in (read([9, 55]), read([64], CHUNK - 64), read([30, 34], 5))
        )


class AdaptedBackend:
    """A :class:`FlatBackend` for one adapter, whose sequences step with all others on the base."""

    def __init__(
        self, base: FlatBackend, network: Network, context: int, alone: bool = False
    ) -> None:
        """``network`` is that of ``base`` with the adapter. ``alone``: nobody else asks ``base``."""
        self.network, self.device = network, base.device
        self.rows, self.sequences = base.rows, base.sequences
        self.context = min(context, base.context)
        self._base, self._alone = base, alone
        self._adapter = base.add_adapter(network)

    def bytes_of(self, tokens: int) -> int:
        """Memory that a sequence of ``tokens`` takes at most."""
        return self._base.bytes_of(tokens, self._adapter)

    def open(self, ids_T: IntArray, start: KeyValues | None = None) -> State:
        """A sequence that the adapter reads and writes."""
        return self._base.open(ids_T, start, self._adapter)

    def reusable(self, tokens: int) -> int:
        """See :meth:`FlatBackend.reusable`."""
        return self._base.reusable(tokens, self._adapter)

    def key_values(self, state: State, start: int, end: int) -> KeyValues:
        """See :meth:`FlatBackend.key_values`."""
        return self._base.key_values(state, start, end)

    def prefill_batch(self, prompts: Sequence[IntArray], copies: int) -> tuple[list[State], Tensor]:
        """See :meth:`FlatBackend.prefill_batch`."""
        return self._base.prefill_batch(prompts, copies, self._adapter)

    def prefill(self, states: Sequence[State]) -> list[Tensor | None]:
        """Read the next chunk of each prompt."""
        return self._base.prefill(states)

    def fork(self, state: State, copies: int) -> list[State]:
        """Copies in the banks of those who step together."""
        return self._base.fork(state, copies)

    def step(self, states: Sequence[State], tokens: Sequence[int]) -> Tensor:
        """One token for each, whatever adapters they have."""
        return self._base.step(states, tokens)

    def speculation(self, state: State) -> Speculation:
        """What was guessed for a sequence so far."""
        return self._base.speculation(state)

    def free(self, state: State) -> None:
        """Give its place in the bank back."""
        self._base.free(state)

    def close(self) -> None:
        """Let go of the adapter, and of all keys and values where nobody else asks the base."""
        if self._alone:
            self._base.close()
        else:
            self._base.remove_adapter(self._adapter)
