"""Grading by the cosine of embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field
from pydantic.json_schema import SkipJsonSchema

from luthier.errors import RecipeError
from luthier.graders.base import Answer, Embedder, GraderModels, NetworkGrader
from luthier.graders.templates import Template, fill_template, scope_of
from luthier.models import TEXT_ENCODER

if TYPE_CHECKING:
    from luthier.models.networks.heads import HeadKind


class EmbeddingSimilarity(NetworkGrader):
    """The cosine of the embeddings of two texts, from -1 to 1.

    The scale depends on the encoder: all-minilm-l6-v2 gives about 0 for unrelated texts and 0.7 or
    more for a paraphrase. The cosine says little about facts: "is open" and "is not open" are
    similar. Texts are truncated to the encoder's context.
    """

    method: Literal["embedding_similarity"] = "embedding_similarity"
    model: str = Field(default=TEXT_ENCODER, min_length=1)
    """Id of the encoder."""
    input: Template = "{{sample.output_text}}"
    """Template of the graded text."""
    reference: Template = "{{item.expected}}"
    """Template of the text to compare with."""
    embedder: SkipJsonSchema[Embedder | None] = Field(default=None, exclude=True, repr=False)
    """The opened encoder: texts to embeddings. Not stored."""

    @property
    def models(self) -> Mapping[str, HeadKind]:
        """The encoder and its task."""
        return {self.model: "embedding"}

    def with_models(self, models: GraderModels) -> Self:
        """Return the grader with its encoder opened."""
        return self.model_copy(update={"embedder": models.embedder(self.model)})

    def grade(self, answers: Sequence[Answer]) -> list[float]:
        """Return the cosines."""
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
