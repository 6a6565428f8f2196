"""``/embeddings``."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from luthier.models.sampling import MOST_TOKENS
from luthier.server.http.messages import Caller
from luthier.server.openai.generation import GenerationResource, refusals, split_inputs
from luthier.server.openai.protocol import StrictBody, invalid
from luthier.types import FloatArray

MOST_INPUTS = 2048


class EmbeddingRequest(StrictBody):
    """The body."""

    without_effect = frozenset({"user"})
    model: Annotated[str, Field(min_length=1)]
    input: str | list[int] | list[str] | list[list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None

    @property
    def texts(self) -> list[str | list[int]]:
        """One or several texts or lists of tokens."""
        return split_inputs(self.input)

    def check(self) -> None:
        """Refuse what is empty or too much."""
        if not self.texts or not all(len(each) for each in self.texts):
            raise invalid("'input' cannot be empty, and neither can a text in it.", "input")
        if len(self.texts) > MOST_INPUTS:
            raise invalid(f"At most {MOST_INPUTS} texts are taken.", "input")


class Embeddings(GenerationResource[EmbeddingRequest]):
    """Vectors of texts."""

    path, action, body = "embeddings", "embeddings.create", EmbeddingRequest

    def whole(self, caller: Caller, parameters: EmbeddingRequest) -> dict[str, Any]:
        """A vector for each text."""
        target = self.inference.target(caller, self.action, parameters.model)
        parameters.check()
        with refusals(parameters.model, "input"):
            found = self.inference.pool.embed(target.stored_id, parameters.texts)
        tokens = sum(each.tokens for each in found)
        data = [
            {
                "object": "embedding",
                "index": index,
                "embedding": _encode(
                    _shorten(np.asarray(each.vector, dtype="<f4"), parameters.dimensions),
                    parameters.encoding_format,
                ),
            }
            for index, each in enumerate(found)
        ]
        return {
            "object": "list",
            "data": data,
            "model": parameters.model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }


def _shorten(vector_D: FloatArray, dimensions: int | None) -> FloatArray:
    """The first ``dimensions`` numbers, of length 1 again."""
    if dimensions is None or dimensions == len(vector_D):
        return vector_D
    if dimensions > len(vector_D):
        text = f"The model's vectors have {len(vector_D)} dimensions."
        raise invalid(text, "dimensions", "invalid_value")
    cut_D = vector_D[:dimensions]
    norm = float(np.linalg.norm(cut_D))
    shortened: FloatArray = (cut_D / norm if norm else cut_D).astype("<f4")
    return shortened


def _encode(vector_D: FloatArray, encoding: str | None) -> list[float] | str:
    """Numbers, or base64 of little-endian float32."""
    if encoding == "base64":
        return base64.b64encode(vector_D.tobytes()).decode()
    numbers: list[float] = vector_D.tolist()
    return numbers
