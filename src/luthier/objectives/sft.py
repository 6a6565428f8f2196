"""Supervised fine-tuning: learn the replies of the data (Ouyang et al. 2022, section 3.5).

The loss is the cross-entropy of the reply tokens given all previous tokens, averaged over all
learned tokens of the global batch. Every assistant turn of a conversation is learned, including the
end token; prompts are not. Left out of the paper: the mix-in of pre-training text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from luthier.data.shapes.preferences import JudgedAnswers
from luthier.objectives.base import ReplyObjective
from luthier.types import Example, Loss, Row

if TYPE_CHECKING:
    from luthier.data.conversations.chat import ChatFormat
    from luthier.models.networks.network import Network, TreeBatch


class SFT(ReplyObjective):
    """Supervised fine-tuning on prompt and completion pairs or conversations.

    Use ``dpo`` for pairs of better and worse replies, or ``causal_lm`` for raw text.
    """

    method: Literal["sft"] = "sft"
    can_shard: ClassVar[bool] = True
    shapes: ClassVar[frozenset[str]] = frozenset({"prompt", "messages", "passages"})
    further_shapes: ClassVar[frozenset[str]] = frozenset({"rated"})

    def encode(self, row: Row, index: int, chat: ChatFormat) -> Example:
        """Return the row with weight 1 on each token of each reply, 0 on all other tokens."""
        return encode_replies(row, index, chat)

    def describe(self, example: Example) -> str:
        """Return the number of earlier replies in sequences of their own."""
        earlier = len(example.sides) - 1
        return f"and earlier replies in {earlier} more sequences" if earlier else ""

    def loss(self, network: Network, batch: TreeBatch) -> Loss:
        """Return the summed cross-entropy of the learned tokens."""
        from luthier.objectives.logprobs import weighted_nll

        return Loss(weighted_nll(network, batch))


def encode_replies(row: Row, index: int, chat: ChatFormat) -> Example:
    """Encode a row with weight 1 on each token of each reply, 0 on all other tokens.

    If the template rewrites earlier turns, the partners are the sequences of earlier replies.
    """
    # A rating judges one answer; earlier assistant turns of the prompt are context.
    prompt_turns = len(row.messages) if isinstance(row, JudgedAnswers) else 0
    sequences = [
        Example(
            each.ids_T,
            each.learned_T.astype(np.float32),
            index,
            source_T=each.source_T,
            images=each.images,
        )
        for each in chat.replies.encode(row.turns(), prompt_turns, row.tools)
    ]
    return Example.from_sides(sequences[::-1])
