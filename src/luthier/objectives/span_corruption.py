"""Span corruption: generate the spans removed from a text (Raffel et al. 2020, section 3.1.4).

Spans of ``mean_span_length`` tokens on average, ``noise_density`` of all tokens, are each replaced
by one sentinel. The decoder generates each sentinel with the removed span, and the next sentinel at
the end. The length of a piece determines the number of spans and removed tokens. The positions are
random in each epoch, as in the authors' code: random partitions into spans and gaps.
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
from luthier.models.bpe import SENTINEL
from luthier.models.random_numbers import draw_seed, row_generators
from luthier.objectives.base import Changes, Objective, RunModels
from luthier.types import Example, IntArray, Loss, Row

if TYPE_CHECKING:
    from luthier.data.conversations.chat import ChatFormat
    from luthier.models.networks.network import Network, TreeBatch


class SpanCorruption(Objective):
    """Span corruption of raw text, for encoder-decoders such as T5.

    Use ``sft`` for prompts with replies, or ``causal_lm`` for decoders.
    """

    method: Literal["span_corruption"] = "span_corruption"
    noise_density: float = Field(default=0.15, gt=0, lt=1)
    """Share of removed tokens."""
    mean_span_length: float = Field(default=3.0, ge=1, le=1e6)
    """Mean tokens per span."""
    sequence_length: int = Field(default=512, ge=4, le=10_000_000)
    """Tokens per piece before removing spans; at most the model's context."""
    sentinels: tuple[int, ...] | None = None
    """Ids of the sentinel tokens; default: the tokenizer's ``<extra_id_0>`` and following."""
    start_id: int | None = Field(default=None, ge=0, le=10_000_000)
    """Start token of the decoder; default: from the model."""
    end_id: int | None = Field(default=None, ge=0, le=10_000_000)
    """End token of both sides; default: from the model."""

    can_shard: ClassVar[bool] = True
    shapes: ClassVar[frozenset[str]] = frozenset({"text"})
    same_each_epoch: ClassVar[bool] = False

    def bind(self, models: RunModels) -> Self:
        """Reject networks without an encoder and tokenizers without sentinels."""
        chat = models.chat
        if chat.decoder is None:
            raise RecipeError(
                "span_corruption requires an encoder-decoder such as T5. Use causal_lm for "
                "decoders, or masked_lm for encoders.",
                rule="objective.network",
            )
        if not (self.sentinels or _sentinels(chat)):
            raise RecipeError(
                "span_corruption requires sentinel tokens such as <extra_id_0>, and the "
                "tokenizer has none. Set `objective.sentinels=[ID, ...]`."
            )
        return super().bind(models)

    def fit(self, rows: Sequence[Row], chat: ChatFormat) -> Self:
        """Read the sentinels from the tokenizer."""
        assert chat.decoder is not None
        settings = {
            "sentinels": self.sentinels or _sentinels(chat),
            "start_id": chat.decoder.start_id,
            "end_id": chat.text_tokenizer.end_id,
        }
        return self.model_copy(update=settings)

    def encode(self, row: Row, index: int, chat: ChatFormat) -> Example:
        """Return the document with the end-of-text token."""
        ids_T = chat.text_tokenizer.encode_text(row.plain_text())
        if len(ids_T) < 2:
            raise RowRefused("row.empty", "the text gives no tokens.", "Write some text.")
        return Example(ids_T, np.ones(len(ids_T), dtype=np.float32), index)

    def pack(self, examples: Sequence[Example], context: int) -> Sequence[Example]:
        """Join the documents and cut the stream into pieces; ``row`` becomes the number of the
        piece."""
        size = min(self.sequence_length, context - 2)
        self.check_sentinels(size)
        pieces = enumerate(cut_stream((example.ids_T for example in examples), size))
        # A last piece of one token, an end-of-text token, has nothing to remove.
        return spool(self.piece(ids_T, row) for row, ids_T in pieces if not row or len(ids_T) > 1)

    def check_sentinels(self, size: int) -> None:
        """Reject pieces of ``size`` tokens with more spans than sentinels."""
        most = len(self.sentinels or ())
        # One more sentinel than spans, because the target ends with a sentinel.
        if (needed := self._spans(size)[1] + 1) > most:
            raise RecipeError(
                f"pieces of {size} tokens need {needed} sentinels, and the tokenizer has {most}. "
                "Use a smaller `objective.sequence_length` or longer spans.",
                rule="objective.sentinels",
            )

    def piece(self, ids_T: IntArray, row: int) -> Example:
        """Return a piece with the weight of its future target."""
        weight_T = np.zeros(len(ids_T), dtype=np.float32)
        # Removed tokens, a sentinel per span, the final sentinel and the end token: the weight
        # is known before the spans are drawn.
        weight_T[-1] = sum(self._spans(len(ids_T))) + 2
        return Example(ids_T, weight_T, row)

    def _spans(self, size: int) -> tuple[int, int]:
        """Return the number of removed tokens and the number of spans for a piece of ``size``
        tokens."""
        noise = min(max(round(size * self.noise_density), 1), max(size - 1, 1))
        spans = max(round(noise / self.mean_span_length), 1)
        # Each span follows at least one kept token.
        return noise, min(spans, max(size - noise, 1))

    def views(self, examples: Sequence[Example], changes: Changes = "none") -> list[Example]:
        """Return each piece with spans removed; whole pieces without ``changes``."""
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
        """Return the summed cross-entropy of all decoder tokens."""
        from luthier.objectives.logprobs import weighted_nll

        return Loss(weighted_nll(network, batch))


def _sentinels(chat: ChatFormat) -> tuple[int, ...]:
    """Return the ids of ``<extra_id_0>``, ``<extra_id_1>`` and following in the tokenizer."""
    vocabulary = chat.tokenizer.get_vocab()
    ids: list[int] = []
    while (name := SENTINEL.format(len(ids))) in vocabulary:
        ids.append(vocabulary[name])
    return tuple(ids)


def _partition(total: int, parts: int, generator: np.random.Generator) -> IntArray:
    """Partition ``total`` into ``parts`` lengths of at least 1, uniformly at random."""
    # Distinct cut points make every composition equally likely, as in the authors' code.
    inner = np.sort(generator.permutation(total - 1)[: parts - 1]) + 1
    lengths: IntArray = np.diff(np.concatenate([[0], inner, [total]])).astype(np.int64)
    return lengths
