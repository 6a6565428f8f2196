"""Key-value cache for batched sequences.

Sequences of similar length share a :class:`Bank`, so one batched product serves all of them. Bank
lengths come from a fixed list. Entries beyond a sequence's end are masked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from luthier.data.tree import round_up
from luthier.models.networks.attention import (
    AttentionWindow,
    Scoring,
    additive_mask,
    attention_scores,
    dense_attention,
    masked_softmax,
    window_within,
)

STEP = 64
"""Lengths of banks are multiples of this: few sizes, few kernels."""
CHUNK = 256
"""A chunk of a prompt ends at a multiple of this at the latest."""


def room_for(tokens: int) -> int:
    """The length of the bank for ``tokens``: 1, 2, 3, 4, 6, 8, 12, 16, … times :data:`STEP`."""
    room = STEP
    while room < tokens:
        power = 1 << (room // STEP).bit_length() - 1
        room = 3 * room // 2 if room == power * STEP and power > 1 else 2 * power * STEP
    return room


def keys_for(tokens: int) -> int:
    """Return the number of keys for a chunk that ends at ``tokens``, a multiple of ``STEP``."""
    return round_up(tokens, STEP)


Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class KeyValues:
    """Keys and values of consecutive tokens, ``[Hk, N, D]`` per layer."""

    layers: dict[int, Pair]

    def __len__(self) -> int:
        """Number of tokens."""
        return int(next(iter(self.layers.values()))[0].shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(part.nbytes for pair in self.layers.values() for part in pair)

    def first(self, count: int) -> KeyValues:
        """Return a view of the first ``count`` tokens; the memory of all tokens stays allocated."""
        return self._map(lambda part_HND: part_HND[:, :count])

    def split(self, at: int) -> tuple[KeyValues, KeyValues]:
        """Split at token ``at`` into two copies that can be freed separately."""
        return (
            self._map(lambda part_HND: part_HND[:, :at].clone()),
            self._map(lambda part_HND: part_HND[:, at:].clone()),
        )

    def concat(self, others: Sequence[KeyValues]) -> KeyValues:
        """Return the concatenation with ``others``."""
        return KeyValues(
            {
                layer: (
                    torch.cat([key, *(other.layers[layer][0] for other in others)], 1),
                    torch.cat([value, *(other.layers[layer][1] for other in others)], 1),
                )
                for layer, (key, value) in self.layers.items()
            }
        )

    def _map(self, change: Callable[[Tensor], Tensor]) -> KeyValues:
        return KeyValues(
            {layer: (change(key), change(value)) for layer, (key, value) in self.layers.items()}
        )


@dataclass(eq=False)
class Span:
    """Slot of one sequence in a bank."""

    bank: Bank
    slot: int
    length: int = 0
    """Number of stored tokens."""


StepRow = tuple[Span, int]


@dataclass(eq=False)
class Bank:
    """Keys and values ``[slots, Hk, room, D]`` per layer. Occupied slots come first."""

    room: int
    spans: list[Span] = field(default_factory=list)
    layers: dict[int, Pair] = field(default_factory=dict)
    capacity: int = 0

    def add(self) -> Span:
        """An empty place."""
        if len(self.spans) == self.capacity:
            # Growth by half, so that adding a sequence rarely copies the others.
            self._resize(self.capacity + max(1, self.capacity // 2))
        self.spans.append(Span(self, len(self.spans)))
        return self.spans[-1]

    def copy(self, other: Span) -> Span:
        """Return a new slot with the content of ``other``, a slot of another bank."""
        span = self.add()
        span.length = other.length
        size = min(self.room, other.bank.room)
        for layer, parts in other.bank.layers.items():
            for mine, theirs in zip(self.of(layer, *parts), parts, strict=True):
                mine[span.slot, :, :size] = theirs[other.slot, :, :size]
                # Old content may be nan, and masked entries are multiplied by 0.
                mine[span.slot, :, size:] = 0
        return span

    def remove(self, span: Span) -> None:
        """Free ``span``. The last slot moves into the gap."""
        last = self.spans.pop()
        # No gaps: StepAttention computes adjacent slots as one product.
        if last is not span:
            for parts in self.layers.values():
                for part in parts:
                    part[span.slot] = part[last.slot]
            self.spans[span.slot], last.slot = last, span.slot
        # Shrink below half only, so that short sequences do not copy all others each time.
        if not self.spans or 2 * len(self.spans) < self.capacity:
            self._resize(len(self.spans))

    def of(self, layer: int, key: Tensor, value: Tensor) -> Pair:
        """Return the keys and values of ``layer``, allocated for heads like ``key`` and ``value
        [.., Hk, N, D]``."""
        if layer not in self.layers:
            # Zeros, because masked entries are still multiplied.
            self.layers[layer] = (
                key.new_zeros(self.capacity, key.shape[1], self.room, key.shape[-1]),
                value.new_zeros(self.capacity, value.shape[1], self.room, value.shape[-1]),
            )
        return self.layers[layer]

    def _resize(self, capacity: int) -> None:
        kept = len(self.spans)
        for layer, parts in self.layers.items():
            made = []
            for part in parts:
                made.append(part.new_zeros(capacity, *part.shape[1:]))
                made[-1][:kept] = part[:kept]
            self.layers[layer] = made[0], made[1]
        if not capacity:
            self.layers.clear()
        self.capacity = capacity


class Banks:
    """All banks of one network."""

    def __init__(self) -> None:
        self._banks: dict[int, Bank] = {}

    def copy(self, span: Span, tokens: int) -> Span:
        """Return a copy of ``span`` with room for ``tokens``."""
        room = room_for(tokens)
        return self._banks.setdefault(room, Bank(room)).copy(span)

    def with_room(self, span: Span) -> Span:
        """Return ``span`` if a further token fits, else move the span to a larger bank."""
        if span.length + 1 <= span.bank.room:
            return span
        # Copy first: if memory runs out, the sequence keeps its slot.
        larger = self.copy(span, span.length + 1)
        span.bank.remove(span)
        return larger


@dataclass(frozen=True)
class Chunk:
    """The next ``count`` tokens of a prompt, in the rows of a pass from ``first`` on.

    ``before`` keys of a prefix stand in front; they come with the first chunk.
    """

    span: Span
    first: int
    count: int
    before: int
    start: int

    @staticmethod
    def of(span: Span, first: int, unread: int, before: int) -> Chunk:
        """Return the next chunk of a prompt with ``unread`` remaining tokens."""
        before = 0 if span.length else before
        start = span.length + before
        count = min(unread, CHUNK - start % CHUNK)
        return Chunk(span, first, count, before, start)

    @property
    def end(self) -> int:
        """Number of tokens up to the chunk's end."""
        return self.start + self.count


