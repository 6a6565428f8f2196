"""Masked language modelling: fill in hidden tokens (Devlin et al. 2019, section 3.1).

A new random share of the tokens is selected in each epoch (Liu et al. 2019). Of the selected
tokens, 80 % are replaced by the mask token, 10 % by a random token, and 10 % stay. ``whole_word``
selects all pieces of a word together. Validation rows are always masked the same way, so that losses
are comparable. Left out: next-sentence prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field

from luthier.data.disk_sequence import spool
from luthier.errors import RecipeError
from luthier.models.random_numbers import draw_seed, row_generators
from luthier.objectives.base import Objective, RunModels, take_tokens
from luthier.tasks import MASKED_WORDS, Task
from luthier.types import Example, IntArray, Loss, Row

if TYPE_CHECKING:
    from luthier.data.conversations.chat import ChatFormat
    from luthier.models.networks.network import Network, TreeBatch

HIDDEN, RANDOM = 0.8, 0.1
"""Shares of the selected tokens replaced by the mask token, and by a random token."""


class MaskedLM(Objective):
    """Masked language modelling of raw text, for encoders.

    Use ``contrastive`` to train embeddings, or ``causal_lm`` for decoders.
    """

    method: Literal["masked_lm"] = "masked_lm"
    mask_share: float = Field(default=0.15, gt=0, lt=1)
    """Share of selected tokens."""
    whole_word: bool = False
    """Select whole words instead of word pieces."""
    sequence_length: int = Field(default=128, ge=8, le=10_000_000)
    """Maximum length of a piece of a document, with special tokens; at most the model's context."""
    mask_id: int | None = Field(default=None, ge=0, le=10_000_000)
    """Id of the mask token; default: from the tokenizer."""
    vocabulary: int | None = Field(default=None, ge=1, le=10_000_000)
    """Upper bound of random token ids; default: from the tokenizer."""

    task: ClassVar[Task] = MASKED_WORDS
    shapes: ClassVar[frozenset[str]] = frozenset({"text"})
    same_each_epoch: ClassVar[bool] = False

    def bind(self, models: RunModels) -> Self:
        """Reject tokenizers without a mask token."""
        chat = models.chat
        if chat.tokenizer.mask_token_id is None:
            raise RecipeError(
                "the model's tokenizer has no mask token. Use objective causal_lm, or an "
                "encoder such as all-minilm-l6-v2.",
                rule="objective.tokenizer",
            )
        return super().bind(models)

    def fit(self, rows: Sequence[Row], chat: ChatFormat) -> Self:
        """Read the mask token from the tokenizer."""
        settings = {"mask_id": chat.tokenizer.mask_token_id, "vocabulary": len(chat.tokenizer)}
        return self.model_copy(update=settings)

    def encode(self, row: Row, index: int, chat: ChatFormat) -> Example:
        """Return the document; ``target`` is the word number of each token, -1 for special tokens."""
        encoded = chat.tokenizer(row.plain_text(), add_special_tokens=True, truncation=False)
        ids_T = np.asarray(encoded["input_ids"], dtype=np.int64)
        words = [-1 if word is None else word for word in encoded.word_ids()]
        word_T = np.asarray(words, dtype=np.int64)
        return Example(ids_T, (word_T >= 0).astype(np.float32), index, target=word_T)

    def pack(self, examples: Sequence[Example], context: int) -> Sequence[Example]:
        """Cut each document into pieces, each with the tokenizer's special tokens."""
        size = min(self.sequence_length, context)
        pieces = chain.from_iterable(_pieces(example, size) for example in examples)
        return spool(replace(piece, row=number) for number, piece in enumerate(pieces))

    def annotate(
        self, network: Network, examples: Sequence[Example], budget: int
    ) -> list[TreeBatch]:
        """Select and hide tokens; the selected tokens become the targets."""
        # Drawn first: torch's generator is equal in all processes only at the start of a step.
        seed = draw_seed() if network.model.training else 0
        return [self.hide(batch, seed) for batch in super().annotate(network, examples, budget)]

    def hide(self, batch: TreeBatch, seed: int = 0, masked: float = HIDDEN) -> TreeBatch:
        """Select tokens of each row, which alone have a weight, and put the mask in a share
        ``masked`` of their places."""
        import torch

        rows = batch.tree.examples
        chosen, fates, random = [], [], []
        # A generator per row: hidden tokens depend neither on micro-batches nor on processes.
        for row, generator in zip(rows, row_generators(rows, seed), strict=True):
            chosen_T = self._choose(np.asarray(row.target), generator)
            chosen.append(chosen_T)
            fates.append(generator.random(len(row)))
            random.append(generator.integers(self.vocabulary or 1, size=len(row)))
        chosen_M = np.concatenate(chosen)
        # `TreeBatch` requires ascending sources.
        order = np.argsort(batch.tree.node_M[chosen_M])
        node_K = torch.from_numpy(batch.tree.node_M[chosen_M][order])
        fate_K = torch.from_numpy(np.concatenate(fates)[chosen_M][order])
        random_K = torch.from_numpy(np.concatenate(random)[chosen_M][order])
        # Encoders share no prefixes, so a hidden token belongs to a single row.
        ids_N = batch.ids_N.clone()
        target_K = ids_N[node_K.to(ids_N.device)]
        hidden = node_K[fate_K < masked].to(ids_N.device)
        swapped = (fate_K >= masked) & (fate_K < masked + RANDOM)
        ids_N[hidden] = int(self.mask_id or 0)
        ids_N[node_K[swapped].to(ids_N.device)] = random_K[swapped].to(ids_N.device)
        weighted = zip(rows, chosen, strict=True)
        examples = tuple(replace(row, weight_T=hit.astype(np.float32)) for row, hit in weighted)
        return replace(
            batch,
            tree=replace(batch.tree, examples=examples),
            child_E=node_K.numpy(),
            ids_N=ids_N,
            source_S=node_K.to(ids_N.device),
            edge_source_E=torch.arange(len(node_K), device=ids_N.device),
            target_E=target_K,
            weight_E=torch.ones(len(node_K), device=ids_N.device),
            weight=float(len(node_K)),
            # Cached states of frozen layers belong to the original tokens.
            is_unchanged=False,
        )

    def alone(self, piece: Example) -> list[Example]:
        """Return a copy of a piece for each token, in which only that token can be selected."""
        words = piece.target
        assert words is not None
        places_T = np.arange(len(words))
        return [
            replace(piece, target=np.where(places_T == place, words, -1))
            for place in np.flatnonzero(words >= 0)
        ]

    def _choose(
        self, word_T: IntArray, generator: np.random.Generator
    ) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Return the selected tokens of one row; at least one token, or one word with
        ``whole_word``."""
        alone_T = np.where(word_T < 0, -1, np.arange(len(word_T)))
        unit_T = word_T if self.whole_word else alone_T
        units = np.unique(unit_T[unit_T >= 0])
        count = max(1, round(self.mask_share * len(units)))
        return np.isin(unit_T, generator.permutation(units)[:count])

    def loss(self, network: Network, batch: TreeBatch) -> Loss:
        """Return the summed cross-entropy of the selected tokens."""
        from luthier.objectives.logprobs import weighted_nll

        return Loss(weighted_nll(network, batch))


def _pieces(example: Example, size: int) -> list[Example]:
    """Cut ``example`` into pieces of ``size`` tokens with special tokens."""
    words = example.target
    assert words is not None
    inside = np.flatnonzero(words >= 0)
    if not len(inside):
        return []
    before, after = np.arange(inside[0]), np.arange(inside[-1] + 1, len(example))
    step = size - len(before) - len(after)
    pieces = []
    for start in range(inside[0], inside[-1] + 1, step):
        positions = np.concatenate(
            [before, np.arange(start, min(start + step, inside[-1] + 1)), after]
        )
        pieces.append(replace(take_tokens(example, positions), target=words[positions]))
    return pieces
