"""Kahneman-Tversky optimization (Ethayarajh et al. 2024, arXiv:2402.01306, section 4.1).

Each row has one answer with a thumb up or down. The reward is DPO's, ``log p - log p_ref``,
compared with a reference point ``z``: the average shift of the model from the reference. The loss
of a desirable answer is ``w (1 - sigmoid(beta (reward - z)))``, of an undesirable answer ``w (1 -
sigmoid(beta (z - reward)))``.

As in the paper, ``z`` is the mean reward of mismatched answers (each prompt with the answer of the
neighbour in the batch), at least 0 and without a gradient. The batch is the batch of the whole
step, not the micro-batch. A batch of one row has ``z = 0``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import numpy as np
from pydantic import Field

from luthier.data.disk_sequence import spool
from luthier.data.shapes.preferences import Preference, ThumbedReply
from luthier.errors import RowRefused
from luthier.objectives.base import extra_of
from luthier.objectives.preferences.pairs import PreferenceObjective, encode_answer
from luthier.objectives.preferences.references import ReferenceObjective, reference_logps
from luthier.types import Example, Loss, Row

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.data.conversations.chat import ChatFormat
    from luthier.models.networks.network import Network, TreeBatch


@dataclass(frozen=True)
class _Reference:
    """Reference log-probabilities of the rows of a micro-batch, and ``z`` of the whole batch."""

    logp_R: Tensor
    point: float


class KTO(ReferenceObjective, PreferenceObjective):
    """Preference optimization with thumbs up and down on single answers.

    Use ``dpo`` for pairs with little noise and few contradictions.
    """

    method: Literal["kto"] = "kto"
    beta: float = Field(default=0.1, gt=0, le=1000)
    """Strength of the pull towards the reference; 0.1 in most of the paper."""
    desirable_weight: float = Field(default=1.0, gt=0, le=1e6)
    """Weight of desirable answers."""
    undesirable_weight: float = Field(default=1.0, gt=0, le=1e6)
    """Weight of undesirable answers; in the paper, desirable rows sum to 1 to 4/3 of undesirable."""

    shapes: ClassVar[frozenset[str]] = frozenset({"thumb"})
    further_shapes: ClassVar[frozenset[str]] = frozenset({"preference"})
    same_each_epoch: ClassVar[bool] = False

    def regroup(self, rows: Sequence[Row]) -> Sequence[Row]:
        """Split each pair into two rows: the chosen answer with a thumb up, the rejected with a
        thumb down."""
        return spool(chain.from_iterable(map(_split_pair, rows)))

    def fit(self, rows: Sequence[Row], chat: ChatFormat) -> Self:
        """Check that both thumbs occur."""
        kinds = {row.desirable for row in rows if isinstance(row, ThumbedReply)}
        if len(kinds) < 2:
            kind = "up" if True in kinds else "down"
            raise RowRefused(
                "thumb.one_kind",
                f"all {len(rows)} training rows have a thumb {kind}.",
                "Add rows with the other thumb, or train on good answers with objective sft.",
            )
        return self

    def encode(self, row: Row, index: int, chat: ChatFormat) -> Example:
        """Return the row with weight on each token of the answer, 1 in total."""
        assert isinstance(row, ThumbedReply)
        example = encode_answer(row.messages, row.reply, index, chat, tools=row.tools)
        return replace(example, desirable=row.desirable)

    def annotate(
        self, network: Network, examples: Sequence[Example], budget: int
    ) -> list[TreeBatch]:
        """Return micro-batches with the reference log-probabilities ``[R]`` and ``z`` as ``extra``."""
        import torch

        point = self._reference_point(network, examples, budget)
        batches = super().annotate(network, examples, budget)
        return [
            replace(batch, extra=_Reference(extra_of(batch, torch.Tensor), point))
            for batch in batches
        ]

    def _reference_point(self, network: Network, examples: Sequence[Example], budget: int) -> float:
        """Return ``z``: the mean reward of mismatched answers before ``beta``, at least 0."""
        from luthier.objectives.logprobs import row_logps

        rows = mismatch_answers(examples)
        # All processes have all rows of the step, so all take the same branch before the exchange.
        if not rows:
            return 0.0
        total = 0.0
        # Processes share the batches; `rows` counts the rows of all processes.
        for batch in network.batches(rows, budget):
            logp_R = row_logps(network, batch)
            total += float((logp_R - reference_logps(network, batch)).sum())
        # A divergence is never negative; the estimate from mismatched pairs can be.
        return max(0.0, network.processes.sum(total) / len(rows))

    def loss(self, network: Network, batch: TreeBatch) -> Loss:
        """Return the summed loss over the rows."""
        from luthier.objectives.logprobs import row_logps

        reference = extra_of(batch, _Reference)
        point = reference.point
        logp_R = row_logps(network, batch)
        wanted_R = logp_R.new_tensor([bool(row.desirable) for row in batch.tree.examples]).bool()
        ratio_R = logp_R - reference.logp_R
        each_R = self._losses(ratio_R, wanted_R, point)
        reward_R = self.beta * ratio_R.detach()
        right_R = (ratio_R.detach() > point) == wanted_R
        return Loss.from_rows(
            each_R,
            {
                "accuracy": float(right_R.sum()),
                "reward_desirable": float(reward_R[wanted_R].sum()),
                "reward_undesirable": float(reward_R[~wanted_R].sum()),
                "kl": point * len(ratio_R),
            },
        )

    def _losses(self, ratio_R: Tensor, wanted_R: Tensor, point: float) -> Tensor:
        import torch

        # w (1 - sigmoid(beta (r - z))), with z - r for undesirable answers (section 4.1).
        sign_R = torch.where(wanted_R, 1.0, -1.0)
        weight_R = torch.where(wanted_R, self.desirable_weight, self.undesirable_weight)
        return weight_R * (1 - torch.sigmoid(self.beta * sign_R * (ratio_R - point)))

    def describe(self, example: Example) -> str:
        """Return the thumb of the row."""
        return "thumb up" if example.desirable else "thumb down"


def _split_pair(row: Row) -> Iterator[Row]:
    if not isinstance(row, Preference):
        yield row
        return
    for answer in row.answers():
        yield ThumbedReply(row.file, row.line, row.messages, answer, answer is row.chosen)


def mismatch_answers(examples: Sequence[Example]) -> list[Example]:
    """Return each prompt of a batch with the previous row's answer; empty for a single row.

    Answers are truncated to the longest row of the batch, and dropped if the prompt leaves no room.
    """
    if len(examples) < 2:
        return []
    longest = max(len(example) for example in examples)
    made = []
    for place, (own, other) in enumerate(zip(examples, [examples[-1], *examples], strict=False)):
        start, begins = _answer_start(own), _answer_start(other)
        ids_T = np.concatenate([own.ids_T[:start], other.ids_T[begins:]])[:longest]
        weight_T = np.concatenate([own.weight_T[:start], other.weight_T[begins:]])[:longest]
        if weight_T.any():
            # A cached reference belongs to the original answer of the row.
            row = replace(own, ids_T=ids_T, weight_T=weight_T, row=place, reference=None)
            made.append(row)
    return made


def _answer_start(example: Example) -> int:
    return int(np.flatnonzero(example.weight_T)[0])
