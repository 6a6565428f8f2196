"""Reading: the span of a context that answers a question."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, cast

from luthier.data.shapes.questions import AnsweredQuestion
from luthier.evaluation.significance import RowScores, Score
from luthier.graders.similarity import squad_words
from luthier.models.networks.heads import HeadKind
from luthier.tasks.base import Answer, Task, check_targets
from luthier.types import Row

if TYPE_CHECKING:
    from luthier.data.conversations.chat import ChatFormat


class ReadingTask(Task):
    """Answers from a context."""

    head: ClassVar[HeadKind] = "question_answering"

    def scores(self, rows: Sequence[Row], answers: Sequence[Answer]) -> Mapping[str, Score]:
        """Compare each answer with the best correct answer, as SQuAD's evaluation script does.

        Rajpurkar et al. 2016, section 6.1. Without a correct answer, only the empty answer is right.
        """
        check_targets(rows)
        asked = zip(cast("Sequence[AnsweredQuestion]", rows), answers, strict=True)
        words = [
            (squad_words(answer["answer"]), [squad_words(text) for text in row.answers] or [[]])
            for row, answer in asked
        ]
        return {
            "answer_f1": RowScores.of(
                [max(_word_f1(given, truth) for truth in truths) for given, truths in words]
            ),
            "exact_match": RowScores.of([given in truths for given, truths in words]),
        }

    def show(self, answer: Answer, threshold: float | None, top: int) -> str:
        """Return the answer with its characters and probability."""
        place = f"  [{answer['start']}:{answer['end']}]" if answer["answer"] else ""
        return f"{answer['answer'] or '(no answer)'}{place}  {answer['score']:.1%}"

    def command(self, model_id: str, chat: ChatFormat) -> str:
        """Predict rows of a file, because a row has two texts."""
        return f"predict {model_id} --input questions.jsonl"


READING = ReadingTask()


def _word_f1(given: Sequence[str], truth: Sequence[str]) -> float:
    if not given or not truth:
        return float(given == truth)
    common = (Counter(given) & Counter(truth)).total()
    return 2 * common / (len(given) + len(truth))
