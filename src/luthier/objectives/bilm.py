"""Bidirectional language modelling: each word from those before, and from those behind it.

(Peters et al. 2018, arXiv:1802.05365, section 3.1.) The loss is the sum of the negative log-likelihoods
of both directions; the mean that is reported counts each prediction once. Words are predicted whole,
over the most frequent words of the training rows; others are ``[UNK]``. Left out: samples of the
vocabulary in the softmax, so a large vocabulary is slow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import numpy as np
from pydantic import Field

from luthier.data.disk_sequence import spool
from luthier.errors import RecipeError
from luthier.models.characters import SPECIAL, WORD_START, word_starts
from luthier.models.heads import Head, Task
from luthier.objectives.base import Objective, RunModels, take_tokens
from luthier.types import Example, Loss, Row

if TYPE_CHECKING:
    from luthier.data.chat import ChatFormat
    from luthier.models.network import Network, TreeBatch

UNKNOWN = "[UNK]"
NOTHING = -1


class BiLM(Objective):
    """Raw text read from both sides, for ELMo."""

    method: Literal["bilm"] = "bilm"
    vocabulary: int = Field(default=20_000, ge=4, le=10_000_000)
    """Words that are told apart when they are predicted, at most; read are all."""
    sequence_length: int = Field(default=512, ge=8, le=10_000_000)
    """Longest piece a document is cut into, in characters; at most the model's context."""
    words: tuple[str, ...] | None = None
    """The words in the order of the head; from the training rows when not given."""

    task: ClassVar[Task] = "bidirectional_lm"
    shapes: ClassVar[frozenset[str]] = frozenset({"text"})

    def head(self) -> Head:
        """One score for each word."""
        return Head(self.task, self.words or ())

    def bind(self, models: RunModels) -> Self:
        """Reject tokenizers that do not mark words."""
        chat = models.chat
        known = chat.tokenizer.get_vocab()
        if any(token not in known for token in (*SPECIAL, WORD_START)):
            raise RecipeError(
                "bilm predicts whole words, and this model's tokenizer does not mark where they "
                "begin. Use causal_lm or masked_lm, or a network of type elmo.",
                rule="objective.tokenizer",
            )
        return super().bind(models)

    def fit(self, rows: Sequence[Row], chat: ChatFormat) -> Self:
        """Count the words."""
        if self.words is not None:
            return self
        counts: Counter[str] = Counter()
        for row in rows:
            words = _words(chat.tokenizer(row.plain_text()).tokens())
            counts.update(word for word in words if word not in SPECIAL)
        always = (UNKNOWN, *SPECIAL[1:3])
        # Of words that are equally frequent the first in the alphabet, whatever the rows' order.
        ordered = sorted(counts, key=lambda word: (-counts[word], word))
        return self.model_copy(
            update={"words": (*always, *ordered[: self.vocabulary - len(always)])}
        )

    def encode(self, row: Row, index: int, chat: ChatFormat) -> Example:
        """The document; ``target [T, 2]`` holds the words beside each word, at its first character.

        First the one behind, which is predicted forwards, then the one before; -1 where there is none.
        """
        encoded = chat.tokenizer(row.plain_text(), add_special_tokens=True, truncation=False)
        tokens = encoded.tokens()
        starts = word_starts(tokens)
        place = {word: number for number, word in enumerate(self.words or ())}
        ids = [place.get(word, place[UNKNOWN]) for word in _words(tokens)]
        target_T2 = np.full((len(tokens), 2), NOTHING, dtype=np.int64)
        target_T2[starts[:-1], 0] = ids[1:]
        target_T2[starts[1:], 1] = ids[:-1]
        weight_T = (target_T2 != NOTHING).sum(1).astype(np.float32)
        ids_T = np.asarray(encoded["input_ids"], dtype=np.int64)
        return Example(ids_T, weight_T, index, target=target_T2)

    def pack(self, examples: Sequence[Example], context: int) -> Sequence[Example]:
        """Cut documents between words; a word that is longer than a piece is cut itself."""
        size = min(self.sequence_length, context)
        pieces = chain.from_iterable(_pieces(example, size) for example in examples)
        return spool(replace(piece, row=number) for number, piece in enumerate(pieces))

    def annotate(
        self, network: Network, examples: Sequence[Example], budget: int
    ) -> list[TreeBatch]:
        """Make the words beside each word its targets."""
        return [self._aim(batch) for batch in super().annotate(network, examples, budget)]

    def _aim(self, batch: TreeBatch) -> TreeBatch:
        import torch

        target_M2 = np.concatenate(batch.tree.targets)
        read = np.flatnonzero((target_M2 != NOTHING).any(1))
        word, side = np.nonzero(target_M2[read] != NOTHING)
        device = batch.ids_N.device
        return replace(
            batch,
            source_S=torch.from_numpy(batch.tree.node_M[read]).to(device),
            edge_source_E=torch.from_numpy(2 * word + side).to(device),
            target_E=torch.from_numpy(target_M2[read][word, side]).to(device),
            weight_E=torch.ones(len(word), device=device),
            weight=float(len(word)),
        )

    def loss(self, network: Network, batch: TreeBatch) -> Loss:
        """Summed cross-entropy of both directions."""
        from luthier.objectives.logprobs import weighted_nll

        return Loss(weighted_nll(network, batch))


def _words(tokens: Sequence[str]) -> list[str]:
    """The words of a text as they stand in the vocabulary, without the mark they begin with."""
    starts = word_starts(tokens)
    parts = zip(starts, [*starts[1:], len(tokens)], strict=True)
    return ["".join(tokens[first:end]).removeprefix(WORD_START) for first, end in parts]


def _pieces(example: Example, size: int) -> list[Example]:
    """``example`` in pieces of at most ``size`` characters that begin with words; none without loss."""
    target = np.asarray(example.target)
    starts = np.flatnonzero((target != NOTHING).any(1))
    pieces, first = [], 0
    while first < len(example):
        end = min(first + size, len(example))
        if end < len(example) and len(inside := starts[(starts > first) & (starts <= end)]):
            end = int(inside[-1])
        part = slice(first, end)
        if example.weight_T[part].any():
            pieces.append(replace(take_tokens(example, part), target=target[part]))
        first = end
    return pieces
