"""On-policy distillation: the student writes, and the teacher says what it would have written.

A student that learns from given replies alone never sees what follows its own mistakes. Here it answers
the prompts of the rows with the weights of the step, and at each token of its answer its distribution
is drawn to the teacher's (GKD, Agarwal et al. 2024, arXiv:2306.13649, algorithm 1; no gradient passes
through the sampling):

    y ~ student(x) with probability student_share, else the reply of the row
    loss = T^2 * D(teacher, student) at each token of y, given x and what is before it in y

``D`` is one of :mod:`luthier.objectives.divergence`. Held-out rows are measured on their own replies,
so that all steps are measured on the same tokens. Of a conversation the last reply is written anew, and
it alone is learned. The paper draws the share once for each batch, here each row has its own draw. Left
out: the mix with a reward (section 3.2), and answers written by the teacher, for which there is
``luthier distil --method responses``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field

from luthier.objectives.base import StepReport, extra_of
from luthier.objectives.distillation import Distillation, DivergenceName, TokenDivergence
from luthier.objectives.rollout_checks import SAMPLES_PER_STEP
from luthier.objectives.rollouts import sample_record
from luthier.types import Example, Loss, Row

if TYPE_CHECKING:
    from luthier.data.chat import ChatFormat
    from luthier.models.decoding import Completion
    from luthier.models.network import Network, TreeBatch
    from luthier.types import IntArray


@dataclass(frozen=True)
class _Written:
    """How the student's answers of one micro-batch came out."""

    answers: int
    tokens: int
    stopped: int
    texts: list[dict[str, Any]]
    """The answers, as ``samples.jsonl`` keeps them."""


class OwnAnswers(TokenDivergence):
    """Base of the objectives that learn on what the network itself answers in the step."""

    divergence: DivergenceName = "reverse"
    """KL from teacher to student, from student to teacher (MiniLLM's), or GKD's between both."""
    max_tokens: int = Field(default=128, ge=1, le=10_000_000)
    """Longest answer of the student; shorter where the context ends before."""
    sampling_temperature: float = Field(default=1.0, gt=0, le=1000)
    """Of the student's answers; 1 in GKD."""
    stop_ids: tuple[int, ...] | None = None
    """Tokens that end an answer; those of the model when not given."""

    same_each_epoch: ClassVar[bool] = False

    def fit(self, rows: Sequence[Row], chat: ChatFormat) -> Self:
        """Read what ends an answer of this model."""
        stops = chat.stop_ids if self.stop_ids is None else self.stop_ids
        return self.model_copy(update={"stop_ids": stops})

    def encode(self, row: Row, index: int, chat: ChatFormat) -> Example:
        """Weight 1 on each token of each reply, 0 on the rest; the row stays with it, to be shown."""
        return replace(super().encode(row, index, chat), given=row)

    def draw_answered(self, count: int) -> Sequence[bool]:
        """Which of ``count`` rows of a step the student answers itself."""
        return [True] * count

    def annotate(
        self, network: Network, examples: Sequence[Example], budget: int
    ) -> list[TreeBatch]:
        """In a step, rows with the student's answers; in a measurement, the rows as they are."""
        rows = list(examples)
        if not network.model.training:
            return [*network.batches(rows, budget)]
        chosen = [place for place, own in enumerate(self.draw_answered(len(rows))) if own]
        written: dict[int, Completion] = {}
        for place, answer in zip(
            chosen, self._answers(network, [rows[place] for place in chosen]), strict=True
        ):
            rows[place] = with_answer(rows[place], answer.ids_T)
            written[id(rows[place])] = answer
        batches = network.batches(rows, budget)
        return [
            replace(batch, extra=_match_completions(batch, written, network.chat))
            for batch in batches
        ]

    def _answers(self, network: Network, examples: Sequence[Example]) -> list[Completion]:
        from luthier.models.decoding import sample
        from luthier.models.random_numbers import draw_seeds
        from luthier.models.sampling import Sampling

        prompts = [prompt_of(example) for example in examples]
        if not prompts:
            return []
        room = min(_room(network, side) for example in examples for side in example.sides)
        found = sample(
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
        return [answers[0] for answers in found]

    def report(
        self,
        network: Network,
        batches: Sequence[TreeBatch],
        lines: Sequence[Mapping[str, Any]],
    ) -> StepReport:
        """Return mean tokens per answer, the share of answers that ended, and the first answers.

        The means are of all processes; the answers are those of this process.
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


class OnPolicyDistillation(OwnAnswers, Distillation):
    """The teacher's distribution over the next token, on the student's own answers."""

    method: Literal["on_policy_distillation"] = "on_policy_distillation"
    student_share: float = Field(default=1.0, ge=0, le=1)
    """Share of rows that the student answers itself; lambda in GKD, 1 being purely on-policy."""

    def draw_answered(self, count: int) -> Sequence[bool]:
        """Rows are drawn, each by itself."""
        import torch

        drawn: list[bool] = (torch.rand(count) < self.student_share).tolist()
        return drawn

    def loss(self, network: Network, batch: TreeBatch) -> Loss:
        """Summed divergence at the tokens of the answers."""
        from luthier.objectives.teacher import whole_distribution

        teacher = network.others["teacher"]
        distribution = whole_distribution(network, teacher, batch, self.temperature)
        return self.divergence_loss(network, batch, distribution)


def _record(row: Row, prompt_T: IntArray, answer: Completion, chat: ChatFormat) -> dict[str, Any]:
    reply = chat.decode_reply(prompt_T, answer.text_ids)
    return sample_record(row, reply, len(answer.ids_T), answer.stopped)


def _reply_start(example: Example) -> int:
    """Place of the first token of the last reply."""
    before = np.flatnonzero(example.weight_T == 0)
    return int(before[-1]) + 1


def prompt_of(example: Example) -> IntArray:
    """What the last reply of a row is an answer to; what the encoder reads, where there is one."""
    if example.source_T is not None:
        return example.source_T
    return example.ids_T[: _reply_start(example)]


def answer_of(example: Example) -> IntArray:
    """The tokens of the last reply of a row."""
    return example.ids_T[_reply_start(example) :]


def with_answer(example: Example, ids_T: IntArray) -> Example:
    """The row with another last reply, which alone is learned."""
    start = _reply_start(example)
    weight_T = np.zeros(start + len(ids_T), dtype=np.float32)
    weight_T[start:] = 1.0
    return replace(example, ids_T=np.concatenate([example.ids_T[:start], ids_T]), weight_T=weight_T)


def _room(network: Network, example: Example) -> int:
    """Tokens that fit into the context behind the prompt of a row."""
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
            _record(row.given, prompt_of(row), answer, chat)
            for row, answer in own
            if row.given and chat
        ],
    )
