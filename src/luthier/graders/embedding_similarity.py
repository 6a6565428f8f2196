"""Grading by meaning: how near an encoder places two texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field
from pydantic.json_schema import SkipJsonSchema

from luthier.errors import RecipeError
from luthier.graders.base import Answer, Embedder, GraderModels, NetworkGrader
from luthier.graders.templates import Template, fill_template, scope_of

if TYPE_CHECKING:
    from luthier.models.heads import Task


class EmbeddingSimilarity(NetworkGrader):
    """The cosine of two embeddings, from -1 to 1.

    What it means depends on the encoder: for texts that have nothing in common all-minilm-l6-v2 gives
    about 0, for one that says the same in other words 0.7 and more. It says little of facts: "is open"
    and "is not open" are near each other. Of a text longer than the encoder's context the beginning
    counts.
    """

    method: Literal["embedding_similarity"] = "embedding_similarity"
    model: str = Field(default="all-minilm-l6-v2", min_length=1)
    """Id of the encoder."""
    input: Template = "{{sample.output_text}}"
    """The text that is graded."""
    reference: Template = "{{item.expected}}"
    """The text it is compared with."""
    embedder: SkipJsonSchema[Embedder | None] = Field(default=None, exclude=True, repr=False)
    """The encoder itself: texts to embeddings. Not stored."""

    @property
    def models(self) -> Mapping[str, Task]:
        """The encoder."""
        return {self.model: "embedding"}

    def with_models(self, models: GraderModels) -> Self:
        """The same with its encoder in memory."""
        return self.model_copy(update={"embedder": models.embedder(self.model)})

    def grade(self, answers: Sequence[Answer]) -> list[float]:
        """The cosines."""
        if self.embedder is None:
            raise RecipeError(f"grader `{self.method}` needs {self.model} in memory")
        pairs = [
            tuple(
                fill_template(template, scope_of(answer), answer)
                for template in (self.input, self.reference)
            )
            for answer in answers
        ]
        texts = list(dict.fromkeys(text for pair in pairs for text in pair))
        place = {text: number for number, text in enumerate(texts)}
        found_NH = self.embedder(texts)
        return [float(found_NH[place[one]] @ found_NH[place[other]]) for one, other in pairs]
