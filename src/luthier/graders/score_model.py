"""Grading by a model that is asked in words of one's own, as OpenAI's ``score_model`` does."""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, Field, model_validator
from pydantic.json_schema import SkipJsonSchema

from luthier.chat_models.base import Failure, ModelSpec, SamplingSpec, Writer
from luthier.errors import RecipeError
from luthier.graders.base import Answer, Grader, GraderModels, Ungraded, too_long
from luthier.graders.judge import verdict_trouble
from luthier.graders.string_check import Template
from luthier.graders.templates import fill_template, scope_of
from luthier.types import Message

if TYPE_CHECKING:
    from luthier.models.heads import Task

Bound = Annotated[float, Field(ge=-1e9, le=1e9)]
_NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")


class Turn(BaseModel):
    """One message to the model that grades."""

    model_config = ModelSpec.model_config

    role: Literal["system", "developer", "user", "assistant"]
    """Who speaks."""
    content: Template
    """What is said; may hold places."""


class PromptedModel(ModelSpec, Grader):
    """Base of graders that ask a model in words of one's own."""

    input: Annotated[tuple[Turn, ...], Field(min_length=1)]
    """What the model is asked."""
    sampling: SamplingSpec = SamplingSpec()
    """How it chooses its words."""
    writer: SkipJsonSchema[Writer | None] = Field(default=None, exclude=True, repr=False)
    """The model: conversations to replies. Not stored."""

    role: ClassVar[str] = "judge"
    set_by: ClassVar[str] = "the judge's "
    needs_expected = False

    @property
    def prefers_batches(self) -> bool:
        """All answers of a batch are asked for at once."""
        return True

    @property
    def has_time_limit(self) -> bool:
        """A local model is limited by its tokens."""
        return False

    @property
    def models(self) -> Mapping[str, Task]:
        """The model that grades, where it is one of this machine."""
        return {self.model: "causal_lm"} if self.url is None else {}

    @property
    def judgements(self) -> int:
        """One."""
        return 1

    @property
    def answer_schema(self) -> Mapping[str, Any] | None:
        """JSON schema of what it has to say, for models that can be kept to one."""
        return None

    @property
    @abstractmethod
    def closing(self) -> str:
        """The line that is put behind what the model is asked."""

    @abstractmethod
    def score_of(self, reply: str) -> float | None:
        """What the model means; ``None`` where it does not say."""

    def with_models(self, models: GraderModels) -> Self:
        """The same with its model opened."""
        writer = models.writer(self, self.sampling, self.answer_schema)
        return self.model_copy(update={"writer": writer})

    def grade(self, answers: Sequence[Answer]) -> list[float]:
        """A score for each answer; :class:`Ungraded` where the model gave none."""
        if self.writer is None:
            raise RecipeError(f"the judge {self.model} is not open; open it with `with_models`")
        replies = self.writer([self.question(answer) for answer in answers])
        scores, troubles = [], {}
        for index, reply in enumerate(replies):
            found = None if isinstance(reply, Failure) else self.score_of(reply)
            if found is None:
                troubles[index] = verdict_trouble(self.method, reply)
            scores.append(math.nan if found is None else found)
        if troubles:
            raise Ungraded(scores, troubles)
        return scores

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

    def score_of(self, reply: str) -> float | None:
        """The last number, where it is in range."""
        return number_in(reply, self.range)


def number_in(text: str, span: tuple[float, float]) -> float | None:
    """The last number in ``text``, if it lies within ``span``."""
    found = _NUMBER.findall(text)
    value = float(found[-1]) if found else math.nan
    return value if span[0] <= value <= span[1] else None
