"""Self-distillation fine-tuning: the network learns from the same network with the answer in
context.

A model with an example of a good answer in context answers better than without, and close to the
model's own style. So the model is its own teacher (Shenfeld et al. 2026, "Self-Distillation Enables
Continual Learning", arXiv:2601.19897). The student answers the prompt alone. At each token of the
answer, the student's distribution is pulled towards the teacher's, whose context includes the row's
reply (equation 1 of the paper, over the whole vocabulary):

    y ~ student(. | prompt)
    loss = D(teacher(. | prompt, reply, y so far), student(. | prompt, y so far))

The model never learns text that the model would not have generated, and forgets less than with
imitation (``sft``). The gain is limited by in-context learning: small models gain little, and
replies in a form that no own answer has are hardly learned.

The teacher is the network at the initial weights, so no second network is in memory, and a resume
needs no additional state. Left out: a teacher with averaged weights that slowly follows the student
(the paper's ablation prefers the average to a fixed teacher), and excluding the first tokens of an
answer from the loss. A different method of the same name (Yang et al. 2024, "Self-Distillation
Bridges Distribution Gap", arXiv:2402.13669) imitates rewritten replies and is not implemented.

Held-out rows are measured on the given replies. In conversations, the last reply is learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import field_validator

from luthier.objectives.base import Changes, cut_end
from luthier.objectives.distillation.on_policy import OnPolicyObjective, answer_of, with_answer
from luthier.types import Example, Loss, Message, Row

if TYPE_CHECKING:
    from luthier.data.conversations.chat import ChatFormat
    from luthier.models.networks.network import Network, TreeBatch

REPLY = "{reply}"


class SDFT(OnPolicyObjective):
    """Self-distillation with the row's reply in the teacher's context.

    Use ``sft`` for small models, or if replies have a form that the model never generates.
    """

    method: Literal["sdft"] = "sdft"
    demonstration: str = f"\n\nAn example of a good answer:\n{REPLY}\n\nNow give your own answer."
    """Text after the teacher's prompt; ``{reply}`` is replaced by the row's reply."""

    shapes: ClassVar[frozenset[str]] = frozenset()
    further_shapes: ClassVar[frozenset[str]] = OnPolicyObjective.shapes
    uses_reference: ClassVar[bool] = True

    @field_validator("demonstration")
    @classmethod
    def _shows_the_reply(cls, text: str) -> str:
        if REPLY not in text:
            raise ValueError(f"must contain {REPLY}, the place of the row's reply")
        return text

    def encode(self, row: Row, index: int, chat: ChatFormat) -> Example:
        """Return the row with the last reply learned; the partner is the teacher's prompt."""
        example = super().encode(row, index, chat)
        own = with_answer(example, answer_of(example))
        turns = list(row.turns())
        # A conversation may end with turns that are not learned.
        while turns[-1].role != "assistant" or not turns[-1].learned:
            turns.pop()
        demonstration = self.demonstration.replace(REPLY, turns.pop().reply_text)
        question = turns.pop() if turns else Message("user")
        turns.append(replace(question, content=question.content + demonstration))
        read_T = chat.encode_prompt(turns, row.tools)
        # Encoder-decoder: the encoder gets the demonstration, and the decoder a start token.
        ids_T = read_T if own.source_T is None else own.ids_T[:1]
        source_T = None if own.source_T is None else read_T
        weight_T = np.zeros(len(ids_T), dtype=np.float32)
        return replace(own, partner=Example(ids_T, weight_T, index, source_T=source_T))

    def views(self, examples: Sequence[Example], changes: Changes = "none") -> list[Example]:
        """Return the input rows of the student, and of the teacher with weight 0."""
        rows: list[Example] = []
        for example in examples:
            if example.partner is None:
                rows.append(example)
                continue
            teacher_row = with_answer(example.partner, answer_of(example))
            # The row counts for lengths and memory, not for the divisor of the loss.
            unlearned = replace(teacher_row, weight_T=np.zeros_like(teacher_row.weight_T))
            rows += [replace(example, partner=None), unlearned]
        return rows

    def truncate(self, example: Example, context: int) -> Example:
        """Truncate the reply, so that the teacher's input fits into the context."""
        over = max(map(len, self.views([example]))) - context
        assert example.partner is not None
        # The teacher's input ends with the answer too, so a shorter reply shortens both inputs.
        own = cut_end(example, min(context, len(example) - max(0, over)))
        return replace(own, partner=cut_end(example.partner, context))

    def loss(self, network: Network, batch: TreeBatch) -> Loss:
        """Return the summed divergence at the tokens of the answers."""
        from luthier.objectives.distillation.teacher import whole_distribution

        shown = [with_answer(e.partner, answer_of(e)) for e in batch.tree.examples if e.partner]
        # The teacher runs before the student: `at_start` changes the weights of the same network.
        with network.at_start():
            distribution = whole_distribution(network, network, batch, self.temperature, shown)
        return self.divergence_loss(network, batch, distribution)
