"""``/embeddings``."""

from __future__ import annotations

import base64
from typing import Annotated, Literal

from pydantic import Field

from luthier.models.decoding.sampling import MOST_TOKENS
from luthier.server.http.routes import MODEL_SLOT
from luthier.server.openai.generation import Inference, refusals, split_inputs
from luthier.server.openai.operations import OpenAICall, openai_router
from luthier.server.openai.protocol import JsonObject, StrictBody, invalid
from luthier.server.routing import answering_model
from luthier.types import FloatArray

router = openai_router()
MOST_INPUTS = 2048


class EmbeddingRequest(StrictBody):
    """Body of a request for embeddings."""

    without_effect = frozenset({"user"})
    model: Annotated[str, Field(min_length=1)]
    input: str | list[int] | list[str] | list[list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None

    @property
    def texts(self) -> list[str | list[int]]:
        """Inputs as text or token ids."""
        return split_inputs(self.input)

    def check(self) -> None:
        """Reject empty inputs, and too many inputs."""
        if not self.texts or not all(len(each) for each in self.texts):
            raise invalid("'input' or a text in 'input' is empty.", "input")
        if len(self.texts) > MOST_INPUTS:
            raise invalid(f"A request has at most {MOST_INPUTS} inputs.", "input")


@router.post("/embeddings", name="embeddings.create", dependencies=[MODEL_SLOT])
def create(call: OpenAICall, body: EmbeddingRequest) -> JsonObject:
    """Return an embedding for each input."""
    return complete(call.context.inference, call.account, body)


def complete(inference: Inference, account: str, body: EmbeddingRequest) -> JsonObject:
    """Return an embedding for each input."""
    target = inference.target(account, body.model)
    body.check()
    with refusals(body.model, "input"):
        embeddings = inference.pool.embed(target.stored_id, body.texts)
        vectors = [each.shortened(body.dimensions) for each in embeddings]
    tokens = sum(embedding.tokens for embedding in embeddings)
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": _encode(vector_D, body.encoding_format),
        }
        for index, vector_D in enumerate(vectors)
    ]
    return {
        "object": "list",
        "data": data,
        "model": answering_model(body.model),
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _encode(vector_D: FloatArray, encoding: str | None) -> list[float] | str:
    """Return a list of numbers, or base64 of little-endian float32 values."""
    if encoding == "base64":
        return base64.b64encode(vector_D.astype("<f4").tobytes()).decode()
    numbers: list[float] = vector_D.tolist()
    return numbers
