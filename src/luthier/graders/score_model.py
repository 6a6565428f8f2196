"""Grading by a model that is asked in words of one's own, as OpenAI's ``score_model`` and
``label_model`` do.
"""

from __future__ import annotations

import json
import math
import re
from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

from luthier.chat_models.base import ModelSpec
from luthier.graders.base import Answer, too_long
from luthier.graders.judge import LanguageModelGrader
from luthier.graders.templates import Template, fill_template, scope_of
from luthier.types import Message

Bound = Annotated[float, Field(ge=-1e9, le=1e9)]
Label = Annotated[str, Field(min_length=1, max_length=200)]
_NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")


class Turn(BaseModel):
    """One message to the model that grades."""

    model_config = ModelSpec.model_config

    role: Literal["system", "developer", "user", "assistant"]
    """Who speaks."""
    content: Template
    """What is said; may hold places."""


class PromptedModel(LanguageModelGrader):
    """Base of graders that ask a model in words of one's own."""

    input: Annotated[tuple[Turn, ...], Field(min_length=1)]
    """What the model is asked."""

    @property
    @abstractmethod
    def closing(self) -> str:
        """The line that is put behind what the model is asked."""

    def question(self, answer: Answer) -> list[Message]:
        """What the model reads."""
        scope, characters = scope_of(answer), 0
        turns = []
        for turn in self.input:
            text = fill_template(turn.content, scope, answer)
            characters += len(text)
            if characters > answer.text_characters:
                raise too_long("the prompt", characters, answer.text_characters)
            turns.append(Message("system" if turn.role == "developer" else turn.role, text))
        if turns[-1].role == "user":
            return [*turns[:-1], Message("user", f"{turns[-1].content}\n\n{self.closing}")]
        return [*turns, Message("user", self.closing)]


class ScoreModel(PromptedModel):
    """The last number of what a model answers to ``input``.

    The messages say what is to be graded and how; a line that asks for a number in ``range`` is put
    behind them. An answer without a number in that range is an error, never a guess.
    """

    method: Literal["score_model"] = "score_model"
    range: tuple[Bound, Bound] = (0.0, 1.0)
    """Lowest and highest score."""

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        if self.range[0] >= self.range[1]:
            raise ValueError("the range's first number must be below its second")
        return self

    @property
    def is_share(self) -> bool:
        """Whether its range is."""
        return self.range[0] >= 0 and self.range[1] <= 1

    @property
    def closing(self) -> str:
        """Asks for a number."""
        low, high = self.range
        return f"End your answer with one number from {low:g} to {high:g}: the score."

    def score_of(self, verdict: str) -> float | None:
        """The last number, where it is in range."""
        return number_in(verdict, self.range)


def number_in(text: str, span: tuple[float, float]) -> float | None:
    """The last number in ``text``, if it lies within ``span``."""
    found = _NUMBER.findall(text)
    value = float(found[-1]) if found else math.nan
    return value if span[0] <= value <= span[1] else None


class LabelModel(PromptedModel):
    """1 when a model answers ``input`` with one of ``passing_labels``, else 0.

    The messages say what is to be labelled; a line that names the ``labels`` is put behind them. A
    model of a server is kept to them as it writes; of another one, an answer that is none of them is an
    error, never a guess.
    """

    method: Literal["label_model"] = "label_model"
    labels: Annotated[tuple[Label, ...], Field(min_length=1, max_length=100)]
    """The labels to choose from."""
    passing_labels: Annotated[tuple[Label, ...], Field(min_length=1, max_length=100)]
    """Those of them that count as 1."""

    @model_validator(mode="after")
    def _check_labels(self) -> Self:
        if unknown := sorted(set(self.passing_labels) - set(self.labels)):
            raise ValueError(f"passing_labels are some of the labels, and {unknown} are none")
        return self

    @property
    def answer_schema(self) -> Mapping[str, Any]:
        """One of the labels, as JSON."""
        return {"enum": list(self.labels)}

    @property
    def closing(self) -> str:
        """Asks for a label."""
        return f"Answer with one of these labels and nothing else: {', '.join(self.labels)}."

    def score_of(self, verdict: str) -> float | None:
        """Whether the label that the verdict is, in any case, passes."""
        try:
            label = str(json.loads(verdict))
        except ValueError:
            label = verdict
        if label in self.labels:
            return float(label in self.passing_labels)
        wanted = _bare(label)
        chosen = next((each for each in self.labels if _bare(each) == wanted), None)
        return None if chosen is None else float(chosen in self.passing_labels)


def _bare(label: str) -> str:
    """In small letters, without quotes and a full stop."""
    return label.strip(" \t\n.\"'").casefold()
