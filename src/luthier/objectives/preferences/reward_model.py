"""Reward models: a number for each answer, learned from preferences between two answers.

The Bradley-Terry model (1952) as in Ouyang et al. 2022, arXiv:2203.02155, equation 1: the chosen
answer wins with probability ``sigmoid(r_chosen - r_rejected)``, and the loss is the negative
log-probability. The scalar head is transformers' head for sequences with one label, so the model
loads in transformers.

Networks with a chat template encode the conversation up to the token that ends the answer. If the
end token is also the padding token, the token before is the last, because transformers would skip
padding. Encoders without a template encode prompt and answer with an empty line between. Left out:
normalisation over all comparisons of one prompt (every pair counts 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from luthier.data.shapes.preferences import Preference, pair_answers
from luthier.models.networks.heads import Head
from luthier.objectives.base import Changes, Objective, cut_text
from luthier.objectives.preferences.pairs import Sides, check_different, sides_of
from luthier.tasks import REWARD, Task
from luthier.types import Example, Loss, Row, weight_at_end

if TYPE_CHECKING:
    from luthier.data.conversations.chat import ChatFormat
    from luthier.models.networks.network import Network, TreeBatch


class RewardModel(Objective):
    """Reward model from preferences.

    Use ``dpo`` to tune a generating model directly on pairs, without sampling.
    """

    method: Literal["reward_model"] = "reward_model"
    margin: float = Field(default=0.0, ge=0, le=1e6)
    """Target margin of the chosen answer (Touvron et al. 2023, section 3.2.2, with one size)."""
    centering: float = Field(default=0.0, ge=0, le=1e6)
    """Weight of a pull of each pair's mean reward to 0 (Eisenstein et al. 2023, section 2: 0.01)."""

    task: ClassVar[Task] = REWARD
    evaluation_shapes: ClassVar[frozenset[str]] = frozenset({"preference", "rated", "thumb"})
    can_shard: ClassVar[bool] = True
    shapes: ClassVar[frozenset[str]] = frozenset({"preference", "rated"})
    further_shapes: ClassVar[frozenset[str]] = frozenset({"thumb"})

    def head(self) -> Head:
        """Return a head with one output."""
        return Head(self.task.head, ("reward",), "regression")

    def regroup(self, rows: Sequence[Row]) -> Sequence[Row]:
        """Combine rated answers to one prompt into pairs."""
        return pair_answers(rows)

    def encode(self, row: Row, index: int, chat: ChatFormat) -> Example:
        """Return both answers after the prompt, with half the weight at the last token of each.

        A row with one answer, a conversation or raw text is encoded unchanged, to predict a reward.
        """
        if not isinstance(row, Preference):
            return _encode_whole(row, index, chat)
        chosen, rejected = (_encode_whole(side, index, chat) for side in row.sides())
        check_different(chosen, rejected)
        half = np.float32(0.5)
        rejected = replace(rejected, weight_T=rejected.weight_T * half)
        return replace(chosen, weight_T=chosen.weight_T * half, partner=rejected)

    def truncate(self, example: Example, context: int) -> Example:
        """Keep the start and the closing token of both sides."""
        partner = example.partner
        partner = None if partner is None else cut_text(partner, context)
        return replace(cut_text(example, context), partner=partner)

    def views(self, examples: Sequence[Example], changes: Changes = "none") -> list[Example]:
        """Return both answers as separate rows, numbered ``2 row`` and ``2 row + 1``."""
        sides = ([each] if each.partner is None else sides_of(each) for each in examples)
        return list(chain.from_iterable(sides))

    def loss(self, network: Network, batch: TreeBatch) -> Loss:
        """Return the summed loss over the pairs."""
        from torch.nn.functional import logsigmoid

        reward_R, sides = network.row_scores(batch).float()[:, 0], Sides.of(batch)
        chosen_P, rejected_P = reward_R[sides.chosen_P], reward_R[sides.rejected_P]
        # logsigmoid, not log(sigmoid): the latter is -inf for large negative margins.
        each_P = -logsigmoid(chosen_P - rejected_P - self.margin)
        if self.centering:
            each_P = each_P + self.centering * (chosen_P + rejected_P).square()
        return Loss.from_rows(each_P, sides.measures(reward_R))

    def describe(self, example: Example) -> str:
        """Return the length of the other answer; the file contains the text."""
        return "" if example.partner is None else f"rather than {len(example.partner)} other tokens"

    def predict(self, network: Network, batch: TreeBatch) -> list[dict[str, Any]]:
        """Return the reward of each row, in tree order."""
        return [{"reward": float(r)} for r in network.row_scores(batch).float()[:, 0]]


def _encode_whole(row: Row, index: int, chat: ChatFormat) -> Example:
    """Return prompt and answer, with weight 1 at the last token."""
    turns = row.turns()
    if turns and chat.template.kind == "chat":
        ids_T = chat.replies.encode_last(turns, 0, row.tools).ids_T
        if ids_T[-1] == chat.tokenizer.pad_token_id:
            # transformers pools the last token that is not padding, here the token before the end.
            ids_T = ids_T[:-1]
        # With a target, even an empty one, the tree predicts no tokens of the row.
        return Example(ids_T, weight_at_end(len(ids_T)), index, target=np.zeros(0))
    return chat.encode_input(row, index)
