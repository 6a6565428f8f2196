"""Base classes of distillation from a teacher.

The metric of language models is the divergence between the next-token distributions of student and
teacher; see :mod:`luthier.objectives.distillation.divergence`.
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
    ReplyObjective,
    RunModels,
    RunStart,
)
from luthier.objectives.sft import encode_replies
from luthier.types import Example, Loss, Row

if TYPE_CHECKING:
    from luthier.data.conversations.chat import ChatFormat
    from luthier.models.networks.network import Network, TreeBatch
    from luthier.objectives.distillation.divergence import Distribution

DivergenceName = Literal["forward", "reverse", "jsd"]


class TeacherObjective(Objective):
    """Base class of the objectives with a teacher that shares the student's tokenizer."""

    teacher: str = ""
    """Id of the teacher model; must have the student's tokenizer."""

    @property
    def other_models(self) -> Mapping[str, str]:
        """Return the teacher's id."""
        return {"teacher": self.teacher} if self.teacher else {}

    def bind(self, models: RunModels) -> Self:
        """Reject a missing teacher, and a teacher with a different tokenizer."""
        if not self.teacher:
            raise RecipeError("no teacher. Set `objective.teacher=ID`", rule="teacher.missing")
        # The first call checks the format alone, before the teacher is opened.
        if "teacher" not in models.others:
            return super().bind(models)
        teacher = models.others["teacher"]
        self.check_teacher(teacher)
        check_same_tokens(teacher.chat, models.chat)
        return super().bind(models)

    def check_teacher(self, teacher: OtherModel) -> None:
        """Reject a teacher for a different task."""

    def prepare(self, start: RunStart) -> PreparedRows:
        """Print a note if the student is larger than the teacher."""
        note_sizes(start.network, start.network.others["teacher"], start.note)
        return super().prepare(start)


class TokenDivergence(ReplyObjective):
    """Base class of the objectives with a divergence between next-token distributions."""

    divergence: DivergenceName = "forward"
    """KL from teacher to student (Hinton), from student to teacher, or the JSD of GKD."""
    beta: float = Field(default=0.5, gt=0, lt=1)
    """Weight of the teacher in the mixture of ``jsd``; 0.5 in GKD's symmetric case."""
    temperature: float = Field(default=1.0, gt=0, le=1000)
    """Divisor of both logits: 1 in GKD; a higher value shows more of the unlikely tokens."""

    shapes: ClassVar[frozenset[str]] = frozenset({"prompt", "messages"})

    def divergence_loss(
        self, network: Network, batch: TreeBatch, distribution: Distribution, mix: float = 0.0
    ) -> Loss:
        """Return the summed divergence from ``distribution``, mixed with the data's cross-entropy
        by ``mix``."""
        from luthier.objectives.distillation.divergence import CHUNK, Divergence
        from luthier.objectives.logprobs import chunked_loss

        distance = Divergence(self.divergence, self.beta, self.temperature)
        compare = distance.compare(batch, distribution, mix)
        return Loss(chunked_loss(network, batch, compare, CHUNK))

    def encode(self, row: Row, index: int, chat: ChatFormat) -> Example:
        """Return the row with weight 1 on each token of each reply, as in supervised fine-tuning."""
        return encode_replies(row, index, chat)

    def parity_loss(self, network: Network, examples: Sequence[Example], budget: int) -> float:
        """Return the cross-entropy of the rows, which needs no teacher."""
        from luthier.objectives.logprobs import mean_nll

        return mean_nll(network, self.views(examples), budget)


class Distillation(TeacherObjective, TokenDivergence):
    """Base class of distillation of language models: a teacher and a divergence."""

    def check_teacher(self, teacher: OtherModel) -> None:
        """Reject a teacher without next-token distributions."""
        learned = teacher.objective
        if not learned.task.writes:
            raise RecipeError(
                f"the teacher {self.teacher} was trained for {learned.method} and cannot "
                "generate text. Use a model that generates text, encoder_distillation for "
                "classifiers, or embedding_distillation for encoders."
            )

    def bind(self, models: RunModels) -> Self:
        """Reject a teacher with another row format."""
        bound = super().bind(models)
        if "teacher" not in models.others:
            return bound
        # A stored format includes the template; `format` applies the template of this run.
        theirs, chat = models.others["teacher"].chat, self.format(models.chat)
        if (theirs.decoder is None) != (chat.decoder is None):
            raise RecipeError(
                "only one of teacher and student is an encoder-decoder, so the formats of rows "
                "differ. Train the student on the teacher's replies: `method=responses`.",
                rule="teacher.network",
            )
        kinds = theirs.template.kind, chat.template.kind
        if kinds[0] != kinds[1]:
            raise RecipeError(
                f"the teacher was tuned with template={kinds[0]}, and the student uses "
                f"template={kinds[1]}. Set `objective.template={kinds[0]}`.",
                rule="teacher.template",
            )
        return bound


def check_same_tokens(teacher: ChatFormat, student: ChatFormat) -> None:
    """Reject a teacher with a different tokenizer."""
    from luthier.models.tokenizer import tokenizer_difference

    if (difference := tokenizer_difference(teacher, student)) is None:
        return
    raise RecipeError(
        f"the tokenizers of teacher and student differ: {difference}. Train the student on the "
        "teacher's replies (`method=responses`), or use a student of the teacher's family.",
        rule="teacher.tokenizer",
    )


LARGER = 1.05
"""Size ratio up to which no note is printed, because adapters and heads add weights."""


def note_sizes(network: Network, teacher: Network, note: Callable[[str], None]) -> None:
    """Print a note if the student is larger than the teacher."""
    ours, theirs = (sum(w.numel() for w in n.model.parameters()) for n in (network, teacher))
    if ours > LARGER * theirs:
        note(
            f"the student has more weights than the teacher ({ours:,} and {theirs:,}). Tuning "
            "the student on the data may be better than imitating the teacher"
        )
