"""Reading: the span of a context that answers a question."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from luthier.models.networks.heads import Task as HeadKind
from luthier.tasks.base import Answer, Task

if TYPE_CHECKING:
    from luthier.data.chat import ChatFormat


class Reading(Task):
    """Answers from a context."""

    head: ClassVar[HeadKind] = "question_answering"

    def show(self, answer: Answer, threshold: float | None, top: int) -> str:
        """Return the answer with its characters and probability."""
        place = f"  [{answer['start']}:{answer['end']}]" if answer["answer"] else ""
        return f"{answer['answer'] or '(no answer)'}{place}  {answer['score']:.1%}"

    def command(self, model_id: str, chat: ChatFormat) -> str:
        """Predict rows of a file, because a row has two texts."""
        return f"predict {model_id} --input questions.jsonl"


READING = Reading()
