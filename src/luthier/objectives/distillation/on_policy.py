"""Online distillation (on-policy): the student generates, and the teacher corrects each token.

A student trained on given replies alone never learns to recover from mistakes. Here the student
answers the prompts of the rows with the current weights. At each token of the answer, the student's
distribution is pulled towards the teacher's (GKD, Agarwal et al. 2024, arXiv:2306.13649, algorithm
1; no gradient passes through the sampling):

    y ~ student(x) with probability student_share, else the reply of the row
    loss = T^2 * D(teacher, student) at each token of y, given x and the previous tokens of y

``D`` is a divergence of :mod:`luthier.objectives.distillation.divergence`. Held-out rows are
measured on the given replies, so that all steps use the same tokens. In conversations, only the
last reply is generated and learned. The paper draws the share once per batch; here each row has a
separate draw. Left out: the mix with a reward (section 3.2), and answers of the teacher; use
``luthier distil --method responses`` instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field

from luthier.objectives.base import StepReport, extra_of
from luthier.objectives.distillation.base import Distillation, DivergenceName, TokenDivergence
from luthier.objectives.reinforcement.rollout_checks import SAMPLES_PER_STEP
from luthier.objectives.reinforcement.rollouts import sample_record
from luthier.types import Example, Loss, Row

if TYPE_CHECKING:
    from luthier.data.conversations.chat import ChatFormat
    from luthier.models.decoding.sampler import Completion
    from luthier.models.networks.network import Network, TreeBatch
    from luthier.types import IntArray


@dataclass(frozen=True)
class _Written:
    """Statistics of the student's answers in one micro-batch."""

    answers: int
    tokens: int
    stopped: int
    texts: list[dict[str, Any]]
    """Records of the answers for ``samples.jsonl``."""


class OnPolicyObjective(TokenDivergence):
    """Base class of the objectives that train on the network's own answers."""

    divergence: DivergenceName = "reverse"
    """KL from teacher to student, from student to teacher (as in MiniLLM), or the JSD of GKD."""
    max_tokens: int = Field(default=128, ge=1, le=10_000_000)
    """Maximum tokens of the student's answer; the context may be shorter."""
    sampling_temperature: float = Field(default=1.0, gt=0, le=1000)
    """Sampling temperature of the student's answers; 1 in GKD."""
    stop_ids: tuple[int, ...] | None = None
    """Tokens that end an answer; default: the stop tokens of the model."""

    same_each_epoch: ClassVar[bool] = False

    def fit(self, rows: Sequence[Row], chat: ChatFormat) -> Self:
        """Read the stop tokens of the model."""
        stops = chat.stop_ids if self.stop_ids is None else self.stop_ids
        return self.model_copy(update={"stop_ids": stops})

    def encode(self, row: Row, index: int, chat: ChatFormat) -> Example:
        """Return the row with weight 1 on each token of each reply; ``source_row`` is the row,
        for samples."""
        return replace(super().encode(row, index, chat), partner=None, source_row=row)

    def draw_answered(self, count: int) -> Sequence[bool]:
        """Return a flag for each of ``count`` rows: true if the student answers the row."""
        return [True] * count

    def annotate(
        self, network: Network, examples: Sequence[Example], budget: int
    ) -> list[TreeBatch]:
        """Return rows with the student's answers in a step, and the given rows in a measurement."""
        rows = list(examples)
        if not network.model.training:
            return [*network.batches(rows, budget)]
        chosen = [place for place, own in enumerate(self.draw_answered(len(rows))) if own]
        written: dict[int, Completion] = {}
        for place, answer in zip(
            chosen, self._answers(network, [rows[place] for place in chosen]), strict=True
        ):
            rows[place] = with_answer(rows[place], answer.ids_T)
            # By identity, because micro-batches reorder rows. `rows` keeps the objects alive.
            written[id(rows[place])] = answer
        batches = network.batches(rows, budget)
        return [
            replace(batch, extra=_match_completions(batch, written, network.chat))
            for batch in batches
        ]

    def _answers(self, network: Network, examples: Sequence[Example]) -> list[Completion]:
        from luthier.models.decoding.sampler import sample
        from luthier.models.decoding.sampling import Sampling
        from luthier.models.random_numbers import draw_seeds

        prompts = [prompt_of(example) for example in examples]
        if not prompts:
            return []
        # One limit for the whole batch; `sides` includes the longer input of an SDFT teacher.
        room = min(_room(network, side) for example in examples for side in example.sides)
        completions = sample(
            network,
            prompts,
            1,
            Sampling(
                max_tokens=min(self.max_tokens, room),
                temperature=self.sampling_temperature,
            ),
            stop_ids=self.stop_ids or (),
            seeds=draw_seeds(len(prompts)),
        )
        return [answers[0] for answers in completions]

    def report(
        self,
        network: Network,
        batches: Sequence[TreeBatch],
        lines: Sequence[Mapping[str, Any]],
    ) -> StepReport:
        """Return mean tokens per answer, the share of finished answers, and the first answers.

        The means cover all processes; the answers belong to this process.
        """
        written = [extra_of(batch, _Written) for batch in batches if batch.extra is not None]
        texts = [text for each in written for text in each.texts][:SAMPLES_PER_STEP]
        processes = network.processes
        answers, tokens, ended = (
            processes.sum(sum(getattr(each, name) for each in written))
            for name in ("answers", "tokens", "stopped")
        )
        if not answers:
            return StepReport(samples=texts)
        metrics = {"answer_tokens": tokens / answers, "answers_ended": ended / answers}
        return StepReport(metrics, texts)


