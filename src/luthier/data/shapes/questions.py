"""Shape of questions with the answer as a span of a context, as in SQuAD."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from itertools import accumulate, takewhile
from operator import eq
from typing import Any, ClassVar, Self

from luthier.data.conversations.turn_marks import truth_of
from luthier.data.field_checks import FieldChecker
from luthier.data.files.parsing import Record, json_kind, quote
from luthier.data.shapes.base import ENOUGH_ANSWERS, Shape
from luthier.errors import RowRefused
from luthier.types import Part

ANSWERS_EXAMPLE = '"answers": {"text": ["Paris"], "answer_start": [10]}'


@dataclass(frozen=True, slots=True)
class AnsweredQuestion(Shape):
    """A question, a context, and the correct answers as spans of the context."""

    shape: ClassVar[str] = "question"
    title: ClassVar[str] = '{"question", "context", "answers"}'
    noun: ClassVar[str] = "questions with a context and answers"
    enough: ClassVar[int] = ENOUGH_ANSWERS
    keys: ClassVar[tuple[str, ...]] = ("answers",)
    complete: ClassVar[tuple[frozenset[str], ...]] = (
        frozenset(("question", "context", "answers")),
    )
    optional_keys: ClassVar[frozenset[str]] = frozenset(("title", "is_impossible"))
    json_keys: ClassVar[frozenset[str]] = frozenset(("answers",))
    object_keys: ClassVar[frozenset[str]] = frozenset(("answers",))
    parts: ClassVar[dict[str, Part]] = {"question": "input", "context": "input"}
    annotated: ClassVar[bool] = True
    encoder_targets: ClassVar[str] = "answers"

    question: str
    context: str
    answers: tuple[str, ...] = ()
    """Correct answers; empty if the context has no answer."""
    starts: tuple[int, ...] = ()
    """Index of the first character of each answer in ``context``."""

    @classmethod
    def read(cls, record: Record, fields: FieldChecker) -> Self | None:
        question, context = fields.text(record, "question"), fields.text(record, "context")
        if question is None or context is None:
            return None
        answers, starts = _read_answers(record["answers"], context)
        _check_possible(record.get("is_impossible"), bool(answers))
        return cls(fields.file, fields.line, question, context, answers, starts)

    def edit_texts(self, change: Callable[[str, str], str]) -> Self:
        """Return the row with edited texts and all answers at their new positions.

        An answer that begins or ends inside of a changed part gets the whole new part.
        """
        context = change("context", self.context)
        changes = _changes(self.context, context) if context != self.context else []
        spans = [
            (_move(changes, start, False), _move(changes, start + len(text), True))
            for text, start in zip(self.answers, self.starts, strict=True)
        ]
        spans = [*dict.fromkeys((start, end) for start, end in spans if start < end)]
        return replace(
            self,
            question=change("question", self.question),
            context=context,
            answers=tuple(context[start:end] for start, end in spans),
            starts=tuple(start for start, _ in spans),
        )

    def inputs(self) -> tuple[str, ...]:
        return (self.question, self.context)

    def targets(self) -> tuple[str, ...]:
        return self.answers[:1] or ("",)

    def plain_text(self) -> str:
        return f"{self.question}\n\n{self.context}"

    def bare(self) -> AnsweredQuestion:
        return replace(self, answers=(), starts=())

    def record(self) -> Record:
        answers = {"text": list(self.answers), "answer_start": list(self.starts)}
        return {"question": self.question, "context": self.context, "answers": answers}

    def input_record(self) -> Record:
        return {"question": self.question, "context": self.context}

    def target(self) -> list[str]:
        return list(self.answers)


def _check_possible(impossible: object, answered: bool) -> None:
    """Reject a question that is marked as impossible and has answers, or the reverse.

    Raises:
        RowRefused: with the contradiction.
    """
    marked = truth_of(impossible)
    if marked is not None and marked == answered:
        has = "has answers" if answered else "has no answer"
        raise RowRefused(
            "answers.impossible",
            f'the question {has}, and "is_impossible" is {str(marked).lower()}.',
            "Correct the mark or the answers; empty arrays stand for no answer.",
        )


Change = tuple[int, int, int, int]
"""Start and end of a changed part in the old text, and in the new text."""


def _changes(old: str, new: str) -> list[Change]:
    """Return the changed parts of an edited text in order."""
    words = [re.findall(r"\S+\s*|\s+", text) for text in (old, new)]
    at_old, at_new = ([0, *accumulate(map(len, each))] for each in words)
    changes = []
    for kind, *ends in SequenceMatcher(None, words[0], words[1], autojunk=False).get_opcodes():
        if kind == "equal":
            continue
        i1, i2, j1, j2 = at_old[ends[0]], at_old[ends[1]], at_new[ends[2]], at_new[ends[3]]
        same = _common(old[i1:i2], new[j1:j2])
        i1, j1 = i1 + same, j1 + same
        same = _common(old[i1:i2][::-1], new[j1:j2][::-1])
        changes.append((i1, i2 - same, j1, j2 - same))
    return changes


def _common(one: str, other: str) -> int:
    """Return the number of equal characters at the start of both texts."""
    return sum(takewhile(bool, map(eq, one, other)))


def _move(changes: Iterable[Change], position: int, is_end: bool) -> int:
    """Return a position in the new text; inside of a change, the border of the change."""
    shift = 0
    for i1, i2, j1, j2 in changes:
        if position < i2 or (is_end and position == i1):
            return position + shift if position <= i1 else j2 if is_end else j1
        shift = j2 - i2
    return position + shift


def _read_answers(value: Any, context: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the answers of a row and the start of each answer.

    SQuAD has two forms: an object of two arrays, and an array of objects.

    Raises:
        RowRefused: for other values, and for answers outside of the context.
    """
    if isinstance(value, dict):
        texts, places = value.get("text"), value.get("answer_start")
        if isinstance(texts, list) and isinstance(places, list) and len(texts) == len(places):
            value = [{"text": t, "answer_start": p} for t, p in zip(texts, places, strict=True)]
    pairs = [_span_of(each) for each in value] if isinstance(value, list) else [None]
    spans = [pair for pair in pairs if pair is not None]
    if len(spans) < len(pairs):
        raise RowRefused(
            "answers.type",
            f'"answers" is not a list of texts with starts, but {json_kind(value)}.',
            f"Write {ANSWERS_EXAMPLE}, with empty arrays if the context has no answer.",
        )
    for text, start in spans:
        if start < 0 or context[start : start + len(text)] != text:
            raise _misplaced_error(text, start, context)
    return tuple(text for text, _ in spans), tuple(start for _, start in spans)


