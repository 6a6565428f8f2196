"""Bidirectional language modelling: predict each word from the words before, and from the words
after.

(Peters et al. 2018, arXiv:1802.05365, section 3.1.) The loss is the sum of the negative
log-likelihoods of both directions. The reported mean counts each prediction once. Targets are whole
words from the most frequent words of the training rows; all other words are ``[UNK]``. Left out: a
sampled softmax, so a large vocabulary is slow.
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
from luthier.models.networks.heads import Head
from luthier.objectives.base import Objective, RunModels, take_tokens
from luthier.tasks import BIDIRECTIONAL, Task
from luthier.types import Example, Loss, Row

if TYPE_CHECKING:
    from luthier.data.conversations.chat import ChatFormat
    from luthier.models.networks.network import Network, TreeBatch

UNKNOWN = "[UNK]"
NOTHING = -1


class BiLM(Objective):
    """Bidirectional language modelling of raw text, for ELMo.

    Use ``masked_lm`` for encoders of the BERT family, or ``causal_lm`` for decoders.
    """

    method: Literal["bilm"] = "bilm"
    vocabulary: int = Field(default=20_000, ge=4, le=10_000_000)
    """Maximum number of target words; the input may contain any word."""
    sequence_length: int = Field(default=512, ge=8, le=10_000_000)
    """Maximum length of a piece of a document, in characters; at most the model's context."""
    words: tuple[str, ...] | None = None
    """Target words in head order; default: from the training rows."""

    task: ClassVar[Task] = BIDIRECTIONAL
    shapes: ClassVar[frozenset[str]] = frozenset({"text"})

    def head(self) -> Head:
        """Return a head with one score per word."""
        return Head(self.task.head, self.words or ())

    def bind(self, models: RunModels) -> Self:
        """Reject tokenizers without word boundaries."""
        chat = models.chat
        vocabulary = chat.tokenizer.get_vocab()
        if any(token not in vocabulary for token in (*SPECIAL, WORD_START)):
            raise RecipeError(
                "bilm predicts whole words, and the model's tokenizer does not mark word "
                "starts. Use causal_lm or masked_lm, or a network of type elmo.",
                rule="objective.tokenizer",
            )
        return super().bind(models)

    def fit(self, rows: Sequence[Row], chat: ChatFormat) -> Self:
        """Select the most frequent words as targets."""
        if self.words is not None:
            return self
        counts: Counter[str] = Counter()
        for row in rows:
            words = _words(chat.tokenizer(row.plain_text()).tokens())
            counts.update(word for word in words if word not in SPECIAL)
        always = (UNKNOWN, *SPECIAL[1:3])
        # Ties are alphabetical, so that the order of the rows does not change the head.
        ordered = sorted(counts, key=lambda word: (-counts[word], word))
        return self.model_copy(
            update={"words": (*always, *ordered[: self.vocabulary - len(always)])}
        )

    def encode(self, row: Row, index: int, chat: ChatFormat) -> Example:
        """Return the document with ``target [T, 2]``: the neighbouring words at each word's first
        character.

        Column 0 is the next word (forward direction), column 1 the previous word; -1 without a
        neighbour.
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
        """Cut documents between words. A word longer than a piece is cut inside."""
        size = min(self.sequence_length, context)
        pieces = chain.from_iterable(_pieces(example, size) for example in examples)
        return spool(replace(piece, row=number) for number, piece in enumerate(pieces))

    def annotate(
        self, network: Network, examples: Sequence[Example], budget: int
    ) -> list[TreeBatch]:
        """Set the neighbouring words as targets."""
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
            # The head has two states per node: forward at 2 n, backward at 2 n + 1.
            edge_source_E=torch.from_numpy(2 * word + side).to(device),
            target_E=torch.from_numpy(target_M2[read][word, side]).to(device),
            weight_E=torch.ones(len(word), device=device),
            weight=float(len(word)),
        )

    def loss(self, network: Network, batch: TreeBatch) -> Loss:
        """Return the summed cross-entropy of both directions."""
        from luthier.objectives.logprobs import weighted_nll

        return Loss(weighted_nll(network, batch))


def _words(tokens: Sequence[str]) -> list[str]:
    """Return the words of a text without the word-start mark."""
    starts = word_starts(tokens)
    parts = zip(starts, [*starts[1:], len(tokens)], strict=True)
    return ["".join(tokens[first:end]).removeprefix(WORD_START) for first, end in parts]


def _pieces(example: Example, size: int) -> list[Example]:
    """Cut ``example`` at word starts into pieces of at most ``size`` characters with targets."""
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