class OnPolicyDistillation(OnPolicyObjective, Distillation):
    """Distillation of the teacher's next-token distributions on the student's own answers.

    Use ``logit_distillation`` for shorter runs: sampling is slow, and teacher probabilities can be
    cached.
    """

    method: Literal["on_policy_distillation"] = "on_policy_distillation"
    student_share: float = Field(default=1.0, ge=0, le=1)
    """Share of rows that the student answers; lambda in GKD, 1 is purely on-policy."""

    def draw_answered(self, count: int) -> Sequence[bool]:
        """Draw each row independently with probability ``student_share``."""
        import torch

        # Seeded per step by the engine: all processes draw the same rows.
        drawn: list[bool] = (torch.rand(count) < self.student_share).tolist()
        return drawn

    def loss(self, network: Network, batch: TreeBatch) -> Loss:
        """Return the summed divergence at the tokens of the answers."""
        from luthier.objectives.distillation.teacher import whole_distribution

        teacher = network.others["teacher"]
        distribution = whole_distribution(network, teacher, batch, self.temperature)
        return self.divergence_loss(network, batch, distribution)


def _record(row: Row, prompt_T: IntArray, answer: Completion, chat: ChatFormat) -> dict[str, Any]:
    reply = chat.replies.decode_reply(prompt_T, answer.text_ids)
    return sample_record(row, reply, len(answer.ids_T), answer.stopped)


def _reply_start(example: Example) -> int:
    # The last token without a weight precedes the last reply.
    before = np.flatnonzero(example.weight_T == 0)
    return int(before[-1]) + 1


def prompt_of(example: Example) -> IntArray:
    """Return the prompt of the last reply; for an encoder-decoder, the encoder's input."""
    if example.source_T is not None:
        return example.source_T
    return example.ids_T[: _reply_start(example)]


def answer_of(example: Example) -> IntArray:
    """Return the tokens of the last reply of a row."""
    return example.ids_T[_reply_start(example) :]


def with_answer(example: Example, ids_T: IntArray) -> Example:
    """Return the row with another last reply. Only the last reply has weights."""
    start = _reply_start(example)
    weight_T = np.zeros(start + len(ids_T), dtype=np.float32)
    weight_T[start:] = 1.0
    return replace(example, ids_T=np.concatenate([example.ids_T[:start], ids_T]), weight_T=weight_T)


def _room(network: Network, example: Example) -> int:
    return network.context - network.tokens_before - _reply_start(example)


def _match_completions(
    batch: TreeBatch, written: Mapping[int, Completion], chat: ChatFormat | None
) -> _Written:
    own = [(row, written[id(row)]) for row in batch.tree.examples if id(row) in written]
    return _Written(
        len(own),
        sum(int(np.count_nonzero(row.weight_T)) for row, _ in own),
        sum(answer.stopped for _, answer in own),
        [
            _record(row.source_row, prompt_of(row), answer, chat)
            for row, answer in own
            if row.source_row and chat
        ],
    )
