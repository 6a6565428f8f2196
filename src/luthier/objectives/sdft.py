"""Self-distillation fine-tuning: the network learns from itself with the answer before its eyes.

What a model says of a task once it has read an example of a good answer is better than what it says
without, and near to what it said before. So it is its own teacher (Shenfeld et al. 2026,
"Self-Distillation Enables Continual Learning", arXiv:2601.19897): the student answers the prompt alone,
and at each token of its answer its distribution is drawn to the teacher's, which has read the row's
reply (equation 1 of the paper, every token of the vocabulary counted):

    y ~ student(. | prompt)
    loss = D(teacher(. | prompt, reply, y so far), student(. | prompt, y so far))

It never has to say what it would not have said, and forgets less than by imitation (``sft``). What it
can learn is bounded by what it makes of an example: small models make little of it, and replies in a
form that none of its own answers has are hardly found.

The teacher is the network at its starting weights, so no second one is held, and resuming needs nothing
more. Left out of the paper: a teacher of averaged weights that follows the student slowly, which its
ablation prefers to a fixed one; leaving the first tokens of an answer out of the loss. Another method
of that name (Yang et al. 2024, "Self-Distillation Bridges Distribution Gap", arXiv:2402.13669) lets the
model write the replies anew and imitates these: it is no part of this.

Held-out rows are measured on their own replies. Of a conversation the last reply is learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import field_validator

from luthier.objectives.base import Changes, cut_end
from luthier.objectives.on_policy_distillation import OwnAnswers, answer_of, with_answer
from luthier.types import Example, Loss, Message, Row

if TYPE_CHECKING:
    from luthier.data.chat import ChatFormat
    from luthier.models.network import Network, TreeBatch

REPLY = "{reply}"


class SDFT(OwnAnswers):
    """Self-distillation: the teacher is the model itself, which has read the row's reply."""

    method: Literal["sdft"] = "sdft"
    demonstration: str = f"\n\nAn example of a good answer:\n{REPLY}\n\nNow give your own answer."
    """What the teacher reads behind the prompt; ``{reply}`` stands for the row's own."""

    shapes: ClassVar[frozenset[str]] = frozenset()
    further_shapes: ClassVar[frozenset[str]] = OwnAnswers.shapes
    uses_reference: ClassVar[bool] = True

    @field_validator("demonstration")
    @classmethod
    def _shows_the_reply(cls, text: str) -> str:
        if REPLY not in text:
            raise ValueError(f"must hold {REPLY}, where the teacher reads the reply of the row")
        return text

    def encode(self, row: Row, index: int, chat: ChatFormat) -> Example:
        """The row with its last reply learned; beside it, what the teacher reads before the answer."""
        example = super().encode(row, index, chat)
        own = with_answer(example, answer_of(example))
        turns = list(row.turns())
        while turns[-1].role != "assistant" or not turns[-1].learned:
            turns.pop()
        shown = self.demonstration.replace(REPLY, turns.pop().reply_text)
        asked = turns.pop() if turns else Message("user")
        turns.append(replace(asked, content=asked.content + shown))
        read_T = chat.encode_prompt(turns, row.tools)
        ids_T = read_T if own.source_T is None else own.ids_T[:1]
        source_T = None if own.source_T is None else read_T
        weight_T = np.zeros(len(ids_T), dtype=np.float32)
        return replace(own, partner=Example(ids_T, weight_T, index, source_T=source_T))

    def views(self, examples: Sequence[Example], changes: Changes = "none") -> list[Example]:
        """Return what the student reads, and what the teacher reads without learning."""
        found: list[Example] = []
        for example in examples:
            if example.partner is None:
                found.append(example)
                continue
            shown = with_answer(example.partner, answer_of(example))
            unlearned = replace(shown, weight_T=np.zeros_like(shown.weight_T))
            found += [replace(example, partner=None), unlearned]
        return found

    def truncate(self, example: Example, context: int) -> Example:
        """The row with so much less of its reply that the teacher has room for it."""
        over = max(map(len, self.views([example]))) - context
        assert example.partner is not None
        own = cut_end(example, min(context, len(example) - max(0, over)))
        return replace(own, partner=cut_end(example.partner, context))

    def loss(self, network: Network, batch: TreeBatch) -> Loss:
        """Summed divergence at the tokens of the answers."""
        from luthier.objectives.teacher import whole_distribution

        shown = [with_answer(e.partner, answer_of(e)) for e in batch.tree.examples if e.partner]
        with network.at_start():
            distribution = whole_distribution(network, network, batch, self.temperature, shown)
        return self.divergence_loss(network, batch, distribution)