def _misplaced_error(text: str, start: int, context: str) -> RowRefused:
    """Return the error for an answer that is not at its position, with the right position."""
    message = f"the context has no {quote(text)} at character {start}."
    for unit, encoding, size in (("UTF-16 units", "utf-16-le", 2), ("bytes", "utf-8", 1)):
        data = context.encode(encoding)
        if start >= 0 and data[start * size :].startswith(text.encode(encoding)):
            at = len(data[: start * size].decode(encoding, "ignore"))
            message = f"the position {start} of {quote(text)} counts {unit}, not characters."
            fix = f'Write "answer_start": {at}, and convert all rows, as in Python: '
            cut = f"[:start * {size}]" if size > 1 else "[:start]"
            fix += f'len(context.encode("{encoding}"){cut}.decode("{encoding}")).'
            return RowRefused("answers.span", message, fix)
    at, count = context.find(text), context.count(text)
    fix = f'Write "answer_start": {at}.' if count == 1 else "Copy the answer from the context."
    if count > 1:
        fix = f"Write the position of one of the {count} places in characters."
    return RowRefused("answers.span", message, fix)


def _span_of(value: object) -> tuple[str, int] | None:
    """Return text and start of an answer; ``None`` for other values."""
    fields = value if isinstance(value, dict) else {}
    text, start = fields.get("text"), fields.get("answer_start")
    return (text, start) if isinstance(text, str) and text and type(start) is int else None
