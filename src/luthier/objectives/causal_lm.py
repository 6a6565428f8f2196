"""Causal language modelling: continued pre-training on raw text (Radford et al. 2019).

Documents are joined with the end-of-text token and cut into sequences of ``sequence_length``
tokens, without padding or dropped tokens. Each token is predicted from the previous tokens of the
sequence. Left out: a mask between documents of one sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import numpy as np
from pydantic import Field

from luthier.data.disk_sequence import spool
from luthier.data.tokens import cut_stream
from luthier.errors import RecipeError
from luthier.objectives.base import Objective, RunModels, check_writes
from luthier.types import Example, IntArray, Loss, Row

if TYPE_CHECKING:
    from luthier.data.conversations.chat import ChatFormat
    from luthier.models.networks.network import Network, TreeBatch


class CausalLM(Objective):
    """Next-token prediction on raw text, packed into sequences of equal length.

    Use ``sft`` for prompts with replies, ``masked_lm`` for encoders, or ``span_corruption`` for
    encoder-decoders.
    """

    method: Literal["causal_lm"] = "causal_lm"
    sequence_length: int = Field(default=512, ge=3, le=10_000_000)
    """Tokens per packed sequence; at most the model's context."""

    can_shard: ClassVar[bool] = True
    shapes: ClassVar[frozenset[str]] = frozenset({"text"})

    def bind(self, models: RunModels) -> Self:
        """Reject encoder-decoders, because the encoder would have no input."""
        chat = models.chat
        if chat.decoder is not None:
            raise RecipeError(
                "causal_lm requires a decoder, and the base model is an encoder-decoder. Use "
                "span_corruption for raw text, or sft for prompts with replies.",
                rule="objective.network",
            )
        check_writes(self, chat, "masked_lm for raw text, or ")
        return super().bind(models)

    def encode(self, row: Row, index: int, chat: ChatFormat) -> Example:
        """Return the document with the end-of-text token. All tokens but the first have weight 1."""
        ids_T = chat.text_tokenizer.encode_text(row.plain_text())
        return Example(ids_T, _all_but_first(len(ids_T)), index)

    def pack(self, examples: Sequence[Example], context: int) -> Sequence[Example]:
        """Join the documents and cut the stream; ``row`` becomes the number of the sequence."""
        size = min(self.sequence_length, context)
        pieces = enumerate(_merge_last_token(cut_stream((each.ids_T for each in examples), size)))
        return spool(Example(ids, _all_but_first(len(ids)), row) for row, ids in pieces)

    def loss(self, network: Network, batch: TreeBatch) -> Loss:
        """Return the summed cross-entropy of all tokens but the first of each sequence."""
        from luthier.objectives.logprobs import weighted_nll

        return Loss(weighted_nll(network, batch))


def _merge_last_token(pieces: Iterable[IntArray]) -> Iterator[IntArray]:
    """Yield ``pieces``. A final piece of one token has no context, so the token before joins the
    piece."""
    before: IntArray | None = None
    for piece in pieces:
        if before is not None and len(piece) == 1:
            piece = np.concatenate([before[-1:], piece])
            before = before[:-1]
        if before is not None:
            yield before
        before = piece
    if before is not None:
        yield before


def _all_but_first(size: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    weight_T = np.ones(size, dtype=np.float32)
    weight_T[0] = 0.0
    return weight_T
