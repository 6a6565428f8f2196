"""Causal language modelling: continued pre-training on raw text (Radford et al. 2019).

Documents are joined with the end-of-text token between them and cut into sequences of
``sequence_length`` tokens, so no token is padding and none is dropped; each token is predicted from
those before it in its sequence. Left out: a mask between documents of one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from luthier.errors import RecipeError
from luthier.objectives.base import Objective, check_writes
from luthier.types import Example, Loss, Row

if TYPE_CHECKING:
    from luthier.data.chat import ChatFormat
    from luthier.models.network import Network, TreeBatch


class CausalLM(Objective):
    """Next-token prediction on raw text, packed into sequences of equal length."""

    method: Literal["causal_lm"] = "causal_lm"
    sequence_length: int = Field(default=512, ge=3, le=10_000_000)
    """Tokens in a packed sequence; at most the model's context."""

    approach: ClassVar[str] = "self-supervised"
    shapes: ClassVar[frozenset[str]] = frozenset({"text"})

    def check(self, chat: ChatFormat) -> None:
        """Refuse encoder-decoders, whose decoder would have nothing to read."""
        if chat.start_id is not None:
            raise RecipeError(
                "causal_lm is for networks that go on with a text, and this one answers what its "
                "encoder reads. Use span_corruption for raw text, or sft for prompts with replies."
            )
        check_writes(self, chat, "masked_lm for raw text, or ")

    def encode(self, row: Row, index: int, chat: ChatFormat) -> Example:
        """The document and its end-of-text token, all of weight 1 but the first."""
        ids_T = chat.encode_text(row.plain_text())
        return Example(ids_T, _all_but_first(len(ids_T)), index)

    def pack(self, examples: Sequence[Example], context: int) -> list[Example]:
        """Join the documents and cut them; ``row`` becomes the number of the sequence."""
        size = min(self.sequence_length, context)
        stream = np.concatenate([example.ids_T for example in examples])
        pieces = [stream[start : start + size] for start in range(0, len(stream), size)]
        if len(pieces) > 1 and len(pieces[-1]) == 1:
            # One token alone has nothing before it to be predicted from: give it its neighbour.
            pieces[-2:] = [pieces[-2][:-1], stream[-2:]]
        return [Example(ids, _all_but_first(len(ids)), row) for row, ids in enumerate(pieces)]

    def loss(self, network: Network, batch: TreeBatch) -> Loss:
        """Summed cross-entropy of all tokens but the first of each sequence."""
        from luthier.objectives.logprobs import weighted_nll

        return Loss(weighted_nll(network, batch))


def _all_but_first(size: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    weight_T = np.ones(size, dtype=np.float32)
    weight_T[0] = 0.0
    return weight_T
