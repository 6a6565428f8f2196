"""Grading by a model with your own prompt, as OpenAI's ``score_model`` and ``label_model``
graders."""

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
    """A message to the grading model."""

    model_config = ModelSpec.model_config

    role: Literal["system", "developer", "user", "assistant"]
    """Role of the speaker."""
    content: Template
    """Text of the message, which may have placeholders."""


class PromptedModel(LanguageModelGrader):
    """Base of graders with a prompt of your own."""

    input: Annotated[tuple[Turn, ...], Field(min_length=1)]
    """Messages to the model."""

    @property
    @abstractmethod
    def closing(self) -> str:
        """Final line after the messages, which requests the verdict."""

    def question(self, answer: Answer) -> list[Message]:
        """Return the conversation that requests the verdict."""
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
    """The last number in a model's answer to ``input``.

    A line that requests a number in ``range`` follows the messages. An answer without a number in
    the range is an error.
    """

    method: Literal["score_model"] = "score_model"
    range: tuple[Bound, Bound] = (0.0, 1.0)
    """Lowest and highest score."""

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        if self.range[0] >= self.range[1]:
            raise ValueError("the first number of range must be below the second")
        return self

    @property
    def is_share(self) -> bool:
        """True if the range is within 0 and 1."""
        return self.range[0] >= 0 and self.range[1] <= 1

    @property
    def closing(self) -> str:
        """Final line after the messages, which requests the verdict."""
        low, high = self.range
        return f"End your answer with one number from {low:g} to {high:g}: the score."

    def score_of(self, verdict: str) -> float | None:
        """Return the last number of a verdict; None outside the range."""
        found = _NUMBER.findall(verdict)
        value = float(found[-1]) if found else math.nan
        return value if self.range[0] <= value <= self.range[1] else None


class LabelModel(PromptedModel):
    """1 if a model answers ``input`` with one of ``passing_labels``, else 0.

    A line with the ``labels`` follows the messages. Models of the server are constrained to the
    labels; another answer of another model is an error.
    """

    method: Literal["label_model"] = "label_model"
    labels: Annotated[tuple[Label, ...], Field(min_length=1, max_length=100)]
    """Labels to choose from."""
    passing_labels: Annotated[tuple[Label, ...], Field(min_length=1, max_length=100)]
    """Labels that score 1."""

    @model_validator(mode="after")
    def _check_labels(self) -> Self:
        if unknown := sorted(set(self.passing_labels) - set(self.labels)):
            raise ValueError(f"passing_labels {unknown} are not in labels")
        return self

    @property
    def answer_schema(self) -> Mapping[str, Any]:
        """JSON schema of a verdict."""
        return {"enum": list(self.labels)}

    @property
    def closing(self) -> str:
        """Final line after the messages, which requests the verdict."""
        return f"Answer with one of these labels and nothing else: {', '.join(self.labels)}."

    def score_of(self, verdict: str) -> float | None:
        """Return whether the label passes, in any case and with or without quotes."""
        try:
            label = str(json.loads(verdict))
        except ValueError:
            label = verdict
        if label not in self.labels:
            label = next((each for each in self.labels if _bare(each) == _bare(label)), "")
        return float(label in self.passing_labels) if label else None


def _bare(label: str) -> str:
    return label.strip(" \t\n.\"'").casefold()
