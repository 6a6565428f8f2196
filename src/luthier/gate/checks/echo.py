"""Check for replies that repeat the prompt."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import ClassVar

from luthier.data.shapes.preferences import JudgedReply
from luthier.gate.batch_text import Spot, SpotCheck, Spots, excerpt
from luthier.gate.check import RowBatch
from luthier.gate.rules import Rule
from luthier.types import Row

REPEATED = Rule(
    "reply.repeats_prompt",
    "warning",
    "A reply is the prompt, or begins with the whole prompt.",
    "The model learns to repeat the prompt before the answer.",
    "Remove the prompt from the reply, or remove the row.",
    drop=True,
)
LEAST_PROMPT = 24
"""Minimum length of a prompt, without white space, for a reply that begins with the prompt. A reply
to "Hello" often begins with "Hello"."""
LEAST_COPY = 4
"""Minimum length of a prompt, without white space, for a reply that equals the prompt."""


class Echo(SpotCheck):
    """A check for replies that equal the prompt or begin with the prompt.

    Letter case and white space make no difference. The prompt is the user's turn before the reply.
    """

    name: ClassVar[str] = "echo"
    of_texts: ClassVar[bool] = True
    rules: ClassVar[tuple[Rule, ...]] = (REPEATED,)

    def measure(self, batch: RowBatch) -> Spots:
        """Return the rows of a batch with a reply that repeats its prompt."""
        spots: list[Spot] = []
        for index, row in enumerate(batch.rows):
            for prompt, reply in _exchanges(row):
                if message := _find_repetition(prompt, reply):
                    spots.append(Spot(index, REPEATED.id, message, excerpt(reply)))
                    break
        return Spots(spots)


def _exchanges(row: Row) -> Iterator[tuple[str, str]]:
    """Yield each turn of the user with the reply that is learned for the turn."""
    if isinstance(row, JudgedReply):  # judged replies include bad replies
        return
    for before, turn in pairwise(row.turns()):
        if before.role == "user" and turn.role == "assistant" and turn.learned:
            yield before.content, turn.content


def _find_repetition(prompt: str, reply: str) -> str | None:
    """Describe how ``reply`` repeats ``prompt``; ``None`` without repetition."""
    # Most replies begin with another character, and long texts are not copied for them.
    if prompt.lstrip()[:1].casefold() != reply.lstrip()[:1].casefold():
        return None
    given, said = ("".join(text.casefold().split()) for text in (prompt, reply))
    if given == said and len(given) >= LEAST_COPY:
        return "The reply is the prompt."
    if said.startswith(given) and len(given) >= LEAST_PROMPT:
        return "The reply begins with the prompt."
    return None
