"""Interface of graders, which turn a reply into a score.

A grader is one frozen object whose fields are its settings. The same object measures a model
(``luthier evaluate``) and rewards a model in training:

    check           reject missing requirements before anything is generated
    with_models     return the grader with its models opened
    rehearse        try the models once
    check_expected  reject an expected text that cannot be compared
    grade           score a batch of answers
    score           score a single answer, for graders without a batch method

Callers use :func:`luthier.graders.grade.grade_answers`, which handles errors and time limits.
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
    from luthier.models.networks.heads import HeadKind

TOO_LONG = "grader.too_long"
"""Rule of texts above the length limit of a grader."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply to a prompt, and the expected text."""

    prompt: Sequence[Message]
    reply: str
    expected: str | None
    """Text of the row to compare with: a label, a number or tests, as the grader requires."""
    row: Row
    """The row of the prompt, for messages."""
    text_characters: int = TEXT_CHARACTERS
    """Maximum length of each compared or rendered text, in characters."""
    passages: Sequence[str] | None = None
    """Source texts of the reply, for judges with a rubric about sources."""

    @staticmethod
    def of(row: Row, reply: str) -> Answer:
        """Return ``reply`` as the answer to a row."""
        return Answer(row.prompt_turns(), reply, row.expected_reply(), row)

    def check_length(self, text: str, what: str) -> str:
        """Return ``text``, or raise :class:`RowRefused` above the length limit."""
        if len(text) > self.text_characters:
            raise too_long(what, len(text), self.text_characters)
        return text


def too_long(what: str, characters: int, limit: int) -> RowRefused:
    """Return the error for a text above the length limit."""
    message = f"{what} has {characters:,} characters, and graders compare at most {limit:,}."
    return RowRefused(TOO_LONG, message, "Grade shorter texts.")


Scorer = Callable[[Sequence[Answer]], list[float]]
"""A reward model in memory: answers to numbers, in their order."""
Embedder = Callable[[Sequence[str]], NDArray[np.float32]]
"""An encoder in memory: texts to embeddings ``[N, H]`` of length 1."""
LabelReader = Callable[[Sequence[str]], list[dict[str, float]]]
"""A classifier in memory: texts to probabilities by label."""


class GraderModels(Protocol):
    """Opens the models that graders name."""

    def scorer(self, model: str) -> Scorer:
        """Open a reward model."""

    def embedder(self, model: str) -> Embedder:
        """Open an encoder."""

    def classifier(self, model: str) -> LabelReader:
        """Open a classifier."""

    def writer(
        self, judge: ModelSpec, sampling: SamplingSpec, schema: Mapping[str, Any] | None = None
    ) -> Writer:
        """Open a judge, constrained to ``schema`` if possible. No prompt is sent twice."""


class Ungraded(LuthierError):
    """Error for a batch with ungraded answers. The scores of all graded answers are kept."""

    def __init__(self, scores: Sequence[float], faults: Mapping[int, RowRefused]) -> None:
        """``scores`` has NaN for the answers in ``faults``, by index."""
        super().__init__("; ".join(fault.problem.message for fault in faults.values()))
        self.scores, self.faults = list(scores), dict(faults)


class Grader(StrictModel):
    """Base class of graders: a file and a class per scoring method."""

    method: str
    """Name of the grader in recipes and on the command line."""

    needs_expected: ClassVar[bool] = True
    """True if the grader compares the reply with the expected text of the row."""

    @property
    def is_share(self) -> bool:
        """True if scores range from 0 to 1."""
        return True

    @property
    def grades_prompts(self) -> bool:
        """True if rows may be prompts with additional keys for templates (``{{item.answer}}``)."""
        return not self.needs_expected

    @property
    def prefers_batches(self) -> bool:
        """True if :meth:`grade` is faster with many answers, as for an endpoint or a network."""
        return False

    @property
    def has_time_limit(self) -> bool:
        """True if the grader may hang and needs a thread with the caller's time limit.

        False for graders with their own limits, and for graders that compute with torch: a thread
        has its own gradient mode and OpenMP threads.
        """
        return True

    @property
    def models(self) -> Mapping[str, HeadKind]:
        """Local models of the grader: id and task."""
        return {}

    @property
    def judgements(self) -> int:
        """Number of judge verdicts per answer."""
        return 0

    def with_models(self, models: GraderModels) -> Self:
        """Return the grader with its models opened."""
        return self

    def rehearse(self) -> str:
        """Grade a sample, to find an unsuitable model early.

        Returns:
            A warning, or an empty string.

        Raises:
            LuthierError: if a model does not answer.
        """
        return ""

    def check(self) -> None:
        """Raise :class:`RecipeError` if a model, file or permission is missing."""

    def check_expected(self, expected: str | None) -> None:
        """Reject an expected text that cannot be compared.

        Raises:
            RowRefused: the expected text is unsuitable.
        """
        if self.needs_expected and expected is None:
            raise RowRefused(
                "grader.no_expected",
                f"grader `{self.method}` compares with an expected reply, and the row has none.",
                "Add the reply to the row, or use a grader that needs none.",
            )

    def grade(self, answers: Sequence[Answer]) -> list[float]:
        """Return a score for each answer; higher is better.

        Raises:
            Ungraded: some answers have no score.
            Exception: any other error means that no answer of the batch has a score.
        """
        return [self.score(answer) for answer in answers]

    def score(self, answer: Answer) -> float:
        """Return the score of one answer."""
        raise NotImplementedError

    def expected_of(self, answer: Answer) -> str:
        """Return the expected text of an answer."""
        self.check_expected(answer.expected)
        return answer.expected or ""


class NetworkGrader(Grader):
    """Base of graders that score a batch with a network in memory, without bounds."""

    needs_expected = False
    has_time_limit: ClassVar[bool] = False
    is_share: ClassVar[bool] = False
    prefers_batches: ClassVar[bool] = True
