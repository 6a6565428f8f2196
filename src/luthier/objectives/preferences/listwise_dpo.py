"""Listwise direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290, appendix A.3).

Rows have a ranking of several answers to a prompt. In the Plackett-Luce model, the best answer wins
among all, the second among the remaining, and so on, each with the softmax of DPO's rewards, ``r_k
= beta (log p_k - log p_ref,k)``. The loss of a row is the negative log-probability of the ranking,
``sum_k logsumexp(r_k, ..., r_K) - r_k``. With two answers, the loss equals DPO. The paper has no
experiment. Left out: ties, which the model cannot express.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from luthier.data.shapes.preferences import MOST_ANSWERS, JudgedAnswers
from luthier.objectives.base import Changes, extra_of
from luthier.objectives.preferences.pairs import PreferenceObjective, check_different, encode_answer
from luthier.objectives.preferences.references import ReferenceObjective
from luthier.types import Example, Loss, Row

if TYPE_CHECKING:
    from luthier.data.conversations.chat import ChatFormat
    from luthier.models.networks.network import Network, TreeBatch


class ListwiseDPO(ReferenceObjective, PreferenceObjective):
    """Preference optimization with rankings of several answers, without a reward model.

    Use ``dpo`` for two answers per prompt (equal loss), or for ties among rated answers.
    """

    method: Literal["listwise_dpo"] = "listwise_dpo"
    beta: float = Field(default=0.1, gt=0, le=1000)
    """Strength of the pull towards the reference; the paper's value for DPO (appendix B)."""

    shapes: ClassVar[frozenset[str]] = frozenset({"ranking"})
    further_shapes: ClassVar[frozenset[str]] = frozenset({"preference"})
    evaluation_shapes: ClassVar[frozenset[str]] = PreferenceObjective.evaluation_shapes | {
        "ranking"
    }

    def encode(self, row: Row, index: int, chat: ChatFormat) -> Example:
        """Return all answers with weight on each token, an equal share of 1 per answer."""
        assert isinstance(row, JudgedAnswers)
        answers = row.answers()
        share = 1 / len(answers)
        sides = [
            encode_answer(row.messages, each, index, chat, share, row.tools) for each in answers
        ]
        for one, other in combinations(sides, 2):
            check_different(one, other)
        return Example.from_sides(sides)

    def views(self, examples: Sequence[Example], changes: Changes = "none") -> list[Example]:
        """Return the answers as separate rows of one group, numbered in ranking order."""
        return [
            # A row has at most MOST_ANSWERS answers, so numbers of two rows never collide.
            replace(side, row=MOST_ANSWERS * example.row + place, group=example.row)
            for example in examples
            for place, side in enumerate(example.sides)
        ]

    def loss(self, network: Network, batch: TreeBatch) -> Loss:
        """Return the summed loss over the rankings.

        ``accuracy`` is the share of correctly ordered pairs of answers, averaged per row.
        ``margin`` is the reward of the best answer minus the mean of the remaining answers.
        """
        import torch

        from luthier.objectives.logprobs import row_logps

        logp_R = row_logps(network, batch)
        reward_R = self.beta * (logp_R - extra_of(batch, torch.Tensor))
        places: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
        for place, row in enumerate(batch.tree.examples):
            assert row.group is not None
            places[row.group].append((row.row, place))
        losses, accuracy, margin = [], 0.0, 0.0
        for group in sorted(places):
            # The tree sorts rows by tokens; row numbers restore the ranking.
            reward_K = reward_R[[place for _, place in sorted(places[group])]]
            # behind_k = logsumexp(r_k, ..., r_K). The last term is 0: a single answer always wins.
            behind_K = reward_K.flip(0).logcumsumexp(0).flip(0)
            losses.append((behind_K - reward_K)[:-1].sum())
            known_K = reward_K.detach()
            above_KK = torch.sign(known_K[:, None] - known_K[None])
            pairs = len(known_K) * (len(known_K) - 1) / 2
            # Equal rewards count one half: before training, all rewards are equal.
            # The sum is correct pairs minus wrong pairs.
            accuracy += 0.5 + float(above_KK.triu(1).sum()) / (2 * pairs)
            margin += float(known_K[0] - known_K[1:].mean())
        return Loss.from_rows(torch.stack(losses), {"accuracy": accuracy, "margin": margin})

    def describe(self, example: Example) -> str:
        """Return the number of other answers; the file contains the text."""
        return f"rather than {len(example.sides) - 1} other answers"
