"""Listwise direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290, appendix A.3).

People rank several answers to a prompt. Under the Plackett-Luce model the best wins among all, the
second among the others, and so on, each with the softmax of DPO's rewards,
``r_k = beta (log p_k - log p_ref,k)``. The loss of a row is minus the logarithm of the chance of its
order, ``sum_k logsumexp(r_k, ..., r_K) - r_k``: with two answers it is DPO's. The paper has no
experiment with it. Left out: ties, which the model cannot say.
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
from luthier.objectives.pairs import Judged, check_different, encode_answer
from luthier.objectives.references import ReferenceObjective
from luthier.types import Example, Loss, Row

if TYPE_CHECKING:
    from luthier.data.chat import ChatFormat
    from luthier.models.network import Network, TreeBatch


class ListwiseDPO(ReferenceObjective, Judged):
    """Learn the order in which people like several answers, without a reward model."""

    method: Literal["listwise_dpo"] = "listwise_dpo"
    beta: float = Field(default=0.1, gt=0, le=1000)
    """How near to the reference the model stays: more is nearer. The paper's for DPO (appendix B)."""

    shapes: ClassVar[frozenset[str]] = frozenset({"ranking"})
    further_shapes: ClassVar[frozenset[str]] = frozenset({"preference"})
    evaluation_shapes: ClassVar[frozenset[str]] = Judged.evaluation_shapes | {"ranking"}

    def encode(self, row: Row, index: int, chat: ChatFormat) -> Example:
        """Weight on each token of all answers, the same share of 1 on each."""
        assert isinstance(row, JudgedAnswers)
        answers = row.answers()
        share = 1 / len(answers)
        sides = [
            encode_answer(row.messages, each, index, chat, share, row.tools) for each in answers
        ]
        for one, other in combinations(sides, 2):
            check_different(one, other)
        return Example.of_sides(sides)

    def views(self, examples: Sequence[Example], changes: Changes = "none") -> list[Example]:
        """Return the answers as rows of their own that are never parted, in their order by number."""
        return [
            replace(side, row=MOST_ANSWERS * example.row + place, group=example.row)
            for example in examples
            for place, side in enumerate(example.sides)
        ]

    def loss(self, network: Network, batch: TreeBatch) -> Loss:
        """Summed loss over the rankings.

        ``accuracy`` is the share of pairs of answers the right way round, one number for each row, and
        ``margin`` the reward of the best answer above the mean of the others.
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
            reward_K = reward_R[[place for _, place in sorted(places[group])]]
            # The chance of the last answer among itself alone is 1.
            behind_K = reward_K.flip(0).logcumsumexp(0).flip(0)
            losses.append((behind_K - reward_K)[:-1].sum())
            known_K = reward_K.detach()
            above_KK = torch.sign(known_K[:, None] - known_K[None])
            pairs = len(known_K) * (len(known_K) - 1) / 2
            # Of equal rewards, as all are before training, either may be the higher one.
            accuracy += 0.5 + float(above_KK.triu(1).sum()) / (2 * pairs)
            margin += float(known_K[0] - known_K[1:].mean())
        return Loss.of_rows(torch.stack(losses), {"accuracy": accuracy, "margin": margin})

    def describe(self, example: Example) -> str:
        """How many answers are worse; their texts are in the file."""
        return f"rather than {len(example.sides) - 1} other answers"
