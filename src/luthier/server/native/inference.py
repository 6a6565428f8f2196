"""Predictions, embeddings, image generation and reconstructions of the native API."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from fastapi import Header, Response
from pydantic import Field, StrictFloat, StrictInt, model_validator

from luthier.data.inputs import LARGEST_VALUE, LONGEST_WINDOW, Media
from luthier.inference.inference import ImageRequest
from luthier.server.http.media import read_media
from luthier.server.http.messages import inference_faults
from luthier.server.http.routes import MODEL_SLOT, Name
from luthier.server.native.operations import (
    Call,
    Input,
    NativeCall,
    View,
    native_router,
    not_found,
    uploads,
)
from luthier.server.routing import answering_model

router = native_router()
PNG = "image/png"
PICTURES: dict[int | str, dict[str, Any]] = {200: {"content": {PNG: {}}}}
Accept = Annotated[str, Header()]
"""``Accept`` header. A client that accepts ``image/png`` receives a PNG file instead of JSON."""
WindowValue = Annotated[
    float, Field(strict=True, allow_inf_nan=False, ge=-LARGEST_VALUE, le=LARGEST_VALUE)
]


class PredictionInput(Input):
    """Input of a prediction: text, an image, audio, or the latest values of a time series."""

    text: str | None = Field(default=None, min_length=1)
    image: str | None = Field(default=None, min_length=1)
    """Image file (PNG, JPEG, WebP, …) in base64 or as ``data:`` URL."""
    audio: str | None = Field(default=None, min_length=1)
    """Audio file (WAV, FLAC, Ogg) in base64 or as ``data:`` URL."""
    window: tuple[WindowValue, ...] | tuple[tuple[WindowValue, ...], ...] | None = Field(
        default=None, min_length=1, max_length=LONGEST_WINDOW
    )
    """Values of a time series in order, or the values of all columns for each time; the model scores
    the last time. With fewer values than the
    model's window, the response has only ``score``, and ``anomalous`` is null."""

    @model_validator(mode="after")
    def _one(self) -> PredictionInput:
        if [self.text, self.image, self.audio, self.window].count(None) != 3:
            raise ValueError("an input has exactly one of text, image, audio and window")
        if len({len(each) if isinstance(each, tuple) else 0 for each in self.window or ()}) > 1:
            raise ValueError("the times of the window have different numbers of columns")
        return self


class PredictionRequest(Input):
    """Inputs of predictions."""

    inputs: tuple[PredictionInput, ...] = Field(min_length=1)
    """Independent inputs; at most ``inputs`` of the server's limits."""
    top: StrictInt | None = Field(default=None, ge=1)
    """Number of classes in ``scores``, most likely first."""

    @classmethod
    def from_file(cls, kind: str, data: bytes) -> Any:
        """Return the body for a single uploaded file."""
        return {"inputs": [{kind: _base64(data)}]}


class PredictionsView(View):
    """Predictions of a model."""

    model: str
    """Model name of the request."""
    answers: list[dict[str, Any]]
    """A prediction for each input. The fields depend on the objective: ``label`` and ``scores``,
    ``rating``, ``tags``, ``embedding``, ``score``, ``anomalous`` and ``column``, or ``text`` and
    ``probability``."""


class SampleRequest(Input):
    """Parameters of image generation."""

    count: StrictInt = Field(default=1, ge=1)
    """Number of images; at most ``inputs`` of the server's limits."""
    seed: StrictInt | None = Field(default=None, ge=0, lt=2**63)
    """Random seed. The response contains the seed."""
    label: str = Field(default="", max_length=1024)
    """Class of the images. The default generates an equal number of images for each class."""
    prompt: str = Field(default="", max_length=1024)
    """Description of the images, for models trained on captions."""
    steps: StrictInt | None = Field(default=None, ge=1, le=10_000)
    """Denoising steps of a diffusion model. The default is stored with the model."""
    guidance_scale: StrictFloat | StrictInt | None = Field(default=None, ge=0, le=100)
    """Strength of classifier-free guidance."""
    negative_prompt: str = Field(default="", max_length=1024)
    """Description of unwanted content, for diffusion models trained on captions."""


class SampleView(View):
    """A generated image."""

    png: str
    """PNG file in base64."""
    label: str | None = None
    """Class of the image, for class-conditional models."""


class SamplesView(View):
    """Generated images."""

    model: str
    seed: int
    """Random seed of the images."""
    width: int
    height: int
    images: list[SampleView]