class ChunkAttention:
    """Attention of prompt chunks to earlier tokens and to the chunk itself."""

    def __init__(self, chunks: Sequence[Chunk], device: torch.device, dtype: torch.dtype) -> None:
        """Prepare the masks; ``dtype`` is the data type of keys and values."""
        self._chunks, self._device, self._dtype = chunks, device, dtype
        self._longest = max(chunk.end for chunk in chunks)
        self._masks: dict[AttentionWindow | None, list[tuple[slice, Tensor]]] = {}

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring
    ) -> Tensor:
        """Query ``[1, Hq, N, D]``, key and value ``[1, Hk, N, D]`` to ``[1, N, Hq, D]``."""
        outs = []
        seen = self._visible_chunks(scoring.window)
        for chunk, (keys, mask_NK) in zip(self._chunks, seen, strict=True):
            rows = slice(chunk.first, chunk.first + chunk.count)
            own_k, own_v = key[:, :, rows], value[:, :, rows]
            if chunk.before:
                own_k, own_v = module.key_value_prefix(own_k, own_v)
            all_k, all_v = chunk.span.bank.of(module.layer_idx, own_k, own_v)
            mine_k, mine_v = all_k[chunk.span.slot], all_v[chunk.span.slot]
            place = slice(chunk.span.length, chunk.end)
            mine_k[:, place], mine_v[:, place] = own_k[0], own_v[0]
            outs.append(
                dense_attention(
                    query[0, :, rows], mine_k[:, keys], mine_v[:, keys], mask_NK, scoring
                )
            )
        return torch.cat(outs)[None]

    def _visible_chunks(self, window: AttentionWindow | None) -> list[tuple[slice, Tensor]]:
        """Return the keys and the mask of each chunk, shared by all layers with this window."""
        window = window_within(window, self._longest)
        if window not in self._masks:
            self._masks[window] = masks = []
            for chunk in self._chunks:
                # Whole steps, so that products have few sizes.
                first = max(0, chunk.start + 1 - window.size) // STEP * STEP if window else 0
                keys = slice(first, keys_for(chunk.end))
                query_N1 = torch.arange(chunk.start, chunk.end, device=self._device)[:, None]
                key_K = torch.arange(keys.start, keys.stop, device=self._device)
                masks.append((keys, _mask(query_N1, key_K, window, self._dtype)))
        return self._masks[window]


