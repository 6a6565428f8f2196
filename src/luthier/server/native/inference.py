"""Predictions, embeddings, generated images and reconstructions of the native API."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from fastapi import Header, Response
from pydantic import Field, StrictFloat, StrictInt, model_validator

from luthier.data.inputs import LARGEST_VALUE, LONGEST_WINDOW, SINGULAR, Media, MediaKind
from luthier.inference.inference import ImageRequest
from luthier.server.http.messages import Fault, inference_faults
from luthier.server.http.routes import MODEL_TURN, Name
from luthier.server.identifiers import find_foundation
from luthier.server.native.operations import (
    Call,
    Input,
    NativeCall,
    View,
    native_router,
    uploads,
)

router = native_router()
PNG = "image/png"
PICTURES: dict[int | str, dict[str, Any]] = {200: {"content": {PNG: {}}}}
Accept = Annotated[str, Header()]
"""A client that accepts PNG gets a picture in place of JSON."""
WindowValue = Annotated[
    float, Field(strict=True, allow_inf_nan=False, ge=-LARGEST_VALUE, le=LARGEST_VALUE)
]


class PredictionInput(Input):
    """A text, an image, a sound or the latest values of a time series."""

    text: str | None = Field(default=None, min_length=1)
    image: str | None = Field(default=None, min_length=1)
    """A file (PNG, JPEG, WebP, …) in base64, also as a ``data:`` address."""
    audio: str | None = Field(default=None, min_length=1)
    """A file (WAV, FLAC, Ogg) in base64."""
    window: tuple[WindowValue, ...] | None = Field(
        default=None, min_length=1, max_length=LONGEST_WINDOW
    )
    """Values of a time series in their order, the one that is judged last. Of fewer than the model
    reads the score alone is told, and ``anomalous`` is null."""

    @model_validator(mode="after")
    def _one(self) -> PredictionInput:
        if [self.text, self.image, self.audio, self.window].count(None) != 3:
            raise ValueError("an input is one of text, image, audio and window")
        return self


class PredictionRequest(Input):
    """What a model is to read."""

    inputs: tuple[PredictionInput, ...] = Field(min_length=1)
    """Each is answered by itself; at most ``inputs`` of the server's limits."""
    top: StrictInt | None = Field(default=None, ge=1)
    """Leave so many classes in ``scores``, the likeliest first."""

    @classmethod
    def from_file(cls, kind: str, data: bytes) -> Any:
        """Return one input, which is the file."""
        return {"inputs": [{kind: _base64(data)}]}


class PredictionsView(View):
    """What the model says."""

    model: str
    """As it was named."""
    answers: list[dict[str, Any]]
    """One for each input, as its objective answers: ``label`` and ``scores``, ``rating``, ``tags``,
    ``embedding``, ``score`` and ``anomalous``, or ``text`` and ``probability``."""


class SampleRequest(Input):
    """Which images are to be made."""

    count: StrictInt = Field(default=1, ge=1)
    """At most ``inputs`` of the server's limits."""
    seed: StrictInt | None = Field(default=None, ge=0, lt=2**63)
    """The same one gives the same images; drawn, and told, when not given."""
    label: str = Field(default="", max_length=1024)
    """Name of a class; as many of each class in turn when not given."""
    prompt: str = Field(default="", max_length=1024)
    """What the images show, of a model that learned from captions."""
    steps: StrictInt | None = Field(default=None, ge=1, le=10_000)
    """From noise to image, of a diffusion model; as it was stored when not given."""
    guidance_scale: StrictFloat | StrictInt | None = Field(default=None, ge=0, le=100)
    """How much such a model makes of what is asked for."""
    negative_prompt: str = Field(default="", max_length=1024)
    """What the images are to be unlike, of such a model that learned from captions."""


class SampleView(View):
    """A new image."""

    png: str
    """The file in base64."""
    label: str | None = None
    """The class it was made for, where the model knows classes."""


class SamplesView(View):
    """New images."""

    model: str
    seed: int
    """Gives the same images again."""
    width: int
    height: int
    images: list[SampleView]


class ReconstructionRequest(Input):
    """Images that are to go through the network."""

    images: tuple[str, ...] = Field(min_length=1)
    """Files in base64, also as ``data:`` addresses."""

    @classmethod
    def from_file(cls, kind: str, data: bytes) -> Any:
        """Return one image, which is the file."""
        return {"images": [_base64(data)]}


class ReconstructionView(View):
    """What the model gives back of one image."""

    png: str
    """The file in base64."""
    error: float
    """Mean squared difference to what was read, of pixels from 0 to 1."""


