"""``/images/generations``."""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from luthier.inference.inference import ImageRequest, InferenceRefused
from luthier.server.http.routes import MODEL_SLOT
from luthier.server.openai.generation import refusals
from luthier.server.openai.operations import OpenAICall, openai_router
from luthier.server.openai.protocol import JsonObject, StrictBody, invalid

router = openai_router()
MOST_IMAGES = 10
_MEMBERS = {"label": "prompt", "count": "n"}
"""OpenAI's member names by the engine's parameter names."""


class ImageGenerationRequest(StrictBody):
    """Body of a request for images."""

    without_effect = frozenset({"moderation", "output_compression", "partial_images", "user"})
    unsupported: ClassVar[Mapping[str, str]] = {"style": "Models here have no styles"}
    model: Annotated[str, Field(min_length=1)]
    prompt: Annotated[str, Field(max_length=32_000)]
    """Class name or caption. Empty for unconditional models, or for each class in turn."""
    n: Annotated[int, Field(ge=1, le=MOST_IMAGES)] | None = None
    size: str | None = None
    seed: int | None = None
    """Random seed; an extension of OpenAI's API."""
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png"] | None = None
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    stream: Literal[False] | None = None

    def request(self) -> ImageRequest:
        """Return the request for the engine."""
        size = None
        if self.size not in (None, "auto"):
            sides = re.fullmatch(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})", self.size or "")
            if sides is None:
                text = "'size' is width and height, as in '256x256', or 'auto'."
                raise invalid(text, "size", "invalid_value")
            size = int(sides[2]), int(sides[1])
        seed = None if self.seed is None else self.seed % 2**63
        return ImageRequest(self.n or 1, self.prompt, seed, size)


@router.post("/images/generations", name="images.generate", dependencies=[MODEL_SLOT])
def generate(call: OpenAICall, body: ImageGenerationRequest) -> JsonObject:
    """Generate images, and return PNG files in base64."""
    from luthier.media.image_grid import encode_png

    inference = call.context.inference
    target = inference.target(call.account, body.model)
    with refusals(body.model, "prompt"):
        try:
            samples = inference.pool.sample(target.stored_id, body.request())
        except InferenceRefused as refused:
            parameter = refused.parameter or ""
            parameter = _MEMBERS.get(parameter, parameter)
            raise invalid(str(refused), parameter or None, "invalid_value") from refused
    height, width, _ = samples.images[0].pixels.shape
    count = len(samples.images)
    files = (encode_png(image.pixels, body.model) for image in samples.images)
    return {
        "created": int(time.time()),
        "data": [{"b64_json": base64.b64encode(file).decode()} for file in files],
        "output_format": "png",
        "size": f"{width}x{height}",
        "usage": {
            "input_tokens": 0,
            "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
            "output_tokens": count,
            "output_tokens_details": {"image_tokens": count, "text_tokens": 0},
            "total_tokens": count,
        },
    }
