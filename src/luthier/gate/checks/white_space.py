"""Check for white space of replies that a chat template removes.

Some templates trim the content of every turn, so a model never learns the white space. A reply that
continues indented code then loses its indentation in training and in inference.
"""

from __future__ import annotations

from typing import ClassVar, Self

from luthier.data.conversations.chat import ChatFormat
from luthier.data.shapes.preferences import JudgedAnswers
from luthier.errors import RecipeError
from luthier.gate.batch_text import Spot, SpotCheck, Spots, excerpt_of
from luthier.gate.check import CheckContext, RowBatch
from luthier.gate.rules import Rule
from luthier.types import Message

INDENTATION = Rule(
    "template.indentation",
    "warning",
    "The model's chat template removes the indentation of a reply.",
    "The model learns and generates the reply without the indentation of the first line.",
    "Write the code in a fenced block, choose a base model with another template, or set "
    "`objective.template=plain`.",
)
TRIMMED = Rule(
    "template.trim",
    "note",
    "The model's chat template removes white space around a reply.",
    "The model learns and generates the reply without this white space.",
    "Remove the white space, or choose a base model with another template.",
)
_WORD = "the reply of a probe"


class WhiteSpace(SpotCheck):
    """Check for replies that lose white space in the chat template."""

    name: ClassVar[str] = "white_space"
    of_texts: ClassVar[bool] = True
    needs_model: ClassVar[bool] = True
    needs_tokenizer: ClassVar[bool] = True
    rules: ClassVar[tuple[Rule, ...]] = (INDENTATION, TRIMMED)
    measures_with: ClassVar[tuple[str, ...]] = ("chat",)

    @classmethod
    def of(cls, context: CheckContext) -> Self:
        """Create the check for the template that the objective renders."""
        assert context.chat is not None
        objective, chat = context.objective, context.chat
        return cls(chat if objective is None else objective.format(chat))

    def __init__(self, chat: ChatFormat) -> None:
        super().__init__()
        self.chat = chat

    def measure(self, batch: RowBatch) -> Spots:
        """Compare the white space around each reply with the rendered reply."""
        spots: list[Spot] = []
        if not self.chat.template.text or self.chat.decoder is not None:
            return Spots(spots)
        kept: dict[tuple[str, str], bool] = {}
        for index, row in enumerate(batch.rows):
            sides = row.sides() if isinstance(row, JudgedAnswers) else [row]
            turns = [turn for side in sides for turn in side.turns() if turn.role == "assistant"]
            broken = {
                rule.id: rule
                for turn in turns
                if turn.learned and (rule := self._broken_rule(turn.content, kept))
            }
            if broken:
                worst = broken.get(INDENTATION.id, TRIMMED)
                spots.append(Spot(index, worst.id, worst.about, excerpt_of(row)))
        return Spots(spots)

    def _broken_rule(self, reply: str, kept: dict[tuple[str, str], bool]) -> Rule | None:
        """Return the rule that a reply breaks. ``kept`` caches :meth:`_keeps`."""
        word = reply.strip()
        if not word or word == reply:
            return None
        start = reply.index(word)
        before, after = reply[:start], reply[start + len(word) :]
        indentation = before.rpartition("\n")[2]
        for around in ((before, after), (indentation, "")):
            if around not in kept:
                kept[around] = self._keeps(*around)
        if kept[before, after]:
            return None
        # One space before a reply is the form of older completion data, and no indentation.
        is_code = len(indentation) > 1 or "\t" in indentation
        return INDENTATION if is_code and not kept[indentation, ""] else TRIMMED

    def _keeps(self, before: str, after: str) -> bool:
        """Return True if the template keeps ``before`` and ``after`` around a reply."""
        reply = f"{before}{_WORD}{after}"
        return self._render(reply) == self._render(_WORD).replace(_WORD, reply)

    def _render(self, reply: str) -> str:
        turns = (Message("user", "a"), Message("assistant", reply))
        try:
            return self.chat.template.render_messages(turns, (), reply=False)
        except RecipeError:  # the learning check reports rows that the template rejects
            return ""
