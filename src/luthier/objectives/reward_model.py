"""A reward model: a number for each answer, learned from which of two people preferred.

The Bradley-Terry model (1952) as in Ouyang et al. 2022, arXiv:2203.02155, equation 1: the chosen answer
wins with probability ``sigmoid(r_chosen - r_rejected)``, and the loss is the negative logarithm of it.
The scalar head is transformers' own for sequences with one label, so the model loads there. Networks
with a chat template read the conversation in it, up to the token that ends the answer (or the one
before, where the tokenizer also fills up with it, as transformers would not see it); the others
(encoders) read prompt and answer with an empty line between. Left out: normalisation of all comparisons
of one prompt (every pair counts 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from luthier.data.shapes.preferences import Preference, pair_answers
from luthier.models.heads import Head, Task
from luthier.objectives.base import Changes, Objective, cut_text
from luthier.objectives.pairs import Sides, check_different, sides_of
from luthier.types import Example, Loss, Row

if TYPE_CHECKING:
    from luthier.data.chat import ChatFormat
    from luthier.models.network import Network, TreeBatch


class RewardModel(Objective):
    """How much people like an answer."""

    method: Literal["reward_model"] = "reward_model"
    margin: float = Field(default=0.0, ge=0, le=1e6)
    """By how much the chosen answer is to win (Touvron et al. 2023, section 3.2.2, of one size)."""
    centering: float = Field(default=0.0, ge=0, le=1e6)
    """Pulls the rewards of a pair to a mean of 0 (Eisenstein et al. 2023, section 2, who take 0.01)."""

    task: ClassVar[Task] = "sequence_classification"
    evaluation_shapes: ClassVar[frozenset[str]] = frozenset({"preference", "rated", "thumb"})
    can_shard: ClassVar[bool] = True
    shapes: ClassVar[frozenset[str]] = frozenset({"preference", "rated"})
    further_shapes: ClassVar[frozenset[str]] = frozenset({"thumb"})

    def head(self) -> Head:
        """One output."""
        return Head(self.task, ("reward",), "regression")

    def regroup(self, rows: Sequence[Row]) -> Sequence[Row]:
        """Rated answers to one prompt become pairs."""
        return pair_answers(rows)

    def encode(self, row: Row, index: int, chat: ChatFormat) -> Example:
        """Both answers behind their prompt, one half of the weight at the last token of each.

        A row with one answer, a conversation, or a bare text is read as it is, for its reward.
        """
        if not isinstance(row, Preference):
            return _read(row, index, chat)
        chosen, rejected = (_read(side, index, chat) for side in row.sides())
        check_different(chosen, rejected)
        half = np.float32(0.5)
        rejected = replace(rejected, weight_T=rejected.weight_T * half)
        return replace(chosen, weight_T=chosen.weight_T * half, partner=rejected)

    def truncate(self, example: Example, context: int) -> Example:
        """Keep start and closing token of both sides."""
        partner = example.partner
        partner = None if partner is None else cut_text(partner, context)
        return replace(cut_text(example, context), partner=partner)

    def views(self, examples: Sequence[Example], changes: Changes = "none") -> list[Example]:
        """Return both answers as rows of their own, numbered ``2 row`` and ``2 row + 1``."""
        sides = ([each] if each.partner is None else sides_of(each) for each in examples)
        return list(chain.from_iterable(sides))

    def loss(self, network: Network, batch: TreeBatch) -> Loss:
        """Summed loss over the pairs."""
        from torch.nn.functional import logsigmoid

        reward_R, sides = network.row_scores(batch).float()[:, 0], Sides.of(batch)
        chosen_P, rejected_P = reward_R[sides.chosen_P], reward_R[sides.rejected_P]
        each_P = -logsigmoid(chosen_P - rejected_P - self.margin)
        if self.centering:
            each_P = each_P + self.centering * (chosen_P + rejected_P).square()
        return Loss.of_rows(each_P, sides.measures(reward_R))

    def describe(self, example: Example) -> str:
        """How long the other answer is; its text is in the file."""
        return "" if example.partner is None else f"rather than {len(example.partner)} other tokens"

    def predict(self, network: Network, batch: TreeBatch) -> list[dict[str, Any]]:
        """For each row in the order of the tree: its reward."""
        return [{"reward": float(r)} for r in network.row_scores(batch).float()[:, 0]]


def _read(row: Row, index: int, chat: ChatFormat) -> Example:
    """The whole of prompt and answer, of weight 1 at its last token."""
    turns = row.turns()
    if turns and chat.template == "chat":
        ids_T = chat.encode_reply(turns, 0, row.tools).ids_T
        if ids_T[-1] == chat.tokenizer.pad_token_id:
            # transformers reads the last token that is not for filling up, and so do we.
            ids_T = ids_T[:-1]
        weight_T = np.zeros(len(ids_T), dtype=np.float32)
        weight_T[-1] = 1.0
        return Example(ids_T, weight_T, index, target=np.zeros(0))
    return replace(chat.encode_input(row, index), word_T=None)
