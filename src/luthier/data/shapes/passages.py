"""Shape of questions with passages and a citing answer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, cast

from luthier.data.conversations.citations import (
    DECLINED,
    add_passages,
    cited_numbers,
    without_citations,
)
from luthier.data.disk_sequence import spool
from luthier.data.field_checks import FieldChecker
from luthier.data.files.parsing import Record, json_kind
from luthier.data.shapes.base import ENOUGH_ANSWERS, Shape
from luthier.errors import RowRefused
from luthier.types import Message, Part, Row


@dataclass(frozen=True, slots=True)
class CitedAnswer(Shape):
    """A question, numbered passages, and an answer with citations."""

    shape: ClassVar[str] = "passages"
    title: ClassVar[str] = '{"question", "passages", "answer", "cited"}'
    noun: ClassVar[str] = "questions with passages and a cited answer"
    enough: ClassVar[int] = ENOUGH_ANSWERS
    keys: ClassVar[tuple[str, ...]] = ("passages",)
    complete: ClassVar[tuple[frozenset[str], ...]] = (
        frozenset(("question", "passages", "answer")),
    )
    optional_keys: ClassVar[frozenset[str]] = frozenset(("cited",))
    json_keys: ClassVar[frozenset[str]] = frozenset(("passages", "cited"))
    parts: ClassVar[dict[str, Part]] = {
        "question": "input",
        "passages": "input",
        "answer": "target",
    }

    question: str
    passages: tuple[str, ...]
    answer: str | None
    """The answer; ``None`` if the passages do not answer the question."""
    cited: tuple[int, ...]
    """Numbers of the passages with the answer, from 1."""

    @classmethod
    def read(cls, record: Record, fields: FieldChecker) -> Self | None:
        question, passages = fields.text(record, "question"), _read_passages(record["passages"])
        # A data frame leaves a null out.
        no_answer = "answer" in record or record.get("cited") == []
        declined = no_answer and record.get("answer") in (None, DECLINED)
        answer = None if declined else fields.text(record, "answer", target=True)
        if question is None or (answer is None and not declined):
            return None
        cited = _read_cited(record.get("cited"), answer, len(passages))
        return cls(fields.file, fields.line, question, passages, answer, cited)

    @property
    def reply(self) -> str:
        """The answer with citations, at the end unless the answer has citations."""
        if self.answer is None:
            return DECLINED
        numbers = "" if cited_numbers(self.answer) else "".join(f"[{n}]" for n in self.cited)
        return f"{self.answer} {numbers}".rstrip()

    def inputs(self) -> tuple[str, ...]:
        return (self.question, *self.passages)

    def targets(self) -> tuple[str, ...]:
        return (self.reply,)

    def turns(self) -> tuple[Message, ...]:
        asked = add_passages([Message("user", self.question)], self.passages)
        return (*asked, Message("assistant", self.reply))

    def expected_reply(self) -> str:
        """Return the answer without citations, which have their own scores."""
        return without_citations(self.reply)

    def classes(self) -> tuple[str, ...]:
        """Return whether the answer declines, so that held-out rows decline as often."""
        return (str(self.answer is None),)

    def record(self) -> Record:
        return {
            "question": self.question,
            "passages": list(self.passages),
            "answer": self.answer,
            "cited": list(self.cited),
        }


def _read_passages(value: Any) -> tuple[str, ...]:
    """Return the passages of a row.

    Raises:
        RowRefused: for an empty array, and for items without text.
    """
    if isinstance(value, list) and value:
        wrong = [each for each in value if not isinstance(each, str) or not each.strip()]
        if not wrong:
            return tuple(value)
        found = "an item is blank" if isinstance(wrong[0], str) else f"has {json_kind(wrong[0])}"
    else:
        found = "is empty" if value == [] else f"is {json_kind(value)}"
    raise RowRefused(
        "passages.type",
        f'"passages" must be an array of texts, but {found}.',
        'Write "passages": ["a passage", "another passage"].',
    )


def _read_cited(value: Any, answer: str | None, passages: int) -> tuple[int, ...]:
    """Return the cited numbers of a row, by default those in the text of the answer.

    Raises:
        RowRefused: for other values, numbers without a passage, and an answer without citation.
    """
    written = cited_numbers(answer or "")
    numbers = list(written) if value is None else value
    if not isinstance(numbers, list) or any(type(each) is not int for each in numbers):
        raise RowRefused(
            "cited.type",
            f'"cited" must be an array of numbers, but is {json_kind(value)}.',
            'Write "cited": [1] for the first passage.',
        )
    for number in (*numbers, *written):
        if not 1 <= number <= passages:
            raise RowRefused(
                "cited.range",
                f"{number} is cited, and the passages have the numbers 1 to {passages}.",
                "Count the passages from 1, or add the passage.",
            )
    if answer is None and numbers:
        raise RowRefused(
            "cited.declined",
            "the row has no answer and cites a passage.",
            'Write "cited": [], or add the answer.',
        )
    if answer is not None and not numbers:
        raise RowRefused(
            "cited.missing",
            "the answer cites no passage.",
            'Write "cited": [1] for the first passage, or "answer": null if no passage answers the '
            "question.",
        )
    if written and {*written} != {*numbers}:
        raise RowRefused(
            "cited.contradiction",
            f'the answer cites {[*written]}, and "cited" is {numbers}.',
            'Correct the answer, or remove "cited".',
        )
    return tuple(dict.fromkeys(numbers))


def decline_some(rows: Sequence[Row], share: float, seed: int) -> tuple[Sequence[Row], int]:
    """Return ``rows``, of which at least ``share`` have no answer, and the number of changed rows.

    Passages with the answer are replaced by cited passages of other rows.
    """
    known = [cast("CitedAnswer", row) for row in rows]
    answered = [number for number, row in enumerate(known) if row.answer is not None]
    missing = round(share * len(known)) - (len(known) - len(answered))
    pool = [*dict.fromkeys(row.passages[n - 1] for row in known for n in row.cited)]
    draw, changed = random.Random(seed), dict[int, CitedAnswer]()
    for number in draw.sample(answered, len(answered)):  # in random order
        if len(changed) >= missing:
            break
        row = known[number]
        answer = (row.answer or "").casefold()
        right = {row.passages[n - 1] for n in row.cited}
        kept = [
            each for each in row.passages if each not in right and answer not in each.casefold()
        ]
        others = [
            each
            for each in draw.sample(pool, min(len(pool), 2 * len(row.passages)))
            if each not in row.passages and answer not in each.casefold()
        ]
        passages = [*kept, *others][: len(row.passages)]
        if passages:
            draw.shuffle(passages)
            changed[number] = replace(row, passages=tuple(passages), answer=None, cited=())
    if not changed:
        return rows, 0
    return spool(changed.get(number, row) for number, row in enumerate(rows)), len(changed)
