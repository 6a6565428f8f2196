"""Measuring a model on held-out rows: let it answer each prompt, grade each answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.errors import DataError, Problem
from luthier.graders import Grader
from luthier.types import Message, Row


@dataclass(frozen=True)
class Graded:
    """One answer and its scores."""

    prompt: str
    reply: str
    expected: str
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Evaluation:
    """Mean scores over rows, and every answer."""

    scores: dict[str, float]
    rows: int
    answers: list[Graded]

    def plain(self) -> dict[str, Any]:
        """Scores and count, without the answers."""
        return {"rows": self.rows, "scores": self.scores}


def questions(rows: Sequence[Row]) -> tuple[list[Sequence[Message]], list[str]]:
    """What is asked in each row, and the reply the row expects.

    Of a conversation, everything before the last assistant turn is asked; of judged answers the one
    that was chosen is expected.
    """
    asked: list[Sequence[Message]] = []
    expected: list[str] = []
    for row in rows:
        if row.reply is not None:
            asked.append((*(row.messages or ()), *row.reply[:-1]))
            expected.append(row.reply[-1].content)
        elif row.messages:
            asked.append(row.messages[:-1])
            expected.append(row.messages[-1].content)
        elif row.prompt is not None and row.completion is not None:
            asked.append((Message("user", row.prompt),))
            expected.append(row.completion)
        else:
            raise DataError(
                [
                    Problem(
                        row.file,
                        row.line,
                        "row.no_reply",
                        "raw text has no reply to compare with.",
                        "Give rows of prompt and completion, or messages.",
                    )
                ]
            )
    return asked, expected


def grade(rows: Sequence[Row], replies: Sequence[str], graders: Mapping[str, Grader]) -> Evaluation:
    """Grade ``replies`` to ``rows`` with each of ``graders``."""
    asked, expected = questions(rows)
    answers = [
        Graded(
            messages[-1].content, reply, wanted, {n: g(reply, wanted) for n, g in graders.items()}
        )
        for messages, reply, wanted in zip(asked, replies, expected, strict=True)
    ]
    count = max(1, len(answers))
    scores = {name: sum(a.scores[name] for a in answers) / count for name in graders}
    return Evaluation(scores, len(answers), answers)
