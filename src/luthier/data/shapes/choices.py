"""Shape of multiple-choice questions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from luthier.data.field_checks import FieldChecker
from luthier.data.files.parsing import Record, json_kind
from luthier.data.shapes.base import Shape
from luthier.errors import RowRefused
from luthier.types import Part

MOST_CHOICES = 100
"""Choices of a row."""


@dataclass(frozen=True, slots=True)
class MultipleChoice(Shape):
    """A prompt with several continuations, one of them correct; for evaluation only.

    A single choice is a cloze test. Alternatively, the prompts differ and the continuation is
    fixed, as in WinoGrande (Sakaguchi et al. 2020).
    """

    shape: ClassVar[str] = "choices"
    title: ClassVar[str] = '{"prompt", "choices", "answer"}'
    noun: ClassVar[str] = "prompts with choices"
    keys: ClassVar[tuple[str, ...]] = ("choices",)
    complete: ClassVar[tuple[frozenset[str], ...]] = (frozenset(("prompt", "choices", "answer")),)
    json_keys: ClassVar[frozenset[str]] = frozenset(("choices",))
    number_keys: ClassVar[frozenset[str]] = frozenset(("answer",))
    parts: ClassVar[Mapping[str, Part]] = {"prompts": "input", "choices": "other"}

    prompts: tuple[str, ...]
    """A single prompt for all choices, or a prompt per choice."""
    choices: tuple[str, ...]
    answer: int
    """0-based index of the correct choice."""

    @classmethod
    def matches(cls, record: Record) -> bool:
        """Return whether a record has choices with an answer, or a single choice.

        Choices without an answer may be a column for a grader.
        """
        tells = "answer" in record or isinstance(record.get("choices"), str)
        other = {"completion", "expected", "messages", "rejected"} & record.keys()
        return "prompt" in record and "choices" in record and tells and not other

    @classmethod
    def read(cls, record: Record, fields: FieldChecker) -> Self | None:
        prompts, choices = _one_or_more(record, "prompt"), _one_or_more(record, "choices")
        answer = record.get("answer", 0 if len(choices) == 1 else None)
        if isinstance(answer, float) and answer.is_integer():
            answer = int(answer)  # a table cell
        if type(answer) is not int or not 0 <= answer < len(choices):
            raise RowRefused(
                "choices.answer",
                f'"answer" must be the index of the right choice, from 0 to {len(choices) - 1}.',
                "Count from 0: the first choice is 0.",
            )
        if len(choices) > MOST_CHOICES or len(prompts) not in (1, len(choices)):
            raise RowRefused(
                "choices.length",
                f"The row has {len(prompts):,} prompts and {len(choices):,} choices.",
                f"Write one prompt, or one per choice, and at most {MOST_CHOICES} choices.",
            )
        return cls(fields.file, fields.line, prompts, choices, answer)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Return ``(prompt, choice)`` for each choice."""
        prompts = self.prompts if len(self.prompts) > 1 else self.prompts * len(self.choices)
        return list(zip(prompts, self.choices, strict=True))

    def inputs(self) -> tuple[str, ...]:
        return self.prompts

    def targets(self) -> tuple[str, ...]:
        return (self.choices[self.answer],)

    def plain_text(self) -> str:
        return "\n".join(self.prompts)

    def record(self) -> Record:
        prompt = self.prompts[0] if len(self.prompts) == 1 else list(self.prompts)
        return {"prompt": prompt, "choices": list(self.choices), "answer": self.answer}


def _one_or_more(record: Record, key: str) -> tuple[str, ...]:
    """Return a text or an array of texts as a tuple; blank text is rejected."""
    value = record[key]
    texts = [value] if isinstance(value, str) else value
    if isinstance(texts, list) and texts and all(isinstance(t, str) and t.strip() for t in texts):
        return tuple(texts)
    description = json_kind(value) if not isinstance(value, str | list) else "blank, empty or mixed"
    raise RowRefused(
        "choices.type",
        f'"{key}" must be a text or an array of texts, but is {description}.',
        'Write {"prompt": "The sky is", "choices": ["blue", "green"], "answer": 0}.',
    )