def _mask(
    query: Tensor, key_K: Tensor, window: AttentionWindow | None, dtype: torch.dtype
) -> Tensor:
    """Return the additive mask of queries at the positions ``query [.., 1]``."""
    # `<=`: a token sees itself.
    sees = key_K <= query
    if window is not None:
        sees &= window.sees(query, key_K)
    return additive_mask(sees, dtype)


class StepAttention:
    """Attention of the next tokens of several sequences, at least one token each.

    A row is a slot and the number of the sequence's preceding tokens in this step. ``rows`` are in
    the order of :func:`step_order`; adjacent slots run as one product.
    """

    def __init__(self, rows: Sequence[StepRow], device: torch.device, dtype: torch.dtype) -> None:
        """Prepare the masks; ``dtype`` is the data type of keys and values."""
        self._runs: list[_Run] = []
        first = 0
        while first < len(rows):
            (span, ahead), end = rows[first], first + 1
            slot = span.slot - first
            while (
                end < len(rows)
                and rows[end][0].bank is span.bank
                and rows[end][0].slot == slot + end
                and rows[end][1] == ahead
            ):
                end += 1
            # The slots of a run are adjacent, so its keys are a view of the bank.
            self._runs.append(_Run.of(rows[first:end], first, device, dtype))
            first = end

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring
    ) -> Tensor:
        """Keep the new tokens' keys and values, then attend to all of each row's own."""
        _, heads, size, _ = query.shape
        if len(self._runs) == 1 and self._runs[0].count == size:
            return self._runs[0].attend(module.layer_idx, query, key, value, scoring)[None]
        out = query.new_empty(1, size, heads, value.shape[-1])
        # In order: guessed tokens attend to keys that an earlier run of this loop stores.
        for run in self._runs:
            rows = slice(run.first, run.first + run.count)
            out[0, rows] = run.attend(
                module.layer_idx, query[:, :, rows], key[:, :, rows], value[:, :, rows], scoring
            )
        return out


@dataclass(frozen=True)
class _Run:
    """``R`` adjacent slots of one bank from ``slot`` on."""

    bank: Bank
    slot: int
    first: int
    count: int
    slot_R: Tensor
    length_R: Tensor
    longest: int
    dtype: torch.dtype
    masks: dict[AttentionWindow | None, Tensor] = field(default_factory=dict)
    """Additive masks ``[R, 1, 1, K]`` by window. All layers share the masks."""

    @staticmethod
    def of(rows: Sequence[StepRow], first: int, device: torch.device, dtype: torch.dtype) -> _Run:
        bank, slot = rows[0][0].bank, rows[0][0].slot
        lengths = [span.length + ahead for span, ahead in rows]
        length_R = torch.tensor(lengths, device=device)
        slot_R = torch.arange(slot, slot + len(rows), device=device)
        return _Run(bank, slot, first, len(rows), slot_R, length_R, max(lengths) + 1, dtype)

    def _mask_of(self, window: AttentionWindow | None) -> Tensor:
        window = window_within(window, self.longest)
        if window not in self.masks:
            # The new token's own key is stored at index length_R.
            key_K = torch.arange(self.bank.room, device=self.length_R.device)
            mask_RK = _mask(self.length_R[:, None], key_K, window, self.dtype)
            self.masks[window] = mask_RK[:, None, None]
        return self.masks[window]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring
    ) -> Tensor:
        all_k, all_v = self.bank.of(layer, key, value)
        # Index tensors on both sides of a slice move to the front: the left side is `[R, Hk, D]`.
        all_k[self.slot_R, :, self.length_R] = key[0].transpose(0, 1)
        all_v[self.slot_R, :, self.length_R] = value[0].transpose(0, 1)
        k_RHKD = all_k[self.slot : self.slot + self.count]
        v_RHKD = all_v[self.slot : self.slot + self.count]
        heads, room = k_RHKD.shape[1:3]
        # Query heads that share a key head are stacked as queries.
        q = query[0].transpose(0, 1).reshape(self.count * heads, -1, query.shape[-1])
        scores = attention_scores(q, k_RHKD.flatten(0, 1), scoring.scale, scoring.softcap)
        scores_RH1K = scores.view(self.count, -1, 1, room)
        p = masked_softmax(scores_RH1K, self._mask_of(scoring.window), scoring.sinks_H)
        out = torch.bmm(p.reshape(scores.shape), v_RHKD.flatten(0, 1))
        return out.view(self.count, -1, value.shape[-1])


def step_order(rows: Sequence[StepRow]) -> list[int]:
    """Return the indices of ``rows``, first tokens first and adjacent slots together."""
    return sorted(
        range(len(rows)), key=lambda i: (rows[i][1], rows[i][0].bank.room, rows[i][0].slot)
    )