class ReconstructionRequest(Input):
    """Images to encode and decode."""

    images: tuple[str, ...] = Field(min_length=1)
    """Image files in base64 or as ``data:`` URLs."""

    @classmethod
    def from_file(cls, kind: str, data: bytes) -> Any:
        """Return the body for a single uploaded image."""
        return {"images": [_base64(data)]}


class ReconstructionView(View):
    """Reconstruction of an image, or the restored image."""

    png: str
    """PNG file in base64."""
    error: float
    """Mean squared difference from the given image, for pixel values from 0 to 1."""


class ReconstructionsView(View):
    """Reconstructions of images."""

    model: str
    images: list[ReconstructionView]
    compression_ratio: float | None
    """Size of an image divided by the size of the latent code, in numbers; null if restored."""


@router.post(
    "/models/{model}/predictions",
    dependencies=[MODEL_SLOT],
    openapi_extra=uploads("image", "audio"),
)
def predict(call: NativeCall, model: Name, body: PredictionRequest) -> PredictionsView:
    """Return predictions for text, images, audio or time series."""
    stored_id = _stored_id(call, model)
    inputs: list[str | Media] = []
    for index, each in enumerate(body.inputs):
        if each.image is not None:
            inputs.append(read_media(each.image, "image", f"inputs.{index}.image"))
        elif each.audio is not None:
            inputs.append(read_media(each.audio, "audio", f"inputs.{index}.audio"))
        elif each.window is not None:
            values = np.array(each.window, np.float64)
            inputs.append(Media("window", f"inputs.{index}.window", array=values))
        else:
            inputs.append(each.text or "")
    with inference_faults():
        answers = call.context.pool.predict(stored_id, inputs, body.top)
    return PredictionsView(model=answering_model(model), answers=answers)


@router.post(
    "/models/{model}/images",
    dependencies=[MODEL_SLOT],
    response_model=SamplesView,
    responses=PICTURES,
)
def sample_images(
    call: NativeCall, model: Name, body: SampleRequest, accept: Accept = ""
) -> SamplesView | Response:
    """Generate images."""
    from luthier.media.image_grid import encode_png

    stored_id = _stored_id(call, model)
    with inference_faults():
        request = ImageRequest(
            body.count, body.prompt or body.label, body.seed, None, body.steps,
            body.guidance_scale, body.negative_prompt,
        )  # fmt: skip
        samples = call.context.pool.sample(stored_id, request)
    pixels = [each.pixels for each in samples.images]
    if PNG in accept:
        return _picture(pixels, model, {"X-Luthier-Seed": str(samples.seed)})
    height, width, _ = pixels[0].shape
    views = [
        SampleView(png=_base64(encode_png(each.pixels, model)), label=each.label or None)
        for each in samples.images
    ]
    return SamplesView(model=model, seed=samples.seed, width=width, height=height, images=views)


@router.post(
    "/models/{model}/reconstructions",
    dependencies=[MODEL_SLOT],
    response_model=ReconstructionsView,
    responses=PICTURES,
    openapi_extra=uploads("image"),
)
def reconstruct_images(
    call: NativeCall, model: Name, body: ReconstructionRequest, accept: Accept = ""
) -> ReconstructionsView | Response:
    """Encode and decode images with an autoencoder, or restore images."""
    from luthier.media.image_grid import encode_png

    stored_id = _stored_id(call, model)
    images = [
        read_media(each, "image", f"images.{index}") for index, each in enumerate(body.images)
    ]
    with inference_faults():
        copies = call.context.pool.reconstruct(stored_id, images)
    if PNG in accept:
        return _picture([pixels for each in copies for pixels in (each.original, each.copy)], model)
    views = [
        ReconstructionView(png=_base64(encode_png(each.copy, model)), error=each.error)
        for each in copies
    ]
    compression = copies[0].compression
    ratio = None if compression is None else compression.ratio
    return ReconstructionsView(model=model, images=views, compression_ratio=ratio)


def _stored_id(call: Call, name: str) -> str:
    """Return the library id of a base model, custom model or deployment."""
    target = call.context.models.target(call.account, name)
    if target is None:
        raise not_found("model", name)
    return target.stored_id


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _picture(pixels: Sequence[Any], model: str, headers: dict[str, str] | None = None) -> Response:
    """Return a PNG file of an image, or of a grid of images."""
    from luthier.media.image_grid import encode_png, grid

    whole = pixels[0] if len(pixels) == 1 else grid(pixels)
    return Response(encode_png(whole, model), headers=headers, media_type=PNG)