class ReconstructionsView(View):
    """What the model gives back."""

    model: str
    images: list[ReconstructionView]
    compression_ratio: float
    """Numbers of an image for each that the model keeps of it."""


@router.post(
    "/models/{model}/predictions",
    dependencies=[MODEL_TURN],
    openapi_extra=uploads("image", "audio"),
)
def predict(call: NativeCall, model: Name, asked: PredictionRequest) -> PredictionsView:
    """Return what a model predicts for texts, images, audio or values of a time series."""
    stored_id = _stored_id(call, model)
    inputs: list[str | Media] = []
    for index, each in enumerate(asked.inputs):
        if each.image is not None:
            inputs.append(_media(each.image, "image", f"inputs.{index}.image"))
        elif each.audio is not None:
            inputs.append(_media(each.audio, "audio", f"inputs.{index}.audio"))
        elif each.window is not None:
            values = np.array(each.window, np.float64)
            inputs.append(Media("window", f"inputs.{index}.window", array=values))
        else:
            inputs.append(each.text or "")
    with inference_faults():
        answers = call.context.pool.predict(stored_id, inputs, asked.top)
    return PredictionsView(model=model, answers=answers)


@router.post(
    "/models/{model}/images",
    dependencies=[MODEL_TURN],
    response_model=SamplesView,
    responses=PICTURES,
)
def sample_images(
    call: NativeCall, model: Name, asked: SampleRequest, accept: Accept = ""
) -> SamplesView | Response:
    """Return new images from a model that makes images."""
    from luthier.media.image_grid import encode_png

    stored_id = _stored_id(call, model)
    with inference_faults():
        wanted = ImageRequest(
            asked.count, asked.prompt or asked.label, asked.seed, None, asked.steps,
            asked.guidance_scale, asked.negative_prompt,
        )  # fmt: skip
        made = call.context.pool.sample(stored_id, wanted)
    pixels = [each.pixels for each in made.images]
    if PNG in accept:
        return _picture(pixels, {"X-Luthier-Seed": str(made.seed)})
    height, width, _ = pixels[0].shape
    views = [
        SampleView(png=_base64(encode_png(each.pixels)), label=each.label or None)
        for each in made.images
    ]
    return SamplesView(model=model, seed=made.seed, width=width, height=height, images=views)


@router.post(
    "/models/{model}/reconstructions",
    dependencies=[MODEL_TURN],
    response_model=ReconstructionsView,
    responses=PICTURES,
    openapi_extra=uploads("image"),
)
def reconstruct_images(
    call: NativeCall, model: Name, asked: ReconstructionRequest, accept: Accept = ""
) -> ReconstructionsView | Response:
    """Return images after encoding and decoding by an autoencoder."""
    from luthier.media.image_grid import encode_png

    stored_id = _stored_id(call, model)
    images = [_media(each, "image", f"images.{index}") for index, each in enumerate(asked.images)]
    with inference_faults():
        found = call.context.pool.reconstruct(stored_id, images)
    if PNG in accept:
        return _picture([pixels for each in found for pixels in (each.original, each.copy)])
    views = [
        ReconstructionView(png=_base64(encode_png(each.copy)), error=each.error) for each in found
    ]
    ratio = found[0].compression.ratio
    return ReconstructionsView(model=model, images=views, compression_ratio=ratio)


def _stored_id(call: Call, name: str) -> str:
    """Return the stored id of the queried model."""
    base = find_foundation(call.context.arns, name)
    if base is not None:
        return base.base
    return call.invoked_model(name).stored_id


def _media(text: str, kind: MediaKind, parameter: str) -> Media:
    """An image or a sound from base64."""
    if text.startswith("data:"):
        head, comma, text = text.partition(",")
        if not comma or not head.endswith(";base64"):
            raise Fault(
                "Validation", f"{parameter}: the data: address is not base64.", parameter=parameter
            )
        if not head.startswith(f"data:{kind}/"):
            raise Fault(
                "Validation",
                f"{parameter}: the data: address says to be {head[5:64]}, and no {SINGULAR[kind]}.",
                parameter=parameter,
            )
    try:
        data = base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error):
        raise Fault("Validation", f"{parameter}: it is not base64.", parameter=parameter) from None
    return Media(kind, parameter, data=data)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _picture(pixels: Sequence[Any], headers: dict[str, str] | None = None) -> Response:
    """One image as it is, several side by side."""
    from luthier.media.image_grid import encode_png, grid

    whole = pixels[0] if len(pixels) == 1 else grid(pixels)
    return Response(encode_png(whole), headers=headers, media_type=PNG)
