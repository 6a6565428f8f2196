"""Distillation of token distributions: a student learns what its teacher thinks of each next token.

At every reply token of the rows the student's distribution is drawn to the teacher's (Hinton et al.
2015, arXiv:1503.02531; for language models the supervised case of GKD, lambda = 0, Agarwal et al. 2024,
arXiv:2306.13649):

    loss = mix * cross-entropy of the data + (1 - mix) * T^2 * D(teacher || student)

with ``D`` one of :mod:`luthier.objectives.divergence`. Both have the same tokenizer; logits of both
exist for a few positions at a time. Left out: distillation between different tokenizers, for which
there are the teacher's replies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field

from luthier.errors import RecipeError
from luthier.objectives.base import Objective
from luthier.objectives.sft import SFT
from luthier.types import Example, Loss, Row

if TYPE_CHECKING:
    from luthier.data.chat import ChatFormat
    from luthier.models.network import Network, TreeBatch
    from luthier.objectives.divergence import Given


class LogitDistillation(Objective):
    """The teacher's distribution over the next token, on the rows' replies."""

    method: Literal["logit_distillation"] = "logit_distillation"
    teacher: str = ""
    """Id of the model to learn from; it has the student's tokenizer."""
    divergence: Literal["forward", "reverse", "jsd"] = "forward"
    """KL from teacher to student (Hinton), from student to teacher, or GKD's between both."""
    beta: float = Field(default=0.5, gt=0, lt=1)
    """Weight of the teacher in the mixture of ``jsd``; 0.5 in GKD's symmetric case."""
    temperature: float = Field(default=1.0, gt=0)
    """Logits of both are divided by it; 1 in GKD, higher shows more of what the teacher thinks unlikely."""
    mix: float = Field(default=0.0, ge=0, lt=1)
    """Share of the data's own cross-entropy; none in GKD, "considerably lower" than the rest in Hinton."""
    template: Literal["auto", "chat", "plain"] = "auto"
    """How a row becomes text: the model's chat template, or prompt and completion as they are."""

    shapes: ClassVar[frozenset[str]] = frozenset({"prompt", "messages"})

    @property
    def others(self) -> Mapping[str, str]:
        """The teacher."""
        return {"teacher": self.teacher} if self.teacher else {}

    @property
    def rows(self) -> SFT:
        """Rows become tokens as in supervised fine-tuning."""
        return SFT(template=self.template)

    def check(self, chat: ChatFormat) -> None:
        """There must be a teacher."""
        if not self.teacher:
            raise RecipeError("there is no teacher; give one with --set objective.teacher=ID")

    def meet(self, name: str, other: Objective) -> Self:
        """The teacher must write text."""
        from luthier.objectives.teacher import check_writer

        check_writer(other)
        return self

    def check_other(self, name: str, other: ChatFormat, chat: ChatFormat) -> None:
        """The teacher must read the same tokens."""
        from luthier.objectives.teacher import check_same_tokens

        check_same_tokens(other, chat)

    def format(self, chat: ChatFormat) -> ChatFormat:
        """Apply ``template``, keeping the base model's own choice for ``auto``."""
        return self.rows.format(chat)

    def encode(self, row: Row, index: int, chat: ChatFormat) -> Example:
        """Weight 1 on each token of each reply, 0 on the rest."""
        return self.rows.encode(row, index, chat)

    def begin(
        self,
        network: Network,
        examples: Sequence[Example],
        budget: int,
        note: Callable[[str], None],
    ) -> Sequence[Example]:
        """Say so where the student is larger than the teacher."""
        from luthier.objectives.teacher import note_sizes

        note_sizes(network, network.others["teacher"], note)
        return examples

    def loss(self, network: Network, batch: TreeBatch) -> Loss:
        """Summed divergence and cross-entropy of the learned tokens."""
        from luthier.objectives import divergence
        from luthier.objectives.logprobs import chunked_loss

        measure = divergence.Divergence(self.divergence, self.beta, self.temperature)
        compare = measure.compare(batch, self._given(network, batch), self.mix)
        return Loss(chunked_loss(network, batch, compare, divergence.CHUNK))

    def _given(self, network: Network, batch: TreeBatch) -> Given:
        from luthier.objectives.teacher import whole_distribution

        return whole_distribution(network, network.others["teacher"], batch, self.temperature)

    def parity_loss(self, network: Network, examples: Sequence[Example], budget: int) -> float:
        """The cross-entropy of the rows, which asks no teacher."""
        from luthier.objectives.logprobs import mean_nll

        return mean_nll(network, examples, budget)
