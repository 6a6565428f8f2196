"""The seam between a text and its score.

A grader is one frozen object: its fields are its settings, with the vetted ones as default. The same
object measures a model (``luthier evaluate``) and rewards one in training:

    check           what it needs and is not there, before anything is written
    with_models     the same with the models it names opened
    rehearse        one trial of them, before it matters
    check_expected  whether it can compare with the expected text of a row
    grade           a score for each answer of a batch
    score           the same for one answer, for graders that look at one at a time

Whoever grades calls :func:`luthier.graders.grade.grade_answers`, which guards all of this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from luthier.chat_models.base import ModelSpec, SamplingSpec, Writer
from luthier.errors import LuthierError, RowRefused
from luthier.limits import TEXT_CHARACTERS
from luthier.types import Message, Row
from luthier.validation import StrictModel

if TYPE_CHECKING:
    from luthier.models.heads import Task

TOO_LONG = "grader.too_long"
"""Rule of texts that are too long to be graded."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said to a prompt, and what was expected of it."""

    prompt: Sequence[Message]
    """The turns it was asked."""
    reply: str
    expected: str | None
    """The text of the row to compare with; what it means is the grader's: a label, a number, tests."""
    row: Row
    """Where the prompt comes from, for messages."""
    text_characters: int = TEXT_CHARACTERS
    """Characters of each text that is compared, or put together from a template, at most."""
    passages: Sequence[str] | None = None
    """Texts that the reply rests on or cites, for a judge whose rubric asks about them."""

    @staticmethod
    def of(row: Row, reply: str) -> Answer:
        """``reply`` to what a row asks, beside what the row expects."""
        return Answer(row.prompt_turns(), reply, row.expected_reply(), row)

    def check_length(self, text: str, what: str) -> str:
        """``text``, where it is not too long to be compared.

        Raises:
            RowRefused: with its length and the limit.
        """
        if len(text) > self.text_characters:
            raise too_long(what, len(text), self.text_characters)
        return text


def too_long(what: str, characters: int, limit: int) -> RowRefused:
    """The refusal of a text that is too long to be graded."""
    return RowRefused(
        TOO_LONG,
        f"{what} has {characters:,} characters, and graders compare at most {limit:,}.",
        "Grade shorter texts.",
    )


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why one answer has no score, and what mends that."""

    rule: str
    message: str
    fix: str


Scorer = Callable[[Sequence[Answer]], list[float]]
"""What a model in memory gives for answers, in their order."""
Embedder = Callable[[Sequence[str]], NDArray[np.float32]]
"""Embeddings ``[N, H]`` of length 1 that a model in memory gives for texts."""


class GraderModels(Protocol):
    """Opens the models that graders name, for whoever grades."""

    def scorer(self, model: str) -> Scorer:
        """The reward model of this id."""

    def embedder(self, model: str) -> Embedder:
        """The encoder of this id."""

    def writer(
        self, judge: ModelSpec, sampling: SamplingSpec, schema: Mapping[str, Any] | None = None
    ) -> Writer:
        """The model that writes verdicts, of ``schema`` where it can be kept to one.

        It asks nothing twice.
        """


class Ungraded(LuthierError):
    """Some answers of a batch have no score; those of the others are not lost.

    Raised by :meth:`Grader.grade` on its way to :func:`~luthier.graders.grade.grade_answers`.
    """

    def __init__(self, scores: Sequence[float], troubles: Mapping[int, Trouble]) -> None:
        """``scores`` for all answers, NaN for those that ``troubles`` names by their index."""
        super().__init__("; ".join(trouble.message for trouble in troubles.values()))
        self.scores, self.troubles = list(scores), dict(troubles)


class Grader(StrictModel):
    """Base of all graders: one way to score, one file, one class."""

    method: str
    """Name of the grader in recipes and on the command line."""

    needs_expected: ClassVar[bool] = True
    """Whether it compares with the expected text of the row."""
    watched: ClassVar[bool] = True
    """Whether it may take long or hang, and so runs in a thread of its own, under the time limit.

    A thread has its own gradient mode and its own OpenMP threads: a grader that computes with torch is
    better off without.
    """

    @property
    def is_share(self) -> bool:
        """Whether scores are from 0 to 1; those of a reward model are not."""
        return True

    @property
    def grades_prompts(self) -> bool:
        """Whether rows may be prompts alone, with whatever members it names (``{{item.answer}}``)."""
        return not self.needs_expected

    @property
    def prefers_batches(self) -> bool:
        """Whether :meth:`grade` gains from many answers at once (an endpoint, a network)."""
        return False

    @property
    def has_time_limit(self) -> bool:
        """Whether the time limit of whoever grades holds; what waits for an endpoint has its own."""
        return self.watched

    @property
    def models(self) -> Mapping[str, Task]:
        """What it scores with: ids of models of this machine, which whoever grades loads, and what each
        must have been trained for."""
        return {}

    @property
    def judgements(self) -> int:
        """How many verdicts of a language model one answer takes."""
        return 0

    def with_models(self, models: GraderModels) -> Self:
        """The same with the models it names opened."""
        return self

    def rehearse(self) -> str:
        """Grade something, so that a model that is no judge is found before it matters.

        Returns:
            What people should know before they rely on it; empty where all is well.

        Raises:
            LuthierError: where a model cannot be asked, with the reason.
        """
        return ""

    def check(self) -> None:
        """Refuse to start without what it needs: a model, a file, a permission.

        Raises:
            RecipeError: with what is missing, and how to give it.
        """

    def check_expected(self, expected: str | None) -> None:
        """Refuse an expected text that no reply can be compared with.

        Raises:
            RowRefused: with the rule and the fix.
        """
        if self.needs_expected and expected is None:
            raise RowRefused(
                "grader.no_expected",
                f"grader `{self.method}` compares with an expected reply, and the row has none.",
                "Add the reply to the row, or use a grader that needs none.",
            )

    def grade(self, answers: Sequence[Answer]) -> list[float]:
        """A score for each answer, in their order; more is better.

        Raises:
            Ungraded: when some of them have none, with the scores of the others.
            Exception: any other one means that no answer of the batch has a score.
        """
        return [self.score(answer) for answer in answers]

    def score(self, answer: Answer) -> float:
        """The score of one answer."""
        raise NotImplementedError

    def expected_of(self, answer: Answer) -> str:
        """The expected text of an answer, which has one or is refused."""
        self.check_expected(answer.expected)
        return answer.expected or ""


class NetworkGrader(Grader):
    """Base of graders that score by a network in memory: any number, a batch at a time."""

    needs_expected = False
    watched = False
    is_share: ClassVar[bool] = False
    """Rewards have no bounds, and a cosine may be negative."""
    prefers_batches: ClassVar[bool] = True
    """All texts of a batch are read at once."""
