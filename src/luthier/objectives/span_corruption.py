"""Span corruption: write the spans that were taken out of a text (Raffel et al. 2020, section 3.1.4).

Spans of ``mean_span_length`` tokens on average, ``noise_density`` of all tokens, are each replaced by
one sentinel; the decoder writes each sentinel and what stood there, and the next sentinel at the end.
How many spans and tokens is fixed by the length of a piece, where they are is drawn anew each time a
row is seen, as in the authors' code: lengths of spans and of what lies between are random partitions.
arXiv:1910.10683. Left out: mixing in supervised tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import numpy as np
from pydantic import Field

from luthier.data.disk_sequence import spool
from luthier.data.tokens import cut_stream
from luthier.errors import RecipeError, RowRefused
from luthier.models.random_numbers import draw_seed, row_generators
from luthier.objectives.base import Changes, Objective, RunModels
from luthier.types import Example, IntArray, Loss, Row

if TYPE_CHECKING:
    from luthier.data.chat import ChatFormat
    from luthier.models.network import Network, TreeBatch

SENTINEL = "<extra_id_{}>"


class SpanCorruption(Objective):
    """Fill in spans, for encoder-decoders such as T5."""

    method: Literal["span_corruption"] = "span_corruption"
    noise_density: float = Field(default=0.15, gt=0, lt=1)
    """Share of the tokens that is taken out."""
    mean_span_length: float = Field(default=3.0, ge=1, le=1e6)
    """Tokens in a span on average."""
    sequence_length: int = Field(default=512, ge=4, le=10_000_000)
    """Tokens of a piece before spans are taken out; at most the model's context."""
    sentinels: tuple[int, ...] | None = None
    """Ids of the tokens that stand for the spans; the tokenizer's ``<extra_id_0>`` … if not given."""
    start_id: int | None = Field(default=None, ge=0, le=10_000_000)
    """The token the decoder starts from; found when not given."""
    end_id: int | None = Field(default=None, ge=0, le=10_000_000)
    """The token that closes both sides; found when not given."""

    can_shard: ClassVar[bool] = True
    shapes: ClassVar[frozenset[str]] = frozenset({"text"})
    same_each_epoch: ClassVar[bool] = False

    def bind(self, models: RunModels) -> Self:
        """Reject networks without an encoder and tokenizers without sentinels."""
        chat = models.chat
        if chat.start_id is None:
            raise RecipeError(
                "span_corruption is for encoder-decoders such as T5, and this network is none. Use "
                "causal_lm for networks that write, masked_lm for encoders.",
                rule="objective.network",
            )
        if not (self.sentinels or _sentinels(chat)):
            raise RecipeError(
                "span_corruption needs tokens that stand for the spans, <extra_id_0> and so on, and "
                "this tokenizer has none. Name others with `objective.sentinels=[ID, ...]`."
            )
        return super().bind(models)

    def fit(self, rows: Sequence[Row], chat: ChatFormat) -> Self:
        """Find the sentinels."""
        found = {
            "sentinels": self.sentinels or _sentinels(chat),
            "start_id": chat.start_id,
            "end_id": chat.end_id,
        }
        return self.model_copy(update=found)

    def encode(self, row: Row, index: int, chat: ChatFormat) -> Example:
        """The document, closed by the end-of-text token."""
        ids_T = chat.encode_text(row.plain_text())
        if len(ids_T) < 2:
            raise RowRefused("row.empty", "the text gives no tokens.", "Write some text.")
        return Example(ids_T, np.ones(len(ids_T), dtype=np.float32), index)

    def pack(self, examples: Sequence[Example], context: int) -> Sequence[Example]:
        """Join the documents and cut them into pieces; ``row`` becomes the number of the piece."""
        size = min(self.sequence_length, context - 2)
        most = len(self.sentinels or ())
        if (needed := self._spans(size)[1] + 1) > most:
            raise RecipeError(
                f"pieces of {size} tokens have {needed - 1} spans, which take {needed} sentinels, and "
                f"there are {most}. Use a smaller objective.sequence_length or longer spans.",
                rule="objective.sentinels",
            )
        pieces = enumerate(cut_stream((example.ids_T for example in examples), size))
        # The closing token of the last document alone: nothing to take out.
        return spool(self._piece(ids_T, row) for row, ids_T in pieces if not row or len(ids_T) > 1)

    def _piece(self, ids_T: IntArray, row: int) -> Example:
        """``ids_T`` with as much weight as its target will have."""
        weight_T = np.zeros(len(ids_T), dtype=np.float32)
        weight_T[-1] = sum(self._spans(len(ids_T))) + 2
        return Example(ids_T, weight_T, row)

    def _spans(self, size: int) -> tuple[int, int]:
        """How many tokens of ``size`` are taken out, and in how many spans."""
        noise = min(max(round(size * self.noise_density), 1), max(size - 1, 1))
        spans = max(round(noise / self.mean_span_length), 1)
        return noise, min(spans, max(size - noise, 1))

    def views(self, examples: Sequence[Example], changes: Changes = "none") -> list[Example]:
        """Return each piece with spans taken out; whole pieces without ``changes``."""
        if changes == "none":
            return list(examples)
        generators = row_generators(examples, draw_seed() if changes == "random" else 0)
        return [
            self._corrupt(example, generator)
            for example, generator in zip(examples, generators, strict=True)
        ]

    def _corrupt(self, example: Example, generator: np.random.Generator) -> Example:
        noise, spans = self._spans(len(example))
        kept_S = _partition(len(example) - noise, spans, generator)
        taken_S = _partition(noise, spans, generator)
        cuts = np.cumsum(np.stack([kept_S, taken_S], axis=1).ravel())[:-1]
        runs = np.split(example.ids_T, cuts)
        sentinels = self.sentinels or ()
        source: list[IntArray] = []
        target: list[IntArray] = [np.array([self.start_id])]
        for span in range(spans):
            mark = np.array([sentinels[span]])
            source += [runs[2 * span], mark]
            target += [mark, runs[2 * span + 1]]
        end = np.array([self.end_id])
        ids_T = np.concatenate([*target, np.array([sentinels[spans]]), end]).astype(np.int64)
        weight_T = np.ones(len(ids_T), dtype=np.float32)
        weight_T[0] = 0.0
        source_T = np.concatenate([*source, end]).astype(np.int64)
        return replace(example, ids_T=ids_T, weight_T=weight_T, source_T=source_T)

    def loss(self, network: Network, batch: TreeBatch) -> Loss:
        """Summed cross-entropy of all tokens the decoder writes."""
        from luthier.objectives.logprobs import weighted_nll

        return Loss(weighted_nll(network, batch))


def _sentinels(chat: ChatFormat) -> tuple[int, ...]:
    """Ids of ``<extra_id_0>``, ``<extra_id_1>`` … as far as the tokenizer has them."""
    vocabulary = chat.tokenizer.get_vocab()
    found: list[int] = []
    while (name := SENTINEL.format(len(found))) in vocabulary:
        found.append(vocabulary[name])
    return tuple(found)


def _partition(total: int, parts: int, generator: np.random.Generator) -> IntArray:
    """``total`` cut into ``parts`` lengths of at least 1, every way equally likely."""
    inner = np.sort(generator.permutation(total - 1)[: parts - 1]) + 1
    lengths: IntArray = np.diff(np.concatenate([[0], inner, [total]])).astype(np.int64)
    return lengths
