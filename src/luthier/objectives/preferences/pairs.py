"""Base classes and helpers of the objectives for preferences between answers to one prompt.

The chosen answer is the example, the rejected answer the partner. The network computes both as rows
of one micro-batch, so the token tree computes the prompt once. The learned tokens of each side
weigh one half in total: a pair counts 1 in every mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from luthier.data.shapes.preferences import Preference, pair_answers
from luthier.errors import RowRefused
from luthier.objectives.base import Changes, ReplyObjective, TrainingDefaults, cut_end
from luthier.types import Example, FloatArray, Message, Row, Tool

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.data.conversations.chat import ChatFormat
    from luthier.models.networks.network import Network, TreeBatch


class PreferenceObjective(ReplyObjective):
    """Base class of the objectives for text generation with judged answers.

    The network can generate already, so steps are smaller than in supervised learning: Zephyr uses
    1/40 of the rate (Tunstall et al. 2023, arXiv:2310.16944, section 4), TRL's defaults 1/20,
    ORPO's authors about 1/3.
    """

    can_shard: ClassVar[bool] = True
    encoder_alternative: ClassVar[str] = "reward_model, or "
    defaults: ClassVar[TrainingDefaults] = TrainingDefaults(learning_rate_multiplier=0.1)

    def truncate(self, example: Example, context: int) -> Example:
        """Truncate the end of each answer. A row with an empty side gets weight 0."""
        sides = [_cut(side, context) for side in example.sides]
        if not all(side.weight for side in sides):
            return replace(sides[0], weight_T=np.zeros_like(sides[0].weight_T))
        return Example.from_sides(sides)

    def parity_loss(self, network: Network, examples: Sequence[Example], budget: int) -> float:
        """Return the negative log-likelihood of the answers, which depends on no reference and no
        other row."""
        from luthier.objectives.logprobs import mean_nll

        return mean_nll(network, self.views(examples), budget)


class Pairwise(PreferenceObjective):
    """Base class of the objectives that compare two answers to a prompt."""

    shapes: ClassVar[frozenset[str]] = frozenset({"preference", "rated"})
    further_shapes: ClassVar[frozenset[str]] = frozenset({"thumb"})

    def regroup(self, rows: Sequence[Row]) -> Sequence[Row]:
        """Combine rated answers to one prompt into pairs."""
        return pair_answers(rows)

    def encode(self, row: Row, index: int, chat: ChatFormat) -> Example:
        """Return both answers with weight on each token, one half in total per side."""
        assert isinstance(row, Preference)
        chosen = encode_answer(row.messages, row.chosen, index, chat, 0.5, row.tools)
        rejected = encode_answer(row.messages, row.rejected, index, chat, 0.5, row.tools)
        check_different(chosen, rejected)
        return replace(chosen, partner=rejected)

    def views(self, examples: Sequence[Example], changes: Changes = "none") -> list[Example]:
        """Return both answers as separate rows, numbered ``2 row`` and ``2 row + 1``."""
        return [side for example in examples for side in sides_of(example)]

    def describe(self, example: Example) -> str:
        """Return the length of the other answer; the file contains the text."""
        assert example.partner is not None
        return f"rather than an answer of {np.count_nonzero(example.partner.weight_T)} tokens"


@dataclass(frozen=True)
class Sides:
    """Positions of the two sides of each pair among the rows ``R`` of a micro-batch."""

    chosen_P: list[int]
    rejected_P: list[int]

    @staticmethod
    def of(batch: TreeBatch) -> Sides:
        """Return the pairs of ``batch`` by number; a repeated row is two pairs."""
        rows = [example.row for example in batch.tree.examples]
        # The tree sorts rows by tokens, so row numbers identify the sides.
        place = {row: index for index, row in enumerate(rows)}
        pairs = sorted(row for row in rows if row % 2 == 0)
        return Sides([place[row] for row in pairs], [place[row + 1] for row in pairs])

    def measures(self, reward_R: Tensor) -> dict[str, float]:
        """Return sums over the pairs: accuracy, margin and rewards.

        Equal rewards count one half: before training, all rewards of a pair are equal.
        """
        chosen_P, rejected_P = reward_R[self.chosen_P].detach(), reward_R[self.rejected_P].detach()
        return {
            "accuracy": float((chosen_P > rejected_P).sum() + (chosen_P == rejected_P).sum() / 2),
            "margin": float((chosen_P - rejected_P).sum()),
            "reward_chosen": float(chosen_P.sum()),
            "reward_rejected": float(rejected_P.sum()),
        }

    def likelihoods(self, logp_R: Tensor) -> dict[str, float]:
        """Return sums over the pairs of the log-probability of each side."""
        return {
            "logp_chosen": float(logp_R[self.chosen_P].detach().sum()),
            "logp_rejected": float(logp_R[self.rejected_P].detach().sum()),
        }


def sides_of(example: Example) -> list[Example]:
    """Return a row and the partner as two rows of a group. A group stays in a micro-batch."""
    assert example.partner is not None
    row = example.row
    return [
        replace(example, row=2 * row, group=row, partner=None),
        replace(example.partner, row=2 * row + 1, group=row),
    ]


def answer_lengths(batch: TreeBatch) -> Tensor:
    """Return the number of learned tokens ``[R]`` of each row, float32."""
    import torch

    counts = [float(np.count_nonzero(row.weight_T)) for row in batch.tree.examples]
    return torch.tensor(counts, device=batch.target_E.device)


def encode_answer(
    prompt: Sequence[Message],
    answer: Sequence[Message],
    index: int,
    chat: ChatFormat,
    share: float = 1.0,
    tools: Sequence[Tool] = (),
) -> Example:
    """Return ``prompt`` with one answer; the tokens of the answer weigh ``share`` in total."""
    encoded = chat.replies.encode_last((*prompt, *answer), len(prompt), tools)
    weight_T = _spread(encoded.learned_T, share)
    return Example(encoded.ids_T, weight_T, index, source_T=encoded.source_T)


def check_different(chosen: Example, rejected: Example) -> None:
    """Reject answers with equal tokens after template and tokenizer."""
    if np.array_equal(chosen.ids_T, rejected.ids_T):
        raise RowRefused(
            "preference.equal",
            "`chosen` and `rejected` have equal tokens.",
            "Remove the row, or fix one of both answers.",
        )


def _spread(learned_T: NDArray[np.bool_], share: float) -> FloatArray:
    weight_T = learned_T.astype(np.float32)
    # A truncated side may have no learned token: max avoids a division by 0.
    return weight_T * np.float32(share / max(1.0, float(weight_T.sum())))


def _cut(example: Example, context: int) -> Example:
    """Return one side truncated to ``context`` tokens, with the total weight unchanged."""
    shorter = cut_end(example, context)
    return replace(shorter, weight_T=_spread(shorter.weight_T != 0, example.weight))
