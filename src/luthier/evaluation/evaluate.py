"""Measuring a model on held-out rows: let it answer each prompt, grade each answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from luthier.data.shapes import describe_shapes
from luthier.errors import DataError, Problem
from luthier.graders import Answer, Grader, OnError, check_rows, grade_answers
from luthier.types import Message, Row

if TYPE_CHECKING:
    from luthier.objectives import Objective


@dataclass(frozen=True)
class Graded:
    """One answer and its scores."""

    prompt: str
    reply: str
    expected: str | None
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Evaluation:
    """Mean scores over rows, and every answer."""

    scores: dict[str, float]
    rows: int
    answers: list[Graded]
    """Replies with their grades; of models that read, and of raw text, there are none."""
    problems: list[Problem] = field(default_factory=list)
    """Why answers have score 0 that a grader could not grade, where that was asked for."""

    dropped: int = 0
    """Rows that were left out, as they are longer than the model's context."""
    truncated: int = 0
    """Rows that were cut to the context."""
    remarks: list[str] = field(default_factory=list)
    """What the scores do not say, in sentences: how sure they are, and what is answered wrong."""
    records: list[dict[str, Any]] = field(default_factory=list)
    """What was asked, expected and said of each row, ready for JSON."""
    tokens: int = 0
    """Of raw text: tokens that were predicted."""
    seconds: float = 0.0
    """That answering and grading took."""

    def plain(self) -> dict[str, Any]:
        """Scores and count, without the answers; how many were not graded, left out or cut, if any."""
        counts = {
            "ungraded": len(self.problems), "dropped": self.dropped, "truncated": self.truncated,
            "tokens": self.tokens,
        }  # fmt: skip
        found: dict[str, Any] = {"rows": self.rows, "scores": self.scores}
        found |= {name: count for name, count in counts.items() if count}
        return found | ({"remarks": self.remarks} if self.remarks else {})


def check_shapes(rows: Sequence[Row], objective: Objective) -> None:
    """Refuse rows that say nothing of what models of ``objective`` answer.

    Raises:
        DataError: with each such row.
    """
    wanted = describe_shapes(objective.evaluation_shapes)
    problems = [
        Problem(
            row.file,
            row.line,
            "row.objective",
            f"models of objective {objective.method} are evaluated on {wanted}, and this row is "
            f"{describe_shapes([row.shape])}.",
            "Bring the rows into the other form, or name a model that was trained for such rows.",
        )
        for row in rows
        if row.shape not in objective.evaluation_shapes
    ]
    if problems:
        raise DataError(problems, "nothing was evaluated")


def questions(rows: Sequence[Row]) -> tuple[list[Sequence[Message]], list[str | None]]:
    """What is asked in each row, and the reply the row expects, where it says.

    Of a conversation, everything before the last assistant turn is asked; of judged answers the one
    that was chosen is expected.
    """
    asked: list[Sequence[Message]] = []
    expected: list[str | None] = []
    for row in rows:
        asked.append(row.prompt_turns())
        expected.append(row.expected_reply())
        if not asked[-1]:
            raise DataError(
                [
                    Problem(
                        row.file,
                        row.line,
                        "row.no_reply",
                        "the row asks nothing that could be answered.",
                        "Give rows of prompt and completion, of prompt and expected, or messages.",
                    )
                ],
                "nothing was evaluated",
            )
    return asked, expected


def check(rows: Sequence[Row], graders: Mapping[str, Grader]) -> None:
    """Refuse rows and graders that do not go together, before a model is loaded.

    Raises:
        DataError: naming each row without a reply, or with one that a grader cannot compare with.
        RecipeError: from a grader that lacks something.
    """
    asked, expected = questions(rows)
    check_rows(list(graders.values()), _answers(rows, asked, [""] * len(asked), expected))


def grade(
    rows: Sequence[Row],
    replies: Sequence[str],
    graders: Mapping[str, Grader],
    on_error: OnError = "fail",
) -> Evaluation:
    """Grade ``replies`` to ``rows`` with each of ``graders``.

    Raises:
        GradingFailed: for an answer that a grader cannot grade, unless ``on_error`` is ``zero``.
    """
    asked, expected = questions(rows)
    answers = _answers(rows, asked, replies, expected)
    found = {name: grade_answers(grader, answers, on_error) for name, grader in graders.items()}
    told = [
        Graded(
            answer.prompt[-1].content,
            answer.reply,
            wanted,
            {name: grades.scores[index] for name, grades in found.items()},
        )
        for index, (answer, wanted) in enumerate(zip(answers, expected, strict=True))
    ]
    count = max(1, len(told))
    scores = {name: sum(a.scores[name] for a in told) / count for name in graders}
    problems = [problem for grades in found.values() for problem in grades.problems]
    return Evaluation(scores, len(told), told, problems)


def _answers(
    rows: Sequence[Row],
    asked: Sequence[Sequence[Message]],
    replies: Sequence[str],
    expected: Sequence[str | None],
) -> list[Answer]:
    each = zip(asked, replies, expected, rows, strict=True)
    return [Answer(messages, reply, wanted, row) for messages, reply, wanted, row in each]
