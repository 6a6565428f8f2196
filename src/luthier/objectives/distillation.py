"""What distillations have in common: a teacher; of language models, also what is measured.

What is measured is how far the student's distribution over the next token is from the teacher's; see
:mod:`luthier.objectives.divergence`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field

from luthier.errors import RecipeError
from luthier.objectives.base import (
    Objective,
    OtherModel,
    PreparedRows,
    RunModels,
    RunStart,
    WritesReplies,
)
from luthier.objectives.sft import encode_replies
from luthier.types import Example, Loss, Row

if TYPE_CHECKING:
    from luthier.data.chat import ChatFormat
    from luthier.models.network import Network, TreeBatch
    from luthier.objectives.divergence import Distribution

DivergenceName = Literal["forward", "reverse", "jsd"]


class Taught(Objective):
    """Base of the objectives that learn from a teacher with the student's tokens."""

    teacher: str = ""
    """Id of the model to learn from; it has the student's tokenizer."""

    @property
    def other_models(self) -> Mapping[str, str]:
        """The teacher."""
        return {"teacher": self.teacher} if self.teacher else {}

    def bind(self, models: RunModels) -> Self:
        """Reject a missing teacher, and a teacher whose tokens are not those of the student."""
        if not self.teacher:
            raise RecipeError(
                "there is no teacher; give one with `objective.teacher=ID`", rule="teacher.missing"
            )
        if "teacher" not in models.others:
            return super().bind(models)
        teacher = models.others["teacher"]
        self.check_teacher(teacher)
        check_same_tokens(teacher.chat, models.chat)
        return super().bind(models)

    def check_teacher(self, teacher: OtherModel) -> None:
        """Reject a teacher that was trained for another task."""

    def prepare(self, start: RunStart) -> PreparedRows:
        """Print a note if the student is larger than the teacher."""
        note_sizes(start.network, start.network.others["teacher"], start.note)
        return super().prepare(start)


class TokenDivergence(WritesReplies):
    """Base of the objectives that draw the distribution over the next token to another."""

    divergence: DivergenceName = "forward"
    """KL from teacher to student (Hinton), from student to teacher, or GKD's between both."""
    beta: float = Field(default=0.5, gt=0, lt=1)
    """Weight of the teacher in the mixture of ``jsd``; 0.5 in GKD's symmetric case."""
    temperature: float = Field(default=1.0, gt=0, le=1000)
    """The logits of both are divided by it: 1 in GKD; higher shows more of what it thinks unlikely."""

    shapes: ClassVar[frozenset[str]] = frozenset({"prompt", "messages"})

    def divergence_loss(
        self, network: Network, batch: TreeBatch, distribution: Distribution, mix: float = 0.0
    ) -> Loss:
        """Summed divergence from ``distribution``, and ``mix`` times the data's own cross-entropy."""
        from luthier.objectives.divergence import CHUNK, Divergence
        from luthier.objectives.logprobs import chunked_loss

        distance = Divergence(self.divergence, self.beta, self.temperature)
        compare = distance.compare(batch, distribution, mix)
        return Loss(chunked_loss(network, batch, compare, CHUNK))

    def encode(self, row: Row, index: int, chat: ChatFormat) -> Example:
        """Weight 1 on each token of each reply, 0 on the rest, as in supervised fine-tuning."""
        return encode_replies(row, index, chat)

    def parity_loss(self, network: Network, examples: Sequence[Example], budget: int) -> float:
        """The cross-entropy of the rows, which asks no teacher."""
        from luthier.objectives.logprobs import mean_nll

        return mean_nll(network, examples, budget)


class Distillation(Taught, TokenDivergence):
    """A teacher, and how far a student is from it."""

    def check_teacher(self, teacher: OtherModel) -> None:
        """Reject a teacher that writes no text."""
        learned = teacher.objective
        if learned.task != "causal_lm":
            raise RecipeError(
                f"the teacher {self.teacher} is for {learned.method}, and gives no distribution over "
                "the next token. Take a model that writes text; classifiers are distilled with "
                "encoder_distillation, and encoders with embedding_distillation."
            )

    def bind(self, models: RunModels) -> Self:
        """Reject a teacher that reads rows in another way."""
        bound = super().bind(models)
        if "teacher" not in models.others:
            return bound
        theirs, chat = models.others["teacher"].chat, self.format(models.chat)
        if (theirs.start_id is None) != (chat.start_id is None):
            raise RecipeError(
                "one of teacher and student is an encoder-decoder and the other is not, so they do not "
                "read the same rows. Let the student learn from what the teacher writes: "
                "`method=responses`.",
                rule="teacher.network",
            )
        if theirs.template != chat.template:
            raise RecipeError(
                f"the teacher was tuned with template={theirs.template}, and the student is to read "
                f"rows with template={chat.template}. Use `objective.template={theirs.template}`.",
                rule="teacher.template",
            )
        return bound


def check_same_tokens(teacher: ChatFormat, student: ChatFormat) -> None:
    """Refuse a teacher whose tokens are not the student's."""
    from luthier.models.tokenizer import tokenizer_difference

    if (difference := tokenizer_difference(teacher, student)) is None:
        return
    raise RecipeError(
        "teacher and student have different tokenizers, so their distributions are over other tokens: "
        f"{difference}. Let the student learn from what the teacher writes (`method=responses`), or "
        "take a student of the teacher's family.",
        rule="teacher.tokenizer",
    )


LARGER = 1.05
"""Up to this ratio a student is not called larger than its teacher: adapters and heads add to it."""


def note_sizes(network: Network, teacher: Network, note: Callable[[str], None]) -> None:
    """Tell people where the student is the larger one."""
    ours, theirs = (sum(w.numel() for w in n.model.parameters()) for n in (network, teacher))
    if ours > LARGER * theirs:
        note(
            f"the student has more weights than its teacher ({ours:,} and {theirs:,}): it learns to be "
            "like the teacher, and may do better when it is tuned on the data itself"
        )
