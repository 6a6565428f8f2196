"""Embedding: a vector for each row, close to the vectors of similar rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from luthier.data.shapes.media import CaptionedImage
from luthier.data.shapes.texts import TextPair
from luthier.models.networks.heads import Task as HeadKind
from luthier.tasks.base import Answer, Task, example_input
from luthier.types import Row

if TYPE_CHECKING:
    from luthier.data.chat import ChatFormat


class Embedding(Task):
    """Embeddings of texts, images and audio."""

    head: ClassVar[HeadKind] = "embedding"
    embeds: ClassVar[bool] = True

    def check(self, chat: ChatFormat) -> None:
        """Reject a network without embeddings of sentences."""
        chat.check_sentence()

    def row_limit(self, chat: ChatFormat, context: int) -> int:
        """Return the limit of the sentence encoder, if smaller."""
        return chat.longest_embedded(context)

    def inputs(self, row: Row) -> list[Row]:
        """Return both sides of a pair, to compare the embeddings."""
        return row.sides() if isinstance(row, TextPair | CaptionedImage) else [row]

    def combine(self, answers: Sequence[dict[str, Any]], threshold: float | None) -> dict[str, Any]:
        """Return the embedding; for a pair, the cosine and whether the sides are similar."""
        if len(answers) == 1:
            return answers[0]
        one, other = (side["embedding"] for side in answers)
        # Embeddings have length 1, so the inner product is the cosine.
        score = math.fsum(a * b for a, b in zip(one, other, strict=True))
        return {"score": score} | ({} if threshold is None else {"similar": score > threshold})

    def show(self, answer: Answer, threshold: float | None, top: int) -> str:
        """Return the first numbers of the embedding."""
        numbers = ", ".join(f"{x:.3f}" for x in answer["embedding"][:top])
        return f"{len(answer['embedding'])} numbers: {numbers}, … (--json prints all)"

    def command(self, model_id: str, chat: ChatFormat) -> str:
        """Search the nearest rows of a file."""
        use = f"nearest {model_id} DATA {example_input(chat)}"
        if chat.reads != "text" and chat.has_tokenizer:
            use += f'\n              luthier nearest {model_id} DATA "some text"'
        return use


EMBEDDING = Embedding()
