"""Grading by a tuned classifier, such as "our voice or not"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field
from pydantic.json_schema import SkipJsonSchema

from luthier.errors import RecipeError
from luthier.graders.base import Answer, GraderModels, LabelReader, NetworkGrader
from luthier.graders.templates import Template, fill_template, scope_of

if TYPE_CHECKING:
    from luthier.models.networks.heads import HeadKind


class Classifier(NetworkGrader):
    """The probability of a label for the reply, by a classifier that was tuned on texts.

    The classifier reads the reply alone, so the grade is blind: it does not depend on the model, and
    facts are not checked. A copied text of the right label has a perfect score.
    """

    method: Literal["classifier"] = "classifier"
    is_share: ClassVar[bool] = True
    model: str = Field(min_length=1)
    """Id of the classifier."""
    label: str = Field(min_length=1)
    """The good label."""
    input: Template = "{{sample.output_text}}"
    """Template of the graded text."""
    reader: SkipJsonSchema[LabelReader | None] = Field(default=None, exclude=True, repr=False)
    """The opened classifier: texts to probabilities by label. Not stored."""

    @property
    def models(self) -> Mapping[str, HeadKind]:
        """The classifier and its task."""
        return {self.model: "sequence_classification"}

    def with_models(self, models: GraderModels) -> Self:
        """Return the grader with its classifier opened."""
        return self.model_copy(update={"reader": models.classifier(self.model)})

    def rehearse(self) -> str:
        """Check the label on a sample."""
        self._probabilities(["A text."])
        return ""

    def grade(self, answers: Sequence[Answer]) -> list[float]:
        """Return the probabilities of the label."""
        return self._probabilities(
            [fill_template(self.input, scope_of(answer), answer) for answer in answers]
        )

    def _probabilities(self, texts: Sequence[str]) -> list[float]:
        if self.reader is None:
            raise RecipeError(f"grader `{self.method}` needs {self.model} in memory")
        found = self.reader(texts)
        if found and self.label not in found[0]:
            raise RecipeError(
                f"{self.model} has no label {self.label!r}. Set `classifier.label` to one of "
                f"{', '.join(found[0])}"
            )
        return [each[self.label] for each in found]
