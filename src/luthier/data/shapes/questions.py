"""Shape of questions with the answer as a span of a context, as in SQuAD."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from luthier.data.field_checks import FieldChecker
from luthier.data.parsing import Record, json_kind, quote
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
        """Return the row with edited texts and the first answer at the new position."""
        answers, starts = self.answers[:1], self.starts[:1]
        if not answers:
            context = change("context", self.context)
        else:
            end = self.starts[0] + len(self.answers[0])
            before, answer, after = (
                change("context", part) if part else ""
                for part in (self.context[: self.starts[0]], self.answers[0], self.context[end:])
            )
            context = before + answer + after
            answers, starts = (answer,), (len(before),)
        return replace(
            self,
            question=change("question", self.question),
            context=context,
            answers=answers,
            starts=starts,
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


def _check_possible(impossible: object, answered: bool) -> None:
    """Reject a question that is marked as impossible and has answers, or the reverse.

    Raises:
        RowRefused: with the contradiction.
    """
    marked = {"true": True, "false": False}.get(str(impossible).strip().lower())
    if marked is not None and marked == answered:
        has = "has answers" if answered else "has no answer"
        raise RowRefused(
            "answers.impossible",
            f'the question {has}, and "is_impossible" is {str(marked).lower()}.',
            "Correct the mark or the answers; empty arrays stand for no answer.",
        )


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
            at = context.find(text)
            raise RowRefused(
                "answers.span",
                f"the context has no {quote(text)} at character {start}.",
                f'Write "answer_start": {at}.' if at >= 0 else "Copy the answer from the context.",
            )
    return tuple(text for text, _ in spans), tuple(start for _, start in spans)


def _span_of(value: object) -> tuple[str, int] | None:
    """Return text and start of an answer; ``None`` for other values."""
    fields = value if isinstance(value, dict) else {}
    text, start = fields.get("text"), fields.get("answer_start")
    return (text, start) if isinstance(text, str) and text and type(start) is int else None
