"""Keys and values of many sequences that are written side by side.

Sequences of about the same length lie in one :class:`Bank`, so that one batched product serves them
all. A bank's length is of a fixed list, and what is beyond a sequence's own end is masked: which
shapes a sequence meets depends on its own length alone, and on no other sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

STEP = 64
"""Lengths of banks are multiples of this: few sizes, few kernels."""
CHUNK_STEP = 32
"""Tokens of a prompt that run at once are filled up to a multiple of this."""


def room_for(tokens: int) -> int:
    """The length of the bank for ``tokens``: 1, 2, 3, 4, 6, 8, 12, 16, … times :data:`STEP`."""
    room = STEP
    while room < tokens:
        power = 1 << (room // STEP).bit_length() - 1
        room = 3 * room // 2 if room == power * STEP and power > 1 else 2 * power * STEP
    return room


Pair = tuple[Tensor, Tensor]


@dataclass(eq=False)
class Span:
    """The place of one sequence in a bank."""

    bank: Bank
    slot: int
    length: int = 0
    """Tokens whose keys and values are there."""


@dataclass(eq=False)
class Bank:
    """Keys and values ``[slots, Hk, room, D]`` for each layer; those in use stand first."""

    room: int
    spans: list[Span] = field(default_factory=list)
    layers: dict[int, Pair] = field(default_factory=dict)
    capacity: int = 0

    def add(self) -> Span:
        """An empty place."""
        if len(self.spans) == self.capacity:
            self._resize(self.capacity + max(1, self.capacity // 2))
        self.spans.append(Span(self, len(self.spans)))
        return self.spans[-1]

    def copy(self, other: Span) -> Span:
        """A new place with what ``other``, of another bank, holds."""
        span = self.add()
        span.length = other.length
        size = min(self.room, other.bank.room)
        for layer, parts in other.bank.layers.items():
            for mine, theirs in zip(self.of(layer, *parts), parts, strict=True):
                mine[span.slot, :, :size] = theirs[other.slot, :, :size]
        return span

    def remove(self, span: Span) -> None:
        """Give ``span`` back: the last one moves to its place."""
        last = self.spans.pop()
        if last is not span:
            for parts in self.layers.values():
                for part in parts:
                    part[span.slot] = part[last.slot]
            self.spans[span.slot], last.slot = last, span.slot
        if 2 * len(self.spans) <= self.capacity:
            self._resize(len(self.spans))

    def of(self, layer: int, key: Tensor, value: Tensor) -> Pair:
        """Keys and values of ``layer``, for heads as those of ``key`` and ``value [.., Hk, N, D]``."""
        if layer not in self.layers:
            # Zeros: what is masked is still multiplied.
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

    def keep(self, span: Span, tokens: int) -> Span:
        """A copy of ``span`` with room for ``tokens``."""
        room = room_for(tokens)
        return self._banks.setdefault(room, Bank(room)).copy(span)

    def grown(self, span: Span) -> Span:
        """``span`` itself where it has room for one token more, else a larger one in its place."""
        if span.length < span.bank.room:
            return span
        larger = self.keep(span, span.length + 1)
        span.bank.remove(span)
        return larger


class ChunkAttention:
    """Attention of the next ``count`` tokens of a prompt to those before them and each other.

    ``N`` tokens run, of which those beyond ``count`` only fill up; nothing looks at them.
    """

    def __init__(self, span: Span, size: int, before: int, device: torch.device) -> None:
        """``before`` keys of a prefix stand in front; they come with the first chunk."""
        self.span, self.before = span, before if not span.length else 0
        self.start = span.length
        end = self.start + self.before + size
        self.longest = end
        self._keys = -(-end // STEP) * STEP
        query_N = torch.arange(end - size, end, device=device)
        sees_NK = torch.arange(self._keys, device=device) <= query_N[:, None]
        self._mask_NK = torch.zeros(sees_NK.shape, device=device)
        self._mask_NK.masked_fill_(~sees_NK, -torch.inf)

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """Query ``[1, Hq, N, D]``, key and value ``[1, Hk, N, D]`` to ``[1, N, Hq, D]``."""
        if self.before:
            key, value = module.key_value_prefix(key, value)
        all_k, all_v = self.span.bank.of(module.layer_idx, key, value)
        mine_k, mine_v = all_k[self.span.slot], all_v[self.span.slot]
        end = self.start + key.shape[2]
        mine_k[:, self.start : end], mine_v[:, self.start : end] = key[0], value[0]
        heads, size = len(mine_k), query.shape[2]
        q_HQD = query[0].reshape(heads, -1, query.shape[-1])
        scores = torch.bmm(q_HQD, mine_k[:, : self._keys].mT).mul_(scale)
        scores.view(heads, -1, size, self._keys).add_(self._mask_NK.to(scores.dtype))
        out = torch.bmm(torch.softmax(scores, -1), mine_v[:, : self._keys])
        return out.view(-1, size, value.shape[-1]).transpose(0, 1)[None]


class StepAttention:
    """Attention of one further token of each of several sequences.

    ``spans`` are in the order of :func:`in_order`; those that are neighbours in a bank run as one.
    Between them there may be others, which take no step now. Rows beyond them fill up.
    """

    def __init__(self, spans: Sequence[Span], device: torch.device) -> None:
        self._runs: list[_Run] = []
        first = 0
        while first < len(spans):
            bank, end = spans[first].bank, first + 1
            slot = spans[first].slot - first
            while end < len(spans) and spans[end].bank is bank and spans[end].slot == slot + end:
                end += 1
            self._runs.append(_Run.of(spans[first:end], first, device))
            first = end
        self.longest = max(span.length for span in spans) + 1

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """Keep the new tokens' keys and values, then attend to all of each row's own."""
        _, heads, size, _ = query.shape
        out = query.new_zeros(1, size, heads, value.shape[-1])
        for run in self._runs:
            rows = slice(run.first, run.first + run.count)
            out[0, rows] = run.attend(
                module.layer_idx, query[:, :, rows], key[:, :, rows], value[:, :, rows], scale
            )
        return out


@dataclass(frozen=True)
class _Run:
    """Sequences of one bank: ``R`` slots from ``slot`` on."""

    bank: Bank
    slot: int
    first: int
    count: int
    slot_R: Tensor
    length_R: Tensor
    mask_R1K: Tensor

    @staticmethod
    def of(spans: Sequence[Span], first: int, device: torch.device) -> _Run:
        bank, slot = spans[0].bank, spans[0].slot
        length_R = torch.tensor([span.length for span in spans], device=device)
        slot_R = torch.arange(slot, slot + len(spans), device=device)
        sees_RK = torch.arange(bank.room, device=device) <= length_R[:, None]
        mask_RK = torch.zeros(sees_RK.shape, device=device).masked_fill_(~sees_RK, -torch.inf)
        return _Run(bank, slot, first, len(spans), slot_R, length_R, mask_RK[:, None])

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        all_k, all_v = self.bank.of(layer, key, value)
        all_k[self.slot_R, :, self.length_R] = key[0].transpose(0, 1)
        all_v[self.slot_R, :, self.length_R] = value[0].transpose(0, 1)
        k_RHKD = all_k[self.slot : self.slot + self.count]
        v_RHKD = all_v[self.slot : self.slot + self.count]
        heads, room = k_RHKD.shape[1:3]
        # Query heads that share a key head are stacked as queries.
        # Contiguous also where a view would do: products of other strides are other kernels.
        q = query[0].transpose(0, 1).contiguous().view(self.count * heads, -1, query.shape[-1])
        scores = torch.bmm(q, k_RHKD.flatten(0, 1).mT).mul_(scale)
        scores.view(self.count, -1, room).add_(self.mask_R1K.to(scores.dtype))
        out = torch.bmm(torch.softmax(scores, -1), v_RHKD.flatten(0, 1))
        return out.view(self.count, -1, value.shape[-1])


def in_order(spans: Sequence[Span]) -> list[int]:
    """Indices of ``spans`` so that neighbours in a bank are neighbours."""
    return sorted(range(len(spans)), key=lambda i: (spans[i].bank.room, spans[i].slot))
