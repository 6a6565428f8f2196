"""Rows with passages from an index, for questions with a known answer."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from luthier.data.conversations.citations import DECLINED
from luthier.data.shapes.passages import CitedAnswer
from luthier.data.shapes.questions import AnsweredQuestion
from luthier.documents.answers import PASSAGES
from luthier.documents.retriever import CANDIDATES, Retriever
from luthier.errors import DataError, Problem
from luthier.graders.similarity import supports
from luthier.types import Row


def draw_passages(
    rows: Sequence[Row],
    retriever: Retriever,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[CitedAnswer]:
    """Return ``rows`` with passages of an index, as ``luthier ask`` finds them, in random order.

    The right passage is the nearest passage that supports the answer; the wrong passages do not
    support the answer. A row is left out if none of the first :data:`CANDIDATES` passages supports
    the answer.

    Raises:
        DataError: with every row that is no question with an answer.
    """
    drawn, problems = list[CitedAnswer](), list[Problem]()
    for number, row in enumerate(rows, 1):
        known = _question_and_answer(row)
        if known is None:
            fix = 'Write {"question", "answer"}, or rows with "context" and "answers".'
            problems.append(
                Problem("row.objective", "The row is no question and answer.", fix, row.location)
            )
            continue
        question, answer = known
        found, _ = retriever.search(question, CANDIDATES)
        texts = [each.passage.content for each in found]
        right = [each for each in texts if answer is not None and supports(each, answer)][:1]
        wrong = [each for each in texts if answer is None or not supports(each, answer)]
        if right or (answer is None and wrong):
            drawn.append(mix_passages(row, question, answer, right, wrong, number))
        on_progress(number, len(rows))
    if problems:
        raise DataError(problems)
    return drawn


def mix_passages(
    row: Row,
    question: str,
    answer: str | None,
    right: Sequence[str],
    wrong: Sequence[str],
    seed: int,
) -> CitedAnswer:
    """Return a row with ``right`` passages, which are cited, and ``wrong`` passages, in random order.

    ``row`` names the place of the question.
    """
    passages = [*right, *wrong][:PASSAGES]
    random.Random(seed).shuffle(passages)
    cited = tuple(passages.index(each) + 1 for each in right)
    return CitedAnswer(row.file, row.line, question, (*passages,), answer, cited)


def _question_and_answer(row: Row) -> tuple[str, str | None] | None:
    """Return question and answer; ``None`` without an answer."""
    if isinstance(row, AnsweredQuestion):
        return row.question, row.answers[0] if row.answers else None
    turns = row.turns()
    if [turn.role for turn in turns] != ["user", "assistant"] or isinstance(row, CitedAnswer):
        return None
    answer = turns[1].content
    return turns[0].content, None if answer == DECLINED else answer
